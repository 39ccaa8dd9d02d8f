#include "ratesync/engine/timers.h"

#include <chrono>

namespace ratesync::engine {

void Timers::arm(TimerNode& node, Nanos at) {
  cancel(node);
  node.where_ = nodes_.emplace(at, &node);
  node.armed_ = true;
  rearm();
}

void Timers::cancel(TimerNode& node) {
  if (!node.armed_) return;
  nodes_.erase(node.where_);
  node.armed_ = false;
  // The Asio timer stays: an early wake-up finds nothing due and arms itself anew. That is
  // cheaper than touching the timer for each of 10,000 cancelled waiters.
}

void Timers::run_due() {
  const Nanos now = clock_.now();
  while (!nodes_.empty() && nodes_.begin()->first <= now) {
    TimerNode* node = nodes_.begin()->second;
    nodes_.erase(nodes_.begin());
    node->armed_ = false;
    node->fire();  // may arm, cancel or destroy nodes
  }
  rearm();
}

void Timers::rearm() {
  if (clock_.manual() || stopped_ || nodes_.empty()) return;
  const Nanos at = nodes_.begin()->first;
  if (at >= armed_for_) return;
  armed_for_ = at;
  timer_.expires_at(std::chrono::steady_clock::time_point(std::chrono::nanoseconds(at)));
  timer_.async_wait([this](const asio::error_code& error) {
    if (error || stopped_) return;
    armed_for_ = kForever;
    run_due();
  });
}

}  // namespace ratesync::engine
