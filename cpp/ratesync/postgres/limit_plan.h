// What one trip to the server carries: operations of many callers, sorted into runs and layers, and
// the server's answer dealt back to the callers. Pure: no clock, no I/O.
//
// Requests of one group with the same cost and about the same patience form a run, which the server
// answers with one number. A statement holds at most one run of each group; further runs of a group
// are further layers, statements of the same pipeline. Runs are sorted by group id as bytes: all
// processes lock rows in this order.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "ratesync/base/clock.h"
#include "ratesync/limits/micro_rate.h"
#include "ratesync/limits/params.h"
#include "ratesync/postgres/connection.h"
#include "ratesync/postgres/limit_sql.h"
#include "ratesync/store/limit_store.h"

namespace ratesync::postgres {

// One operation in the queue of a lane.
struct QueuedOp {
  enum class Kind : std::uint8_t {
    acquire,
    acquire_all,
    restate,  // tell the server how many slots this process holds now
    refund,
    settle,
    reset,
    peek,
    unwait,  // nobody of this process stands in line any more
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
  store::AcquireAllOp* all = nullptr;
  bool together = false;  // restate: slots that were acquired together with others
};
using OpList = std::vector<QueuedOp*>;

using limits::MicroRate;

struct Run {
  store::GroupRef group;
  std::int64_t cost = 1;
  Nanos patience = kForever;  // the smallest of its requests
  bool exact = false;
  OpList ops;                 // may be empty: a restatement
  std::int64_t bundled = -1;  // requests, when they are the bundle's
  std::size_t bundle = 0;     // runs of one bundle are granted together or not at all

  [[nodiscard]] std::string_view id() const { return group->id; }
  [[nodiscard]] std::int64_t n() const {
    return bundled >= 0 ? bundled : static_cast<std::int64_t>(ops.size());
  }
};
using Layer = std::vector<Run>;

// Acquisitions of the same limits at the same costs.
struct Bundle {
  OpList ops;
  std::size_t layer = 0;
};

struct Adjustment {
  store::GroupRef group;
  AdjustMode mode = AdjustMode::give_back;
  std::int64_t shift = 0;             // us; windows: units
  std::optional<std::int64_t> stamp;  // refund: of the first
  OpList ops;
};

struct TripPlan {
  std::vector<Layer> layers;
  std::vector<Adjustment> adjustments;  // one per group, sorted
  OpList peeks, window_peeks, unwaits;
  std::vector<Bundle> bundles;  // of several limits at once; their runs are in `layers`
  OpList later;                 // did not fit: next round, in this order
  Nanos now = 0;

  // Groups whose rows are written or decided on, sorted, each once.
  [[nodiscard]] std::vector<std::string_view> groups() const;
  [[nodiscard]] OpList ops() const;
};

inline constexpr std::size_t kMaxLayers = 16;

TripPlan plan_trip(const OpList& pending, Nanos now, std::size_t max_layers);

// The same for acquisitions of several limits (and restatements of their slots). Those that ask for the same
// are one bundle; those that share no limit share a layer; those that share some are in layers one after
// the other. A limit with slots is in one bundle of a trip only: how many we hold must be known.
TripPlan plan_together(const OpList& pending, Nanos now, std::size_t max_layers);

// One row of the answer to a run.
struct RunAnswer {
  std::int64_t granted = 0;
  std::int64_t ahead = 0;  // us, TAT before the decision, relative to the server's now
  std::int64_t stamp = 0;
  // Slots:
  std::int64_t may = 0;   // by rate alone
  std::int64_t free = 0;  // after the decision
  bool lost = false;
  bool wrote = false;
  // Windows:
  std::vector<std::int64_t> waits;  // us, of those granted
  std::int64_t retry = 0;           // us, of the next one
  std::int64_t remaining = 0;
  std::int64_t full_after = 0;  // us
};

bool same_limit(const store::GroupRef& a, const store::GroupRef& b);

// What one limit says to request number `i` of its bundle, of which `answer.granted` are granted.
store::AcquireReply deal_part(const Run& run, const RunAnswer& answer, store::HolderId holder,
                              std::int64_t i);

// Fills the replies of the run's requests. Returns those that have to be asked again, alone: refused
// for the patience of another. `done` gets the others.
void deal_run(const Run& run, const RunAnswer& answer, store::HolderId holder, Nanos planned_at, OpList& done,
              OpList& again);

store::Peek read_peek(const limits::Params& params, std::int64_t ahead, std::int64_t in_use);
// Row: ord, us until one unit, units left, us until all is left, in use.
store::Peek read_window_peek(const limits::Params& params, const Rows& rows, int row);

}  // namespace ratesync::postgres
