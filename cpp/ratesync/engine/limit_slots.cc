// Waiting for a concurrency slot, and the slots held.
#include <algorithm>
#include <utility>
#include <vector>

#include "ratesync/engine/limit_service.h"
#include "ratesync/memory/memory_store.h"

namespace ratesync::engine {

namespace {

constexpr Nanos kPollMin = 20 * kMilli;
constexpr Nanos kPollMax = 250 * kMilli;

}  // namespace

// --- waiting for a concurrency slot -------------------------------------------------------------

void LimitService::enqueue(AcquireTask* task) {
  GroupState& group = state_of(task->group);
  task->state_ = AcquireTask::State::waiting;
  auto place = group.waiters.end();
  while (place != group.waiters.begin() && (*std::prev(place))->order > task->order) --place;
  task->place_ = group.waiters.insert(place, task);
  ++waiting_;
  if (task->deadline != kForever) timers_.arm(*task, task->deadline);
  waiters_changed(group);
  if (group.waiters.size() == 1) {
    group.poll_delay = 0;
    plan_poll(group);
    // A slot may have been freed between the store's answer and this moment (memory only: there
    // the caller of release does not pass through this thread).
    if (!shared_) ask(group, 1);
  }
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
  if (shared_) return;
  auto& memory = static_cast<memory::MemoryStore&>(store_);
  memory.set_waiters(group.group->id, static_cast<std::int32_t>(group.waiters.size()));
}

void LimitService::ask(GroupState& group, std::size_t slots) {
  std::vector<AcquireTask*> chosen;
  for (AcquireTask* task : group.waiters) {
    if (chosen.size() >= slots) break;
    if (!task->asking_) chosen.push_back(task);
  }
  group.asking += chosen.size();
  // `group` may go away below: the memory store answers inside the call.
  for (AcquireTask* task : chosen) send(task);
}

void LimitService::plan_poll(GroupState& group) {
  // Across processes a slot may be freed without our hearing of it. Only the head of the queue
  // asks, for the whole process, at a growing, jittered interval.
  if (!shared_ || group.armed()) return;
  group.poll_delay = group.poll_delay == 0 ? kPollMin : std::min(2 * group.poll_delay, kPollMax);
  timers_.arm(group, timers_.now() + jittered(group.poll_delay));
}

void LimitService::poll(GroupState& group) {
  if (group.waiters.empty()) return;
  if (group.asking > 0) return plan_poll(group);
  const auto most = static_cast<std::size_t>(group.group->params.max_concurrent);
  ask(group, std::max<std::size_t>(1, std::min<std::size_t>(most, group.waiters.size())));
}

void LimitService::slot_freed(const std::string& id) {
  GroupState* group = find(id);
  if (!group || group->waiters.empty()) return;
  group->poll_delay = 0;
  if (shared_) return ask(*group, 1);
  // Answered inside the call. Whoever leaves refused, because the rate does not suit its deadline,
  // leaves the slot to those behind; so it goes on until the store says full.
  for (std::size_t before = group->waiters.size() + 1;
       group && !group->waiters.empty() && group->waiters.size() < before; group = find(id)) {
    before = group->waiters.size();
    ask(*group, 1);
  }
}

void LimitService::was_reset(const std::string& id) {
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
