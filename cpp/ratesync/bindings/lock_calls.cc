// Tasks of the engine as awaitables and blocking calls.
#include "ratesync/bindings/convert.h"
#include "ratesync/bindings/locks.h"

namespace ratesync::bindings {

namespace {

PyObject* raise_gone(const engine::Engine& engine, const std::string& store_id) {
  return raise_not_taken(engine, store_id, "the engine was shut down: get the lock again with store.lock()");
}

}  // namespace

PyObject* begin_task(const std::shared_ptr<engine::Engine>& engine, const std::string& store_id,
                     engine::Acquisition* task, PyObject* owner, Finish finish, bool cancellable) {
  const std::shared_ptr<LoopState> loop = running_loop_state();
  WaiterObject* waiter = loop ? new_waiter(engine, loop) : nullptr;
  if (!waiter) {
    task->unref();
    return nullptr;
  }
  PyObject* object = reinterpret_cast<PyObject*>(waiter);
  task->ref();  // one for the engine and its queue, one for the waiter
  task->target = loop->target;
  task->cookie = waiter;
  waiter->completion = task;
  waiter->cancellable = cancellable;
  waiter->owner = Py_NewRef(owner);
  waiter->finish = finish;
  Py_INCREF(object);  // the queue's
  if (engine->submit(engine::StartTask{task})) return object;
  waiter->state = WaiterObject::State::consumed;
  task->unref();
  Py_DECREF(object);
  Py_DECREF(object);
  return raise_gone(*engine, store_id);
}

PyObject* block_task(const std::shared_ptr<engine::Engine>& engine, const std::string& store_id,
                     engine::Acquisition* task, PyObject* owner, Finish finish, bool cancellable) {
  auto target = std::make_shared<engine::SyncTarget>();
  task->target = target;
  const std::shared_ptr<engine::Engine> keep = engine;  // the owner may be rebound without the GIL
  if (!keep->submit(engine::StartTask{task})) {
    task->unref();
    return raise_gone(*keep, store_id);
  }
  if (!wait_sync(*keep, task, target, cancellable)) return nullptr;
  PyObject* result = finish(owner, *task);
  task->unref();
  return result;
}

PyObject* make_ready(PyObject* result) {
  PyObject* ready = result == Py_None    ? state().ready_none
                    : result == Py_True  ? state().ready_true
                    : result == Py_False ? state().ready_false
                                         : nullptr;
  if (!ready) return result;  // a Lease is its own awaitable; or null with an exception set
  Py_DECREF(result);
  return Py_NewRef(ready);
}

PyObject* make_task_call(TaskCall given) {
  struct Owned : TaskCall {
    explicit Owned(TaskCall call) : TaskCall(std::move(call)) { Py_INCREF(owner); }
    Owned(const Owned&) = delete;
    Owned& operator=(const Owned&) = delete;
    ~Owned() { Py_DECREF(owner); }
    // True: decided, perhaps by an exception.
    bool at_once(PyObject** result) const {
      *result = decide ? decide() : nullptr;
      return *result || PyErr_Occurred();
    }
  };
  auto call = std::make_shared<Owned>(std::move(given));
  return make_pending(
      [call]() -> PyObject* {
        PyObject* result;
        if (call->at_once(&result)) return make_ready(result);
        return begin_task(call->engine, call->store_id, call->make(), call->owner, call->finish,
                          call->cancellable);
      },
      [call]() -> PyObject* {
        PyObject* result;
        if (call->at_once(&result)) return result;
        if (in_running_loop()) {
          PyErr_SetString(PyExc_RuntimeError, "wait() would block the running event loop: await it instead");
          return nullptr;
        }
        return block_task(call->engine, call->store_id, call->make(), call->owner, call->finish,
                          call->cancellable);
      });
}

}  // namespace ratesync::bindings
