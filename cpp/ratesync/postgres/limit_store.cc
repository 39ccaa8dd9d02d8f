#include "ratesync/postgres/limit_store.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "ratesync/base/format.h"
#include "ratesync/postgres/errors.h"
#include "ratesync/postgres/limit_trip.h"

namespace ratesync::postgres {

using store::AcquireOp;
using store::GroupRef;

namespace {

// A connection is given back after so many trips, so that others get their turn.
constexpr unsigned kTripsInARow = 16;
constexpr std::size_t kGroupCharacters = 255;  // VARCHAR(255)

Status check_group(const std::string& id) {
  const std::ptrdiff_t length = utf8_length(id);
  if (length >= 1 && static_cast<std::size_t>(length) <= kGroupCharacters) return Status::success();
  return Status::make(
      Code::invalid,
      formatted("group_id: expected 1 to {} characters of UTF-8 without NUL, got {}", kGroupCharacters,
                length < 0 ? std::string("other bytes") : formatted("{} characters", length)));
}

// The statements divide by it.
Status check_cost(const store::Group& group, std::int64_t cost) {
  const limits::Params& params = group.params;
  if (!params.is_window() || (cost >= 1 && cost <= params.limit && params.window >= kMicro))
    return Status::success();
  return Status::make(Code::invalid, formatted("cost: expected a whole number from 1 to the limit of {} per "
                                               "window, got {}",
                                               params.limit, cost));
}

store::Listing read_listing(const PipelineResult& result, std::size_t limit) {
  store::Listing out;
  const Rows& groups = *result.results[0];
  for (int r = 0; r < groups.rows(); ++r) {
    if (out.groups.size() == limit) {
      out.truncated = true;
      break;
    }
    out.groups.push_back({std::string(groups.text(r, 0)),
                          std::min(groups.integer(r, 1), kForever / kMicro) * kMicro, groups.integer(r, 2),
                          groups.integer(r, 3)});
  }
  if (result.results.size() < 2) return out;
  const Rows& holders = *result.results[1];
  for (int r = 0; r < holders.rows(); ++r) {
    if (out.holders.size() == limit) {
      out.truncated = true;
      break;
    }
    out.holders.push_back({std::string(holders.text(r, 0)), std::string(holders.text(r, 1)),
                           holders.integer(r, 2), std::min(holders.integer(r, 3), kForever / kMicro) * kMicro,
                           std::min(holders.integer(r, 4), kForever / kMicro) * kMicro});
  }
  return out;
}

}  // namespace

PgLimitStore::PgLimitStore(asio::io_context& io, const Clock& clock, LimitBackend& backend,
                           LimitStoreOptions options)
    : Lanes(io, clock, backend.pool(),
            {.queue = {options.max_batch, options.max_queue, 1}, .trips_in_a_row = kTripsInARow}),
      backend_(backend),
      options_(std::move(options)),
      lanes_per_kind_(std::max<std::size_t>(options_.lanes, 1)),
      holders_((static_cast<std::uint64_t>(std::random_device{}()) << 32) ^ std::random_device{}()),
      holders_together_((static_cast<std::uint64_t>(std::random_device{}()) << 32) ^ std::random_device{}()),
      me_(static_cast<std::int64_t>(
          ((static_cast<std::uint64_t>(std::random_device{}()) << 31) ^ std::random_device{}()) >> 1)),
      timer_(std::make_unique<asio::steady_timer>(io)),
      listener_(
          io, clock, options_.listen, options_.connection, options_.channel + std::to_string(me_),
          {[this](const std::string& group) {
             if (freed_) freed_(group);
           },
           [this] { ask_everybody(); },
           [this](const std::string& channel, const std::string& payload) { probe(channel, payload); }}) {
  for (const Kind kind : {Kind::rates, Kind::slots, Kind::windows})
    for (std::size_t i = 0; i < lanes_per_kind_; ++i) add_lane(static_cast<unsigned>(kind));
  for (const Kind kind : {Kind::together, Kind::together_slots}) add_lane(static_cast<unsigned>(kind));
}

PgLimitStore::~PgLimitStore() { *alive_ = false; }

// --- queueing -----------------------------------------------------------------------------------

std::size_t PgLimitStore::place_of(const QueuedOp& op) const {
  if (op.together) return lanes_.size() - 1;
  if (op.all) {
    const auto& parts = op.all->parts;
    const bool slots = std::any_of(parts.begin(), parts.end(), [](const store::Part& part) {
      return part.group->params.has_concurrency();
    });
    return lanes_.size() - (slots ? 1 : 2);
  }
  const limits::Params& params = op.group->params;
  const Kind kind = params.has_concurrency() ? Kind::slots : params.is_window() ? Kind::windows : Kind::rates;
  return static_cast<std::size_t>(kind) * lanes_per_kind_ +
         std::hash<std::string>{}(op.group->id) % lanes_per_kind_;
}

void PgLimitStore::each_key(const QueuedOp& op, const std::function<void(std::size_t)>& visit) const {
  const std::hash<std::string> hash;
  if (!op.all) return visit(hash(op.group->id));
  for (const store::Part& part : op.all->parts) visit(hash(part.group->id));
}

Holders& PgLimitStore::holders_of(const Holding& holding) {
  return holders_.find(holding.group->id) == &holding ? holders_ : holders_together_;
}

void PgLimitStore::fail(QueuedOp& op, const Status& status) {
  switch (op.kind) {
    case QueuedOp::Kind::acquire:
      op.acquire->reply = {};
      op.acquire->reply.status = status;
      op.acquire->done();
      return;
    case QueuedOp::Kind::acquire_all:
      op.all->status = status;
      op.all->granted = false;
      op.all->done();
      return;
    case QueuedOp::Kind::restate:
      if (Holding* holding = (op.together ? holders_together_ : holders_).find(op.group->id)) {
        holding->queued = false;
        holders_.failed(*holding, false, clock_.now());
        arm(clock_.now() + kRestatePause);
      }
      return;
    case QueuedOp::Kind::unwait: return;  // it ends by itself
    case QueuedOp::Kind::peek: return op.side->peeked(status);
    case QueuedOp::Kind::refund:
    case QueuedOp::Kind::settle:
    case QueuedOp::Kind::reset:
      if (op.side->done) op.side->done(status);
      return;
  }
}

void PgLimitStore::push(QueuedOp op) {
  if (op.group)
    if (Status bad = check_group(op.group->id); !bad.ok()) return fail(op, bad);
  const Status entered = enter(place_of(op), op);
  if (!entered.ok()) fail(op, entered);  // refused: op is still ours
}

void PgLimitStore::fail_all(const OpList& ops, const Status& status) {
  for (QueuedOp* op : ops) fail(*op, status);
}

void PgLimitStore::lend(PgPool::OnLease use) {
  backend_.when_ready([this, use = std::move(use), alive = alive_](Status status) {
    if (!*alive || !status.ok()) return use(status.ok() ? closed_status() : std::move(status));
    pool_.get(use);
  });
}

void PgLimitStore::acquire(AcquireOp* op) {
  QueuedOp queued{QueuedOp::Kind::acquire, false, op->group, op, nullptr};
  if (Status bad = check_cost(*op->group, op->cost); !bad.ok()) return fail(queued, bad);
  push(std::move(queued));
}

void PgLimitStore::acquire_all(store::AcquireAllOp* op) {
  QueuedOp queued;
  queued.kind = QueuedOp::Kind::acquire_all;
  queued.all = op;
  for (const store::Part& part : op->parts) {
    Status bad = check_group(part.group->id);
    if (bad.ok()) bad = check_cost(*part.group, part.cost);
    if (!bad.ok()) return fail(queued, bad);
  }
  push(std::move(queued));
}

bool PgLimitStore::abandon(AcquireOp* op) { return take_back(op).has_value(); }
bool PgLimitStore::abandon(store::AcquireAllOp* op) { return take_back(op).has_value(); }

std::int64_t PgLimitStore::refund(const GroupRef& group, std::int64_t cost, std::int64_t stamp) {
  if (!group->params.has_rate()) return stamp;
  auto side = std::make_unique<QueuedOp::Side>();
  side->units = -cost;
  side->stamp = stamp;
  push(QueuedOp{QueuedOp::Kind::refund, false, group, nullptr, std::move(side)});
  return stamp - (group->params.is_window() ? cost : MicroRate(group->params).span(cost));
}

void PgLimitStore::settle(const GroupRef& group, std::int64_t delta, store::Callback<store::Unit> done) {
  if (!group->params.has_rate() || delta == 0) return done(store::Unit{});
  auto side = std::make_unique<QueuedOp::Side>();
  side->units = delta;
  side->done = std::move(done);
  push(QueuedOp{QueuedOp::Kind::settle, false, group, nullptr, std::move(side)});
}

void PgLimitStore::peek(const GroupRef& group, store::Callback<store::Peek> done) {
  auto side = std::make_unique<QueuedOp::Side>();
  side->peeked = std::move(done);
  push(QueuedOp{QueuedOp::Kind::peek, false, group, nullptr, std::move(side)});
}

void PgLimitStore::reset(const GroupRef& group, store::Callback<store::Unit> done) {
  auto side = std::make_unique<QueuedOp::Side>();
  side->done = std::move(done);
  push(QueuedOp{QueuedOp::Kind::reset, false, group, nullptr, std::move(side)});
}

// --- listing ------------------------------------------------------------------------------------

void PgLimitStore::list(std::size_t limit, store::Callback<store::Listing> done) {
  limit = std::clamp<std::size_t>(limit, 1, 100'000);
  errand(
      1,
      [this, limit] {
        const LimitSql& sql = backend_.limit_sql();
        std::vector<Call> calls;
        for (const Statement* statement : {&sql.list_groups, &sql.list_holders})
          if (!statement->sql.empty()) calls.push_back({statement, {Param::text(std::to_string(limit + 1))}});
        return calls;
      },
      [limit, done = std::move(done)](const PipelineResult& result) {
        if (!result.status.ok()) return done(result.status);
        done(read_listing(result, limit));
      });
}

void PgLimitStore::on_lost(std::function<void(const std::string&, store::HolderId)> listener) {
  lost_ = std::move(listener);
}

}  // namespace ratesync::postgres
