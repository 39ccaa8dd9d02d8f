// The methods of State that are calls of one key. Each is a signature and a function that checks what was
// given and makes the StateCall; operations of many() come here, too.
#include <string_view>
#include <utility>

#include "ratesync/bindings/locks.h"
#include "ratesync/bindings/state.h"

namespace ratesync::bindings {

using store::StateOp;

namespace {

StateObject* self_of(PyObject* object) { return reinterpret_cast<StateObject*>(object); }

// A call of one key while its arguments are checked; null with an exception set.
class Draft {
 public:
  Draft(PyObject* self, StateOp::Verb verb, Shape shape, PyObject* key, PyObject* kind) {
    if (!check_name(key, "key", kMaxKey)) return;
    if (kind == Py_None) kind = nullptr;
    if (kind && !check_name(kind, "kind", kMaxName)) return;
    call_ = new_state_call(self_of(self), verb, shape);
    if (!call_) return;
    call_->key = Py_NewRef(key);
    call_->kind = Py_XNewRef(kind);
  }
  Draft(const Draft&) = delete;
  Draft& operator=(const Draft&) = delete;
  ~Draft() { Py_XDECREF(reinterpret_cast<PyObject*>(call_)); }
  explicit operator bool() const { return call_ != nullptr; }
  StateCallObject* operator->() const { return call_; }

  bool value(PyObject* given) const { return check_value(call_->state, given, &call_->value, &call_->type); }
  bool ttl(PyObject* given, bool keep_allowed = false) const {
    return check_ttl(given, keep_allowed, &call_->ttl);
  }
  bool number(const char* field, PyObject* given, std::int64_t least, const char* expected) const {
    return !given || given == Py_None || check_int64(given, field, least, expected, &call_->number);
  }
  // The version that the key must have, if one is named.
  bool version(PyObject* given) const {
    call_->number = store::kAnyVersion;
    return number("expected", given, 1, "a version, from 1, or None");
  }
  PyObject* release() { return reinterpret_cast<PyObject*>(std::exchange(call_, nullptr)); }

 private:
  StateCallObject* call_ = nullptr;
};

// key, value, ttl, kind
PyObject* make_check_and_set(PyObject* self, PyObject* const* given) {
  static PyObject* const kOne = PyUnicode_InternFromString("1");
  Draft call(self, StateOp::Verb::create, Shape::created, given[0], given[3]);
  if (!call || !call.value(given[1] ? given[1] : kOne) || !call.ttl(given[2])) return nullptr;
  return call.release();
}

// key, kind
PyObject* make_get(PyObject* self, PyObject* const* given) {
  return Draft(self, StateOp::Verb::get, Shape::value, given[0], given[1]).release();
}

PyObject* make_get_versioned(PyObject* self, PyObject* const* given) {
  return Draft(self, StateOp::Verb::get, Shape::versioned, given[0], given[1]).release();
}

// key, value, ttl, kind
PyObject* make_set(PyObject* self, PyObject* const* given) {
  Draft call(self, StateOp::Verb::set, Shape::version, given[0], given[3]);
  if (!call || !call.value(given[1]) || !call.ttl(given[2])) return nullptr;
  return call.release();
}

// key, expected, kind
PyObject* make_delete(PyObject* self, PyObject* const* given) {
  Draft call(self, StateOp::Verb::remove, Shape::changed, given[0], given[2]);
  if (!call || !call.version(given[1])) return nullptr;
  return call.release();
}

// key, delta, ttl, renew, kind
PyObject* make_increment(PyObject* self, PyObject* const* given) {
  Draft call(self, StateOp::Verb::add, Shape::number, given[0], given[4]);
  if (!call) return nullptr;
  call->number = 1;
  if (given[1] && !check_int64(given[1], "delta", INT64_MIN, "an int within 64 bits", &call->number))
    return nullptr;
  const int renew = given[3] ? PyObject_IsTrue(given[3]) : 0;
  if (renew < 0 || !call.ttl(given[2])) return nullptr;
  call->renew = renew > 0;
  return call.release();
}

// key, expected, value, ttl, kind
PyObject* make_compare_and_swap(PyObject* self, PyObject* const* given) {
  Draft call(self, StateOp::Verb::swap, Shape::swapped, given[0], given[4]);
  if (!call || !check_int64(given[1], "expected", 0, "a version, or 0 to create", &call->number) ||
      !call.value(given[2]) || !call.ttl(given[3] ? given[3] : state().keep, true))
    return nullptr;
  if (call->number > 0) return call.release();
  call->verb = StateOp::Verb::create;
  if (call->ttl == store::kKeepTtl) call->ttl = store::kNoTtl;  // there is none to keep
  return call.release();
}

// key, ttl, expected, kind
PyObject* make_touch(PyObject* self, PyObject* const* given) {
  Draft call(self, StateOp::Verb::touch, Shape::changed, given[0], given[3]);
  if (!call || !call.ttl(given[1]) || !call.version(given[2])) return nullptr;
  return call.release();
}

// key, at, kind
PyObject* make_schedule(PyObject* self, PyObject* const* given) {
  Draft call(self, StateOp::Verb::schedule, Shape::nothing, given[0], given[2]);
  if (!call || !check_due(given[1], &call->number, &call->due_in)) return nullptr;
  return call.release();
}

// key, claim, kind
PyObject* make_unschedule(PyObject* self, PyObject* const* given) {
  Draft call(self, StateOp::Verb::unschedule, Shape::changed, given[0], given[2]);
  if (!call || !call.number("claim", given[1], 1, "the claim that claim_due() gave, or None")) return nullptr;
  return call.release();
}

// key, value, ttl, kind. The row found is replied; its writer may come late.
PyObject* make_begin(PyObject* self, PyObject* const* given) {
  Draft call(self, StateOp::Verb::create, Shape::begun, given[0], given[3]);
  if (!call || !call.value(given[1]) || !call.ttl(given[2])) return nullptr;
  call->want_actual = true;
  return call.release();
}

// key, value, version, ttl, kind
PyObject* make_finish(PyObject* self, PyObject* const* given) {
  Draft call(self, StateOp::Verb::swap, Shape::finished, given[0], given[4]);
  if (!call || !call.value(given[1]) ||
      !check_int64(given[2], "version", 1, "the version that _begin() gave", &call->number) ||
      !call.ttl(given[3], true))
    return nullptr;
  call->revive = true;
  return call.release();
}

// --- as methods -----------------------------------------------------------------------------------

struct Method {
  const char* name;
  PyObject* (*make)(PyObject* self, PyObject* const* given);
  std::uint8_t positional;
  std::uint8_t required;
  const char* parameters[5];
};

constexpr Method kTable[] = {
    {"check_and_set", make_check_and_set, 3, 1, {"key", "value", "ttl", "kind"}},
    {"get", make_get, 1, 1, {"key", "kind"}},
    {"get_versioned", make_get_versioned, 1, 1, {"key", "kind"}},
    {"set", make_set, 3, 2, {"key", "value", "ttl", "kind"}},
    {"delete", make_delete, 2, 1, {"key", "expected", "kind"}},
    {"increment", make_increment, 4, 1, {"key", "delta", "ttl", "renew", "kind"}},
    {"compare_and_swap", make_compare_and_swap, 1, 3, {"key", "expected", "value", "ttl", "kind"}},
    {"touch", make_touch, 2, 2, {"key", "ttl", "expected", "kind"}},
    {"schedule", make_schedule, 2, 2, {"key", "at", "kind"}},
    {"unschedule", make_unschedule, 1, 1, {"key", "claim", "kind"}},
    {"_begin", make_begin, 4, 4, {"key", "value", "ttl", "kind"}},
    {"_finish", make_finish, 5, 5, {"key", "value", "version", "ttl", "kind"}},
};
constexpr std::size_t kMethodCount = std::size(kTable);
constexpr std::size_t kPublicCount = kMethodCount - 2;  // what many() takes

Signature g_signatures[kMethodCount];

template <std::size_t index>
PyObject* method(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  PyObject* given[5];
  if (!bind_arguments(g_signatures[index], args, nargs, kwnames, given)) return nullptr;
  return kTable[index].make(self, given);
}

constexpr int kFast = METH_FASTCALL | METH_KEYWORDS;

PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t, PyObject*)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

template <std::size_t index>
PyMethodDef define(const char* doc) {
  return {kTable[index].name, fast(method<index>), kFast, doc};
}

// Fields of ratesync.ops.Op, in order: an agreement with it.
constexpr std::string_view kFields[] = {"verb",     "key",   "kind",  "value", "ttl",
                                        "expected", "delta", "renew", "at"};

Py_ssize_t field_of(std::string_view name) {
  Py_ssize_t place = 0;
  while (kFields[place] != name) ++place;
  return place;
}

}  // namespace

// Their documentation stands in ratesync/states.py, which is what users see: here are the signatures only.
PyMethodDef kStateMethods[] = {
    define<0>("check_and_set($self, /, key, value='1', ttl=None, *, kind=None)\n--\n\n"),
    define<1>("get($self, /, key, *, kind=None)\n--\n\n"),
    define<2>("get_versioned($self, /, key, *, kind=None)\n--\n\n"),
    define<3>("set($self, /, key, value, ttl=None, *, kind=None)\n--\n\n"),
    define<4>("delete($self, /, key, expected=None, *, kind=None)\n--\n\n"),
    define<5>("increment($self, /, key, delta=1, ttl=None, renew=False, *, kind=None)\n--\n\n"),
    define<6>("compare_and_swap($self, /, key, *, expected, value, ttl=Ellipsis, kind=None)\n--\n\n"),
    define<7>("touch($self, /, key, ttl, *, expected=None, kind=None)\n--\n\n"),
    define<8>("schedule($self, /, key, at, *, kind=None)\n--\n\n"),
    define<9>("unschedule($self, /, key, *, claim=None, kind=None)\n--\n\n"),
    define<10>("Pending[(created, version, value of the row found)]"),
    define<11>("Pending[(done, version found)]"),
    {"many", fast(state_many), kFast, "many($self, /, ops, *, atomic=False)\n--\n\n"},
    {"claim_due", fast(state_claim_due), kFast,
     "claim_due($self, /, limit=100, lease=60, *, kind=None)\n--\n\n"},
    {"purge", fast(state_purge), kFast, "purge($self, /, limit=10000)\n--\n\n"},
    {"initialize", state_initialize, METH_NOARGS, "initialize($self, /)\n--\n\n"},
    {"_keep", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(state_keep)), METH_FASTCALL,
     "_keep(key, version, ttl, kind, age=0.0): Kept, renewed until stop()"},
    {"_bell", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(state_bell)), METH_FASTCALL,
     "_bell(key, kind, seen, timeout): Pending[int], of when to look again; its result is the next `seen`"},
    {"_ring", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(state_ring)), METH_FASTCALL,
     "_ring(key, kind): whoever waits for the key looks now"},
    {"_scan", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(state_scan)), METH_FASTCALL,
     "Pending[([(key, value, version, ms since 1970 or 0)], cursor, empty at the end)]"},
    {nullptr, nullptr, 0, nullptr},
};

PyObject* call_of_op(PyObject* self, PyObject* op) {
  if (PyTuple_GET_SIZE(op) != static_cast<Py_ssize_t>(std::size(kFields))) {
    raise_invalid("an operation of many() is made by the functions of ratesync.ops", "ops",
                  "ops.set(...), ops.get(...) ...", op);
    return nullptr;
  }
  PyObject* verb = PyTuple_GET_ITEM(op, 0);
  for (std::size_t i = 0; i < kPublicCount; ++i) {
    if (!PyUnicode_Check(verb) || PyUnicode_CompareWithASCIIString(verb, kTable[i].name) != 0) continue;
    PyObject* given[5] = {};
    for (std::size_t p = 0; p < 5 && kTable[i].parameters[p]; ++p) {
      const std::string_view name = kTable[i].parameters[p];
      given[p] = PyTuple_GET_ITEM(op, field_of(name == "claim" ? "expected" : name));
    }
    return kTable[i].make(self, given);
  }
  raise_invalid("not an operation of many()", "ops", "what the functions of ratesync.ops make", op);
  return nullptr;
}

bool init_state_methods() {
  for (std::size_t i = 0; i < kMethodCount; ++i) {
    Signature& signature = g_signatures[i];
    signature = {kTable[i].name, 0, kTable[i].positional, kTable[i].required, {}};
    while (signature.count < 5 && kTable[i].parameters[signature.count]) {
      PyObject* name = PyUnicode_InternFromString(kTable[i].parameters[signature.count]);
      if (!name) return false;
      signature.names[signature.count++] = name;
    }
  }
  return true;
}

}  // namespace ratesync::bindings
