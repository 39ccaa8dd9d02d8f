#include "ratesync/engine/keeper.h"

#include <algorithm>
#include <utility>

namespace ratesync::engine {

namespace {

constexpr Nanos kRetryMin = 10 * kMilli;
constexpr Nanos kRetryMax = kSecond;

Nanos from_ms(std::int64_t ms) { return ms > kForever / kMilli ? kForever : ms * kMilli; }

Status shut_down() {
  return Status::make(Code::closed, "the engine was shut down: leases are not renewed any more");
}

}  // namespace

// --- the end, seen by any thread ----------------------------------------------------------------

Kept::Kept(Keeper& keeper, std::int64_t ttl_ms, bool auto_renew, Nanos ends_at)
    : keeper_(keeper), auto_renew_(auto_renew), ttl_ms_(ttl_ms), ends_at_(ends_at) {}

Kept::Fate Kept::fate(Nanos now) {
  Nanos ends = ends_at_.load();
  while (ends > 0 && now >= ends)
    if (ends_at_.compare_exchange_weak(ends, kLost)) return Fate::lost;
  return ends > 0 ? Fate::held : ends == kLost ? Fate::lost : Fate::ended;
}

Nanos Kept::remaining(Nanos now) {
  if (fate(now) != Fate::held) return 0;
  const Nanos ends = ends_at_.load();
  return ends == kForever ? kForever : std::max<Nanos>(0, ends - now);
}

bool Kept::settle(Fate why) {
  Nanos ends = ends_at_.load();
  while (ends > 0)
    if (ends_at_.compare_exchange_weak(ends, why == Fate::lost ? kLost : kEnded)) return true;
  return false;
}

bool Kept::prolong(Nanos now, Nanos ends_at) {
  Nanos ends = ends_at_.load();
  while (ends > 0 && now < ends)
    if (ends_at_.compare_exchange_weak(ends, ends_at)) return true;
  return fate(now) == Fate::held;
}

void Kept::fire() { keeper_.due(*this); }

// --- calls --------------------------------------------------------------------------------------

void LossSignal::start() { kept->keeper().watch(this); }
void LossSignal::cancel() { kept->keeper().unwatch(this); }
void Extension::start() { kept->keeper().extend(this); }

// --- the I/O thread -----------------------------------------------------------------------------

Nanos Keeper::jittered(Nanos base) {
  const double part = std::uniform_real_distribution<>(0.8, 1.0)(random_);
  return static_cast<Nanos>(part * static_cast<double>(base));
}

// The caller has a reference of its own.
void Keeper::unlink(Kept& kept) {
  if (!kept.kept_) return;
  (kept.previous_ ? kept.previous_->after_ : first_) = kept.after_;
  if (kept.after_) kept.after_->previous_ = kept.previous_;
  kept.previous_ = kept.after_ = nullptr;
  kept.kept_.reset();
  --count_;
}

void Keeper::keep(const KeptRef& kept, Nanos sent) {
  if (!kept->kept_) {
    kept->kept_ = kept;
    kept->after_ = first_;
    if (first_) first_->previous_ = kept.get();
    first_ = kept.get();
    ++count_;
  }
  if (kept->auto_renew() && !kept->local())
    kept->next_ = saturating_add(sent, jittered(from_ms(kept->ttl_ms()) / 3));
  arm(*kept);
}

void Keeper::arm(Kept& kept) {
  if (closing_) return;
  const Nanos ends = kept.ends_at_.load(std::memory_order_acquire);
  if (ends <= 0) return tell(kept);
  const Nanos at = kept.answering_ ? ends : std::min(ends, kept.next_);
  if (at != kForever) timers_.arm(kept, at);
}

void Keeper::due(Kept& kept) {
  // The clock first: this process may have been stopped for longer than the lease.
  const Nanos now = timers_.now();
  if (kept.fate(now) != Kept::Fate::held) return tell(kept);
  if (kept.answering_ || now < kept.next_) return arm(kept);
  send(kept, kept.ttl_ms());
}

void Keeper::send(Kept& kept, std::int64_t ttl_ms) {
  const KeptRef self = kept.shared_from_this();
  kept.answering_ = self;
  kept.asked_ms_ = ttl_ms;
  kept.sent_ = timers_.now();
  kept.next_ = kForever;
  arm(kept);
  kept.ask(ttl_ms);  // may be answered inside
}

void Keeper::answered(Kept& kept, Answer answer, const Status& status) {
  const KeptRef self = std::exchange(kept.answering_, nullptr);
  Extension* extension = nullptr;
  if (std::exchange(kept.extending_, false)) {
    extension = kept.extensions_.front();
    kept.extensions_.pop_front();
  }
  const Nanos now = timers_.now();
  switch (answer) {
    case Answer::held:
      kept.failures_ = 0;
      if (kept.prolong(now, saturating_add(kept.sent_, from_ms(kept.asked_ms_)))) {
        kept.set_ttl_ms(kept.asked_ms_);
        if (kept.auto_renew() && !kept.local())
          kept.next_ = saturating_add(kept.sent_, jittered(from_ms(kept.asked_ms_) / 3));
      }
      break;
    case Answer::lost: kept.settle(Kept::Fate::lost); break;
    case Answer::failed: {
      const Nanos step = std::clamp(from_ms(kept.ttl_ms()) / 20, kRetryMin, kRetryMax);
      const Nanos pause = std::min(step << std::min(kept.failures_++, 3), kRetryMax);
      if (kept.auto_renew()) kept.next_ = saturating_add(now, jittered(pause));
      break;
    }
  }
  const bool held = kept.fate(now) == Kept::Fate::held;
  if (extension) {
    extension->lost = !held;
    if (held && answer == Answer::failed) extension->status = status;
    extension->target->deliver(extension);
  }
  if (!held) return tell(kept);
  send_next(kept);
}

void Keeper::send_next(Kept& kept) {
  if (kept.answering_) return;
  if (kept.extensions_.empty()) return arm(kept);
  kept.extending_ = true;
  const std::int64_t ttl_ms = kept.extensions_.front()->ttl_ms;
  // A shorter one may be in force before its answer is here.
  const Nanos now = timers_.now();
  const Nanos ends = saturating_add(now, from_ms(ttl_ms));
  if (ends < kept.ends_at_.load(std::memory_order_acquire)) kept.prolong(now, ends);
  send(kept, ttl_ms);
}

void Keeper::extend(Extension* extension) {
  Kept& kept = *extension->kept;
  if (closing_) {
    extension->status = shut_down();
  } else if (kept.fate(timers_.now()) == Kept::Fate::held) {
    kept.extensions_.push_back(extension);
    return send_next(kept);
  } else {
    extension->lost = true;
    tell(kept);
  }
  extension->target->deliver(extension);
}

bool Keeper::end(const KeptRef& kept) {
  const KeptRef self = kept;
  const bool held = self->fate(timers_.now()) == Kept::Fate::held && self->settle(Kept::Fate::ended);
  tell(*self);
  return held;
}

void Keeper::tell(Kept& kept) {
  const KeptRef self = kept.shared_from_this();
  unlink(kept);
  if (std::exchange(kept.told_, true)) return;
  timers_.cancel(kept);
  const bool lost = kept.fate(timers_.now()) == Kept::Fate::lost;
  std::list<LossSignal*> signals;
  signals.swap(kept.signals_);
  for (LossSignal* signal : signals) {
    signal->waiting_ = false;
    signal->lost = lost;
    signal->target->deliver(signal);
  }
  // Those that were not sent yet; the one under way gets its answer.
  std::deque<Extension*> waiting;
  waiting.swap(kept.extensions_);
  if (kept.extending_) {
    kept.extensions_.push_back(waiting.front());
    waiting.pop_front();
  }
  for (Extension* extension : waiting) {
    extension->lost = true;
    extension->target->deliver(extension);
  }
  if (lost) kept.on_lost();
}

void Keeper::watch(LossSignal* signal) {
  Kept& kept = *signal->kept;
  const Kept::Fate fate = kept.fate(timers_.now());
  if (fate != Kept::Fate::held || closing_) {
    signal->lost = fate == Kept::Fate::lost;
    if (fate == Kept::Fate::held) signal->status = shut_down();
    signal->target->deliver(signal);
    if (fate == Kept::Fate::lost) tell(kept);
    return;
  }
  signal->waiting_ = true;
  signal->place_ = kept.signals_.insert(kept.signals_.end(), signal);
  kept.watched_.store(true);
  if (!kept.armed()) keep(signal->kept, timers_.now());
  // Ended by another thread between the look and the flag (memory store).
  if (kept.fate(timers_.now()) != Kept::Fate::held) tell(kept);
}

void Keeper::unwatch(LossSignal* signal) {
  if (!std::exchange(signal->waiting_, false)) return;
  signal->kept->signals_.erase(signal->place_);
  signal->target->deliver(signal);
}

void Keeper::shutdown() {
  closing_ = true;
  while (first_) {
    const KeptRef kept = first_->kept_;
    unlink(*kept);
    timers_.cancel(*kept);
    kept->next_ = kForever;
    std::list<LossSignal*> signals;
    signals.swap(kept->signals_);
    for (LossSignal* signal : signals) {
      signal->waiting_ = false;
      signal->status = shut_down();
      signal->target->deliver(signal);
    }
  }
}

}  // namespace ratesync::engine
