// Everything that is not on the hot path: calls that return a Pending, and construction.
#pragma once

#include <pybind11/pybind11.h>

#include "ratesync/bindings/objects.h"

namespace ratesync::bindings {

struct LockHome;  // locks.h

// A store of an engine, as Python holds it.
struct PyStore {
  std::shared_ptr<engine::Engine> engine;
  engine::StoreEntry* entry = nullptr;
  unsigned generation = 0;
  mutable std::vector<std::shared_ptr<const LockHome>> lock_homes = {};  // spaces seen so far
};

// One call that has not started yet: awaiting or wait() starts it.
class PendingCall {
 public:
  using Start = std::function<PyObject*()>;  // new reference, or null with an exception set
  PendingCall(Start begin, Start block) : begin_(std::move(begin)), block_(std::move(block)) {}
  ~PendingCall();
  PendingCall(const PendingCall&) = delete;
  PendingCall& operator=(const PendingCall&) = delete;
  PyObject* begin() const { return begin_(); }
  PyObject* block() const { return block_(); }
  pybind11::object iterator();  // begun at the first use
  pybind11::object throw_into(const pybind11::args& args);
  void close();

 private:
  PyObject* iterator_ = nullptr;
  Start begin_;
  Start block_;
};

// A Pending that starts the permit's acquisition.
PyObject* make_attempt(PyObject* permit, Mode mode);

LimiterImpl* make_limiter_impl(PyObject* args, PyObject* kwargs);
// (timeout) then cost=, key= by keyword. Null with an exception set.
PyObject* make_permit(LimiterObject* limiter, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames,
                      const char* function);
store::GroupRef group_for_key(LimiterImpl& impl, PyObject* key);

// Methods of Limiter and Permit; each returns a Pending.
PyObject* limiter_try(PyObject* self, PyObject* const* args, Py_ssize_t nargs);  // timeout, cost, key
PyObject* limiter_acquire_bare(PyObject* self, PyObject* const* args,
                               Py_ssize_t nargs);  // timeout, cost, key
PyObject* limiter_peek(PyObject* self, PyObject* key);
PyObject* limiter_reset(PyObject* self, PyObject* key);
PyObject* limiter_counters(PyObject* self, PyObject*);
PyObject* settle_method(PyObject* self, PyObject* actual_cost);

}  // namespace ratesync::bindings
