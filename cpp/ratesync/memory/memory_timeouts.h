// Timeouts of keys: what is due is handed to exactly one claimer, for a while.
//
// Not the hot path: one mutex over ordered containers. A timeout is independent of the row of its key.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "ratesync/store/state_store.h"

namespace ratesync::memory {

class Timeouts {
 public:
  using Outcome = store::StateReply::Outcome;

  // Guards everything; the caller of the methods below holds it.
  std::mutex mutex;

  void schedule(const store::Space& space, const std::string& kind, std::string_view key, std::int64_t due);
  // What unschedule() would come to, and the claim that is the newest (0: none).
  [[nodiscard]] std::pair<Outcome, std::int64_t> judge(const store::Space& space, const std::string& kind,
                                                       std::string_view key, std::int64_t expected) const;
  void unschedule(const store::Space& space, const std::string& kind, std::string_view key);
  std::vector<store::DueKey> claim_due(const store::Space& space, const std::string& kind, std::size_t limit,
                                       std::int64_t lease, std::int64_t now);
  [[nodiscard]] std::size_t size() const;

 private:
  struct Timeout {
    std::int64_t due = 0;
    std::int64_t next = 0;   // may be claimed from then on
    std::int64_t claim = 0;  // the newest; 0: none since it was scheduled
  };
  // Of one space and kind. `line` is ordered by time and holds views of the keys in `all`.
  struct Queue {
    std::map<std::string, Timeout, std::less<>> all;
    std::set<std::pair<std::int64_t, std::string_view>> line;
  };
  using Kinds = std::map<std::string, Queue, std::less<>>;

  [[nodiscard]] const Timeout* find(const store::Space& space, const std::string& kind,
                                    std::string_view key) const;

  std::map<std::pair<std::string, std::string>, Kinds> spaces_;  // no empty queue, no empty space
  std::int64_t claims_ = 0;
};

}  // namespace ratesync::memory
