// Several limits in one step: look at all cells, then charge all or none, with every shard concerned
// locked in the order of their addresses.
#include <algorithm>
#include <mutex>

#include "ratesync/memory/memory_store.h"

namespace ratesync::memory {

using store::Verdict;

namespace {

// What the part would be answered now; charges nothing.
store::AcquireReply look(const Cell& cell, const store::Part& part, Nanos now, bool overtakes) {
  const limits::Params& params = part.group->params;
  store::AcquireReply reply;
  if (params.has_concurrency() &&
      (cell.active >= params.max_concurrent || (!overtakes && cell.waiters > 0))) {
    reply.verdict = Verdict::concurrency_full;
  } else if (params.has_rate()) {
    const limits::Deal dealt = limits::deal(params, cell.tat, now, 1, part.cost, 0);
    if (dealt.granted == 0) {
      reply.verdict = Verdict::rate_limited;
      reply.retry_after = dealt.retry_after;
    } else {
      reply.stamp = dealt.tat;
    }
  }
  return reply;
}

void charge(Cell& cell, const store::Part& part, Nanos now, store::AcquireReply* reply) {
  const limits::Params& params = part.group->params;
  if (params.has_rate()) {
    cell.tat = reply->stamp;
    reply->remaining = limits::available(params, cell.tat, now);
    reply->full_after = std::max<Nanos>(0, cell.tat - now);
  }
  if (params.has_concurrency()) {
    ++cell.active;
    reply->holder = cell.epoch;
    if (!params.has_rate()) reply->remaining = params.max_concurrent - cell.active;
  }
  ++cell.version;
}

}  // namespace

bool MemoryStore::decide_all(const std::vector<store::Part>& parts, bool overtakes,
                             std::vector<store::AcquireReply>* replies) {
  std::vector<Shard*> shards;
  shards.reserve(parts.size());
  for (const store::Part& part : parts) shards.push_back(&shard_of(part.group->id));
  std::sort(shards.begin(), shards.end());
  shards.erase(std::unique(shards.begin(), shards.end()), shards.end());
  const Nanos now = clock_.now();
  std::vector<std::unique_lock<SpinLock>> locks;
  locks.reserve(shards.size());
  for (Shard* shard : shards) locks.emplace_back(shard->mutex);
  std::vector<Cell*> cells;
  cells.reserve(parts.size());
  replies->clear();
  bool granted = true;
  // Made first: making one may sweep idle ones away, never those that were just made or looked at below.
  for (const store::Part& part : parts) ++cell_of(shard_of(part.group->id), part.group->id).pins;
  for (const store::Part& part : parts) {
    Cell& cell = cell_of(shard_of(part.group->id), part.group->id);
    --cell.pins;
    cells.push_back(&cell);
    replies->push_back(look(cell, part, now, overtakes));
    granted &= replies->back().verdict == Verdict::granted;
  }
  for (std::size_t i = 0; i < parts.size(); ++i) {
    if (granted) {
      charge(*cells[i], parts[i], now, &(*replies)[i]);
    } else {
      (*replies)[i].stamp = 0;
    }
  }
  return granted;
}

void MemoryStore::acquire_all(store::AcquireAllOp* op) {
  op->granted = decide_all(op->parts, true, &op->replies);
  op->done();
}

}  // namespace ratesync::memory
