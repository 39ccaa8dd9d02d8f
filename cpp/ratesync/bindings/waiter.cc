// Waiter: what a task awaits while the engine works. See objects.h.
#include "ratesync/bindings/objects.h"
#include "ratesync/engine/lock_service.h"

namespace ratesync::bindings {

namespace {

WaiterObject* self_of(PyObject* object) { return reinterpret_cast<WaiterObject*>(object); }

PyObject* raise_cancelled(const WaiterObject* waiter) {
  PyErr_SetObject(state().cancelled_error, waiter->cancel_message);
  return nullptr;
}

void ask_cancel(WaiterObject* waiter) {
  if (!waiter->cancellable || !waiter->completion) return;
  auto* task = static_cast<engine::Acquisition*>(waiter->completion);
  task->ref();
  if (!waiter->engine->submit(engine::CancelTask{task})) task->unref();
}

// The result, for the awaiting code; raises what failed.
PyObject* take_result(WaiterObject* waiter) {
  waiter->state = WaiterObject::State::consumed;
  engine::Completion* completion = std::exchange(waiter->completion, nullptr);
  PyObject* result;
  if (waiter->permit) {
    result =
        finish_acquire(waiter->permit, *static_cast<engine::Acquisition*>(completion), waiter->mode, true);
  } else if (waiter->finish) {
    PyObject* owner = std::exchange(waiter->owner, nullptr);  // it may refer to us
    result = waiter->finish(owner, *completion);
    Py_DECREF(owner);
  } else {
    result = waiter->convert(*completion);
  }
  completion->unref();
  return result;
}

PySendResult waiter_send(PyObject* object, PyObject*, PyObject** result) {
  WaiterObject* waiter = self_of(object);
  switch (waiter->state) {
    case WaiterObject::State::done:
      *result = take_result(waiter);
      return *result ? PYGEN_RETURN : PYGEN_ERROR;
    case WaiterObject::State::pending:
      if (waiter->callback) {
        PyErr_SetString(PyExc_RuntimeError, "this call is already being awaited");
        *result = nullptr;
        return PYGEN_ERROR;
      }
      waiter->blocking = waiter->yielded = true;
      Py_INCREF(object);
      *result = object;
      return PYGEN_NEXT;
    case WaiterObject::State::cancelled: raise_cancelled(waiter); break;
    case WaiterObject::State::consumed:
      PyErr_SetString(PyExc_RuntimeError, "cannot reuse an awaited operation: call again for a new one");
      break;
  }
  *result = nullptr;
  return PYGEN_ERROR;
}

PyObject* waiter_iternext(PyObject* object) {
  PyObject* result = nullptr;
  switch (waiter_send(object, Py_None, &result)) {
    case PYGEN_NEXT: return result;
    case PYGEN_RETURN: raise_stop(result); break;
    case PYGEN_ERROR: break;
  }
  return nullptr;
}

PyObject* waiter_send_method(PyObject* object, PyObject*) { return waiter_iternext(object); }

PyObject* waiter_throw(PyObject* object, PyObject* const* args, Py_ssize_t nargs) {
  give_up(self_of(object));
  return raise_thrown(args, nargs);
}

PyObject* waiter_close(PyObject* object, PyObject*) {
  give_up(self_of(object));
  Py_RETURN_NONE;
}

// --- the future protocol, as asyncio's Task uses it ---------------------------------------------

PyObject* waiter_get_loop(PyObject* object, PyObject*) {
  return Py_NewRef(PyWeakref_GetObject(self_of(object)->loop->weak_loop));
}

PyObject* waiter_add_done_callback(PyObject* object, PyObject* const* args, Py_ssize_t nargs,
                                   PyObject* kwnames) {
  WaiterObject* waiter = self_of(object);
  if (nargs != 1 || (kwnames && PyTuple_GET_SIZE(kwnames) > 1)) {
    PyErr_SetString(PyExc_TypeError, "add_done_callback(callback, *, context=None)");
    return nullptr;
  }
  if (waiter->callback) {
    PyErr_SetString(PyExc_RuntimeError, "this call is already being awaited");
    return nullptr;
  }
  PyObject* context = kwnames && PyTuple_GET_SIZE(kwnames) == 1 ? args[1] : nullptr;
  if (context == Py_None) context = nullptr;
  Py_INCREF(args[0]);
  waiter->callback = args[0];
  Py_XINCREF(context);
  waiter->context = context;
  Py_RETURN_NONE;
}

PyObject* waiter_remove_done_callback(PyObject* object, PyObject* callback) {
  WaiterObject* waiter = self_of(object);
  const int same = waiter->callback ? PyObject_RichCompareBool(waiter->callback, callback, Py_EQ) : 0;
  if (same < 0) return nullptr;
  if (same) {
    Py_CLEAR(waiter->callback);
    Py_CLEAR(waiter->context);
  }
  return PyLong_FromLong(same);
}

// Task.cancel() while the task waits on us.
PyObject* waiter_cancel(PyObject* object, PyObject* args, PyObject* kwargs) {
  WaiterObject* waiter = self_of(object);
  if (waiter->state != WaiterObject::State::pending) Py_RETURN_FALSE;
  PyObject* message = PyTuple_GET_SIZE(args) > 0 ? PyTuple_GET_ITEM(args, 0)
                      : kwargs                   ? PyDict_GetItemString(kwargs, "msg")
                                                 : nullptr;
  if (message && message != Py_None) Py_XSETREF(waiter->cancel_message, Py_NewRef(message));
  abandon(waiter);
  if (waiter->callback) {
    PyObject* loop = PyWeakref_GetObject(waiter->loop->weak_loop);
    if (loop != Py_None) {
      PyObject* call_soon = PyObject_GetAttrString(loop, "call_soon");
      if (!call_soon) return nullptr;
      PyObject* call_args = PyTuple_Pack(2, waiter->callback, object);
      PyObject* call_kwargs = PyDict_New();
      if (call_kwargs && waiter->context) PyDict_SetItemString(call_kwargs, "context", waiter->context);
      PyObject* handle =
          call_args && call_kwargs ? PyObject_Call(call_soon, call_args, call_kwargs) : nullptr;
      Py_DECREF(call_soon);
      Py_XDECREF(call_args);
      Py_XDECREF(call_kwargs);
      if (!handle) return nullptr;
      Py_DECREF(handle);
    }
    Py_CLEAR(waiter->callback);
    Py_CLEAR(waiter->context);
  }
  Py_RETURN_TRUE;
}

PyObject* waiter_result(PyObject* object, PyObject*) {
  switch (self_of(object)->state) {
    case WaiterObject::State::cancelled: return raise_cancelled(self_of(object));
    case WaiterObject::State::pending:
      PyErr_SetString(PyExc_RuntimeError, "the result is not there yet");
      return nullptr;
    case WaiterObject::State::done:
    case WaiterObject::State::consumed: break;
  }
  Py_RETURN_NONE;  // the value is returned by the await itself
}

PyObject* waiter_exception(PyObject* object, PyObject*) { return waiter_result(object, nullptr); }

PyObject* waiter_done(PyObject* object, PyObject*) {
  return PyBool_FromLong(self_of(object)->state != WaiterObject::State::pending);
}

PyObject* waiter_cancelled(PyObject* object, PyObject*) {
  return PyBool_FromLong(self_of(object)->state == WaiterObject::State::cancelled);
}

// None says "not a future": asyncio.wait_for(permit.__aenter__(), 1) then wraps it in a task, which
// takes the permit out of it; a future's result() would not.
PyObject* get_blocking(PyObject* object, void*) {
  if (!self_of(object)->yielded) Py_RETURN_NONE;
  return PyBool_FromLong(self_of(object)->blocking);
}

int set_blocking(PyObject* object, PyObject* value, void*) {
  const int truth = value ? PyObject_IsTrue(value) : 0;
  if (truth < 0) return -1;
  self_of(object)->blocking = truth != 0;
  return 0;
}

int waiter_traverse(PyObject* object, visitproc visit, void* arg) {
  WaiterObject* waiter = self_of(object);
  Py_VISIT(waiter->callback);
  Py_VISIT(waiter->context);
  Py_VISIT(waiter->cancel_message);
  Py_VISIT(reinterpret_cast<PyObject*>(waiter->permit));
  Py_VISIT(waiter->owner);
  Py_VISIT(Py_TYPE(object));
  return 0;
}

int waiter_clear(PyObject* object) {
  WaiterObject* waiter = self_of(object);
  Py_CLEAR(waiter->callback);
  Py_CLEAR(waiter->context);
  Py_CLEAR(waiter->cancel_message);
  return 0;
}

void waiter_dealloc(PyObject* object) {
  WaiterObject* waiter = self_of(object);
  PyObject_GC_UnTrack(object);
  abandon(waiter);
  if (waiter->completion) waiter->completion->unref();
  (waiter->previous ? waiter->previous->next : waiter->loop->waiters) = waiter->next;
  if (waiter->next) waiter->next->previous = waiter->previous;
  waiter_clear(object);
  Py_XDECREF(reinterpret_cast<PyObject*>(waiter->permit));
  Py_XDECREF(waiter->owner);
  waiter->engine.~shared_ptr();
  waiter->loop.~shared_ptr();
  waiter->convert.~function();
  PyTypeObject* type = Py_TYPE(object);
  type->tp_free(object);
  Py_DECREF(reinterpret_cast<PyObject*>(type));
}

PyMethodDef kMethods[] = {
    {"send", waiter_send_method, METH_O, nullptr},
    {"throw", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(waiter_throw)), METH_FASTCALL, nullptr},
    {"close", waiter_close, METH_NOARGS, nullptr},
    {"get_loop", waiter_get_loop, METH_NOARGS, nullptr},
    {"add_done_callback", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(waiter_add_done_callback)),
     METH_FASTCALL | METH_KEYWORDS, nullptr},
    {"remove_done_callback", waiter_remove_done_callback, METH_O, nullptr},
    {"cancel", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(waiter_cancel)),
     METH_VARARGS | METH_KEYWORDS, nullptr},
    {"result", waiter_result, METH_NOARGS, nullptr},
    {"exception", waiter_exception, METH_NOARGS, nullptr},
    {"done", waiter_done, METH_NOARGS, nullptr},
    {"cancelled", waiter_cancelled, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyGetSetDef kGetSet[] = {
    {"_asyncio_future_blocking", get_blocking, set_blocking, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyType_Slot kSlots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(waiter_dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(waiter_traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(waiter_clear)},
    {Py_tp_methods, kMethods},
    {Py_tp_getset, kGetSet},
    {Py_tp_iter, reinterpret_cast<void*>(PyObject_SelfIter)},
    {Py_tp_iternext, reinterpret_cast<void*>(waiter_iternext)},
    {Py_am_await, reinterpret_cast<void*>(PyObject_SelfIter)},
    {Py_am_send, reinterpret_cast<void*>(waiter_send)},
    {0, nullptr},
};

PyType_Spec kSpec = {"ratesync._core.Waiter", sizeof(WaiterObject), 0,
                     Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION, kSlots};

// --- awaitables that are done already -----------------------------------------------------------

struct ReadyObject {
  PyObject_HEAD PyObject* value;  // immortal singletons only: never collected
};

PySendResult ready_send(PyObject* object, PyObject*, PyObject** result) {
  *result = reinterpret_cast<ReadyObject*>(object)->value;
  Py_INCREF(*result);
  return PYGEN_RETURN;
}

PyObject* ready_iternext(PyObject* object) {
  PyObject* value = reinterpret_cast<ReadyObject*>(object)->value;
  if (value != Py_None) {
    PyObject* stop = PyObject_CallOneArg(PyExc_StopIteration, value);
    if (!stop) return nullptr;
    PyErr_SetObject(PyExc_StopIteration, stop);
    Py_DECREF(stop);
  }
  return nullptr;
}

PyObject* ready_send_method(PyObject* object, PyObject*) {
  PyErr_SetObject(PyExc_StopIteration, reinterpret_cast<ReadyObject*>(object)->value);
  return nullptr;
}

PyMethodDef kReadyMethods[] = {
    {"send", ready_send_method, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot kReadySlots[] = {
    {Py_tp_methods, kReadyMethods},
    {Py_tp_iter, reinterpret_cast<void*>(PyObject_SelfIter)},
    {Py_tp_iternext, reinterpret_cast<void*>(ready_iternext)},
    {Py_am_await, reinterpret_cast<void*>(PyObject_SelfIter)},
    {Py_am_send, reinterpret_cast<void*>(ready_send)},
    {0, nullptr},
};

PyType_Spec kReadySpec = {"ratesync._core.Ready", sizeof(ReadyObject), 0,
                          Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, kReadySlots};

PyObject* new_ready(PyObject* value) {
  PyObject* object = state().ready_type->tp_alloc(state().ready_type, 0);
  if (object) {
    Py_INCREF(value);
    reinterpret_cast<ReadyObject*>(object)->value = value;
  }
  return object;
}

}  // namespace

WaiterObject* new_waiter(std::shared_ptr<engine::Engine> engine, std::shared_ptr<LoopState> loop) {
  PyObject* object = state().waiter_type->tp_alloc(state().waiter_type, 0);
  if (!object) return nullptr;
  WaiterObject* waiter = self_of(object);
  waiter->previous = nullptr;
  waiter->next = loop->waiters;
  if (waiter->next) waiter->next->previous = waiter;
  loop->waiters = waiter;
  new (&waiter->engine) std::shared_ptr<engine::Engine>(std::move(engine));
  new (&waiter->loop) std::shared_ptr<LoopState>(std::move(loop));
  new (&waiter->convert) std::function<PyObject*(engine::Completion&)>();
  waiter->completion = nullptr;
  waiter->callback = waiter->context = waiter->cancel_message = nullptr;
  waiter->permit = nullptr;
  waiter->owner = nullptr;
  waiter->finish = nullptr;
  waiter->mode = Mode::none;
  waiter->state = WaiterObject::State::pending;
  waiter->cancellable = waiter->blocking = waiter->yielded = false;
  return waiter;
}

void give_up(WaiterObject* waiter) {
  abandon(waiter);
  Py_CLEAR(waiter->callback);
  Py_CLEAR(waiter->context);
}

void raise_stop(PyObject* result) {
  PyObject* stop = PyObject_CallOneArg(PyExc_StopIteration, result);
  Py_DECREF(result);
  if (!stop) return;
  PyErr_SetObject(PyExc_StopIteration, stop);
  Py_DECREF(stop);
}

PyObject* raise_thrown(PyObject* const* args, Py_ssize_t nargs) {
  PyObject* first = nargs > 0 ? args[0] : nullptr;
  if (first && PyExceptionInstance_Check(first)) {
    PyErr_SetObject(PyExceptionInstance_Class(first), first);
  } else if (first && PyExceptionClass_Check(first)) {
    PyErr_SetObject(first, nargs > 1 && args[1] != Py_None ? args[1] : nullptr);
  } else {
    PyErr_SetString(PyExc_TypeError, "throw() needs an exception");
  }
  return nullptr;
}

void abandon(WaiterObject* waiter) {
  switch (waiter->state) {
    case WaiterObject::State::pending:
      waiter->state = WaiterObject::State::cancelled;
      ask_cancel(waiter);
      Py_CLEAR(waiter->owner);
      if (waiter->permit) waiter->permit->phase = Phase::idle;
      break;
    case WaiterObject::State::done:
      waiter->state = WaiterObject::State::consumed;
      if (waiter->completion) {
        give_back(*waiter->engine, waiter->completion);
        waiter->completion->unref();
        waiter->completion = nullptr;
      }
      if (waiter->permit) waiter->permit->phase = Phase::idle;
      break;
    case WaiterObject::State::cancelled:
    case WaiterObject::State::consumed: break;
  }
}

void completed(WaiterObject* waiter) {
  if (waiter->state != WaiterObject::State::pending) {
    // Cancelled meanwhile: nobody wants it.
    if (waiter->completion) {
      give_back(*waiter->engine, waiter->completion);
      waiter->completion->unref();
      waiter->completion = nullptr;
    }
    return;
  }
  waiter->state = WaiterObject::State::done;
  if (!waiter->callback) return;
  PyObject* callback = std::exchange(waiter->callback, nullptr);
  PyObject* context = std::exchange(waiter->context, nullptr);
  // The task's next step runs here and now, in its own context, as the loop would run it.
  if (!context || PyContext_Enter(context) == 0) {
    PyObject* nothing = PyObject_CallOneArg(callback, reinterpret_cast<PyObject*>(waiter));
    Py_XDECREF(nothing);
    if (context) {
      PyObject *type, *value, *trace;
      PyErr_Fetch(&type, &value, &trace);
      PyContext_Exit(context);
      PyErr_Restore(type, value, trace);
    }
  }
  Py_DECREF(callback);
  Py_XDECREF(context);
}

void give_back(engine::Engine& engine, engine::Completion* completion) {
  if (auto* several = dynamic_cast<engine::MultiTask*>(completion)) {
    // The latest first: a store takes back its newest deal only. Nothing is granted unless all is well.
    for (auto part = several->limits.rbegin(); part != several->limits.rend(); ++part)
      if (part->granted)
        engine.submit(engine::GiveBack{
            part->limiter, part->group, part->cost, part->charged, {part->at, part->stamp}, part->permit});
    return;
  }
  if (auto* lock = dynamic_cast<engine::LockAcquire*>(completion)) {
    if (lock->lease) engine.submit(engine::Run{[lease = lock->lease] { lease->service.let_go(lease); }});
    return;
  }
  auto* task = dynamic_cast<engine::AcquireTask*>(completion);
  if (!task || task->outcome != engine::Outcome::granted) return;
  if (!task->charged_rate && !task->permit) return;
  engine.submit(engine::GiveBack{task->limiter,
                                 task->group,
                                 task->cost,
                                 task->charged_rate,
                                 {task->submitted + task->waited, task->stamp},
                                 task->permit});
}

PyObject* raise_not_taken(const engine::Engine& engine, const std::string& store_id,
                          const std::string& closed) {
  if (!engine.running()) return raise_status(Status::make(Code::closed, closed), store_id);
  return raise_status(
      Status::make(Code::exhausted,
                   "the system gives no further thread, and this call has to wait: see the limits of "
                   "processes and memory (ulimit -u, -v, the container's pids limit)"),
      store_id);
}

PyObject* raise_status(const Status& status, const std::string& store_id) {
  const std::string code(to_string(status.code));
  PyObject* error =
      state().status_error
          ? PyObject_CallFunction(state().status_error, "s#s#s#s#", code.data(), code.size(),
                                  status.message.data(), status.message.size(), status.sqlstate.data(),
                                  status.sqlstate.size(), store_id.data(), store_id.size())
          : PyObject_CallFunction(PyExc_RuntimeError, "s#", status.message.data(), status.message.size());
  if (error) {
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error)), error);
    Py_DECREF(error);
  }
  return nullptr;
}

bool init_waiter_type(PyObject* module) {
  ModuleState& s = state();
  s.waiter_type = reinterpret_cast<PyTypeObject*>(PyType_FromModuleAndSpec(module, &kSpec, nullptr));
  s.ready_type = reinterpret_cast<PyTypeObject*>(PyType_FromModuleAndSpec(module, &kReadySpec, nullptr));
  if (!s.waiter_type || !s.ready_type) return false;
  s.ready_none = new_ready(Py_None);
  s.ready_true = new_ready(Py_True);
  s.ready_false = new_ready(Py_False);
  return s.ready_none && s.ready_true && s.ready_false;
}

}  // namespace ratesync::bindings
