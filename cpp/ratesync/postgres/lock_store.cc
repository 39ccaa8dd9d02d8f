#include "ratesync/postgres/lock_store.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "ratesync/base/format.h"
#include "ratesync/postgres/lock_trip.h"
#include "ratesync/postgres/sql_text.h"

namespace ratesync::postgres {

using store::LockOp;

namespace {

// Of a lane. A connection is given back after 16 trips, so that others get their turn.
constexpr LaneRules kRules{.queue = {1'000, 100'000, 1}, .trips_in_a_row = 16, .gathers = true};
constexpr Nanos kWatchStep = 20 * kMilli;  // overdue operations fail at most so much late
// Released locks and expired ones stay for so long: while they lie there, a renewal still finds that nobody
// took them, and no statement can be at work that is older than them (see kTake).
constexpr Nanos kDeadFor = 300 * kSecond;
constexpr std::int64_t kPurgeAtOnce = 5'000;
constexpr Nanos kPurgePause = 60 * kSecond;

constexpr std::size_t kSpaceBytes = 255;
constexpr std::size_t kNameBytes = 1'024;

Status check_text(std::string_view what, std::string_view text, std::size_t most) {
  if (!text.empty() && text.size() <= most && utf8_length(text) > 0) return Status::success();
  return Status::make(
      Code::invalid,
      formatted("{}: expected 1 to {} bytes of UTF-8 without NUL, got {} bytes", what, most, text.size()));
}

Status check(const LockOp& op) {
  if (Status bad = check_text("namespace", op.space->name_space, kSpaceBytes); !bad.ok()) return bad;
  if (Status bad = check_text("tenant", op.space->tenant, kSpaceBytes); !bad.ok()) return bad;
  if (Status bad = check_text("name", op.name, kNameBytes); !bad.ok()) return bad;
  const bool lease = op.verb == LockOp::Verb::acquire || op.verb == LockOp::Verb::renew;
  if (lease && op.ttl < 1)
    return Status::make(Code::invalid, formatted("ttl: expected 1 ms or more, got {}", op.ttl));
  if (op.verb == LockOp::Verb::acquire && op.id <= 0)
    return Status::make(Code::invalid, formatted("id: expected a number above 0, got {}", op.id));
  return Status::success();
}

LockItem::Kind kind_of(LockOp::Verb verb) {
  switch (verb) {
    case LockOp::Verb::acquire: return LockItem::Kind::take;
    case LockOp::Verb::stand: return LockItem::Kind::stand;
    case LockOp::Verb::ring: return LockItem::Kind::ring;
    case LockOp::Verb::renew:
    case LockOp::Verb::release:
    case LockOp::Verb::break_: break;
  }
  return LockItem::Kind::keep;
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
    : Lanes(backend.io(), backend.clock(), backend.pool(), kRules),
      backend_(backend),
      marks_((static_cast<std::uint64_t>(std::random_device{}()) << 32) ^ std::random_device{}()),
      me_(static_cast<std::int64_t>(marks_() >> 2) + 1),
      // The names of schema and table may be long: a hash of them, and who is meant.
      channel_(named("locks", backend.names().quoted(backend.names().locks)).name + '_'),
      timer_(std::make_unique<asio::steady_timer>(backend.io())),
      refresh_timer_(std::make_unique<asio::steady_timer>(backend.io())),
      listener_(backend.io(), clock_, backend.options().listen, backend.options().connection,
                channel_ + std::to_string(me_),
                {[this](const std::string& payload) { heard(payload); }, [this] { ask_everybody(); },
                 [this](const std::string& channel, const std::string& payload) {
                   notify(pool_, alive_, channel, payload);
                 }}) {
  const std::size_t count = std::max<std::size_t>(backend.options().lanes, 1);
  for (std::size_t i = 0; i < count; ++i) add_lane();
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

// --- queueing -----------------------------------------------------------------------------------

void PgLockStore::each_key(const LockItem& item, const std::function<void(std::size_t)>& visit) const {
  visit(std::hash<std::string>{}(item.key));
}

void PgLockStore::fail(LockItem& item, const Status& status) {
  if (!item.op) return;  // a place in line ends by itself
  item.op->reply = {};
  item.op->reply.status = status;
  item.op->done();
}

void PgLockStore::fail_all(const LockItems& items, const Status& status) {
  for (LockItem* item : items) fail(*item, status);
}

void PgLockStore::push(LockItem item) {
  if (closing_) return fail(item, closed_status());
  if (item.op) watch_deadline(item.op->deadline);
  const Status entered = enter(std::hash<std::string>{}(item.key) % lanes_.size(), item);
  if (!entered.ok()) fail(item, entered);
}

void PgLockStore::submit(LockOp* op) {
  LockItem item;
  item.op = op;
  if (Status bad = check(*op); !bad.ok()) return fail(item, bad);
  item.kind = kind_of(op->verb);
  item.key = lock_key(*op->space, op->name);
  item.mark = -1 - static_cast<std::int64_t>(marks_() >> 2);
  push(std::move(item));
}

bool PgLockStore::abandon(LockOp* op) { return take_back(op).has_value(); }

void PgLockStore::watch_deadline(Nanos deadline) {
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
  std::vector<LockOp*> late;
  Nanos next = kForever;
  for (const auto& [handle, queued] : queued_) {
    auto* const op = static_cast<LockOp*>(const_cast<void*>(handle));
    if (op->deadline <= now)
      late.push_back(op);
    else
      next = std::min(next, op->deadline);
  }
  watch_deadline(next);
  for (LockOp* op : late)
    if (abandon(op)) {
      op->reply = {};
      op->reply.status =
          Status::make(Code::timeout, "the store was not reached in time; nothing was sent to it");
      op->done();
    }
}

// --- what is asked now and then -------------------------------------------------------------------

void PgLockStore::list(const store::SpaceRef& space, std::size_t limit,
                       store::Callback<std::vector<store::LockInfo>> done) {
  limit = std::clamp<std::size_t>(limit, 1, 100'000);
  errand(
      1,
      [this, space, limit] {
        return std::vector<Call>{
            {&sql().list,
             {space ? Param::text(space->name_space) : Param::null(),
              space ? Param::text(space->tenant) : Param::null(), Param::text(std::to_string(limit))}}};
      },
      [done = std::move(done)](const PipelineResult& result) {
        if (!result.status.ok()) return done(result.status);
        done(read_list(*result.results[0]));
      });
}

// Whoever writes cleans up, now and then and in bounded pieces; the first time soon after the start.
void PgLockStore::purge() {
  if (closing_ || clock_.now() < purge_at_) return;
  purge_at_ = clock_.now() + kPurgePause / 2 + static_cast<Nanos>(random_() % 1'000) * (kPurgePause / 1'000);
  errand(
      0,
      [this] {
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
        return calls;
      },
      [this](const PipelineResult& result) {
        if (!result.status.ok()) return;  // the next one tries again
        const Rows& page = *result.results[0];
        purge_from_.clear();
        if (page.rows() == 0 || page.integer(0, 0) < kPurgeAtOnce) return;
        purge_from_ = lock_key({std::string(page.text(0, 2)), std::string(page.text(0, 3))}, page.text(0, 4));
        purge_at_ = clock_.now() + kSecond / 10;  // there is more
      });
}

// --- the end ------------------------------------------------------------------------------------

void PgLockStore::close(Nanos patience, std::function<void()> done) {
  listener_.close();
  timer_->cancel();
  refresh_timer_->cancel();
  shut(patience, std::move(done));
}

}  // namespace ratesync::postgres
