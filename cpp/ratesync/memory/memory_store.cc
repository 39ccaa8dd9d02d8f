#include "ratesync/memory/memory_store.h"

#include <algorithm>

namespace ratesync::memory {

using store::Verdict;

namespace {

// No deal and no charge reaches further ahead than this (63 years), whatever is asked for: the sums
// stay far from overflow, where a limit would turn into none.
constexpr Nanos kMaxAhead = 2 * limits::kMaxHorizon;

bool give_slot_back(Cell& cell, store::HolderId holder) {
  if (holder != cell.epoch || cell.active == 0) return false;  // forgotten by a reset
  --cell.active;
  ++cell.version;
  return cell.waiters > 0;
}

}  // namespace

QuickReply MemoryStore::try_now(const store::Group& group, std::int64_t cost) {
  Shard& shard = shard_of(group.id);
  const Nanos now = clock_.now();
  const std::lock_guard lock(shard.mutex);
  return decide_now(cell_of(shard, group.id), group, cost, now);
}

Cell& MemoryStore::cell_of(Shard& shard, std::string_view group) {
  if (auto it = shard.cells.find(group); it != shard.cells.end()) return it->second;
  if (shard.cells.size() >= shard.sweep_at) {
    const Nanos now = clock_.now();
    std::erase_if(shard.cells, [now](const auto& entry) {
      const Cell& cell = entry.second;
      return cell.tat <= now && cell.active == 0 && cell.waiters == 0 && cell.pins == 0;
    });
    // Looking again only after the survivors have doubled keeps the sweep O(1) per insertion.
    shard.sweep_at = std::max<std::size_t>(1024, 2 * shard.cells.size());
  }
  Cell& cell = shard.cells.emplace(std::string(group), Cell{}).first->second;
  cell.epoch = epoch_.load(std::memory_order_relaxed);
  return cell;
}

bool MemoryStore::release_slot(Shard& shard, Cell& cell, store::HolderId holder) {
  const std::lock_guard lock(shard.mutex);
  return give_slot_back(cell, holder);
}

bool MemoryStore::release_slot(std::string_view group, store::HolderId holder) {
  Shard& shard = shard_of(group);
  const std::lock_guard lock(shard.mutex);
  auto it = shard.cells.find(group);
  return it != shard.cells.end() && give_slot_back(it->second, holder);
}

Pin MemoryStore::pin(const std::string& group) {
  Shard& shard = shard_of(group);
  const std::lock_guard lock(shard.mutex);
  Cell& cell = cell_of(shard, group);
  ++cell.pins;
  return Pin(&shard, &cell);
}

void MemoryStore::set_waiters(const std::string& group, std::int32_t waiters) {
  Shard& shard = shard_of(group);
  const std::lock_guard lock(shard.mutex);
  cell_of(shard, group).waiters = waiters;
}

std::size_t MemoryStore::cells() {
  std::size_t total = 0;
  for (Shard& shard : shards_) {
    const std::lock_guard lock(shard.mutex);
    total += shard.cells.size();
  }
  return total;
}

store::Capabilities MemoryStore::capabilities() const {
  store::Capabilities caps;
  caps.limits = true;
  return caps;
}

void MemoryStore::doctor(store::Callback<std::vector<store::Finding>> done) {
  done(std::vector<store::Finding>{
      {store::Finding::Level::ok, "memory", "embedded store of this process: nothing to set up"}});
}

void MemoryStore::acquire(store::AcquireOp* op) {
  const limits::Params& params = op->group->params;
  store::AcquireReply reply;
  {
    Shard& shard = shard_of(op->group->id);
    const Nanos now = clock_.now();
    const std::lock_guard lock(shard.mutex);
    Cell& cell = cell_of(shard, op->group->id);
    if (params.has_concurrency() && cell.active >= params.max_concurrent) {
      reply.verdict = Verdict::concurrency_full;
    } else if (params.has_rate()) {
      const Nanos max_wait = std::clamp<Nanos>(op->deadline - now, 0, kMaxAhead);
      const limits::Deal dealt = limits::deal(params, cell.tat, now, 1, op->cost, max_wait);
      if (dealt.granted == 0) {
        reply.verdict = Verdict::rate_limited;
        reply.retry_after = dealt.retry_after;
      } else {
        cell.tat = dealt.tat;
        reply.wait = dealt.first_wait;
        reply.stamp = dealt.tat;
        reply.remaining = limits::available(params, cell.tat, now);
        reply.full_after = std::max<Nanos>(0, cell.tat - now);
      }
    }
    if (reply.verdict == Verdict::granted) {
      if (params.has_concurrency()) {
        ++cell.active;
        reply.holder = cell.epoch;
        if (!params.has_rate()) reply.remaining = params.max_concurrent - cell.active;
      }
      ++cell.version;
    }
  }
  op->reply = std::move(reply);
  op->done();
}

std::int64_t MemoryStore::refund(const store::GroupRef& group, std::int64_t cost, std::int64_t stamp) {
  if (!group->params.has_rate()) return stamp;
  Shard& shard = shard_of(group->id);
  const std::lock_guard lock(shard.mutex);
  auto it = shard.cells.find(group->id);
  if (it == shard.cells.end() || it->second.tat != stamp) return stamp;
  it->second.tat -= limits::span(group->params, cost);
  ++it->second.version;
  return it->second.tat;
}

void MemoryStore::settle(const store::GroupRef& group, std::int64_t delta,
                         store::Callback<store::Unit> done) {
  if (group->params.has_rate() && delta != 0) {
    Shard& shard = shard_of(group->id);
    const Nanos now = clock_.now();
    const std::lock_guard lock(shard.mutex);
    Cell& cell = cell_of(shard, group->id);
    const Nanos shift = limits::span(group->params, std::abs(delta));
    // Down to the past at most: units that were never charged cannot be saved up.
    cell.tat = delta > 0 ? std::min(std::max(cell.tat, now) + shift, now + kMaxAhead)
                         : std::max<Nanos>(cell.tat - shift, 0);
    ++cell.version;
  }
  done(store::Unit{});
}

void MemoryStore::peek(const store::GroupRef& group, store::Callback<store::Peek> done) {
  const limits::Params& params = group->params;
  store::Peek out;
  {
    Shard& shard = shard_of(group->id);
    const Nanos now = clock_.now();
    const std::lock_guard lock(shard.mutex);
    auto it = shard.cells.find(group->id);
    const Cell cell = it == shard.cells.end() ? Cell{} : it->second;
    out.in_use = cell.active;
    if (params.has_rate()) {
      out.available = limits::available(params, cell.tat, now);
      out.full_after = std::max<Nanos>(0, cell.tat - now);
      out.retry_after = limits::deal(params, cell.tat, now, 1, 1, 0).retry_after;
    }
    if (!params.has_rate()) out.available = std::max<std::int64_t>(0, params.max_concurrent - cell.active);
  }
  done(out);
}

void MemoryStore::reset(const store::GroupRef& group, store::Callback<store::Unit> done) {
  {
    Shard& shard = shard_of(group->id);
    const std::lock_guard lock(shard.mutex);
    if (auto it = shard.cells.find(group->id); it != shard.cells.end()) {
      it->second.tat = 0;
      it->second.active = 0;
      it->second.epoch = epoch_.fetch_add(1, std::memory_order_relaxed) + 1;
      ++it->second.version;
    }
  }
  done(store::Unit{});
}

void MemoryStore::list(std::size_t limit, store::Callback<store::Listing> done) {
  store::Listing out;
  const Nanos now = clock_.now();
  for (Shard& shard : shards_) {
    const std::lock_guard lock(shard.mutex);
    for (const auto& [id, cell] : shard.cells) {
      if (out.groups.size() >= limit) {
        out.truncated = true;
        break;
      }
      out.groups.push_back({id, cell.tat - now, cell.version, cell.active});
      if (cell.active > 0) out.holders.push_back({id, "this process", cell.active, 0, kForever});
    }
  }
  done(std::move(out));
}

}  // namespace ratesync::memory
