// State: base class of ratesync.State. Each method checks what it is given and makes a StateCall.
#include "ratesync/bindings/state.h"

#include <pybind11/pybind11.h>
#include <structmember.h>

#include "ratesync/bindings/calls.h"

namespace py = pybind11;

namespace ratesync::bindings {

using store::StateOp;

namespace {

StateObject* self_of(PyObject* object) { return reinterpret_cast<StateObject*>(object); }

// --- what it stands on ----------------------------------------------------------------------------

StateImpl* make_impl(PyObject* args, PyObject* kwargs, PyObject** encode, PyObject** decode) {
  static const char* names[] = {"store",   "prefix", "namespace", "tenant", "kind",
                                "timeout", "encode", "decode",    nullptr};
  PyObject *store_object, *prefix, *timeout = Py_None;
  PyObject *name_space = nullptr, *tenant = nullptr, *kind = nullptr;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|$OOOOOO:State", const_cast<char**>(names), &store_object,
                                   &prefix, &name_space, &tenant, &kind, &timeout, encode, decode))
    return nullptr;
  if (!name_space || !tenant || !kind) {
    PyErr_SetString(PyExc_TypeError, "State() needs namespace, tenant and kind");
    return nullptr;
  }
  PyStore* store = nullptr;
  try {
    store = py::cast<PyStore*>(py::handle(store_object));
  } catch (const py::cast_error&) {
    PyErr_SetString(PyExc_TypeError, "store must be a _core.Store");
    return nullptr;
  }
  bool ok = true;
  const Nanos patience = parse_timeout(timeout, kForever, &ok);
  if (!ok) return nullptr;
  if (patience == 0) {
    raise_invalid("a timeout of 0 leaves no time to ask the store", "timeout", "seconds above 0, or None",
                  timeout);
    return nullptr;
  }
  if (!PyUnicode_Check(prefix) || !utf8(prefix).data()) {
    PyErr_Clear();
    raise_invalid("a prefix must be text", "prefix", "up to 40 characters of a name", prefix);
    return nullptr;
  }
  if (!check_name(name_space, "namespace", kMaxName) || !check_name(tenant, "tenant", kMaxName) ||
      !check_name(kind, "kind", kMaxName))
    return nullptr;
  const std::string& store_id = store->entry->id;
  if (store->generation != g_generation.load(std::memory_order_relaxed) || !store->engine->running()) {
    raise_status(Status::make(Code::closed, "the store's engine was shut down"), store_id);
    return nullptr;
  }
  Result<engine::StateService*> service = store->entry->states->get(std::string(utf8(prefix)));
  if (!service.ok()) {
    if (service.status().code == Code::invalid) {
      raise_invalid(service.status().message.c_str(), "prefix", "see the message", prefix);
    } else {
      raise_status(service.status(), store_id);
    }
    return nullptr;
  }
  auto* impl = new StateImpl;
  impl->store_id = store_id;
  impl->prefix = utf8(prefix);
  impl->engine = store->engine;
  impl->service = service.value();
  impl->space = std::make_shared<const store::Space>(
      store::Space{std::string(utf8(name_space)), std::string(utf8(tenant))});
  impl->kind = utf8(kind);
  impl->timeout = patience;
  impl->direct = dynamic_cast<memory::MemoryStore*>(store->entry->store.get()) != nullptr;
  impl->generation = store->generation;
  return impl;
}

int state_init(PyObject* object, PyObject* args, PyObject* kwargs) {
  StateObject* self = self_of(object);
  if (self->impl) {
    PyErr_SetString(PyExc_RuntimeError, "a state is initialised once: its calls refer to what it is");
    return -1;
  }
  PyObject* encode = nullptr;
  PyObject* decode = nullptr;
  self->impl = make_impl(args, kwargs, &encode, &decode);
  if (!self->impl) return -1;
  if (encode && encode != Py_None) self->encode = Py_NewRef(encode);
  if (decode && decode != Py_None) self->decode = Py_NewRef(decode);
  return 0;
}

int state_traverse(PyObject* object, visitproc visit, void* arg) {
  Py_VISIT(self_of(object)->encode);
  Py_VISIT(self_of(object)->decode);
  Py_VISIT(Py_TYPE(object));
  return 0;
}

int state_clear(PyObject* object) {
  Py_CLEAR(self_of(object)->encode);
  Py_CLEAR(self_of(object)->decode);
  return 0;
}

void state_dealloc(PyObject* object) {
  StateObject* self = self_of(object);
  PyObject_GC_UnTrack(object);
  if (self->weakrefs) PyObject_ClearWeakRefs(object);
  (void)state_clear(object);
  // Forked: the parent's, leaked on purpose.
  if (self->impl && self->impl->generation == g_generation.load(std::memory_order_relaxed)) delete self->impl;
  PyTypeObject* type = Py_TYPE(object);
  type->tp_free(object);
  Py_DECREF(reinterpret_cast<PyObject*>(type));
}

}  // namespace

PyObject* raise_closed(const StateImpl& impl) {
  return raise_not_taken(
      *impl.engine, impl.store_id,
      "this state belongs to an engine that was shut down: get it again with store.state()");
}

StateImpl* live(StateObject* self) {
  StateImpl* impl = self->impl;
  if (!impl) {
    PyErr_SetString(PyExc_RuntimeError, "the state was not initialised: call super().__init__()");
    return nullptr;
  }
  if (impl->generation == g_generation.load(std::memory_order_relaxed)) return impl;
  // Forked: what this object points to is the parent's, and stays (calls may refer to it).
  PyObject* object = reinterpret_cast<PyObject*>(self);
  if (!PyObject_HasAttrString(object, "_renew")) {
    raise_status(Status::make(Code::closed, "this state was made before fork: make it again in the child"),
                 impl->store_id);
    return nullptr;
  }
  PyObject* fresh = PyObject_CallMethod(object, "_renew", nullptr);
  if (!fresh) return nullptr;
  if (PyObject_TypeCheck(fresh, state().state_type) && self_of(fresh)->impl &&
      self_of(fresh)->impl->generation == g_generation.load(std::memory_order_relaxed)) {
    impl = self->impl = new StateImpl(*self_of(fresh)->impl);
  } else {
    PyErr_SetString(PyExc_TypeError, "_renew() must return a State made in this process");
    impl = nullptr;
  }
  Py_DECREF(fresh);
  return impl;
}

namespace {

// --- calls ----------------------------------------------------------------------------------------

// Interned names of parameters; one place for all signatures.
template <class... Names>
Signature signature(const char* function, std::size_t positional, std::size_t required, Names... names) {
  return {function, sizeof...(names), positional, required, {PyUnicode_InternFromString(names)...}};
}

// A call of one key. Owns what it was given, or is null with an exception set.
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
  bool version(PyObject* given, std::int64_t least) const {
    return check_int64(given, "expected", least,
                       least == 0 ? "a version, or 0 to create" : "a version, from 1", &call_->number);
  }
  PyObject* release() { return reinterpret_cast<PyObject*>(std::exchange(call_, nullptr)); }

 private:
  StateCallObject* call_ = nullptr;
};

bool truth(PyObject* given, bool* out) {
  if (!given) return true;
  const int value = PyObject_IsTrue(given);
  *out = value > 0;
  return value >= 0;
}

PyObject* state_check_and_set(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  static const Signature kSignature = signature("check_and_set", 3, 1, "key", "value", "ttl", "kind");
  static PyObject* const kOne = PyUnicode_InternFromString("1");
  PyObject* given[4];
  if (!bind_arguments(kSignature, args, nargs, kwnames, given)) return nullptr;
  Draft call(self, StateOp::Verb::create, Shape::created, given[0], given[3]);
  if (!call || !call.value(given[1] ? given[1] : kOne) || !call.ttl(given[2])) return nullptr;
  return call.release();
}

PyObject* get_as(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames, Shape shape) {
  static const Signature kSignature = signature("get", 1, 1, "key", "kind");
  PyObject* given[2];
  if (!bind_arguments(kSignature, args, nargs, kwnames, given)) return nullptr;
  return Draft(self, StateOp::Verb::get, shape, given[0], given[1]).release();
}

PyObject* state_get(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  return get_as(self, args, nargs, kwnames, Shape::value);
}

PyObject* state_get_versioned(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  return get_as(self, args, nargs, kwnames, Shape::versioned);
}

PyObject* state_set(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  static const Signature kSignature = signature("set", 3, 2, "key", "value", "ttl", "kind");
  PyObject* given[4];
  if (!bind_arguments(kSignature, args, nargs, kwnames, given)) return nullptr;
  Draft call(self, StateOp::Verb::set, Shape::version, given[0], given[3]);
  if (!call || !call.value(given[1]) || !call.ttl(given[2])) return nullptr;
  return call.release();
}

PyObject* state_delete(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  static const Signature kSignature = signature("delete", 2, 1, "key", "expected", "kind");
  PyObject* given[3];
  if (!bind_arguments(kSignature, args, nargs, kwnames, given)) return nullptr;
  Draft call(self, StateOp::Verb::remove, Shape::changed, given[0], given[2]);
  if (!call) return nullptr;
  call->number = store::kAnyVersion;
  if (given[1] && given[1] != Py_None && !call.version(given[1], 1)) return nullptr;
  return call.release();
}

PyObject* state_increment(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  static const Signature kSignature = signature("increment", 4, 1, "key", "delta", "ttl", "renew", "kind");
  PyObject* given[5];
  if (!bind_arguments(kSignature, args, nargs, kwnames, given)) return nullptr;
  Draft call(self, StateOp::Verb::add, Shape::number, given[0], given[4]);
  if (!call) return nullptr;
  call->number = 1;
  if (given[1] && !check_int64(given[1], "delta", INT64_MIN, "an int within 64 bits", &call->number))
    return nullptr;
  if (!call.ttl(given[2]) || !truth(given[3], &call->renew)) return nullptr;
  return call.release();
}

PyObject* state_compare_and_swap(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  static const Signature kSignature =
      signature("compare_and_swap", 1, 3, "key", "expected", "value", "ttl", "kind");
  PyObject* given[5];
  if (!bind_arguments(kSignature, args, nargs, kwnames, given)) return nullptr;
  Draft call(self, StateOp::Verb::swap, Shape::swapped, given[0], given[4]);
  if (!call || !call.version(given[1], 0) || !call.value(given[2])) return nullptr;
  if (!call.ttl(given[3] ? given[3] : state().keep, true)) return nullptr;
  if (call->number > 0) return call.release();
  call->verb = StateOp::Verb::create;
  if (call->ttl == store::kKeepTtl) call->ttl = store::kNoTtl;  // there is none to keep
  return call.release();
}

PyObject* state_touch(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  static const Signature kSignature = signature("touch", 2, 2, "key", "ttl", "expected", "kind");
  PyObject* given[4];
  if (!bind_arguments(kSignature, args, nargs, kwnames, given)) return nullptr;
  Draft call(self, StateOp::Verb::touch, Shape::changed, given[0], given[3]);
  if (!call || !call.ttl(given[1])) return nullptr;
  call->number = store::kAnyVersion;
  if (given[2] && given[2] != Py_None && !call.version(given[2], 1)) return nullptr;
  return call.release();
}

PyObject* state_schedule(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  static const Signature kSignature = signature("schedule", 2, 2, "key", "at", "kind");
  PyObject* given[3];
  if (!bind_arguments(kSignature, args, nargs, kwnames, given)) return nullptr;
  Draft call(self, StateOp::Verb::schedule, Shape::nothing, given[0], given[2]);
  if (!call || !check_due(given[1], &call->number, &call->due_in)) return nullptr;
  return call.release();
}

PyObject* state_unschedule(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  static const Signature kSignature = signature("unschedule", 1, 1, "key", "claim", "kind");
  PyObject* given[3];
  if (!bind_arguments(kSignature, args, nargs, kwnames, given)) return nullptr;
  Draft call(self, StateOp::Verb::unschedule, Shape::changed, given[0], given[2]);
  if (!call) return nullptr;
  if (given[1] && given[1] != Py_None &&
      !check_int64(given[1], "claim", 1, "the claim that claim_due() gave", &call->number))
    return nullptr;
  return call.release();
}

// For idempotency: (created, version, value of the row found).
PyObject* state_begin(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  static const Signature kSignature = signature("_begin", 4, 4, "key", "value", "ttl", "kind");
  PyObject* given[4];
  if (!bind_arguments(kSignature, args, nargs, kwnames, given)) return nullptr;
  Draft call(self, StateOp::Verb::create, Shape::begun, given[0], given[3]);
  if (!call || !call.value(given[1]) || !call.ttl(given[2])) return nullptr;
  call->want_actual = true;
  return call.release();
}

// For idempotency: (done, version found); a row that merely expired still counts.
PyObject* state_finish(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  static const Signature kSignature = signature("_finish", 5, 5, "key", "value", "version", "ttl", "kind");
  PyObject* given[5];
  if (!bind_arguments(kSignature, args, nargs, kwnames, given)) return nullptr;
  Draft call(self, StateOp::Verb::swap, Shape::finished, given[0], given[4]);
  if (!call || !call.value(given[1]) || !call.version(given[2], 1) || !call.ttl(given[3], true))
    return nullptr;
  call->revive = true;
  return call.release();
}

PyCFunction fast(PyObject* (*method)(PyObject*, PyObject* const*, Py_ssize_t, PyObject*)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(method));
}
constexpr int kFast = METH_FASTCALL | METH_KEYWORDS;

PyMethodDef kMethods[] = {
    {"check_and_set", fast(state_check_and_set), kFast,
     "check_and_set($self, /, key, value='1', ttl=None, *, kind=None)\n--\n\nCreate a key that is not there: "
     "deduplication.\n\n"
     "Args:\n    key: text of 1 to 1024 bytes.\n    value: what to store.\n    ttl: seconds above 0 (or a "
     "timedelta) until it is gone; None: never.\n    kind: of the key; that of this state by default.\n\n"
     "Returns:\n    True when it was created now, False when it was there; exactly one of any number of "
     "callers gets True.\n\n"
     "Example:\n    if await state.check_and_set(\"order-42\", ttl=300):\n        ..."},
    {"get", fast(state_get), kFast,
     "get($self, /, key, *, kind=None)\n--\n\nThe value of a key, or None.\n\nExample:\n    value = await "
     "state.get(\"order-42\")"},
    {"get_versioned", fast(state_get_versioned), kFast,
     "get_versioned($self, /, key, *, kind=None)\n--\n\nThe value of a key with its version and expiry, or "
     "None.\n\nExample:\n    found = await state.get_versioned(\"order-42\")"},
    {"set", fast(state_set), kFast,
     "set($self, /, key, value, ttl=None, *, kind=None)\n--\n\nStore a value, whatever is there; the expiry "
     "is replaced, too.\n\nReturns:\n    The version written.\n\nExample:\n    version = await "
     "state.set(\"order-42\", \"paid\", ttl=300)"},
    {"delete", fast(state_delete), kFast,
     "delete($self, /, key, expected=None, *, kind=None)\n--\n\nRemove a key; only while it has the version "
     "`expected`, if given.\n\nReturns:\n    Whether it was there, in that version.\n\nExample:\n    gone = "
     "await state.delete(\"order-42\")"},
    {"increment", fast(state_increment), kFast,
     "increment($self, /, key, delta=1, ttl=None, renew=False, *, kind=None)\n--\n\nAdd to an integer; a key "
     "that is not there counts as 0.\n\nArgs:\n    delta: an int within 64 bits, also negative.\n    ttl: of "
     "the key when it is created; with `renew` also later.\n\nReturns:\n    The sum.\n\nRaises:\n    "
     "CounterError: the value is no integer, or the sum does not fit into 64 bits; nothing was changed.\n\n"
     "Example:\n    count = await state.increment(\"visits\", ttl=60)"},
    {"compare_and_swap", fast(state_compare_and_swap), kFast,
     "compare_and_swap($self, /, key, *, expected, value, ttl=KEEP, kind=None)\n--\n\nReplace the value of a "
     "key that has the version `expected`; 0: create it.\n\nArgs:\n    ttl: KEEP leaves the running "
     "expiry.\n\nReturns:\n    The new version.\n\nRaises:\n    StaleVersionError: it has another version, "
     "or "
     "is gone.\n\nExample:\n    version = await state.compare_and_swap(\"order-42\", expected=3, "
     "value=\"paid\")"},
    {"touch", fast(state_touch), kFast,
     "touch($self, /, key, ttl, *, expected=None, kind=None)\n--\n\nGive a key `ttl` seconds from now; the "
     "version stays.\n\nReturns:\n    Whether it is there (in the version `expected`).\n\nExample:\n    "
     "alive = await state.touch(\"session\", 300)"},
    {"schedule", fast(state_schedule), kFast,
     "schedule($self, /, key, at, *, kind=None)\n--\n\nGive a key a timeout, in place of the one it "
     "has.\n\nArgs:\n    at: a datetime with a time zone, seconds since 1970, or a timedelta from the "
     "store's now.\n\nExample:\n    await state.schedule(\"order-42\", timedelta(minutes=5))"},
    {"unschedule", fast(state_unschedule), kFast,
     "unschedule($self, /, key, *, claim=None, kind=None)\n--\n\nRemove the timeout of a key; only while "
     "`claim` is its newest claim, if given.\n\nReturns:\n    Whether it was there.\n\nExample:\n    await "
     "state.unschedule(due.key, claim=due.claim)"},
    {"_begin", fast(state_begin), kFast, "Pending[(created, version, value of the row found)]"},
    {"_finish", fast(state_finish), kFast, "Pending[(done, version found)]"},
    {nullptr, nullptr, 0, nullptr},
};

PyMemberDef kMembers[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(StateObject, weakrefs), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyType_Slot kSlots[] = {
    {Py_tp_doc, const_cast<char*>("Base of ratesync.State: the hot path.")},
    {Py_tp_new, reinterpret_cast<void*>(PyType_GenericNew)},
    {Py_tp_init, reinterpret_cast<void*>(state_init)},
    {Py_tp_dealloc, reinterpret_cast<void*>(state_dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(state_traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(state_clear)},
    {Py_tp_methods, kMethods},
    {Py_tp_members, kMembers},
    {0, nullptr},
};

PyType_Spec kSpec = {"ratesync._core.State", sizeof(StateObject), 0,
                     Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, kSlots};

// --- KEEP -----------------------------------------------------------------------------------------

PyObject* keep_repr(PyObject*) { return PyUnicode_FromString("KEEP"); }
PyObject* keep_reduce(PyObject*, PyObject*) { return PyUnicode_FromString("KEEP"); }

PyMethodDef kKeepMethods[] = {
    {"__reduce__", keep_reduce, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot kKeepSlots[] = {
    {Py_tp_doc, const_cast<char*>("The type of KEEP.")},
    {Py_tp_repr, reinterpret_cast<void*>(keep_repr)},
    {Py_tp_methods, kKeepMethods},
    {0, nullptr},
};

PyType_Spec kKeepSpec = {"ratesync._core.KeepType", sizeof(PyObject), 0,
                         Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
                         kKeepSlots};

bool init_keep(PyObject* module) {
  PyObject* type = PyType_FromModuleAndSpec(module, &kKeepSpec, nullptr);
  if (!type) return false;
  auto* as_type = reinterpret_cast<PyTypeObject*>(type);
  state().keep = as_type->tp_alloc(as_type, 0);
  const bool added = state().keep && PyModule_AddObjectRef(module, "KEEP", state().keep) == 0 &&
                     PyModule_AddObjectRef(module, "KeepType", type) == 0;
  Py_DECREF(type);
  return added;
}

}  // namespace

bool init_state_type(PyObject* module) {
  state().state_type = reinterpret_cast<PyTypeObject*>(PyType_FromModuleAndSpec(module, &kSpec, nullptr));
  return state().state_type && init_keep(module) && init_state_call_type(module) &&
         PyModule_AddObjectRef(module, "State", reinterpret_cast<PyObject*>(state().state_type)) == 0;
}

}  // namespace ratesync::bindings
