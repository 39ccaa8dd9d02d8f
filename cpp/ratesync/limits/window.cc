#include "ratesync/limits/window.h"

#include <algorithm>
#include <cmath>

namespace ratesync::limits {

namespace {

// Counters stay below this, whatever settle() is told: exact in double precision, far from overflow.
constexpr std::int64_t kMaxUnits = 1LL << 52;

std::int64_t floor_to(std::int64_t time, std::int64_t window) { return time / window * window; }

std::int64_t add_units(std::int64_t units, std::int64_t delta) {
  return std::clamp<std::int64_t>(units + delta, 0, kMaxUnits);
}

std::int64_t counted(std::int64_t total, std::int64_t delta) {
  return total + std::max<std::int64_t>(delta, 0);
}

// So many windows back from the one of the latest slot, and what is in that one and the one before.
struct Fall {
  std::int64_t back, used, previous;
};

Fall take_off(std::int64_t used, std::int64_t previous, std::int64_t limit, std::int64_t units) {
  if (units < used) return {0, used - units, previous};
  units -= used;
  if (units == 0 || units < previous) return {1, previous - units, limit};
  units -= previous;
  return {2 + units / limit, limit - units % limit, limit};
}

}  // namespace

// --- fixed_window ---------------------------------------------------------------------------------

// The state with its window rolled on to `now`, or left where it is if that is ahead.
FixedWindow FixedWindow::at(Quota quota, std::int64_t now) const {
  FixedWindow out = *this;
  const std::int64_t mine = floor_to(start_, quota.window);
  out.start_ = std::max(mine, floor_to(now, quota.window));
  if (out.start_ != mine) {
    out.previous_ = out.start_ - mine == quota.window ? used_ : 0;
    out.used_ = 0;
  }
  return out;
}

FixedWindow FixedWindow::after(Quota quota, std::int64_t now, std::int64_t cost) const {
  FixedWindow out = at(quota, now);
  if (out.used_ + cost > quota.limit) {
    out.start_ += quota.window;
    out.previous_ = out.used_;
    out.used_ = 0;
  }
  out.used_ += cost;
  out.total_ += cost;
  return out;
}

WindowDeal FixedWindow::take(Quota quota, std::int64_t now, std::int64_t cost, std::int64_t max_wait) {
  const FixedWindow next = after(quota, now, cost);
  const std::int64_t wait = std::max<std::int64_t>(0, next.start_ - now);
  if (wait > max_wait) return {false, wait};
  *this = next;
  return {true, wait};
}

std::int64_t FixedWindow::wait_of(Quota quota, std::int64_t now, std::int64_t cost) const {
  return std::max<std::int64_t>(0, after(quota, now, cost).start_ - now);
}

std::int64_t FixedWindow::available(Quota quota, std::int64_t now) const {
  const FixedWindow state = at(quota, now);
  return state.start_ > now ? 0 : std::max<std::int64_t>(0, quota.limit - state.used_);
}

std::int64_t FixedWindow::full_after(Quota quota, std::int64_t now) const {
  const FixedWindow state = at(quota, now);
  return state.used_ == 0 ? 0 : state.start_ + quota.window - now;
}

std::int64_t FixedWindow::refund(Quota quota, std::int64_t cost, std::int64_t stamp) {
  if (stamp != total_) return total_;
  const Fall fall = take_off(used_, previous_, quota.limit, cost);
  if (fall.back > 0) start_ = floor_to(start_, quota.window) - fall.back * quota.window;
  used_ = fall.used;
  previous_ = fall.previous;
  return total_ -= cost;
}

void FixedWindow::settle(Quota quota, std::int64_t now, std::int64_t delta) {
  *this = at(quota, now);
  used_ = add_units(used_, delta);
  total_ = counted(total_, delta);
}

// --- sliding_counter ------------------------------------------------------------------------------

SlidingCounter SlidingCounter::at(Quota quota, std::int64_t now) const {
  SlidingCounter out = *this;
  out.last_ = std::max(now, last_);
  const std::int64_t windows = out.last_ / quota.window - last_ / quota.window;
  if (windows > 0) {
    out.previous_ = windows == 1 ? current_ : 0;
    out.current_ = 0;
  }
  return out;
}

SlidingCounter SlidingCounter::after(Quota quota, std::int64_t now, std::int64_t cost) const {
  SlidingCounter out = at(quota, now);
  std::int64_t start = floor_to(out.last_, quota.window);
  // The third window at the latest has nothing before it.
  for (int round = 0; round < 3; ++round) {
    const std::int64_t end = start + quota.window;
    const std::int64_t room = quota.limit - out.current_ - cost;
    if (room >= 0) {
      std::int64_t slot = out.last_;
      if (out.previous_ > room) {
        const double reach = static_cast<double>(room) * static_cast<double>(quota.window) /
                             static_cast<double>(out.previous_);
        slot = std::max(slot, end - static_cast<std::int64_t>(std::floor(reach)));
      }
      if (slot < end) {
        out.last_ = slot;
        break;
      }
    }
    out.previous_ = out.current_;
    out.current_ = 0;
    out.last_ = start = end;
  }
  out.current_ += cost;
  out.total_ += cost;
  return out;
}

WindowDeal SlidingCounter::take(Quota quota, std::int64_t now, std::int64_t cost, std::int64_t max_wait) {
  const SlidingCounter next = after(quota, now, cost);
  const std::int64_t wait = std::max<std::int64_t>(0, next.last_ - now);
  if (wait > max_wait) return {false, wait};
  *this = next;
  return {true, wait};
}

std::int64_t SlidingCounter::wait_of(Quota quota, std::int64_t now, std::int64_t cost) const {
  return std::max<std::int64_t>(0, after(quota, now, cost).last_ - now);
}

std::int64_t SlidingCounter::available(Quota quota, std::int64_t now) const {
  if (last_ > now) return 0;
  const SlidingCounter state = at(quota, now);
  const std::int64_t left = quota.window - (now - floor_to(now, quota.window));
  const double weighted =
      static_cast<double>(state.previous_) * static_cast<double>(left) / static_cast<double>(quota.window);
  return std::max<std::int64_t>(
      0, quota.limit - state.current_ - static_cast<std::int64_t>(std::ceil(weighted)));
}

std::int64_t SlidingCounter::full_after(Quota quota, std::int64_t now) const {
  const SlidingCounter state = at(quota, now);
  const std::int64_t end = floor_to(state.last_, quota.window) + quota.window;
  if (state.current_ > 0) return end + quota.window - now;
  return state.previous_ > 0 ? end - now : 0;
}

std::int64_t SlidingCounter::refund(Quota quota, std::int64_t cost, std::int64_t stamp) {
  if (stamp != total_) return total_;
  const Fall fall = take_off(current_, previous_, quota.limit, cost);
  if (fall.back > 0) last_ = floor_to(last_, quota.window) - fall.back * quota.window;
  current_ = fall.used;
  previous_ = fall.previous;
  return total_ -= cost;
}

void SlidingCounter::settle(Quota quota, std::int64_t now, std::int64_t delta) {
  *this = at(quota, now);
  current_ = add_units(current_, delta);
  total_ = counted(total_, delta);
}

// --- sliding_window -------------------------------------------------------------------------------

void SlidingWindow::prune(Quota quota, std::int64_t now) {
  while (first_ < log_.size() && log_[first_].at <= now - quota.window) pruned_ = log_[first_++].upto;
  if (first_ == log_.size()) {
    log_.clear();
    first_ = 0;
  } else if (first_ > log_.size() / 2) {
    log_.erase(log_.begin(), log_.begin() + static_cast<std::ptrdiff_t>(first_));
    first_ = 0;
  } else {
    return;
  }
  if (log_.capacity() > 16 && log_.size() < log_.capacity() / 4) log_.shrink_to_fit();
}

void SlidingWindow::append(std::int64_t at, std::int64_t units) {
  if (!log_.empty() && log_.back().at == at) {
    log_.back().upto += units;
  } else {
    log_.push_back({at, upto() + units});
  }
}

// The slot is bound by the unit that lies `limit` units back: when it leaves the window, there is room.
std::int64_t SlidingWindow::wait_of(Quota quota, std::int64_t now, std::int64_t cost) const {
  if (log_.empty()) return 0;
  std::int64_t slot = std::max(now, log_.back().at);
  const std::int64_t bound = upto() + cost - quota.limit;
  if (bound > pruned_) {
    const auto entry = std::lower_bound(log_.begin() + static_cast<std::ptrdiff_t>(first_), log_.end(), bound,
                                        [](const Entry& e, std::int64_t unit) { return e.upto < unit; });
    if (entry != log_.end()) slot = std::max(slot, entry->at + quota.window);
  }
  return slot - now;
}

WindowDeal SlidingWindow::take(Quota quota, std::int64_t now, std::int64_t cost, std::int64_t max_wait) {
  prune(quota, now);
  const std::int64_t wait = wait_of(quota, now, cost);
  if (wait > max_wait) return {false, wait};
  append(now + wait, cost);
  total_ += cost;
  return {true, wait};
}

std::int64_t SlidingWindow::available(Quota quota, std::int64_t now) const {
  const auto alive =
      std::upper_bound(log_.begin() + static_cast<std::ptrdiff_t>(first_), log_.end(), now - quota.window,
                       [](std::int64_t t, const Entry& e) { return t < e.at; });
  const auto index = static_cast<std::size_t>(alive - log_.begin());
  return std::max<std::int64_t>(0, quota.limit - (upto() - before(index)));
}

std::int64_t SlidingWindow::full_after(Quota quota, std::int64_t now) const {
  return log_.empty() ? 0 : std::max<std::int64_t>(0, log_.back().at + quota.window - now);
}

std::int64_t SlidingWindow::refund(Quota /*quota*/, std::int64_t cost, std::int64_t stamp) {
  if (stamp != total_) return total_;
  std::int64_t left = cost;
  while (left > 0 && !log_.empty()) {
    const std::int64_t units = log_.back().upto - before(log_.size() - 1);
    if (units > left) {
      log_.back().upto -= left;
      break;
    }
    left -= units;
    log_.pop_back();
    if (first_ == log_.size()) {
      log_.clear();
      first_ = 0;
    }
  }
  return total_ -= cost;
}

void SlidingWindow::settle(Quota quota, std::int64_t now, std::int64_t delta) {
  prune(quota, now);
  if (delta > 0) {
    append(log_.empty() ? now : std::max(now, log_.back().at), delta);
    total_ += delta;
    return;
  }
  // Off the newest that are not ahead: those ahead belong to callers who still sleep.
  std::int64_t left = -delta;
  auto end = std::upper_bound(log_.begin() + static_cast<std::ptrdiff_t>(first_), log_.end(), now,
                              [](std::int64_t t, const Entry& e) { return t < e.at; });
  auto index = static_cast<std::size_t>(end - log_.begin());
  const std::size_t ahead = index;
  std::int64_t taken = 0;
  while (taken < left && index > first_) {
    const std::int64_t units = log_[index - 1].upto - before(index - 1);
    if (units > left - taken) {
      log_[index - 1].upto -= left - taken;
      taken = left;
      break;
    }
    taken += units;
    --index;
  }
  for (std::size_t i = ahead; i < log_.size(); ++i) log_[i].upto -= taken;
  log_.erase(log_.begin() + static_cast<std::ptrdiff_t>(index),
             log_.begin() + static_cast<std::ptrdiff_t>(ahead));
  if (first_ == log_.size()) {
    log_.clear();
    first_ = 0;
  }
}

// --- any of them ----------------------------------------------------------------------------------

namespace {

std::variant<FixedWindow, SlidingCounter, SlidingWindow> fresh(Algorithm algorithm, std::int64_t total) {
  switch (algorithm) {
    case Algorithm::fixed_window: return FixedWindow(total);
    case Algorithm::sliding_counter: return SlidingCounter(total);
    case Algorithm::sliding_window:
    case Algorithm::token_bucket: break;  // the latter has no window: callers ask is_window() first
  }
  return SlidingWindow(total);
}

}  // namespace

WindowState::WindowState(Algorithm algorithm, std::int64_t total) : state_(fresh(algorithm, total)) {}

Algorithm WindowState::algorithm() const {
  static constexpr Algorithm kOrder[] = {Algorithm::fixed_window, Algorithm::sliding_counter,
                                         Algorithm::sliding_window};
  return kOrder[state_.index()];
}

}  // namespace ratesync::limits
