// What one pipeline of the lock store asks, and in which order: operations of one name are carried out as
// they came, those of different names together. Pure.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "ratesync/base/clock.h"
#include "ratesync/postgres/connection.h"
#include "ratesync/store/lock_store.h"

namespace ratesync::postgres {

// namespace NUL tenant NUL name: sorts as the three columns do, since none holds NUL.
std::string lock_key(const store::Space& space, std::string_view name);
struct LockName {
  std::string_view name_space, tenant, name;
};
LockName split_key(std::string_view key);

struct LockItem {
  enum class Kind : std::uint8_t {
    take,    // acquire
    keep,    // renew, release, break_
    unwait,  // nobody of this process stands in line any more; tell the next, unless it is a bell
    stand,
    ring,  // bells
  };
  Kind kind = Kind::take;
  store::LockOp* op = nullptr;  // null: unwait
  std::string key;
  std::int64_t mark = 0;      // < 0: names this release, also when it is sent again
  bool refused = false;       // take: somebody else has it, we ask who
  unsigned lost_races = 0;    // it was free when we asked
  Nanos doubtful_until = -1;  // sent, answer lost: sent again until then
  bool bell = false;          // unwait: of a bell
  std::size_t row = 0;        // of its statement, from 0

  [[nodiscard]] bool frees() const {
    return (kind == Kind::unwait && !bell) || (kind == Kind::keep && op->verb != store::LockOp::Verb::renew);
  }
};
using LockItems = std::vector<LockItem*>;

// Either keeps, unwaits, bells and takes, in this order; or looks and queues. Each list is sorted by key.
struct LockRound {
  LockItems keeps, unwaits;  // one per name
  LockItems stands, rings;   // one per name
  LockItems takes;           // one per name
  LockItems looks, queues;   // any number per name; those of one name share a row
  LockItems later;           // in order

  [[nodiscard]] LockItems asked() const;
};

LockRound plan_locks(const LockItems& pending, bool waiters);

// The names of items as $1, $2, $3; one row for each name.
std::vector<Param> lock_names(const LockItems& items);

// What a release told us: "9 3 namespacetenname", lengths in bytes. False: something else.
bool read_freed(std::string_view payload, store::Space& space, std::string& name);

}  // namespace ratesync::postgres
