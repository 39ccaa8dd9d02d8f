// Asking for locks, and waiting. Held locks: lock_leases.cc.
#include "ratesync/engine/lock_service.h"

#include <algorithm>
#include <random>
#include <utility>
#include <vector>

#include "ratesync/engine/op_ids.h"

namespace ratesync::engine {

using store::LockOp;
using store::LockReply;
using Outcome = LockAcquire::Outcome;

namespace {

constexpr Nanos kPollMin = 20 * kMilli;
constexpr Nanos kPollMax = 250 * kMilli;
// While the store tells us: only in case a message was lost, and to stay remembered.
constexpr Nanos kPollPushed = kSecond;
// How long the first answer may take at least, however short the caller's timeout.
constexpr Nanos kAnswerTime = 5 * kSecond;
// How long an answer that was lost is asked for again.
constexpr Nanos kDoubtTime = 10 * kSecond;
constexpr int kUnwantedTries = 3;
// How long a line stands while the store cannot be reached: a failover takes seconds.
constexpr Nanos kOutageTime = 60 * kSecond;
// How long the end waits for answers: releases that do not get through leave it to the ttl.
constexpr Nanos kGoodbyeTime = 700 * kMilli;

// Rings once; whatever it calls may destroy it.
class Patience final : public TimerNode {
 public:
  explicit Patience(std::function<void()> over) : over_(std::move(over)) {}
  void fire() override {
    const std::function<void()> over = over_;
    over();
  }

 private:
  const std::function<void()> over_;
};

Status shut_down() {
  return Status::make(Code::closed, "the engine was shut down; configure the store again to go on");
}

}  // namespace

void LockAcquire::start() { service.start(this); }

void LockAcquire::cancel() { service.cancel(this); }

void LockAcquire::done() { service.replied(this); }

void LockAcquire::fire() { service.time_is_up(this); }

void LockName::fire() { service.ask_first(key); }

void LockAcquire::orphaned() {
  if (lease) service.let_go(lease);
}

LockService::LockService(store::LockStore& store, Keeper& keeper, Timers& timers, bool shared,
                         std::function<void(std::function<void()>)> post, std::uint64_t seed)
    : store_(store),
      keeper_(keeper),
      timers_(timers),
      shared_(shared),
      post_(std::move(post)),
      random_(static_cast<std::minstd_rand::result_type>(seed | 1)),
      bells_(store, timers, shared, seed ^ 1, [this] { farewell(); }) {
  store_.on_freed([this](const store::Space& space, const std::string& name) {
    std::string key = key_of(space, name);
    // The memory store says so on the releasing thread.
    shared_ ? freed(key) : post_([this, key = std::move(key)] { freed(key); });
  });
}

LockService::~LockService() = default;

LockService::Name* LockService::find(const std::string& key) {
  const auto it = names_.find(key);
  return it == names_.end() ? nullptr : it->second.get();
}

LockService::Name& LockService::name_of(LockAcquire& task) {
  std::string key = key_of(*task.space, task.name);
  auto& place = names_[key];
  if (!place) {
    place = std::make_unique<Name>(*this, std::move(key));
    place->space = task.space;
    place->name = task.name;
  }
  task.at_ = place.get();
  return *place;
}

void LockService::drop_if_idle(Name& name) {
  if (!name.line.empty() || held_here(name)) return;
  stop_waiting(name);
  timers_.cancel(name);
  names_.erase(name.key);
}

bool LockService::held_here(Name& name) {
  const HeldLockRef lease = name.holder.lock();
  return lease && lease->fate(timers_.now()) == Kept::Fate::held;
}

Nanos LockService::jittered(Nanos base) {
  return base / 2 +
         static_cast<Nanos>(std::uniform_real_distribution<>(0.0, 1.0)(random_) * static_cast<double>(base));
}

// --- asking ---------------------------------------------------------------------------------------

void LockService::start(LockAcquire* task) {
  if (closing_) {
    task->status = shut_down();
    return finish(task, Outcome::failed);
  }
  task->ttl = store_ttl(task->lease_ms, task->auto_renew);
  task->id = next_op_id();
  Name& name = name_of(*task);
  const Nanos now = timers_.now();
  const bool here = held_here(name);
  if ((here || !name.line.empty()) && task->until <= now) {
    if (const HeldLockRef lease = name.holder.lock()) task->remaining_ms = lease->remaining(now) / kMilli;
    return finish(task, Outcome::not_in_time);
  }
  task->place_ = name.line.insert(name.line.end(), task);
  waiting_.fetch_add(1, std::memory_order_acq_rel);
  if (!here && name.line.size() == 1) return ask(task);
  task->state_ = LockAcquire::State::in_line;
  if (task->until != kForever) timers_.arm(*task, task->until);
}

void LockService::ask(LockAcquire* task) {
  const Nanos now = timers_.now();
  task->state_ = LockAcquire::State::asking;
  task->sent_ = now;
  task->queued = task->until > now;
  if (task->patience_ == 0) task->patience_ = std::max(task->until, saturating_add(now, kAnswerTime));
  task->deadline = std::max(task->patience_, saturating_add(now, kPollMin));
  task->reply = {};
  task->at_->freed = false;
  timers_.cancel(*task->at_);
  if (task->until != kForever) timers_.arm(*task, task->refused_ ? task->until : task->patience_);
  ++in_store_;
  store_.submit(task);
}

void LockService::ask_first(const std::string& key, bool although_held_here) {
  to_ask_.emplace_back(key, although_held_here);
  if (std::exchange(asking_, true)) return;  // whoever is at it goes on; a store may answer inside
  while (!to_ask_.empty()) {
    const auto [next, anyway] = std::move(to_ask_.front());
    to_ask_.pop_front();
    Name* name = find(next);
    if (!name) continue;
    if (name->line.empty()) {
      drop_if_idle(*name);
    } else if (!closing_ && name->line.front()->state_ == LockAcquire::State::in_line &&
               (anyway || !held_here(*name))) {
      ask(name->line.front());
    }
  }
  asking_ = false;
}

void LockService::replied(LockAcquire* task) {
  --in_store_;
  if (task->given_up_) return unwanted(task);
  Name& name = *task->at_;
  const Code code = task->reply.status.code;
  if (code == Code::in_doubt || (task->doubts_ > 0 && code == Code::unavailable))
    return in_doubt(name, task, std::move(task->reply.status));
  if (code == Code::unavailable && outlasts(name, *task)) return away(name, task);
  if (!task->reply.status.ok()) {
    const std::string key = name.key;
    task->status = std::move(task->reply.status);
    leave_line(name, task);
    finish(task, Outcome::failed);
    return ask_first(key);
  }
  task->doubts_ = 0;
  task->status = {};
  name.away_since = kForever;
  if (task->reply.outcome == LockReply::Outcome::held) return won(name, task);
  refused(name, task);
}

void LockService::won(Name& name, LockAcquire* task) {
  const std::string key = name.key;
  // Sent again after a lost answer, it may have been running for a while.
  const std::int64_t ttl_ms =
      task->reply.remaining > 0 ? std::min(task->ttl, task->reply.remaining) : task->ttl;
  const Nanos now = timers_.now();
  stop_waiting(name);
  HeldLockRef lease = make_lease(task->space, task->name, task->reply.token, task->lease_ms, task->auto_renew,
                                 task->sent_, ttl_ms);
  if (lease->fate(now) != Kept::Fate::held) {
    // The answer took longer than the lease runs (or this process stood still meanwhile).
    task->id = next_op_id();
    task->state_ = LockAcquire::State::in_line;
    task->refused_ = true;
    if (task->until <= now) {
      leave_line(name, task);
      finish(task, Outcome::not_in_time);
    }
    let_go(lease);
    return ask_first(key);
  }
  leave_line(name, task);
  const bool others_wait = !name.line.empty();
  // The next release is left to the store: time to have a place in its line. (In this process, always.)
  const bool stand_in_line = others_wait && (!shared_ || name.handovers >= kMaxHandovers);
  if (shared_) {
    name.holder = lease;
  } else {
    drop_if_idle(name);
  }
  task->lease = std::move(lease);
  finish(task, Outcome::held);
  if (stand_in_line) ask_first(key, true);
}

void LockService::refused(Name& name, LockAcquire* task) {
  const std::string key = name.key;
  task->refused_ = true;
  task->state_ = LockAcquire::State::in_line;
  task->holder = std::move(task->reply.holder);
  task->remaining_ms = known_remaining(task->reply.remaining);
  if (task->queued) name.remembered = true;
  const bool here = held_here(name);
  if (!here) name.handovers = 0;
  if (task->until <= timers_.now()) {
    leave_line(name, task);
    finish(task, Outcome::not_in_time);
    return ask_first(key);
  }
  if (std::exchange(name.freed, false)) return ask_first(key);
  if (task->until != kForever) timers_.arm(*task, task->until);
  if (!here) plan(name, task->reply.remaining);
}

// When to ask again, if nothing happens before.
void LockService::plan(Name& name, std::int64_t remaining_ms) {
  const Nanos now = timers_.now();
  Nanos at = kForever;
  if (remaining_ms > 0 && remaining_ms < kForever / kMilli)
    at = saturating_add(now, (remaining_ms + 1) * kMilli);
  if (!store_.pushes()) {
    name.pause = name.pause == 0 ? kPollMin : std::min(2 * name.pause, kPollMax);
    at = std::min(at, now + jittered(name.pause));
  } else if (shared_) {
    at = std::min(at, now + jittered(kPollPushed));
  }
  if (at != kForever) timers_.arm(name, at);
}

void LockService::in_doubt(Name& name, LockAcquire* task, Status status) {
  const Nanos now = timers_.now();
  if (task->doubts_++ == 0) task->first_doubt_ = now;
  if (closing_ || now - task->first_doubt_ >= kDoubtTime) {
    const std::string key = name.key;
    task->status = std::move(status);
    leave_line(name, task);
    finish(task, Outcome::failed);
    return ask_first(key);
  }
  task->state_ = LockAcquire::State::in_line;
  if (task->doubts_ == 1) return ask_first(name.key);
  timers_.arm(name, now + jittered(std::min(kPollMin << std::min(task->doubts_, 5), kPollMax)));
}

// Whoever was told that the lock is taken, or stands behind him, has a place that an outage should not cost
// him. A first question is answered at once.
bool LockService::outlasts(const Name& name, const LockAcquire& task) const {
  const Nanos now = timers_.now();
  if (closing_ || task.until <= now) return false;
  if (name.away_since == kForever) return task.refused_;
  return now - name.away_since < kOutageTime;
}

void LockService::away(Name& name, LockAcquire* task) {
  const Nanos now = timers_.now();
  name.away_since = std::min(name.away_since, now);
  task->state_ = LockAcquire::State::in_line;
  task->status = std::move(task->reply.status);  // in case that it is the last word
  if (task->until != kForever) timers_.arm(*task, task->until);
  timers_.arm(name, now + jittered(kPollMax));
}

void LockService::freed(const std::string& key) {
  if (bells_.heard(key)) return;
  Name* name = find(key);
  // Our own release, handed over already.
  if (!name || name->line.empty() || held_here(*name)) return;
  name->pause = 0;
  name->freed = true;
  ask_first(key);  // unless the first is asking: then once more, if it is refused
}

// --- the end, asked for or not --------------------------------------------------------------------

void LockService::time_is_up(LockAcquire* task) {
  if (!task->status.ok()) return cancel(task, Outcome::failed);  // the store is away
  const bool known = task->state_ == LockAcquire::State::in_line || task->refused_;
  if (known && task->doubts_ == 0) return cancel(task, Outcome::not_in_time);
  task->status =
      Status::make(Code::timeout,
                   "the store did not answer in time: if the lock was taken, it is given back once the "
                   "answer comes, or ends with its ttl");
  cancel(task, Outcome::failed);
}

void LockService::cancel(LockAcquire* task, Outcome as) {
  switch (task->state_) {
    case LockAcquire::State::created:
    case LockAcquire::State::finished: return;  // the reader of the completion gives back
    case LockAcquire::State::asking:
      if (store_.abandon(task)) {
        --in_store_;
      } else {
        task->given_up_ = true;
        task->ref();  // the store's; the other one goes with the completion
      }
      break;
    case LockAcquire::State::in_line: break;
  }
  Name& name = *task->at_;
  const std::string key = name.key;
  const bool was_asking = task->state_ == LockAcquire::State::asking;
  const bool first = name.line.front() == task;
  leave_line(name, task);
  finish(task, as);
  if (Name* left = find(key); left && first) {
    // Whoever is left must not depend on the one that left.
    if (was_asking || left->line.empty() || !left->armed()) ask_first(key);
  }
}

void LockService::leave_line(Name& name, LockAcquire* task) {
  timers_.cancel(*task);
  name.line.erase(task->place_);
  waiting_.fetch_sub(1, std::memory_order_acq_rel);
  if (!name.line.empty()) return;
  name.away_since = kForever;
  stop_waiting(name);
}

void LockService::stop_waiting(Name& name) {
  if (std::exchange(name.remembered, false)) store_.stop_waiting(name.space, name.name);
}

void LockService::finish(LockAcquire* task, Outcome outcome) {
  timers_.cancel(*task);
  task->state_ = LockAcquire::State::finished;
  task->at_ = nullptr;
  task->outcome = outcome;
  task->target->deliver(task);  // hands over the reference; task may be gone now
}

// Its caller has its answer already. Only fields that nobody reads any more are touched.
void LockService::unwanted(LockAcquire* task) {
  const Status& status = task->reply.status;
  if (task->verb == LockOp::Verb::acquire && !closing_ && status.code == Code::in_doubt &&
      ++task->doubts_ <= kUnwantedTries) {
    task->queued = false;
    ++in_store_;
    return store_.submit(task);
  }
  if (task->verb == LockOp::Verb::release || !status.ok()) {
    task->unref();
    return farewell();
  }
  const std::string key = key_of(*task->space, task->name);
  Name* name = find(key);
  if (task->reply.outcome == LockReply::Outcome::held) {
    task->verb = LockOp::Verb::release;
    task->token = task->reply.token;
    task->deadline = saturating_add(timers_.now(), kAnswerTime);
    ++in_store_;
    store_.submit(task);
    return ask_first(key);
  }
  if (task->queued) {
    if (name && !name->line.empty()) {
      name->remembered = true;
    } else {
      store_.stop_waiting(task->space, task->name);
    }
  }
  task->unref();
  farewell();
}

void LockService::shutdown(std::function<void()> done) {
  closing_ = true;
  if (farewell_) {  // under way: the store was closed, and then the engine
    farewell_ = [first = std::move(farewell_), second = std::move(done)] {
      first();
      second();
    };
    return;
  }
  const auto goodbye = [this] {
    if (farewell_) std::exchange(farewell_, nullptr)();
  };
  auto patience = std::make_shared<Patience>(goodbye);
  timers_.arm(*patience, saturating_add(timers_.now(), kGoodbyeTime));
  farewell_ = [this, patience, done = std::move(done)] {
    timers_.cancel(*patience);
    done();
  };
  ++in_store_;  // until all of it is asked for
  std::vector<LockAcquire*> all;
  for (auto& [key, name] : names_) {
    timers_.cancel(*name);
    all.insert(all.end(), name->line.begin(), name->line.end());
  }
  for (LockAcquire* task : all) {
    task->status = shut_down();
    cancel(task, Outcome::failed);
  }
  bells_.shutdown();
  while (held_) let_go(std::static_pointer_cast<HeldLock>(held_->shared_from_this()));
  --in_store_;
  farewell();
}

void LockService::farewell() {
  if (in_store_ == 0 && bells_.asked() == 0 && farewell_) std::exchange(farewell_, nullptr)();
}

// --- by prefix ------------------------------------------------------------------------------------

Result<LockService*> LockServices::get(const std::string& prefix) {
  const std::lock_guard lock(mutex_);
  if (closing_) return shut_down();
  if (const auto found = services_.find(prefix); found != services_.end()) return found->second.get();
  Result<store::LockStore*> locks = store_.locks(prefix);
  if (!locks.ok()) return locks.status();
  auto made = std::make_unique<LockService>(*locks.value(), keeper_, timers_, store_.capabilities().shared,
                                            post_, std::random_device{}());
  return services_.emplace(prefix, std::move(made)).first->second.get();
}

void LockServices::shutdown(std::function<void()> done) {
  std::vector<LockService*> all;
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
    for (auto& [prefix, service] : services_) all.push_back(service.get());
  }
  auto left = std::make_shared<std::size_t>(all.size() + 1);
  const auto one_less = [left, done = std::move(done)] {
    if (--*left == 0) done();
  };
  for (LockService* service : all) service->shutdown(one_less);
  one_less();
}

}  // namespace ratesync::engine
