#include "ratesync/postgres/limit_plan.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <unordered_map>

namespace ratesync::postgres {
namespace {

using store::AcquireReply;
using store::Verdict;

Nanos patience_of(const store::AcquireOp& op, Nanos now) {
  return op.deadline == kForever ? kForever : std::max<Nanos>(0, op.deadline - now);
}

// Deadlines of requests that came one after another differ a little; asking for the smallest of a
// run is cheap, and who is refused for it is asked again.
bool share_patience(Nanos a, Nanos b) {
  if (a == kForever || b == kForever) return a == b;
  return std::abs(a - b) <= std::max(kMilli, std::min(a, b) / 100);
}

// Rows written by hand may lie further ahead than nanoseconds reach.
Nanos nanos(std::int64_t micros) { return micros > kForever / kMicro ? kForever : micros * kMicro; }

struct GroupPlan {
  std::vector<Run> runs;
  std::optional<Adjustment> adjustment;
};

bool add_acquire(GroupPlan& plan, QueuedOp* op, Nanos now, std::size_t max_layers) {
  const store::AcquireOp& request = *op->acquire;
  const Nanos patience = patience_of(request, now);
  if (!op->exact) {
    for (Run& run : plan.runs) {
      if (run.exact) continue;
      if (run.ops.empty()) {  // a restatement: takes requests along
        run.group = request.group;
        run.cost = request.cost;
        run.patience = patience;
      } else if (run.cost != request.cost || !same_limit(run.group, request.group) ||
                 !share_patience(run.patience, patience)) {
        continue;
      }
      run.patience = std::min(run.patience, patience);
      run.ops.push_back(op);
      return true;
    }
  }
  if (plan.runs.size() >= max_layers) return false;
  plan.runs.push_back(Run{request.group, request.cost, patience, op->exact, {op}});
  return true;
}

bool add_adjustment(GroupPlan& plan, QueuedOp* op) {
  const MicroRate rate(op->group->params);
  const std::int64_t units = op->side->units;
  const AdjustMode mode = op->kind == QueuedOp::Kind::reset                 ? AdjustMode::reset
                          : op->kind == QueuedOp::Kind::settle && units > 0 ? AdjustMode::charge
                                                                            : AdjustMode::give_back;
  const bool window = op->group->params.is_window();
  const std::int64_t shift = window ? std::abs(units) : rate.span(std::abs(units));
  std::optional<std::int64_t> stamp;
  if (op->kind == QueuedOp::Kind::refund) stamp = op->side->stamp;
  if (!plan.adjustment) {
    plan.adjustment = Adjustment{op->group, mode, shift, stamp, {op}};
    return true;
  }
  Adjustment& sum = *plan.adjustment;
  if (sum.mode != mode || sum.stamp.has_value() != stamp.has_value() ||
      sum.group->params.algorithm != op->group->params.algorithm)
    return false;
  // Refunds follow each other: the second names the state that the first will leave behind.
  if (stamp && *stamp != *sum.stamp - sum.shift) return false;
  sum.shift += shift;
  sum.ops.push_back(op);
  return true;
}

}  // namespace

bool same_limit(const store::GroupRef& a, const store::GroupRef& b) {
  if (a == b) return true;
  const limits::Params &p = a->params, &q = b->params;
  return p.algorithm == q.algorithm && p.limit == q.limit && p.window == q.window &&
         p.rate_per_second == q.rate_per_second && p.burst == q.burst &&
         p.max_concurrent == q.max_concurrent && p.timing_margin == q.timing_margin && p.lease == q.lease;
}

namespace {

// Who was refused and asks again is older than those who came meanwhile: of the acquires, the
// earliest arrival goes first. All else keeps its place.
OpList in_order_of_arrival(const OpList& pending) {
  OpList acquires;
  bool sorted = true;
  for (QueuedOp* op : pending) {
    if (op->kind != QueuedOp::Kind::acquire) continue;
    if (!acquires.empty() && op->acquire->order < acquires.back()->acquire->order) sorted = false;
    acquires.push_back(op);
  }
  OpList out = pending;
  if (sorted) return out;
  std::stable_sort(acquires.begin(), acquires.end(), [](const QueuedOp* a, const QueuedOp* b) {
    return a->acquire->order < b->acquire->order;
  });
  auto next = acquires.begin();
  for (QueuedOp*& op : out)
    if (op->kind == QueuedOp::Kind::acquire) op = *next++;
  return out;
}

}  // namespace

TripPlan plan_trip(const OpList& pending, Nanos now, std::size_t max_layers) {
  TripPlan out;
  out.now = now;
  std::unordered_map<std::string_view, std::size_t> index;
  std::vector<GroupPlan> groups;
  std::vector<std::string_view> ids;
  const store::Group* latest = nullptr;  // a hot group does not pay for the look-up
  std::size_t at = 0;
  for (QueuedOp* op : in_order_of_arrival(pending)) {
    if (op->kind == QueuedOp::Kind::peek) {
      (op->group->params.is_window() ? out.window_peeks : out.peeks).push_back(op);
      continue;
    }
    if (op->group.get() != latest) {
      latest = op->group.get();
      const auto [it, fresh] = index.try_emplace(latest->id, groups.size());
      at = it->second;
      if (fresh) {
        groups.emplace_back();
        ids.push_back(latest->id);
      }
    }
    GroupPlan& group = groups[at];
    bool placed = true;
    switch (op->kind) {
      case QueuedOp::Kind::acquire: placed = add_acquire(group, op, now, max_layers); break;
      case QueuedOp::Kind::restate:
        if (group.runs.empty()) group.runs.push_back(Run{op->group, 1, kForever, false, {}});
        break;
      case QueuedOp::Kind::refund:
      case QueuedOp::Kind::settle:
      case QueuedOp::Kind::reset: placed = add_adjustment(group, op); break;
      case QueuedOp::Kind::unwait:
        // Those who asked before were remembered for it; those who ask later are not meant.
        placed = group.runs.empty();
        if (placed) out.unwaits.push_back(op);
        break;
      case QueuedOp::Kind::acquire_all:
      case QueuedOp::Kind::peek: break;
    }
    if (!placed) out.later.push_back(op);
  }

  std::vector<std::size_t> order(groups.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return ids[a] < ids[b]; });
  for (const std::size_t i : order) {
    GroupPlan& group = groups[i];
    if (group.adjustment && group.adjustment->mode == AdjustMode::reset) {
      // A reset takes our own lease away as well: what we hold is known only after it.
      for (Run& run : group.runs) out.later.insert(out.later.end(), run.ops.begin(), run.ops.end());
      group.runs.clear();
    }
    if (group.adjustment) out.adjustments.push_back(std::move(*group.adjustment));
    if (out.layers.size() < group.runs.size()) out.layers.resize(group.runs.size());
    for (std::size_t layer = 0; layer < group.runs.size(); ++layer)
      out.layers[layer].push_back(std::move(group.runs[layer]));
  }
  return out;
}

std::vector<std::string_view> TripPlan::groups() const {
  std::vector<std::string_view> out;
  for (const Adjustment& adjustment : adjustments) out.push_back(adjustment.group->id);
  for (const Layer& layer : layers)
    for (const Run& run : layer) out.push_back(run.id());
  for (const QueuedOp* op : unwaits) out.push_back(op->group->id);
  std::sort(out.begin(), out.end());
  out.erase(std::unique(out.begin(), out.end()), out.end());
  return out;
}

OpList TripPlan::ops() const {
  OpList out;
  for (const Adjustment& adjustment : adjustments)
    out.insert(out.end(), adjustment.ops.begin(), adjustment.ops.end());
  for (const Layer& layer : layers)
    for (const Run& run : layer) out.insert(out.end(), run.ops.begin(), run.ops.end());
  for (const Bundle& bundle : bundles) out.insert(out.end(), bundle.ops.begin(), bundle.ops.end());
  out.insert(out.end(), peeks.begin(), peeks.end());
  out.insert(out.end(), window_peeks.begin(), window_peeks.end());
  out.insert(out.end(), unwaits.begin(), unwaits.end());
  return out;
}

void deal_run(const Run& run, const RunAnswer& answer, store::HolderId holder, Nanos planned_at, OpList& done,
              OpList& again) {
  const limits::Params& params = run.group->params;
  const bool window = params.is_window();
  const MicroRate rate(params);
  const std::int64_t granted =
      std::min<std::int64_t>(answer.granted, static_cast<std::int64_t>(run.ops.size()));
  const std::int64_t ahead =
      rate.interval > 0 && granted > 0 ? answer.ahead + rate.span(granted * run.cost) : answer.ahead;
  const bool full = params.has_concurrency() && granted < std::min<std::int64_t>(answer.may, run.ops.size());

  const std::int64_t remaining = window              ? answer.remaining
                                 : params.has_rate() ? rate.available(ahead)
                                                     : std::max<std::int64_t>(0, answer.free);
  for (std::int64_t i = 0; i < granted; ++i) {
    AcquireReply& reply = run.ops[i]->acquire->reply;
    reply = AcquireReply{};
    reply.remaining = remaining;
    reply.holder = params.has_concurrency() ? holder : 0;
    if (params.has_rate()) {
      reply.stamp = answer.stamp;
      reply.full_after = nanos(window ? answer.full_after : ahead);
    }
    if (window) {
      const auto at = static_cast<std::size_t>(i);
      reply.wait = at < answer.waits.size() ? nanos(answer.waits[at]) : 0;
    } else if (params.has_rate()) {
      const std::int64_t wait = answer.ahead + rate.span((i + 1) * run.cost) - rate.burst_span;
      reply.wait = wait <= rate.margin ? 0 : nanos(wait);
    }
    done.push_back(run.ops[i]);
  }

  const std::int64_t slot = ahead + rate.span(run.cost) - rate.burst_span;
  const Nanos retry_after = window ? nanos(answer.retry) : slot > rate.margin ? nanos(slot - rate.margin) : 0;
  for (std::size_t i = static_cast<std::size_t>(granted); i < run.ops.size(); ++i) {
    QueuedOp* op = run.ops[i];
    const Nanos patience = patience_of(*op->acquire, planned_at);
    if (!full && patience > run.patience && retry_after <= patience) {
      op->exact = true;
      again.push_back(op);
      continue;
    }
    AcquireReply& reply = op->acquire->reply;
    reply = AcquireReply{};
    reply.verdict = full ? Verdict::concurrency_full : Verdict::rate_limited;
    reply.retry_after = full ? 0 : retry_after;
    reply.remaining = full ? 0 : remaining;
    done.push_back(op);
  }
}

store::Peek read_peek(const limits::Params& params, std::int64_t ahead, std::int64_t in_use) {
  store::Peek out;
  out.in_use = in_use;
  if (params.has_rate()) {
    const MicroRate rate(params);
    out.available = rate.available(ahead);
    out.full_after = nanos(ahead);
    const std::int64_t slot = ahead + rate.step - rate.burst_span;
    out.retry_after = slot > rate.margin ? nanos(slot - rate.margin) : 0;
  }
  if (params.has_concurrency()) {
    const std::int64_t free = std::max<std::int64_t>(0, params.max_concurrent - in_use);
    out.available = params.has_rate() ? std::min(out.available, free) : free;
  }
  return out;
}

store::Peek read_window_peek(const limits::Params& params, const Rows& rows, int row) {
  store::Peek out;
  out.retry_after = nanos(rows.integer(row, 1));
  out.available = rows.integer(row, 2);
  out.full_after = nanos(rows.integer(row, 3));
  out.in_use = rows.integer(row, 4);
  out.used = std::max<std::int64_t>(0, params.limit - out.available);
  if (params.has_concurrency())
    out.available = std::min(out.available, std::max<std::int64_t>(0, params.max_concurrent - out.in_use));
  return out;
}

}  // namespace ratesync::postgres
