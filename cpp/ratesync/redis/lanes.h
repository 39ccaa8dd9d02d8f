// How operations on rows and locks travel: many in one script call, each exactly once, those of one key in
// the order in which they were submitted. I/O thread only.
//
// A lane has one call under way; a key belongs to one lane. One server has a few lanes, a Cluster one per
// shard, hence per slot, so that a node that is down holds up nobody else's. What is all or nothing and
// spans lanes waits until each has come to it (Gate).
//
// The calls of a lane are numbered, and the server keeps a receipt of the last one, with its answer
// (lua/receipt.lua). When an answer is lost, the receipt tells whether the call was executed: its answer is
// read again, or the call is sent again under a new number and the old one is refused, should it still
// arrive. A receipt that is gone means that the server lost its memory: then each operation looks at what
// it should have written (LaneHost::write with `looking`).
#pragma once

#include <asio/io_context.hpp>
#include <asio/steady_timer.hpp>
#include <bitset>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "ratesync/base/clock.h"
#include "ratesync/batch/batcher.h"
#include "ratesync/redis/commander.h"
#include "ratesync/redis/limit_store.h"
#include "ratesync/redis/state_keys.h"
#include "ratesync/store/store.h"

namespace ratesync::redis {

// An operation on its way; what `op` is, `kind` tells its host.
struct LaneItem {
  void* op = nullptr;
  std::uint8_t kind = 0;
  std::uint32_t bucket = 0;
};

// Keys and arguments of a call, in the order in which the script takes them.
class CallWriter {
 public:
  void key(std::string_view name) { keys_.add(name); }
  template <class T>
  CallWriter& add(const T& argument) {
    arguments_.add(argument);
    return *this;
  }
  // True for the first time in this call that the shard is named: its keys have to follow.
  bool is_new(std::uint32_t shard) {
    const bool fresh = !shards_[shard];
    shards_[shard] = true;
    return fresh;
  }
  // After this key and these arguments.
  [[nodiscard]] Command command(std::string_view key, std::initializer_list<std::int64_t> arguments) const;

 private:
  Command keys_{""}, arguments_{""};
  std::bitset<StateKeys::kShards> shards_;
};

// The answer of a call, item by item; what is not there or of another type is remembered.
class Answers {
 public:
  explicit Answers(std::vector<Reply>& items, std::size_t at = 0) : items_(items), at_(at) {}
  std::int64_t number();
  std::string text();
  [[nodiscard]] bool more() const { return at_ < items_.size(); }
  [[nodiscard]] bool ok() const { return ok_; }

 private:
  std::vector<Reply>& items_;
  std::size_t at_;
  bool ok_ = true;
};

enum class Heard : std::uint8_t {
  answered,  // the reply is filled
  doubtful,  // looking: what was found does not tell
};

class LaneHost {
 public:
  virtual ~LaneHost() = default;
  [[nodiscard]] virtual const Script& script() const = 0;
  // What every call says first.
  virtual void begin(CallWriter& to) { (void)to; }
  // True: it may change something. `looking`: it may have been executed, and the receipt is gone.
  virtual bool write(const LaneItem& item, bool looking, CallWriter& to) = 0;
  virtual Heard read(const LaneItem& item, bool looking, Answers& from) = 0;
  [[nodiscard]] virtual Nanos deadline(const LaneItem& item) const = 0;
  [[nodiscard]] virtual std::size_t bytes(const LaneItem& item) const = 0;
  // Ok: the reply was filled by read().
  virtual void tell(const LaneItem& item, const Status& status) = 0;
  // Another one like it, whose end nobody hears of.
  virtual std::pair<LaneItem, std::shared_ptr<void>> ghost(const LaneItem& item) = 0;
};

struct LaneOptions {
  std::string what;  // for names of keys and messages: "state", "locks"
  Nanos call_timeout = 5 * kSecond;
  std::size_t lanes = 2;      // of one server
  std::size_t max_ops = 256;  // per call: the server serves nobody else meanwhile
  std::size_t max_bytes = 4u << 20;
  std::size_t max_queue = 100'000;
};

class Lanes {
 public:
  Lanes(asio::io_context& io, const Clock& clock, LimitBackend& backend, LaneHost& host,
        const StateKeys& keys, LaneOptions options);
  ~Lanes();

  // Refused: the item is the caller's to fail.
  Status push(const LaneItem& item);
  // One that concerns the keys of several buckets.
  Status push(const LaneItem& item, const std::vector<std::uint32_t>& buckets);
  // Takes back what was not sent.
  bool cancel(const void* op);
  // Fails what is queued with Code::closed, and lets calls under way end, for `patience` at most.
  void close(Nanos patience, std::function<void()> done);
  void abandon_after_fork() { (void)timer_.release(), (void)doubt_timer_.release(); }
  void fill(store::Stats& stats) const { stats.batched_ops += carried_; }
  [[nodiscard]] std::size_t queued() const;

 private:
  using Batcher = batch::Batcher<LaneItem>;
  struct Trip;
  using TripPtr = std::shared_ptr<Trip>;
  struct Place {
    std::size_t batcher;
    batch::Ticket ticket;
  };
  struct Lane {
    std::uint32_t shard = 0;
    std::string receipt;
    bool greeted = false;  // the receipt exists
    std::int64_t number = 0;
    Nanos used = 0;
  };
  struct Gate;
  struct Trip;

  // lanes.cc
  [[nodiscard]] std::size_t batcher_of(std::uint32_t bucket) const;
  Status enter(const LaneItem& item, Place& place);
  void wake(std::size_t batcher);
  void pump();
  void build();
  void fail_queued(const Status& status);
  void drop(const LaneItem& item, const Status& status);
  void advance(const TripPtr& trip);
  void arrive(const TripPtr& trip, Gate* gate);
  void bury(Gate* gate);
  void open(Gate* gate);
  void finish(const TripPtr& trip);
  void maybe_closed();
  void drop_receipts();

  // lane_calls.cc
  void send(const TripPtr& trip);
  void greet(const TripPtr& trip);
  void answered(const TripPtr& trip, Result<Reply> reply);
  void executed(const TripPtr& trip, std::vector<Reply>& answers);
  void failed(const TripPtr& trip, const Status& status);
  void not_executed(const TripPtr& trip, const Status& status);
  void resolve(const TripPtr& trip);
  void ask_receipt(const TripPtr& trip);
  void told_receipt(const TripPtr& trip, Result<Reply> reply);
  void arm_doubt();
  void look_after(const TripPtr& trip);
  void end_doubt(Trip& trip);
  void settle(const TripPtr& trip, const Status& status);
  void settle(const TripPtr& trip, std::vector<Status> statuses);
  Lane& lane_of(const Trip& trip);

  asio::io_context& io_;
  const Clock& clock_;
  LimitBackend& backend_;
  LaneHost& host_;
  const StateKeys& keys_;
  const LaneOptions options_;
  bool built_ =
      false;  // the kind of deployment is known; until then all stand in one lane, which does not move
  std::vector<std::unique_ptr<Batcher>> batchers_;
  std::vector<std::vector<Lane>> lanes_;  // of each batcher
  std::vector<std::size_t> dirty_;        // batchers that may have something to take
  std::unordered_map<const void*, Place> places_;
  std::unordered_map<const void*, std::unique_ptr<Gate>> gates_;
  std::vector<TripPtr> doubtful_;
  bool posted_ = false;
  bool asking_ = false;
  unsigned lost_while_asking_ = 0;
  std::size_t trips_ = 0;
  std::uint64_t carried_ = 0;
  std::unique_ptr<asio::steady_timer> timer_, doubt_timer_;
  bool closing_ = false;
  std::function<void()> closed_;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace ratesync::redis
