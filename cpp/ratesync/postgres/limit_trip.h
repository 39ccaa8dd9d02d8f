// The state of one trip and of one renewal, shared by the files of the limit store: limit_store.cc
// queues, limit_deal.cc asks and deals, limit_renew.cc keeps slots.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "ratesync/postgres/limit_store.h"
#include "ratesync/postgres/patience.h"

namespace ratesync::postgres {

// Between attempts to tell the server about slots that it could not be told about.
inline constexpr Nanos kRestatePause = kSecond / 4;

struct PgLimitStore::Trip {
  Trip(Lane& its_lane, OpBatcher::Batch its_batch, PgPool::Lease its_connection)
      : lane(its_lane), batch(std::move(its_batch)), connection(std::move(its_connection)) {}

  Lane& lane;
  OpBatcher::Batch batch;  // owns the operations
  PgPool::Lease connection;
  unsigned trips_in_a_row = 1;           // on this connection, without giving it back
  OpList pending;                        // not answered yet, for the next round
  std::vector<OpList> parked;            // cut off because one of `pending` is bad; the last comes first
  TripPlan plan;                         // of the round under way
  std::vector<Holding*> stated;          // what the round states about slots, run by run; null: no slots
  std::vector<std::size_t> stated_from;  // layer by layer
  std::size_t layer_call = 0, peek_call = 0, window_peek_call = 0;  // indexes into the pipeline
  Patience patience;                                                // with what the server refuses
  unsigned lost_connections = 0;                                    // in a row, before anything was sent
  unsigned lost_races = 0;  // rounds in a row in which an insert was lost
  Nanos sent = 0;
};

// What a round decided, before anybody is told.
struct Dealt {
  struct Lost {
    std::string group;
    store::HolderId holder;
    std::int64_t slots;
  };
  OpList acquires;  // of one limit or several; replies are filled in
  OpList again;     // ask once more
  OpList sides;     // refund, settle, reset
  std::vector<std::pair<QueuedOp*, store::Peek>> peeks;
  std::vector<Lost> lost;
  std::vector<Holding*> touched;
};

}  // namespace ratesync::postgres
