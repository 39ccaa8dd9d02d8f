// The state of one trip, shared by the files of the lock store: lock_store.cc queues, lock_deal.cc asks and
// deals, lock_waiters.cc keeps places in line.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "ratesync/postgres/lock_store.h"
#include "ratesync/postgres/patience.h"

namespace ratesync::postgres {

// A place in line lives so long without a word from its process; it says one three times as often.
inline constexpr Nanos kLockPlace = 3 * kSecond;

struct PgLockStore::Trip {
  Trip(Lane& its_lane, ItemBatcher::Batch its_batch, PgPool::Lease its_connection)
      : lane(its_lane), batch(std::move(its_batch)), connection(std::move(its_connection)) {}

  Lane& lane;
  ItemBatcher::Batch batch;  // owns the items
  PgPool::Lease connection;
  unsigned trips_in_a_row = 1;    // on this connection, without giving it back
  LockItems pending;              // not answered yet, for the next round
  std::vector<LockItems> parked;  // cut off because one of `pending` is bad; the last comes first
  LockRound round;                // under way
  LockItems freeing;              // of it: what the first in line is told about
  std::size_t keep_call = 0, take_call = 0, notify_call = 0, look_call = 0, queue_call = 0;
  Patience patience;              // with what the server refuses
  unsigned lost_connections = 0;  // in a row, before anything was sent
  Nanos began = 0;
};

// What a round decided, before anybody is told.
struct PgLockStore::Dealt {
  LockItems done;                  // replies are filled in
  LockItems again;                 // ask once more
  std::vector<std::string> freed;  // keys of locks whose first waiter is this process
};

}  // namespace ratesync::postgres
