#include "ratesync/redis/lanes.h"

#include <algorithm>
#include <asio/post.hpp>
#include <chrono>
#include <utility>

#include "ratesync/redis/lane_trip.h"

namespace ratesync::redis {
namespace {

constexpr unsigned kMostAsking = 3;

}  // namespace

Command CallWriter::command(std::string_view key, std::initializer_list<std::int64_t> arguments) const {
  Command out(std::to_string(keys_.size()));
  out.add(key);
  for (std::size_t i = 1; i < keys_.size(); ++i) out.add(keys_[i]);
  for (const std::int64_t argument : arguments) out.add(argument);
  for (std::size_t i = 1; i < arguments_.size(); ++i) out.add(arguments_[i]);
  return out;
}

std::int64_t Answers::number() {
  if (more() && items_[at_].kind == Reply::Kind::integer) return items_[at_++].integer;
  ok_ = false;
  return 0;
}

std::string Answers::text() {
  if (more() && items_[at_].kind == Reply::Kind::text) return std::move(items_[at_++].text);
  ok_ = false;
  return {};
}

Lanes::Lanes(asio::io_context& io, const Clock& clock, LimitBackend& backend, LaneHost& host,
             const StateKeys& keys, LaneOptions options)
    : io_(io),
      clock_(clock),
      backend_(backend),
      host_(host),
      keys_(keys),
      options_(std::move(options)),
      timer_(std::make_unique<asio::steady_timer>(io)),
      doubt_timer_(std::make_unique<asio::steady_timer>(io)) {
  batchers_.push_back(
      std::make_unique<Batcher>(batch::BatcherOptions{options_.max_ops, options_.max_queue, 1}));
}

Lanes::~Lanes() { *alive_ = false; }

// --- entering -----------------------------------------------------------------------------------------

std::size_t Lanes::batcher_of(std::uint32_t bucket) const {
  return batchers_.size() > 1 ? keys_.shard_of(bucket) : 0;
}

Status Lanes::enter(const LaneItem& item, Place& place) {
  place.batcher = batcher_of(item.bucket);
  Result<batch::Ticket> ticket = batchers_[place.batcher]->push(LaneItem(item), item.bucket);
  if (!ticket.ok()) return ticket.status();
  place.ticket = ticket.value();
  wake(place.batcher);
  return Status::success();
}

Status Lanes::push(const LaneItem& item) {
  if (closing_) return Status::make(Code::closed, "the store was closed");
  Place place{};
  if (Status bad = enter(item, place); !bad.ok()) return bad;
  places_.emplace(item.op, place);
  return Status::success();
}

Status Lanes::push(const LaneItem& item, const std::vector<std::uint32_t>& buckets) {
  if (closing_) return Status::make(Code::closed, "the store was closed");
  LaneItem each = item;
  each.bucket = buckets.front();
  std::vector<std::uint32_t> first;  // a bucket for each lane
  for (const std::uint32_t bucket : buckets) {
    if (batcher_of(bucket) != batcher_of(buckets.front()))
      return Status::make(Code::invalid,
                          "a Redis Cluster cannot execute an atomic batch over keys of different hash slots. "
                          "Give the store the "
                          "option hash_tag, which keeps all of it in one slot, or do without atomic=True");
    const auto lane = [&](std::uint32_t b) { return batchers_[batcher_of(b)]->lane_of(b); };
    if (std::none_of(first.begin(), first.end(), [&](std::uint32_t b) { return lane(b) == lane(bucket); }))
      first.push_back(bucket);
  }
  // Before it is known what lanes there will be, the buckets have to be remembered.
  if (first.size() == 1 && (built_ || buckets.size() == 1)) return push(each);
  auto gate = std::make_unique<Gate>();
  gate->item = item;
  gate->name = item.op;
  gate->buckets = buckets;
  for (const std::uint32_t bucket : first) {
    Place place{};
    if (Status bad = enter({gate.get(), kGateKind, bucket}, place); !bad.ok()) {
      for (const Place& done : gate->places) (void)batchers_[done.batcher]->cancel(done.ticket);
      return bad;
    }
    gate->places.push_back(place);
  }
  gate->lanes = first.size();
  gates_.emplace(item.op, std::move(gate));
  return Status::success();
}

bool Lanes::cancel(const void* op) {
  if (const auto found = places_.find(op); found != places_.end()) {
    const Place place = found->second;
    places_.erase(found);
    return batchers_[place.batcher]->cancel(place.ticket).has_value();
  }
  const auto found = gates_.find(op);
  if (found == gates_.end() || found->second->sent || found->second->dead) return false;
  Gate* gate = found->second.get();
  for (const Place& place : gate->places)
    if (batchers_[place.batcher]->cancel(place.ticket)) --gate->lanes;
  bury(gate);
  if (gate->arrived.size() == gate->lanes) open(gate);
  return true;
}

// Its operation is gone, and another one may come to lie at the same place.
void Lanes::bury(Gate* gate) {
  gate->dead = true;
  auto node = gates_.extract(gate->name);
  gate->name = node.key() = gate;
  gates_.insert(std::move(node));
}

std::size_t Lanes::queued() const {
  std::size_t out = 0;
  for (const auto& batcher : batchers_) out += batcher->queued();
  return out;
}

// --- the pump -----------------------------------------------------------------------------------------

// At the end of the loop's turn, so that what is submitted in one turn shares a call.
void Lanes::wake(std::size_t batcher) {
  if (dirty_.empty() || dirty_.back() != batcher) dirty_.push_back(batcher);
  if (std::exchange(posted_, true)) return;
  asio::post(io_, [this, alive = alive_] {
    if (!*alive) return;
    posted_ = false;
    pump();
  });
}

void Lanes::pump() {
  if (!backend_.ready()) {
    if (std::exchange(asking_, true)) return;
    return backend_.when_ready([this, alive = alive_](const Status& status) {
      if (!*alive) return;
      asking_ = false;
      // Lost again while it was looked at; of what waits, nothing was sent.
      const bool again = status.code == Code::in_doubt && ++lost_while_asking_ < kMostAsking;
      if (status.ok() || !again) lost_while_asking_ = 0;
      if (status.ok() || again) return pump();
      fail_queued(status.code == Code::in_doubt ? Status::make(Code::unavailable, status.message) : status);
    });
  }
  if (!built_) build();
  for (const std::size_t index : std::exchange(dirty_, {})) {
    while (auto batch = batchers_[index]->take()) {
      ++trips_;
      const auto trip = std::make_shared<Trip>();
      trip->batcher = index;
      trip->batch = std::move(*batch);
      advance(trip);
    }
  }
}

// What stood in the one lane until now goes into those that there are to be.
void Lanes::build() {
  built_ = true;
  const bool many = backend_.commander().clustered() && keys_.shards() > 1;
  const std::vector<LaneItem> waiting = batchers_.front()->close();
  batchers_.clear();
  for (std::uint32_t shard = 0; shard < (many ? keys_.shards() : 1); ++shard) {
    const std::size_t lanes = many ? 1 : options_.lanes;
    batchers_.push_back(
        std::make_unique<Batcher>(batch::BatcherOptions{options_.max_ops, options_.max_queue, lanes}));
    lanes_.emplace_back(lanes);
    for (Lane& lane : lanes_.back()) lane.shard = shard;
  }
  places_.clear();
  std::unordered_map<const void*, std::unique_ptr<Gate>> gates;
  gates.swap(gates_);
  for (const LaneItem& item : waiting) {
    Status pushed;
    LaneItem told = item;
    if (item.kind == kGateKind) {
      const auto* gate = static_cast<const Gate*>(item.op);
      told = gate->item;
      pushed = push(gate->item, std::vector<std::uint32_t>(gate->buckets));
    } else {
      pushed = push(item);
    }
    if (!pushed.ok()) host_.tell(told, pushed);
  }
}

// The server could not be reached: those that wait are told, those that come may try again.
void Lanes::fail_queued(const Status& status) {
  std::vector<LaneItem> told;
  for (const auto& batcher : batchers_)
    while (auto batch = batcher->take()) {
      told.insert(told.end(), batch->ops.begin(), batch->ops.end());
      (void)batcher->finished(batch->id);
    }
  for (const LaneItem& item : told) drop(item, status);
}

// It is not sent any more.
void Lanes::drop(const LaneItem& item, const Status& status) {
  if (item.kind != kGateKind) {
    places_.erase(item.op);
    return host_.tell(item, status);
  }
  auto* gate = static_cast<Gate*>(item.op);
  --gate->lanes;
  const bool tell = !gate->dead;
  const LaneItem told = gate->item;
  if (tell) bury(gate);
  if (gate->arrived.size() == gate->lanes) open(gate);
  if (tell) host_.tell(told, status);
}

// --- a trip -------------------------------------------------------------------------------------------

void Lanes::advance(const TripPtr& trip) {
  const std::vector<LaneItem>& ops = trip->batch.ops;
  std::vector<LaneItem> late;
  trip->aboard.clear();
  trip->gate = nullptr;
  trip->attempt = 1;
  trip->refusals = 0;
  trip->looking = false;
  std::size_t bytes = 0;
  const Nanos now = clock_.now();
  while (!closing_ && trip->next < ops.size() && ops[trip->next].kind != kGateKind &&
         bytes <= options_.max_bytes) {
    const LaneItem& item = ops[trip->next++];
    places_.erase(item.op);
    if (host_.deadline(item) <= now) {
      late.push_back(item);
      continue;
    }
    bytes += host_.bytes(item);
    trip->aboard.push_back(item);
  }
  const auto tell_late = [&] {
    for (const LaneItem& item : late)
      host_.tell(item, Status::make(Code::timeout, "the deadline passed before it was sent to " +
                                                       backend_.commander().target()));
  };
  if (!trip->aboard.empty()) {
    send(trip);
    return tell_late();
  }
  if (closing_) {
    while (trip->next < ops.size())
      drop(ops[trip->next++], Status::make(Code::closed, "the store was closed"));
    return finish(trip);
  }
  if (trip->next == ops.size()) {
    finish(trip);
    return tell_late();
  }
  // Behind a gate the trip goes on when the gate was passed, possibly before this returns.
  if (ops[trip->next].kind == kGateKind)
    arrive(trip, static_cast<Gate*>(ops[trip->next++].op));
  else
    advance(trip);
  tell_late();
}

void Lanes::arrive(const TripPtr& trip, Gate* gate) {
  gate->arrived.push_back(trip);
  if (gate->arrived.size() < gate->lanes) return;
  if (gate->dead) return open(gate);
  if (host_.deadline(gate->item) <= clock_.now()) {
    const LaneItem item = gate->item;
    bury(gate);
    open(gate);
    return host_.tell(item, Status::make(Code::timeout, "the deadline passed before it was sent to " +
                                                            backend_.commander().target()));
  }
  gate->sent = true;
  trip->gate = gate;
  trip->aboard.push_back(gate->item);
  send(trip);
}

// All lanes passed it: each goes on.
void Lanes::open(Gate* gate) {
  const auto node = gates_.extract(gate->name);
  const std::unique_ptr<Gate> held = std::move(node.mapped());
  for (const TripPtr& trip : held->arrived) advance(trip);
}

void Lanes::finish(const TripPtr& trip) {
  (void)batchers_[trip->batcher]->finished(trip->batch.id);
  --trips_;
  if (batchers_[trip->batcher]->queued() > 0) {
    if (dirty_.empty() || dirty_.back() != trip->batcher) dirty_.push_back(trip->batcher);
    pump();
  }
  maybe_closed();
}

// --- the end ------------------------------------------------------------------------------------------

void Lanes::close(Nanos patience, std::function<void()> done) {
  closing_ = true;
  closed_ = std::move(done);
  doubt_timer_->cancel();
  std::vector<LaneItem> told;
  for (const auto& batcher : batchers_)
    for (const LaneItem& item : batcher->close()) told.push_back(item);
  for (const LaneItem& item : told) drop(item, Status::make(Code::closed, "the store was closed"));
  timer_->expires_after(std::chrono::nanoseconds(patience));
  timer_->async_wait([this, alive = alive_](const asio::error_code& error) {
    if (*alive && !error && closed_) std::exchange(closed_, nullptr)();
  });
  maybe_closed();
}

void Lanes::maybe_closed() {
  if (!closing_ || trips_ > 0 || !closed_) return;
  timer_->cancel();
  doubt_timer_->cancel();
  drop_receipts();
  std::exchange(closed_, nullptr)();
}

// All that was sent was answered: nothing is left that could arrive late.
void Lanes::drop_receipts() {
  if (!backend_.ready() || backend_.commander().down()) return;
  for (const std::vector<Lane>& lanes : lanes_)
    for (const Lane& lane : lanes) {
      if (!lane.greeted) continue;
      Command unlink("UNLINK");
      unlink.add(lane.receipt);
      backend_.commander().call(lane.receipt, std::move(unlink),
                                saturating_add(clock_.now(), options_.call_timeout),
                                [](const Result<Reply>&) {});
    }
}

}  // namespace ratesync::redis
