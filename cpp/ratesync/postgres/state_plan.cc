#include "ratesync/postgres/state_plan.h"

#include <algorithm>
#include <limits>

namespace ratesync::postgres {

using store::StateOp;
using Verb = store::StateOp::Verb;
using Kind = StateStage::Kind;

namespace {

constexpr std::size_t kMaxStages = 64;
constexpr std::size_t kRowBytes = 100;  // of a row besides its key and value

Kind kind_of(const QueuedState& item) {
  if (item.batch || item.alone) return Kind::decide;
  switch (item.op->verb) {
    case Verb::get: return Kind::get;
    case Verb::create: return item.seen ? Kind::create_seen : Kind::create;
    case Verb::set: return item.op->ttl == store::kKeepTtl ? Kind::decide : Kind::set;
    case Verb::add: return item.op->renew && item.op->ttl != store::kKeepTtl ? Kind::add_renew : Kind::add;
    case Verb::swap:
    case Verb::remove:
    case Verb::touch: return Kind::modify;
    case Verb::schedule: return Kind::schedule;
    case Verb::unschedule: return Kind::unschedule;
  }
  return Kind::decide;
}

bool merges(StateLine& line, Kind kind, const QueuedState& item) {
  const StateOp& last = *line.last->op;
  const StateOp& op = *item.op;
  switch (kind) {
    case Kind::get: return true;
    case Kind::create:
    case Kind::create_seen: return true;  // the first wins, and the others see what it made
    case Kind::set: return true;          // as if one behind the other in one moment
    case Kind::add:
    case Kind::add_renew: {
      // Of one sign: when the sum of all fits, so does each on the way.
      std::int64_t sum = 0;
      if (op.ttl != last.ttl || (op.delta < 0) != (last.delta < 0)) return false;
      if (__builtin_add_overflow(line.delta, op.delta, &sum)) return false;
      line.delta = sum;
      return true;
    }
    case Kind::modify:
    case Kind::schedule:
    case Kind::unschedule:
    case Kind::decide: break;
  }
  return false;
}

struct Dealer {
  StateRound round;
  std::size_t bytes = 0;
  const std::size_t max_bytes;

  bool fits(const StateOp& op) {
    const std::size_t more = kRowBytes + op.key.size() + op.value.data.size();
    if (bytes > 0 && bytes + more > max_bytes) return false;
    bytes += more;
    return true;
  }
  StateStage* stage(Kind kind, unsigned cut) {
    for (StateStage& one : round.stages)
      if (one.kind == kind && one.cut == cut) return &one;
    if (round.stages.size() >= kMaxStages) return nullptr;
    round.stages.push_back({kind, cut, false, {}, {}, 0});
    return &round.stages.back();
  }
  bool joins(StateLine& line, Kind kind, const QueuedState& item) {
    return kind_of(item) == kind && item.cut == line.first->cut && merges(line, kind, item) &&
           (kind != Kind::set || fits(*item.op));
  }
};

bool before(const StateOp* a, const StateOp* b) {
  const int order = compare_keys(*a, *b);
  return order != 0 ? order < 0 : a->verb < b->verb;  // timeouts are another table
}

}  // namespace

int compare_keys(const StateOp& a, const StateOp& b) {
  if (a.space != b.space) {
    if (const int c = a.space->name_space.compare(b.space->name_space); c != 0) return c;
    if (const int c = a.space->tenant.compare(b.space->tenant); c != 0) return c;
  }
  if (const int c = a.kind.compare(b.kind); c != 0) return c;
  return a.key.compare(b.key);
}

StateRound plan_state(const StateItems& pending, std::size_t max_bytes) {
  Dealer dealer{{}, 0, max_bytes};
  std::vector<std::uint32_t> order;  // of single operations: by key, then by arrival
  std::vector<bool> later(pending.size(), false);
  order.reserve(pending.size());
  for (std::size_t i = 0; i < pending.size(); ++i) {
    QueuedState& item = *pending[i];
    item.next = nullptr;
    if (!item.batch) {
      order.push_back(static_cast<std::uint32_t>(i));
      continue;
    }
    StateStage* const stage = dealer.stage(Kind::decide, item.cut);
    if (!stage) {
      later[i] = true;
      continue;
    }
    for (StateOp* op : item.batch->ops)
      (void)dealer.fits(*op),
          stage->lines.push_back({&item, &item, 1, op, 0, static_cast<std::int64_t>(stage->items.size())});
    stage->items.push_back(&item);
  }
  std::sort(order.begin(), order.end(), [&pending](std::uint32_t a, std::uint32_t b) {
    const int c = compare_keys(*pending[a]->op, *pending[b]->op);
    return c != 0 ? c < 0 : a < b;
  });

  // Of the operations of one key the first makes a line; others join it until one cannot, which waits
  // with the rest.
  for (std::size_t at = 0, end = 0; at < order.size(); at = end) {
    QueuedState& first = *pending[order[at]];
    for (end = at + 1; end < order.size() && compare_keys(*first.op, *pending[order[end]]->op) == 0;) ++end;
    const Kind kind = kind_of(first);
    std::size_t joined = at;
    if (StateStage* const stage = dealer.fits(*first.op) ? dealer.stage(kind, first.cut) : nullptr) {
      StateLine line{&first, &first, 1, first.op, first.op->delta, 0};
      for (++joined; joined < end && dealer.joins(line, kind, *pending[order[joined]]); ++joined) {
        line.last->next = pending[order[joined]];
        line.last = line.last->next;
        ++line.count;
      }
      if (kind == Kind::decide) {
        line.group = static_cast<std::int64_t>(stage->items.size());
        stage->items.push_back(&first);
      }
      stage->lines.push_back(line);
    }
    for (; joined < end; ++joined) later[order[joined]] = true;
  }
  for (StateStage& stage : dealer.round.stages)
    if (stage.kind == Kind::decide)
      std::sort(stage.lines.begin(), stage.lines.end(),
                [](const StateLine& a, const StateLine& b) { return before(a.key, b.key); });
  for (std::size_t i = 0; i < pending.size(); ++i)
    if (later[i]) dealer.round.later.push_back(pending[i]);
  return std::move(dealer.round);
}

}  // namespace ratesync::postgres
