// What one script call carries: operations of many callers on many limits, and the server's answer dealt
// back to them. Pure: no clock, no I/O.
//
// Requests of one limit with the same cost and about the same patience form a run, which the server
// answers with one number. A limit is in one call at a time (LimitStore's lines), since the slots that it
// states are absolute.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ratesync/base/clock.h"
#include "ratesync/redis/commander.h"
#include "ratesync/redis/keys.h"
#include "ratesync/store/holders.h"
#include "ratesync/store/limit_store.h"

namespace ratesync::redis {

using store::Holding;

// One operation in the line of its limit.
struct QueuedOp {
  enum class Kind : std::uint8_t {
    none,  // was taken back
    acquire,
    restate,  // tell the server how many slots this process holds now
    refund,
    settle,
    reset,
    peek,
    leave,  // nobody here waits for a slot any more
  };
  // What only the rare kinds need.
  struct Side {
    std::int64_t units = 0;  // settle: delta; refund: cost
    std::int64_t stamp = 0;  // refund
    store::Callback<store::Unit> done;
    store::Callback<store::Peek> peeked;
  };

  Kind kind = Kind::acquire;
  bool exact = false;  // acquire: was refused for the patience of its run; decide alone
  store::GroupRef group;
  store::AcquireOp* acquire = nullptr;
  std::unique_ptr<Side> side;
};
using OpList = std::vector<QueuedOp>;

// A limit as the call declares it.
struct CallGroup {
  store::GroupRef group;
  Holding* holding = nullptr;  // where it has slots; set when the call is sent
  bool rate = false;           // its consumption is looked at
};

struct Run {
  std::size_t group = 0;
  std::int64_t cost = 1;
  Nanos patience = kForever;  // the smallest of its requests
  bool exact = false;
  bool queued = false;  // somebody stands in line
  OpList ops;
};

struct Adjustment {
  std::size_t group = 0;
  bool refund = false;     // else settle
  std::int64_t units = 0;  // token bucket: us
  std::int64_t stamp = 0;
  OpList ops;
};

struct AllParts {
  store::AcquireAllOp* op = nullptr;
  std::vector<std::size_t> groups;
};

// One call under construction, and while it is under way.
struct LimitCall {
  std::vector<CallGroup> groups;  // ids are distinct
  std::vector<Adjustment> adjustments;
  std::vector<std::pair<std::size_t, QueuedOp>> leaves;
  std::vector<AllParts> alls;
  std::vector<Run> runs;  // those of a limit follow each other
  std::vector<std::pair<std::size_t, QueuedOp>> peeks;
  OpList restatements;  // said by the declaration
  OpList resets;        // of limits that are not in `groups`
  Nanos now = 0;        // when it was planned

  [[nodiscard]] std::size_t steps() const {
    return adjustments.size() + leaves.size() + alls.size() + runs.size() + peeks.size() + resets.size();
  }
  // Token buckets without slots, and nothing but requests.
  [[nodiscard]] bool quick() const;
  // Every operation but those of `alls`.
  [[nodiscard]] OpList take_ops();
};

inline constexpr std::size_t kMaxRuns = 16;         // of one limit in a call
inline constexpr std::size_t kMaxRequests = 4'096;  // of one limit in a call

// Moves into `call`, which has no group of that id, what it can carry of the pending operations of one
// limit; the others stay. `group`: its place, if the call declares the limit already, else kNew.
inline constexpr std::size_t kNew = ~std::size_t{0};
void plan_limit(LimitCall& call, std::size_t group, OpList& pending, Nanos now);
// The place of a limit that was just declared.
std::size_t declare(LimitCall& call, const store::GroupRef& group);

// Whether both mean the same to the server.
bool same_limit(const store::GroupRef& a, const store::GroupRef& b);

struct Speaker {
  std::string who;      // for people
  std::string process;  // names our channel
  bool hears = false;   // ours is subscribed
  bool counted = true;  // PUBLISH tells whether anybody hears: not on a Cluster
};

// Everything after the SHA1. Reads what the holdings are to state.
Command call_arguments(const LimitCall& call, const Keys& keys, const Speaker& speaker);
// A key of the call, which says where it goes.
std::string key_of(const LimitCall& call, const Keys& keys);

struct Standing {
  std::int64_t ahead = 0;       // us, token bucket: of TAT
  std::int64_t remaining = 0;   // windows
  std::int64_t full_after = 0;  // windows, us
  std::int64_t stamp = 0;
  std::int64_t free = 0;  // slots
};
struct RunAnswer {
  std::int64_t granted = 0;
  bool full = false;       // why not more: no slot
  std::int64_t wait = 0;   // us, windows: of the next request
  std::int64_t ahead = 0;  // us, token bucket: of TAT before
  Standing after;
  std::vector<std::pair<std::int64_t, std::int64_t>> waits;  // windows: how many, us
};
struct AllAnswer {
  struct Part {
    store::Verdict verdict = store::Verdict::granted;
    std::int64_t wait = 0;
    Standing after;
  };
  bool granted = false;
  std::vector<Part> parts;
};
struct PeekAnswer {
  Standing now;
  std::int64_t in_use = 0;
  std::int64_t wait = 0;
};
struct CallAnswer {
  struct Slots {
    bool lost = false;
    bool wrote = false;
  };
  std::vector<Slots> groups;
  std::vector<AllAnswer> alls;
  std::vector<RunAnswer> runs;
  std::vector<PeekAnswer> peeks;
};
// Code::protocol when the reply is not what the scripts answer.
Result<CallAnswer> read_answer(const LimitCall& call, const Reply& reply);

// Fills the replies of the run's requests and moves them to `done`; `again` gets those that have to be asked
// once more, alone: refused for the patience of another.
void deal_run(Run& run, const store::Group& group, const RunAnswer& answer, store::HolderId holder,
              Nanos planned_at, OpList& done, OpList& again);
store::AcquireReply deal_part(const store::Part& part, const AllAnswer& all, const AllAnswer::Part& answer,
                              store::HolderId holder);
store::Peek deal_peek(const limits::Params& params, const PeekAnswer& answer);

}  // namespace ratesync::redis
