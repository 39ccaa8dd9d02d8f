// StateCall: one operation on state, from the call to its result.
#include <array>

#include "ratesync/bindings/calls.h"
#include "ratesync/bindings/state.h"
#include "ratesync/engine/op_ids.h"

namespace ratesync::bindings {

using store::StateOp;
using store::StateReply;
using Outcome = store::StateReply::Outcome;

namespace {

StateCallObject* self_of(PyObject* object) { return reinterpret_cast<StateCallObject*>(object); }
PyObject* object_of(StateCallObject* call) { return reinterpret_cast<PyObject*>(call); }

// Calls live for a moment: the memory of the last ones is used again.
std::array<StateCallObject*, 128> g_spare;
std::size_t g_spares = 0;

void raise_object(PyObject* error) {
  if (!error) return;
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error)), error);
  Py_DECREF(error);
}

PyObject* raise_stale(const StateCallObject& call, const StateReply& reply) {
  const auto expected = static_cast<long long>(call.verb == StateOp::Verb::create ? 0 : call.number);
  const auto actual = static_cast<long long>(reply.outcome == Outcome::absent ? 0 : reply.version);
  raise_object(state().stale_error
                   ? PyObject_CallFunction(state().stale_error, "LL", expected, actual)
                   : PyObject_CallFunction(PyExc_RuntimeError, "s", "the version is not the expected one"));
  return nullptr;
}

PyObject* raise_counter(const StateCallObject& call, const char* reason) {
  raise_object(state().counter_error ? PyObject_CallFunction(state().counter_error, "sO", reason, call.key)
                                     : PyObject_CallFunction(PyExc_ValueError, "s", reason));
  return nullptr;
}

PyObject* raise_rolled_back() {
  PyErr_SetString(PyExc_RuntimeError, "not executed: another operation of the same atomic call failed");
  return nullptr;
}

PyObject* make_versioned(const StateReply& reply, PyObject* decode) {
  PyObject* value = to_python(reply.value, decode);
  if (!value) return nullptr;
  PyObject* expires = PyLong_FromLongLong(reply.expires_at);
  PyObject* version = PyLong_FromLongLong(reply.version);
  PyObject* made = nullptr;
  if (expires && version) {
    PyObject* const args[] = {value, version, expires};
    made = state().versioned ? PyObject_Vectorcall(state().versioned, args, 3, nullptr)
                             : PyTuple_Pack(3, value, version, expires);
  }
  Py_DECREF(value);
  Py_XDECREF(version);
  Py_XDECREF(expires);
  return made;
}

}  // namespace

PyObject* shape_reply(const StateCallObject& call, const Status& status, const StateReply& reply) {
  if (!status.ok()) return raise_status(status, call.state->impl->store_id);
  const bool done = reply.outcome == Outcome::done;
  if (reply.outcome == Outcome::rolled_back) return raise_rolled_back();
  PyObject* decode = call.state->decode;
  switch (call.shape) {
    case Shape::created:
    case Shape::changed: return PyBool_FromLong(done);
    case Shape::value: return done ? to_python(reply.value, decode) : Py_NewRef(Py_None);
    case Shape::versioned: return done ? make_versioned(reply, decode) : Py_NewRef(Py_None);
    case Shape::version: return PyLong_FromLongLong(reply.version);
    case Shape::number:
      if (reply.outcome == Outcome::not_integer) return raise_counter(call, "not_integer");
      if (reply.outcome == Outcome::overflow) return raise_counter(call, "overflow");
      return PyLong_FromLongLong(reply.value.number);
    case Shape::swapped: return done ? PyLong_FromLongLong(reply.version) : raise_stale(call, reply);
    case Shape::nothing: Py_RETURN_NONE;
    case Shape::begun: {
      PyObject* value = !done && reply.has_value ? to_python(reply.value, decode) : Py_NewRef(Py_None);
      if (!value) return nullptr;
      return Py_BuildValue("(OLN)", done ? Py_True : Py_False, static_cast<long long>(reply.version), value);
    }
    case Shape::finished:
      return Py_BuildValue("(OL)", done ? Py_True : Py_False, static_cast<long long>(reply.version));
  }
  Py_UNREACHABLE();
}

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

namespace {

// The state to work on, once per call. Null with an exception set.
StateImpl* use(StateCallObject* call) {
  if (call->used) {
    PyErr_SetString(PyExc_RuntimeError, "this call was made already: call the method again for a new one");
    return nullptr;
  }
  StateImpl* impl = live(call->state);
  if (!impl) return nullptr;
  if (!impl->engine->running()) {
    raise_closed(*impl);
    return nullptr;
  }
  call->used = true;
  return impl;
}

// --- decided on the calling thread ----------------------------------------------------------------

struct DirectOp final : StateOp {
  void done() override {}  // inside submit()
};

PyObject* run_direct(StateCallObject* call, const StateImpl& impl) {
  DirectOp op;
  fill_op(*call, impl, kForever, &op);
  impl.service->store().submit(&op);
  return shape_reply(*call, op.reply.status, op.reply);
}

// --- through the I/O thread -----------------------------------------------------------------------

engine::StateTask* new_task(const StateCallObject* call, const StateImpl& impl) {
  auto* task = new engine::StateTask(*impl.service);
  fill_op(*call, impl, saturating_add(impl.engine->clock().now(), impl.timeout), task);
  return task;
}

PyObject* finish(PyObject* owner, engine::Completion& completion) {
  auto& task = static_cast<engine::StateTask&>(completion);
  return shape_reply(*self_of(owner), task.status(), task.reply);
}

WaiterObject* submit(StateCallObject* call, const StateImpl& impl) {
  std::shared_ptr<LoopState> loop = running_loop_state();
  WaiterObject* waiter = loop ? new_waiter(impl.engine, loop) : nullptr;
  if (!waiter) return nullptr;
  engine::StateTask* task = new_task(call, impl);
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
  engine::StateTask* task = new_task(call, impl);
  task->target = target;
  // The state may be rebound while the GIL is released: keep its engine.
  const std::shared_ptr<engine::Engine> engine = impl.engine;
  if (!engine->submit(engine::StartTask{task})) {
    task->unref();
    return raise_closed(impl);
  }
  if (!wait_sync(*engine, task, target, true)) return nullptr;
  PyObject* result = shape_reply(*call, task->status(), task->reply);
  task->unref();
  return result;
}

// --- the object -----------------------------------------------------------------------------------

PyObject* call_wait(PyObject* object, PyObject*) {
  StateCallObject* call = self_of(object);
  StateImpl* impl = use(call);
  if (!impl) return nullptr;
  if (impl->direct) return run_direct(call, *impl);
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
  if (call->state->impl && call->state->impl->direct) return Py_NewRef(object);
  StateImpl* impl = use(call);
  if (!impl) return nullptr;
  if (!impl->direct) return reinterpret_cast<PyObject*>(submit(call, *impl));
  call->used = false;  // rebound to a direct one after a fork
  return Py_NewRef(object);
}

PyTypeObject* waiter_type() { return state().waiter_type; }

// As the iterator of a direct call, and as the coroutine that create_task() is given.
PySendResult call_send(PyObject* object, PyObject* value, PyObject** result) {
  StateCallObject* call = self_of(object);
  if (!call->waiter) {
    StateImpl* impl = use(call);
    if (impl && impl->direct) {
      *result = run_direct(call, *impl);
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
PyObject* call_throw(PyObject* object, PyObject* const* args, Py_ssize_t nargs) {
  StateCallObject* call = self_of(object);
  call->used = true;
  if (call->waiter) give_up(call->waiter);
  return raise_thrown(args, nargs);
}

PyObject* call_close(PyObject* object, PyObject*) {
  StateCallObject* call = self_of(object);
  call->used = true;
  if (call->waiter) give_up(call->waiter);
  Py_RETURN_NONE;
}

int call_traverse(PyObject* object, visitproc visit, void* arg) {
  StateCallObject* call = self_of(object);
  Py_VISIT(reinterpret_cast<PyObject*>(call->state));
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
  call->waiter = nullptr;
  call->ttl = store::kNoTtl;
  call->number = 0;
  call->verb = verb;
  call->shape = shape;
  call->want_actual = call->renew = call->revive = call->due_in = call->used = false;
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
