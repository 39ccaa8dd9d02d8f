#include "ratesync/memory/memory_locks.h"

#include <algorithm>
#include <tuple>
#include <utility>

namespace ratesync::memory {

using Verb = store::LockOp::Verb;
using Outcome = store::LockReply::Outcome;

namespace {

constexpr const char* kHolder = "this process";

Nanos later(Nanos now, std::int64_t ttl_ms) {
  return ttl_ms > (kForever - now) / kMilli ? kForever : now + ttl_ms * kMilli;
}

// Rounded up: who waits that long finds it expired.
std::int64_t ms_until(Nanos then, Nanos now) {
  const Nanos left = then - now;
  return left > 0 ? left / kMilli + (left % kMilli > 0 ? 1 : 0) : left / kMilli;
}

}  // namespace

std::size_t MemoryLocks::Hash::operator()(const NameView& n) const {
  std::size_t hash = 0;
  for (const std::string_view part : {n.name_space, n.tenant, n.name})
    hash = (hash ^ std::hash<std::string_view>{}(part)) * 0x9fb21c651e98df25ull;
  return hash ^ (hash >> 32);
}

MemoryLocks::Entry& MemoryLocks::entry_of(Shard& shard, const NameView& name, Nanos now) {
  if (auto it = shard.locks.find(name); it != shard.locks.end()) return it->second;
  if (shard.locks.size() >= shard.sweep_at) {
    std::erase_if(shard.locks, [now](const auto& entry) {
      return !entry.second.awaited && entry.second.expires <= now - kGrace;
    });
    // Looking again only after the survivors have doubled keeps the sweep O(1) per insertion.
    shard.sweep_at = std::max<std::size_t>(1024, 2 * shard.locks.size());
  }
  Name own{std::string(name.name_space), std::string(name.tenant), std::string(name.name)};
  return shard.locks.emplace(std::move(own), Entry{}).first->second;
}

void MemoryLocks::acquire(Shard& shard, store::LockOp& op, const NameView& name, Nanos now) {
  Entry& entry = entry_of(shard, name, now);
  const bool again = entry.held(now) && op.id != 0 && entry.id == op.id;
  if (entry.held(now) && !again) {
    entry.awaited |= op.queued;
    op.reply.outcome = Outcome::taken;
    op.reply.token = entry.token;
    op.reply.remaining = ms_until(entry.expires, now);
    op.reply.holder = kHolder;
    return;
  }
  if (!again) {
    entry.token = tokens_.fetch_add(1, std::memory_order_relaxed) + 1;
    entry.id = op.id;
    entry.since = now;
  }
  entry.expires = later(now, op.ttl);
  op.reply.outcome = Outcome::held;
  op.reply.token = entry.token;
  op.reply.remaining = op.ttl;
}

bool MemoryLocks::free(Shard& shard, store::LockOp& op, const NameView& name, Nanos now) {
  const auto it = shard.locks.find(name);
  const bool any = op.verb == Verb::break_ && op.token == 0;
  if (it == shard.locks.end() || it->second.token == 0 || (!any && it->second.token != op.token))
    return false;
  Entry& entry = it->second;
  op.reply.outcome = entry.held(now) ? Outcome::held : Outcome::lost;
  op.reply.token = entry.token;
  if (!entry.awaited) {
    shard.locks.erase(it);
    return false;
  }
  entry.token = entry.id = 0;
  entry.expires = now;
  return true;
}

void MemoryLocks::decide(store::LockOp& op) {
  op.reply = {};
  // No other process sees this store: there is nobody to tell, or to be told by.
  if (op.verb == Verb::stand || op.verb == Verb::ring) return;
  const NameView name(*op.space, op.name);
  Shard& shard = shard_of(name);
  bool freed = false;
  op.reply.outcome = Outcome::lost;
  {
    const std::lock_guard lock(shard.mutex);
    const Nanos now = clock_.now();
    if (op.verb == Verb::acquire) {
      acquire(shard, op, name, now);
    } else if (op.verb != Verb::renew) {
      freed = free(shard, op, name, now);
    } else if (const auto it = shard.locks.find(name);
               it != shard.locks.end() && op.token != 0 && it->second.token == op.token) {
      it->second.expires = later(now, op.ttl);
      op.reply.outcome = Outcome::held;
      op.reply.token = op.token;
      op.reply.remaining = op.ttl;
    }
  }
  if (!freed) return;
  std::shared_ptr<const Listener> listener;
  {
    const std::lock_guard lock(listener_mutex_);
    listener = listener_;
  }
  if (listener && *listener) (*listener)(*op.space, op.name);
}

void MemoryLocks::list(const store::SpaceRef& space, std::size_t limit,
                       store::Callback<std::vector<store::LockInfo>> done) {
  std::vector<store::LockInfo> out;
  for (Shard& shard : shards_) {
    const std::lock_guard lock(shard.mutex);
    const Nanos now = clock_.now();
    for (const auto& [name, entry] : shard.locks) {
      if (entry.token == 0) continue;
      if (space && (space->name_space != name.name_space || space->tenant != name.tenant)) continue;
      out.push_back({name.name_space, name.tenant, name.name, entry.token, kHolder,
                     (now - entry.since) / kMilli, ms_until(entry.expires, now), entry.awaited ? 1 : 0});
    }
  }
  const auto order = [](const store::LockInfo& a, const store::LockInfo& b) {
    return std::tie(a.name_space, a.tenant, a.name) < std::tie(b.name_space, b.tenant, b.name);
  };
  const std::size_t count = std::min(limit, out.size());
  std::partial_sort(out.begin(), out.begin() + static_cast<std::ptrdiff_t>(count), out.end(), order);
  out.resize(count);
  done(std::move(out));
}

void MemoryLocks::stop_waiting(const store::SpaceRef& space, const std::string& name) {
  const NameView view(*space, name);
  Shard& shard = shard_of(view);
  const std::lock_guard lock(shard.mutex);
  const auto it = shard.locks.find(view);
  if (it == shard.locks.end()) return;
  it->second.awaited = false;
  if (it->second.token == 0) shard.locks.erase(it);
}

void MemoryLocks::on_freed(std::function<void(const store::Space&, const std::string&)> listener) {
  auto shared = std::make_shared<const Listener>(std::move(listener));
  const std::lock_guard lock(listener_mutex_);
  listener_ = std::move(shared);
}

std::size_t MemoryLocks::kept() {
  std::size_t total = 0;
  for (Shard& shard : shards_) {
    const std::lock_guard lock(shard.mutex);
    total += shard.locks.size();
  }
  return total;
}

}  // namespace ratesync::memory
