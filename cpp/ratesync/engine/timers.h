// Timers of the I/O thread: one Asio timer armed for the earliest of many nodes.
//
// Nodes are embedded in what they time (no allocation per timer beyond the index) and may be
// cancelled in O(log n). With a manual clock nothing is armed; Engine::advance calls run_due().
#pragma once

#include <asio/steady_timer.hpp>
#include <map>

#include "ratesync/base/clock.h"

namespace ratesync::engine {

class Timers;

class TimerNode {
 public:
  TimerNode() = default;
  TimerNode(const TimerNode&) = delete;
  TimerNode& operator=(const TimerNode&) = delete;
  virtual ~TimerNode() = default;  // must be cancelled before
  virtual void fire() = 0;
  [[nodiscard]] bool armed() const { return armed_; }

 private:
  friend class Timers;
  std::multimap<Nanos, TimerNode*>::iterator where_;
  bool armed_ = false;
};

class Timers {
 public:
  Timers(asio::io_context& io, const Clock& clock) : clock_(clock), timer_(io) {}

  void arm(TimerNode& node, Nanos at);  // re-arms when armed
  void cancel(TimerNode& node);
  void run_due();
  void stop() {
    timer_.cancel();
    stopped_ = true;
  }
  [[nodiscard]] Nanos next() const { return nodes_.empty() ? kForever : nodes_.begin()->first; }
  [[nodiscard]] std::size_t size() const { return nodes_.size(); }
  [[nodiscard]] Nanos now() const { return clock_.now(); }

 private:
  void rearm();

  const Clock& clock_;
  asio::steady_timer timer_;
  std::multimap<Nanos, TimerNode*> nodes_;
  Nanos armed_for_ = kForever;
  bool stopped_ = false;
};

}  // namespace ratesync::engine
