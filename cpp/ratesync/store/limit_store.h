// What a backend must do to carry rate and concurrency limits.
//
// A LimitStore decides; it never sleeps, queues for a slot, or knows about tasks: waiting,
// cancellation, leases' owners and failure policy live in engine/. Except where said, methods are
// called on the engine's I/O thread only, and `done()` is called there too, possibly from inside
// the call (memory does that).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "ratesync/base/clock.h"
#include "ratesync/base/status.h"
#include "ratesync/limits/gcra.h"

namespace ratesync::store {

// Identity and parameters of one limit. Two processes share a limit when store and id are equal.
struct Group {
  Group(std::string name, const limits::Params& parameters)
      : id(std::move(name)), params(parameters), pace(limits::pace_of(parameters)) {}
  const std::string id;
  const limits::Params params;
  const limits::Pace pace;
};
using GroupRef = std::shared_ptr<const Group>;

enum class Verdict {
  granted,           // sleep `wait`, then go
  rate_limited,      // the slot would lie `retry_after` ahead, which is beyond the deadline
  concurrency_full,  // all slots are held
};

// The incarnation of this process's lease on a group, under which concurrency slots are held.
// 0: no slot is held. A new incarnation begins when a lease was lost.
using HolderId = std::uint64_t;

struct AcquireReply {
  Status status;  // not ok: nothing below counts
  Verdict verdict = Verdict::granted;
  Nanos wait = 0;              // granted: the slot lies this far ahead of the moment of the reply
  Nanos retry_after = 0;       // refused: ask again no earlier than this
  std::int64_t remaining = 0;  // units left after this decision (rate), or slots (concurrency only)
  // Granted with a rate: identifies the state right after the batch that carried this request.
  // LimitStore::refund gives the units back only while that is still the newest deal.
  std::int64_t stamp = 0;
  // Granted with a rate: until every unit is available again, if nobody asks. < 0: the store does not say.
  Nanos full_after = -1;
  HolderId holder = 0;
};

// One acquisition on its way through a store. Owned by the engine, which keeps it alive until
// done() was called, exactly once, or abandon() returned true.
struct AcquireOp {
  GroupRef group;
  std::int64_t cost = 1;
  Nanos deadline = kForever;  // on the engine's clock: no slot later than this is wanted. now = try once
  std::uint64_t order = 0;    // of arrival in this process: of one group, lower goes first
  // It stands in line for a slot: refused as full, the store remembers this process as a waiter of
  // the group, until stop_waiting(), and tells it through on_freed() when a slot came free.
  bool queued = false;
  // Lost races that the store repeated; of requests decided together, the first one bears them.
  std::uint32_t conflicts = 0;
  AcquireReply reply;

  virtual ~AcquireOp() = default;
  virtual void done() = 0;
};

// One limit of an acquisition of several.
struct Part {
  GroupRef group;
  std::int64_t cost = 1;
};

// Several limits of one store, all or nothing: granted when every part can be granted at this very
// moment (wait 0), otherwise nothing is charged anywhere and each part says why and when. It never
// reserves a slot in the future: a unit of one limit, kept until another limit's time has come, would
// either be used later than dealt (and exceed the rate) or block those behind it.
struct AcquireAllOp {
  std::vector<Part> parts;  // at least one; ids are distinct
  bool queued = false;      // as in AcquireOp, for each part that is full
  Status status;            // not ok: `replies` do not count
  bool granted = false;
  std::vector<AcquireReply> replies;  // one per part, `status` unused, `wait` 0

  virtual ~AcquireAllOp() = default;
  virtual void done() = 0;
};

// The state of a limit, read without charging anything.
struct Peek {
  std::int64_t available = 0;  // units that could be taken now (rate), else free slots
  std::int64_t in_use = 0;     // concurrency slots held now, in all processes
  Nanos retry_after = 0;       // until one unit could be had; 0 = now
  Nanos full_after = 0;        // until the bucket is full again, or the window empty
  std::int64_t used = 0;       // windows: limit minus the units that could be taken now, whoever holds slots
};

struct HolderInfo {
  std::string group;
  std::string holder;  // host:pid and application, as text
  std::int64_t slots = 0;
  Nanos held_for = 0;
  Nanos expires_in = 0;  // negative: expired
};

struct GroupInfo {
  std::string group;
  Nanos last_ahead = 0;  // last_acquisition_at minus the server's now
  std::int64_t version = 0;
  std::int64_t in_use = 0;  // unexpired slots
};

struct Listing {
  std::vector<GroupInfo> groups;
  std::vector<HolderInfo> holders;
  bool truncated = false;
};

template <class T>
using Callback = std::function<void(Result<T>)>;
struct Unit {};

class LimitStore {
 public:
  virtual ~LimitStore() = default;

  // Asks for a decision. One call, one done().
  virtual void acquire(AcquireOp* op) = 0;
  // Takes back an acquire that has not been sent. True: op is the caller's again and done() will
  // not be called. False: it is under way and done() will come.
  virtual bool abandon(AcquireOp* op) = 0;
  // The same for several limits of this store in one round trip. A store that cannot decide them in one
  // atomic step (Redis Cluster: slots differ) answers Code::invalid and says the cure.
  virtual void acquire_all(AcquireAllOp* op) = 0;
  virtual bool abandon(AcquireAllOp* op) = 0;
  // Gives one slot back. Never fails for the caller: a store that is down learns it later, with
  // the next statement of the group or by expiry.
  virtual void release(const GroupRef& group, HolderId holder) = 0;
  // Gives `cost` units back, but only while `stamp` is still the newest deal of the group. Returns
  // the stamp that will then be the newest, so that a second refund can follow the first.
  virtual std::int64_t refund(const GroupRef& group, std::int64_t cost, std::int64_t stamp) = 0;
  // Corrects the charge after the fact: positive charges more, negative gives back.
  virtual void settle(const GroupRef& group, std::int64_t delta, Callback<Unit> done) = 0;
  virtual void peek(const GroupRef& group, Callback<Peek> done) = 0;
  // Forgets consumption and leases of the group.
  virtual void reset(const GroupRef& group, Callback<Unit> done) = 0;
  virtual void list(std::size_t limit, Callback<Listing> done) = 0;
  // Called whenever the leases of (group id, holder) turn out to be lost.
  virtual void on_lost(std::function<void(const std::string& group, HolderId)> listener) = 0;

  // Nobody of this process stands in line for a slot of the group any more.
  virtual void stop_waiting(const GroupRef&) {}
  // Called when another process freed a slot that is meant for a waiter of this process.
  virtual void on_freed(std::function<void(const std::string& group)>) {}
  // Whether on_freed() can be relied on at this moment; otherwise waiters ask now and then.
  [[nodiscard]] virtual bool pushes() const { return false; }
};

}  // namespace ratesync::store
