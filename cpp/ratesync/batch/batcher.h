// Smart batching: while a round trip is under way, operations that arrive are queued; the next trip
// carries all of them, up to a bound. No timer: a lone operation leaves at once, and the cost per
// operation falls as load rises. Pure bookkeeping: no clock, no thread, no I/O.
//
//   Result<Ticket> t = batcher.push(std::move(op), hash(key));   // refused: op is untouched, fail it
//   while (auto batch = batcher.take()) send(std::move(*batch));  // after each push and each answer
//   on the answer, exactly one of: finished(batch.id); requeue(batch); split(batch)
//
// A lane has one batch in flight. All operations of a key share a lane, hence
//   - they are executed in the order in which they were pushed, also across retries;
//   - two trips of one process never lock the same row: they cannot deadlock or wait for each other.
#pragma once

#include <algorithm>
#include <cassert>
#include <cstdint>
#include <list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ratesync/base/status.h"

namespace ratesync::batch {

struct BatcherOptions {
  std::size_t max_batch = 1'000;   // operations per trip; from 1
  std::size_t max_queue = 10'000;  // operations waiting for a trip, all lanes together; from 1
  std::size_t lanes = 1;           // trips at the same time; from 1
};

// Names one pushed operation. Stays harmless for ever: it never cancels a later operation that got
// the same place. A default ticket names nothing.
struct Ticket {
  std::uint32_t slot = 0;
  std::uint64_t serial = 0;
};

struct BatcherStats {
  std::uint64_t batches = 0;    // trips, retries included
  std::uint64_t ops = 0;        // operations carried by them: ops / batches is the mean size
  std::uint64_t retries = 0;    // trips that were put back whole
  std::uint64_t splits = 0;     // trips that were cut in two
  std::uint64_t cancelled = 0;  // operations that left the queue before a trip
};

template <class Op>  // movable
class Batcher {
 public:
  struct Batch {
    std::uint64_t id = 0;
    std::size_t lane = 0;
    unsigned attempt = 1;  // 2 after one requeue; the caller caps it
    bool sealed = false;   // came out of a split
    std::vector<Op> ops;   // requeue and split want them as they were taken: same number and order
  };
  enum class Split {
    done,    // both halves are at the front of the lane
    single,  // one operation: it is the bad one. Fail it, then finished()
    closed,  // no more trips: fail all of them, then finished()
  };

  explicit Batcher(BatcherOptions options);
  Batcher(const Batcher&) = delete;
  Batcher& operator=(const Batcher&) = delete;

  // `op` is moved from only on success, so that the caller can still answer it. Errors: exhausted
  // (with the numbers), closed.
  Result<Ticket> push(Op&& op, std::uint64_t lane_hash);
  [[nodiscard]] std::size_t lane_of(std::uint64_t lane_hash) const;

  // The next trip of a lane that has queued operations and none under way; lanes take turns.
  std::optional<Batch> take();

  // The trip ended and every operation was answered: the lane is free. False: no such trip.
  bool finished(std::uint64_t id);

  // A transient failure (deadlock, serialization, lost before sending): the batch goes back to the
  // front of its lane and travels again as it is, with attempt + 1. It is not merged with arrivals,
  // since the count of attempts would mean nothing then. Operations for which drop(op) is true
  // (cancelled meanwhile) are let go. False: closed, or not in flight; the batch stays with the
  // caller, who fails its operations and calls finished().
  template <class Drop>
  bool requeue(Batch& batch, Drop&& drop);
  bool requeue(Batch& batch) {
    return requeue(batch, [](const Op&) { return false; });
  }

  // One operation of the batch made the server refuse all of it, and the server does not say which.
  // The halves travel as batches of their own, never merged with others, so that bisection ends at
  // the bad operation alone: 2*log2(n) extra trips for one in n. A half counts its attempts anew.
  template <class Drop>
  Split split(Batch& batch, Drop&& drop);
  Split split(Batch& batch) {
    return split(batch, [](const Op&) { return false; });
  }

  // Takes back an operation that waits for a trip, in constant time. Nothing: it is in flight (its
  // answer will come) or was answered.
  std::optional<Op> cancel(const Ticket& ticket);

  // All queued operations, for the caller to fail; trips under way still end with finished().
  std::vector<Op> close();

  [[nodiscard]] bool closed() const { return closed_; }
  [[nodiscard]] const BatcherOptions& options() const { return options_; }
  [[nodiscard]] std::size_t queued() const { return queued_; }
  [[nodiscard]] std::size_t in_flight() const { return in_flight_; }  // operations
  [[nodiscard]] const BatcherStats& stats() const { return stats_; }

 private:
  static constexpr std::uint32_t kNone = ~std::uint32_t{0};

  struct Chain {  // linked through Slot::prev and next
    std::uint32_t head = kNone;
    std::uint32_t tail = kNone;
    std::size_t size = 0;
  };
  // An operation keeps its slot from push until it is answered, so that its ticket stays valid over
  // retries.
  struct Slot {
    std::optional<Op> op;      // empty while in flight
    std::uint64_t serial = 0;  // 0: free
    Chain* chain = nullptr;    // null while in flight
    std::uint32_t prev = kNone;
    std::uint32_t next = kNone;
  };
  struct Group {  // a batch that travels again
    Chain chain;
    unsigned attempt = 1;
    bool sealed = false;
  };
  struct Lane {
    std::list<Group> again;  // before everything in `fresh`; a list, for stable Chain addresses
    Chain fresh;
    std::uint64_t flight = 0;           // id of the trip under way, 0: none
    std::vector<std::uint32_t> aboard;  // its slots, in the order of Batch::ops
  };

  void append(Chain& chain, std::uint32_t slot);
  void unlink(std::uint32_t slot);
  void release(std::uint32_t slot);
  std::uint32_t claim();
  void board(Lane& lane, Chain& chain, Batch& batch, std::size_t limit);
  Lane* lane_of_flight(const Batch& batch);
  template <class Drop>
  void put_back(Lane& lane, Batch& batch, std::size_t from, std::size_t to, Group& group, Drop& drop);
  void land(Lane& lane);
  void drain(Chain& chain, std::vector<Op>& into);

  const BatcherOptions options_;
  std::vector<Lane> lanes_;  // never resized: slots point at its chains
  std::vector<Slot> slots_;
  std::vector<std::uint32_t> free_;
  std::size_t turn_ = 0;
  std::uint64_t last_serial_ = 0;
  std::uint64_t last_id_ = 0;
  std::size_t queued_ = 0;
  std::size_t in_flight_ = 0;
  bool closed_ = false;
  BatcherStats stats_;
};

template <class Op>
Batcher<Op>::Batcher(BatcherOptions options)
    : options_{std::max<std::size_t>(options.max_batch, 1), std::max<std::size_t>(options.max_queue, 1),
               std::max<std::size_t>(options.lanes, 1)},
      lanes_(options_.lanes) {}

template <class Op>
std::size_t Batcher<Op>::lane_of(std::uint64_t lane_hash) const {
  // std::hash of an integer is the integer: mix, or keys with a common stride share one lane.
  return static_cast<std::size_t>((lane_hash * 0x9E3779B97F4A7C15ull) >> 32) % lanes_.size();
}

template <class Op>
Result<Ticket> Batcher<Op>::push(Op&& op, std::uint64_t lane_hash) {
  if (closed_) return Status::make(Code::closed, "the store is closed");
  if (queued_ >= options_.max_queue) {
    return Status::make(Code::exhausted, "the queue is full: " + std::to_string(queued_) +
                                             " operations wait (at most " +
                                             std::to_string(options_.max_queue) + ") and " +
                                             std::to_string(in_flight_) + " are under way");
  }
  const std::uint32_t index = claim();
  Slot& slot = slots_[index];
  slot.op.emplace(std::move(op));
  slot.serial = ++last_serial_;
  append(lanes_[lane_of(lane_hash)].fresh, index);
  ++queued_;
  return Ticket{index, slot.serial};
}

template <class Op>
std::optional<typename Batcher<Op>::Batch> Batcher<Op>::take() {
  for (std::size_t i = 0; i < lanes_.size(); ++i) {
    const std::size_t index = (turn_ + i) % lanes_.size();
    Lane& lane = lanes_[index];
    if (lane.flight != 0) continue;
    while (!lane.again.empty() && lane.again.front().chain.size == 0) lane.again.pop_front();  // cancelled
    if (lane.again.empty() && lane.fresh.size == 0) continue;

    Batch batch;
    batch.id = ++last_id_;
    batch.lane = index;
    if (!lane.again.empty()) {
      Group& group = lane.again.front();
      batch.attempt = group.attempt;
      batch.sealed = group.sealed;
      board(lane, group.chain, batch, group.chain.size);
      lane.again.pop_front();
    } else {
      board(lane, lane.fresh, batch, std::min(lane.fresh.size, options_.max_batch));
    }
    lane.flight = batch.id;
    turn_ = index + 1;
    ++stats_.batches;
    stats_.ops += batch.ops.size();
    return batch;
  }
  return std::nullopt;
}

template <class Op>
bool Batcher<Op>::finished(std::uint64_t id) {
  for (Lane& lane : lanes_) {
    if (id == 0 || lane.flight != id) continue;
    for (const std::uint32_t slot : lane.aboard) release(slot);
    land(lane);
    return true;
  }
  return false;
}

template <class Op>
template <class Drop>
bool Batcher<Op>::requeue(Batch& batch, Drop&& drop) {
  Lane* lane = lane_of_flight(batch);
  if (lane == nullptr || closed_) return false;
  lane->again.push_front(Group{{}, batch.attempt + 1, batch.sealed});
  put_back(*lane, batch, 0, batch.ops.size(), lane->again.front(), drop);
  land(*lane);
  batch.ops.clear();
  ++stats_.retries;
  return true;
}

template <class Op>
template <class Drop>
typename Batcher<Op>::Split Batcher<Op>::split(Batch& batch, Drop&& drop) {
  Lane* lane = lane_of_flight(batch);
  if (lane == nullptr || closed_) return Split::closed;
  if (batch.ops.size() < 2) return Split::single;
  const std::size_t middle = batch.ops.size() / 2;
  lane->again.push_front(Group{{}, 1, true});
  Group& second = lane->again.front();
  lane->again.push_front(Group{{}, 1, true});
  put_back(*lane, batch, 0, middle, lane->again.front(), drop);
  put_back(*lane, batch, middle, batch.ops.size(), second, drop);
  land(*lane);
  batch.ops.clear();
  ++stats_.splits;
  return Split::done;
}

template <class Op>
std::optional<Op> Batcher<Op>::cancel(const Ticket& ticket) {
  if (ticket.serial == 0 || ticket.slot >= slots_.size()) return std::nullopt;
  Slot& slot = slots_[ticket.slot];
  if (slot.serial != ticket.serial || slot.chain == nullptr) return std::nullopt;
  std::optional<Op> op = std::move(slot.op);
  unlink(ticket.slot);
  release(ticket.slot);
  --queued_;
  ++stats_.cancelled;
  return op;
}

template <class Op>
std::vector<Op> Batcher<Op>::close() {
  closed_ = true;
  std::vector<Op> ops;
  ops.reserve(queued_);
  for (Lane& lane : lanes_) {
    for (Group& group : lane.again) drain(group.chain, ops);
    lane.again.clear();
    drain(lane.fresh, ops);
  }
  return ops;
}

template <class Op>
void Batcher<Op>::append(Chain& chain, std::uint32_t index) {
  Slot& slot = slots_[index];
  slot.chain = &chain;
  slot.prev = chain.tail;
  slot.next = kNone;
  (chain.tail == kNone ? chain.head : slots_[chain.tail].next) = index;
  chain.tail = index;
  ++chain.size;
}

template <class Op>
void Batcher<Op>::unlink(std::uint32_t index) {
  Slot& slot = slots_[index];
  Chain& chain = *slot.chain;
  (slot.prev == kNone ? chain.head : slots_[slot.prev].next) = slot.next;
  (slot.next == kNone ? chain.tail : slots_[slot.next].prev) = slot.prev;
  slot.chain = nullptr;
  --chain.size;
}

template <class Op>
void Batcher<Op>::release(std::uint32_t index) {
  slots_[index].op.reset();
  slots_[index].serial = 0;
  free_.push_back(index);
}

template <class Op>
std::uint32_t Batcher<Op>::claim() {
  if (free_.empty()) {
    slots_.emplace_back();
    return static_cast<std::uint32_t>(slots_.size() - 1);
  }
  const std::uint32_t index = free_.back();
  free_.pop_back();
  return index;
}

template <class Op>
void Batcher<Op>::board(Lane& lane, Chain& chain, Batch& batch, std::size_t limit) {
  batch.ops.reserve(limit);
  lane.aboard.reserve(limit);
  for (std::size_t i = 0; i < limit; ++i) {
    const std::uint32_t index = chain.head;
    unlink(index);
    batch.ops.push_back(std::move(*slots_[index].op));
    slots_[index].op.reset();
    lane.aboard.push_back(index);
  }
  queued_ -= limit;
  in_flight_ += limit;
}

template <class Op>
typename Batcher<Op>::Lane* Batcher<Op>::lane_of_flight(const Batch& batch) {
  if (batch.id == 0 || batch.lane >= lanes_.size()) return nullptr;
  Lane& lane = lanes_[batch.lane];
  if (lane.flight != batch.id) return nullptr;
  assert(batch.ops.size() == lane.aboard.size());
  return &lane;
}

template <class Op>
template <class Drop>
void Batcher<Op>::put_back(Lane& lane, Batch& batch, std::size_t from, std::size_t to, Group& group,
                           Drop& drop) {
  for (std::size_t i = from; i < to; ++i) {
    const std::uint32_t index = lane.aboard[i];
    if (drop(std::as_const(batch.ops[i]))) {
      release(index);
      continue;
    }
    slots_[index].op.emplace(std::move(batch.ops[i]));
    append(group.chain, index);
    ++queued_;  // may pass max_queue by what was in flight: a retry is never refused
  }
}

template <class Op>
void Batcher<Op>::land(Lane& lane) {
  in_flight_ -= lane.aboard.size();
  lane.aboard.clear();
  lane.flight = 0;
}

template <class Op>
void Batcher<Op>::drain(Chain& chain, std::vector<Op>& into) {
  while (chain.size > 0) {
    const std::uint32_t index = chain.head;
    unlink(index);
    into.push_back(std::move(*slots_[index].op));
    release(index);
    --queued_;
  }
}

}  // namespace ratesync::batch
