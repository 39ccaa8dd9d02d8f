// The Python objects of the hot path, as raw heap types.
//
// Awaitables written with pybind11 methods cost 6.7 us per `async with`; types with raw slots
// (am_await, am_send) cost 0.11 us. So Permit, Limiter and Waiter are written by hand, and
// everything that is not on the hot path uses pybind11 (calls.cc, module.cc). All functions here
// need the GIL.
#pragma once

#include <Python.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "ratesync/engine/engine.h"
#include "ratesync/memory/memory_store.h"

namespace ratesync::bindings {

// All process-global state, one seam.
struct ModuleState {
  PyTypeObject* permit_type = nullptr;
  PyTypeObject* limiter_type = nullptr;
  PyTypeObject* waiter_type = nullptr;
  PyTypeObject* ready_type = nullptr;
  PyTypeObject* state_type = nullptr;
  PyTypeObject* state_call_type = nullptr;
  PyTypeObject* lock_type = nullptr;
  PyTypeObject* lease_type = nullptr;
  PyTypeObject* kept_type = nullptr;
  PyObject* keep = nullptr;        // KEEP: the running expiry stays
  PyObject* ready_none = nullptr;  // awaitables that are done, shared
  PyObject* ready_true = nullptr;
  PyObject* ready_false = nullptr;
  PyObject* bound = nullptr;    // dict: name -> Limiter, what acquire() looks in first
  PyObject* resolve = nullptr;  // hooks, see set_hooks
  PyObject* status_error = nullptr;
  PyObject* denied_error = nullptr;
  PyObject* invalid_error = nullptr;
  PyObject* log = nullptr;
  PyObject* stale_error = nullptr;  // of state
  PyObject* counter_error = nullptr;
  PyObject* rolled_back = nullptr;
  PyObject* versioned = nullptr;
  PyObject* due = nullptr;
  PyObject* lock_timeout = nullptr;  // of locks
  PyObject* lock_lost = nullptr;
  PyObject* get_running_loop = nullptr;  // of asyncio, once load_asyncio() was needed
  PyObject* current_task = nullptr;
  PyObject* cancelled_error = nullptr;
};
extern ModuleState g_state;
inline ModuleState& state() { return g_state; }

// Bumped in every forked child: objects made before belong to the parent.
extern std::atomic<unsigned> g_generation;

// What the awaiting code gets.
enum class Mode { permit, none, boolean };

// A concurrency slot held by a Python object. Shared by the Permit and, for bare acquires, the
// limiter; whoever releases first wins.
struct Slot {
  engine::LimiterRef limiter;
  store::GroupRef group;
  engine::PermitRef permit;    // null for the memory store's quick slots:
  store::HolderId holder = 0;  // those are named by this
  unsigned generation = 0;     // of the process that holds it: not a forked child's to release
  std::atomic<bool> held{true};
};
using SlotRef = std::shared_ptr<Slot>;

struct LimiterImpl {
  std::string id;
  std::string store_id;
  std::shared_ptr<engine::Engine> engine;
  engine::LimiterRef core;
  memory::MemoryStore* memory = nullptr;  // set when it may be asked on the calling thread
  memory::Pin pin;
  unsigned generation = 0;
  bool rate_only = false;  // quick, and no slot to give back: the shortest path
  Nanos logged = 0;        // when an outage was last reported
  // Slots of bare acquires, oldest first, among them some that were released by their permits.
  std::deque<SlotRef> bare = {};
  std::size_t bare_sweep_at = 64;  // size at which those are looked for
  // `with limiter`, by task or thread; null when a dead store let the caller pass without a slot.
  std::unordered_map<std::uint64_t, std::vector<SlotRef>> entered = {};
};

struct LimiterObject {
  PyObject_HEAD PyObject* weakrefs;
  LimiterImpl* impl;
};

enum class Phase : std::uint8_t { idle, pending, granted };

struct PermitParts;  // permit.h

// An acquisition: context manager, awaitable and permit in one object.
struct PermitObject {
  PyObject_HEAD LimiterObject* limiter;
  PyObject* key;
  Nanos timeout;  // < 0: the limiter's default; kForever: none
  std::int64_t cost;
  std::int64_t remaining;
  Nanos waited;
  Nanos full_after;  // until every unit is available again, right after the grant; < 0: not known
  Phase phase;
  bool ready;        // granted, and the awaitable that says so has not been consumed
  bool bare;         // `await acquire()`: no body that would release
  bool entered;      // inside `with`
  bool passed_open;  // the store was out and did not decide
  SlotRef slot;
  store::GroupRef group;  // of the key; null: the limiter's
  PermitParts* parts;     // of several limits; null: of one. `limiter` is the first of them
};

class LoopState;

// One operation under way, awaited by one task. It speaks the asyncio future protocol itself and
// wakes the task from the reader callback: 1.19M against 337k completions/s with asyncio.Future.
struct WaiterObject {
  PyObject_HEAD engine::Completion* completion;  // one reference, until the result was taken
  std::shared_ptr<engine::Engine> engine;
  std::shared_ptr<LoopState> loop;
  PyObject* callback;
  PyObject* context;
  PermitObject* permit;  // acquisitions; else null
  PyObject* owner;       // of raw calls: what `finish` gets; else null
  PyObject* (*finish)(PyObject* owner, engine::Completion& completion);
  std::function<PyObject*(engine::Completion&)> convert;  // other calls
  PyObject* cancel_message;  // of Task.cancel(msg): anyio knows its cancellations by it
  WaiterObject* previous;    // among the waiters of the loop
  WaiterObject* next;
  Mode mode;
  enum class State : std::uint8_t { pending, done, cancelled, consumed } state;
  bool cancellable;  // the completion is an Acquisition
  bool blocking;
  bool yielded;  // a task waits on it as a future; before, it is a coroutine to asyncio
};

// limiter.cc
bool init_limiter_type(PyObject* module);
LimiterImpl* live(LimiterObject* limiter);  // rebinds after fork; null with an exception set
std::uint64_t caller_key(bool async);
Nanos parse_timeout(PyObject* value, Nanos when_none, bool* ok);
bool raise_invalid(const char* message, const char* field, const char* expected, PyObject* received);

// permit.cc
bool init_permit_type(PyObject* module);
PermitObject* new_permit(LimiterObject* limiter, Nanos timeout, std::int64_t cost, PyObject* key);
PyObject* begin_async(PermitObject* permit, Mode mode);
PyObject* run_sync(PermitObject* permit, Mode mode);
// Fills the permit from a delivered task, or raises. Consumes nothing.
PyObject* finish_acquire(PermitObject* permit, engine::Acquisition& task, Mode mode, bool async);
void release_slot(LimiterImpl& impl, Slot& slot);

// acquire.cc
PyObject* acquire_function(PyObject* module, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames);
PyObject* attempt_function(PyObject* module, PyObject* permit);
PyObject* acquire_limits_function(PyObject* module, PyObject* const* args, Py_ssize_t nargs);
extern const char kAcquireDoc[];

// waiter.cc
bool init_waiter_type(PyObject* module);
WaiterObject* new_waiter(std::shared_ptr<engine::Engine> engine, std::shared_ptr<LoopState> loop);
void completed(WaiterObject* waiter);  // by drain; returns with the task woken
void abandon(WaiterObject* waiter);    // whatever comes or came is given back
void give_up(WaiterObject* waiter);    // the awaiting code is leaving: nobody is to be woken, either
void raise_stop(PyObject* result);     // StopIteration with this value; takes over the reference
// Raises what the arguments of a coroutine's throw() say. Returns null.
PyObject* raise_thrown(PyObject* const* args, Py_ssize_t nargs);
void give_back(engine::Engine& engine, engine::Completion* completion);
PyObject* raise_status(const Status& status, const std::string& store_id);
// Why Engine::submit() said no; `closed` is the text for an engine that was shut down.
PyObject* raise_not_taken(const engine::Engine& engine, const std::string& store_id,
                          const std::string& closed);

// calls.cc
// Waits for a completion with the GIL released, in slices, so that Ctrl-C works. Null with an
// exception set: interrupted, the operation was cancelled and what it granted given back.
engine::Completion* wait_sync(engine::Engine& engine, engine::Completion* completion,
                              const std::shared_ptr<engine::SyncTarget>& target, bool cancellable);

// compiled.cc: the class decorator of that name. A new reference to the class, or null with an exception set.
PyObject* compiled_class(PyObject* module, PyObject* cls);

// loop.cc
// Imports asyncio at the first use that needs it: half of the time of `import ratesync` otherwise.
bool load_asyncio();
std::shared_ptr<LoopState> running_loop_state();  // null with RuntimeError set when there is none
bool in_running_loop();
class LoopState {
 public:
  explicit LoopState(PyObject* loop);
  ~LoopState();
  LoopState(const LoopState&) = delete;
  LoopState& operator=(const LoopState&) = delete;
  // The loop is closed or gone: nobody will be woken there any more. What waits is cancelled, what was
  // granted is given back.
  void retire();
  // Drops what was delivered after that. True: nothing more will come.
  bool reap();

  std::shared_ptr<engine::LoopTarget> target;
  PyObject* weak_loop = nullptr;
  WaiterObject* waiters = nullptr;  // all that exist, newest first
};
// In a forked child: closes the inherited descriptors. The queues themselves stay the parent's.
void abandon_loops_after_fork();

}  // namespace ratesync::bindings
