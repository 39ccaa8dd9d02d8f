// The rounds of a trip: what is asked in one pipeline, and what becomes of refusals.
#include "ratesync/postgres/state_trip.h"

#include <algorithm>
#include <chrono>

#include "ratesync/base/format.h"
#include "ratesync/postgres/errors.h"
#include "ratesync/postgres/state_stage.h"

namespace ratesync::postgres {

using store::StateOp;
using Kind = StateStage::Kind;

namespace {

constexpr unsigned kRaces = 20;
constexpr std::uint64_t kSureOfNew = 64;  // creations without a refusal
constexpr std::size_t kRoundBytes = 16'000'000;

Nanos deadline_of(const QueuedState& item) { return item.batch ? item.batch->deadline : item.op->deadline; }

// In the order of their arrival, which is that of the batch that owns them.
void sort_by_arrival(StateItems& items) { std::sort(items.begin(), items.end()); }

}  // namespace

// In the wide lane: what has a key in common with something before it waits for the next round, and so it
// does for what the ordinary lanes still carry of its keys.
void PgStateStore::hold_back(StateTrip& trip) {
  std::vector<bool> taken(kSlots, false);
  StateItems now;
  trip.held.clear();
  for (QueuedState* item : trip.pending) {
    bool waits = false;
    each_slot(*item, [&](std::size_t slot) { waits = waits || taken[slot] || ordinary_[slot] > 0; });
    each_slot(*item, [&](std::size_t slot) { taken[slot] = true; });
    (waits ? trip.held : now).push_back(item);
  }
  trip.pending = std::move(now);
}

void PgStateStore::start_round(const TripPtr& trip) {
  if (std::exchange(trip->pause, false)) return retry_later(trip, ++trip->pauses);
  trip->round = {};
  const bool wide = trip->lane->place == ordinary_lanes_;
  if (wide) {
    hold_back(*trip);
    if (trip->pending.empty() && !trip->held.empty()) {
      trip->pending = std::exchange(trip->held, {});
      give_back(*trip);
      held_.push_back(trip);  // until poke()
      return;
    }
  }
  if (trip->pending.empty()) return land(trip);
  if (!trip->connection || !trip->connection->open()) {
    trip->pending.insert(trip->pending.end(), trip->held.begin(), trip->held.end());
    trip->held.clear();
    sort_by_arrival(trip->pending);
    return reconnect(trip);
  }
  trip->round = plan_state(trip->pending, kRoundBytes);
  std::vector<Call> calls;
  std::size_t asked = 0;
  for (StateStage& stage : trip->round.stages) {
    // A lone creation that is refused is one round trip, too.
    stage.all_new = stage.lines.size() > 1 && created_ >= kSureOfNew && found_ == 0;
    add_stage(sql_, stage, calls);
    asked += stage.kind == Kind::decide ? stage.items.size() : stage.lines.size();
  }
  run(trip, std::move(calls), std::max(asked, trip->pending.size() - trip->round.later.size()));
}

// An ordinary lane is through with a key.
void PgStateStore::poke() {
  std::vector<TripPtr> freed;
  std::erase_if(held_, [&](const TripPtr& trip) {
    const bool goes = std::any_of(trip->pending.begin(), trip->pending.end(), [this](QueuedState* item) {
      bool about = false;
      each_slot(*item, [&](std::size_t slot) { about = about || ordinary_[slot] > 0; });
      return !about;
    });
    if (goes) freed.push_back(trip);
    return goes;
  });
  for (const TripPtr& trip : freed) reconnect(trip);
}

// --- answers ------------------------------------------------------------------------------------

void PgStateStore::answered(const TripPtr& trip, PipelineResult result) {
  const bool lost = result.status.code == Code::in_doubt;
  if (!lost &&
      std::none_of(result.parts.begin(), result.parts.end(), [](const auto& p) { return p.answered; }))
    return not_sent(trip, result.status);
  StateDealt dealt;
  StateItems doubtful;
  std::vector<StateStage> unanswered;
  std::vector<std::pair<StateItems, Status>> failed;
  for (std::size_t i = 0; i < trip->round.stages.size(); ++i) {
    StateStage& stage = trip->round.stages[i];
    if (i >= result.parts.size() || !result.parts[i].answered) {
      const StateItems items = items_of(stage);
      doubtful.insert(doubtful.end(), items.begin(), items.end());
      unanswered.push_back(std::move(stage));
    } else if (!result.parts[i].status.ok()) {
      refused(*trip, stage, result.parts[i], dealt, failed);
    } else {
      const std::size_t before = dealt.again.size();
      deal_stage(stage, *result.results[stage.first_call], dealt);
      for (std::size_t at = before; at < dealt.again.size(); ++at) {
        // Lost a race: for the row of a creation, which is there now. Or an increment did not work out.
        QueuedState& item = *dealt.again[at];
        ++stats_.conflicts;
        if (stage.kind == Kind::create) item.seen = true;
        if (stage.kind == Kind::add || stage.kind == Kind::add_renew) item.alone = true;
        if (++item.races <= kRaces) continue;
        failed.push_back(
            {{&item},
             Status::make(Code::server,
                          formatted("the row changed {} times while it was decided on; is it being "
                                    "deleted all the time?",
                                    kRaces),
                          "40001")});
      }
      std::erase_if(dealt.again, [](const QueuedState* item) { return item->races > kRaces; });
    }
  }
  for (const QueuedState* item : dealt.done) {
    if (!item->op || item->op->verb != StateOp::Verb::create) continue;
    ++created_;
    if (item->op->reply.outcome == store::StateReply::Outcome::exists) ++found_;
    if (created_ >= 512) created_ /= 2, found_ /= 2;
  }
  // Their keys are free, and the next round leaves before the callers of this one are told: server and client
  // overlap. `trip` keeps the items alive.
  for (const QueuedState* item : dealt.done) forget(*item);
  trip->pending = std::move(dealt.again);
  trip->pending.insert(trip->pending.end(), trip->round.later.begin(), trip->round.later.end());
  trip->pending.insert(trip->pending.end(), trip->held.begin(), trip->held.end());
  trip->held.clear();
  sort_by_arrival(trip->pending);
  if (!trip->pause) trip->pauses = 0;
  if (lost) {
    trip->round.stages = std::move(unanswered);
    doubt(trip, std::move(doubtful), result.status);
  } else {
    trip->lost_connections = 0;
    start_round(trip);
  }
  deliver(dealt.done);
  for (const auto& [items, status] : failed) fail_all(items, status);
}

void PgStateStore::refused(StateTrip& trip, const StateStage& stage, const PipelineResult::Part& part,
                           StateDealt& dealt, std::vector<std::pair<StateItems, Status>>& failed) {
  StateItems items = items_of(stage);
  const Status& status = part.status;
  const bool passing = status.code == Code::unavailable || is_transient(status.sqlstate);
  if (passing) {
    ++stats_.conflicts;
    trip.pause = true;
    StateItems over;
    for (QueuedState* item : items) {
      const bool late =
          !item->patience.lasts(status.sqlstate, clock_.now()) || deadline_of(*item) <= clock_.now();
      (late ? over : dealt.again).push_back(item);
    }
    items = std::move(over);
  } else if (is_row_fault(status.sqlstate) && items.size() > 1) {
    // Both halves travel in the next round; the bad row ends up alone.
    const unsigned first = ++trip.cuts, second = ++trip.cuts;
    const std::size_t middle = items.size() / 2;
    for (std::size_t i = 0; i < items.size(); ++i) {
      items[i]->cut = i < middle ? first : second;
      dealt.again.push_back(items[i]);
    }
    return;
  }
  if (items.empty()) return;
  PipelineResult told;
  told.status = status;
  told.server_message = part.server_message;
  failed.emplace_back(std::move(items), explain(told));
}

// Certainly not executed: an idle connection had died.
void PgStateStore::not_sent(const TripPtr& trip, const Status& status) {
  trip->pending.insert(trip->pending.end(), trip->held.begin(), trip->held.end());
  trip->held.clear();
  sort_by_arrival(trip->pending);
  if (status.code == Code::unavailable && ++trip->lost_connections <= 2) return reconnect(trip);
  const StateItems items = std::exchange(trip->pending, {});
  trip->round = {};
  start_round(trip);
  fail_all(items, status);
}

}  // namespace ratesync::postgres
