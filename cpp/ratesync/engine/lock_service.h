// Waiting for locks, holding them and letting them go: what a LockStore does not do. One service per store
// and prefix; all methods run on the I/O thread unless said otherwise.
//
// The life of an acquisition:
//
//   start ─► nobody in line, not held by this process ─► asking ─► held ───────────────► finished (lease)
//        │                                                 ├─ taken ─► first in line ─┐
//        │                                                 ├─ in doubt ─► the same, same id
//        │                                                 └─ failed ───────────────► finished (status)
//        └─► in line ─► first in line ─► asking, when
//                         - a lease of this process was released: behind it, in the same trip
//                         - the store says so (on_freed)
//                         - the holder's lease is over, as far as the store told
//                         - now and then, where the store cannot push
//   timeout: in line - finished without a lease. Asking - what comes is given back; before the first answer
//   the store gets a little longer, and then it is an error: nobody knows whether the lock was taken.
//
// A cancel is decided here, whatever the state: in line - it leaves; asking, not sent - taken back; sent -
// the answer is read, and a lock that came with it is given back at once and offered to the next in line;
// finished - the reader of the completion gives it back.
//
// Only the first in line asks, so a process has one question per name under way however many wait. Releases
// are handed over inside the process kMaxHandovers times in a row; then the first in line takes its place in
// the store's own line, behind other processes, and the next release is left to the store.
#pragma once

#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <unordered_map>

#include "ratesync/base/spin_lock.h"
#include "ratesync/engine/bells.h"
#include "ratesync/engine/keeper.h"
#include "ratesync/store/store.h"

namespace ratesync::engine {

class LockService;
struct LockName;

// From lease to lease inside this process, in a row, while others may be waiting elsewhere.
inline constexpr int kMaxHandovers = 16;
// So long who leaves the body of a lock waits for a store that does not answer.
inline constexpr Nanos kLeavingTime = kSecond;

// A lock held by this process, until it is lost or ended.
class HeldLock final : public Kept {
 public:
  HeldLock(LockService& owner, store::SpaceRef in, std::string called, std::int64_t fencing_token,
           std::int64_t ttl_ms, bool auto_renew, Nanos ends_at);
  ~HeldLock() override;

  LockService& service;
  const store::SpaceRef space;
  const std::string name;
  const std::int64_t token;
  std::atomic<bool> releasing{false};  // a release was asked for
  std::atomic<bool> answered{false};   // the store has said what it found

 protected:
  void ask(std::int64_t ttl_ms) override;
  void on_lost() override;
  [[nodiscard]] bool local() const override;

 private:
  struct Renewal final : store::LockOp {
    explicit Renewal(HeldLock& lock) : owner(lock) {}
    void done() override;
    HeldLock& owner;
  };
  friend class LockService;
  std::unique_ptr<Renewal> renewal_;  // made at the first use
  HeldLock* previous_ = nullptr;      // among those of the service; I/O thread
  HeldLock* after_ = nullptr;
  std::shared_ptr<Kept> listed_;      // itself
  bool held_until_released_ = false;  // I/O thread: it was held when the first release was asked for
};
using HeldLockRef = std::shared_ptr<HeldLock>;

class LockAcquire final : public Acquisition, public store::LockOp, public TimerNode {
 public:
  enum class Outcome { held, not_in_time, failed, cancelled };

  explicit LockAcquire(LockService& owner) : service(owner) {}
  void start() override;
  void cancel() override;
  void done() override;      // from the store
  void fire() override;      // time is up, or it is time to ask again
  void orphaned() override;  // nobody reads the result

  // in (set before submit, as space and name)
  LockService& service;
  std::int64_t lease_ms = 0;
  bool auto_renew = true;
  Nanos submitted = 0;
  Nanos until = kForever;

  // out (read after delivery)
  Outcome outcome = Outcome::held;
  Status status;
  HeldLockRef lease;              // held
  std::string holder;             // not in time: who held it when it was last asked for
  std::int64_t remaining_ms = 0;  // and how long that lease ran still; 0: not known

 private:
  friend class LockService;
  ~LockAcquire() override = default;

  enum class State : std::uint8_t { created, in_line, asking, finished };
  State state_ = State::created;
  bool refused_ = false;   // at least once: somebody else held it
  bool given_up_ = false;  // finished while the store still has it
  int doubts_ = 0;         // answers lost in a row
  Nanos first_doubt_ = 0;
  Nanos sent_ = 0;
  Nanos patience_ = 0;      // until when the first answer is waited for
  LockName* at_ = nullptr;  // while it is in a line, asking or not
  std::list<LockAcquire*>::iterator place_;
};

// What is known of a name while somebody of this process waits for it or holds it.
struct LockName final : TimerNode {
  LockName(LockService& owner, std::string id) : service(owner), key(std::move(id)) {}
  void fire() override;
  LockService& service;
  const std::string key;
  store::SpaceRef space;
  std::string name;
  std::list<LockAcquire*> line;    // first come first; only the first may be asking
  std::weak_ptr<HeldLock> holder;  // a lease of this process that still runs
  bool remembered = false;         // the store knows this process as a waiter
  bool freed = false;              // it was freed while the first in line was asking
  int handovers = 0;
  Nanos pause = 0;              // between two questions where the store cannot push
  Nanos away_since = kForever;  // the store cannot be reached
};

// Gives a lock back and says whether it was held until then. Who leaves the body of a lock waits for the
// answer for kLeavingTime at most; it is given back all the same.
class LockRelease final : public Acquisition, public store::LockOp, public TimerNode {
 public:
  explicit LockRelease(HeldLockRef held, bool leaving = false) : lease(std::move(held)), leaving_(leaving) {
    lease->releasing = true;
  }
  void start() override;
  void cancel() override {}  // it is given back all the same
  void done() override;      // from the store
  void fire() override;      // who leaves has waited long enough
  void orphaned() override {}

  const HeldLockRef lease;
  // out (read after delivery)
  bool was_held = false;  // with a status that is not ok: as far as is known here
  Status status;

 private:
  friend class LockService;
  ~LockRelease() override = default;
  const bool leaving_;
  bool alone_ = false;  // nobody waits for the answer, or not any more
  int doubts_ = 0;
  Nanos until_ = 0;  // the lease is over by then, so that nothing is left to be given back
};

// One operation by hand: break_.
class LockBreak final : public Acquisition, public store::LockOp {
 public:
  explicit LockBreak(LockService& owner) : service(owner) {}
  void start() override;
  void cancel() override {}
  void done() override;
  void orphaned() override {}

  LockService& service;
  bool was_held = false;
  Status status;

 private:
  ~LockBreak() override = default;
};

class LockService {
 public:
  // `shared`: other processes see the store. `post`: runs something on the I/O thread, from any thread.
  LockService(store::LockStore& store, Keeper& keeper, Timers& timers, bool shared,
              std::function<void(std::function<void()>)> post, std::uint64_t seed);
  ~LockService();
  LockService(const LockService&) = delete;
  LockService& operator=(const LockService&) = delete;

  void start(LockAcquire* task);  // takes over one reference
  void cancel(LockAcquire* task, LockAcquire::Outcome as = LockAcquire::Outcome::cancelled);  // borrowed
  void release(LockRelease* task);  // takes over one reference
  // Gives it back, nobody wants the answer.
  void let_go(const HeldLockRef& lease);
  // Renews it no more: it ends by itself.
  void drop(const HeldLockRef& lease);
  void broken(LockBreak* task);
  // Of all spaces, by name.
  void list(std::size_t limit, store::Callback<std::vector<store::LockInfo>> done);
  // Everything under way is answered with Code::closed; held locks are given back, then `done`.
  void shutdown(std::function<void()> done);

  // Any thread, on stores that answer on the calling thread ------------------------------------
  [[nodiscard]] bool shared() const { return shared_; }
  // Nobody may overtake those who wait: then it has to be start().
  [[nodiscard]] bool somebody_waits() const { return waiting_.load(std::memory_order_acquire) > 0; }
  // Tries once. Null: taken, or not ok.
  HeldLockRef take_now(const store::SpaceRef& space, const std::string& name, std::int64_t ttl_ms,
                       bool auto_renew, store::LockReply* reply);
  // What to ask the store for.
  [[nodiscard]] std::int64_t store_ttl(std::int64_t ttl_ms, bool auto_renew) const;
  // Of a lease, as the store says it: 0 where it is renewed without end and so ends nowhere.
  static std::int64_t known_remaining(std::int64_t remaining_ms);
  bool release_now(const HeldLockRef& lease);
  bool extend_now(const HeldLockRef& lease, std::int64_t ttl_ms);
  void drop_now(const HeldLockRef& lease);

  [[nodiscard]] store::LockStore& store() { return store_; }
  [[nodiscard]] Keeper& keeper() { return keeper_; }
  [[nodiscard]] Timers& timers() { return timers_; }
  [[nodiscard]] Bells& bells() { return bells_; }

 private:
  friend class HeldLock;
  friend class LockAcquire;
  friend class LockRelease;
  friend struct LockName;

  using Name = LockName;

  Name* find(const std::string& key);
  Name& name_of(LockAcquire& task);
  void drop_if_idle(Name& name);
  bool held_here(Name& name);

  void ask_first(const std::string& key, bool although_held_here = false);
  void ask(LockAcquire* task);
  void replied(LockAcquire* task);
  void refused(Name& name, LockAcquire* task);
  void won(Name& name, LockAcquire* task);
  void in_doubt(Name& name, LockAcquire* task, Status status);
  [[nodiscard]] bool outlasts(const Name& name, const LockAcquire& task) const;
  void away(Name& name, LockAcquire* task);
  void unwanted(LockAcquire* task);
  void time_is_up(LockAcquire* task);
  void leave_line(Name& name, LockAcquire* task);
  void stop_waiting(Name& name);
  void plan(Name& name, std::int64_t remaining_ms);
  void freed(const std::string& key);
  void handed_back(const HeldLockRef& lease);
  void finish(LockAcquire* task, LockAcquire::Outcome outcome);
  void send(LockRelease* task);
  void answered(LockRelease* task);
  void left(LockRelease* task);
  void lost(HeldLock& lease);
  void farewell();
  HeldLockRef make_lease(const store::SpaceRef& space, const std::string& name, std::int64_t token,
                         std::int64_t ttl_ms, bool auto_renew, Nanos sent, std::int64_t runs_ms);
  void forget_local(const HeldLock& lease);
  void list_held(HeldLock& lease);
  void unlist_held(HeldLock& lease);
  void tell_later(const HeldLockRef& lease);
  Nanos jittered(Nanos base);

  store::LockStore& store_;
  Keeper& keeper_;
  Timers& timers_;
  const bool shared_;
  const std::function<void(std::function<void()>)> post_;
  std::unordered_map<std::string, std::unique_ptr<Name>> names_;
  HeldLock* held_ = nullptr;  // all of them: to be given back at the end
  std::list<std::pair<std::string, bool>> to_ask_;
  bool asking_ = false;
  std::atomic<std::size_t> waiting_{0};
  std::size_t in_store_ = 0;  // acquires and releases
  bool closing_ = false;
  std::function<void()> farewell_;
  SpinLock local_mutex_;                                             // guards local_
  std::unordered_map<std::int64_t, std::weak_ptr<HeldLock>> local_;  // of a store of this process, by token
  std::minstd_rand random_;
  Bells bells_;  // in the same lines of the store
};

// The services of a store, by prefix.
class LockServices {
 public:
  LockServices(store::Store& store, Keeper& keeper, Timers& timers,
               std::function<void(std::function<void()>)> post)
      : store_(store), keeper_(keeper), timers_(timers), post_(std::move(post)) {}

  // Any thread, no I/O. It lives as long as the store.
  Result<LockService*> get(const std::string& prefix);
  // I/O thread. `done` runs when every held lock was given back, or cannot be.
  void shutdown(std::function<void()> done);

 private:
  store::Store& store_;
  Keeper& keeper_;
  Timers& timers_;
  const std::function<void(std::function<void()>)> post_;
  std::mutex mutex_;  // guards services_ and closing_
  std::map<std::string, std::unique_ptr<LockService>> services_;
  bool closing_ = false;
};

}  // namespace ratesync::engine
