// What the engine's tests on one thread have in common: where results arrive, and the time that they move.
#pragma once

#include <algorithm>
#include <asio/io_context.hpp>
#include <utility>
#include <vector>

#include "ratesync/base/clock.h"
#include "ratesync/engine/completion.h"
#include "ratesync/engine/timers.h"

namespace ratesync::engine {

// Where results arrive, and stay until forget().
class Inbox final : public CompletionTarget {
 public:
  ~Inbox() override { forget(); }
  void forget() {
    for (Completion* task : std::exchange(arrived, {})) task->unref();
  }
  void deliver(Completion* completion) override { arrived.push_back(completion); }
  bool has(const Completion* task) const { return std::count(arrived.begin(), arrived.end(), task) == 1; }
  std::vector<Completion*> arrived;
};

// A rig whose clock is moved by hand.
struct HandMoved {
  void run(Nanos by = 0) {
    clock.advance(by);
    timers.run_due();
  }
  // Step by step, as real time would.
  void pass(Nanos by, Nanos step = 5 * kMilli) {
    for (Nanos gone = 0; gone < by; gone += step) run(step);
  }

  Clock clock{true};
  asio::io_context io;
  Timers timers{io, clock};
};

}  // namespace ratesync::engine
