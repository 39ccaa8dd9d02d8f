#include "ratesync/engine/state_service.h"

#include <algorithm>
#include <utility>

namespace ratesync::engine {

namespace {

// How long a call whose operation was sent outlives its deadline: the store is bound by the same one, and
// says what it found out.
constexpr Nanos kPatience = kSecond / 4;
// Deadlines are looked after no more often than this.
constexpr Nanos kTick = 5 * kMilli;

// What the store had executed by then is not known, unless it was a read.
bool writes(const store::StateOp& op) { return op.verb != store::StateOp::Verb::get; }

}  // namespace

Status StateService::gone() {
  return Status::make(Code::closed, "the engine was shut down; configure the store again to go on");
}

const Status& InStore::no_answer() {
  static const Status status =
      Status::make(Code::timeout, "no answer from the store within the timeout; nothing was changed");
  return status;
}

// --- one operation --------------------------------------------------------------------------------

void StateTask::start() {
  if (service_.closing()) {
    failure_ = StateService::gone();
    return finish();
  }
  state_ = State::in_store;
  service_.watch(*this, deadline);
  service_.store().submit(this);
}

void StateTask::done() {
  if (state_ == State::finished) return unref();  // given up before: nobody reads it
  unlink();
  finish();
}

void StateTask::cancel() {
  if (state_ != State::in_store) return;
  static const Status cancelled = Status::make(Code::cancelled, "cancelled by the caller");
  unlink();
  (void)give_up(cancelled, cancelled, true);
}

bool StateTask::give_up(const Status& unsent, const Status& sent, bool all) {
  if (service_.store().abandon(this)) {
    failure_ = unsent;
  } else {
    if (!all) return false;
    failure_ = writes(*this) || sent.code != Code::in_doubt ? sent : no_answer();
    ref();  // the store's
  }
  finish();
  return true;
}

void StateTask::finish() {
  state_ = State::finished;
  target->deliver(this);  // hands over the reference; this may be gone now
}

// --- several --------------------------------------------------------------------------------------

StateManyTask::Part& StateManyTask::add() {
  Part& part = parts.emplace_back(*this);
  if (atomic) ops.push_back(&part);
  return part;
}

void StateManyTask::start() {
  if (service_.closing()) {
    failure_ = StateService::gone();
    return finish();
  }
  state_ = State::in_store;
  service_.watch(*this, deadline);
  if (atomic) return service_.store().submit(static_cast<store::StateBatch*>(this));
  // One more, so that an answer from inside submit() does not end the call.
  left_ = parts.size() + 1;
  for (Part& part : parts) {
    part.in_store_ = true;
    service_.store().submit(&part);
  }
  if (--left_ > 0) return;
  unlink();
  finish();
}

void StateManyTask::done() {
  if (state_ == State::finished) return unref();
  unlink();
  finish();
}

void StateManyTask::part_done(Part& part) {
  part.in_store_ = false;
  if (--left_ > 0) return;
  if (state_ == State::finished) return unref();  // given up before
  unlink();
  finish();
}

void StateManyTask::cancel() {
  if (state_ != State::in_store) return;
  static const Status cancelled = Status::make(Code::cancelled, "cancelled by the caller");
  unlink();
  (void)give_up(cancelled, cancelled, true);
}

bool StateManyTask::give_up(const Status& unsent, const Status& sent, bool all) {
  if (atomic) {
    if (service_.store().abandon(static_cast<store::StateBatch*>(this))) {
      failure_ = unsent;
    } else {
      if (!all) return false;
      failure_ = sent;
      ref();  // the store's
    }
    finish();
    return true;
  }
  for (Part& part : parts) {
    if (!part.in_store_) continue;
    if (service_.store().abandon(&part)) {
      part.in_store_ = false;
      part.failure_ = unsent;
      --left_;
    } else if (all) {
      part.failure_ = writes(part) || sent.code != Code::in_doubt ? sent : no_answer();
    }
  }
  if (left_ > 0) {
    if (!all) return false;
    ref();  // the store's, until the last part comes back
  }
  finish();
  return true;
}

void StateManyTask::finish() {
  state_ = State::finished;
  target->deliver(this);
}

// --- the service ----------------------------------------------------------------------------------

void StateService::watch(InStore& what, Nanos deadline) {
  what.until_ = deadline;
  what.link_before(ring_);
  if (deadline < armed_for_) arm(deadline);
}

void StateService::arm(Nanos at) {
  armed_for_ = at;
  if (at == kForever) return timers_.cancel(*this);
  timers_.arm(*this, at);
}

// One timer for all: calls have mostly the same timeout and are mostly answered long before, so that it
// rings once per timeout rather than being moved with every call.
void StateService::fire() {
  const Nanos now = timers_.now();
  Ring late;  // a call that ends meanwhile takes itself out
  Nanos next = kForever;
  for (InStore* it = ring_.next_; it != &ring_;) {
    InStore& what = *std::exchange(it, it->next_);
    if (what.until_ > now) {
      next = std::min(next, what.until_);
      continue;
    }
    what.unlink();
    what.link_before(late);
  }
  armed_for_ = kForever;
  arm(next == kForever ? next : std::max(next, saturating_add(now, kTick)));
  while (late.next_ != &late) {
    InStore& what = *late.next_;
    what.unlink();
    look_after(what, now);
  }
}

void StateService::look_after(InStore& what, Nanos now) {
  static const Status unsent = Status::make(
      Code::timeout, "not sent within the timeout, so it was not executed: the store is slow or overloaded");
  static const Status sent = Status::make(
      Code::in_doubt, "sent, but no answer within the timeout: it may or may not have been executed");
  // Its place in the ring comes first: what follows may end it, and it is gone then.
  const bool all = std::exchange(what.overdue_, true);
  if (what.give_up(unsent, sent, all)) return;
  watch(what, saturating_add(now, kPatience));
}

void StateService::shutdown() {
  closing_ = true;
  timers_.cancel(*this);
  armed_for_ = 0;  // nothing is watched any more
  static const Status unsent =
      Status::make(Code::closed, "the store was closed before this call was sent: it was not executed");
  static const Status sent = Status::make(
      Code::closed, "the store was closed while this call was under way: it may have been executed");
  while (ring_.next_ != &ring_) {
    InStore& what = *ring_.next_;
    what.unlink();
    (void)what.give_up(unsent, sent, true);
  }
}

std::size_t StateService::in_store() const {
  std::size_t count = 0;
  for (const InStore* it = ring_.next_; it != &ring_; it = it->next_) ++count;
  return count;
}

Result<StateService*> StateServices::get(const std::string& prefix) {
  const std::lock_guard lock(mutex_);
  if (closing_) return StateService::gone();
  const auto known = services_.find(prefix);
  if (known != services_.end()) return known->second.get();
  Result<store::StateStore*> made = store_.state(prefix);
  if (!made.ok()) return made.status();
  return services_.emplace(prefix, std::make_unique<StateService>(*made.value(), timers_))
      .first->second.get();
}

void StateServices::shutdown() {
  const std::lock_guard lock(mutex_);
  closing_ = true;
  for (auto& [prefix, service] : services_) service->shutdown();
}

}  // namespace ratesync::engine
