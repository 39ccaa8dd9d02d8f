// The state of one trip, shared by the files of the state store: state_store.cc queues, state_trip.cc asks
// and deals, state_doubt.cc finds out what became of a lost one.
#pragma once

#include <string>
#include <utility>

#include "ratesync/postgres/state_store.h"

namespace ratesync::postgres {

struct StateTrip : LaneTrip<QueuedState> {
  using LaneTrip::LaneTrip;

  StateItems held;      // of the wide lane: behind keys that others carry
  StateRound round;     // under way
  unsigned cuts = 0;    // names for the parts of stages that were cut
  unsigned pauses = 0;  // in a row
  bool pause = false;   // before the next round
};

}  // namespace ratesync::postgres
