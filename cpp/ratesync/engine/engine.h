// One engine: an I/O thread, the stores that live on it, and the queue of work submitted to it.
//
// Any thread submits; the I/O thread drains the whole queue in one go, so that what arrived
// together travels together. The thread starts with the first submission (a process that only
// uses the memory store's fast path has none) and ends with shutdown(). After fork the object is
// dead in the child: see abandon_after_fork().
#pragma once

#include <sys/types.h>

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <variant>
#include <vector>

#include "ratesync/engine/limit_service.h"
#include "ratesync/engine/multi_service.h"
#include "ratesync/engine/store_factory.h"
#include "ratesync/net/io_thread.h"

namespace ratesync::engine {

class Keeper;
class LockServices;
class StateServices;

// A store and the services on top of it.
struct StoreEntry {
  StoreEntry();
  ~StoreEntry();
  StoreEntry(const StoreEntry&) = delete;
  StoreEntry& operator=(const StoreEntry&) = delete;

  std::string id;
  std::string kind;
  std::unique_ptr<store::Store> store;
  std::unique_ptr<LimitService> limits;
  std::unique_ptr<StateServices> states;
  std::unique_ptr<LockServices> locks;
  // I/O thread: answers everything under way with Code::closed, gives held locks back and closes the store.
  void close(const std::function<void()>& done) const;
};

// What may be put on the I/O thread's queue.
struct StartTask {
  Acquisition* task;
};  // takes over one reference
struct CancelTask {
  Acquisition* task;
};  // takes over one reference
struct ReleasePermit {
  PermitRef permit;
};
struct SlotFreed {
  LimiterRef limiter;
  std::string group;
};
struct GiveBack {
  LimiterRef limiter;
  store::GroupRef group;
  std::int64_t cost;
  bool charged;
  RateSlot slot;
  PermitRef permit;
};
struct Run {
  std::function<void()> work;
};
using Submission = std::variant<StartTask, CancelTask, ReleasePermit, SlotFreed, GiveBack, Run>;

class Engine {
 public:
  explicit Engine(bool manual_clock);
  ~Engine();  // shutdown() happened, or the process is a forked child (then nothing is touched)
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Any thread. The entry lives as long as the engine.
  Result<StoreEntry*> add_store(const std::string& id, const std::string& kind, const StoreOptions& options);
  // Any thread. False: shut down, or the system gives no thread; the submission was not taken and
  // still belongs to the caller.
  bool submit(Submission submission);
  // Any thread but the I/O thread: answers everything under way with Code::closed, gives held slots
  // back, closes the stores (within a bound) and joins.
  void shutdown();
  // Manual clock: moves time and fires what became due, before it returns.
  void advance(Nanos by);
  // Manual clock: the same up to the moment `to`; returns that of the next timer, kForever when there is
  // none. `idle`: nothing waits, so there is nothing to fire and the I/O thread is not asked.
  Nanos step(Nanos to, bool idle);

  [[nodiscard]] const Clock& clock() const { return clock_; }
  [[nodiscard]] MultiService& multi() { return *multi_; }
  [[nodiscard]] Keeper& keeper() { return *keeper_; }
  [[nodiscard]] bool running() const { return !closed_; }
  // True in a child of the process that made this engine.
  [[nodiscard]] bool forked() const;
  // In the child: closes inherited descriptors, says nothing to servers, frees nothing.
  void abandon_after_fork();

 private:
  bool ensure_started();  // submit_mutex_ held
  void drain();
  void run(Submission& submission);

  const pid_t pid_;
  Clock clock_;
  std::unique_ptr<net::IoThread> io_;
  std::unique_ptr<Timers> timers_;
  std::unique_ptr<MultiService> multi_;
  std::unique_ptr<Keeper> keeper_;
  std::vector<std::unique_ptr<StoreEntry>> stores_;  // grows under submit_mutex_, entries are stable
  std::mutex submit_mutex_;                          // guards queue_, started_, closed_, stores_
  std::vector<Submission> queue_;
  bool started_ = false;
  std::atomic<bool> closed_{false};
};

}  // namespace ratesync::engine
