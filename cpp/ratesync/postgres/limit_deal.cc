// The rounds of a trip: what is asked in one pipeline, and how its answer is dealt out.

#include <algorithm>
#include <chrono>
#include <string_view>
#include <unordered_set>

#include "ratesync/base/format.h"
#include "ratesync/postgres/errors.h"
#include "ratesync/postgres/limit_params.h"
#include "ratesync/postgres/limit_trip.h"

namespace ratesync::postgres {

namespace {

constexpr unsigned kLostRaces = 20;

const Statement kLazyCommit{"ratesync_lazy_commit", "SELECT set_config('synchronous_commit', 'off', true)"};

// The number of the last request that stands in line, from 1; 0: none.
std::int64_t last_queued(const OpList& ops) {
  for (std::size_t i = ops.size(); i > 0; --i)
    if (ops[i - 1]->all ? ops[i - 1]->all->queued : ops[i - 1]->acquire->queued)
      return static_cast<std::int64_t>(i);
  return 0;
}

// A restatement carries nobody who could be told.
void count_conflict(const Run& run) {
  if (!run.ops.empty()) ++run.ops.front()->acquire->conflicts;
}

}  // namespace

// A release whose news went along with an earlier statement.
void PgLimitStore::drop_needless_restatements(const OpLane& lane, OpList& pending) {
  Holders& holders = holders_of(lane);
  std::erase_if(pending, [&holders](QueuedOp* op) {
    if (op->kind != QueuedOp::Kind::restate) return false;
    Holding* holding = holders.find(op->group->id);
    if (!holding) return true;
    holding->queued = false;
    if (!holding->in_step()) return false;
    holders.tidy(*holding);
    return true;
  });
}

// Without their tables. What only concerns slots goes on.
void PgLimitStore::refuse_windows(OpList& pending) {
  if (windows()) return;
  OpList refused;
  std::erase_if(pending, [&refused](QueuedOp* op) {
    if (op->kind == QueuedOp::Kind::restate) return false;
    if (op->all ? std::none_of(op->all->parts.begin(), op->all->parts.end(),
                               [](const store::Part& part) { return part.group->params.is_window(); })
                : !op->group->params.is_window())
      return false;
    refused.push_back(op);
    return true;
  });
  if (!refused.empty()) fail_all(refused, backend_.no_windows());
}

void PgLimitStore::start_round(const TripPtr& trip) {
  do {
    if (!trip->more()) return land(trip);
    drop_needless_restatements(*trip->lane, trip->pending);
    refuse_windows(trip->pending);
  } while (trip->pending.empty());
  if (!trip->connection->open()) return reconnect(trip);
  trip->plan = is_together(*trip->lane)
                   ? plan_together(trip->pending, clock_.now(), kMaxLayers)
                   : plan_trip(trip->pending, clock_.now(), has_slots(*trip->lane) ? 1 : kMaxLayers);
  run(trip, build_calls(*trip), trip->pending.size() - trip->plan.later.size());
}

std::vector<Call> PgLimitStore::build_calls(LimitTrip& trip) {
  using Durability = LimitStoreOptions::Durability;
  const LimitSql& sql = backend_.limit_sql();
  const TripPlan& plan = trip.plan;
  const bool rates = kind_of(*trip.lane) == Kind::rates;
  const bool lazy = options_.durability == Durability::off ||
                    (options_.durability == Durability::automatic && !has_slots(*trip.lane));
  std::vector<Call> calls;
  trip.stated.clear();
  trip.stated_from.clear();

  // The statement for rates locks its own rows in order, and so does `adjust`. Where more than one takes
  // locks, or looks at other rows, all locks are taken first.
  const std::vector<std::string_view> groups = plan.groups();
  const bool others =
      std::any_of(plan.adjustments.begin(), plan.adjustments.end(), [this](const Adjustment& a) {
        return a.group->params.is_window() || (a.mode == AdjustMode::reset && (leases() || windows()));
      });
  const bool lock_first = (!rates && !plan.layers.empty()) || others || !plan.unwaits.empty() ||
                          (!plan.adjustments.empty() && groups.size() > 1);
  if (lock_first) calls.push_back({&sql.lock, {Param::text(array_of_text(groups))}});
  // The rate statement says it itself.
  const bool writes = !plan.adjustments.empty() || !plan.layers.empty();
  if (lazy && writes && (!rates || plan.layers.empty())) calls.push_back({&kLazyCommit, {}});

  add_unwaits(plan.unwaits, calls);
  add_adjustments(plan, calls);

  trip.layer_call = calls.size();
  for (const Layer& layer : plan.layers) {
    if (!rates) {
      calls.push_back(decide_call(trip, layer));
    } else {
      calls.push_back({&sql.rate, run_params(layer)});
      calls.back().params.push_back(Param::text(lazy ? "t" : "f"));
    }
  }

  trip.peek_call = calls.size();
  if (!plan.peeks.empty()) calls.push_back({&sql.peek, peek_params(plan.peeks)});
  trip.window_peek_call = calls.size();
  if (!plan.window_peeks.empty())
    calls.push_back({&sql.peek_windows, peek_windows_params(plan.window_peeks)});
  return calls;
}

void PgLimitStore::add_adjustments(const TripPlan& plan, std::vector<Call>& calls) {
  const LimitSql& sql = backend_.limit_sql();
  std::vector<const Adjustment*> buckets, in_windows;
  std::vector<std::string_view> resets, gaps;
  for (const Adjustment& adjustment : plan.adjustments) {
    const bool reset = adjustment.mode == AdjustMode::reset, window = adjustment.group->params.is_window();
    if (reset) resets.push_back(adjustment.group->id);
    // A group may have had another algorithm before.
    if (window || (reset && windows())) in_windows.push_back(&adjustment);
    if (!window || reset) buckets.push_back(&adjustment);
    if (window && adjustment.mode == AdjustMode::give_back && !adjustment.stamp)
      gaps.push_back(adjustment.group->id);
  }
  if (!buckets.empty()) calls.push_back({&sql.adjust, adjust_params(buckets)});
  if (!in_windows.empty()) calls.push_back({&sql.adjust_windows, adjust_windows_params(in_windows)});
  if (!gaps.empty()) calls.push_back({&sql.close_gaps, {Param::text(array_of_text(gaps))}});
  if (!resets.empty() && leases()) calls.push_back({&sql.drop_leases, {Param::text(array_of_text(resets))}});
}

Call PgLimitStore::decide_call(LimitTrip& trip, const Layer& layer) {
  const LimitSql& sql = backend_.limit_sql();
  const bool together = is_together(*trip.lane);
  const bool any =
      std::any_of(layer.begin(), layer.end(), [](const Run& r) { return r.group->params.is_window(); });
  const bool with_windows = windows() && (any || together);
  Call call{together ? &sql.together : with_windows ? &sql.windows : &sql.slots, run_params(layer)};
  Holders& holders = holders_of(*trip.lane);
  trip.stated_from.push_back(trip.stated.size());
  ArrayWriter slots, held, holder, fresh, lease, freed, bundle, queued;
  for (const Run& run : layer) {
    bundle.add(static_cast<std::int64_t>(run.bundle));
    queued.add(last_queued(together && run.bundled >= 0 ? trip.plan.bundles[run.bundle].ops : run.ops));
    if (!run.group->params.has_concurrency()) {
      trip.stated.push_back(nullptr);
      slots.add_null();
      for (ArrayWriter* array : {&held, &holder, &fresh, &lease, &freed}) array->add(std::int64_t{0});
      continue;
    }
    Holding& holding = holders.of(run.group);
    holders.sent(holding);
    trip.stated.push_back(&holding);
    slots.add(run.group->params.max_concurrent);
    held.add(holding.sent_held);
    holder.add(static_cast<std::int64_t>(holding.id));
    fresh.add(static_cast<std::int64_t>(holding.fresh));
    lease.add(run.group->params.lease / kMicro);
    freed.add(holding.sent_freed);
  }
  call.params.push_back(slots.take());
  if (leases())
    for (ArrayWriter* array : {&held, &holder, &fresh, &lease}) call.params.push_back(array->take());
  else
    call.params.push_back(freed.take());
  if (waiters()) call.params.push_back(queued.take());
  if (with_windows) add_window_params(layer, call.params);
  if (together) call.params.push_back(bundle.take());
  if (leases()) call.params.push_back(Param::text(options_.holder));
  if (waiters()) {
    call.params.push_back(Param::text(std::to_string(me_)));
    call.params.push_back(Param::text(options_.channel));
  }
  return call;
}

// --- answers ------------------------------------------------------------------------------------

void PgLimitStore::answered(const TripPtr& trip, PipelineResult result) {
  if (!result.status.ok()) return failed(trip, result);
  Dealt dealt;
  for (std::size_t i = 0; i < trip->plan.layers.size(); ++i) {
    const Rows& rows = *result.results[trip->layer_call + i];
    if (is_together(*trip->lane))
      deal_together(*trip, i, rows, dealt);
    else
      deal_layer(*trip, trip->plan.layers[i], rows, dealt);
  }
  deal_sides(*trip, dealt);
  deal_peeks(*trip, result, dealt);
  trip->patience.renew();
  trip->lost_connections = 0;

  // Requests that were sent come before those that were not.
  trip->pending = std::move(dealt.again);
  trip->pending.insert(trip->pending.end(), trip->plan.later.begin(), trip->plan.later.end());
  trip->plan = TripPlan{};
  for (Holding* holding : dealt.touched) in_step(*holding);
  for (const Dealt::Lost& lost : dealt.lost) report_lost(lost.group, lost.holder, lost.slots);
  // The next statement leaves before the callers of this one are told: server and client overlap.
  // `trip` keeps the operations alive.
  start_round(trip);
  for (QueuedOp* op : dealt.acquires) op->all ? op->all->done() : op->acquire->done();
  for (QueuedOp* op : dealt.sides)
    if (op->side->done) op->side->done(store::Unit{});
  for (const auto& [op, peek] : dealt.peeks) op->side->peeked(peek);
}

RunAnswer PgLimitStore::read_answer(LimitTrip& trip, const Run& run, Holding* holding, const Rows& rows,
                                    int row, Dealt& dealt) {
  RunAnswer answer;
  answer.granted = rows.integer(row, 1);
  answer.ahead = rows.integer(row, 2);
  answer.stamp = rows.integer(row, 3);
  if (kind_of(*trip.lane) == Kind::rates) return answer;
  answer.may = rows.integer(row, 4);
  answer.free = rows.integer(row, 5);
  answer.lost = rows.boolean(row, 6);
  answer.wrote = rows.boolean(row, 7);
  if (run.group->params.is_window() && rows.columns() > 11) {
    answer.waits = integers(rows.text(row, 8));
    answer.retry = rows.integer(row, 9);
    answer.remaining = rows.integer(row, 10);
    answer.full_after = rows.integer(row, 11);
    if (answer.wrote) purge();
  }
  if (!holding) return answer;
  if (waiters()) {
    const std::int64_t queued =
        last_queued(is_together(*trip.lane) ? trip.plan.bundles[run.bundle].ops : run.ops);
    const bool waits = queued > answer.granted && answer.may > answer.granted && answer.free <= 0;
    if (waits || answer.granted > 0) remember(run.group, waits);
  }
  const store::HolderId before = holding->id;
  const std::int64_t lost =
      holders_of(*trip.lane).answered(*holding, answer.granted, answer.lost, answer.wrote, trip.sent);
  if (lost > 0) dealt.lost.push_back({run.group->id, before, lost});
  dealt.touched.push_back(holding);
  return answer;
}

// The statement answers for every run or fails as a whole.
void PgLimitStore::deal_together(LimitTrip& trip, std::size_t layer, const Rows& rows, Dealt& dealt) {
  const Layer& runs = trip.plan.layers[layer];
  std::vector<RunAnswer> answers(runs.size());
  std::vector<store::HolderId> holders(runs.size(), 0);
  for (int row = 0; row < rows.rows(); ++row) {
    const auto at = static_cast<std::size_t>(rows.integer(row, 0) - 1);
    if (at >= runs.size()) continue;
    Holding* const holding = trip.stated[trip.stated_from[layer] + at];
    answers[at] = read_answer(trip, runs[at], holding, rows, row, dealt);
    if (holding) holders[at] = holding->id;
  }
  for (const Bundle& bundle : trip.plan.bundles) {
    if (bundle.layer != layer) continue;
    for (std::size_t i = 0; i < bundle.ops.size(); ++i) {
      store::AcquireAllOp& op = *bundle.ops[i]->all;
      op.status = Status::success();
      op.granted = true;
      op.replies.clear();
      for (const store::Part& part : op.parts) {
        const auto run = std::lower_bound(runs.begin(), runs.end(), part.group->id,
                                          [](const Run& r, const std::string& id) { return r.id() < id; });
        const auto at = static_cast<std::size_t>(run - runs.begin());
        op.granted = op.granted && static_cast<std::int64_t>(i) < answers[at].granted;
        op.replies.push_back(deal_part(*run, answers[at], holders[at], static_cast<std::int64_t>(i)));
      }
      dealt.acquires.push_back(bundle.ops[i]);
    }
  }
}

void PgLimitStore::deal_layer(LimitTrip& trip, const Layer& layer, const Rows& rows, Dealt& dealt) {
  std::vector<const Run*> unanswered(layer.size(), nullptr);
  for (std::size_t i = 0; i < layer.size(); ++i) unanswered[i] = &layer[i];
  const bool rates = kind_of(*trip.lane) == Kind::rates, slots = has_slots(*trip.lane);
  std::unordered_set<std::string_view> inserted;
  for (int row = 0; row < rows.rows(); ++row) {
    if (rates && !rows.is_null(row, 5)) {
      inserted.insert(rows.text(row, 5));
      continue;
    }
    const auto at = static_cast<std::size_t>(rows.integer(row, 0) - 1);
    if (at >= layer.size() || !unanswered[at]) continue;
    const bool made_by_others =
        rates && !rows.boolean(row, 4) && rows.integer(row, 1) > 0 && !inserted.contains(layer[at].id());
    if (made_by_others) continue;
    const Run& run = *std::exchange(unanswered[at], nullptr);
    Holding* const holding = slots ? trip.stated[at] : nullptr;
    const RunAnswer answer = read_answer(trip, run, holding, rows, row, dealt);
    const store::HolderId holder = holding ? holding->id : 0;
    deal_run(run, answer, holder, trip.plan.now, dealt.acquires, dealt.again);
  }

  // Another process made the row first. Ask again, it can be locked now.
  bool lost_race = false;
  for (std::size_t i = 0; i < layer.size(); ++i) {
    if (!unanswered[i]) continue;
    lost_race = true;
    ++stats_.conflicts;
    count_conflict(*unanswered[i]);
    if (slots) {
      holders_.failed(*trip.stated[i], false, clock_.now());
      dealt.touched.push_back(trip.stated[i]);
    }
    if (trip.lost_races >= kLostRaces) {
      const Status status = Status::make(
          Code::server,
          formatted("the row of group '{}' changed {} times while it was decided on; is it being deleted "
                    "all the time?",
                    unanswered[i]->group->id, kLostRaces),
          "40001");
      for (QueuedOp* op : unanswered[i]->ops) {
        op->acquire->reply = {};
        op->acquire->reply.status = status;
        dealt.acquires.push_back(op);
      }
      continue;
    }
    dealt.again.insert(dealt.again.end(), unanswered[i]->ops.begin(), unanswered[i]->ops.end());
  }
  trip.lost_races = lost_race ? trip.lost_races + 1 : 0;
}

void PgLimitStore::deal_sides(LimitTrip& trip, Dealt& dealt) {
  for (const Adjustment& adjustment : trip.plan.adjustments) {
    dealt.sides.insert(dealt.sides.end(), adjustment.ops.begin(), adjustment.ops.end());
    if (adjustment.mode != AdjustMode::reset) continue;
    // Our own leases went with the others.
    for (Holders* holders : {&holders_, &holders_together_}) {
      Holding* holding = holders->find(adjustment.group->id);
      if (!holding || holding->flying) continue;
      const store::HolderId before = holding->id;
      const std::int64_t slots = holders->forget(*holding);
      holding->stated = 0;
      if (slots > 0) dealt.lost.push_back({adjustment.group->id, before, slots});
      dealt.touched.push_back(holding);
    }
  }
}

void PgLimitStore::deal_peeks(LimitTrip& trip, const PipelineResult& result, Dealt& dealt) {
  for (const bool window : {false, true}) {
    const OpList& peeks = window ? trip.plan.window_peeks : trip.plan.peeks;
    if (peeks.empty()) continue;
    const Rows& rows = *result.results[window ? trip.window_peek_call : trip.peek_call];
    for (int row = 0; row < rows.rows(); ++row) {
      const auto at = static_cast<std::size_t>(rows.integer(row, 0) - 1);
      if (at >= peeks.size()) continue;
      const limits::Params& params = peeks[at]->group->params;
      dealt.peeks.emplace_back(peeks[at],
                               window ? read_window_peek(params, rows, row)
                                      : read_peek(params, rows.integer(row, 1), rows.integer(row, 2)));
    }
  }
}

// --- failures -----------------------------------------------------------------------------------

// Everything of the round is pending again; what the server knows about slots is said anew.
void PgLimitStore::put_back(LimitTrip& trip, bool in_doubt) {
  std::erase(trip.stated, nullptr);
  for (Holding* holding : trip.stated) holders_of(*trip.lane).failed(*holding, in_doubt, clock_.now());
  for (Holding* holding : std::exchange(trip.stated, {})) in_step(*holding);
  trip.plan = TripPlan{};
}

void PgLimitStore::failed(const TripPtr& trip, const PipelineResult& result) {
  const Status& status = result.status;
  const bool in_doubt = status.code != Code::server && status.code != Code::unavailable;
  OpList asked = trip->plan.ops();
  const bool lost_race = status.code == Code::server && is_transient(status.sqlstate);
  if (lost_race && !trip->plan.layers.empty())
    for (const Run& run : trip->plan.layers.front()) count_conflict(run);
  OpList later = std::move(trip->plan.later);
  put_back(*trip, in_doubt);

  if (lost_race) {
    ++stats_.conflicts;
    if (trip->patience.lasts(status.sqlstate, clock_.now()))
      return retry_later(trip, trip->patience.refusals());
  } else if (status.code == Code::unavailable && ++trip->lost_connections <= 1) {
    return reconnect(trip);  // certainly not executed: an idle connection had died
  } else if (status.code == Code::server && is_row_fault(status.sqlstate) && asked.size() > 1) {
    trip->cut(asked, later);
    return start_round(trip);
  }

  trip->patience.renew();
  trip->lost_connections = 0;
  trip->pending = std::move(later);
  const Status told = status.code == Code::server ? backend_.explain(result) : status;
  start_round(trip);
  fail_all(asked, told);
}

}  // namespace ratesync::postgres
