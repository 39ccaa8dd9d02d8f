// The state of one trip, shared by the files of the state store: state_store.cc queues, state_trip.cc asks
// and deals, state_doubt.cc finds out what became of a lost one.
#pragma once

#include <string>
#include <utility>

#include "ratesync/postgres/state_store.h"

namespace ratesync::postgres {

struct PgStateStore::Trip {
  Trip(Lane& its_lane, StateBatcher::Batch its_batch, PgPool::Lease its_connection)
      : lane(its_lane), batch(std::move(its_batch)), connection(std::move(its_connection)) {}

  Lane& lane;
  StateBatcher::Batch batch;  // owns the items
  PgPool::Lease connection;
  Nanos began = 0;
  StateItems pending;  // not answered yet, in the order of their arrival
  StateItems held;     // of the wide lane: behind keys that others carry
  StateRound round;    // under way
  unsigned cuts = 0;   // names for the parts of stages that were cut
  unsigned lost_connections = 0;
  unsigned pauses = 0;  // in a row
  bool pause = false;   // before the next round
  Nanos sent = 0;
};

}  // namespace ratesync::postgres
