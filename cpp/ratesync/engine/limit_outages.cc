// When the store does not answer: the failure policy and the time budget.
#include <algorithm>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "ratesync/engine/limit_service.h"

namespace ratesync::engine {

namespace {

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

}  // namespace

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

}  // namespace ratesync::engine
