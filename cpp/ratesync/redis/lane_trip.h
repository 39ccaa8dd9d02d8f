// A batch on its way, and what is all or nothing over several lanes. For lanes.cc and lane_calls.cc.
#pragma once

#include <vector>

#include "ratesync/redis/lanes.h"

namespace ratesync::redis {

// Items of this kind are gates: the same one stands in each lane that it concerns.
inline constexpr std::uint8_t kGateKind = 255;

struct Lanes::Gate {
  LaneItem item;
  const void* name = nullptr;  // in gates_: the operation, as long as it is there
  std::vector<std::uint32_t> buckets;
  std::vector<Place> places;
  std::size_t lanes = 0;  // that have not passed it
  std::vector<TripPtr> arrived;
  bool dead = false;  // taken back
  bool sent = false;
};

// It sends its operations in one call, or in several where a gate or many bytes lie between.
struct Lanes::Trip {
  std::size_t batcher = 0;
  Batcher::Batch batch;
  std::size_t next = 0;          // of batch.ops
  std::vector<LaneItem> aboard;  // of the present call
  Gate* gate = nullptr;          // the present call is this gate's
  bool writes = false;
  bool looking = false;
  std::int64_t number = 0;
  unsigned attempt = 1;
  unsigned refusals = 0;
  Nanos sent = 0;
  bool asking = false;    // about the receipt
  unsigned question = 0;  // that counts; what others answer does not
  Nanos until = 0;        // no question about the receipt after this
  std::vector<std::shared_ptr<void>> ghosts;
};

}  // namespace ratesync::redis
