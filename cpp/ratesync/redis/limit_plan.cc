// Sorting operations into a call, and writing the call down.
#include "ratesync/redis/limit_plan.h"

#include <algorithm>

#include "ratesync/base/format.h"
#include "ratesync/limits/micro_rate.h"

namespace ratesync::redis {
namespace {

using limits::MicroRate;
using Kind = QueuedOp::Kind;

// Nothing is dealt further ahead than this (63 years): sums stay exact in Lua's doubles.
constexpr std::int64_t kFarthest = 2'000'000'000'000'000;
constexpr std::int64_t kMostUnits = 1LL << 52;

Nanos patience_of(const store::AcquireOp& op, Nanos now) {
  return op.deadline == kForever ? kForever : std::max<Nanos>(0, op.deadline - now);
}

// Deadlines of requests that came one after another differ a little; asking for the smallest of a run is
// cheap, and who is refused for it is asked again.
bool share_patience(Nanos a, Nanos b) {
  if (a == kForever || b == kForever) return a == b;
  return std::abs(a - b) <= std::max(kMilli, std::min(a, b) / 100);
}

void add_acquire(LimitCall& call, std::size_t group, std::size_t first_run, QueuedOp op, OpList& left) {
  const store::AcquireOp& request = *op.acquire;
  const Nanos patience = patience_of(request, call.now);
  if (!op.exact) {
    for (std::size_t i = first_run; i < call.runs.size(); ++i) {
      Run& run = call.runs[i];
      if (run.exact || run.cost != request.cost || !share_patience(run.patience, patience)) continue;
      run.patience = std::min(run.patience, patience);
      run.queued |= request.queued;
      run.ops.push_back(std::move(op));
      return;
    }
  }
  if (call.runs.size() - first_run >= kMaxRuns) return left.push_back(std::move(op));
  Run run{group, request.cost, patience, op.exact, request.queued, {}};
  run.ops.push_back(std::move(op));
  call.runs.push_back(std::move(run));
}

void add_adjustment(LimitCall& call, std::size_t group, QueuedOp op) {
  const limits::Params& params = op.group->params;
  const bool refund = op.kind == Kind::refund;
  std::int64_t units = std::clamp(op.side->units, -kMostUnits, kMostUnits);
  if (!params.is_window()) {
    const std::int64_t us = std::min(MicroRate(params).span(std::abs(units)), kFarthest);
    units = units < 0 ? -us : us;
  }
  if (!call.adjustments.empty()) {
    Adjustment& sum = call.adjustments.back();
    // Refunds follow each other: the second names the state that the first will leave behind. What is
    // charged and what is given back are not one sum: below nothing there is nothing.
    const bool follows = refund ? op.side->stamp == sum.stamp - sum.units : (units < 0) == (sum.units < 0);
    if (sum.group == group && sum.refund == refund && follows &&
        std::abs(sum.units + units) <= std::min(kMostUnits, kFarthest)) {
      sum.units += units;
      sum.ops.push_back(std::move(op));
      return;
    }
  }
  Adjustment adjustment{group, refund, units, op.side->stamp, {}};
  adjustment.ops.push_back(std::move(op));
  call.adjustments.push_back(std::move(adjustment));
}

// Who was refused and asks again is older than those who came meanwhile: of the acquires, the earliest
// arrival goes first. All else keeps its place.
void sort_by_arrival(OpList& pending) {
  std::vector<std::size_t> places;
  bool sorted = true;
  for (std::size_t i = 0; i < pending.size(); ++i) {
    if (pending[i].kind != Kind::acquire) continue;
    if (!places.empty() && pending[i].acquire->order < pending[places.back()].acquire->order) sorted = false;
    places.push_back(i);
  }
  if (sorted) return;
  OpList acquires;
  for (const std::size_t place : places) acquires.push_back(std::move(pending[place]));
  std::stable_sort(acquires.begin(), acquires.end(),
                   [](const QueuedOp& a, const QueuedOp& b) { return a.acquire->order < b.acquire->order; });
  for (std::size_t i = 0; i < places.size(); ++i) pending[places[i]] = std::move(acquires[i]);
}

void add(Command& command, double value) { command.add(formatted("{}", value)); }

std::int64_t room_of(const limits::Params& params, Nanos patience) {
  const std::int64_t us = std::min(patience == kForever ? kFarthest : patience / kMicro, kFarthest);
  return us + MicroRate(params).margin;
}

void add_group(Command& command, const CallGroup& declared) {
  const store::Group& group = *declared.group;
  const limits::Params& params = group.params;
  const MicroRate rate(params);
  if (!declared.rate) {
    command.add("-").add("0").add("0");
  } else if (params.is_window()) {
    command.add(std::string(1, kind_of(params.algorithm))).add(params.limit).add(params.window / kMicro);
  } else {
    command.add("t").add(rate.burst_span);
    add(command, rate.interval);
  }
  command.add(declared.holding ? params.max_concurrent : 0);
  if (!declared.holding) return;
  command.add(group.id)
      .add(declared.holding->sent_held)
      .add(std::to_string(declared.holding->id))
      .add(std::to_string(declared.holding->fresh))
      .add(params.lease / kMicro);
}

Command quick_arguments(const LimitCall& call, const Keys& keys) {
  Command out(std::to_string(call.runs.size()));
  std::string key;
  std::size_t latest = kNew;
  for (const Run& run : call.runs) {
    if (run.group != latest) key = keys.of(call.groups[run.group].group->id, 't');
    latest = run.group;
    out.add(key);
  }
  out.add("rates");
  for (const Run& run : call.runs) {
    const limits::Params& params = call.groups[run.group].group->params;
    const MicroRate rate(params);
    out.add(static_cast<std::int64_t>(run.ops.size()));
    add(out, rate.interval * static_cast<double>(run.cost));
    out.add(room_of(params, run.patience) + rate.burst_span);
  }
  return out;
}

void add_all(Command& command, const LimitCall& call, const AllParts& all) {
  command.add("all").add(all.op->queued ? "1" : "0").add(static_cast<std::int64_t>(all.groups.size()));
  for (std::size_t i = 0; i < all.groups.size(); ++i) {
    const std::size_t group = all.groups[i];
    command.add(static_cast<std::int64_t>(group + 1)).add(all.op->parts[i].cost);
    command.add(room_of(call.groups[group].group->params, 0));
  }
}

}  // namespace

bool same_limit(const store::GroupRef& a, const store::GroupRef& b) {
  if (a == b) return true;
  const limits::Params &p = a->params, &q = b->params;
  return p.algorithm == q.algorithm && p.rate_per_second == q.rate_per_second && p.burst == q.burst &&
         p.limit == q.limit && p.window == q.window && p.max_concurrent == q.max_concurrent &&
         p.timing_margin == q.timing_margin && p.lease == q.lease;
}

bool LimitCall::quick() const {
  return !runs.empty() && steps() == runs.size() && restatements.empty() &&
         std::none_of(groups.begin(), groups.end(), [](const CallGroup& g) {
           return g.group->params.is_window() || g.group->params.has_concurrency();
         });
}

OpList LimitCall::take_ops() {
  OpList out;
  const auto take = [&out](OpList& from) {
    for (QueuedOp& op : from) out.push_back(std::move(op));
    from.clear();
  };
  for (Adjustment& adjustment : adjustments) take(adjustment.ops);
  for (auto& [group, op] : leaves) out.push_back(std::move(op));
  for (Run& run : runs) take(run.ops);
  for (auto& [group, op] : peeks) out.push_back(std::move(op));
  take(restatements);
  take(resets);
  return out;
}

std::size_t declare(LimitCall& call, const store::GroupRef& group) {
  call.groups.push_back({group, nullptr, false});
  return call.groups.size() - 1;
}

void plan_limit(LimitCall& call, std::size_t group, OpList& pending, Nanos now) {
  call.now = now;
  std::erase_if(pending, [](const QueuedOp& op) { return op.kind == Kind::none; });
  if (pending.empty()) return;
  // A reset takes our own lease away as well: what we hold is known only after it.
  const bool reset =
      std::any_of(pending.begin(), pending.end(), [](const QueuedOp& op) { return op.kind == Kind::reset; });
  OpList left;
  if (reset) {
    for (QueuedOp& op : pending)
      (op.kind == Kind::reset && group == kNew ? call.resets : left).push_back(std::move(op));
    pending = std::move(left);
    return;
  }
  sort_by_arrival(pending);
  if (group == kNew) group = declare(call, pending.front().group);
  const std::size_t first_run = call.runs.size();
  CallGroup& declared = call.groups[group];
  std::size_t requests = 0;
  for (QueuedOp& op : pending) {
    if (!same_limit(op.group, declared.group) || (op.kind == Kind::acquire && ++requests > kMaxRequests)) {
      left.push_back(std::move(op));
      continue;
    }
    declared.rate |= op.kind != Kind::restate && op.kind != Kind::leave && op.group->params.has_rate();
    switch (op.kind) {
      case Kind::acquire: add_acquire(call, group, first_run, std::move(op), left); break;
      case Kind::restate: call.restatements.push_back(std::move(op)); break;
      case Kind::refund:
      case Kind::settle: add_adjustment(call, group, std::move(op)); break;
      case Kind::peek: call.peeks.emplace_back(group, std::move(op)); break;
      case Kind::leave: call.leaves.emplace_back(group, std::move(op)); break;
      case Kind::reset:
      case Kind::none: break;
    }
  }
  pending = std::move(left);
}

std::string key_of(const LimitCall& call, const Keys& keys) {
  const std::string& id = call.groups.empty() ? call.resets.front().group->id : call.groups.front().group->id;
  return keys.of(id, 't');
}

Command call_arguments(const LimitCall& call, const Keys& keys, const Speaker& speaker) {
  if (call.quick()) return quick_arguments(call, keys);
  std::vector<std::string> names;
  for (const CallGroup& group : call.groups) {
    if (group.rate) names.push_back(keys.rate(group.group->id, group.group->params.algorithm));
    if (group.holding) names.push_back(keys.slots(group.group->id));
  }
  for (const QueuedOp& reset : call.resets)
    for (const char kind : std::string_view("tfcws")) names.push_back(keys.of(reset.group->id, kind));

  Command out(std::to_string(names.size()));
  for (const std::string& name : names) out.add(name);
  out.add("steps").add(speaker.who).add(speaker.process).add(keys.channels());
  out.add(speaker.counted ? "1" : "0").add(speaker.hears ? "1" : "0");
  out.add(static_cast<std::int64_t>(call.groups.size()));
  for (const CallGroup& group : call.groups) add_group(out, group);

  const auto place = [&out](const char* step, std::size_t group) -> Command& {
    return out.add(step).add(static_cast<std::int64_t>(group + 1));
  };
  for (const Adjustment& adjustment : call.adjustments) {
    place(adjustment.refund ? "refund" : "settle", adjustment.group).add(adjustment.units);
    if (adjustment.refund) out.add(adjustment.stamp);
  }
  for (const auto& [group, op] : call.leaves) place("leave", group);
  for (const AllParts& all : call.alls) add_all(out, call, all);
  for (const Run& run : call.runs) {
    place("acquire", run.group).add(static_cast<std::int64_t>(run.ops.size())).add(run.cost);
    out.add(room_of(call.groups[run.group].group->params, run.patience)).add(run.queued ? "1" : "0");
  }
  for (const auto& [group, op] : call.peeks) place("peek", group);
  for (const QueuedOp& reset : call.resets) out.add("reset").add(reset.group->id);
  return out;
}

}  // namespace ratesync::redis
