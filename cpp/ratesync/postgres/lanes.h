// The way to the server and back that limits, state and locks have in common: lanes with a queue each, trips
// that carry what is queued, detours around a trip that does not come back soon, and the end. I/O thread
// only.
//
// A lane has one trip under way; what arrives meanwhile is the next one. A trip takes its items only when it
// has a connection, so whoever gives up before that is simply taken out of the queue. It goes in rounds,
// which are the store's business: start_round() asks what is pending, answered() deals, until nothing is
// pending.
//
// A trip that is under way for a quarter of a second keeps its lane with it: somebody holds a row locked. A
// new lane takes its place and the rest of the queue, over another connection. What has a key in common with
// the trip is held until it comes back, and so is what has one in common with something held: no two
// statements under way speak of one key, and the items of a key keep their order.
#pragma once

#include <algorithm>
#include <asio/io_context.hpp>
#include <asio/steady_timer.hpp>
#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "ratesync/base/clock.h"
#include "ratesync/batch/batcher.h"
#include "ratesync/postgres/gather.h"
#include "ratesync/postgres/patience.h"
#include "ratesync/postgres/pg_pool.h"
#include "ratesync/store/store.h"

namespace ratesync::postgres {

struct LaneRules {
  batch::BatcherOptions queue;  // of one lane
  unsigned trips_in_a_row = 1;  // on one connection, before others get their turn
  bool gathers = false;         // waits for callers who were just answered (gather.h)
  std::size_t detours = 4;      // at a time; each keeps a connection
};

template <class Item>
struct LaneTrip;

template <class Item>
struct Lane {
  using Queue = batch::Batcher<Item>;
  Lane(const batch::BatcherOptions& options, asio::io_context& io, std::size_t its_place, unsigned its_kind)
      : queue(options), place(its_place), kind(its_kind), gather(io) {}
  Queue queue;
  const std::size_t place;
  const unsigned kind;  // what that means the store knows
  bool busy = false;    // a trip is under way or waits for its connection
  bool flying = false;  // a trip is under way: what comes now is for the next one
  Nanos since = 0;      // flying: its latest round was sent
  std::weak_ptr<LaneTrip<Item>> trip;
  Gather gather;
  // Once it was replaced:
  std::unique_ptr<Queue> held;             // waits for the trip's return
  std::unordered_set<std::size_t> aboard;  // keys of the trip, and of what is held
};

// What a store's own trip begins with.
template <class Item>
struct LaneTrip {
  using Items = std::vector<Item*>;
  LaneTrip(std::shared_ptr<Lane<Item>> its_lane, typename Lane<Item>::Queue::Batch its_batch,
           PgPool::Lease its_connection)
      : lane(std::move(its_lane)), batch(std::move(its_batch)), connection(std::move(its_connection)) {
    pending.reserve(batch.ops.size());
    for (Item& item : batch.ops) pending.push_back(&item);
  }

  const std::shared_ptr<Lane<Item>> lane;
  typename Lane<Item>::Queue::Batch batch;  // owns the items
  PgPool::Lease connection;
  unsigned in_a_row = 1;          // on this connection, without giving it back
  Items pending;                  // not answered yet, for the next round
  std::vector<Items> parked;      // cut off because one of `pending` is bad; the last comes first
  Patience patience;              // with what the server refuses
  unsigned lost_connections = 0;  // in a row, before anything was sent
  Nanos began = 0, sent = 0;

  // Whether anything is pending, at last what was cut off.
  bool more() {
    while (pending.empty() && !parked.empty()) {
      pending = std::move(parked.back());
      parked.pop_back();
    }
    return !pending.empty();
  }
  // One of `asked` is bad, nobody knows which: its first half is asked alone, the rest behind it.
  void cut(const Items& asked, const Items& behind) {
    const auto middle = asked.begin() + static_cast<std::ptrdiff_t>(asked.size() / 2);
    parked.emplace_back(middle, asked.end());
    parked.back().insert(parked.back().end(), behind.begin(), behind.end());
    pending.assign(asked.begin(), middle);
  }
  Items all() {
    Items items = std::exchange(pending, {});
    for (const Items& cut_off : std::exchange(parked, {}))
      items.insert(items.end(), cut_off.begin(), cut_off.end());
    return items;
  }
};

template <class Item, class Trip>  // Trip: a LaneTrip<Item>
class Lanes {
 protected:
  using LanePtr = std::shared_ptr<Lane<Item>>;
  using TripPtr = std::shared_ptr<Trip>;
  using Items = std::vector<Item*>;
  using Queue = typename Lane<Item>::Queue;

  Lanes(asio::io_context& io, const Clock& clock, PgPool& pool, LaneRules rules)
      : io_(io),
        clock_(clock),
        pool_(pool),
        rules_(rules),
        random_(std::random_device{}()),
        close_timer_(std::make_unique<asio::steady_timer>(io)) {}
  virtual ~Lanes() { *alive_ = false; }

  // What a store says of its items -------------------------------------------------------------------

  // By which its caller takes it back; null: nobody does.
  virtual const void* handle(const Item& item) const = 0;
  // What no two statements under way may have in common. Collisions only cost time.
  virtual void each_key(const Item& item, const std::function<void(std::size_t)>& visit) const = 0;
  virtual void fail_all(const Items& items, const Status& status) = 0;
  // A connection for a new trip, once the schema is known to be in order.
  virtual void lend(PgPool::OnLease use) = 0;
  virtual Status explain(const PipelineResult& result) = 0;
  // Sends what is pending with run(), or lands.
  virtual void start_round(const TripPtr& trip) = 0;
  virtual void answered(const TripPtr& trip, PipelineResult result) = 0;
  // The end of reconnect().
  virtual void reached(const TripPtr& trip, const Status& status) {
    if (status.ok()) return start_round(trip);
    const Items items = trip->all();
    land(trip);
    fail_all(items, status);
  }
  // Behind the last trip, before the end.
  virtual void farewell(std::function<void()> done) { done(); }

  // Queueing -----------------------------------------------------------------------------------------

  void add_lane(unsigned kind = 0) {
    lanes_.push_back(std::make_shared<Lane<Item>>(rules_.queue, io_, lanes_.size(), kind));
  }

  // Not ok: refused, and the item is still the caller's.
  Status enter(std::size_t place, Item& item) {
    if (overdue(*lanes_[place])) retire(place);
    const LanePtr lane = lanes_[place];
    Lane<Item>* const before = in_the_way(place, item);
    Queue& queue = before ? *before->held : lane->queue;
    const void* const op = handle(item);
    const Result<batch::Ticket> ticket = queue.push(std::move(item), 0);
    if (!ticket.ok()) return ticket.status();
    if (op) queued_[op] = {&queue, ticket.value()};
    if (before) return Status::success();
    if (lane->busy) watch_later();
    pump(lane);
    return Status::success();
  }

  // Nothing: it is under way, or was answered.
  std::optional<Item> take_back(const void* op) {
    const auto found = queued_.find(op);
    if (found == queued_.end()) return std::nullopt;
    std::optional<Item> item = found->second.queue->cancel(found->second.ticket);
    queued_.erase(found);
    return item;
  }

  void pump(const LanePtr& lane) {
    if (lane->busy || lane->queue.queued() == 0) return;
    if (!closing_ && lane->gather.waits(lane->queue.queued(), clock_.now(), [this, lane, alive = alive_] {
          if (*alive) pump(lane);
        }))
      return;
    lane->busy = true;
    ++trips_;
    lend([this, lane, alive = alive_](Result<PgPool::Lease> connection) {
      if (*alive) take_off(lane, std::move(connection));
    });
  }

  // Trips --------------------------------------------------------------------------------------------

  void run(const TripPtr& trip, std::vector<Call> calls, std::size_t ops) {
    count(calls, ops);
    trip->lane->since = trip->sent = clock_.now();
    trip->connection->run(std::move(calls), [this, trip, alive = alive_](PipelineResult result) {
      if (*alive) answered(trip, std::move(result));
    });
  }

  void after(Nanos pause, std::function<void()> then) {
    auto timer = std::make_shared<asio::steady_timer>(io_);
    timer->expires_after(std::chrono::nanoseconds(pause));
    timer->async_wait([then = std::move(then), timer, alive = alive_](const asio::error_code&) {
      if (*alive) then();
    });
  }

  void retry_later(const TripPtr& trip, unsigned refusals) {
    after(pause_after(refusals, random_), [this, trip] { start_round(trip); });
  }

  void give_back(Trip& trip) {
    if (trip.connection) pool_.put(std::exchange(trip.connection, nullptr));
  }

  void reconnect(const TripPtr& trip) {
    give_back(*trip);
    pool_.get([this, trip, alive = alive_](Result<PgPool::Lease> got) {
      if (!*alive) return;
      if (got.ok()) trip->connection = std::move(got.value());
      reached(trip, got.status());
    });
  }

  // Nothing is pending: the lane takes the next trip.
  void land(const TripPtr& trip) {
    const LanePtr lane = trip->lane;
    lane->queue.finished(trip->batch.id);
    if (rules_.gathers) {
      const Nanos now = clock_.now();
      lane->gather.landed(trip->batch.ops.size(), lane->queue.queued(), now, now - trip->began);
    }
    if (trip->connection && trip->connection->open() && trip->in_a_row < rules_.trips_in_a_row &&
        lane->gather.most_are_here(lane->queue.queued())) {
      if (auto batch = lane->queue.take())
        return begin_trip(lane, std::move(*batch), std::exchange(trip->connection, nullptr),
                          trip->in_a_row + 1);
    }
    lane->busy = lane->flying = false;
    --trips_;
    give_back(*trip);
    pump(lane);
    come_back(lane);
    maybe_closed();
  }

  // Outside of trips: one pipeline over a connection of its own. `make` is asked once the schema is known;
  // where it makes nothing, or the store is gone, the answer is Code::closed. A refusal is explained.
  void errand(std::size_t ops, std::function<std::vector<Call>()> make, Connection::PipelineDone done) {
    lend([this, ops, make = std::move(make), done = std::move(done),
          alive = alive_](Result<PgPool::Lease> got) {
      if (!*alive || !got.ok()) return refuse(done, got.status());
      const PgPool::Lease connection = std::move(got.value());
      std::vector<Call> calls = make();
      if (calls.empty()) {
        pool_.put(connection);
        return refuse(done, Status::success());
      }
      count(calls, ops);
      connection->run(std::move(calls), [this, connection, done, alive](PipelineResult result) {
        if (!*alive) return refuse(done, Status::success());
        pool_.put(connection);
        if (!result.status.ok()) result.status = explain(result);
        done(std::move(result));
      });
    });
  }

  void count(const std::vector<Call>& calls, std::size_t ops) {
    ++stats_.round_trips;
    stats_.statements += calls.size();
    stats_.batched_ops += ops;
  }

  void add_to(store::Stats& stats) const {
    stats.round_trips += stats_.round_trips;
    stats.statements += stats_.statements;
    stats.batched_ops += stats_.batched_ops;
    stats.conflicts += stats_.conflicts;
    stats.leases_lost += stats_.leases_lost;
  }

  // The end ------------------------------------------------------------------------------------------

  // Fails what is queued with Code::closed and lets trips under way end, for `patience` at most.
  void shut(Nanos patience, std::function<void()> done) {
    closing_ = true;
    closed_ = std::move(done);
    close_timer_->expires_after(std::chrono::nanoseconds(patience));
    close_timer_->async_wait([this, alive = alive_](const asio::error_code& error) {
      if (*alive && !error && closed_) std::exchange(closed_, nullptr)();
    });
    for (const LanePtr& lane : lanes_) fail_taken(lane->queue.close(), closed_status());
    for (const LanePtr& lane : retired_) fail_taken(lane->held->close(), closed_status());
    maybe_closed();
  }

  static Status closed_status() { return Status::make(Code::closed, "the store was closed"); }

  // --------------------------------------------------------------------------------------------------

  [[nodiscard]] bool overdue(const Lane<Item>& lane) const {
    return lane.flying && clock_.now() - lane.since >= kOverdue;
  }
  // Whether something new would leave there, at worst by a detour.
  [[nodiscard]] bool moves(std::size_t place) const {
    return retired_.size() < rules_.detours || !overdue(*lanes_[place]);
  }

  asio::io_context& io_;
  const Clock& clock_;
  PgPool& pool_;
  const LaneRules rules_;
  std::vector<LanePtr> lanes_;
  std::minstd_rand random_;
  store::Stats stats_;
  bool closing_ = false;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
  struct Queued {
    Queue* queue;
    batch::Ticket ticket;
  };
  std::unordered_map<const void*, Queued> queued_;  // by handle, of what is not aboard yet

 private:
  static constexpr Nanos kOverdue = kSecond / 4;

  static void refuse(const Connection::PipelineDone& done, Status status) {
    PipelineResult result;
    result.status = status.ok() ? closed_status() : std::move(status);
    done(std::move(result));
  }

  void fail_taken(std::vector<Item> items, const Status& status) {
    Items all;
    for (Item& item : items) {
      queued_.erase(handle(item));
      all.push_back(&item);
    }
    if (!all.empty()) fail_all(all, status);
  }

  void take_off(const LanePtr& lane, Result<PgPool::Lease> connection) {
    if (connection.ok()) {
      if (auto batch = lane->queue.take())
        return begin_trip(lane, std::move(*batch), std::move(connection.value()), 1);
      pool_.put(std::move(connection.value()));  // all of it was taken back meanwhile
    } else {
      Status status = connection.status();
      // In doubt was the look at the schema, nothing else.
      if (status.code == Code::in_doubt) status.code = Code::unavailable;
      fail_queued(*lane, status);
    }
    lane->busy = false;
    --trips_;
    pump(lane);
    maybe_closed();
  }

  // Only what is queued now: a caller that asks again from inside done() starts a new attempt.
  void fail_queued(Lane<Item>& lane, const Status& status) {
    std::size_t left = lane.queue.queued();
    while (left > 0) {
      auto batch = lane.queue.take();
      if (!batch) break;
      left -= std::min(left, batch->ops.size());
      lane.queue.finished(batch->id);
      fail_taken(std::move(batch->ops), status);
    }
  }

  void begin_trip(const LanePtr& lane, typename Queue::Batch batch, PgPool::Lease connection,
                  unsigned in_a_row) {
    auto trip = std::make_shared<Trip>(lane, std::move(batch), std::move(connection));
    for (const Item& item : trip->batch.ops) queued_.erase(handle(item));
    trip->in_a_row = in_a_row;
    trip->began = lane->since = clock_.now();
    lane->flying = true;
    lane->trip = trip;
    start_round(trip);
  }

  // Detours ------------------------------------------------------------------------------------------

  void watch_later() {
    if (std::exchange(watching_, true)) return;
    after(kOverdue / 2, [this] {
      watching_ = false;
      if (!closing_) watch();
    });
  }

  void watch() {
    bool waiting = false;
    for (std::size_t place = 0; place < lanes_.size(); ++place) {
      const Lane<Item>& lane = *lanes_[place];
      if (!lane.busy || lane.queue.queued() == 0) continue;
      waiting = true;
      if (overdue(lane)) retire(place);
    }
    if (waiting) watch_later();
  }

  void retire(std::size_t place) {
    const LanePtr old = lanes_[place];
    const auto trip = old->trip.lock();
    if (closing_ || !trip || retired_.size() >= rules_.detours) return;
    lanes_[place] = std::make_shared<Lane<Item>>(rules_.queue, io_, place, old->kind);
    old->held = std::make_unique<Queue>(rules_.queue);
    for (const Item& item : trip->batch.ops) mark(*old, item);
    retired_.push_back(old);
    enter_anew(place, old->queue.close());
  }

  void come_back(const LanePtr& lane) {
    if (std::erase(retired_, lane) > 0) enter_anew(lane->place, lane->held->close());
  }

  void enter_anew(std::size_t place, std::vector<Item> items) {
    for (Item& item : items) {
      const Status entered = enter(place, item);
      if (entered.ok()) continue;
      queued_.erase(handle(item));
      fail_all({&item}, entered);
    }
  }

  void mark(Lane<Item>& lane, const Item& item) {
    each_key(item, [&lane](std::size_t key) { lane.aboard.insert(key); });
  }

  // The replaced lane that an item has to wait for. What comes behind it must not overtake it there.
  Lane<Item>* in_the_way(std::size_t place, const Item& item) {
    for (const LanePtr& lane : retired_) {
      if (lane->place != place) continue;
      bool aboard = false;
      each_key(item, [&](std::size_t key) { aboard = aboard || lane->aboard.contains(key); });
      if (!aboard) continue;
      mark(*lane, item);
      return lane.get();
    }
    return nullptr;
  }

  void maybe_closed() {
    if (!closing_ || trips_ > 0 || !closed_) return;
    ++trips_;  // once: from here on nothing is queued any more
    farewell([this, alive = alive_] {
      if (!*alive) return;
      close_timer_->cancel();
      if (closed_) std::exchange(closed_, nullptr)();
    });
  }

  std::vector<LanePtr> retired_;
  bool watching_ = false;
  std::size_t trips_ = 0;
  std::function<void()> closed_;
  std::unique_ptr<asio::steady_timer> close_timer_;  // behind a pointer: leaked after fork
};

}  // namespace ratesync::postgres
