// Several limits in one step: look at all cells, then charge all or none, with every shard concerned
// locked in the order of their addresses.
#include <algorithm>
#include <mutex>

#include "ratesync/memory/memory_store.h"

namespace ratesync::memory {

bool MemoryStore::decide_all(const std::vector<store::Part>& parts, bool overtakes,
                             std::vector<store::AcquireReply>* replies) {
  std::vector<Shard*> shards;
  shards.reserve(parts.size());
  for (const store::Part& part : parts) shards.push_back(&shard_of(part.group->id));
  std::sort(shards.begin(), shards.end());
  shards.erase(std::unique(shards.begin(), shards.end()), shards.end());
  std::vector<std::unique_lock<SpinLock>> locks;
  locks.reserve(shards.size());
  for (Shard* shard : shards) locks.emplace_back(shard->mutex);
  const Nanos now = clock_.now();
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
    replies->push_back(refusal(cell, *part.group, part.cost, now, overtakes));
    granted &= replies->back().verdict == store::Verdict::granted;
  }
  for (std::size_t i = 0; granted && i < parts.size(); ++i)
    (*replies)[i] = decide(*cells[i], *parts[i].group, parts[i].cost, now, 0);
  return granted;
}

void MemoryStore::acquire_all(store::AcquireAllOp* op) {
  op->granted = decide_all(op->parts, true, &op->replies);
  op->done();
}

}  // namespace ratesync::memory
