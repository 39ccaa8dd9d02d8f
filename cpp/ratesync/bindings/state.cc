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
      raise_invalid(service.status().message.c_str(), "prefix", "", prefix);
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
  impl->locks = store->entry->locks.get();
  impl->space = std::make_shared<const store::Space>(
      store::Space{std::string(utf8(name_space)), std::string(utf8(tenant))});
  impl->kind = utf8(kind);
  impl->timeout = patience;
  impl->memory = dynamic_cast<memory::MemoryState*>(&service.value()->store());
  if (impl->memory) impl->family = impl->memory->family(*impl->space, impl->kind);
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
  Py_CLEAR(self_of(object)->last_kind);
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
  if (impl.engine->running() && impl.service->closing())
    return raise_status(
        Status::make(Code::closed, "the store of this state was closed: configure the store again to go on"),
        impl.store_id);
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
    {Py_tp_methods, kStateMethods},
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
  if (!init_state_methods()) return false;
  state().state_type = reinterpret_cast<PyTypeObject*>(PyType_FromModuleAndSpec(module, &kSpec, nullptr));
  return state().state_type && init_keep(module) && init_state_call_type(module) &&
         PyModule_AddObjectRef(module, "State", reinterpret_cast<PyObject*>(state().state_type)) == 0;
}

}  // namespace ratesync::bindings
