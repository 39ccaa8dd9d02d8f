// Lines of calls for the same limits: who stands where, and when the first in line asks again.
#include <algorithm>
#include <iterator>
#include <utility>

#include "ratesync/engine/multi_service.h"

namespace ratesync::engine {

using store::Verdict;

namespace {

// After a question was taken back: for the store's sake, should thousands be cancelled one by one.
constexpr Nanos kQuiet = 10 * kMilli;
// Whoever has the turn passes it on with its answer, which has a budget.
constexpr Nanos kLostTurn = 5 * kSecond;

const MultiPart* find(const MultiTask& task, const LimitService* service, const std::string& group) {
  for (const MultiPart& part : task.limits)
    if (part.limiter->service == service && part.group->id == group) return &part;
  return nullptr;
}

}  // namespace

std::string MultiService::name_of(const MultiPart& part) {
  return std::to_string(reinterpret_cast<std::uintptr_t>(part.limiter->service)) + '/' + part.group->id;
}

std::string MultiService::key_of(const MultiTask& task) {
  std::vector<std::string> names;
  names.reserve(task.limits.size());
  for (const MultiPart& part : task.limits) names.push_back(name_of(part));
  std::sort(names.begin(), names.end());
  std::string key;
  for (const std::string& name : names) key.append(name).push_back('\0');
  return key;
}

// Of two in one line.
bool MultiService::same_costs(const MultiTask& a, const MultiTask& b) {
  return std::all_of(a.limits.begin(), a.limits.end(), [&b](const MultiPart& part) {
    const MultiPart* other = find(b, part.limiter->service, part.group->id);
    return other && other->cost == part.cost;
  });
}

// --- coming and going -----------------------------------------------------------------------------

void MultiService::enter(MultiTask* task) {
  if (!task->line_) {
    Line& line = lines_[key_of(*task)];
    if (!line) {
      line = std::make_shared<MultiLine>();
      line->owner = this;
      line->key = key_of(*task);
    }
    task->line_ = line;
  }
  MultiLine& line = *task->line_;
  task->state_ = MultiTask::State::waiting;
  auto place = line.waiting.end();
  if (!line.waiting.empty() && line.waiting.back()->order_ > task->order_)  // back from asking: in front
    place = std::find_if(line.waiting.begin(), line.waiting.end(),
                         [task](const MultiTask* other) { return other->order_ > task->order_; });
  task->place_ = line.waiting.insert(place, task);
  if (task->deadline != kForever) {
    task->deadline_at_ = line.deadlines.emplace(task->deadline, task);
    timers_.arm(*task, task->deadline);
  }
  waiting_.fetch_add(1, std::memory_order_relaxed);
}

// Out of the line, whatever the state; the line may be empty then, and is still there.
void MultiService::leave(MultiTask* task) {
  MultiLine& line = *task->line_;
  if (task->state_ == MultiTask::State::asking) {
    line.asking.erase(task->place_);
  } else {
    line.waiting.erase(task->place_);
    if (task->deadline != kForever) {
      line.deadlines.erase(task->deadline_at_);
      timers_.cancel(*task);
    }
    waiting_.fetch_sub(1, std::memory_order_relaxed);
  }
  task->state_ = MultiTask::State::created;
}

void MultiService::drop_if_empty(const Line& line, bool offer) {
  if (line->gone || !line->asking.empty() || !line->waiting.empty()) return;
  line->gone = true;
  timers_.cancel(*line);
  leave_queue(*line);
  leave_stands(*line, offer);
  lines_.erase(std::string(line->key));
  offer_left();
}

void MultiService::leave_stands(MultiLine& line, bool offer) {
  for (const auto& stand : line.stands) {
    stand->service->leave(*stand);
    if (offer) left_.emplace_back(stand->service, stand->group->id);
  }
  line.stands.clear();
}

// What the line may have been offered and did not take.
void MultiService::offer_left() {
  for (const auto& [service, group] : std::exchange(left_, {})) service->slot_freed(group);
}

// --- what is known of the limits ------------------------------------------------------------------

void MultiService::note(MultiLine& line, const MultiTask* first, const Refusal& refusal) {
  line.why = refusal.why;
  line.blocking_service = first->limits[refusal.blocking].limiter->service;
  line.blocking_group = first->limits[refusal.blocking].group->id;
  leave_queue(line);
  line.not_before = refusal.retry_after > 0 ? saturating_add(timers_.now(), refusal.retry_after) : 0;
  if (line.not_before != 0) join_queue(line, name_of(first->limits[refusal.blocking]));
}

// The first in line was refused the same.
void MultiService::blame(MultiTask* task, const MultiLine& line) {
  const Nanos now = timers_.now();
  task->retry_after = std::max<Nanos>(0, line.not_before - now);
  task->why = line.why == Verdict::granted ? Verdict::concurrency_full : line.why;
  for (std::size_t i = 0; i < task->limits.size(); ++i)
    if (task->limits[i].limiter->service == line.blocking_service &&
        task->limits[i].group->id == line.blocking_group)
      task->blocking = i;
  if (task->retry_after > 0 || line.stands.empty()) return;
  // The time has come, or there was none: it is the slots that are missing.
  const Stand& stand = *line.stands.front();
  task->why = Verdict::concurrency_full;
  for (std::size_t i = 0; i < task->limits.size(); ++i)
    if (task->limits[i].limiter->service == stand.service && task->limits[i].group->id == stand.group->id)
      task->blocking = i;
}

// True when a slot may have been freed unnoticed before the line had its place there.
bool MultiService::stand_where_full(MultiLine& line, MultiTask* first, const std::vector<std::size_t>& full) {
  const auto is_full = [&](const Stand& stand) {
    return std::any_of(full.begin(), full.end(), [&](std::size_t i) {
      return first->limits[i].limiter->service == stand.service &&
             first->limits[i].group->id == stand.group->id;
    });
  };
  for (auto it = line.stands.begin(); it != line.stands.end();) {
    if (is_full(**it)) {
      ++it;
      continue;
    }
    (*it)->service->leave(**it);
    left_.emplace_back((*it)->service, (*it)->group->id);
    it = line.stands.erase(it);
  }
  bool unnoticed = false;
  for (const std::size_t i : full) {
    const MultiPart& part = first->limits[i];
    LimitService* service = part.limiter->service;
    if (std::any_of(line.stands.begin(), line.stands.end(), [&](const auto& stand) {
          return stand->service == service && stand->group->id == part.group->id;
        }))
      continue;
    auto stand = std::make_unique<Stand>();
    stand->line = &line;
    stand->service = service;
    stand->group = part.group;
    for (const auto& stage : first->stages_)
      if (stage->service == service) stand->order = stage->order;
    line.stands.push_back(std::move(stand));
    service->stand(part.group, *line.stands.back());
    unnoticed |= !service->shared();
  }
  return unnoticed;
}

// The line stands where its first would.
void MultiService::keep_order(MultiLine& line) {
  if (line.waiting.empty()) return;
  if (line.queue && line.queued_as != line.waiting.front()->order_) {
    line.queue->lines.erase(line.queued_as);
    line.queued_as = line.waiting.front()->order_;
    line.queue->lines[line.queued_as] = &line;
  }
  for (const auto& stand : line.stands)
    for (const auto& stage : line.waiting.front()->stages_)
      if (stage->service == stand->service) stand->service->move(*stand, stage->order);
}

// What the last one was told does not hold for the next.
void MultiService::ask_anew(MultiLine& line) {
  leave_queue(line);
  line.not_before = 0;
  for (const auto& stand : line.stands) stand->service->set_freed(*stand, true);
}

// --- whose turn it is -----------------------------------------------------------------------------

bool MultiService::ready(const MultiLine& line, const Stand* but) const {
  if (line.gone || line.waiting.empty()) return false;
  const Nanos now = timers_.now();
  if (line.not_before > now || line.quiet_until > now) return false;
  if (line.waiting.front()->stages_.size() > 1 && line.asking.size() >= line.window) return false;
  return std::all_of(line.stands.begin(), line.stands.end(),
                     [but](const auto& stand) { return stand.get() == but || stand->freed; });
}

void MultiService::pump(const Line& line) {
  if (line->pumping) return;  // answered inside the call: the loop below goes on
  line->pumping = true;
  while (ready(*line) && line->asking.size() < line->window) {
    // All at once: the first question makes old news of what was known of the slots.
    std::size_t left = line->window - line->asking.size();
    const std::uint64_t refusals = line->refusals;
    do {
      MultiTask* first = line->waiting.front();
      first->more_ = true;
      ask(first);
      keep_order(*line);
    } while (--left > 0 && !line->gone && !line->waiting.empty() && line->refusals == refusals);
  }
  line->pumping = false;
  if (!line->gone && line->quiet_until > timers_.now()) timers_.arm(*line, line->quiet_until);
}

void MultiLine::fire() {
  const MultiService::Line self = owner->lines_.at(key);
  owner->pump(self);
}

// --- turns, when the time has come ----------------------------------------------------------------

void MultiService::join_queue(MultiLine& line, const std::string& key) {
  std::unique_ptr<TimeQueue>& queue = queues_[key];
  if (!queue) {
    queue = std::make_unique<TimeQueue>();
    queue->owner = this;
    queue->key = key;
  }
  line.queue = queue.get();
  line.queued_as = line.waiting.front()->order_;
  queue->lines[line.queued_as] = &line;
  if (queue->lines.begin()->second != &line && queue->armed()) return;  // it goes with the first
  queue->at = line.not_before;
  timers_.arm(*queue, queue->at);
}

void MultiService::leave_queue(MultiLine& line) {
  TimeQueue* queue = std::exchange(line.queue, nullptr);
  if (!queue) return;
  const bool first = queue->lines.begin()->second == &line;
  queue->lines.erase(line.queued_as);
  if (first && !queue->lines.empty() && queue->armed()) {
    // The next one may have been told an earlier time.
    const Nanos soon = std::max(queue->lines.begin()->second->not_before, timers_.now() + kQuiet);
    queue->at = std::min(queue->at, soon);
    timers_.arm(*queue, queue->at);
  }
  drop_if_idle(*queue);
}

void MultiService::drop_if_idle(TimeQueue& queue) {
  if (queue.running || !queue.lines.empty()) return;
  timers_.cancel(queue);
  queues_.erase(std::string(queue.key));
}

void MultiService::let_sleep(const std::string& key, Nanos until) {
  const auto it = queues_.find(key);
  if (it == queues_.end() || it->second->lines.empty()) return;
  it->second->turns = 0;
  it->second->at = until;
  timers_.arm(*it->second, until);
}

void TimeQueue::fire() {
  turns = 1;
  owner->take_turns(*this);
}

void MultiService::give_turns(const std::string& key, std::size_t turns) {
  const auto it = queues_.find(key);
  if (it == queues_.end()) return;
  it->second->turns = std::min(it->second->turns + turns, kMaxWindow);
  take_turns(*it->second);
}

void MultiService::take_turns(TimeQueue& queue) {
  if (queue.running) return;  // answered inside the call: the loop below goes on
  queue.running = true;
  while (queue.turns > 0 && !queue.lines.empty()) {
    MultiLine& line = *queue.lines.begin()->second;
    queue.lines.erase(queue.lines.begin());
    line.queue = nullptr;
    line.not_before = 0;
    if (!ready(line)) continue;  // it waits for a slot as well, or for its own sake
    --queue.turns;
    MultiTask* first = line.waiting.front();
    const Line keep = first->line_;
    first->more_ = true;
    first->turn_ = queue.key;
    ask(first);
    keep_order(*keep);
  }
  queue.running = false;
  queue.turns = 0;
  // Somebody is asking now and leads the next round; should the turn get lost, this one does.
  if (!queue.lines.empty() && !queue.armed()) {
    queue.at = timers_.now() + kLostTurn;
    timers_.arm(queue, queue.at);
  }
  drop_if_idle(queue);
}

bool MultiService::offered(Stand& stand, bool more) {
  MultiLine& line = *stand.line;
  if (!ready(line, &stand)) {
    stand.service->set_freed(stand, true);
    return false;
  }
  MultiTask* first = line.waiting.front();
  const Line keep = first->line_;
  first->more_ = more;
  ask(first);
  keep_order(*keep);
  return true;
}

void MultiService::was_reset(LimitService& service, const std::string& group) {
  std::vector<Line> concerned;
  for (const auto& [key, line] : lines_)
    if (!line->waiting.empty() && find(*line->waiting.front(), &service, group)) concerned.push_back(line);
  for (const Line& line : concerned) {
    ask_anew(*line);
    pump(line);
  }
}

MultiTask* MultiService::overtaken(MultiTask* task) {
  const MultiLine& line = *task->line_;
  if (line.waiting.empty()) return nullptr;
  MultiTask* first = line.waiting.front();
  if (first->order_ > task->order_ || first->deadline < timers_.now()) return nullptr;
  if (first->stages_.size() != task->stages_.size()) return nullptr;
  for (std::size_t k = 0; k < task->stages_.size(); ++k) {
    const Stage& mine = *task->stages_[k];
    const Stage& its = *first->stages_[k];
    if (mine.service != its.service || mine.passed_open || its.passed_open) return nullptr;
    for (std::size_t j = 0; j < mine.limits.size(); ++j) {
      const MultiPart& a = task->limits[mine.limits[j]];
      const MultiPart& b = first->limits[its.limits[j]];
      if (a.limiter != b.limiter || a.cost != b.cost) return nullptr;
    }
  }
  return first;
}

// --- leaving before the end -----------------------------------------------------------------------

void MultiService::expire(MultiTask* task) {
  const Line line = task->line_;
  const bool first = line->waiting.front() == task;
  blame(task, *line);
  leave(task);
  if (first && !line->waiting.empty() && !same_costs(*task, *line->waiting.front())) ask_anew(*line);
  finish(task, Outcome::refused);
  keep_order(*line);
  pump(line);
  drop_if_empty(line, false);
}

// Those who cannot wait as long as the first in line has to.
void MultiService::refuse_early(const Line& line) {
  while (!line->deadlines.empty() && line->deadlines.begin()->first < line->not_before) {
    MultiTask* task = line->deadlines.begin()->second;
    blame(task, *line);
    leave(task);
    finish(task, Outcome::refused);
  }
}

void MultiService::cancel(MultiTask* task, Outcome outcome) {
  if (task->state_ == MultiTask::State::created || task->state_ == MultiTask::State::finished) return;
  const Line line = task->line_;
  const bool was_asking = task->state_ == MultiTask::State::asking;
  const bool first = !was_asking && line->waiting.front() == task;
  if (was_asking) {
    Stage& stage = *task->stages_[task->stage_];
    stage.service->unwatch(stage);
    take_back(stage);
  }
  const std::string turn = std::exchange(task->turn_, {});
  leave(task);
  if (was_asking) {
    return_grants(task);
    if (!line->gone) {
      line->quiet_until = saturating_add(timers_.now(), kQuiet);
      ask_anew(*line);
    }
    for (const auto& stand : line->stands) stand->service->ask_soon(stand->group->id);
  } else if (first && !line->waiting.empty() && !same_costs(*task, *line->waiting.front())) {
    ask_anew(*line);
  }
  finish(task, outcome);
  keep_order(*line);
  pump(line);
  drop_if_empty(line, was_asking);
  if (!turn.empty()) let_sleep(turn, saturating_add(timers_.now(), kQuiet));
}

void MultiService::return_grants(MultiTask* task) {
  // Out of the task first: what is given back may wake others, who end up here.
  std::vector<MultiPart> parts;
  for (MultiPart& part : task->limits) {
    if (!part.granted) continue;
    parts.push_back(part);
    part.granted = part.charged = false;
    part.permit = nullptr;
  }
  // The latest first: a store takes back its newest deal only.
  for (auto part = parts.rbegin(); part != parts.rend(); ++part)
    part->limiter->service->give_back(part->group, part->cost, part->charged, {part->at, part->stamp},
                                      part->permit);
}

void MultiService::closing(LimitService& service) {
  std::vector<MultiTask*> all;
  std::vector<Line> lines;
  for (const auto& [key, line] : lines_) {
    const MultiTask* any = line->waiting.empty() ? line->asking.front() : line->waiting.front();
    if (std::none_of(any->stages_.begin(), any->stages_.end(),
                     [&service](const auto& stage) { return stage->service == &service; }))
      continue;
    lines.push_back(line);
    all.insert(all.end(), line->asking.begin(), line->asking.end());
    all.insert(all.end(), line->waiting.begin(), line->waiting.end());
  }
  for (const Line& line : lines) {
    line->gone = true;
    timers_.cancel(*line);
    leave_queue(*line);
    leave_stands(*line, false);
    lines_.erase(std::string(line->key));
  }
  for (MultiTask* task : all) {
    task->status = Status::make(Code::closed, "the engine was shut down while this call was waiting");
    cancel(task, Outcome::failed);
  }
}

// --- the end --------------------------------------------------------------------------------------

void MultiService::finish(MultiTask* task, Outcome outcome) {
  task->state_ = MultiTask::State::finished;
  task->outcome = outcome;
  task->waited = std::max<Nanos>(0, timers_.now() - task->submitted);
  count(task);
  task->line_ = nullptr;
  task->target->deliver(task);  // hands over the reference; task may be gone now
}

void MultiService::count(MultiTask* task) {
  const auto blocking = [task]() -> Counters& { return task->limits[task->blocking].limiter->counters; };
  switch (task->outcome) {
    case Outcome::granted:
    case Outcome::passed_open:
      for (const MultiPart& part : task->limits) {
        Counters& counters = part.limiter->counters;
        part.granted ? count_grant(counters, timers_.now(), task->waited) : add(counters.passed_open);
      }
      break;
    case Outcome::refused:
      add(blocking().timeouts);
      add(task->why == Verdict::rate_limited ? blocking().refused_rate : blocking().refused_concurrency);
      break;
    case Outcome::failed: add(blocking().failed); break;
    case Outcome::cancelled:
      for (const MultiPart& part : task->limits) add(part.limiter->counters.cancelled);
      break;
  }
}

}  // namespace ratesync::engine
