// Waiting, cancelling, leases and failure policy of limits - everything that a LimitStore does not
// do. One service per store; all methods run on the I/O thread unless said otherwise.
//
// The life of an acquisition:
//
//   start ─► in_store ─► granted now ───────────────────────────► finished
//                    ├─► granted later ─► sleeping (slot's time) ─► finished
//                    ├─► rate_limited (slot beyond the deadline) ─► finished, nothing charged
//                    ├─► concurrency_full ─► waiting (FIFO) ─► in_store again, when a slot is free
//                    └─► no answer within the budget, store down ─► failure policy ─► finished
//
// A cancel is decided here, whatever the state: not sent - taken back; sent - the answer is read
// and what it grants is given back; sleeping - the slot goes to the next sleeper, and the last one
// is refunded; finished - the reader of the completion gives back, and the next sleeper gets it
// if it is not too late.
#pragma once

#include <array>
#include <atomic>
#include <deque>
#include <limits>
#include <list>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>

#include "ratesync/engine/completion.h"
#include "ratesync/engine/timers.h"
#include "ratesync/store/store.h"

namespace ratesync::engine {

class LimitService;
class MultiService;
struct Stand;

// What a limiter is beyond its group: the policy of this process.
struct Policy {
  Nanos default_timeout = kForever;
  bool fail_closed = false;
  Nanos outage_budget = kSecond / 4;
  Nanos max_hold = kForever;
};

// How many may ask at once after successes.
inline constexpr std::size_t kMaxWindow = 1024;

// Upper bounds of the histogram of waits; what is beyond the last goes into one more bucket.
inline constexpr std::array<Nanos, 12> kWaitBuckets = {
    kMilli,       5 * kMilli,   10 * kMilli, 25 * kMilli,     50 * kMilli, 100 * kMilli,
    250 * kMilli, 500 * kMilli, kSecond,     5 * kSecond / 2, 5 * kSecond, 10 * kSecond};

// Live counters of one limiter object. Written by callers (under the GIL) and by the I/O thread.
struct Counters {
  std::atomic<std::uint64_t> quick_acquisitions{0};  // granted without leaving the calling thread
  std::atomic<Nanos> last_acquisition{0};
  std::atomic<std::uint64_t> acquisitions{0};  // granted through the I/O thread
  std::atomic<std::uint64_t> wait_ns{0};
  std::atomic<std::uint64_t> max_wait_ns{0};
  // Of the grants in `acquisitions`; the quick ones waited for nothing and belong to the first bucket.
  std::array<std::atomic<std::uint64_t>, kWaitBuckets.size() + 1> waits{};
  std::atomic<std::uint64_t> timeouts{0};  // refused: rate or concurrency
  std::atomic<std::uint64_t> refused_rate{0};
  std::atomic<std::uint64_t> refused_concurrency{0};
  std::atomic<std::uint64_t> cancelled{0};
  std::atomic<std::uint64_t> passed_open{0};  // let through because the store was down
  std::atomic<std::uint64_t> failed{0};       // store errors raised to callers
  std::atomic<std::uint64_t> releases{0};
  std::atomic<std::uint64_t> leases_lost{0};
  std::atomic<std::uint64_t> cas_failures{0};  // lost races that the store repeated
  std::atomic<std::int64_t> held{0};           // slots held through this object (gauge)
};

void count_grant(Counters& counters, Nanos now, Nanos waited);
inline void add(std::atomic<std::uint64_t>& counter) { counter.fetch_add(1, std::memory_order_relaxed); }

// Shared by the Python limiter and the operations under way.
struct LimiterCore {
  store::GroupRef group;
  Policy policy;
  Counters counters;
  LimitService* service = nullptr;
};
using LimiterRef = std::shared_ptr<LimiterCore>;

// A held concurrency slot.
class Permit final : public TimerNode {
 public:
  Permit(LimiterRef owner, store::GroupRef charged, store::HolderId lease)
      : limiter(std::move(owner)), group(std::move(charged)), holder(lease) {}
  void fire() override;  // max_hold is over

  const LimiterRef limiter;
  const store::GroupRef group;  // the limiter's, or that of a key
  const store::HolderId holder;
  std::atomic<bool> lost{false};
  // I/O thread:
  bool live = true;                                    // still counted as held
  std::list<std::shared_ptr<Permit>>::iterator place;  // among the permits of its group
};
using PermitRef = std::shared_ptr<Permit>;

enum class Outcome {
  granted,
  refused,      // not within the deadline
  passed_open,  // the store is down and the policy is open
  failed,       // status says why
  cancelled,
};

// A question to a store that is under way, watched by the outage check.
class Question {
 public:
  Question() = default;
  Question(const Question&) = delete;
  Question& operator=(const Question&) = delete;
  // No answer came in time, `elapsed` after it was sent. It is off the watch already.
  virtual void overdue(Nanos elapsed) = 0;

  Nanos budget = 0;  // how long the store may be silent

 protected:
  virtual ~Question() = default;

 private:
  friend class LimitService;
  Nanos sent_ = 0;
  std::list<Question*>* list_ = nullptr;  // LimitService::in_store_ or overdue_
  std::list<Question*>::iterator pending_;
};

class AcquireTask;

// A moment that was dealt to this process, and what the store needs to take it back.
struct RateSlot {
  Nanos at;
  std::int64_t stamp;
};

// Sleepers of one cost in order of arrival, and the slots dealt to them: the i-th sleeper goes at
// the i-th slot. So one that leaves moves everybody behind it up, by giving the last slot away:
// O(1), where shifting each follower takes seconds when 10,000 are cancelled at once.
struct SleeperRun {
  std::int64_t cost;
  std::list<AcquireTask*> sleepers;
  std::deque<RateSlot> slots;  // never decreasing
};

class AcquireTask final : public Acquisition, public store::AcquireOp, public Question, public TimerNode {
 public:
  enum class State { created, in_store, waiting, sleeping, finished };

  explicit AcquireTask(LimiterRef owner) : limiter(std::move(owner)) {}
  void start() override;
  void cancel() override;
  void done() override;      // from the store
  void fire() override;      // deadline of a waiter
  void orphaned() override;  // nobody reads the result
  void overdue(Nanos elapsed) override;

  // in (set before submit)
  const LimiterRef limiter;
  Nanos submitted = 0;

  // out (read after delivery)
  Outcome outcome = Outcome::granted;
  store::Verdict why = store::Verdict::granted;
  Status status;
  bool outage = false;  // status is one that the failure policy answers
  Nanos waited = 0;
  Nanos retry_after = 0;
  std::int64_t remaining = 0;
  std::int64_t stamp = 0;
  Nanos full_at = -1;  // when every unit is available again; < 0: not known
  bool charged_rate = false;
  PermitRef permit;  // set when a slot is held

 private:
  friend class LimitService;
  ~AcquireTask() override = default;

  State state_ = State::created;
  bool asking_ = false;                      // a waiter whose question is in the store
  bool given_up_ = false;                    // cancelled or failed while the store still has it
  std::list<AcquireTask*>::iterator place_;  // in the waiters of its group or the sleepers of its run
  std::list<SleeperRun>::iterator run_;      // while sleeping
};

// In four files: limit_service.cc (asking, cancelling, the end), limit_sleepers.cc, limit_slots.cc,
// limit_outages.cc. Calls for several limits are MultiService's, which asks through this one.
class LimitService final : public TimerNode {
 public:
  LimitService(store::Store& store, Timers& timers, std::uint64_t seed);

  void start(AcquireTask* task);                                         // takes over one reference
  void cancel(AcquireTask* task, Outcome outcome = Outcome::cancelled);  // borrowed
  void release(const PermitRef& permit);
  // Gives back what a delivered result granted, at `slot`, and nobody wants.
  void give_back(const store::GroupRef& group, std::int64_t cost, bool charged, RateSlot slot,
                 const PermitRef& permit);
  // A slot of the group may be free: it is offered in order of arrival. `more`: perhaps several are
  // (somebody else's doing), so after a grant twice as many ask.
  void slot_freed(const std::string& group, bool more = false);
  // The store forgot what was consumed: everybody who waits asks again, in order.
  void was_reset(const std::string& group);
  // Everything under way is answered with Code::closed; held slots are given back.
  void shutdown();
  void fire() override;  // outage check

  // For MultiService --------------------------------------------------------------------------
  void serve(MultiService* multi) { multi_ = multi; }
  [[nodiscard]] bool closing() const { return closing_; }
  [[nodiscard]] bool shared() const { return shared_; }
  [[nodiscard]] std::uint64_t next_order() { return ++arrivals_; }
  void watch(Question& question);
  void unwatch(Question& question) { question.list_->erase(question.pending_); }
  void heard() { last_answer_ = timers_.now(); }  // the store answered, whatever
  // Notes what was granted, and the slot held if there is one.
  PermitRef take(const LimiterRef& limiter, const store::GroupRef& group, store::HolderId holder);
  static Status no_answer(Nanos elapsed, bool taken_back);
  static bool is_outage(const Status& status);
  // Somebody waits for a slot of the group whom nobody may overtake.
  [[nodiscard]] bool somebody_waits(const std::string& group) const;
  void stand(const store::GroupRef& group, Stand& place);
  void set_freed(Stand& place, bool freed);
  void move(Stand& place, std::uint64_t order);
  void leave(Stand& place);
  // The store remembers this process as a waiter, or may do so.
  void remembered(const store::GroupRef& group) { state_of(group).remembered = true; }
  void forget_if_nobody(const std::string& group);
  // Somebody got a slot though several may be free: twice as many ask now.
  bool granted_one(const std::string& group);  // false: one was known to be free, no more
  void refused_one(const std::string& group);
  // Whoever was asking has left without an answer.
  void ask_soon(const std::string& group);

  [[nodiscard]] store::Store& store() { return store_; }
  [[nodiscard]] store::LimitStore& limits() { return *store_.limits(); }
  [[nodiscard]] Timers& timers() { return timers_; }
  [[nodiscard]] std::size_t waiting() const { return waiting_; }

 private:
  friend class AcquireTask;
  friend class Permit;

  struct RefundChain {
    std::int64_t from = std::numeric_limits<std::int64_t>::min();
    std::int64_t to = 0;
  };
  // What is remembered of a group while somebody waits or holds.
  struct GroupState final : TimerNode {
    // Rings when the earliest sleeper may go.
    struct Alarm final : TimerNode {
      explicit Alarm(GroupState* owner) : group(owner) {}
      void fire() override { group->service->due(*group); }
      GroupState* group;
    };
    GroupState(LimitService* owner, store::GroupRef ref)
        : service(owner), group(std::move(ref)), alarm(this) {}
    void fire() override { service->poll(*this); }
    LimitService* service;
    store::GroupRef group;
    Alarm alarm;
    Nanos alarm_at = kForever;
    std::list<AcquireTask*> waiters;  // for a slot, first come first
    // Lines of calls for several limits that found this one full, by the arrival of the first in line.
    std::map<std::uint64_t, Stand*> lines;
    std::size_t blocked = 0;     // of those, not told yet that a slot may be free
    bool remembered = false;     // the store knows this process as a waiter
    std::size_t window = 0;      // how many asked at once when several slots may be free
    std::list<SleeperRun> runs;  // for their rate slot's time
    // The last refund: who asks with the first stamp, dealt by the same batch, continues at the second.
    RefundChain refunded;
    std::list<PermitRef> permits;
    std::size_t asking = 0;
    Nanos poll_delay = 0;
  };

  GroupState& state_of(const store::GroupRef& group);
  GroupState* find(const std::string& id);
  void drop_if_idle(GroupState& group);

  void send(AcquireTask* task);
  void replied(AcquireTask* task);
  void granted(AcquireTask* task);
  AcquireTask* overtaken(AcquireTask* task);
  void enqueue(AcquireTask* task);
  void ask(AcquireTask* waiter);
  struct Offer {
    std::string group;
    std::uint64_t after;  // passed on by everybody up to this arrival
    bool more;
  };
  void make_offers();
  void make(const Offer& offer);
  void poll(GroupState& group);
  void plan_poll(GroupState& group);
  void waiters_changed(GroupState& group);
  void leave_waiters(AcquireTask* task);
  void sleep(AcquireTask* task, Nanos until);
  void due(GroupState& group);
  void set_alarm(GroupState& group);
  void leave_sleepers(AcquireTask* task);
  void pass_on(const store::GroupRef& group, std::int64_t cost, RateSlot slot);
  void refund(const store::GroupRef& group, std::int64_t cost, std::int64_t stamp);
  void lost(const std::string& group, store::HolderId holder);
  void outage(AcquireTask* task, Status status);
  void finish(AcquireTask* task, Outcome outcome);
  void return_grant(AcquireTask* task);
  void overdue(AcquireTask* task, Nanos elapsed);
  void let_go(const PermitRef& permit);
  void expire(Permit& permit);
  void arm_outage_check();
  Nanos jittered(Nanos base);

  store::Store& store_;
  Timers& timers_;
  const bool shared_;
  std::unordered_map<std::string, std::unique_ptr<GroupState>> groups_;
  std::list<Question*> in_store_;  // oldest first
  std::list<Question*> overdue_;   // being told so; one that is cancelled meanwhile takes itself out
  std::deque<Offer> offers_;       // being made; a queue, since each may lead to others
  bool offering_ = false;
  MultiService* multi_ = nullptr;
  Nanos last_answer_ = 0;
  std::size_t waiting_ = 0;
  std::uint64_t arrivals_ = 0;
  bool closing_ = false;
  std::minstd_rand random_;
};

}  // namespace ratesync::engine
