// Windows: at most `limit` units per `window`, in three ways of counting.
//
//   fixed_window     calendar windows [k*W, (k+1)*W) since the Unix epoch, one counter
//   sliding_counter  calendar windows, the one before weighted by how much of it is still in reach
//   sliding_window   the exact log: at most L units in any (t - W, t]
//
// Slots are dealt in order of arrival and never before an earlier one, so a request may get a slot in
// a window to come and sleep until then. One whose slot lies beyond its patience is refused and leaves
// no trace. Unlike the token bucket there is no timing margin.
//
// Pure arithmetic: `now` is a parameter, times are integers of any one unit (nanoseconds in memory,
// microseconds elsewhere) since the Unix epoch. SQL and Lua do the same sums, and
// tests/vectors/windows.json pins all of them. Where a quotient is needed it is taken in double
// precision, in the order written here, since Lua knows nothing else.
//
// Each keeps `total`, the units dealt so far: the stamp by which a deal is refunded while it is the
// newest. It grows with every deal and every charge of settle(), and shrinks by refunds only.
#pragma once

#include <cstdint>
#include <variant>
#include <vector>

#include "ratesync/limits/params.h"

namespace ratesync::limits {

// What may change from call to call; consumption stays when it does. `window` in the caller's unit.
struct Quota {
  std::int64_t limit = 1;
  std::int64_t window = 1;
};

struct WindowDeal {
  bool granted = false;
  std::int64_t wait = 0;  // granted: until the slot; refused: until the slot that there would have been
};

class FixedWindow {
 public:
  explicit FixedWindow(std::int64_t total = 0) : total_(total) {}
  // A cost above the limit is never granted a meaningful slot: validate_cost() keeps it out.
  WindowDeal take(Quota quota, std::int64_t now, std::int64_t cost, std::int64_t max_wait);
  [[nodiscard]] std::int64_t wait_of(Quota quota, std::int64_t now, std::int64_t cost) const;
  [[nodiscard]] std::int64_t available(Quota quota, std::int64_t now) const;
  [[nodiscard]] std::int64_t full_after(Quota quota, std::int64_t now) const;
  std::int64_t refund(Quota quota, std::int64_t cost, std::int64_t stamp);
  void settle(Quota quota, std::int64_t now, std::int64_t delta);
  [[nodiscard]] std::int64_t total() const { return total_; }
  [[nodiscard]] std::int64_t last() const { return start_; }

 private:
  [[nodiscard]] FixedWindow at(Quota quota, std::int64_t now) const;
  [[nodiscard]] FixedWindow after(Quota quota, std::int64_t now, std::int64_t cost) const;

  std::int64_t start_ = 0;     // of the window of the latest slot dealt
  std::int64_t used_ = 0;      // in that window
  std::int64_t previous_ = 0;  // and in the one before
  std::int64_t total_;
};

class SlidingCounter {
 public:
  explicit SlidingCounter(std::int64_t total = 0) : total_(total) {}
  WindowDeal take(Quota quota, std::int64_t now, std::int64_t cost, std::int64_t max_wait);
  [[nodiscard]] std::int64_t wait_of(Quota quota, std::int64_t now, std::int64_t cost) const;
  [[nodiscard]] std::int64_t available(Quota quota, std::int64_t now) const;
  [[nodiscard]] std::int64_t full_after(Quota quota, std::int64_t now) const;
  std::int64_t refund(Quota quota, std::int64_t cost, std::int64_t stamp);
  void settle(Quota quota, std::int64_t now, std::int64_t delta);
  [[nodiscard]] std::int64_t total() const { return total_; }
  [[nodiscard]] std::int64_t last() const { return last_; }

 private:
  [[nodiscard]] SlidingCounter at(Quota quota, std::int64_t now) const;
  [[nodiscard]] SlidingCounter after(Quota quota, std::int64_t now, std::int64_t cost) const;

  std::int64_t last_ = 0;      // time of the latest slot dealt
  std::int64_t current_ = 0;   // units in its calendar window
  std::int64_t previous_ = 0;  // and in the one before
  std::int64_t total_;
};

class SlidingWindow {
 public:
  explicit SlidingWindow(std::int64_t total = 0) : total_(total) {}
  WindowDeal take(Quota quota, std::int64_t now, std::int64_t cost, std::int64_t max_wait);
  [[nodiscard]] std::int64_t wait_of(Quota quota, std::int64_t now, std::int64_t cost) const;
  [[nodiscard]] std::int64_t available(Quota quota, std::int64_t now) const;
  [[nodiscard]] std::int64_t full_after(Quota quota, std::int64_t now) const;
  std::int64_t refund(Quota quota, std::int64_t cost, std::int64_t stamp);
  void settle(Quota quota, std::int64_t now, std::int64_t delta);
  [[nodiscard]] std::int64_t total() const { return total_; }
  [[nodiscard]] std::int64_t last() const { return log_.empty() ? 0 : log_.back().at; }
  // Entries kept, for tests of the bound: one per grant in the window or ahead of it.
  [[nodiscard]] std::size_t entries() const { return log_.size() - first_; }

 private:
  struct Entry {
    std::int64_t at;
    std::int64_t upto;  // units of the log up to and with this entry
  };
  void prune(Quota quota, std::int64_t now);
  void append(std::int64_t at, std::int64_t units);
  [[nodiscard]] std::int64_t upto() const { return log_.empty() ? pruned_ : log_.back().upto; }
  [[nodiscard]] std::int64_t before(std::size_t index) const {
    return index == first_ ? pruned_ : log_[index - 1].upto;
  }

  std::vector<Entry> log_;   // in order of `at`; those before first_ are gone
  std::size_t first_ = 0;    // never log_.size(), unless both are 0
  std::int64_t pruned_ = 0;  // `upto` of the last entry that is gone
  std::int64_t total_;
};

// Whichever of the three a group has; a change of algorithm starts afresh.
class WindowState {
 public:
  WindowState(Algorithm algorithm, std::int64_t total);
  [[nodiscard]] Algorithm algorithm() const;

  WindowDeal take(Quota quota, std::int64_t now, std::int64_t cost, std::int64_t max_wait) {
    return std::visit([&](auto& w) { return w.take(quota, now, cost, max_wait); }, state_);
  }
  // How long a request of that cost would have to wait; charges nothing.
  [[nodiscard]] std::int64_t wait_of(Quota quota, std::int64_t now, std::int64_t cost) const {
    return std::visit([&](const auto& w) { return w.wait_of(quota, now, cost); }, state_);
  }
  // Units that could be taken at `now` without waiting.
  [[nodiscard]] std::int64_t available(Quota quota, std::int64_t now) const {
    return std::visit([&](const auto& w) { return w.available(quota, now); }, state_);
  }
  // Until nothing of what was dealt counts any more.
  [[nodiscard]] std::int64_t full_after(Quota quota, std::int64_t now) const {
    return std::visit([&](const auto& w) { return w.full_after(quota, now); }, state_);
  }
  // Acts only while `stamp` is the total; returns the total, new or not. Units come off the newest calendar
  // window, and one that is left without any is left for the window before, or waiters who gave up would
  // block the limit for windows to come. What lies before that one is not kept and taken as full: exact for
  // fixed_window where every cost is 1, elsewhere too careful, never too generous (sliding_counter: by about
  // a unit for each window that is gone back).
  std::int64_t refund(Quota quota, std::int64_t cost, std::int64_t stamp) {
    return std::visit([&](auto& w) { return w.refund(quota, cost, stamp); }, state_);
  }
  // Charges more than was dealt (which may exceed the limit), or gives back, down to nothing.
  void settle(Quota quota, std::int64_t now, std::int64_t delta) {
    std::visit([&](auto& w) { w.settle(quota, now, delta); }, state_);
  }
  [[nodiscard]] std::int64_t total() const {
    return std::visit([](const auto& w) { return w.total(); }, state_);
  }
  // The latest slot dealt (fixed_window: the start of its window); 0: none.
  [[nodiscard]] std::int64_t last() const {
    return std::visit([](const auto& w) { return w.last(); }, state_);
  }

 private:
  std::variant<FixedWindow, SlidingCounter, SlidingWindow> state_;
};

}  // namespace ratesync::limits
