// C++ results to Python values, and the generic call that carries them.
#pragma once

#include "ratesync/bindings/calls.h"

namespace ratesync::bindings {

PyObject* to_python(const store::Unit&);
PyObject* to_python(const store::Peek& peek);
PyObject* to_python(const store::Listing& listing);
PyObject* to_python(const store::Stats& stats);
PyObject* to_python(const std::vector<store::MigrationStep>& steps);
PyObject* to_python(const std::vector<store::Finding>& findings);
PyObject* to_python(const std::vector<store::LockInfo>& locks);  // locks.cc
PyObject* counters_dict(const LimiterImpl& impl);
PyObject* make_pending(PendingCall::Start begin, PendingCall::Start block);

template <class T>
class CallTask final : public engine::Completion {
 public:
  Result<T> result{Status::make(Code::internal, "no result")};
  void orphaned() override {}
};

// A Pending whose start is `work`, run on the I/O thread with the callback to call exactly once. `shape`
// makes the result of it, where to_python(T) does not; it may hold Python objects, `work` may not.
template <class T>
PyObject* make_call(
    std::shared_ptr<engine::Engine> engine, std::string store_id,
    std::function<void(store::Callback<T>)> work,
    std::function<PyObject*(T&)> shape = [](T& value) { return to_python(value); }) {
  const auto submit = [engine, work](CallTask<T>* task) {
    return engine->submit(engine::Run{[task, work] {
      work([task](Result<T> result) {
        task->result = std::move(result);
        task->target->deliver(task);
      });
    }});
  };
  const auto closed = [engine, store_id] {
    return raise_not_taken(*engine, store_id, "the engine was shut down: configure the store again");
  };
  const auto convert = [store_id, shape](engine::Completion& completion) -> PyObject* {
    auto& task = static_cast<CallTask<T>&>(completion);
    return task.result.ok() ? shape(task.result.value()) : raise_status(task.result.status(), store_id);
  };
  auto begin = [engine, submit, closed, convert]() -> PyObject* {
    std::shared_ptr<LoopState> loop = running_loop_state();
    if (!loop) return nullptr;
    WaiterObject* waiter = new_waiter(engine, loop);
    if (!waiter) return nullptr;
    auto* task = new CallTask<T>;
    task->ref();
    task->target = loop->target;
    task->cookie = waiter;
    waiter->completion = task;
    waiter->convert = convert;
    Py_INCREF(reinterpret_cast<PyObject*>(waiter));
    if (!submit(task)) {
      waiter->state = WaiterObject::State::consumed;
      task->unref();
      Py_DECREF(reinterpret_cast<PyObject*>(waiter));
      Py_DECREF(reinterpret_cast<PyObject*>(waiter));
      return closed();
    }
    return reinterpret_cast<PyObject*>(waiter);
  };
  auto block = [engine, submit, closed, convert]() -> PyObject* {
    if (in_running_loop()) {
      PyErr_SetString(PyExc_RuntimeError, "wait() would block the running event loop: await it instead");
      return nullptr;
    }
    auto target = std::make_shared<engine::SyncTarget>();
    auto* task = new CallTask<T>;
    task->target = target;
    if (!submit(task)) {
      task->unref();
      return closed();
    }
    if (!wait_sync(*engine, task, target, false)) return nullptr;
    PyObject* result = convert(*task);
    task->unref();
    return result;
  };
  return make_pending(std::move(begin), std::move(block));
}

}  // namespace ratesync::bindings
