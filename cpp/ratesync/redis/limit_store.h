// Rate and concurrency limits in Redis: collects what arrives while a call is under way, lets the server
// decide, deals the answers, and keeps leases alive. I/O thread only.
//
// Every limit has a line of its own, which is in one call at a time; what arrives meanwhile is merged into
// its next one. A call carries the lines that are ready (on a Cluster those of one slot), and a few calls
// are under way at once, so that the server never waits for us. In four files: limit_store.cc queues,
// limit_calls.cc sends and deals, limit_leases.cc keeps slots, limit_list.cc lists.
#pragma once

#include <asio/io_context.hpp>
#include <asio/steady_timer.hpp>
#include <deque>
#include <functional>
#include <list>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "ratesync/base/clock.h"
#include "ratesync/redis/commander.h"
#include "ratesync/redis/keys.h"
#include "ratesync/redis/limit_plan.h"
#include "ratesync/store/holders.h"
#include "ratesync/store/store.h"

namespace ratesync::redis {

// What the limit store needs of the store around it.
class LimitBackend {
 public:
  virtual ~LimitBackend() = default;
  // The server was found good, and answered since.
  [[nodiscard]] virtual bool ready() const = 0;
  virtual void when_ready(std::function<void(Status)> done) = 0;
  // A call was not answered: ask before the next one.
  virtual void not_answered() = 0;
  virtual Commander& commander() = 0;
};

struct LimitStoreOptions {
  std::string key_prefix = "rate_limit";
  std::string hash_tag;
  std::string holder;                // who we are, for people: host:pid application
  Nanos call_timeout = 5 * kSecond;  // until a call that could not be sent is given up
  std::size_t max_calls = 4;         // under way at once, on one server
  std::size_t max_limits = 256;      // per call: the server serves nobody else meanwhile
  std::size_t max_queue = 100'000;   // operations waiting to be sent
};

class RedisLimitStore final : public store::LimitStore {
 public:
  RedisLimitStore(asio::io_context& io, const Clock& clock, LimitBackend& backend, LimitStoreOptions options);
  ~RedisLimitStore() override;

  void acquire(store::AcquireOp* op) override;
  bool abandon(store::AcquireOp* op) override;
  void acquire_all(store::AcquireAllOp* op) override;
  bool abandon(store::AcquireAllOp* op) override;
  void release(const store::GroupRef& group, store::HolderId holder) override;
  std::int64_t refund(const store::GroupRef& group, std::int64_t cost, std::int64_t stamp) override;
  void settle(const store::GroupRef& group, std::int64_t delta, store::Callback<store::Unit> done) override;
  void peek(const store::GroupRef& group, store::Callback<store::Peek> done) override;
  void reset(const store::GroupRef& group, store::Callback<store::Unit> done) override;
  void list(std::size_t limit, store::Callback<store::Listing> done) override;
  void on_lost(std::function<void(const std::string& group, store::HolderId)> listener) override;
  void stop_waiting(const store::GroupRef& group) override;
  void on_freed(std::function<void(const std::string& group)> listener) override;
  [[nodiscard]] bool pushes() const override;

  // Fails what is queued with Code::closed, lets calls under way end, then tells the server about slots
  // given back, as far as that takes no longer than `patience`.
  void close(Nanos patience, std::function<void()> done);
  void fill(store::Stats& stats) const;
  // The timer must not be destroyed after a fork: it would touch the parent's loop.
  void abandon_after_fork() { (void)timer_.release(); }
  [[nodiscard]] const Keys& keys() const { return keys_; }

 private:
  struct Line;
  struct Flight;
  struct All {
    store::AcquireAllOp* op = nullptr;
    std::vector<Line*> lines;
    std::uint16_t slot = 0;
    bool alone = false;
  };
  using AllPtr = std::shared_ptr<All>;
  // What is remembered of a limit while something is queued or under way.
  struct Line {
    OpList pending;
    std::size_t first = 0;        // of pending; those before were taken back
    Flight* flight = nullptr;     // the call that carries it
    std::size_t group = 0;        // its place there
    bool alone = false;           // a call with others failed: the next carries nothing else
    bool ready = false;           // stands in ready_
    std::size_t claims = 0;       // calls for several limits that wait for it: they go first
    std::vector<AllPtr> blocked;  // those that wait until its call is answered
  };
  struct Flight {
    LimitCall call;
    std::uint16_t slot = 0;
    std::vector<Line*> lines;
    std::vector<std::string> ids;  // of lines
    std::vector<AllPtr> alls;
    bool quick = false;  // token buckets without slots, and nothing but requests
    bool alone = false;  // carries one line or one call for several limits
    unsigned attempt = 1;
    Nanos sent = 0;
  };
  using FlightPtr = std::shared_ptr<Flight>;
  using Flights = std::vector<FlightPtr>;
  struct Dealt;

  // limit_store.cc
  Line& line_of(const std::string& id);
  void tidy(const std::string& id);
  void push(QueuedOp op);
  void set_ready(const std::string& id, Line& line);
  void fail(QueuedOp& op, const Status& status);
  void fail_all(store::AcquireAllOp* op, const Status& status);
  void fail_queued(const Status& status);
  Status check_slots(All& all) const;
  void leave_lines(All& all);

  // limit_calls.cc
  void pump();
  using Refused = std::vector<std::pair<AllPtr, Status>>;
  void board_alls(Flights& open, Refused& refused);
  void board_lines(Flights& open);
  Flight* flight_for(Flights& open, std::uint16_t slot, std::size_t limits, bool quick, bool alone);
  Line* obstacle(const Flights& open, const All& all) const;
  void board(Flight& flight, const AllPtr& all);
  void take_along(Flight& flight, Line& line, std::size_t group);
  static void enter(Flight& flight, const std::string& id, Line& line, std::size_t group);
  void send(const FlightPtr& flight);
  void answered(const FlightPtr& flight, Result<Reply> reply);
  void deal(Flight& flight, const CallAnswer& answer, Dealt& dealt);
  void deal_groups(Flight& flight, const CallAnswer& answer, Dealt& dealt);
  void tell(Dealt& dealt);
  void failed(const FlightPtr& flight, const Status& status);
  void send_again(const FlightPtr& flight);
  void send_apart(Flight& flight);
  void put_back(OpList ops);
  void land(Flight& flight);

  // limit_leases.cc
  void state_slots(Flight& flight);
  void in_step(Holding& holding);
  void report_lost(const std::string& group, store::HolderId holder, std::int64_t slots);
  void arm(Nanos at);
  void tick();
  struct Renewal;
  void renew(std::shared_ptr<Renewal> renewal);
  void renewed(const Renewal& renewal, const Reply& reply);
  void maybe_closed();
  void flush_slots(std::function<void()> done);
  void listen();

  asio::io_context& io_;
  const Clock& clock_;
  LimitBackend& backend_;
  const LimitStoreOptions options_;
  const Keys keys_;
  Speaker speaker_;
  std::unordered_map<std::string, Line> lines_;  // node based: pointers stay
  std::deque<std::pair<std::string, Line*>> ready_;
  std::list<AllPtr> ready_alls_;
  std::unordered_map<store::AcquireAllOp*, AllPtr> alls_;  // not sent
  std::size_t queued_ = 0;
  std::size_t flights_ = 0;
  bool asking_ = false;  // when_ready() is under way
  bool pumping_ = false;
  store::Holders holders_;
  std::function<void(const std::string&, store::HolderId)> lost_;
  std::function<void(const std::string&)> freed_;
  bool listening_ = false;
  std::unique_ptr<asio::steady_timer> timer_;
  Nanos armed_ = kForever;
  store::Stats stats_;
  bool closing_ = false;
  std::function<void()> closed_;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace ratesync::redis
