// When a lane whose trip has landed leaves again. I/O thread only.
//
// Callers who were just answered come back one by one. So that the first of them does not leave alone and
// make all others wait for its commit, the lane waits for most of them, for a fraction of what the last trip
// took. A lone caller is never waited for, and never waits.
#pragma once

#include <algorithm>
#include <asio/io_context.hpp>
#include <asio/steady_timer.hpp>
#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <utility>

#include "ratesync/base/clock.h"

namespace ratesync::postgres {

class Gather {
 public:
  explicit Gather(asio::io_context& io) : timer_(std::make_unique<asio::steady_timer>(io)) {}

  // A trip with so many operations has landed, their callers are about to be told, and `queued` wait already.
  void landed(std::size_t answered, std::size_t queued, Nanos now, Nanos took) {
    expected_ = answered + queued;
    until_ = now + std::min(took / 4, kMost);
  }
  [[nodiscard]] bool most_are_here(std::size_t queued) const { return 4 * queued >= 3 * expected_; }
  // True: not yet, and `go` is called when the time is up; it has to see for itself whether its lane still
  // is.
  bool waits(std::size_t queued, Nanos now, std::function<void()> go) {
    if (most_are_here(queued) || now >= until_) return false;
    if (std::exchange(*waiting_, true)) return true;
    timer_->expires_after(std::chrono::nanoseconds(until_ - now));
    timer_->async_wait([waiting = waiting_, go = std::move(go)](const asio::error_code&) {
      *waiting = false;
      go();
    });
    return true;
  }

 private:
  static constexpr Nanos kMost = kMilli / 4;  // whatever the last trip took

  std::size_t expected_ = 0;
  Nanos until_ = 0;
  std::shared_ptr<bool> waiting_ = std::make_shared<bool>(false);
  std::unique_ptr<asio::steady_timer> timer_;  // behind a pointer: leaked after fork
};

}  // namespace ratesync::postgres
