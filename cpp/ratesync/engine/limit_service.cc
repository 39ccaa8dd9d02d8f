#include "ratesync/engine/limit_service.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "ratesync/memory/memory_store.h"

namespace ratesync::engine {

using store::Verdict;

namespace {

constexpr Nanos kPollMin = 20 * kMilli;
constexpr Nanos kPollMax = 250 * kMilli;
// How many outage budgets a call may wait for a store that answers others.
constexpr Nanos kBudgetsWhileAlive = 8;

// Failures that the failure policy answers. Everything else (a missing table, missing grants, our
// own bounds) is a mistake that must be seen: letting calls pass would hide it.
bool is_outage(const Status& status) {
  switch (status.code) {
    case Code::unavailable:
    case Code::in_doubt:
    case Code::timeout: return true;
    case Code::server: {
      const std::string_view state = status.sqlstate;
      // 57014, and 55P03 after all attempts: a timeout of the role or the server struck, as it does when
      // somebody holds a lock. The server did not decide in time, which is what a budget is for.
      return state.starts_with("28") || state.starts_with("57") || state.starts_with("53") ||
             state.starts_with("58") || state.starts_with("08") || state == "25006" || state == "55P03";
    }
    case Code::ok:
    case Code::invalid:
    case Code::cancelled:
    case Code::exhausted:
    case Code::protocol:
    case Code::closed:
    case Code::internal: return false;
  }
  return false;
}

void raise_max(std::atomic<std::uint64_t>& max, std::uint64_t value) {
  if (value > max.load(std::memory_order_relaxed)) max.store(value, std::memory_order_relaxed);
}

void add(std::atomic<std::uint64_t>& counter) { counter.fetch_add(1, std::memory_order_relaxed); }

}  // namespace

void AcquireTask::done() { limiter->service->replied(this); }

void AcquireTask::fire() {
  // One that is just asking gets the store's answer instead.
  if (state_ == State::waiting && !asking_) {
    limiter->service->leave_waiters(this);
    why = Verdict::concurrency_full;
    limiter->service->finish(this, Outcome::refused);
  }
}

void AcquireTask::orphaned() {
  if (outcome == Outcome::granted)
    limiter->service->give_back(group, cost, charged_rate, {submitted + waited, stamp}, permit);
}

void Permit::fire() { limiter->service->expire(*this); }

LimitService::LimitService(store::Store& store, Timers& timers, std::uint64_t seed)
    : store_(store),
      timers_(timers),
      shared_(store.capabilities().shared),
      random_(static_cast<std::minstd_rand::result_type>(seed | 1)) {
  limits().on_lost([this](const std::string& group, store::HolderId holder) { lost(group, holder); });
}

LimitService::GroupState* LimitService::find(const std::string& id) {
  const auto it = groups_.find(id);
  return it == groups_.end() ? nullptr : it->second.get();
}

LimitService::GroupState& LimitService::state_of(const store::GroupRef& group) {
  auto& slot = groups_[group->id];
  if (!slot) slot = std::make_unique<GroupState>(this, group);
  return *slot;
}

void LimitService::drop_if_idle(GroupState& group) {
  if (!group.waiters.empty() || !group.runs.empty() || !group.permits.empty()) return;
  timers_.cancel(group);
  timers_.cancel(group.alarm);
  groups_.erase(group.group->id);
}

Nanos LimitService::jittered(Nanos base) {
  return base / 2 +
         static_cast<Nanos>(std::uniform_real_distribution<>(0.0, 1.0)(random_) * static_cast<double>(base));
}

// --- asking the store -------------------------------------------------------------------------

void LimitService::start(AcquireTask* task) {
  if (closing_) {
    task->status = Status::make(Code::closed, "the engine was shut down; configure the store again to go on");
    return finish(task, Outcome::failed);
  }
  task->order = ++arrivals_;
  if (GroupState* group = find(task->group->id); group && !group->waiters.empty()) {
    // Others wait for a slot of this group: nobody overtakes them.
    if (task->deadline <= timers_.now()) {
      task->why = Verdict::concurrency_full;
      return finish(task, Outcome::refused);
    }
    return enqueue(task);
  }
  send(task);
}

void LimitService::send(AcquireTask* task) {
  task->sent_ = timers_.now();
  task->pending_ = in_store_.insert(in_store_.end(), task);
  if (task->state_ == AcquireTask::State::waiting) {
    task->asking_ = true;
  } else {
    task->state_ = AcquireTask::State::in_store;
  }
  if (!armed()) arm_outage_check();
  limits().acquire(task);
}

void LimitService::replied(AcquireTask* task) {
  const Nanos now = timers_.now();
  if (task->reply.status.ok()) last_answer_ = now;
  if (task->given_up_) {
    // Its caller has its answer already; only what came too late has to go back.
    if (task->reply.status.ok() && task->reply.verdict == Verdict::granted) return_grant(task);
    return task->unref();
  }
  in_store_.erase(task->pending_);
  const bool was_waiting = task->state_ == AcquireTask::State::waiting;
  if (was_waiting) {
    task->asking_ = false;
    if (GroupState* group = find(task->group->id)) --group->asking;
  }
  if (!task->reply.status.ok()) {
    Status status = std::move(task->reply.status);
    if (was_waiting) leave_waiters(task);
    return outage(task, std::move(status));
  }
  switch (task->reply.verdict) {
    case Verdict::granted:
      if (was_waiting) leave_waiters(task);
      if (AcquireTask* first = overtaken(task)) {
        // It was under way when the other was refused, and a slot came free in between: the grant
        // goes to whoever came first, and this one takes a place in the queue.
        first->reply = std::move(task->reply);
        task->reply = {};
        leave_waiters(first);
        if (task->deadline > now) {
          enqueue(task);
        } else {
          task->why = Verdict::concurrency_full;
          finish(task, Outcome::refused);
        }
        return granted(first);
      }
      return granted(task);
    case Verdict::rate_limited:
      if (was_waiting) leave_waiters(task);
      task->why = Verdict::rate_limited;
      task->retry_after = task->reply.retry_after;
      {
        const store::GroupRef ref = task->group;
        finish(task, Outcome::refused);
        // The slot it was offered is still free. (Memory: slot_freed() goes on by itself.)
        if (was_waiting && shared_) slot_freed(ref->id);
      }
      return;
    case Verdict::concurrency_full:
      if (task->deadline <= now) {
        if (was_waiting) leave_waiters(task);
        task->why = Verdict::concurrency_full;
        task->retry_after = task->reply.retry_after;
        return finish(task, Outcome::refused);
      }
      if (was_waiting) return plan_poll(state_of(task->group));
      return enqueue(task);
  }
}

// The first waiter of the group that came before this one and would take the same grant.
AcquireTask* LimitService::overtaken(AcquireTask* task) {
  GroupState* group = find(task->group->id);
  if (!group) return nullptr;
  const Nanos slot = saturating_add(timers_.now(), task->reply.wait);
  for (AcquireTask* waiter : group->waiters) {
    if (waiter->order > task->order) return nullptr;
    // A slot beyond its deadline is not the same grant: taken early, it would exceed the rate.
    if (!waiter->asking_ && waiter->cost == task->cost && waiter->deadline >= slot) return waiter;
  }
  return nullptr;
}

PermitRef LimitService::hold(AcquireTask* task) {
  if (task->reply.holder == 0) return nullptr;
  auto permit = std::make_shared<Permit>(task->limiter, task->group, task->reply.holder);
  auto& permits = state_of(task->group).permits;
  permit->place = permits.insert(permits.end(), permit);
  task->limiter->counters.held.fetch_add(1, std::memory_order_relaxed);
  const Nanos max_hold = task->limiter->policy.max_hold;
  if (max_hold != kForever) timers_.arm(*permit, timers_.now() + max_hold);
  return permit;
}

void LimitService::granted(AcquireTask* task) {
  task->remaining = task->reply.remaining;
  task->stamp = task->reply.stamp;
  task->charged_rate = task->group->params.has_rate();
  // A deal after a refund may bear the very stamp that was refunded.
  if (GroupState* group = find(task->group->id)) group->refunded = {};
  task->permit = hold(task);
  const Nanos now = timers_.now();
  // The margin may put a slot a little past the deadline; the caller is early then, never late.
  Nanos until = saturating_add(now, task->reply.wait);
  until = std::min(until, std::max(now, task->deadline));
  if (until <= now) return finish(task, Outcome::granted);
  sleep(task, until);
}

// --- waiting for a rate slot --------------------------------------------------------------------

void LimitService::sleep(AcquireTask* task, Nanos until) {
  GroupState& group = state_of(task->group);
  // Usually the last run goes on. A slot before its last one (units were given back meanwhile) stays
  // with this task, whose deadline may not allow a later one.
  auto run = group.runs.empty() ? group.runs.end() : std::prev(group.runs.end());
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

void LimitService::cancel(AcquireTask* task, Outcome outcome) {
  switch (task->state_) {
    case AcquireTask::State::created:
    case AcquireTask::State::finished: return;  // the reader of the completion gives back
    case AcquireTask::State::sleeping:
      leave_sleepers(task);
      task->charged_rate = false;
      if (task->permit) release(std::exchange(task->permit, nullptr));
      return finish(task, outcome);
    case AcquireTask::State::waiting:
    case AcquireTask::State::in_store: break;
  }
  const bool in_store = task->state_ == AcquireTask::State::in_store || task->asking_;
  if (in_store) {
    in_store_.erase(task->pending_);
    if (!limits().abandon(task)) {
      task->given_up_ = true;
      task->ref();  // the store's; the other one goes with the completion
    }
    if (task->asking_) {
      task->asking_ = false;
      if (GroupState* group = find(task->group->id)) --group->asking;
    }
  }
  if (task->state_ == AcquireTask::State::waiting) leave_waiters(task);
  finish(task, outcome);
}

// --- outages ------------------------------------------------------------------------------------

void LimitService::outage(AcquireTask* task, Status status) {
  task->status = std::move(status);
  task->outage = is_outage(task->status);
  if (!task->outage) return finish(task, Outcome::failed);
  if (task->limiter->policy.fail_closed) return finish(task, Outcome::failed);
  finish(task, Outcome::passed_open);
}

void LimitService::arm_outage_check() {
  if (in_store_.empty() || closing_ || !shared_) return;
  Nanos soonest = kForever;
  const Nanos now = timers_.now();
  for (AcquireTask* task : in_store_) {
    // Sorted by sending time; budgets differ, so a look at the oldest few is not enough in theory,
    // but a later one with a smaller budget is found at the next tick (at most 50 ms late).
    soonest = std::max(task->sent_, last_answer_) + task->limiter->policy.outage_budget;
    break;
  }
  timers_.arm(*this, std::min(std::max(soonest, now + kMilli), now + 50 * kMilli));
}

void LimitService::fire() {
  const Nanos now = timers_.now();
  std::vector<AcquireTask*> overdue;
  for (AcquireTask* task : in_store_) {
    // An answer to anybody proves that the store is alive and that we are only queueing. That may
    // excuse a few budgets, not a row that somebody keeps locked while others are served.
    const Nanos budget = task->limiter->policy.outage_budget;
    if (now - std::max(task->sent_, last_answer_) >= budget ||
        now - task->sent_ >= kBudgetsWhileAlive * budget)
      overdue.push_back(task);
  }
  for (AcquireTask* task : overdue) {
    if (task->state_ == AcquireTask::State::finished) continue;
    const Nanos elapsed = now - task->sent_;
    const bool was_waiting = task->state_ == AcquireTask::State::waiting;
    in_store_.erase(task->pending_);
    const bool taken_back = limits().abandon(task);
    if (!taken_back) {
      task->given_up_ = true;
      task->ref();
    }
    if (was_waiting) {
      task->asking_ = false;
      if (GroupState* group = find(task->group->id)) --group->asking;
      leave_waiters(task);
    }
    outage(task, Status::make(taken_back ? Code::unavailable : Code::in_doubt,
                              "no answer from the store within " + std::to_string(elapsed / kMilli) +
                                  " ms (outage_budget); check that the server is up and reachable"));
  }
  arm_outage_check();
}

// --- the end ------------------------------------------------------------------------------------

void LimitService::finish(AcquireTask* task, Outcome outcome) {
  Counters& counters = task->limiter->counters;
  task->state_ = AcquireTask::State::finished;
  task->outcome = outcome;
  const Nanos now = timers_.now();
  task->waited = std::max<Nanos>(0, now - task->submitted);
  switch (outcome) {
    case Outcome::granted:
      add(counters.acquisitions);
      counters.last_acquisition.store(now, std::memory_order_relaxed);
      counters.wait_ns.fetch_add(static_cast<std::uint64_t>(task->waited), std::memory_order_relaxed);
      raise_max(counters.max_wait_ns, static_cast<std::uint64_t>(task->waited));
      break;
    case Outcome::refused:
      add(counters.timeouts);
      add(task->why == Verdict::rate_limited ? counters.refused_rate : counters.refused_concurrency);
      break;
    case Outcome::passed_open: add(counters.passed_open); break;
    case Outcome::failed: add(counters.failed); break;
    case Outcome::cancelled: add(counters.cancelled); break;
  }
  task->target->deliver(task);  // hands over the reference; task may be gone now
}

void LimitService::shutdown() {
  closing_ = true;
  timers_.cancel(*this);
  const auto closed = Status::make(Code::closed, "the engine was shut down while this call was waiting");
  std::vector<AcquireTask*> all(in_store_.begin(), in_store_.end());
  std::vector<PermitRef> permits;
  for (auto& [id, group] : groups_) {
    timers_.cancel(*group);
    for (AcquireTask* task : group->waiters)
      if (!task->asking_) all.push_back(task);
    for (const SleeperRun& run : group->runs) all.insert(all.end(), run.sleepers.begin(), run.sleepers.end());
    permits.insert(permits.end(), group->permits.begin(), group->permits.end());
  }
  for (AcquireTask* task : all) {
    task->status = closed;
    cancel(task, Outcome::failed);
  }
  for (const PermitRef& permit : permits) release(permit);
}

}  // namespace ratesync::engine
