// Acquisitions of several limits, all or nothing.
//
// One question per store, one store after the other: those of this process first, then in the order
// given. What a store granted is held while the next one is asked, and given back when that one refuses
// or the caller leaves. Nothing is reserved while waiting: the call asks again when the time has come
// that the stores named, or when a slot of one of its limits came free.
//
//   start ─► asking (store by store) ─► all granted ────────────────────► finished
//     │          ├─► refused, beyond the deadline ─► given back ─────────► finished, nothing charged
//     │          ├─► refused ─► given back ─► waiting (in line) ─► asking again
//     │          └─► no answer ─► failure policies ─► next store, or given back ─► finished
//     └─► waiting, behind those of the same limits
//
// Calls for the same limits stand in one line, first come first served, and only the first of it asks.
// After a full success the number that asks at once doubles; a refusal sends everybody back to sleep. In
// a group that was full the line has one place among those who wait for its slots (Stand); lines that wait
// for the time of the same limit, ("global", "tenant:1"), ("global", "tenant:2") ..., take turns (TimeQueue).
// All methods run on the I/O thread unless said otherwise.
#pragma once

#include <atomic>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "ratesync/engine/limit_service.h"

namespace ratesync::engine {

// One limit of a call.
struct MultiPart {
  LimiterRef limiter;
  store::GroupRef group;
  std::int64_t cost = 1;
  // out, when granted
  bool granted = false;
  bool charged = false;
  std::int64_t stamp = 0;
  std::int64_t remaining = 0;
  Nanos full_after = -1;  // as in AcquireReply
  Nanos at = 0;           // when
  PermitRef permit;       // when a slot is held
};

struct MultiLine;
struct TimeQueue;

class MultiTask final : public Acquisition, public TimerNode {
 public:
  enum class State { created, asking, waiting, finished };

  // At least one limit; no two of the same store and group.
  MultiTask(MultiService& service, std::vector<MultiPart> limits);
  void start() override;
  void cancel() override;
  void fire() override;      // deadline of a waiter
  void orphaned() override;  // nobody reads the result

  // in (set before submit)
  Nanos submitted = 0;
  Nanos deadline = kForever;  // now = try once

  // in and out
  std::vector<MultiPart> limits;  // in the order given

  // out (read after delivery)
  Outcome outcome = Outcome::granted;
  std::size_t blocking = 0;  // index of the limit that refused or failed
  store::Verdict why = store::Verdict::granted;
  Status status;
  bool outage = false;
  Nanos waited = 0;
  Nanos retry_after = 0;

 private:
  friend class MultiService;
  // The limits of one store, and the question to it.
  struct Stage final : store::AcquireAllOp, Question {
    void done() override;
    void overdue(Nanos elapsed) override;
    MultiService* owner = nullptr;
    MultiTask* task = nullptr;  // null: the call has its answer, or went on without this store
    LimitService* service = nullptr;
    std::vector<std::size_t> limits;  // indices, sorted by group id
    std::uint64_t order = 0;          // of arrival, among all that ask this store
    bool passed_open = false;         // the store is out, and the policies let the call pass
  };
  ~MultiTask() override = default;

  MultiService& service_;
  std::vector<std::unique_ptr<Stage>> stages_;
  std::size_t stage_ = 0;
  State state_ = State::created;
  bool more_ = false;  // asked because perhaps several slots are free
  std::string turn_;   // key of the time queue whose turn it took
  std::uint64_t order_ = 0;
  std::shared_ptr<MultiLine> line_;
  std::list<MultiTask*>::iterator place_;                   // in line_'s `asking` or `waiting`
  std::multimap<Nanos, MultiTask*>::iterator deadline_at_;  // in line_'s `deadlines`, while waiting
};

// The place of a line among those who wait for slots of a group that was full.
struct Stand {
  MultiLine* line = nullptr;
  LimitService* service = nullptr;
  store::GroupRef group;
  std::uint64_t order = 0;  // arrival of the first in line
  bool freed = false;       // a slot may be free since the last question
};

// Lines that wait for the time of one limit, in order of arrival. When it has come the first one asks;
// a grant lets two more ask, and a refusal lets all sleep until the time that it named.
struct TimeQueue final : TimerNode {
  void fire() override;

  MultiService* owner = nullptr;
  std::string key;
  std::map<std::uint64_t, MultiLine*> lines;
  Nanos at = 0;
  std::size_t turns = 0;  // how many may ask now
  bool running = false;
};

struct MultiLine final : TimerNode {
  void fire() override;  // quiet_until

  MultiService* owner = nullptr;
  std::string key;
  std::list<MultiTask*> asking;
  std::list<MultiTask*> waiting;               // in order of arrival
  std::multimap<Nanos, MultiTask*> deadlines;  // of those who wait and have one
  std::vector<std::unique_ptr<Stand>> stands;
  std::size_t window = 1;  // how many may ask at once
  std::uint64_t refusals = 0;
  Nanos not_before = 0;         // the first in line need not ask earlier
  TimeQueue* queue = nullptr;   // while it waits for that
  std::uint64_t queued_as = 0;  // arrival of the first in line, in `queue`
  Nanos quiet_until = 0;        // nor anybody, so that thousands who are cancelled do not all ask first
  // Why the first in line was refused the last time.
  store::Verdict why = store::Verdict::granted;
  const LimitService* blocking_service = nullptr;
  std::string blocking_group;
  bool pumping = false;
  bool gone = false;
};

class MultiService {
 public:
  explicit MultiService(Timers& timers) : timers_(timers) {}

  void start(MultiTask* task);                                         // takes over one reference
  void cancel(MultiTask* task, Outcome outcome = Outcome::cancelled);  // borrowed
  // Any thread: how many stand in line. While somebody does, nobody decides past this service.
  [[nodiscard]] std::size_t waiting() const { return waiting_.load(std::memory_order_relaxed); }

  // From LimitService -----------------------------------------------------------------------------
  // A slot may be free at this stand. False: the line cannot use it now.
  bool offered(Stand& stand, bool more);
  void was_reset(LimitService& service, const std::string& group);
  // Everything that needs this store is answered with Code::closed.
  void closing(LimitService& service);

 private:
  friend class MultiTask;
  friend struct MultiLine;
  friend struct TimeQueue;
  using Line = std::shared_ptr<MultiLine>;
  struct Refusal {
    store::Verdict why = store::Verdict::granted;
    std::size_t blocking = 0;
    Nanos retry_after = 0;
    std::vector<std::size_t> full;  // limits all of whose slots are held
  };

  using Stage = MultiTask::Stage;

  void prepare(MultiTask* task);
  void ask(MultiTask* task);
  void ask_next_store(MultiTask* task);
  void answered(Stage& stage);
  void take(Stage& stage);
  Refusal refusal_of(const Stage& stage) const;
  bool take_back(Stage& stage);
  void answered_too_late(Stage& stage);
  void overdue(Stage& stage, Nanos elapsed);
  void failed(MultiTask* task, Status status);
  void granted(MultiTask* task);
  void refused(MultiTask* task, const Refusal& refusal);
  MultiTask* overtaken(MultiTask* task);
  void return_grants(MultiTask* task);
  void finish(MultiTask* task, Outcome outcome);
  void count(MultiTask* task);

  void enter(MultiTask* task);
  void leave(MultiTask* task);
  static std::string name_of(const MultiPart& part);
  static std::string key_of(const MultiTask& task);
  static bool same_costs(const MultiTask& a, const MultiTask& b);
  void join_queue(MultiLine& line, const std::string& key);
  void leave_queue(MultiLine& line);
  void let_sleep(const std::string& key, Nanos until);
  void give_turns(const std::string& key, std::size_t turns);
  void take_turns(TimeQueue& queue);
  void drop_if_idle(TimeQueue& queue);
  bool ready(const MultiLine& line, const Stand* but = nullptr) const;
  void note(MultiLine& line, const MultiTask* first, const Refusal& refusal);
  void blame(MultiTask* task, const MultiLine& line);
  bool stand_where_full(MultiLine& line, MultiTask* first, const std::vector<std::size_t>& full);
  void keep_order(MultiLine& line);
  void ask_anew(MultiLine& line);
  void refuse_early(const Line& line);
  void pump(const Line& line);
  void leave_stands(MultiLine& line, bool offer);
  void offer_left();
  void drop_if_empty(const Line& line, bool offer);
  void expire(MultiTask* task);

  Timers& timers_;
  std::unordered_map<std::string, Line> lines_;
  std::unordered_map<std::string, std::unique_ptr<TimeQueue>> queues_;
  // Questions that a store still has and nobody waits for.
  std::unordered_map<Stage*, std::unique_ptr<Stage>> unwanted_;
  std::vector<std::pair<LimitService*, std::string>> left_;  // stands given up, to be offered to others
  std::atomic<std::size_t> waiting_{0};
  std::uint64_t arrivals_ = 0;
};

}  // namespace ratesync::engine
