#include "ratesync/memory/memory_store.h"

#include <algorithm>

namespace ratesync::memory {

namespace {

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
    std::erase_if(shard.cells, [now](const auto& entry) { return entry.second.idle(now); });
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
  caps.state = true;
  caps.locks = true;
  return caps;
}

namespace {

// The longest prefix that the other stores take.
Status check_prefix(const std::string& prefix) {
  if (prefix.size() <= 40 && prefix.find('\0') == std::string::npos) return Status::success();
  return Status::make(Code::invalid, "the prefix must have at most 40 bytes, and no NUL among them");
}

}  // namespace

Result<store::StateStore*> MemoryStore::state(const std::string& prefix) {
  if (Status status = check_prefix(prefix); !status.ok()) return status;
  const std::lock_guard lock(prefixes_mutex_);
  return &states_.try_emplace(prefix, clock_).first->second;
}

Result<store::LockStore*> MemoryStore::locks(const std::string& prefix) {
  if (Status status = check_prefix(prefix); !status.ok()) return status;
  const std::lock_guard lock(prefixes_mutex_);
  return &locks_.try_emplace(prefix, clock_).first->second;
}

void MemoryStore::doctor(store::Callback<std::vector<store::Finding>> done) {
  done(std::vector<store::Finding>{
      {store::Finding::Level::ok, "memory", "embedded store of this process: nothing to set up"}});
}

void MemoryStore::reset(const store::GroupRef& group, store::Callback<store::Unit> done) {
  {
    Shard& shard = shard_of(group->id);
    const std::lock_guard lock(shard.mutex);
    if (auto it = shard.cells.find(group->id); it != shard.cells.end()) {
      it->second.tat = 0;
      it->second.window.reset();
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
      Nanos last = cell.tat;
      if (cell.window) last = std::max(last, cell.window->state.last() - clock_.wall(0));
      out.groups.push_back({id, last - now, cell.version, cell.active});
      if (cell.active > 0) out.holders.push_back({id, "this process", cell.active, 0, kForever});
    }
  }
  done(std::move(out));
}

}  // namespace ratesync::memory
