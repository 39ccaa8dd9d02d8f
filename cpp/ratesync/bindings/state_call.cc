// StateCall: one operation on state, from the call to its result.
#include <array>
#include <utility>

#include "ratesync/bindings/state.h"
#include "ratesync/engine/op_ids.h"

namespace ratesync::bindings {

using store::StateOp;

namespace {

StateCallObject* self_of(PyObject* object) { return reinterpret_cast<StateCallObject*>(object); }
PyObject* object_of(StateCallObject* call) { return reinterpret_cast<PyObject*>(call); }

// Calls live for a moment: the memory of the last ones is used again.
std::array<StateCallObject*, 128> g_spare;
std::size_t g_spares = 0;

memory::ValueView view_of(const StateCallObject& call) {
  memory::ValueView view;
  view.type = call.type;
  if (call.type == store::Value::Type::integer) {
    view.number = PyLong_AsLongLong(call.value);
  } else if (PyUnicode_Check(call.value)) {
    view.data = utf8(call.value);
  } else {
    view.data = {PyBytes_AS_STRING(call.value), static_cast<std::size_t>(PyBytes_GET_SIZE(call.value))};
  }
  return view;
}

// A caller names one kind again and again, mostly by the same object.
const memory::Family& family_of(StateObject& owner, const StateImpl& impl, PyObject* kind) {
  if (owner.last_kind != kind || owner.last_of != &impl) {
    impl.named = impl.memory->family(*impl.space, utf8(kind));
    owner.last_of = &impl;
    Py_XSETREF(owner.last_kind, Py_NewRef(kind));
  }
  return *impl.named;
}

}  // namespace

void fill_op(const StateCallObject& call, const StateImpl& impl, Nanos deadline, StateOp* op) {
  op->verb = call.verb;
  op->want_actual = call.want_actual;
  op->renew = call.renew;
  op->revive = call.revive;
  op->space = impl.space;
  if (call.kind) {
    op->kind = utf8(call.kind);
  } else {
    op->kind = impl.kind;
  }
  op->key = utf8(call.key);
  if (call.value) fill_value(call.value, call.type, &op->value);
  op->ttl = call.ttl;
  switch (call.verb) {
    case StateOp::Verb::add: op->delta = call.number; break;
    case StateOp::Verb::schedule:
      op->due = call.number;
      op->due_in = call.due_in;
      break;
    default: op->expected = call.number; break;
  }
  op->id = engine::next_op_id();
  op->deadline = deadline;
}

PyObject* run_one_direct(const StateCallObject& call, const StateImpl& impl) {
  const memory::Family& family = call.kind ? family_of(*call.state, impl, call.kind) : *impl.family;
  if (call.shape == Shape::created)
    return PyBool_FromLong(impl.memory->create(family, utf8(call.key), view_of(call), call.ttl));
  memory::Ask ask;
  ask.verb = call.verb;
  ask.want_actual = call.want_actual;
  ask.renew = call.renew;
  ask.revive = call.revive;
  ask.due_in = call.due_in;
  ask.key = utf8(call.key);
  if (call.value) ask.value = view_of(call);
  ask.delta = ask.expected = ask.due = call.number;  // one of them counts
  ask.ttl = call.ttl;
  return shape_answer(call, impl.memory->decide(family, ask));
}

namespace {

// The state to work on, once per call. Null with an exception set.
StateImpl* use(StateCallObject* call) {
  if (call->used) {
    PyErr_SetString(PyExc_RuntimeError, "this call was made already: call the method again for a new one");
    return nullptr;
  }
  StateImpl* impl = live(call->state);
  if (!impl) return nullptr;
  if (!impl->engine->running() || impl->service->closing()) {
    raise_closed(*impl);
    return nullptr;
  }
  call->used = true;
  return impl;
}

// --- decided on the calling thread ----------------------------------------------------------------

PyObject* run_direct(const StateCallObject& call, const StateImpl& impl) {
  return call.parts ? run_many_direct(call, impl) : run_one_direct(call, impl);
}

// --- through the I/O thread -----------------------------------------------------------------------

engine::Acquisition* new_task(const StateCallObject& call, const StateImpl& impl) {
  const Nanos deadline = saturating_add(impl.engine->clock().now(), impl.timeout);
  if (call.parts) return new_many_task(call, impl, deadline);
  auto* task = new engine::StateTask(*impl.service);
  fill_op(call, impl, deadline, task);
  return task;
}

PyObject* shape_task(const StateCallObject& call, engine::Completion& completion) {
  if (call.parts) return shape_many(call, static_cast<engine::StateManyTask&>(completion));
  const auto& task = static_cast<engine::StateTask&>(completion);
  return shape_reply(call, task.status(), task.reply);
}

PyObject* finish(PyObject* owner, engine::Completion& completion) {
  return shape_task(*self_of(owner), completion);
}

WaiterObject* submit(StateCallObject* call, const StateImpl& impl) {
  std::shared_ptr<LoopState> loop = running_loop_state();
  WaiterObject* waiter = loop ? new_waiter(impl.engine, loop) : nullptr;
  if (!waiter) return nullptr;
  engine::Acquisition* task = new_task(*call, impl);
  task->ref();  // one for the engine and its queue, one for the waiter
  task->target = loop->target;
  task->cookie = waiter;
  waiter->completion = task;
  waiter->cancellable = true;
  waiter->owner = Py_NewRef(object_of(call));
  waiter->finish = finish;
  Py_INCREF(reinterpret_cast<PyObject*>(waiter));  // the queue's
  if (impl.engine->submit(engine::StartTask{task})) return waiter;
  waiter->state = WaiterObject::State::consumed;
  task->unref();
  Py_DECREF(reinterpret_cast<PyObject*>(waiter));
  Py_DECREF(reinterpret_cast<PyObject*>(waiter));
  raise_closed(impl);
  return nullptr;
}

PyObject* run_blocking(StateCallObject* call, const StateImpl& impl) {
  auto target = std::make_shared<engine::SyncTarget>();
  engine::Acquisition* task = new_task(*call, impl);
  task->target = target;
  // The state may be rebound while the GIL is released: keep its engine.
  const std::shared_ptr<engine::Engine> engine = impl.engine;
  if (!engine->submit(engine::StartTask{task})) {
    task->unref();
    return raise_closed(impl);
  }
  if (!wait_sync(*engine, task, target, true)) return nullptr;
  PyObject* result = shape_task(*call, *task);
  task->unref();
  return result;
}

// --- the object -----------------------------------------------------------------------------------

PyObject* call_wait(PyObject* object, PyObject*) {
  StateCallObject* call = self_of(object);
  StateImpl* impl = use(call);
  if (!impl) return nullptr;
  if (impl->memory) return run_direct(*call, *impl);
  if (in_running_loop()) {
    call->used = false;
    PyErr_SetString(PyExc_RuntimeError, "wait() would block the running event loop: await it instead");
    return nullptr;
  }
  return run_blocking(call, *impl);
}

// `await`: decided in the first send() where the store is direct, otherwise the waiter takes over.
PyObject* call_await(PyObject* object) {
  StateCallObject* call = self_of(object);
  if (call->state->impl && call->state->impl->memory) return Py_NewRef(object);
  StateImpl* impl = use(call);
  if (!impl) return nullptr;
  if (!impl->memory) return reinterpret_cast<PyObject*>(submit(call, *impl));
  call->used = false;  // rebound to a direct one after a fork
  return Py_NewRef(object);
}

PyTypeObject* waiter_type() { return state().waiter_type; }

// As the iterator of a direct call, and as the coroutine that create_task() is given.
PySendResult call_send(PyObject* object, PyObject* value, PyObject** result) {
  StateCallObject* call = self_of(object);
  if (!call->waiter) {
    StateImpl* impl = use(call);
    if (impl && impl->memory) {
      *result = run_direct(*call, *impl);
      return *result ? PYGEN_RETURN : PYGEN_ERROR;
    }
    if (impl) call->waiter = submit(call, *impl);
    if (!call->waiter) {
      *result = nullptr;
      return PYGEN_ERROR;
    }
  }
  return waiter_type()->tp_as_async->am_send(reinterpret_cast<PyObject*>(call->waiter), value, result);
}

PyObject* call_iternext(PyObject* object) {
  PyObject* result = nullptr;
  switch (call_send(object, Py_None, &result)) {
    case PYGEN_NEXT: return result;
    case PYGEN_RETURN: raise_stop(result); return nullptr;
    case PYGEN_ERROR: break;
  }
  return nullptr;
}

PyObject* call_send_method(PyObject* object, PyObject*) { return call_iternext(object); }

// Left before it began: nothing begins. Otherwise the waiter gives up for us.
void leave(StateCallObject* call) {
  call->used = true;
  WaiterObject* waiter = std::exchange(call->waiter, nullptr);
  if (!waiter) return;
  give_up(waiter);
  Py_DECREF(reinterpret_cast<PyObject*>(waiter));
}

PyObject* call_throw(PyObject* object, PyObject* const* args, Py_ssize_t nargs) {
  leave(self_of(object));
  return raise_thrown(args, nargs);
}

PyObject* call_close(PyObject* object, PyObject*) {
  leave(self_of(object));
  Py_RETURN_NONE;
}

int call_traverse(PyObject* object, visitproc visit, void* arg) {
  StateCallObject* call = self_of(object);
  Py_VISIT(reinterpret_cast<PyObject*>(call->state));
  Py_VISIT(call->parts);
  Py_VISIT(reinterpret_cast<PyObject*>(call->waiter));
  Py_VISIT(Py_TYPE(object));
  return 0;
}

// The waiter refers to us as long as it may still ask: only the way there is cut.
int call_clear(PyObject* object) {
  Py_CLEAR(self_of(object)->waiter);
  return 0;
}

void call_dealloc(PyObject* object) {
  StateCallObject* call = self_of(object);
  PyObject_GC_UnTrack(object);
  Py_XDECREF(reinterpret_cast<PyObject*>(call->waiter));
  Py_XDECREF(call->key);
  Py_XDECREF(call->kind);
  Py_XDECREF(call->value);
  Py_XDECREF(call->parts);
  Py_DECREF(reinterpret_cast<PyObject*>(call->state));
  PyTypeObject* type = Py_TYPE(object);
  if (g_spares < g_spare.size()) {
    g_spare[g_spares++] = call;
  } else {
    PyObject_GC_Del(object);
  }
  Py_DECREF(reinterpret_cast<PyObject*>(type));
}

PyMethodDef kMethods[] = {
    {"wait", call_wait, METH_NOARGS,
     "wait()\n--\n\nMake the call from a plain thread and return its result. Ctrl-C works."},
    {"send", call_send_method, METH_O, nullptr},
    {"throw", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_throw)), METH_FASTCALL, nullptr},
    {"close", call_close, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot kSlots[] = {
    {Py_tp_doc, const_cast<char*>("One operation on state: `await` it in asyncio, or `wait()` in a plain "
                                  "thread; either makes it, once.")},
    {Py_tp_dealloc, reinterpret_cast<void*>(call_dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(call_traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(call_clear)},
    {Py_tp_methods, kMethods},
    {Py_tp_iter, reinterpret_cast<void*>(PyObject_SelfIter)},
    {Py_tp_iternext, reinterpret_cast<void*>(call_iternext)},
    {Py_am_await, reinterpret_cast<void*>(call_await)},
    {Py_am_send, reinterpret_cast<void*>(call_send)},
    {0, nullptr},
};

PyType_Spec kSpec = {
    "ratesync._core.StateCall", sizeof(StateCallObject), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
    kSlots};

}  // namespace

StateCallObject* new_state_call(StateObject* owner, StateOp::Verb verb, Shape shape) {
  PyTypeObject* type = state().state_call_type;
  StateCallObject* call = nullptr;
  if (g_spares > 0) {
    call = g_spare[--g_spares];
    (void)PyObject_Init(object_of(call), type);
  } else {
    call = PyObject_GC_New(StateCallObject, type);
    if (!call) return nullptr;
  }
  call->state = reinterpret_cast<StateObject*>(Py_NewRef(reinterpret_cast<PyObject*>(owner)));
  call->key = nullptr;
  call->kind = nullptr;
  call->value = nullptr;
  call->parts = nullptr;
  call->waiter = nullptr;
  call->ttl = store::kNoTtl;
  call->number = 0;
  call->verb = verb;
  call->shape = shape;
  call->want_actual = call->renew = call->revive = call->due_in = call->atomic = call->used = false;
  PyObject_GC_Track(object_of(call));
  return call;
}

bool init_state_call_type(PyObject* module) {
  state().state_call_type =
      reinterpret_cast<PyTypeObject*>(PyType_FromModuleAndSpec(module, &kSpec, nullptr));
  return state().state_call_type &&
         PyModule_AddObjectRef(module, "StateCall", reinterpret_cast<PyObject*>(state().state_call_type)) ==
             0;
}

}  // namespace ratesync::bindings
