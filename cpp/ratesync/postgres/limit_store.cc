#include "ratesync/postgres/limit_store.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "ratesync/postgres/errors.h"
#include "ratesync/postgres/limit_trip.h"

namespace ratesync::postgres {

using store::AcquireOp;
using store::GroupRef;

namespace {

constexpr std::size_t kGroupCharacters = 255;  // VARCHAR(255)

Status check_group(const std::string& id) {
  const std::ptrdiff_t length = utf8_length(id);
  if (length >= 1 && static_cast<std::size_t>(length) <= kGroupCharacters) return Status::success();
  return Status::make(
      Code::invalid,
      fmt::format("group_id: expected 1 to {} characters of UTF-8 without NUL, got {}", kGroupCharacters,
                  length < 0 ? std::string("other bytes") : fmt::format("{} characters", length)));
}

// The statements divide by it.
Status check_cost(const store::Group& group, std::int64_t cost) {
  const limits::Params& params = group.params;
  if (!params.is_window() || (cost >= 1 && cost <= params.limit && params.window >= kMicro))
    return Status::success();
  return Status::make(Code::invalid,
                      fmt::format("cost: expected a whole number from 1 to the limit of {} per "
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
    : io_(io),
      clock_(clock),
      backend_(backend),
      options_(std::move(options)),
      holders_((static_cast<std::uint64_t>(std::random_device{}()) << 32) ^ std::random_device{}()),
      holders_together_((static_cast<std::uint64_t>(std::random_device{}()) << 32) ^ std::random_device{}()),
      me_(static_cast<std::int64_t>(
          ((static_cast<std::uint64_t>(std::random_device{}()) << 31) ^ std::random_device{}()) >> 1)),
      timer_(std::make_unique<asio::steady_timer>(io)),
      random_(std::random_device{}()),
      listener_(
          io, clock, options_.listen, options_.connection, options_.channel + std::to_string(me_),
          {[this](const std::string& group) {
             if (freed_) freed_(group);
           },
           [this] { ask_everybody(); },
           [this](const std::string& channel, const std::string& payload) { probe(channel, payload); }}) {
  const std::size_t count = std::max<std::size_t>(options_.lanes, 1);
  for (const Kind kind : {Kind::rates, Kind::slots, Kind::windows})
    for (std::size_t i = 0; i < count; ++i)
      lanes_.push_back(
          std::make_unique<Lane>(batch::BatcherOptions{options_.max_batch, options_.max_queue, 1}, kind));
  for (const Kind kind : {Kind::together, Kind::together_slots})
    lanes_.push_back(
        std::make_unique<Lane>(batch::BatcherOptions{options_.max_batch, options_.max_queue, 1}, kind));
}

PgLimitStore::~PgLimitStore() { *alive_ = false; }

// --- queueing -----------------------------------------------------------------------------------

PgLimitStore::Lane& PgLimitStore::lane_of(const GroupRef& group) {
  const std::size_t count = (lanes_.size() - 2) / 3;
  const std::size_t hash = std::hash<std::string>{}(group->id);
  const Kind kind = group->params.has_concurrency() ? Kind::slots
                    : group->params.is_window()     ? Kind::windows
                                                    : Kind::rates;
  return *lanes_[static_cast<std::size_t>(kind) * count + hash % count];
}

PgLimitStore::Lane& PgLimitStore::lane_of(const QueuedOp& op) {
  if (op.together) return *lanes_.back();
  if (!op.all) return lane_of(op.group);
  const auto& parts = op.all->parts;
  const bool slots = std::any_of(parts.begin(), parts.end(), [](const store::Part& part) {
    return part.group->params.has_concurrency();
  });
  return **(lanes_.end() - (slots ? 1 : 2));
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
  if (!retired_.empty() && held_back(op)) return;
  Lane& lane = lane_of(op);
  const void* const acquire = op.all ? static_cast<const void*>(op.all) : op.acquire;
  const Result<batch::Ticket> ticket = lane.batcher.push(std::move(op), 0);
  if (!ticket.ok()) return fail(op, ticket.status());  // refused: op is still ours
  if (acquire) tickets_[acquire] = ticket.value();
  if (lane.busy) return watch_later();
  pump(lane);
}

void PgLimitStore::acquire(AcquireOp* op) {
  QueuedOp queued{QueuedOp::Kind::acquire, false, op->group, op, nullptr};
  if (Status bad = check_cost(*op->group, op->cost); !bad.ok()) return fail(queued, bad);
  push(std::move(queued));
}

bool PgLimitStore::abandon(AcquireOp* op) {
  const auto found = tickets_.find(op);
  if (found == tickets_.end()) return take_back(op);
  const bool ours = lane_of(op->group).batcher.cancel(found->second).has_value();
  tickets_.erase(found);
  return ours;
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

bool PgLimitStore::abandon(store::AcquireAllOp* op) {
  const auto found = tickets_.find(op);
  if (found == tickets_.end()) return take_back(op);
  QueuedOp queued;
  queued.all = op;
  const bool ours = lane_of(queued).batcher.cancel(found->second).has_value();
  tickets_.erase(found);
  return ours;
}

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

void PgLimitStore::pump(Lane& lane) {
  if (lane.busy || lane.batcher.queued() == 0) return;
  lane.busy = true;
  ++trips_;
  backend_.when_ready([this, &lane, alive = alive_](Status status) {
    if (!*alive) return;
    if (!status.ok()) return take_off(lane, std::move(status));
    backend_.pool().get([this, &lane, alive](Result<PgPool::Lease> connection) {
      if (*alive) take_off(lane, std::move(connection));
    });
  });
}

void PgLimitStore::fail_queued(Lane& lane, const Status& status) {
  // Only what is queued now: a caller that asks again from inside done() starts a new attempt.
  std::size_t left = lane.batcher.queued();
  while (left > 0) {
    auto batch = lane.batcher.take();
    if (!batch) break;
    left -= std::min(left, batch->ops.size());
    for (QueuedOp& op : batch->ops) tickets_.erase(op.all ? static_cast<const void*>(op.all) : op.acquire);
    lane.batcher.finished(batch->id);
    for (QueuedOp& op : batch->ops) fail(op, status);
  }
}

void PgLimitStore::take_off(Lane& lane, Result<PgPool::Lease> connection) {
  if (!connection.ok()) {
    fail_queued(lane, connection.status());
    lane.busy = false;
    --trips_;
    pump(lane);
    return maybe_closed();
  }
  auto batch = lane.batcher.take();
  if (!batch) {  // all of it was abandoned meanwhile
    backend_.pool().put(std::move(connection.value()));
    lane.busy = false;
    --trips_;
    return maybe_closed();
  }
  begin_trip(lane, std::move(*batch), std::move(connection.value()), 1);
}

void PgLimitStore::count(const std::vector<Call>& calls, std::size_t ops) {
  ++stats_.round_trips;
  stats_.statements += calls.size();
  stats_.batched_ops += ops;
}

void PgLimitStore::fill(store::Stats& stats) const {
  stats.round_trips += stats_.round_trips;
  stats.statements += stats_.statements;
  stats.batched_ops += stats_.batched_ops;
  stats.conflicts += stats_.conflicts;
  stats.leases_lost += stats_.leases_lost;
}

// --- listing ------------------------------------------------------------------------------------

void PgLimitStore::list(std::size_t limit, store::Callback<store::Listing> done) {
  limit = std::clamp<std::size_t>(limit, 1, 100'000);
  backend_.when_ready([this, limit, done = std::move(done), alive = alive_](Status status) mutable {
    if (!*alive || !status.ok()) return done(std::move(status));
    backend_.pool().get([this, limit, done = std::move(done), alive](Result<PgPool::Lease> got) mutable {
      if (!*alive || !got.ok()) return done(got.status());
      const LimitSql& sql = backend_.limit_sql();
      std::vector<Call> calls;
      for (const Statement* statement : {&sql.list_groups, &sql.list_holders})
        if (!statement->sql.empty()) calls.push_back({statement, {Param::text(std::to_string(limit + 1))}});
      count(calls, 1);
      PgPool::Lease connection = got.value();
      connection->run(std::move(calls),
                      [this, limit, done = std::move(done), alive, connection](PipelineResult result) {
                        if (!*alive) return done(Status::make(Code::closed, "the store was closed"));
                        backend_.pool().put(connection);
                        if (!result.status.ok()) return done(backend_.explain(result));
                        done(read_listing(result, limit));
                      });
    });
  });
}

void PgLimitStore::on_lost(std::function<void(const std::string&, store::HolderId)> listener) {
  lost_ = std::move(listener);
}

}  // namespace ratesync::postgres
