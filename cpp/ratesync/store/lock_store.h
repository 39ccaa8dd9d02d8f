// What a backend must do to carry locks with fencing tokens.
//
// A lock is held by one acquisition until it is released or its lease is over, whichever comes first;
// taking over an expired lease is the same single step as taking a free one. A LockStore decides; who
// waits, renews, and learns of a loss lives in engine/. Threads and done() as in state_store.h.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "ratesync/base/clock.h"
#include "ratesync/base/status.h"
#include "ratesync/store/state_store.h"

namespace ratesync::store {

struct LockReply {
  enum class Outcome : std::uint8_t {
    held,   // acquire: it is yours; renew: it still is; release, break_: it was until now
    taken,  // acquire: somebody else holds it
    lost,   // renew, release, break_: it was not held under this token any more
  };
  Status status;  // not ok: nothing below counts
  Outcome outcome = Outcome::held;
  std::int64_t token = 0;      // acquire that holds: the fencing token; taken: the holder's
  std::int64_t remaining = 0;  // ms until the lease is over: ours, or the holder's when taken
  std::string holder;          // taken: who holds it, for people
};

// Owned by the engine until done() was called, exactly once, or abandon() returned true.
struct LockOp {
  enum class Verb : std::uint8_t {
    acquire,  // free or expired: take it, with a token above every earlier one of this name
    renew,  // `ttl` from now, where the lock is held under `token`. Expired, but taken by nobody: still ours
    release,  // where it is held under `token`, and wake the first waiter
    break_,   // by hand: release whatever `token` says, 0: whoever holds it
    // A name as a bell, without a lock behind it:
    stand,  // remembers this process as a waiter, as a queued acquire that is `taken` does
    ring,   // tells all other processes that wait, through on_freed(), and forgets them and this one
  };
  Verb verb = Verb::acquire;
  SpaceRef space;
  std::string name;
  std::int64_t ttl = 0;    // ms from 1: acquire, renew
  std::int64_t token = 0;  // renew, release, break_
  // Stands in line: refused as taken, the store remembers this process as a waiter of the name, behind
  // those that wait already, until stop_waiting() or until the process gets the lock (whoever waits on asks
  // again, and stands at the end), and tells it through on_freed(). `remaining` says when to ask again at the
  // latest.
  bool queued = false;
  // acquire: names this acquisition, unique over all processes, above 0. Kept with the lock, so that the
  // same acquire, sent again after a lost answer, finds that it holds the lock and gets the same token.
  std::int64_t id = 0;
  Nanos deadline = kForever;  // engine's clock: not sent by then, it fails with Code::timeout
  LockReply reply;

  virtual ~LockOp() = default;
  virtual void done() = 0;
};

struct LockInfo {
  std::string name_space;
  std::string tenant;
  std::string name;
  std::int64_t token = 0;
  std::string holder;           // host:pid and application, as text
  std::int64_t held_for = 0;    // ms
  std::int64_t expires_in = 0;  // ms; not above 0: expired
  std::int64_t waiters = 0;     // processes that stand in line
};

class LockStore {
 public:
  virtual ~LockStore() = default;

  // One call, one done().
  virtual void submit(LockOp* op) = 0;
  // Takes back what has not been sent. True: it is the caller's again and done() will not be called.
  virtual bool abandon(LockOp* op) = 0;
  // Locks held or expired but not purged, by name; at most `limit`. `space` null: of all.
  virtual void list(const SpaceRef& space, std::size_t limit, Callback<std::vector<LockInfo>> done) = 0;

  // Nobody of this process stands in line for the lock any more.
  virtual void stop_waiting(const SpaceRef& space, const std::string& name) = 0;
  // Called when a lock was freed that is meant for a waiter of this process. Where nobody waits any more:
  // answer with stop_waiting(), and the next in line hears of it.
  virtual void on_freed(std::function<void(const Space&, const std::string& name)> listener) = 0;
  // Whether on_freed() can be relied on at this moment; otherwise waiters ask now and then.
  [[nodiscard]] virtual bool pushes() const = 0;

  virtual void initialize(Callback<Unit> done) = 0;
};

}  // namespace ratesync::store
