// Event loops: one completion queue each, drained by a reader callback.
//
// A loop may be closed, collected, and a new one created at the same address; the table is keyed
// by the loop object and cleaned by a weak reference's callback. A closed loop that tasks still wait
// in is not collected (the engine keeps them): those are found when the next loop comes.
#include <pybind11/pybind11.h>

#include <unordered_map>
#include <vector>

#include "ratesync/bindings/objects.h"

namespace py = pybind11;

namespace ratesync::bindings {

namespace {

// Completions handled per turn of the loop, so that timers and sockets of the application get
// their turn while thousands of tasks are woken.
constexpr int kPerTurn = 512;

std::unordered_map<PyObject*, std::shared_ptr<LoopState>>& table() {
  static auto* loops = new std::unordered_map<PyObject*, std::shared_ptr<LoopState>>();
  return *loops;
}

// Retired, and something is still to be delivered there.
std::vector<std::shared_ptr<LoopState>>& retired() {
  static auto* states = new std::vector<std::shared_ptr<LoopState>>();
  return *states;
}

PyObject* g_last_loop = nullptr;  // borrowed: entry of table()
std::shared_ptr<LoopState>* g_last_state = nullptr;

void discard(engine::Completion* first, bool return_grants) {
  while (first) {
    engine::Completion* next = first->next;
    auto* waiter = static_cast<WaiterObject*>(first->cookie);
    if (return_grants) give_back(*waiter->engine, first);
    first->unref();
    Py_DECREF(reinterpret_cast<PyObject*>(waiter));
    first = next;
  }
}

void forget_loop(PyObject* loop) {
  const auto it = table().find(loop);
  if (it == table().end()) return;
  if (g_last_loop == loop) g_last_loop = nullptr;
  const std::shared_ptr<LoopState> gone = it->second;
  table().erase(it);
  gone->retire();
  if (!gone->reap()) retired().push_back(gone);
}

// When a new loop comes.
void tidy() {
  std::vector<PyObject*> closed;
  for (const auto& [loop, loop_state] : table()) closed.push_back(loop);
  std::erase_if(closed, [](PyObject* loop) {
    const auto it = table().find(loop);
    if (it == table().end()) return true;
    const auto alive = py::reinterpret_borrow<py::object>(PyWeakref_GetObject(it->second->weak_loop));
    return !alive.is_none() && !py::cast<bool>(alive.attr("is_closed")());
  });
  for (PyObject* loop : closed) forget_loop(loop);
  std::vector<std::shared_ptr<LoopState>> left;
  left.swap(retired());
  std::erase_if(left, [](const std::shared_ptr<LoopState>& loop_state) { return loop_state->reap(); });
  retired().insert(retired().end(), left.begin(), left.end());
}

PyObject* drain(engine::LoopTarget& target) {
  engine::Completion* list = target.take();
  for (int i = 0; list && i < kPerTurn; ++i) {
    engine::Completion* next = list->next;
    auto* waiter = static_cast<WaiterObject*>(list->cookie);
    list->unref();  // the queue's; the waiter has its own
    completed(waiter);
    Py_DECREF(reinterpret_cast<PyObject*>(waiter));
    list = next;
    if (PyErr_Occurred()) {  // KeyboardInterrupt, SystemExit: up to the loop
      target.put_back(list);
      return nullptr;
    }
  }
  target.put_back(list);
  Py_RETURN_NONE;
}

}  // namespace

LoopState::LoopState(PyObject* loop) : target(std::make_shared<engine::LoopTarget>()) {
  // The callable handed to add_reader keeps the queue, not the loop, alive.
  auto queue = target;
  py::cpp_function reader([queue]() {
    PyObject* result = drain(*queue);
    if (!result) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
  });
  py::handle(loop).attr("add_reader")(queue->fd(), reader);
  const auto forget = py::cpp_function([loop](const py::handle&) { forget_loop(loop); });
  weak_loop = PyWeakref_NewRef(loop, forget.ptr());
  if (!weak_loop) throw py::error_already_set();
}

LoopState::~LoopState() { Py_XDECREF(weak_loop); }

void LoopState::retire() {
  discard(target->close(), true);
  std::vector<py::object> pending;
  for (WaiterObject* waiter = waiters; waiter; waiter = waiter->next)
    pending.push_back(py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(waiter)));
  for (const py::object& object : pending) {
    auto* waiter = reinterpret_cast<WaiterObject*>(object.ptr());
    abandon(waiter);
    // The way back to the task, and so to the loop: cut, or neither could be collected.
    Py_CLEAR(waiter->callback);
    Py_CLEAR(waiter->context);
  }
}

bool LoopState::reap() {
  discard(target->take(), false);
  return waiters == nullptr;
}

void abandon_loops_after_fork() {
  // Leaked: their locks may be held by a thread that is not here.
  for (auto& [loop, loop_state] : table()) {
    loop_state->target->abandon_after_fork();
    (void)new std::shared_ptr<LoopState>(loop_state);
  }
  for (auto& loop_state : retired()) (void)new std::shared_ptr<LoopState>(loop_state);
  g_last_loop = nullptr;
  table().clear();
  retired().clear();
}

bool load_asyncio() {
  ModuleState& s = state();
  if (s.get_running_loop) return true;
  try {
    const py::module_ asyncio = py::module_::import("asyncio");
    s.current_task = py::object(asyncio.attr("current_task")).release().ptr();
    s.cancelled_error = py::object(asyncio.attr("CancelledError")).release().ptr();
    s.get_running_loop = py::object(asyncio.attr("_get_running_loop")).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
    return false;
  }
  return true;
}

bool in_running_loop() {
  if (!load_asyncio()) {
    PyErr_Clear();
    return false;
  }
  PyObject* loop = PyObject_CallNoArgs(state().get_running_loop);
  if (!loop) {
    PyErr_Clear();
    return false;
  }
  const bool running = loop != Py_None;
  Py_DECREF(loop);
  return running;
}

std::shared_ptr<LoopState> running_loop_state() {
  if (!load_asyncio()) return nullptr;
  PyObject* loop = PyObject_CallNoArgs(state().get_running_loop);
  if (!loop) return nullptr;
  Py_DECREF(loop);  // the running loop is alive as long as it runs
  if (loop == Py_None) {
    PyErr_SetString(
        PyExc_RuntimeError,
        "no running event loop: await inside a coroutine run by asyncio, or use the synchronous form "
        "(`with acquire(...)`, `.wait()`)");
    return nullptr;
  }
  if (loop == g_last_loop) return *g_last_state;
  auto it = table().find(loop);
  if (it == table().end()) {
    try {
      tidy();
      it = table().emplace(loop, std::make_shared<LoopState>(loop)).first;
    } catch (py::error_already_set& error) {
      error.restore();
      return nullptr;
    }
  }
  g_last_loop = loop;
  g_last_state = &it->second;
  return it->second;
}

}  // namespace ratesync::bindings
