// The state of one trip and of one renewal, shared by the files of the limit store: limit_store.cc
// queues, limit_deal.cc asks and deals, limit_renew.cc keeps slots.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "ratesync/postgres/limit_store.h"

namespace ratesync::postgres {

// Between attempts to tell the server about slots that it could not be told about.
inline constexpr Nanos kRestatePause = kSecond / 4;

struct LimitTrip : LaneTrip<QueuedOp> {
  using LaneTrip::LaneTrip;

  TripPlan plan;                         // of the round under way
  std::vector<Holding*> stated;          // what the round states about slots, run by run; null: no slots
  std::vector<std::size_t> stated_from;  // layer by layer
  std::size_t layer_call = 0, peek_call = 0, window_peek_call = 0;  // indexes into the pipeline
  unsigned lost_races = 0;  // rounds in a row in which an insert was lost
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
