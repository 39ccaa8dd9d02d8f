// Waiting for a concurrency slot, and the slots held.
#include <algorithm>
#include <utility>
#include <vector>

#include "ratesync/engine/limit_service.h"
#include "ratesync/engine/multi_service.h"
#include "ratesync/memory/memory_store.h"

namespace ratesync::engine {

namespace {

constexpr Nanos kPollMin = 20 * kMilli;
constexpr Nanos kPollMax = 250 * kMilli;
// While the store tells us: only in case a message was lost, and to stay remembered.
constexpr Nanos kPollPushed = kSecond;

}  // namespace

// --- waiting for a concurrency slot -------------------------------------------------------------

bool LimitService::somebody_waits(const std::string& id) const {
  const auto it = groups_.find(id);
  return it != groups_.end() && (!it->second->waiters.empty() || it->second->blocked > 0);
}

void LimitService::enqueue(AcquireTask* task) {
  GroupState& group = state_of(task->group);
  task->state_ = AcquireTask::State::waiting;
  auto place = group.waiters.end();
  while (place != group.waiters.begin() && (*std::prev(place))->order > task->order) --place;
  task->place_ = group.waiters.insert(place, task);
  ++waiting_;
  if (task->deadline != kForever) timers_.arm(*task, task->deadline);
  waiters_changed(group);
  if (group.waiters.size() > 1) return;
  plan_poll(group);
  // A slot may have been freed between the store's answer and this moment (memory only: there the caller
  // of release does not pass through this thread).
  if (!shared_) slot_freed(task->group->id);
}

void LimitService::leave_waiters(AcquireTask* task) {
  GroupState& group = state_of(task->group);
  timers_.cancel(*task);
  group.waiters.erase(task->place_);
  --waiting_;
  waiters_changed(group);
  if (!group.waiters.empty()) plan_poll(group);  // whoever is left must not depend on the one that left
  drop_if_idle(group);
}

void LimitService::waiters_changed(GroupState& group) {
  if (!shared_) {
    auto& memory = static_cast<memory::MemoryStore&>(store_);
    memory.set_waiters(group.group->id, static_cast<std::int32_t>(group.waiters.size() + group.blocked));
  } else if (group.remembered && group.waiters.empty() && group.lines.empty()) {
    group.remembered = false;
    limits().stop_waiting(group.group);
  }
}

void LimitService::forget_if_nobody(const std::string& id) {
  GroupState* group = find(id);
  if (!group) return;
  waiters_changed(*group);
  drop_if_idle(*group);
}

void LimitService::ask(AcquireTask* waiter) {
  ++state_of(waiter->group).asking;
  send(waiter);
}

void LimitService::plan_poll(GroupState& group) {
  // Across processes a slot may be freed without our hearing of it. Only the head of the queue asks, for
  // the whole process, at a growing, jittered interval; rarely, where the store tells us.
  if (!shared_ || group.armed()) return;
  group.poll_delay = group.poll_delay == 0 ? kPollMin : std::min(2 * group.poll_delay, kPollMax);
  timers_.arm(group, timers_.now() + jittered(limits().pushes() ? kPollPushed : group.poll_delay));
}

void LimitService::poll(GroupState& group) {
  const std::string id = group.group->id;
  if (group.asking == 0) {
    group.window = 0;
    offers_.push_back({id, 0, true});
    make_offers();
  }
  GroupState* left = find(id);
  if (left && (!left->waiters.empty() || !left->lines.empty())) plan_poll(*left);
}

void LimitService::ask_soon(const std::string& id) {
  GroupState* group = find(id);
  if (!group || !shared_ || closing_ || (group->waiters.empty() && group->lines.empty())) return;
  timers_.arm(*group, timers_.now() + jittered(kPollMin));
}

// --- offering slots -------------------------------------------------------------------------------

void LimitService::slot_freed(const std::string& id, bool more) {
  GroupState* group = find(id);
  if (!group || (group->waiters.empty() && group->lines.empty())) return;
  group->poll_delay = 0;
  offers_.push_back({id, 0, more});
  make_offers();
}

void LimitService::make_offers() {
  if (offering_) return;
  offering_ = true;
  while (!offers_.empty()) {
    const Offer offer = std::move(offers_.front());
    offers_.pop_front();
    make(offer);
  }
  offering_ = false;
}

void LimitService::make(const Offer& offer) {
  GroupState* group = find(offer.group);
  if (!group || closing_) return;
  if (shared_ && offer.more && group->window == 0) group->window = 1;
  const auto first = std::find_if(group->waiters.begin(), group->waiters.end(),
                                  [](const AcquireTask* task) { return !task->asking_; });
  const auto line = group->lines.upper_bound(offer.after);
  const bool single = first != group->waiters.end();
  if (line != group->lines.end() && (!single || line->first < (*first)->order)) {
    const std::uint64_t order = line->first;
    // Whoever cannot use it now, because another of its limits is still full or not due, leaves it to
    // those behind.
    if (!multi_->offered(*line->second, offer.more)) offers_.push_back({offer.group, order, offer.more});
    return;
  }
  if (!single) return;
  if (shared_) return ask(*first);
  // Answered inside the call. Whoever leaves refused, because the rate does not suit its deadline,
  // leaves the slot to those behind; so it goes on until the store says full.
  const std::size_t before = group->waiters.size();
  ask(*first);
  group = find(offer.group);
  if (group && group->waiters.size() < before) offers_.push_back({offer.group, 0, false});
}

// Slow start: after the release of somebody else, nobody knows how many slots are free.
bool LimitService::granted_one(const std::string& id) {
  GroupState* group = find(id);
  if (!group || group->window == 0) return false;
  group->window = std::min<std::size_t>(2 * group->window, kMaxWindow);
  const std::size_t waiting = group->waiters.size() + group->lines.size();
  const std::size_t most = std::min(group->window, waiting);
  for (std::size_t asking = group->asking; asking < most; ++asking) offers_.push_back({id, 0, true});
  make_offers();
  return true;
}

void LimitService::refused_one(const std::string& id) {
  if (GroupState* group = find(id)) group->window = 0;
}

// --- lines of calls for several limits ------------------------------------------------------------

void LimitService::stand(const store::GroupRef& ref, Stand& place) {
  GroupState& group = state_of(ref);
  group.lines[place.order] = &place;
  if (!place.freed) ++group.blocked;
  waiters_changed(group);
  plan_poll(group);
}

void LimitService::set_freed(Stand& place, bool freed) {
  if (place.freed == freed) return;
  place.freed = freed;
  GroupState* group = find(place.group->id);
  if (!group) return;
  freed ? --group->blocked : ++group->blocked;
  waiters_changed(*group);
}

void LimitService::move(Stand& place, std::uint64_t order) {
  GroupState* group = find(place.group->id);
  if (!group || place.order == order) return;
  group->lines.erase(place.order);
  place.order = order;
  group->lines[order] = &place;
}

void LimitService::leave(Stand& place) {
  GroupState* group = find(place.group->id);
  if (!group) return;
  group->lines.erase(place.order);
  if (!place.freed) --group->blocked;
  waiters_changed(*group);
  drop_if_idle(*group);
}

void LimitService::was_reset(const std::string& id) {
  if (multi_) multi_->was_reset(*this, id);
  GroupState* group = find(id);
  if (!group) return;
  // Their slots were dealt from what is forgotten now; who comes anew must not overtake them.
  std::vector<AcquireTask*> sleepers;
  for (const SleeperRun& run : group->runs)
    sleepers.insert(sleepers.end(), run.sleepers.begin(), run.sleepers.end());
  group->runs.clear();
  group->refunded = {};
  waiting_ -= sleepers.size();
  set_alarm(*group);
  for (AcquireTask* task : sleepers) {
    task->state_ = AcquireTask::State::created;
    task->charged_rate = false;
    if (task->permit) let_go(std::exchange(task->permit, nullptr));
    task->reply = {};
    send(task);
  }
  slot_freed(id);
}

// --- slots held ---------------------------------------------------------------------------------

void LimitService::release(const PermitRef& permit) {
  if (!permit->live) return;
  const store::GroupRef group = permit->group;
  let_go(permit);
  slot_freed(group->id);
}

void LimitService::let_go(const PermitRef& permit) {
  permit->live = false;
  timers_.cancel(*permit);
  permit->limiter->counters.held.fetch_sub(1, std::memory_order_relaxed);
  if (GroupState* group = find(permit->group->id)) {
    const PermitRef keep = permit;  // `permit` may be the list's
    group->permits.erase(keep->place);
    drop_if_idle(*group);
  }
  limits().release(permit->group, permit->holder);
}

void LimitService::expire(Permit& permit) {
  GroupState* group = find(permit.group->id);
  if (!group) return;
  for (const PermitRef& held : group->permits) {
    if (held.get() != &permit) continue;
    const PermitRef keep = held;
    keep->lost.store(true, std::memory_order_release);
    add(keep->limiter->counters.leases_lost);
    return release(keep);
  }
}

void LimitService::lost(const std::string& id, store::HolderId holder) {
  GroupState* group = find(id);
  if (!group) return;
  for (auto it = group->permits.begin(); it != group->permits.end();) {
    const PermitRef permit = *it;
    if (permit->holder != holder) {
      ++it;
      continue;
    }
    it = group->permits.erase(it);
    permit->live = false;
    permit->lost.store(true, std::memory_order_release);
    timers_.cancel(*permit);
    add(permit->limiter->counters.leases_lost);
    permit->limiter->counters.held.fetch_sub(1, std::memory_order_relaxed);
  }
  drop_if_idle(*group);
}

}  // namespace ratesync::engine
