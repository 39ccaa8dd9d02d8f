// Acquisitions of several limits at once: who travels with whom, and what each is told.
#include <algorithm>
#include <string>
#include <unordered_map>

#include "ratesync/postgres/limit_plan.h"

namespace ratesync::postgres {
namespace {

using store::Part;
using store::Verdict;

bool same_parts(const store::AcquireAllOp& a, const store::AcquireAllOp& b) {
  if (a.parts.size() != b.parts.size()) return false;
  return std::all_of(a.parts.begin(), a.parts.end(), [&b](const Part& part) {
    return std::any_of(b.parts.begin(), b.parts.end(), [&part](const Part& other) {
      return part.group->id == other.group->id && part.cost == other.cost &&
             same_limit(part.group, other.group);
    });
  });
}

class Planner {
 public:
  Planner(TripPlan* out, std::size_t max_layers) : out_(*out), max_layers_(max_layers) {}

  void add(QueuedOp* op) {
    const store::AcquireAllOp& request = *op->all;
    std::size_t layer = 0;
    const Use* newest = nullptr;
    bool joins = true, closed = false;
    for (const Part& part : request.parts) {
      const auto found = used_.find(part.group->id);
      if (found == used_.end()) {
        joins = false;
        continue;
      }
      const Use& use = found->second;
      closed = closed || use.closed || part.group->params.has_concurrency();
      layer = std::max(layer, use.layer + 1);
      joins = joins && !use.closed && (!newest || newest->bundle == use.bundle);
      newest = &use;
    }
    if (joins && newest && same_parts(*out_.bundles[newest->bundle].ops.front()->all, request)) {
      out_.bundles[newest->bundle].ops.push_back(op);
      return;
    }
    if (closed || layer >= max_layers_) {
      // Those behind it that want the same limits wait as well: first come, first served.
      for (const Part& part : request.parts) used_[part.group->id].closed = true;
      out_.later.push_back(op);
      return;
    }
    if (out_.layers.size() <= layer) out_.layers.resize(layer + 1);
    const std::size_t bundle = out_.bundles.size();
    out_.bundles.push_back(Bundle{{op}, layer});
    for (const Part& part : request.parts) {
      used_[part.group->id] = Use{layer, bundle, false};
      out_.layers[layer].push_back(Run{part.group, part.cost, 0, false, {}, 0, bundle});
    }
  }

  // Slots that are not stated by a bundle anyway.
  void restate(const store::GroupRef& group) {
    if (used_.contains(group->id)) return;
    if (out_.layers.empty()) out_.layers.resize(1);
    used_[group->id] = Use{0, out_.bundles.size(), true};
    out_.layers.front().push_back(Run{group, 1, 0, false, {}, 0, out_.bundles.size()});
    out_.bundles.push_back(Bundle{});
  }

 private:
  struct Use {
    std::size_t layer = 0;
    std::size_t bundle = 0;
    bool closed = false;  // nobody else in this trip
  };
  TripPlan& out_;
  const std::size_t max_layers_;
  std::unordered_map<std::string, Use> used_;
};

}  // namespace

TripPlan plan_together(const OpList& pending, Nanos now, std::size_t max_layers) {
  TripPlan out;
  out.now = now;
  Planner planner(&out, max_layers);
  for (QueuedOp* op : pending)
    if (op->kind == QueuedOp::Kind::acquire_all) planner.add(op);
  for (QueuedOp* op : pending)
    if (op->kind == QueuedOp::Kind::restate) planner.restate(op->group);
  for (Layer& layer : out.layers) {
    std::sort(layer.begin(), layer.end(), [](const Run& a, const Run& b) { return a.id() < b.id(); });
    for (Run& run : layer) run.bundled = static_cast<std::int64_t>(out.bundles[run.bundle].ops.size());
  }
  return out;
}

store::AcquireReply deal_part(const Run& run, const RunAnswer& answer, store::HolderId holder,
                              std::int64_t i) {
  const limits::Params& params = run.group->params;
  const MicroRate rate(params);
  const bool window = params.is_window();
  const std::int64_t ahead = rate.interval > 0 && answer.granted > 0
                                 ? answer.ahead + rate.span(answer.granted * run.cost)
                                 : answer.ahead;
  store::AcquireReply reply;
  reply.remaining = window              ? answer.remaining
                    : params.has_rate() ? rate.available(ahead)
                                        : std::max<std::int64_t>(0, answer.free);
  if (i < answer.granted) {
    reply.holder = params.has_concurrency() ? holder : 0;
    if (params.has_rate()) {
      reply.stamp = answer.stamp;
      reply.full_after = (window ? answer.full_after : ahead) * kMicro;
    }
    return reply;
  }
  // What would the next one have got?
  if (answer.may <= answer.granted) {
    const std::int64_t slot = ahead + rate.span(run.cost) - rate.burst_span - rate.margin;
    reply.verdict = Verdict::rate_limited;
    reply.retry_after = std::max<std::int64_t>(0, window ? answer.retry : slot) * kMicro;
  } else if (params.has_concurrency() && answer.free <= 0) {
    reply.verdict = Verdict::concurrency_full;
    reply.remaining = 0;
  }
  return reply;
}

}  // namespace ratesync::postgres
