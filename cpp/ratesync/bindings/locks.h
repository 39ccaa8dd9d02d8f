// The Python objects of locks, as raw heap types: Lock, the Lease that it gives, and Kept, the lease of an
// idempotent call.
//
// `async with lock` awaits a Waiter directly; the memory store decides on the calling thread and gives an
// awaitable that is done. What is not on the hot path gives a Pending. All functions need the GIL.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ratesync/bindings/calls.h"
#include "ratesync/bindings/objects.h"
#include "ratesync/engine/lock_service.h"

namespace ratesync::bindings {

// Where locks are: shared by the Lock objects of a space.
struct LockHome {
  std::string store_id;
  std::string prefix;
  std::shared_ptr<engine::Engine> engine;
  engine::LockService* service = nullptr;
  store::SpaceRef space;
  unsigned generation = 0;

  // The store decides on any thread, at once.
  [[nodiscard]] bool direct() const { return !service->shared(); }
  [[nodiscard]] bool ours() const { return generation == g_generation.load(std::memory_order_relaxed); }
};
using LockHomeRef = std::shared_ptr<const LockHome>;

struct LeaseObject {
  PyObject_HEAD PyObject* weakrefs;
  LockHomeRef home;
  engine::HeldLockRef lease;
};

// What a Lock asks for.
struct LockTerms {
  std::int64_t ttl_ms = 30'000;
  Nanos timeout = kForever;
  bool auto_renew = true;
};

struct LockImpl {
  LockHomeRef home;
  std::string name;
  LockTerms terms;
  // Of `with`, by task or thread, the latest last; owned.
  std::vector<std::pair<std::uint64_t, LeaseObject*>> entered = {};
};

struct LockObject {
  PyObject_HEAD PyObject* weakrefs;
  LockImpl* impl;
};

// Of a row of the state that is kept alive.
struct KeptObject {
  PyObject_HEAD PyObject* weakrefs;
  std::shared_ptr<engine::Engine> engine;
  engine::KeptRef kept;
  unsigned generation;
};

// lock_calls.cc: a task of the engine, awaited or waited for.
using Finish = PyObject* (*)(PyObject* owner, engine::Completion& completion);
// Both take over the reference to `task`. `owner` is what `finish` gets.
PyObject* begin_task(const std::shared_ptr<engine::Engine>& engine, const std::string& store_id,
                     engine::Acquisition* task, PyObject* owner, Finish finish, bool cancellable);
PyObject* block_task(const std::shared_ptr<engine::Engine>& engine, const std::string& store_id,
                     engine::Acquisition* task, PyObject* owner, Finish finish, bool cancellable);
// A call that has not begun. `decide` may give its result at once (new reference), or null without an
// exception to go through the engine.
struct TaskCall {
  std::shared_ptr<engine::Engine> engine;
  std::string store_id;
  PyObject* owner;
  Finish finish;
  bool cancellable;
  std::function<engine::Acquisition*()> make;
  std::function<PyObject*()> decide = nullptr;
};
PyObject* make_task_call(TaskCall call);
// An awaitable that is done with this result; takes over the reference.
PyObject* make_ready(PyObject* result);

// locks.cc
bool init_lock_type(PyObject* module);
bool check_lease_ttl(PyObject* value, std::int64_t* out);  // false with an exception set
LockHomeRef lock_home(const PyStore& store, PyObject* prefix, PyObject* name_space, PyObject* tenant);
PyObject* break_lock(const LockHomeRef& home, PyObject* name, std::int64_t token);
PyObject* list_locks(const PyStore& store, PyObject* prefix, std::size_t limit);

// leases.cc
bool init_lease_type(PyObject* module);
LeaseObject* new_lease(LockHomeRef home, engine::HeldLockRef lease);
// Gives the lock back, for `async with` (awaitable) and `with`. Raises LockLostError when it was lost before
// and no exception of the body is under way.
PyObject* leave_lease(LeaseObject* lease, bool async, bool failing);

// kept.cc
bool init_kept_type(PyObject* module);
// State._keep(): the row that this caller wrote, renewed from now on.
PyObject* state_keep(PyObject* state, PyObject* const* args, Py_ssize_t nargs);
// State._bell() and State._ring(): see engine/bells.h.
PyObject* state_bell(PyObject* state, PyObject* const* args, Py_ssize_t nargs);
PyObject* state_ring(PyObject* state, PyObject* const* args, Py_ssize_t nargs);
// A Pending of whether it was lost (True) or ended.
PyObject* signal_call(const std::shared_ptr<engine::Engine>& engine, PyObject* owner,
                      const engine::KeptRef& kept);

}  // namespace ratesync::bindings
