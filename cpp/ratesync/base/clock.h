// The engine's clock: monotonic nanoseconds, or a hand-moved clock for tests.
//
// Only elapsed time on this machine is ever taken from here. Decisions of remote stores use the
// server's clock.
#pragma once

#include <atomic>
#include <cstdint>
#include <ctime>
#include <limits>

namespace ratesync {

using Nanos = std::int64_t;
inline constexpr Nanos kMicro = 1'000;
inline constexpr Nanos kMilli = 1'000'000;
inline constexpr Nanos kSecond = 1'000'000'000;
// A deadline that never comes / a wait without bound.
inline constexpr Nanos kForever = std::numeric_limits<Nanos>::max();

// Rounded: 64.999 times a thousand million is a little less than it should be. From 0 to some 290 years.
constexpr Nanos from_seconds(double seconds) {
  return static_cast<Nanos>(seconds * static_cast<double>(kSecond) + 0.5);
}

class Clock {
 public:
  static constexpr Nanos kManualStart = 1'000 * kSecond;

  explicit Clock(bool manual = false) : manual_(manual), wall_offset_(manual ? 0 : measure()) {}

  [[nodiscard]] bool manual() const { return manual_; }
  [[nodiscard]] Nanos now() const {
    if (manual_) return hand_.load(std::memory_order_acquire);
    return read(CLOCK_MONOTONIC);
  }
  // now() since the Unix epoch, for windows that follow the calendar. The distance is taken once, at the
  // start: later corrections of the system's clock neither stretch nor shorten a window. A manual clock
  // counts its own time from the epoch.
  [[nodiscard]] Nanos wall(Nanos now) const { return now + wall_offset_; }
  // Manual clocks only: move time forward.
  void advance(Nanos by) { hand_.fetch_add(by, std::memory_order_acq_rel); }

 private:
  static Nanos read(clockid_t id) {
    timespec ts;
    clock_gettime(id, &ts);
    return static_cast<Nanos>(ts.tv_sec) * kSecond + ts.tv_nsec;
  }
  static Nanos measure() { return read(CLOCK_REALTIME) - read(CLOCK_MONOTONIC); }

  const bool manual_;
  const Nanos wall_offset_;
  std::atomic<Nanos> hand_{kManualStart};
};

// a + b, staying at kForever instead of overflowing. Both must not be negative.
constexpr Nanos saturating_add(Nanos a, Nanos b) { return a > kForever - b ? kForever : a + b; }

}  // namespace ratesync
