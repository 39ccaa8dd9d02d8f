// Slots over time: saying counts again, renewing leases, noticing their loss, waiting for others' slots,
// and the end.
#include <algorithm>
#include <chrono>
#include <map>
#include <utility>

#include "ratesync/redis/limit_store.h"
#include "ratesync/redis/scripts.h"

namespace ratesync::redis {

using store::GroupRef;
using Kind = QueuedOp::Kind;

namespace {

// Between attempts to tell the server about slots that it could not be told about.
constexpr Nanos kRestatePause = kSecond / 4;
constexpr std::size_t kRenewAtOnce = 256;

}  // namespace

void RedisLimitStore::release(const GroupRef& group, store::HolderId holder) {
  if (Holding* holding = holders_.release(group->id, holder)) in_step(*holding);
}

// Every limit with slots that a call declares states how many this process holds.
void RedisLimitStore::state_slots(Flight& flight) {
  for (CallGroup& group : flight.call.groups) {
    if (!group.group->params.has_concurrency()) continue;
    group.holding = &holders_.of(group.group);
    holders_.sent(*group.holding);
  }
}

void RedisLimitStore::in_step(Holding& holding) {
  if (holding.held > 0) arm(holding.renewed + holding.group->params.lease / 3);
  if (holding.flying || holding.queued) return;
  if (holding.in_step()) return holders_.tidy(holding);
  if (closing_) return;  // flush_slots() tells the rest, once no call is under way
  if (holding.unstated_since != kForever)
    return arm(clock_.now() + kRestatePause);  // the last attempt failed
  holding.queued = true;
  push(QueuedOp{Kind::restate, false, holding.group, nullptr, nullptr});
}

void RedisLimitStore::report_lost(const std::string& group, store::HolderId holder, std::int64_t slots) {
  stats_.leases_lost += static_cast<std::uint64_t>(slots);
  if (lost_) lost_(group, holder);
}

void RedisLimitStore::on_lost(std::function<void(const std::string& group, store::HolderId)> listener) {
  lost_ = std::move(listener);
}

// --- renewing -----------------------------------------------------------------------------------------

void RedisLimitStore::arm(Nanos at) {
  if (at >= armed_ || closing_) return;
  armed_ = at;
  timer_->expires_after(std::chrono::nanoseconds(std::max<Nanos>(at - clock_.now(), kMilli)));
  timer_->async_wait([this, alive = alive_](const asio::error_code& error) {
    if (*alive && !error) tick();
  });
}

// A renewal remembers what it was sent for: the slots may be given back and taken anew meanwhile.
struct RedisLimitStore::Renewal {
  struct Lease {
    GroupRef group;
    store::HolderId holder;
    std::uint64_t changes;
    bool flying;
  };
  std::vector<Lease> leases;
  Nanos sent = 0;
};

void RedisLimitStore::tick() {
  armed_ = kForever;
  if (closing_) return;
  const Nanos now = clock_.now();
  const store::Holders::Due due = holders_.due(now, kRestatePause, true);
  for (Holding* holding : due.lost) {
    const std::string group = holding->group->id;
    const store::HolderId before = holding->id;
    const std::int64_t slots = holders_.forget(*holding);
    holding->stated = Holding::kUnknown;
    holding->unstated_since = now;
    report_lost(group, before, slots);
  }
  for (Holding* holding : due.restate) {
    holding->queued = true;
    push(QueuedOp{Kind::restate, false, holding->group, nullptr, nullptr});
  }
  const Commander& commander = backend_.commander();
  std::map<std::uint16_t, std::shared_ptr<Renewal>> by_slot;
  for (const Holding* holding : due.renew) {
    const std::uint16_t slot = commander.clustered() ? commander.slot_of(keys_.slots(holding->group->id)) : 0;
    auto& renewal = by_slot[slot];
    if (!renewal) renewal = std::make_shared<Renewal>();
    renewal->leases.push_back({holding->group, holding->id, holding->changes, holding->flying});
    if (renewal->leases.size() >= kRenewAtOnce) renew(std::exchange(renewal, nullptr));
  }
  for (auto& [slot, renewal] : by_slot)
    if (renewal) renew(std::move(renewal));
  if (due.next != kForever) arm(due.next);
}

void RedisLimitStore::renew(std::shared_ptr<Renewal> renewal) {
  Command arguments(std::to_string(renewal->leases.size()));
  for (const Renewal::Lease& lease : renewal->leases) arguments.add(keys_.slots(lease.group->id));
  for (const Renewal::Lease& lease : renewal->leases)
    arguments.add(std::to_string(lease.holder)).add(lease.group->params.lease / kMicro);
  renewal->sent = clock_.now();
  const std::string key = keys_.slots(renewal->leases.front().group->id);
  backend_.commander().eval(renew_script(), key, std::move(arguments),
                            saturating_add(renewal->sent, options_.call_timeout),
                            [this, renewal, alive = alive_](const Result<Reply>& reply) {
                              // Not answered: tick() comes back, until the lease is over.
                              if (*alive && reply.ok()) renewed(*renewal, Result<Reply>(reply).value());
                            });
}

void RedisLimitStore::renewed(const Renewal& renewal, const Reply& reply) {
  if (reply.items.size() != renewal.leases.size()) return;
  for (std::size_t i = 0; i < renewal.leases.size(); ++i) {
    const Renewal::Lease& lease = renewal.leases[i];
    Holding* holding = holders_.find(lease.group->id);
    if (!holding || holding->id != lease.holder || holding->held == 0) continue;
    if (reply.items[i].integer == 1) {
      holding->renewed = std::max(holding->renewed, renewal.sent);
      continue;
    }
    // Not there. If a call about the limit crossed the renewal, that one knows better.
    if (lease.flying || holding->changes != lease.changes) continue;
    const std::int64_t slots = holders_.forget(*holding);
    holding->stated = 0;
    report_lost(lease.group->id, lease.holder, slots);
    if (Holding* still = holders_.find(lease.group->id)) holders_.tidy(*still);
  }
}

// --- waiting for others -------------------------------------------------------------------------------

// From the first time that somebody here stands in line.
void RedisLimitStore::listen() {
  if (std::exchange(listening_, true)) return;
  backend_.commander().subscribe(keys_.channels() + speaker_.process,
                                 [this, alive = alive_](std::string_view group) {
                                   if (*alive && freed_) freed_(std::string(group));
                                 });
}

void RedisLimitStore::on_freed(std::function<void(const std::string& group)> listener) {
  freed_ = std::move(listener);
}

bool RedisLimitStore::pushes() const { return listening_ && backend_.commander().subscribed(); }

// --- the end ------------------------------------------------------------------------------------------

void RedisLimitStore::close(Nanos patience, std::function<void()> done) {
  closing_ = true;
  closed_ = std::move(done);
  timer_->expires_after(std::chrono::nanoseconds(patience));
  timer_->async_wait([this, alive = alive_](const asio::error_code& error) {
    if (*alive && !error && closed_) std::exchange(closed_, nullptr)();
  });
  fail_queued(Status::make(Code::closed, "the store was closed"));
  maybe_closed();
}

void RedisLimitStore::maybe_closed() {
  if (!closing_ || flights_ > 0 || !closed_) return;
  // Once: from here on nothing is queued any more.
  ++flights_;
  flush_slots([this] {
    timer_->cancel();
    if (closed_) std::exchange(closed_, nullptr)();
  });
}

// Slots that were given back too late for a call of their own.
void RedisLimitStore::flush_slots(std::function<void()> done) {
  std::map<std::uint16_t, FlightPtr> flights;
  Commander& commander = backend_.commander();
  for (auto& [id, holding] : holders_) {
    if (holding.in_step()) continue;
    const std::uint16_t slot = commander.clustered() ? commander.slot_of(keys_.slots(id)) : 0;
    FlightPtr& flight = flights[slot];
    if (!flight) flight = std::make_shared<Flight>();
    if (flight->call.groups.size() < kRenewAtOnce) declare(flight->call, holding.group);
  }
  if (flights.empty() || commander.down()) return done();
  const auto left = std::make_shared<std::size_t>(flights.size());
  for (auto& [slot, flight] : flights) {
    state_slots(*flight);
    commander.eval(limit_script(), key_of(flight->call, keys_), call_arguments(flight->call, keys_, speaker_),
                   saturating_add(clock_.now(), options_.call_timeout),
                   [left, done, alive = alive_](const Result<Reply>&) {
                     if (--*left == 0 && *alive) done();
                   });
  }
}

}  // namespace ratesync::redis
