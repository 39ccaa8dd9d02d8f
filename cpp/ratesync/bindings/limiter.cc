// Limiter: base class of ratesync.RateLimiter. `async with limiter` is the fastest form.
#include <Python.h>
#include <structmember.h>

#include <cmath>

#include "ratesync/bindings/calls.h"
#include "ratesync/bindings/objects.h"

namespace ratesync::bindings {

std::atomic<unsigned> g_generation{0};

ModuleState g_state;

namespace {

LimiterObject* self_of(PyObject* object) { return reinterpret_cast<LimiterObject*>(object); }

constexpr std::size_t kMaxGroup = 255;  // characters, as the table's column

std::size_t characters(const std::string& utf8) {
  std::size_t count = 0;
  for (const char c : utf8) count += (static_cast<unsigned char>(c) & 0xC0) != 0x80;
  return count;
}

// base + ":" + key, where a colon or backslash of the key is escaped, so that no two pairs meet.
bool keyed_group(const LimiterImpl& impl, PyObject* key, std::string* out) {
  if (!PyUnicode_Check(key)) return raise_invalid("a key must be a string", "key", "str", key);
  Py_ssize_t size = 0;
  const char* text = PyUnicode_AsUTF8AndSize(key, &size);
  if (!text) {
    PyErr_Clear();
    return raise_invalid("a key must be encodable as UTF-8", "key", "text without surrogates", key);
  }
  if (size == 0) return raise_invalid("a key must not be empty", "key", "at least one character", key);
  out->reserve(impl.id.size() + 1 + static_cast<std::size_t>(size));
  *out = impl.id;
  out->push_back(':');
  for (Py_ssize_t i = 0; i < size; ++i) {
    if (text[i] == '\0') return raise_invalid("a key must not contain NUL", "key", "text without NUL", key);
    if (text[i] == ':' || text[i] == '\\') out->push_back('\\');
    out->push_back(text[i]);
  }
  if (characters(*out) > kMaxGroup)
    return raise_invalid("limiter name and key are too long together: hash the key (hash_identifier)", "key",
                         "at most 255 characters", key);
  return true;
}

bool parse_cost(PyObject* value, const LimiterImpl& impl, std::int64_t* cost) {
  if (!PyLong_Check(value) || PyBool_Check(value))
    return raise_invalid("a cost must be a whole number", "cost", "int of at least 1", value);
  int overflow = 0;
  *cost = PyLong_AsLongLongAndOverflow(value, &overflow);
  if (overflow != 0) return raise_invalid("a cost is too large", "cost", "int below 2**63", value);
  const Status status = limits::validate_cost(impl.core->group->params, *cost);
  if (!status.ok())
    return raise_invalid(status.message.c_str(), "cost",
                         impl.core->group->params.is_window() ? "int from 1 to the limit"
                                                              : "int of at least 1 within 31 years' reach",
                         value);
  return true;
}

}  // namespace

bool raise_invalid(const char* message, const char* field, const char* expected, PyObject* received) {
  PyObject* repr = received ? PyObject_Repr(received) : PyUnicode_FromString("nothing");
  if (!repr) {
    PyErr_Clear();
    repr = PyUnicode_FromString("something without a repr");
  }
  PyObject* shown = PyUnicode_Substring(repr, 0, 80);
  Py_DECREF(repr);
  PyObject* error = state().invalid_error ? PyObject_CallFunction(state().invalid_error, "sssO", message,
                                                                  field, expected, shown)
                                          : PyObject_CallFunction(PyExc_ValueError, "s", message);
  Py_XDECREF(shown);
  if (error) {
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error)), error);
    Py_DECREF(error);
  }
  return false;
}

Nanos parse_timeout(PyObject* value, Nanos when_none, bool* ok) {
  *ok = true;
  if (value == Py_None) return when_none;
  if (PyBool_Check(value) || (!PyFloat_Check(value) && !PyLong_Check(value) && !PyIndex_Check(value) &&
                              !PyObject_HasAttrString(value, "__float__"))) {
    *ok = raise_invalid("a timeout must be a number of seconds", "timeout", "a number >= 0, or None", value);
    return 0;
  }
  const double seconds = PyFloat_AsDouble(value);
  if (seconds == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    *ok = raise_invalid("a timeout must be a number of seconds", "timeout", "a number >= 0, or None", value);
    return 0;
  }
  if (std::isnan(seconds) || seconds < 0) {
    *ok = raise_invalid("a timeout must not be negative or NaN: 0 tries once, None waits", "timeout",
                        "a number >= 0, or None", value);
    return 0;
  }
  if (seconds >= 9e9) return kForever;
  return from_seconds(seconds);
}

PyObject* make_permit(LimiterObject* limiter, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames,
                      const char* function) {
  LimiterImpl* impl = live(limiter);
  if (!impl) return nullptr;
  if (nargs > 1) {
    PyErr_Format(PyExc_TypeError, "%s() takes the timeout as its last positional argument", function);
    return nullptr;
  }
  PyObject* timeout = nargs == 1 ? args[0] : nullptr;
  PyObject* cost = nullptr;
  PyObject* key = nullptr;
  const Py_ssize_t named = kwnames ? PyTuple_GET_SIZE(kwnames) : 0;
  for (Py_ssize_t i = 0; i < named; ++i) {
    PyObject* name = PyTuple_GET_ITEM(kwnames, i);
    PyObject* value = args[nargs + i];
    if (PyUnicode_CompareWithASCIIString(name, "timeout") == 0 && !timeout) {
      timeout = value;
    } else if (PyUnicode_CompareWithASCIIString(name, "cost") == 0) {
      cost = value;
    } else if (PyUnicode_CompareWithASCIIString(name, "key") == 0) {
      key = value == Py_None ? nullptr : value;
    } else {
      PyErr_Format(PyExc_TypeError,
                   "%s() got an unexpected keyword argument '%U': expected timeout, cost or key", function,
                   name);
      return nullptr;
    }
  }
  Nanos wait = -1;
  std::int64_t units = 1;
  bool ok = true;
  if (timeout) wait = parse_timeout(timeout, -1, &ok);
  if (!ok || (cost && !parse_cost(cost, *impl, &units))) return nullptr;
  const limits::Params& params = impl->core->group->params;
  const Nanos effective = wait < 0 ? impl->core->policy.default_timeout : wait;
  if (effective == 0 && !params.is_window() && params.has_rate() && units > params.burst) {
    raise_invalid("this cost can never be had at once: raise burst, or give a timeout", "cost",
                  ("at most burst (" + std::to_string(params.burst) + ") with timeout 0").c_str(), cost);
    return nullptr;
  }
  std::string group;
  if (key && !keyed_group(*impl, key, &group)) return nullptr;
  PermitObject* permit = new_permit(limiter, wait, units, key);
  if (permit && key) permit->group = std::make_shared<const store::Group>(std::move(group), params);
  return reinterpret_cast<PyObject*>(permit);
}

store::GroupRef group_for_key(LimiterImpl& impl, PyObject* key) {
  if (!key || key == Py_None) return impl.core->group;
  std::string id;
  if (!keyed_group(impl, key, &id)) return nullptr;
  return std::make_shared<const store::Group>(std::move(id), impl.core->group->params);
}

namespace {

// Lets `limiter` stand on what `fresh` stands on. What it stood on before is leaked: permits and
// waiters may refer to it, and after a fork its locks may be held by a thread that is not here.
LimiterImpl* adopt(LimiterObject* limiter, PyObject* fresh) {
  if (!PyObject_TypeCheck(fresh, state().limiter_type) || !self_of(fresh)->impl ||
      self_of(fresh)->impl->generation != g_generation.load(std::memory_order_relaxed)) {
    PyErr_SetString(PyExc_RuntimeError,
                    "this limiter was made before fork and is not configured in the child");
    return nullptr;
  }
  const LimiterImpl& from = *self_of(fresh)->impl;
  limiter->impl =
      new LimiterImpl{from.id,         from.store_id, from.engine,
                      from.core,       from.memory,   from.memory ? from.memory->pin(from.id) : memory::Pin(),
                      from.generation, from.rate_only};
  return limiter->impl;
}

}  // namespace

LimiterImpl* live(LimiterObject* limiter) {
  LimiterImpl* impl = limiter->impl;
  if (!impl) {
    PyErr_SetString(PyExc_RuntimeError, "the limiter was not initialised: call super().__init__()");
    return nullptr;
  }
  if (impl->generation == g_generation.load(std::memory_order_relaxed)) return impl;
  // Forked: what this object points to is the parent's. Its name leads to a fresh one, unless it was
  // constructed without one: then it has to know itself how to renew what it stands on.
  PyObject* self = reinterpret_cast<PyObject*>(limiter);
  PyObject* fresh = nullptr;
  if (PyObject_HasAttrString(self, "_renew")) {
    fresh = PyObject_CallMethod(self, "_renew", nullptr);
  } else if (state().resolve) {
    fresh = PyObject_CallFunction(state().resolve, "s#", impl->id.data(),
                                  static_cast<Py_ssize_t>(impl->id.size()));
  }
  if (!fresh) return nullptr;
  LimiterImpl* renewed = adopt(limiter, fresh);
  Py_DECREF(fresh);
  return renewed;
}

std::uint64_t caller_key(bool async) {
  if (!async) return (static_cast<std::uint64_t>(PyThread_get_thread_ident()) << 1) | 1;
  PyObject* task = load_asyncio() ? PyObject_CallNoArgs(state().current_task) : nullptr;
  if (!task) {
    PyErr_Clear();
    return 0;
  }
  const auto key = reinterpret_cast<std::uintptr_t>(task) & ~std::uint64_t{1};
  Py_DECREF(task);
  return key;
}

namespace {

// --- `async with limiter` / `with limiter` ---------------------------------------------------------

PyObject* enter(LimiterObject* limiter, bool async) {
  PermitObject* permit = new_permit(limiter, -1, 1, nullptr);
  if (!permit) return nullptr;
  permit->entered = true;  // the slot is kept by the caller's identity, since the limiter is shared
  PyObject* result = async ? begin_async(permit, Mode::none) : run_sync(permit, Mode::none);
  Py_DECREF(reinterpret_cast<PyObject*>(permit));
  return result;
}

PyObject* limiter_aenter(PyObject* object, PyObject*) {
  LimiterObject* limiter = self_of(object);
  LimiterImpl* impl = limiter->impl;
  if (!impl || impl->generation != g_generation.load(std::memory_order_relaxed)) impl = live(limiter);
  if (!impl) return nullptr;
  if (impl->rate_only && impl->engine->running()) {
    const memory::QuickReply reply =
        impl->memory->try_now(*impl->pin.shard(), *impl->pin.cell(), *impl->core->group, 1);
    if (reply.verdict == memory::Quick::granted) {
      engine::Counters& counters = impl->core->counters;
      counters.quick_acquisitions.store(counters.quick_acquisitions.load(std::memory_order_relaxed) + 1,
                                        std::memory_order_relaxed);
      counters.last_acquisition.store(reply.now, std::memory_order_relaxed);
      Py_INCREF(state().ready_none);
      return state().ready_none;
    }
  }
  return enter(limiter, true);
}

void leave(LimiterImpl& impl, bool async) {
  if (!impl.core->group->params.has_concurrency()) return;
  auto it = impl.entered.find(caller_key(async));
  // Left by another task or thread than entered it (an exit stack, a coroutine closed from outside,
  // a fixture): the slots are alike, so any of them keeps the count right.
  if (it == impl.entered.end()) it = impl.entered.begin();
  if (it == impl.entered.end()) return;
  const SlotRef slot = it->second.back();
  it->second.pop_back();
  if (it->second.empty()) impl.entered.erase(it);
  if (slot) release_slot(impl, *slot);
}

PyObject* limiter_aexit(PyObject* object, PyObject* const*, Py_ssize_t) {
  LimiterImpl* impl = self_of(object)->impl;
  if (!impl || !impl->rate_only) {
    impl = live(self_of(object));
    if (!impl) return nullptr;
    leave(*impl, true);
  }
  Py_INCREF(state().ready_none);
  return state().ready_none;
}

PyObject* limiter_enter(PyObject* object, PyObject*) { return enter(self_of(object), false); }

PyObject* limiter_exit(PyObject* object, PyObject* const*, Py_ssize_t) {
  LimiterImpl* impl = live(self_of(object));
  if (!impl) return nullptr;
  leave(*impl, false);
  Py_RETURN_NONE;
}

PyObject* limiter_acquire_context(PyObject* object, PyObject* const* args, Py_ssize_t nargs,
                                  PyObject* kwnames) {
  return make_permit(self_of(object), args, nargs, kwnames, "acquire_context");
}

PyObject* limiter_release_bare(PyObject* object, PyObject*) {
  LimiterImpl* impl = live(self_of(object));
  if (!impl) return nullptr;
  while (!impl->bare.empty()) {
    const SlotRef slot = std::move(impl->bare.front());
    impl->bare.pop_front();
    if (!slot->held.load() || (slot->permit && slot->permit->lost.load(std::memory_order_acquire))) continue;
    release_slot(*impl, *slot);
    Py_RETURN_TRUE;
  }
  Py_RETURN_FALSE;
}

PyObject* limiter_adopt(PyObject* object, PyObject* fresh) {
  if (!adopt(self_of(object), fresh)) return nullptr;
  Py_RETURN_NONE;
}

PyObject* limiter_forget(PyObject* object, PyObject*) {
  LimiterImpl* impl = live(self_of(object));
  if (!impl) return nullptr;
  auto* memory = dynamic_cast<memory::MemoryStore*>(&impl->core->service->limits());
  if (memory) memory->reset(impl->core->group, [](const Result<store::Unit>&) {});
  Py_RETURN_NONE;
}

int limiter_init(PyObject* object, PyObject* args, PyObject* kwargs) {
  if (self_of(object)->impl) {
    PyErr_SetString(PyExc_RuntimeError, "a limiter is initialised once: its permits refer to what it is");
    return -1;
  }
  LimiterImpl* impl = make_limiter_impl(args, kwargs);
  if (!impl) return -1;
  self_of(object)->impl = impl;
  return 0;
}

void limiter_dealloc(PyObject* object) {
  LimiterObject* limiter = self_of(object);
  if (limiter->weakrefs) PyObject_ClearWeakRefs(object);
  if (limiter->impl && limiter->impl->generation == g_generation.load(std::memory_order_relaxed))
    delete limiter->impl;
  PyTypeObject* type = Py_TYPE(object);
  type->tp_free(object);
  Py_DECREF(reinterpret_cast<PyObject*>(type));
}

PyMethodDef kMethods[] = {
    {"__aenter__", limiter_aenter, METH_NOARGS, "Acquire one unit with the default timeout."},
    {"__aexit__", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(limiter_aexit)), METH_FASTCALL,
     "Give the concurrency slot of this task back."},
    {"__enter__", limiter_enter, METH_NOARGS,
     "Acquire one unit with the default timeout, blocking this thread."},
    {"__exit__", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(limiter_exit)), METH_FASTCALL,
     "Give the concurrency slot of this thread back."},
    {"acquire_context", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(limiter_acquire_context)),
     METH_FASTCALL | METH_KEYWORDS,
     "acquire_context(timeout=None, *, cost=1, key=None)\n--\n\nLike `acquire()`, for this limiter "
     "object.\n\n"
     "Returns:\n    A `Permit`, to be used once.\n\nExample:\n    async with "
     "limiter.acquire_context(timeout=2) as permit:\n        ..."},
    {"_release_bare", limiter_release_bare, METH_NOARGS,
     "Free the oldest bare acquire; False when there is none."},
    {"_try", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(limiter_try)), METH_FASTCALL,
     "Pending[bool]"},
    {"_acquire_bare", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(limiter_acquire_bare)),
     METH_FASTCALL, "Pending[None]"},
    {"_peek", limiter_peek, METH_O, "Pending[dict]"},
    {"_reset", limiter_reset, METH_O, "Pending[None]"},
    {"_adopt", limiter_adopt, METH_O, "Stand on what another limiter stands on."},
    {"_forget", limiter_forget, METH_NOARGS,
     "Reset at once, on the memory store, while nobody uses the group."},
    {"_counters", limiter_counters, METH_NOARGS, "dict of live counters"},
    {nullptr, nullptr, 0, nullptr},
};

PyMemberDef kMembers[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(LimiterObject, weakrefs), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyType_Slot kSlots[] = {
    {Py_tp_doc, const_cast<char*>("Base of ratesync.RateLimiter: the hot path.")},
    {Py_tp_new, reinterpret_cast<void*>(PyType_GenericNew)},
    {Py_tp_init, reinterpret_cast<void*>(limiter_init)},
    {Py_tp_dealloc, reinterpret_cast<void*>(limiter_dealloc)},
    {Py_tp_methods, kMethods},
    {Py_tp_members, kMembers},
    {0, nullptr},
};

PyType_Spec kSpec = {"ratesync._core.Limiter", sizeof(LimiterObject), 0,
                     Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, kSlots};

}  // namespace

bool init_limiter_type(PyObject* module) {
  state().limiter_type = reinterpret_cast<PyTypeObject*>(PyType_FromModuleAndSpec(module, &kSpec, nullptr));
  return state().limiter_type &&
         PyModule_AddObjectRef(module, "Limiter", reinterpret_cast<PyObject*>(state().limiter_type)) == 0;
}

}  // namespace ratesync::bindings
