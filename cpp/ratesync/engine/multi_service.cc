#include "ratesync/engine/multi_service.h"

#include <algorithm>
#include <utility>

namespace ratesync::engine {

using store::Verdict;

void MultiTask::Stage::done() { owner->answered(*this); }

void MultiTask::Stage::overdue(Nanos elapsed) { owner->overdue(*this, elapsed); }

MultiTask::MultiTask(MultiService& service, std::vector<MultiPart> wanted)
    : limits(std::move(wanted)), service_(service) {}

void MultiTask::start() { service_.start(this); }

void MultiTask::cancel() { service_.cancel(this); }

void MultiTask::fire() { service_.expire(this); }

void MultiTask::orphaned() {
  if (outcome == Outcome::granted || outcome == Outcome::passed_open) service_.return_grants(this);
}

// --- asking, store by store -----------------------------------------------------------------------

void MultiService::prepare(MultiTask* task) {
  for (std::size_t i = 0; i < task->limits.size(); ++i) {
    LimitService* service = task->limits[i].limiter->service;
    auto found = std::find_if(task->stages_.begin(), task->stages_.end(),
                              [service](const auto& stage) { return stage->service == service; });
    if (found == task->stages_.end()) {
      task->stages_.push_back(std::make_unique<MultiTask::Stage>());
      found = std::prev(task->stages_.end());
      (*found)->owner = this;
      (*found)->task = task;
      (*found)->service = service;
      (*found)->order = service->next_order();
    }
    (*found)->limits.push_back(i);
  }
  // What this process decides alone costs no trip, so it is asked first.
  std::stable_partition(task->stages_.begin(), task->stages_.end(),
                        [](const auto& stage) { return !stage->service->shared(); });
  for (const auto& stage : task->stages_) {
    std::sort(stage->limits.begin(), stage->limits.end(), [task](std::size_t a, std::size_t b) {
      return task->limits[a].group->id < task->limits[b].group->id;
    });
    stage->budget = kForever;
    for (const std::size_t i : stage->limits) {
      const MultiPart& part = task->limits[i];
      stage->parts.push_back({part.group, part.cost});
      stage->budget = std::min(stage->budget, part.limiter->policy.outage_budget);
      stage->queued |= part.group->params.has_concurrency() && task->deadline > timers_.now();
    }
  }
}

void MultiService::start(MultiTask* task) {
  prepare(task);
  for (const auto& stage : task->stages_) {
    if (!stage->service->closing()) continue;
    task->status = Status::make(Code::closed, "the engine was shut down; configure the store again to go on");
    task->blocking = stage->limits.front();
    return finish(task, Outcome::failed);
  }
  const Nanos now = timers_.now();
  task->order_ = ++arrivals_;
  enter(task);
  const Line line = task->line_;
  if (line->waiting.front() != task) {
    // Others of the same limits wait: nobody overtakes them.
    if (task->deadline <= now || line->not_before > task->deadline) {
      blame(task, *line);
      leave(task);
      return finish(task, Outcome::refused);
    }
    return;
  }
  std::vector<std::size_t> full;
  for (std::size_t i = 0; i < task->limits.size(); ++i) {
    const MultiPart& part = task->limits[i];
    if (part.group->params.has_concurrency() && part.limiter->service->somebody_waits(part.group->id))
      full.push_back(i);
  }
  if (!full.empty()) {
    // Others wait for a slot of one of the limits.
    if (task->deadline <= now) {
      task->why = Verdict::concurrency_full;
      task->blocking = full.front();
      leave(task);
      drop_if_empty(line, false);
      return finish(task, Outcome::refused);
    }
    note(*line, task, {Verdict::concurrency_full, full.front(), 0, full});
    stand_where_full(*line, task, full);
    return;
  }
  // Between two stores a grant may have to be taken back, which is exact only for the latest one: there
  // only as many ask at once as the last ones were granted.
  if (task->stages_.size() > 1 && line->asking.size() >= line->window) return;
  ask(task);
}

void MultiService::ask(MultiTask* task) {
  const Line line = task->line_;
  leave(task);
  leave_queue(*line);
  task->state_ = MultiTask::State::asking;
  task->line_ = line;
  task->place_ = line->asking.insert(line->asking.end(), task);
  // What is freed from here on is news.
  line->not_before = 0;
  for (const auto& stand : line->stands) stand->service->set_freed(*stand, false);
  task->stage_ = 0;
  ask_next_store(task);
}

void MultiService::ask_next_store(MultiTask* task) {
  while (task->stage_ < task->stages_.size() && task->stages_[task->stage_]->passed_open) ++task->stage_;
  if (task->stage_ == task->stages_.size()) return granted(task);
  MultiTask::Stage& stage = *task->stages_[task->stage_];
  stage.status = Status::success();
  stage.granted = false;
  stage.replies.clear();
  stage.service->watch(stage);
  stage.service->limits().acquire_all(&stage);
}

void MultiService::answered(Stage& stage) {
  LimitService& service = *stage.service;
  const bool ok = stage.status.ok();
  if (ok) service.heard();
  std::vector<std::string> full;
  for (std::size_t j = 0; ok && !stage.granted && j < stage.replies.size(); ++j) {
    if (!stage.queued || stage.replies[j].verdict != Verdict::concurrency_full) continue;
    service.remembered(stage.parts[j].group);
    full.push_back(stage.parts[j].group->id);
  }
  if (MultiTask* task = stage.task) {
    service.unwatch(stage);
    if (!ok) {
      failed(task, std::move(stage.status));
    } else if (stage.granted) {
      take(stage);
      ++task->stage_;
      ask_next_store(task);
    } else {
      refused(task, refusal_of(stage));
    }
  } else {
    answered_too_late(stage);
  }
  for (const std::string& id : full) service.forget_if_nobody(id);
}

void MultiService::take(Stage& stage) {
  for (std::size_t j = 0; j < stage.limits.size(); ++j) {
    MultiPart& part = stage.task->limits[stage.limits[j]];
    const store::AcquireReply& reply = stage.replies[j];
    part.granted = true;
    part.charged = part.group->params.has_rate();
    part.stamp = reply.stamp;
    part.remaining = reply.remaining;
    part.full_after = reply.full_after;
    part.at = timers_.now();
    part.permit = stage.service->take(part.limiter, part.group, reply.holder);
  }
}

MultiService::Refusal MultiService::refusal_of(const Stage& stage) const {
  Refusal refusal;
  const Nanos least = stage.service->shared() ? 100 * kMicro : kMicro;  // what is over already is no time
  for (std::size_t j = 0; j < stage.replies.size(); ++j) {
    const store::AcquireReply& reply = stage.replies[j];
    const std::size_t limit = stage.limits[j];
    const Nanos after = std::max(reply.retry_after, least);
    if (reply.verdict == Verdict::concurrency_full) {
      if (refusal.full.empty() && refusal.retry_after == 0) refusal.blocking = limit;
      refusal.full.push_back(limit);
    } else if (reply.verdict == Verdict::rate_limited && after > refusal.retry_after) {
      refusal.retry_after = after;
      refusal.blocking = limit;
    }
  }
  refusal.why = refusal.retry_after > 0 ? Verdict::rate_limited : Verdict::concurrency_full;
  return refusal;
}

// Takes the question off the watch and, where the store lets go of it, back. What cannot be taken back
// lives on by itself, and the task gets a fresh stage in its place.
bool MultiService::take_back(Stage& stage) {
  if (stage.service->limits().abandon(&stage)) return true;
  MultiTask* task = std::exchange(stage.task, nullptr);
  std::unique_ptr<Stage>& place = task->stages_[task->stage_];
  auto fresh = std::make_unique<Stage>();
  fresh->owner = this;
  fresh->task = task;
  fresh->service = stage.service;
  fresh->limits = stage.limits;
  fresh->order = stage.order;
  fresh->parts = stage.parts;
  fresh->queued = stage.queued;
  fresh->budget = stage.budget;
  unwanted_.emplace(&stage, std::exchange(place, std::move(fresh)));
  return false;
}

void MultiService::answered_too_late(Stage& stage) {
  const auto it = unwanted_.find(&stage);
  const std::unique_ptr<Stage> last = std::move(it->second);
  unwanted_.erase(it);
  if (!stage.status.ok() || !stage.granted) return;
  LimitService& service = *stage.service;
  for (std::size_t j = 0; j < stage.parts.size(); ++j) {
    const store::Part& part = stage.parts[j];
    if (part.group->params.has_rate())
      service.give_back(part.group, part.cost, true, {timers_.now(), stage.replies[j].stamp}, nullptr);
    if (stage.replies[j].holder == 0) continue;
    service.limits().release(part.group, stage.replies[j].holder);
    service.slot_freed(part.group->id);
  }
}

// --- answers --------------------------------------------------------------------------------------

void MultiService::granted(MultiTask* task) {
  const Line line = task->line_;
  bool more = task->more_;
  std::string turn = std::exchange(task->turn_, {});
  leave(task);
  if (MultiTask* first = overtaken(task)) {
    // It was under way when the other was refused: the grant goes to whoever came first.
    for (std::size_t k = 0; k < task->stages_.size(); ++k)
      for (std::size_t j = 0; j < task->stages_[k]->limits.size(); ++j) {
        MultiPart& from = task->limits[task->stages_[k]->limits[j]];
        MultiPart& to = first->limits[first->stages_[k]->limits[j]];
        std::swap(from, to);
      }
    leave(first);
    enter(task);
    task = first;
  }
  // As many as the limits have left, at most twice as many as before.
  auto left = static_cast<std::int64_t>(kMaxWindow);
  for (const MultiPart& part : task->limits) {
    more |= !part.limiter->service->shared();
    if (part.granted) left = std::min(left, part.remaining / std::max<std::int64_t>(1, part.cost));
  }
  const bool out = std::any_of(task->stages_.begin(), task->stages_.end(),
                               [](const auto& stage) { return stage->passed_open; });
  if (!out)
    line->window = static_cast<std::size_t>(std::clamp<std::int64_t>(
        2 * static_cast<std::int64_t>(line->window), 1, std::max<std::int64_t>(1, left)));
  finish(task, out ? Outcome::passed_open : Outcome::granted);
  keep_order(*line);
  if (out) {
    ask_anew(*line);
  } else if (!turn.empty() && queues_.contains(turn)) {
    // Others wait for the same limit: this line goes on with them, in order of arrival.
    if (!line->waiting.empty() && !line->queue) {
      line->not_before = 0;
      join_queue(*line, turn);
    }
  } else if (more) {
    std::vector<std::pair<LimitService*, std::string>> groups;
    for (const auto& stand : line->stands) groups.emplace_back(stand->service, stand->group->id);
    for (const auto& [service, id] : groups)
      if (!service->granted_one(id)) service->slot_freed(id, true);
  }
  if (!line->queue) pump(line);
  drop_if_empty(line, more);
  if (!turn.empty()) give_turns(turn, left > 1 ? 2 : 1);
}

void MultiService::refused(MultiTask* task, const Refusal& refusal) {
  return_grants(task);
  const Line line = task->line_;
  line->window = 1;
  ++line->refusals;
  const std::string turn = std::exchange(task->turn_, {});
  const bool same_limit = !turn.empty() && turn == name_of(task->limits[refusal.blocking]);
  const Nanos now = timers_.now();
  const Nanos at = saturating_add(now, refusal.retry_after);
  leave(task);
  if (task->deadline <= now || (refusal.retry_after > 0 && at > task->deadline)) {
    task->why = refusal.why;
    task->blocking = refusal.blocking;
    task->retry_after = refusal.retry_after;
    // The next one would hear the same, if it asks for the same.
    if (!line->waiting.empty() && refusal.retry_after > 0 && same_costs(*task, *line->waiting.front())) {
      note(*line, task, refusal);
      for (const auto& stand : line->stands) stand->service->set_freed(*stand, true);
    } else {
      ask_anew(*line);
    }
    finish(task, Outcome::refused);
  } else {
    enter(task);
    if (line->waiting.front() == task) {
      note(*line, task, refusal);
      // A slot may have been freed before the line had its place: ask again (memory only, see enqueue()).
      if (stand_where_full(*line, task, refusal.full)) ask_anew(*line);
    }
  }
  refuse_early(line);
  keep_order(*line);
  pump(line);
  drop_if_empty(line, true);
  offer_left();
  if (same_limit && refusal.retry_after > 0) {
    let_sleep(turn, at);
  } else if (!turn.empty()) {
    give_turns(turn, 1);
  }
}

void MultiService::failed(MultiTask* task, Status status) {
  MultiTask::Stage& stage = *task->stages_[task->stage_];
  task->outage = LimitService::is_outage(status);
  task->status = std::move(status);
  task->blocking = stage.limits.front();
  bool closed = !task->outage;
  for (const std::size_t i : stage.limits) {
    if (!task->limits[i].limiter->policy.fail_closed) continue;
    if (!closed) task->blocking = i;
    closed = true;
  }
  const Line line = task->line_;
  // If the store is dead, those in line will not have to find out one by one.
  const bool outage = task->outage;
  if (task->outage) line->window = std::min(2 * line->window, kMaxWindow);
  if (!closed) {
    stage.passed_open = true;
    task->more_ = true;
    ++task->stage_;
    return ask_next_store(task);
  }
  return_grants(task);
  const std::string turn = std::exchange(task->turn_, {});
  leave(task);
  finish(task, Outcome::failed);
  ask_anew(*line);
  pump(line);
  drop_if_empty(line, true);
  offer_left();
  if (!turn.empty()) give_turns(turn, outage ? 2 : 1);
}

void MultiService::overdue(Stage& stage, Nanos elapsed) {
  MultiTask* task = stage.task;
  const bool taken_back = take_back(stage);
  failed(task, LimitService::no_answer(elapsed, taken_back));
}

}  // namespace ratesync::engine
