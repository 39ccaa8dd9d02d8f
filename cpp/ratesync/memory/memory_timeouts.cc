#include "ratesync/memory/memory_timeouts.h"

#include <algorithm>
#include <limits>

namespace ratesync::memory {

void Timeouts::schedule(const store::Space& space, const std::string& kind, std::string_view key,
                        std::int64_t due) {
  Queue& queue = spaces_[{space.name_space, space.tenant}][kind];
  auto it = queue.all.find(key);
  if (it == queue.all.end()) {
    it = queue.all.emplace(std::string(key), Timeout{}).first;
  } else {
    queue.line.erase({it->second.next, it->first});
  }
  it->second = {due, due, 0};
  queue.line.emplace(due, it->first);
}

const Timeouts::Timeout* Timeouts::find(const store::Space& space, const std::string& kind,
                                        std::string_view key) const {
  const auto kinds = spaces_.find({space.name_space, space.tenant});
  if (kinds == spaces_.end()) return nullptr;
  const auto queue = kinds->second.find(kind);
  if (queue == kinds->second.end()) return nullptr;
  const auto it = queue->second.all.find(key);
  return it == queue->second.all.end() ? nullptr : &it->second;
}

std::pair<Timeouts::Outcome, std::int64_t> Timeouts::judge(const store::Space& space, const std::string& kind,
                                                           std::string_view key,
                                                           std::int64_t expected) const {
  const Timeout* timeout = find(space, kind, key);
  if (!timeout) return {Outcome::absent, 0};
  if (expected > 0 && timeout->claim != expected) return {Outcome::stale, timeout->claim};
  return {Outcome::done, timeout->claim};
}

void Timeouts::unschedule(const store::Space& space, const std::string& kind, std::string_view key) {
  const auto kinds = spaces_.find({space.name_space, space.tenant});
  if (kinds == spaces_.end()) return;
  const auto queue = kinds->second.find(kind);
  if (queue == kinds->second.end()) return;
  const auto it = queue->second.all.find(key);
  if (it == queue->second.all.end()) return;
  queue->second.line.erase({it->second.next, it->first});
  queue->second.all.erase(it);
  if (queue->second.all.empty()) kinds->second.erase(queue);
  if (kinds->second.empty()) spaces_.erase(kinds);
}

std::vector<store::DueKey> Timeouts::claim_due(const store::Space& space, const std::string& kind,
                                               std::size_t limit, std::int64_t lease, std::int64_t now) {
  std::vector<store::DueKey> out;
  const auto kinds = spaces_.find({space.name_space, space.tenant});
  if (kinds == spaces_.end()) return out;
  // The lines of all kinds asked for, the one whose head is the oldest first.
  std::set<std::pair<std::int64_t, Kinds::iterator::value_type*>> heads;
  const auto enter = [&](Kinds::value_type& entry) {
    if (const std::int64_t next = entry.second.line.begin()->first; next <= now) heads.emplace(next, &entry);
  };
  for (auto& entry : kinds->second)
    if (kind.empty() || entry.first == kind) enter(entry);
  const std::int64_t again = now + std::min(lease, std::numeric_limits<std::int64_t>::max() - now);
  while (out.size() < limit && !heads.empty()) {
    auto head = heads.extract(heads.begin());
    auto& [name, queue] = *head.value().second;
    auto place = queue.line.extract(queue.line.begin());
    Timeout& timeout = queue.all.find(place.value().second)->second;
    timeout.claim = ++claims_;
    timeout.next = again;
    out.push_back({name, std::string(place.value().second), timeout.due, timeout.claim});
    place.value().first = again;
    queue.line.insert(std::move(place));
    enter(*head.value().second);
  }
  return out;
}

std::size_t Timeouts::size() const {
  std::size_t total = 0;
  for (const auto& [space, kinds] : spaces_)
    for (const auto& [kind, queue] : kinds) total += queue.all.size();
  return total;
}

}  // namespace ratesync::memory
