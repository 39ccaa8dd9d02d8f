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

}  // namespace

// Failures that the failure policy answers. Everything else (a missing table, missing grants, our
// own bounds) is a mistake that must be seen: letting calls pass would hide it.
bool LimitService::is_outage(const Status& status) {
  switch (status.code) {
    case Code::unavailable:
    case Code::in_doubt:
    case Code::timeout: return true;
    case Code::server: {
      const std::string_view state = status.sqlstate;
      // 57014, and 55P03 after all attempts: a timeout of the role or the server struck, as it does when
      // somebody holds a lock. The server did not decide in time, which is what a budget is for.
      return state.starts_with("28") || state.starts_with("57") || state.starts_with("53") ||
             state.starts_with("58") || state.starts_with("08") || state == "25006" || state == "55P03" ||
             state == "OOM" || state == "NOAUTH" || state == "WRONGPASS";  // the last three: Redis
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

void LimitService::outage(AcquireTask* task, Status status) {
  task->status = std::move(status);
  task->outage = is_outage(task->status);
  if (!task->outage) return finish(task, Outcome::failed);
  if (task->limiter->policy.fail_closed) return finish(task, Outcome::failed);
  finish(task, Outcome::passed_open);
}

void LimitService::watch(Question& question) {
  question.sent_ = timers_.now();
  question.list_ = &in_store_;
  question.pending_ = in_store_.insert(in_store_.end(), &question);
  if (!armed()) arm_outage_check();
}

void LimitService::arm_outage_check() {
  if (in_store_.empty() || closing_ || !shared_) return;
  const Nanos now = timers_.now();
  // Sorted by sending time; budgets differ, so a look at the oldest is not enough in theory, but a later
  // one with a smaller budget is found at the next tick (at most 50 ms late).
  const Question& oldest = *in_store_.front();
  const Nanos soonest = std::max(oldest.sent_, last_answer_) + oldest.budget;
  timers_.arm(*this, std::min(std::max(soonest, now + kMilli), now + 50 * kMilli));
}

void LimitService::fire() {
  const Nanos now = timers_.now();
  for (auto it = in_store_.begin(); it != in_store_.end();) {
    const auto next = std::next(it);
    // An answer to anybody proves that the store is alive and that we are only queueing. That may
    // excuse a few budgets, not a row that somebody keeps locked while others are served.
    Question& question = **it;
    if (now - std::max(question.sent_, last_answer_) >= question.budget ||
        now - question.sent_ >= kBudgetsWhileAlive * question.budget) {
      question.list_ = &overdue_;
      overdue_.splice(overdue_.end(), in_store_, it);
    }
    it = next;
  }
  while (!overdue_.empty()) {
    Question* question = overdue_.front();
    overdue_.pop_front();
    question->overdue(now - question->sent_);
  }
  arm_outage_check();
}

Status LimitService::no_answer(Nanos elapsed, bool taken_back) {
  return Status::make(taken_back ? Code::unavailable : Code::in_doubt,
                      "no answer from the store within " + std::to_string(elapsed / kMilli) +
                          " ms (outage_budget); check that the server is up and reachable");
}

void LimitService::overdue(AcquireTask* task, Nanos elapsed) {
  const bool was_waiting = task->state_ == AcquireTask::State::waiting;
  const bool taken_back = limits().abandon(task);
  if (!taken_back) {
    task->given_up_ = true;
    task->ref();
  }
  const store::GroupRef ref = task->group;
  if (was_waiting) {
    task->asking_ = false;
    if (GroupState* group = find(ref->id)) --group->asking;
    leave_waiters(task);
  }
  outage(task, no_answer(elapsed, taken_back));
  if (was_waiting) granted_one(ref->id);
}

}  // namespace ratesync::engine
