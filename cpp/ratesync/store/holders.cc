#include "ratesync/store/holders.h"

#include <algorithm>

namespace ratesync::store {

Holding* Holders::find(const std::string& group) {
  const auto it = all_.find(group);
  return it == all_.end() ? nullptr : &it->second;
}

Holding& Holders::of(const GroupRef& group) {
  const auto [it, fresh] = all_.try_emplace(group->id);
  Holding& holding = it->second;
  if (fresh) {
    holding.id = random_id();
    holding.fresh = random_id();
  }
  holding.group = group;  // the newest parameters
  return holding;
}

Holding* Holders::release(const std::string& group, HolderId holder) {
  Holding* holding = find(group);
  if (!holding || holding->id != holder || holding->held == 0) return nullptr;
  --holding->held;
  ++holding->freed;
  return holding;
}

void Holders::sent(Holding& holding) {
  holding.flying = true;
  ++holding.changes;
  holding.sent_held = holding.held;
  holding.sent_freed = holding.freed;
}

std::int64_t Holders::answered(Holding& holding, std::int64_t granted, bool lost, bool wrote, Nanos sent_at) {
  holding.flying = false;
  ++holding.changes;
  holding.unstated_since = kForever;
  std::int64_t gone = 0;
  if (lost) {
    gone = forget(holding);
    holding.stated = 0;
  } else {
    holding.freed -= holding.sent_freed;
    holding.stated = holding.sent_held;
  }
  holding.held += granted;
  holding.stated += granted;
  if (wrote && holding.stated > 0) holding.renewed = sent_at;
  return gone;
}

void Holders::failed(Holding& holding, bool in_doubt, Nanos now) {
  holding.flying = false;
  ++holding.changes;
  if (in_doubt) {
    holding.stated = Holding::kUnknown;
    // Without leases the count is a sum: given back twice would let too many in, never told only
    // keeps a slot until `reset`.
    holding.freed -= holding.sent_freed;
  }
  if (holding.unstated_since == kForever) holding.unstated_since = now;
}

std::int64_t Holders::forget(Holding& holding) {
  holding.id = holding.fresh;
  holding.fresh = random_id();
  holding.freed = 0;
  return std::exchange(holding.held, 0);
}

void Holders::tidy(Holding& holding) {
  if (holding.held > 0 || holding.flying || holding.queued || !holding.in_step()) return;
  const std::string id = holding.group->id;
  all_.erase(id);
}

Holders::Due Holders::due(Nanos now, Nanos retry, bool leases) {
  Due out;
  const auto at = [&out](Nanos when) { out.next = std::min(out.next, when); };
  for (auto& [id, holding] : all_) {
    const Nanos lease = holding.group->params.lease;
    if (leases && holding.held > 0) {
      const Nanos renew_at = holding.renewed + lease / 3;
      if (now >= holding.renewed + lease) {
        out.lost.push_back(&holding);
        continue;
      }
      if (now >= renew_at) {
        out.renew.push_back(&holding);
        at(std::min(now + std::min(retry, lease / 10), holding.renewed + lease));
      } else {
        at(renew_at);
      }
    }
    if (!holding.in_step() && !holding.flying && !holding.queued) {
      // After a whole lease the server has forgotten it anyway.
      if (leases && holding.held == 0 && holding.unstated_since != kForever &&
          now - holding.unstated_since > lease + kSecond) {
        holding.stated = 0;
        holding.freed = 0;
        holding.unstated_since = kForever;
      } else {
        out.restate.push_back(&holding);
        at(now + retry);
      }
    }
  }
  return out;
}

}  // namespace ratesync::store
