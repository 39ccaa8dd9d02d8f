// The concurrency slots that this process holds, group by group, and what the server was told.
//
// The lease that the server keeps carries an absolute count, so whatever goes wrong - a lost answer, a
// release while the server is away - is healed by saying the count again. A lease that was not
// renewed for its whole length counts as lost here too, by this process's own clock, measured from
// the moment the last successful statement was sent. Pure: no clock, no I/O.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "ratesync/base/clock.h"
#include "ratesync/store/limit_store.h"

namespace ratesync::store {

struct Holding {
  GroupRef group;
  HolderId id = 0;                  // this incarnation
  HolderId fresh = 0;               // the next one, if the server finds that this one was lost
  std::int64_t held = 0;            // slots in use here
  std::int64_t stated = 0;          // what the server knows; kUnknown after a lost answer
  std::int64_t freed = 0;           // without leases: given back, the server does not know yet
  Nanos renewed = 0;                // when the last statement that refreshed the lease was sent
  Nanos unstated_since = kForever;  // since when held != stated could not be told
  std::uint64_t changes = 0;        // statements about this group, sent and answered
  std::int64_t sent_held = 0;       // in the statement under way
  std::int64_t sent_freed = 0;
  bool flying = false;  // such a statement is under way
  bool queued = false;  // a restatement waits in the lane

  static constexpr std::int64_t kUnknown = -1;
  [[nodiscard]] bool in_step() const { return held == stated && freed == 0; }
};

class Holders {
 public:
  explicit Holders(std::uint64_t seed) : random_(seed) {}

  Holding* find(const std::string& group);
  Holding& of(const GroupRef& group);
  // A slot comes back. Null: it belongs to an incarnation that is gone.
  Holding* release(const std::string& group, HolderId holder);

  // Around every statement that carries the group.
  void sent(Holding& holding);
  // `granted` more slots; `lost`: those held before are gone and `fresh` is the incarnation now.
  // Returns the number of slots that were lost.
  std::int64_t answered(Holding& holding, std::int64_t granted, bool lost, bool wrote, Nanos sent_at);
  void failed(Holding& holding, bool in_doubt, Nanos now);

  // The lease is gone: the next incarnation begins with nothing. Returns the slots that were held.
  std::int64_t forget(Holding& holding);
  // Drops the entry when there is nothing to remember.
  void tidy(Holding& holding);

  struct Due {
    std::vector<Holding*> renew;
    std::vector<Holding*> lost;
    std::vector<Holding*> restate;
    Nanos next = kForever;
  };
  // What the time asks for. `retry`: pause between attempts to tell the server what it does not know.
  Due due(Nanos now, Nanos retry, bool leases);

  [[nodiscard]] auto begin() { return all_.begin(); }
  [[nodiscard]] auto end() { return all_.end(); }
  [[nodiscard]] std::size_t size() const { return all_.size(); }

 private:
  HolderId random_id() { return (random_() >> 1) | 1; }

  std::unordered_map<std::string, Holding> all_;  // node based: pointers stay
  std::mt19937_64 random_;
};

}  // namespace ratesync::store
