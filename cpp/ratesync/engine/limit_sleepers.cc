// Waiting for a rate slot's time, and giving slots back that nobody wants.
#include <algorithm>
#include <utility>
#include <vector>

#include "ratesync/engine/limit_service.h"

namespace ratesync::engine {

// --- waiting for a rate slot --------------------------------------------------------------------

void LimitService::sleep(AcquireTask* task, Nanos until) {
  GroupState& group = state_of(task->group);
  // Usually the last run goes on. A slot before its last one (units were given back meanwhile) stays
  // with this task, whose deadline may not allow a later one.
  auto run = group.runs.empty() ? group.runs.end() : std::prev(group.runs.end());
  // Dealt later is never earlier; it only seems so when it took the answer before longer to get here.
  if (run != group.runs.end() && run->cost == task->cost && run->slots.back().stamp <= task->stamp &&
      run->slots.back().at <= task->deadline)
    until = std::max(until, run->slots.back().at);
  if (run == group.runs.end() || run->cost != task->cost || run->slots.back().at > until)
    run = group.runs.insert(group.runs.end(), SleeperRun{task->cost, {}, {}});
  task->state_ = AcquireTask::State::sleeping;
  task->run_ = run;
  task->place_ = run->sleepers.insert(run->sleepers.end(), task);
  run->slots.push_back({until, task->stamp});
  ++waiting_;
  if (until < group.alarm_at) set_alarm(group);
}

void LimitService::set_alarm(GroupState& group) {
  Nanos earliest = kForever;
  for (const SleeperRun& run : group.runs) earliest = std::min(earliest, run.slots.front().at);
  if (earliest == group.alarm_at) return;
  group.alarm_at = earliest;
  if (earliest == kForever) return timers_.cancel(group.alarm);
  timers_.arm(group.alarm, earliest);
}

void LimitService::due(GroupState& group) {
  const Nanos now = timers_.now();
  group.alarm_at = kForever;
  std::vector<AcquireTask*> ready;
  for (auto run = group.runs.begin(); run != group.runs.end();) {
    while (!run->slots.empty() && run->slots.front().at <= now) {
      AcquireTask* task = run->sleepers.front();
      task->stamp = run->slots.front().stamp;
      ready.push_back(task);
      run->sleepers.pop_front();
      run->slots.pop_front();
    }
    run = run->slots.empty() ? group.runs.erase(run) : std::next(run);
  }
  waiting_ -= ready.size();
  set_alarm(group);
  drop_if_idle(group);
  for (AcquireTask* task : ready) finish(task, Outcome::granted);
}

void LimitService::leave_sleepers(AcquireTask* task) {
  GroupState& group = state_of(task->group);
  SleeperRun& run = *task->run_;
  const RateSlot last = run.slots.back();
  run.slots.pop_back();
  run.sleepers.erase(task->place_);
  --waiting_;
  if (run.slots.empty()) {
    group.runs.erase(task->run_);
    set_alarm(group);
  }
  pass_on(task->group, task->cost, last);  // may wake others, and `group` go with them
  if (GroupState* left = find(task->group->id)) drop_if_idle(*left);
}

// A slot whose owner does not want it goes to the next sleeper of the same cost, and so on; the last
// one goes back to the store.
void LimitService::pass_on(const store::GroupRef& ref, std::int64_t cost, RateSlot slot) {
  GroupState* group = find(ref->id);
  const Nanos now = timers_.now();
  // Used much later than dealt, it would come on top of the slots that follow it.
  if (!group || slot.at < now - ref->pace.margin) return refund(ref, cost, slot.stamp);
  for (SleeperRun& run : group->runs) {
    if (run.slots.back().at <= slot.at) continue;
    if (run.cost != cost) break;
    const auto place = std::upper_bound(run.slots.begin(), run.slots.end(), slot.at,
                                        [](Nanos at, const RateSlot& other) { return at < other.at; });
    run.slots.insert(place, slot);
    slot = run.slots.back();
    run.slots.pop_back();
    if (run.slots.front().at < group->alarm_at) set_alarm(*group);
  }
  refund(ref, cost, slot.stamp);
  if (group->alarm_at <= now) due(*group);
}

void LimitService::refund(const store::GroupRef& ref, std::int64_t cost, std::int64_t stamp) {
  GroupState* group = find(ref->id);
  const std::int64_t asked = group && group->refunded.from == stamp ? group->refunded.to : stamp;
  const std::int64_t left = limits().refund(ref, cost, asked);
  if (group && left != asked) group->refunded = {stamp, left};
}

// --- giving back --------------------------------------------------------------------------------

void LimitService::return_grant(AcquireTask* task) {
  if (task->group->params.has_rate())
    pass_on(task->group, task->cost, {saturating_add(timers_.now(), task->reply.wait), task->reply.stamp});
  if (task->reply.holder != 0) {
    limits().release(task->group, task->reply.holder);
    slot_freed(task->group->id);
  }
}

void LimitService::give_back(const store::GroupRef& group, std::int64_t cost, bool charged, RateSlot slot,
                             const PermitRef& permit) {
  if (charged) pass_on(group, cost, slot);
  if (permit) release(permit);
}

}  // namespace ratesync::engine
