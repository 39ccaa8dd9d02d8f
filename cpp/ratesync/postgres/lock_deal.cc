// The rounds of a trip: what is asked in one pipeline, and how its answer is dealt out.
#include <algorithm>
#include <chrono>
#include <utility>

#include "ratesync/postgres/binary_array.h"
#include "ratesync/postgres/errors.h"
#include "ratesync/postgres/lock_trip.h"

namespace ratesync::postgres {

using store::LockOp;
using Outcome = store::LockReply::Outcome;

namespace {

constexpr unsigned kReconnects = 8;  // while the server can be reached at all
constexpr unsigned kLostRaces = 20;
// After a lost answer: pauses between attempts to reach the server, and the end where there is no deadline.
constexpr Nanos kDoubtPause = kSecond / 4;
constexpr Nanos kDoubtEnd = 60 * kSecond;

const Statement kLazyCommit{"ratesync_lazy_commit", "SELECT set_config('synchronous_commit', 'off', true)"};

}  // namespace

void PgLockStore::start_round(const TripPtr& trip) {
  if (!trip->more()) return land(trip);
  if (!trip->connection || !trip->connection->open()) return reconnect(trip);
  trip->round = plan_locks(trip->pending, !sql().queue.sql.empty());
  std::vector<Call> calls = build_calls(*trip);
  run(trip, std::move(calls), trip->pending.size() - trip->round.later.size());
}

namespace {

Call keep_call(const Statement& statement, const LockItems& keeps) {
  BinaryArray tokens(BinaryArray::Type::int8), ttls(BinaryArray::Type::int8), marks(BinaryArray::Type::int8);
  for (const LockItem* item : keeps) {
    const bool any = item->op->verb == LockOp::Verb::break_ && item->op->token == 0;
    tokens.add(any || item->op->token > 0 ? item->op->token : -1);
    ttls.add(item->op->verb == LockOp::Verb::renew ? item->op->ttl : 0);
    marks.add(item->mark);
  }
  Call call{&statement, lock_names(keeps)};
  call.params.push_back(tokens.take());
  call.params.push_back(ttls.take());
  call.params.push_back(marks.take());
  return call;
}

Call take_call(const Statement& statement, const LockItems& takes, const std::string& holder,
               const std::string& me) {
  BinaryArray ids(BinaryArray::Type::int8), ttls(BinaryArray::Type::int8);
  for (const LockItem* item : takes) {
    ids.add(item->op->id);
    ttls.add(item->op->ttl);
  }
  Call call{&statement, lock_names(takes)};
  call.params.push_back(ids.take());
  call.params.push_back(ttls.take());
  call.params.push_back(Param::text(holder));
  call.params.push_back(Param::text(me));
  return call;
}

Call served_call(const Statement& statement, const LockItems& served, const std::string& me) {
  BinaryArray ids(BinaryArray::Type::int8);
  for (const LockItem* item : served) ids.add(item->op->id);
  Call call{&statement, lock_names(served)};
  call.params.push_back(ids.take());
  call.params.push_back(Param::text(me));
  return call;
}

Call named_call(const Statement& statement, const LockItems& items, const std::string& who,
                std::string more = {}) {
  Call call{&statement, lock_names(items)};
  call.params.push_back(Param::text(who));
  if (!more.empty()) call.params.push_back(Param::text(std::move(more)));
  return call;
}

}  // namespace

// What frees a lock comes before what takes one, and whom to tell comes last: see kNotify.
std::vector<Call> PgLockStore::build_calls(LockTrip& trip) {
  const LockSql& sql = this->sql();
  const LockRound& round = trip.round;
  const std::string me = std::to_string(me_);
  std::vector<Call> calls;
  const auto add = [&calls](Call call) {
    calls.push_back(std::move(call));
    return calls.size() - 1;
  };
  trip.freeing.clear();
  const bool waiters = !sql.queue.sql.empty();
  if (!round.queues.empty()) {
    add({&kLazyCommit, {}});  // a place in line need not be durable
    trip.queue_call = add(named_call(sql.queue, round.queues, me, std::to_string(kLockPlace / kMilli)));
  }
  if (!round.looks.empty()) trip.look_call = add(named_call(sql.look, round.looks, me));
  if (!round.keeps.empty()) trip.keep_call = add(keep_call(sql.keep, round.keeps));
  if (!round.unwaits.empty() && waiters) add(named_call(sql.unwait, round.unwaits, me));
  if (!round.stands.empty() && waiters)
    add(named_call(sql.stand, round.stands, me, std::to_string(kLockPlace / kMilli)));
  if (!round.rings.empty() && waiters) add(named_call(sql.ring, round.rings, me, channel_));
  if (!round.takes.empty())
    trip.take_call = add(take_call(sql.take, round.takes, backend_.options().holder, me));
  if (!waiters) return calls;

  LockItems served;
  for (LockItem* item : round.takes)
    if (waiting_.contains(item->key)) served.push_back(item);
  if (!served.empty()) add(served_call(sql.served, served, me));
  for (const LockItems* list : {&round.keeps, &round.unwaits})
    for (LockItem* item : *list)
      if (item->frees()) trip.freeing.push_back(item);
  if (trip.freeing.empty()) return calls;
  std::stable_sort(trip.freeing.begin(), trip.freeing.end(),
                   [](const LockItem* a, const LockItem* b) { return a->key < b->key; });
  for (std::size_t i = 0; i < trip.freeing.size(); ++i) trip.freeing[i]->row = i;
  trip.notify_call = add(named_call(sql.notify, trip.freeing, me, channel_));
  return calls;
}

// --- answers ------------------------------------------------------------------------------------

void PgLockStore::deal_keeps(LockTrip& trip, const Rows& rows, Dealt& dealt) {
  const LockItems& keeps = trip.round.keeps;
  for (LockItem* item : keeps) {
    item->op->reply = {};
    item->op->reply.outcome = Outcome::lost;
    // It may have been this release, and somebody took the lock since.
    if (item->doubtful_until >= 0 && item->op->verb != LockOp::Verb::renew)
      item->op->reply.status = Status::make(
          Code::in_doubt, "the answer was lost, and the lock is gone by now: by this release, or before it");
    dealt.done.push_back(item);
  }
  for (int row = 0; row < rows.rows(); ++row) {
    const auto at = static_cast<std::size_t>(rows.integer(row, 0) - 1);
    if (at >= keeps.size()) continue;
    LockOp& op = *keeps[at]->op;
    op.reply = {};
    if (op.verb == LockOp::Verb::renew) op.reply.remaining = op.ttl;
  }
}

void PgLockStore::deal_takes(LockTrip& trip, const Rows& rows, Dealt& dealt) {
  std::unordered_map<std::int64_t, std::int64_t> tokens;
  for (int row = 0; row < rows.rows(); ++row) tokens[rows.integer(row, 0)] = rows.integer(row, 1);
  for (LockItem* item : trip.round.takes) {
    const auto found = tokens.find(item->op->id);
    if (found == tokens.end()) {
      item->refused = true;
      dealt.again.push_back(item);
      continue;
    }
    item->op->reply = {};
    item->op->reply.token = found->second;
    item->op->reply.remaining = item->op->ttl;
    forget(item->key);  // `served` did
    dealt.done.push_back(item);
  }
}

void PgLockStore::deal_bells(const LockRound& round, Dealt& dealt) {
  for (LockItem* item : round.stands) {
    item->op->reply = {};
    item->op->reply.outcome = Outcome::taken;
    if (sql().queue.sql.empty()) {
      item->op->reply.status = Status::make(Code::unavailable, "there is no table of waiters: run migrate");
    } else {
      remember(item->key, 0, true);
    }
    dealt.done.push_back(item);
  }
  for (LockItem* item : round.rings) {
    item->op->reply = {};
    forget(item->key);
    dealt.done.push_back(item);
  }
}

void PgLockStore::deal_asked(const LockItems& items, const Rows& rows, bool queue, Dealt& dealt) {
  std::unordered_map<std::size_t, int> found;
  for (int row = 0; row < rows.rows(); ++row) found[static_cast<std::size_t>(rows.integer(row, 0) - 1)] = row;
  for (LockItem* item : items) {
    const auto at = found.find(item->row);
    const int row = at == found.end() ? -1 : at->second;
    const std::int64_t left = row < 0 ? 0 : rows.integer(row, 3);
    const bool kept = row >= 0 && !rows.is_null(row, 4);
    if (left <= 0 && !kept && item->lost_races < kLostRaces) {
      // Free by now: try once more.
      ++item->lost_races;
      ++stats_.conflicts;
      item->refused = false;
      dealt.again.push_back(item);
      continue;
    }
    store::LockReply& reply = item->op->reply;
    reply = {};
    reply.outcome = Outcome::taken;
    reply.remaining = std::max<std::int64_t>(left > 0 || !kept ? left : rows.integer(row, 4), 1);
    if (row >= 0) reply.token = rows.integer(row, 1);
    if (left > 0) reply.holder = rows.text(row, 2);
    if (queue) remember(item->key, reply.remaining * kMilli);
    dealt.done.push_back(item);
  }
}

void PgLockStore::answered(const TripPtr& trip, PipelineResult result) {
  if (!result.status.ok()) return failed(trip, result);
  trip->patience.renew();
  trip->lost_connections = 0;
  purge();
  const LockRound& round = trip->round;
  Dealt dealt;
  if (!round.keeps.empty()) deal_keeps(*trip, *result.results[trip->keep_call], dealt);
  deal_bells(round, dealt);
  if (!round.takes.empty()) deal_takes(*trip, *result.results[trip->take_call], dealt);
  if (!round.looks.empty()) deal_asked(round.looks, *result.results[trip->look_call], false, dealt);
  if (!round.queues.empty()) deal_asked(round.queues, *result.results[trip->queue_call], true, dealt);
  if (!trip->freeing.empty()) {
    const Rows& told = *result.results[trip->notify_call];
    for (int row = 0; row < told.rows(); ++row) {
      const auto at = static_cast<std::size_t>(told.integer(row, 0) - 1);
      if (at < trip->freeing.size() && told.boolean(row, 1)) dealt.freed.push_back(trip->freeing[at]->key);
    }
  }

  trip->pending = std::move(dealt.again);
  trip->pending.insert(trip->pending.end(), round.later.begin(), round.later.end());
  trip->round = LockRound{};
  // The next statement leaves before the callers of this one are told: server and client overlap. `trip`
  // keeps the items alive.
  start_round(trip);
  for (LockItem* item : dealt.done) item->op->done();
  for (const std::string& key : dealt.freed) tell(key);
}

// --- failures -----------------------------------------------------------------------------------

void PgLockStore::failed(const TripPtr& trip, const PipelineResult& result) {
  const Status& status = result.status;
  LockItems asked = trip->round.asked();
  LockItems later = std::move(trip->round.later);
  trip->round = LockRound{};
  const auto all_again = [&] {
    trip->pending = asked;
    trip->pending.insert(trip->pending.end(), later.begin(), later.end());
  };

  if (status.code == Code::server && is_transient(status.sqlstate) &&
      trip->patience.lasts(status.sqlstate, clock_.now())) {
    ++stats_.conflicts;
    all_again();
    return retry_later(trip, trip->patience.refusals());
  }
  if (status.code == Code::unavailable && ++trip->lost_connections <= kReconnects) {
    all_again();
    return reconnect(trip);  // certainly not executed: an idle connection had died, or the backend was killed
  }
  if (status.code == Code::in_doubt || status.code == Code::timeout || status.code == Code::protocol) {
    doubt(asked);
    all_again();
    return reconnect(trip);
  }
  if (status.code == Code::server && is_row_fault(status.sqlstate) && asked.size() > 1) {
    trip->cut(asked, later);
    return start_round(trip);
  }
  trip->patience.renew();
  trip->lost_connections = 0;
  trip->pending = std::move(later);
  const Status told = status.code == Code::server ? explain(result) : status;
  start_round(trip);
  fail_all(asked, told);
}

void PgLockStore::doubt(const LockItems& items) {
  for (LockItem* item : items)
    if (item->doubtful_until < 0)
      item->doubtful_until =
          std::min(item->op ? item->op->deadline : 0, saturating_add(clock_.now(), kDoubtEnd));
}

// What was never sent fails with the reason; what is in doubt tries again until its time is over.
void PgLockStore::reached(const TripPtr& trip, const Status& status) {
  LockItems over, never_sent;
  const Nanos now = clock_.now();
  for (LockItem* item : trip->all()) {
    LockItems& list = item->doubtful_until >= 0 && (item->doubtful_until <= now || closing_) ? over
                      : item->doubtful_until < 0 && !status.ok()                             ? never_sent
                                                                                             : trip->pending;
    list.push_back(item);
  }
  if (status.ok() || trip->pending.empty())
    start_round(trip);  // or lands
  else
    after(kDoubtPause, [this, trip] { reconnect(trip); });
  fail_all(never_sent, status);
  fail_all(over, Status::make(Code::in_doubt,
                              "the connection was lost before the answer came, and the server could not "
                              "be asked again in time: executed or not"));
}

}  // namespace ratesync::postgres
