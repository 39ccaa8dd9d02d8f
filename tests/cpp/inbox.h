// Where the results of tests on one thread arrive.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "ratesync/engine/completion.h"

namespace ratesync::engine {

// Where results arrive, and stay until forget().
class Inbox final : public CompletionTarget {
 public:
  void forget() {
    for (Completion* task : std::exchange(arrived, {})) task->unref();
  }
  void deliver(Completion* completion) override { arrived.push_back(completion); }
  bool has(const Completion* task) const { return std::count(arrived.begin(), arrived.end(), task) == 1; }
  std::vector<Completion*> arrived;
};

}  // namespace ratesync::engine
