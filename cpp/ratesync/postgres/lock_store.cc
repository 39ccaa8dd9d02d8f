#include "ratesync/postgres/lock_store.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "ratesync/postgres/lock_trip.h"
#include "ratesync/postgres/sql_text.h"

namespace ratesync::postgres {

using store::LockOp;

namespace {

constexpr std::size_t kMaxBatch = 1'000;
constexpr std::size_t kMaxQueue = 100'000;  // per lane
constexpr Nanos kWatchStep = 20 * kMilli;   // overdue operations fail at most so much late
// Released locks and expired ones stay for so long: while they lie there, a renewal still finds that nobody
// took them, and no statement can be at work that is older than them (see kTake).
constexpr Nanos kDeadFor = 300 * kSecond;
constexpr std::int64_t kPurgeAtOnce = 5'000;
constexpr Nanos kPurgePause = 60 * kSecond;
// A connection is given back after so many trips, so that others get their turn.
constexpr unsigned kTripsInARow = 16;

constexpr std::size_t kSpaceBytes = 255;
constexpr std::size_t kNameBytes = 1'024;

Status check_text(std::string_view what, std::string_view text, std::size_t most) {
  if (!text.empty() && text.size() <= most && utf8_length(text) > 0) return Status::success();
  return Status::make(
      Code::invalid,
      fmt::format("{}: expected 1 to {} bytes of UTF-8 without NUL, got {} bytes", what, most, text.size()));
}

Status check(const LockOp& op) {
  if (Status bad = check_text("namespace", op.space->name_space, kSpaceBytes); !bad.ok()) return bad;
  if (Status bad = check_text("tenant", op.space->tenant, kSpaceBytes); !bad.ok()) return bad;
  if (Status bad = check_text("name", op.name, kNameBytes); !bad.ok()) return bad;
  const bool lease = op.verb == LockOp::Verb::acquire || op.verb == LockOp::Verb::renew;
  if (lease && op.ttl < 1)
    return Status::make(Code::invalid, fmt::format("ttl: expected 1 ms or more, got {}", op.ttl));
  if (op.verb == LockOp::Verb::acquire && op.id <= 0)
    return Status::make(Code::invalid, fmt::format("id: expected a number above 0, got {}", op.id));
  return Status::success();
}

std::vector<store::LockInfo> read_list(const Rows& rows) {
  std::vector<store::LockInfo> out;
  for (int r = 0; r < rows.rows(); ++r)
    out.push_back({std::string(rows.text(r, 0)), std::string(rows.text(r, 1)), std::string(rows.text(r, 2)),
                   rows.integer(r, 3), std::string(rows.text(r, 4)), rows.integer(r, 5), rows.integer(r, 6),
                   rows.integer(r, 7)});
  return out;
}

}  // namespace

PgLockStore::PgLockStore(PrefixBackend& backend)
    : backend_(backend),
      clock_(backend.clock()),
      random_((static_cast<std::uint64_t>(std::random_device{}()) << 32) ^ std::random_device{}()),
      me_(static_cast<std::int64_t>(random_() >> 2) + 1),
      // The names of schema and table may be long: a hash of them, and who is meant.
      channel_(named("locks", backend.names().quoted(backend.names().locks)).name + '_'),
      timer_(std::make_unique<asio::steady_timer>(backend.io())),
      refresh_timer_(std::make_unique<asio::steady_timer>(backend.io())),
      close_timer_(std::make_unique<asio::steady_timer>(backend.io())),
      listener_(backend.io(), clock_, backend.options().listen, backend.options().connection,
                channel_ + std::to_string(me_),
                {[this](const std::string& payload) { heard(payload); }, [this] { ask_everybody(); },
                 [this](const std::string& channel, const std::string& payload) {
                   notify(backend_.pool(), alive_, channel, payload);
                 }}) {
  const std::size_t count = std::max<std::size_t>(backend.options().lanes, 1);
  for (std::size_t i = 0; i < count; ++i)
    lanes_.push_back(std::make_unique<Lane>(batch::BatcherOptions{kMaxBatch, kMaxQueue, 1}, backend.io()));
}

PgLockStore::~PgLockStore() { *alive_ = false; }

void PgLockStore::initialize(store::Callback<store::Unit> done) {
  backend_.when_ready(Facet::locks, [done = std::move(done)](Status status) {
    status.ok() ? done(store::Unit{}) : done(std::move(status));
  });
}

const LockSql& PgLockStore::sql() {
  if (all_sql_.empty() || sql_waiters_ != backend_.lock_waiters()) {
    const PrefixNames& names = backend_.names();
    sql_waiters_ = backend_.lock_waiters();
    all_sql_.push_back(std::make_unique<LockSql>(make_lock_sql(
        {names.quoted(names.locks), sql_waiters_ ? names.quoted(names.lock_waiters) : std::string(),
         names.quoted(names.lock_tokens)})));
  }
  return *all_sql_.back();
}

void PgLockStore::count(const std::vector<Call>& calls, std::size_t ops) {
  ++stats_.round_trips;
  stats_.statements += calls.size();
  stats_.batched_ops += ops;
}

void PgLockStore::fill(store::Stats& stats) const {
  stats.round_trips += stats_.round_trips;
  stats.statements += stats_.statements;
  stats.batched_ops += stats_.batched_ops;
  stats.conflicts += stats_.conflicts;
}

// --- queueing -----------------------------------------------------------------------------------

PgLockStore::Lane& PgLockStore::lane_of(const std::string& key) {
  return *lanes_[std::hash<std::string>{}(key) % lanes_.size()];
}

void PgLockStore::fail(LockItem& item, const Status& status) {
  if (!item.op) return;  // a place in line ends by itself
  item.op->reply = {};
  item.op->reply.status = status;
  item.op->done();
}

void PgLockStore::push(LockItem item) {
  if (closing_) return fail(item, Status::make(Code::closed, "the store was closed"));
  Lane& lane = lane_of(item.key);
  LockOp* const op = item.op;
  const Result<batch::Ticket> ticket = lane.batcher.push(std::move(item), 0);
  if (!ticket.ok()) return fail(item, ticket.status());  // refused: the item is still ours
  if (op) {
    tickets_[op] = {&lane, ticket.value()};
    watch(op->deadline);
  }
  pump(lane);
}

void PgLockStore::submit(LockOp* op) {
  LockItem item;
  item.op = op;
  if (Status bad = check(*op); !bad.ok()) return fail(item, bad);
  item.kind = op->verb == LockOp::Verb::acquire ? LockItem::Kind::take : LockItem::Kind::keep;
  item.key = lock_key(*op->space, op->name);
  item.mark = -1 - static_cast<std::int64_t>(random_() >> 2);
  push(std::move(item));
}

bool PgLockStore::abandon(LockOp* op) {
  const auto found = tickets_.find(op);
  if (found == tickets_.end()) return false;
  const bool ours = found->second.lane->batcher.cancel(found->second.ticket).has_value();
  tickets_.erase(found);
  return ours;
}

void PgLockStore::watch(Nanos deadline) {
  if (deadline >= watched_ || closing_) return;
  watched_ = std::max(deadline, clock_.now() + kWatchStep);
  timer_->expires_after(std::chrono::nanoseconds(std::max<Nanos>(watched_ - clock_.now(), 1)));
  timer_->async_wait([this, alive = alive_](const asio::error_code& error) {
    if (*alive && !error) fail_overdue();
  });
}

// Operations that still wait for a trip when their time is over.
void PgLockStore::fail_overdue() {
  watched_ = kForever;
  const Nanos now = clock_.now();
  std::vector<LockOp*> overdue;
  Nanos next = kForever;
  for (const auto& [op, queued] : tickets_) {
    if (op->deadline <= now)
      overdue.push_back(const_cast<LockOp*>(op));
    else
      next = std::min(next, op->deadline);
  }
  watch(next);
  for (LockOp* op : overdue)
    if (abandon(op)) {
      op->reply = {};
      op->reply.status =
          Status::make(Code::timeout, "the store was not reached in time; nothing was sent to it");
      op->done();
    }
}

void PgLockStore::pump(Lane& lane) {
  if (lane.busy || lane.batcher.queued() == 0) return;
  if (!closing_ && lane.gather.waits(lane.batcher.queued(), clock_.now(), [this, &lane, alive = alive_] {
        if (*alive) pump(lane);
      }))
    return;
  lane.busy = true;
  ++trips_;
  backend_.lend(Facet::locks, alive_, [this, &lane, alive = alive_](Result<PgPool::Lease> got) {
    if (!*alive) return;
    // In doubt was the look at the schema, nothing else.
    if (!got.ok() && got.status().code == Code::in_doubt) {
      Status status = got.status();
      status.code = Code::unavailable;
      got = std::move(status);
    }
    take_off(lane, std::move(got));
  });
}

void PgLockStore::fail_queued(Lane& lane, const Status& status) {
  // Only what is queued now: a caller that asks again from inside done() starts a new attempt.
  std::vector<LockItem> items;
  for (std::size_t left = lane.batcher.queued(); left > 0;) {
    auto batch = lane.batcher.take();
    if (!batch) break;
    left -= std::min(left, batch->ops.size());
    for (LockItem& item : batch->ops) {
      tickets_.erase(item.op);
      items.push_back(std::move(item));
    }
    lane.batcher.finished(batch->id);
  }
  for (LockItem& item : items) fail(item, status);
}

void PgLockStore::take_off(Lane& lane, Result<PgPool::Lease> connection) {
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

void PgLockStore::land(const TripPtr& trip) {
  Lane& lane = trip->lane;
  lane.batcher.finished(trip->batch.id);
  purge();
  const Nanos now = clock_.now();
  lane.gather.landed(trip->batch.ops.size(), lane.batcher.queued(), now, now - trip->began);
  if (lane.gather.most_are_here(lane.batcher.queued()) && trip->connection && trip->connection->open() &&
      trip->trips_in_a_row < kTripsInARow) {
    if (auto batch = lane.batcher.take())
      return begin_trip(lane, std::move(*batch), std::exchange(trip->connection, nullptr),
                        trip->trips_in_a_row + 1);
  }
  lane.busy = false;
  --trips_;
  if (trip->connection) backend_.pool().put(std::exchange(trip->connection, nullptr));
  pump(lane);
  maybe_closed();
}

// --- what is asked now and then -------------------------------------------------------------------

void PgLockStore::list(const store::SpaceRef& space, std::size_t limit,
                       store::Callback<std::vector<store::LockInfo>> done) {
  limit = std::clamp<std::size_t>(limit, 1, 100'000);
  backend_.lend(Facet::locks, alive_,
                [this, space, limit, done = std::move(done), alive = alive_](Result<PgPool::Lease> got) {
                  if (!got.ok()) return done(got.status());
                  std::vector<Call> calls;
                  calls.push_back({&sql().list,
                                   {space ? Param::text(space->name_space) : Param::null(),
                                    space ? Param::text(space->tenant) : Param::null(),
                                    Param::text(std::to_string(limit))}});
                  count(calls, 1);
                  const PgPool::Lease connection = got.value();
                  connection->run(std::move(calls), [this, done, alive, connection](PipelineResult result) {
                    if (!*alive) return done(Status::make(Code::closed, "the store was closed"));
                    backend_.pool().put(connection);
                    if (!result.status.ok()) return done(backend_.explain(Facet::locks, result));
                    done(read_list(*result.results[0]));
                  });
                });
}

// Whoever writes cleans up, now and then and in bounded pieces; the first time soon after the start.
void PgLockStore::purge() {
  if (closing_ || clock_.now() < purge_at_) return;
  purge_at_ = clock_.now() + kPurgePause / 2 + static_cast<Nanos>(random_() % 1'000) * (kPurgePause / 1'000);
  backend_.pool().get([this, alive = alive_](Result<PgPool::Lease> got) {
    if (!*alive || !got.ok()) return;
    const LockSql& sql = this->sql();
    if (purge_from_.empty()) purge_from_ = std::string(2, '\0');
    const LockName from = split_key(purge_from_);
    std::vector<Call> calls;
    calls.push_back({&sql.purge,
                     {Param::text(std::string(from.name_space)), Param::text(std::string(from.tenant)),
                      Param::text(std::string(from.name)), Param::text(std::to_string(kPurgeAtOnce)),
                      Param::text(std::to_string(kDeadFor / kMilli))}});
    if (!sql.purge_waiters.sql.empty())
      calls.push_back({&sql.purge_waiters, {Param::text(std::to_string(kPurgeAtOnce))}});
    count(calls, 0);
    const PgPool::Lease connection = got.value();
    connection->run(std::move(calls), [this, connection, alive](PipelineResult result) {
      if (!*alive) return;
      backend_.pool().put(connection);
      if (!result.status.ok()) return;  // the next one tries again
      const Rows& page = *result.results[0];
      purge_from_.clear();
      if (page.rows() == 0 || page.integer(0, 0) < kPurgeAtOnce) return;
      purge_from_ = lock_key({std::string(page.text(0, 2)), std::string(page.text(0, 3))}, page.text(0, 4));
      purge_at_ = clock_.now() + kSecond / 10;  // there is more
    });
  });
}

// --- the end ------------------------------------------------------------------------------------

void PgLockStore::close(Nanos patience, std::function<void()> done) {
  closing_ = true;
  listener_.close();
  timer_->cancel();
  refresh_timer_->cancel();
  closed_ = std::move(done);
  close_timer_->expires_after(std::chrono::nanoseconds(patience));
  close_timer_->async_wait([this, alive = alive_](const asio::error_code& error) {
    if (*alive && !error && closed_) std::exchange(closed_, nullptr)();
  });
  const Status closed = Status::make(Code::closed, "the store was closed");
  for (const auto& lane : lanes_)
    for (LockItem& item : lane->batcher.close()) {
      tickets_.erase(item.op);
      fail(item, closed);
    }
  maybe_closed();
}

void PgLockStore::maybe_closed() {
  if (!closing_ || trips_ > 0 || !closed_) return;
  ++trips_;  // once: from here on nothing is queued any more
  leave_lines([this] {
    close_timer_->cancel();
    if (closed_) std::exchange(closed_, nullptr)();
  });
}

}  // namespace ratesync::postgres
