// Event loops: one completion queue each, drained by a reader callback.
//
// A loop may be closed, collected, and a new one created at the same address; the table is keyed
// by the loop object and cleaned by a weak reference's callback.
#include <pybind11/pybind11.h>

#include <unordered_map>

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

PyObject* g_last_loop = nullptr;           // borrowed: entry of table()
std::shared_ptr<LoopState>* g_last_state = nullptr;
unsigned g_table_generation = 0;

void discard(engine::Completion* first) {
  while (first) {
    engine::Completion* next = first->next;
    auto* waiter = static_cast<WaiterObject*>(first->cookie);
    give_back(*waiter->engine, first);
    first->unref();
    Py_DECREF(reinterpret_cast<PyObject*>(waiter));
    first = next;
  }
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
  auto forget = py::cpp_function([loop](const py::handle& ref) {
    if (auto it = table().find(loop); it != table().end()) {
      if (g_last_loop == loop) g_last_loop = nullptr;
      table().erase(it);
    }
    ref.dec_ref();
  });
  weak_loop = PyWeakref_NewRef(loop, forget.ptr());
  if (!weak_loop) throw py::error_already_set();
}

LoopState::~LoopState() { discard(target->close()); }

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
    PyErr_SetString(PyExc_RuntimeError,
                    "no running event loop: await inside a coroutine run by asyncio, or use the synchronous form "
                    "(`with acquire(...)`, `.wait()`)");
    return nullptr;
  }
  if (g_table_generation != g_generation.load(std::memory_order_relaxed)) {
    // Forked: the parent's queues stay open there; here they are dropped with their descriptors.
    g_last_loop = nullptr;
    table().clear();
    g_table_generation = g_generation.load(std::memory_order_relaxed);
  }
  if (loop == g_last_loop) return *g_last_state;
  auto it = table().find(loop);
  if (it == table().end()) {
    try {
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
