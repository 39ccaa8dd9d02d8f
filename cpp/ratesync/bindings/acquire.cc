// acquire(): from names to a Permit of one limit or several.
#include <algorithm>

#include "ratesync/bindings/calls.h"
#include "ratesync/bindings/permit.h"

namespace ratesync::bindings {

namespace {

// More is a mistake rather than a wish, and every one of them is locked in the store.
constexpr Py_ssize_t kMaxLimits = 64;

struct Named {
  LimiterObject* limiter = nullptr;  // new reference; null with an exception set
  PyObject* key = nullptr;           // new reference: the name was `limiter:key`
};

Named find_limiter(PyObject* name) {
  if (!PyUnicode_Check(name)) {
    raise_invalid("the limiter's name must be a string", "limiter_id", "str", name);
    return {};
  }
  PyObject* found = PyDict_GetItemWithError(state().bound, name);
  if (found) return {reinterpret_cast<LimiterObject*>(Py_NewRef(found))};
  if (PyErr_Occurred()) return {};
  if (!state().resolve) {
    PyErr_SetString(PyExc_RuntimeError, "ratesync is not initialised: import ratesync, not ratesync._core");
    return {};
  }
  found = PyObject_CallOneArg(state().resolve, name);
  if (!found) return {};
  Named out;
  if (PyTuple_Check(found) && PyTuple_GET_SIZE(found) == 2) {
    out.key = Py_NewRef(PyTuple_GET_ITEM(found, 1));
    Py_SETREF(found, Py_NewRef(PyTuple_GET_ITEM(found, 0)));
  }
  if (!PyObject_TypeCheck(found, state().limiter_type) || (out.key && !PyUnicode_Check(out.key))) {
    Py_DECREF(found);
    Py_CLEAR(out.key);
    PyErr_SetString(PyExc_TypeError, "the resolve hook must return a Limiter, or (Limiter, key)");
    return {};
  }
  out.limiter = reinterpret_cast<LimiterObject*>(found);
  return out;
}

bool key_given(PyObject* const* values, PyObject* kwnames) {
  const Py_ssize_t named = kwnames ? PyTuple_GET_SIZE(kwnames) : 0;
  for (Py_ssize_t i = 0; i < named; ++i)
    if (PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(kwnames, i), "key") == 0 && values[i] != Py_None)
      return true;
  return false;
}

// A permit of one limit, as `part` names it; `args` are what follows the names. Checks timeout and cost.
PermitObject* one_permit(const Named& named, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  if (named.key && key_given(args + nargs, kwnames)) {
    raise_invalid("the name has a key already: put all of it into key=", "key", "a name without a key",
                  named.key);
    return nullptr;
  }
  auto* permit = reinterpret_cast<PermitObject*>(make_permit(named.limiter, args, nargs, kwnames, "acquire"));
  if (!permit || !named.key) return permit;
  permit->group = group_for_key(*named.limiter->impl, named.key);
  if (!permit->group) {
    Py_DECREF(reinterpret_cast<PyObject*>(permit));
    return nullptr;
  }
  permit->key = Py_NewRef(named.key);
  return permit;
}

// Raises with a value of ours.
bool raise_invalid_value(const std::string& message, const char* field, const std::string& expected,
                         PyObject* received) {
  const bool never = raise_invalid(message.c_str(), field, expected.c_str(), received);
  Py_XDECREF(received);
  return never;
}

bool check_part(const PermitParts& parts, const PermitPart& added) {
  const LimiterImpl& impl = *added.limiter->impl;
  const limits::Params& params = impl.core->group->params;
  for (const PermitPart& other : parts.list)
    if (&other != &added && other.group->id == added.group->id &&
        other.limiter->impl->store_id == impl.store_id)
      return raise_invalid_value("a limit is named twice: name it once, and give a cost", "limiter_id",
                                 "different limits", PyUnicode_FromString(added.group->id.c_str()));
  if (params.algorithm == limits::Algorithm::token_bucket && params.has_rate() && added.cost > params.burst)
    return raise_invalid_value("several limits are granted at one moment, and limiter '" + impl.id +
                                   "' never has that many units at once: raise its burst",
                               "cost", "at most its burst of " + std::to_string(params.burst),
                               PyLong_FromLongLong(added.cost));
  return true;
}

// Adds a limit to the permit of several; the first one's permit becomes that of all. Takes over the reference
// to the limiter, not to the key. False with an exception set: the permit is gone then.
bool add_part(PermitObject** permit, const Named& named, PyObject* const* args, Py_ssize_t nargs,
              PyObject* kwnames) {
  PermitObject* one = named.limiter ? one_permit(named, args, nargs, kwnames) : nullptr;
  if (one) {
    if (!*permit) {
      *permit = one;
      one->parts = new PermitParts;
      Py_INCREF(reinterpret_cast<PyObject*>(one));
    }
    PermitParts& parts = *(*permit)->parts;
    const store::GroupRef& group = one->group ? one->group : named.limiter->impl->core->group;
    parts.list.push_back({named.limiter, group, one->cost});
    Py_DECREF(reinterpret_cast<PyObject*>(one));
    if (check_part(parts, parts.list.back())) return true;
  } else {
    Py_XDECREF(reinterpret_cast<PyObject*>(named.limiter));
  }
  Py_CLEAR(*permit);
  return false;
}

bool check_count(Py_ssize_t names) {
  return names <= kMaxLimits ||
         raise_invalid("too many limits in one call", "limiter_id", "at most 64", nullptr);
}

PyObject* several(PyObject* const* args, Py_ssize_t names, Py_ssize_t nargs, PyObject* kwnames) {
  if (!check_count(names)) return nullptr;
  if (key_given(args + nargs, kwnames)) {
    raise_invalid("with several limits key= does not say whose: write it into the name, as in 'tenant:7'",
                  "key", "no key=", nullptr);
    return nullptr;
  }
  PermitObject* permit = nullptr;
  for (Py_ssize_t i = 0; i < names; ++i) {
    const Named named = find_limiter(args[i]);
    const bool added = add_part(&permit, named, args + names, nargs - names, kwnames);
    Py_XDECREF(named.key);
    if (!added) return nullptr;
  }
  return reinterpret_cast<PyObject*>(permit);
}

}  // namespace

const char kAcquireDoc[] =
    "acquire(limiter_id, *more, timeout=None, cost=1, key=None)\n--\n\n"
    "Ask for a grant of one limit, or of several at once, all or nothing.\n\n"
    "The result is used once: `async with acquire(...)` in asyncio, `with acquire(...)` in a plain\n"
    "thread, or `await acquire(...)` for a grant without a body. Nothing is charged before that.\n\n"
    "Several limits are decided in one step per store, and a refusal charges nothing anywhere. Nothing\n"
    "is reserved while waiting: the call asks again when the time has come that the stores named, or\n"
    "when a slot came free. Calls for the same limits are served first come, first served; those who\n"
    "wait for just one of the limits reserve their turn, and so go first where it is always in demand.\n\n"
    "Args:\n"
    "    limiter_id: name given to `configure_limiter` or `[limiters.NAME]`; `NAME:KEY` is the limit\n"
    "        of that key, as `key=` and `get_or_clone_limiter(NAME, KEY)` know it.\n"
    "    *more: further names, at most 64 together; a number or None at the end is the timeout.\n"
    "    timeout: seconds to wait at most; 0 tries once; None takes the limiter's default (the\n"
    "        shortest of several), and waits without bound where that is None too. Decided in\n"
    "        advance: a slot beyond the deadline is refused at once and charges nothing.\n"
    "    cost: units to charge to every limit, at least 1.\n"
    "    key: limit each key separately, with the limiter's parameters. For one limiter only.\n\n"
    "Returns:\n"
    "    A `Permit`.\n\n"
    "Raises:\n"
    "    AcquireTimeoutError: not within the timeout; `group_id` names the limit that was in the way.\n"
    "    RateLimiterAcquisitionError: the store is down and the limiter is configured with\n"
    "        fail_closed.\n"
    "    LimiterNotFoundError: no such limiter.\n"
    "    ConfigValidationError: a bad argument, or a limit named twice (also a ValueError).\n"
    "    RuntimeError: `with` would have to block a running event loop.\n\n"
    "Example:\n"
    "    async with acquire(\"api\", timeout=2, key=\"tenant-7\") as permit:\n"
    "        ...\n"
    "    async with acquire(\"global\", \"tenant:7\", \"upload\", timeout=30):\n"
    "        ...";

PyObject* acquire_function(PyObject*, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  if (nargs == 1 && !kwnames) {
    PyObject* found = PyDict_GetItemWithError(state().bound, args[0]);
    if (found)
      return reinterpret_cast<PyObject*>(new_permit(reinterpret_cast<LimiterObject*>(found), -1, 1, nullptr));
    if (PyErr_Occurred()) PyErr_Clear();
  }
  if (nargs < 1) {
    PyErr_SetString(PyExc_TypeError, "acquire() needs the limiter's name");
    return nullptr;
  }
  Py_ssize_t names = 1;
  while (names < nargs && PyUnicode_Check(args[names])) ++names;
  if (names > 1) return several(args, names, nargs, kwnames);
  const Named named = find_limiter(args[0]);
  if (!named.limiter) return nullptr;
  PermitObject* permit = one_permit(named, args + 1, nargs - 1, kwnames);
  Py_DECREF(reinterpret_cast<PyObject*>(named.limiter));
  Py_XDECREF(named.key);
  return reinterpret_cast<PyObject*>(permit);
}

// acquire_limits([(limiter, key or None), ...], timeout): the permit of several limits that are at hand.
PyObject* acquire_limits_function(PyObject*, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 2 || !PyList_Check(args[0]) || PyList_GET_SIZE(args[0]) == 0) {
    PyErr_SetString(PyExc_TypeError, "acquire_limits() needs a list of limits and a timeout");
    return nullptr;
  }
  if (!check_count(PyList_GET_SIZE(args[0]))) return nullptr;
  PermitObject* permit = nullptr;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(args[0]); ++i) {
    PyObject *limiter, *key;
    if (!PyArg_ParseTuple(PyList_GET_ITEM(args[0], i), "O!O:limit", state().limiter_type, &limiter, &key) ||
        !live(reinterpret_cast<LimiterObject*>(limiter))) {
      Py_XDECREF(reinterpret_cast<PyObject*>(permit));
      return nullptr;
    }
    const Named named{reinterpret_cast<LimiterObject*>(Py_NewRef(limiter)), key == Py_None ? nullptr : key};
    if (!add_part(&permit, named, args + 1, 1, nullptr)) return nullptr;
  }
  return reinterpret_cast<PyObject*>(permit);
}

// attempt(permit): whether it is granted, as a Pending. The slots stay with the limiters.
PyObject* attempt_function(PyObject*, PyObject* permit) {
  if (!PyObject_TypeCheck(permit, state().permit_type)) {
    PyErr_SetString(PyExc_TypeError, "attempt() needs a Permit");
    return nullptr;
  }
  reinterpret_cast<PermitObject*>(permit)->bare = true;
  return make_attempt(permit, Mode::boolean);
}

}  // namespace ratesync::bindings
