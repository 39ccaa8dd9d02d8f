// The state of one trip, shared by the files of the lock store: lock_store.cc queues, lock_deal.cc asks and
// deals, lock_waiters.cc keeps places in line.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "ratesync/postgres/lock_store.h"

namespace ratesync::postgres {

// A place in line lives so long without a word from its process; it says one three times as often.
inline constexpr Nanos kLockPlace = 3 * kSecond;

struct LockTrip : LaneTrip<LockItem> {
  using LaneTrip::LaneTrip;

  LockRound round;    // under way
  LockItems freeing;  // of it: what the first in line is told about
  std::size_t keep_call = 0, take_call = 0, notify_call = 0, look_call = 0, queue_call = 0;
};

// What a round decided, before anybody is told.
struct PgLockStore::Dealt {
  LockItems done;                  // replies are filled in
  LockItems again;                 // ask once more
  std::vector<std::string> freed;  // keys of locks whose first waiter is this process
};

}  // namespace ratesync::postgres
