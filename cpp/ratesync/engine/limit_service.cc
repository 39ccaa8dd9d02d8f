#include "ratesync/engine/limit_service.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "ratesync/engine/multi_service.h"

namespace ratesync::engine {

using store::Verdict;

namespace {

void raise_max(std::atomic<std::uint64_t>& max, std::uint64_t value) {
  if (value > max.load(std::memory_order_relaxed)) max.store(value, std::memory_order_relaxed);
}

std::size_t wait_bucket(Nanos waited) {
  const auto bound = std::lower_bound(kWaitBuckets.begin(), kWaitBuckets.end(), waited);
  return static_cast<std::size_t>(bound - kWaitBuckets.begin());
}

}  // namespace

void count_grant(Counters& counters, Nanos now, Nanos waited) {
  add(counters.acquisitions);
  counters.last_acquisition.store(now, std::memory_order_relaxed);
  counters.wait_ns.fetch_add(static_cast<std::uint64_t>(waited), std::memory_order_relaxed);
  raise_max(counters.max_wait_ns, static_cast<std::uint64_t>(waited));
  add(counters.waits[wait_bucket(waited)]);
}

void AcquireTask::start() { limiter->service->start(this); }

void AcquireTask::cancel() { limiter->service->cancel(this); }

void AcquireTask::overdue(Nanos elapsed) { limiter->service->overdue(this, elapsed); }

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
  limits().on_freed([this](const std::string& group) { slot_freed(group, true); });
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
  if (!group.waiters.empty() || !group.lines.empty() || !group.runs.empty() || !group.permits.empty()) return;
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
  if (somebody_waits(task->group->id)) {
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
  task->budget = task->limiter->policy.outage_budget;
  task->queued = task->group->params.has_concurrency() && task->deadline > timers_.now();
  watch(*task);
  if (task->state_ == AcquireTask::State::waiting) {
    task->asking_ = true;
  } else {
    task->state_ = AcquireTask::State::in_store;
  }
  limits().acquire(task);
}

void LimitService::replied(AcquireTask* task) {
  const Nanos now = timers_.now();
  const bool ok = task->reply.status.ok();
  if (ok) heard();
  if (ok && task->queued && task->reply.verdict == Verdict::concurrency_full) remembered(task->group);
  if (task->given_up_) {
    // Its caller has its answer already; only what came too late has to go back.
    if (ok && task->reply.verdict == Verdict::granted) return_grant(task);
    forget_if_nobody(task->group->id);
    return task->unref();
  }
  unwatch(*task);
  const bool was_waiting = task->state_ == AcquireTask::State::waiting;
  if (was_waiting) {
    task->asking_ = false;
    if (GroupState* group = find(task->group->id)) --group->asking;
  }
  if (!task->reply.status.ok()) {
    Status status = std::move(task->reply.status);
    const store::GroupRef ref = task->group;
    if (was_waiting) leave_waiters(task);
    outage(task, std::move(status));
    // Nobody else was told anything. If the store is dead, they will not have to find out one by one.
    if (was_waiting && shared_) granted_one(ref->id);
    return;
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
      {
        const store::GroupRef ref = task->group;
        granted(task);
        if (was_waiting && shared_) granted_one(ref->id);
      }
      return;
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
        forget_if_nobody(task->group->id);
        task->why = Verdict::concurrency_full;
        task->retry_after = task->reply.retry_after;
        return finish(task, Outcome::refused);
      }
      refused_one(task->group->id);
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

PermitRef LimitService::take(const LimiterRef& limiter, const store::GroupRef& group,
                             store::HolderId holder) {
  // A deal after a refund may bear the very stamp that was refunded.
  if (GroupState* known = find(group->id)) known->refunded = {};
  if (holder == 0) return nullptr;
  auto permit = std::make_shared<Permit>(limiter, group, holder);
  auto& permits = state_of(group).permits;
  permit->place = permits.insert(permits.end(), permit);
  limiter->counters.held.fetch_add(1, std::memory_order_relaxed);
  const Nanos max_hold = limiter->policy.max_hold;
  if (max_hold != kForever) timers_.arm(*permit, timers_.now() + max_hold);
  return permit;
}

void LimitService::granted(AcquireTask* task) {
  task->remaining = task->reply.remaining;
  task->stamp = task->reply.stamp;
  task->charged_rate = task->group->params.has_rate();
  task->permit = take(task->limiter, task->group, task->reply.holder);
  const Nanos now = timers_.now();
  if (task->reply.full_after >= 0) task->full_at = saturating_add(now, task->reply.full_after);
  // The margin may put a slot a little past the deadline; the caller is early then, never late.
  Nanos until = saturating_add(now, task->reply.wait);
  until = std::min(until, std::max(now, task->deadline));
  if (until <= now) return finish(task, Outcome::granted);
  sleep(task, until);
}

// --- the end, asked for or not --------------------------------------------------------------------

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
  const bool was_asking = task->asking_;
  if (in_store) {
    unwatch(*task);
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
  if (was_asking) ask_soon(task->group->id);
  finish(task, outcome);
}

void LimitService::finish(AcquireTask* task, Outcome outcome) {
  Counters& counters = task->limiter->counters;
  task->state_ = AcquireTask::State::finished;
  task->outcome = outcome;
  const Nanos now = timers_.now();
  task->waited = std::max<Nanos>(0, now - task->submitted);
  if (task->conflicts > 0) counters.cas_failures.fetch_add(task->conflicts, std::memory_order_relaxed);
  switch (outcome) {
    case Outcome::granted: count_grant(counters, now, task->waited); break;
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
  if (multi_) multi_->closing(*this);
  const auto closed = Status::make(Code::closed, "the engine was shut down while this call was waiting");
  std::vector<AcquireTask*> all;
  for (Question* question : in_store_)
    if (auto* task = dynamic_cast<AcquireTask*>(question)) all.push_back(task);
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
