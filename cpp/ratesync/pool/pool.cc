// Decisions of the pool. Every public call changes what it is about and ends in settle(), which
// restores the invariants: no waiter beside an idle connection, no waiter without hope, enough
// connects under way, the timer set.
#include "ratesync/pool/pool.h"

#include <algorithm>
#include <utility>

namespace ratesync::pool {

namespace {

using Kind = PoolAction::Kind;

PoolOptions checked(PoolOptions options) {
  options.max_size = std::max<std::size_t>(options.max_size, 1);
  options.min_size = std::min(options.min_size, options.max_size);
  options.max_waiting = std::max<std::size_t>(options.max_waiting, 1);
  options.fail_after = std::max<std::size_t>(options.fail_after, 1);
  // Without a pause a dead server would be asked as fast as it refuses.
  options.connect_backoff_min = std::max(options.connect_backoff_min, kMilli);
  options.connect_backoff_max = std::max(options.connect_backoff_max, options.connect_backoff_min);
  return options;
}

std::string duration(Nanos nanos) {
  if (nanos >= kSecond && nanos % kSecond == 0) return std::to_string(nanos / kSecond) + " s";
  return std::to_string(nanos / kMilli) + " ms";
}

// The other side spoke and said no; asking again at once, or waiting, changes nothing.
bool is_refusal(Code code) { return code == Code::server || code == Code::invalid || code == Code::protocol; }

}  // namespace

std::size_t connections_to_open(const Sizing& s) {
  const std::size_t live = s.idle + s.busy + s.pending;
  const std::size_t taken = live + s.closing;
  const std::size_t room = s.max_size > taken ? s.max_size - taken : 0;
  const std::size_t coming = s.idle + s.pending;
  std::size_t wanted = s.waiting > coming ? s.waiting - coming : 0;
  if (s.started && s.health != Health::refused && s.min_size > live) {
    wanted = std::max(wanted, s.min_size - live);
  }
  if (s.health == Health::down) wanted = std::max<std::size_t>(wanted, 1);
  if (s.health != Health::well) {
    const std::size_t probe = s.pending == 0 ? 1 : 0;
    wanted = std::min(wanted, probe);
  }
  return std::min(wanted, room);
}

Pool::Pool(PoolOptions options, Random random)
    : options_(checked(options)), random_(random ? std::move(random) : [] { return 0.5; }) {}

// --- callers

void Pool::get(WaiterId waiter, Nanos now, Actions& out) {
  if (waiter_at_.contains(waiter)) {
    ++misuses_;
    return;
  }
  if (closing_) {
    out.push_back(
        {.kind = Kind::fail, .waiter = waiter, .status = Status::make(Code::closed, "the pool is closed")});
    return;
  }
  started_ = true;
  if (idle_.empty() && waiters_.size() >= options_.max_waiting) {
    out.push_back({.kind = Kind::fail,
                   .waiter = waiter,
                   .status = Status::make(Code::exhausted,
                                          "too many callers wait for a connection (at most " +
                                              std::to_string(options_.max_waiting) + "): " + numbers() +
                                              "; raise pool_max_size or send less at once")});
  } else {
    waiter_at_[waiter] = waiters_.insert(waiters_.end(), Waiter{waiter, now});
  }
  settle(now, out);
}

bool Pool::cancel(WaiterId waiter) {
  const auto found = waiter_at_.find(waiter);
  if (found == waiter_at_.end()) return false;
  waiters_.erase(found->second);
  waiter_at_.erase(found);
  return true;
}

void Pool::put(NodeId id, bool open, Nanos now, Actions& out) {
  Node* node = find(id);
  if (node == nullptr || node->fsm.state() != State::busy) {
    ++misuses_;
    return;
  }
  if (open && !node->fsm.doomed()) {
    // It works, so the server is there, whatever the latest connects said.
    failures_ = 0;
    if (last_error_.ok()) backoff_level_ = 0;
    if (node->expires_at <= now) resume(*node, Event::close);
  } else if (!node->fsm.doomed()) {
    count_broken(*node, now);
  }
  step(id, *node, open ? Event::returned_open : Event::returned_broken, now, out);
  settle(now, out);
}

// --- reports of the glue

void Pool::connected(NodeId id, Nanos now, Actions& out) {
  if (Node* node = find(id)) step(id, *node, Event::connected, now, out);
}

void Pool::setup_done(NodeId id, Nanos now, Actions& out) {
  Node* node = find(id);
  if (node == nullptr) return;
  if (node->fsm.state() == State::setting_up) {
    last_error_ = {};
    refused_ = false;
    failures_ = 0;
    if (broken_ > 0) {
      --broken_;
      ++reconnects_;
    }
    node->opened_at = now;
    if (options_.max_lifetime != kForever) {
      const double factor = 0.9 + 0.2 * random_();
      node->expires_at =
          saturating_add(now, static_cast<Nanos>(static_cast<double>(options_.max_lifetime) * factor));
    }
  }
  step(id, *node, Event::setup_done, now, out);
  settle(now, out);
}

void Pool::connect_failed(NodeId id, Status status, Nanos now, Actions& out) {
  Node* node = find(id);
  if (node == nullptr) return;
  const State before = node->fsm.state();
  if (before == State::connecting || before == State::setting_up) {
    last_error_ = status.ok() ? Status::make(Code::unavailable, "connecting failed") : std::move(status);
    refused_ = is_refusal(last_error_.code);
    // Attempts that ran side by side and failed together count once: a role with one connection, whose old
    // session lives for a moment, refuses all of them.
    if (refused_)
      failures_ = 0;
    else if (failures_ == 0 || now >= retry_at_)
      ++failures_;
    back_off(now);
  }
  step(id, *node, Event::connect_failed, now, out);
  settle(now, out);
}

void Pool::broken(NodeId id, Nanos now, Actions& out) {
  Node* node = find(id);
  if (node == nullptr) return;
  switch (node->fsm.state()) {
    case State::connecting:
    case State::setting_up:
      connect_failed(id, Status::make(Code::unavailable, "the connection was lost while it was set up"), now,
                     out);
      return;
    case State::idle:
      count_broken(*node, now);
      leave_idle(id);
      break;
    case State::busy:
      if (!node->fsm.doomed()) count_broken(*node, now);
      break;
    case State::absent:
    case State::closing: break;
  }
  step(id, *node, Event::broken, now, out);
  settle(now, out);
}

void Pool::closed(NodeId id, Nanos now, Actions& out) {
  Node* node = find(id);
  if (node == nullptr) {
    ++misuses_;
    return;
  }
  step(id, *node, Event::closed, now, out);
  settle(now, out);
}

void Pool::tick(Nanos now, Actions& out) {
  if (now >= armed_) armed_ = kForever;
  expire_waiters(now, out);
  retire_old_nodes(now, out);
  settle(now, out);
  arm_next(out);
}

void Pool::close(Nanos now, Actions& out) {
  closing_ = true;
  fail_all(Status::make(Code::closed, "the pool is closed"), out);
  idle_.clear();
  for (auto& [id, node] : nodes_) step(id, node, Event::close, now, out);
  settle(now, out);
}

// --- state

bool Pool::down() const { return failures_ >= options_.fail_after && sound() == 0; }

Gauges Pool::gauges() const {
  return Gauges{.open = count(State::idle) + count(State::busy),
                .in_use = count(State::busy),
                .pending = pending(),
                .closing = count(State::closing),
                .waiting = waiters_.size(),
                .reconnects = reconnects_};
}

Health Pool::health() const {
  if (down()) return Health::down;
  if (last_error_.ok()) return Health::well;
  return refused_ ? Health::refused : Health::probing;
}

Sizing Pool::sizing() const {
  return Sizing{.min_size = options_.min_size,
                .max_size = options_.max_size,
                .idle = idle_.size(),
                .busy = count(State::busy),
                .pending = pending(),
                .closing = count(State::closing),
                .waiting = waiters_.size(),
                .started = started_,
                .health = health()};
}

std::string Pool::numbers() const {
  return std::to_string(count(State::busy)) + " of " + std::to_string(options_.max_size) +
         " connections in use, " + std::to_string(pending()) + " connecting, " +
         std::to_string(waiters_.size()) + " callers waiting";
}

Pool::Node* Pool::find(NodeId id) {
  const auto found = nodes_.find(id);
  return found == nodes_.end() ? nullptr : &found->second;
}

Action Pool::resume(Node& node, Event event) {
  const std::uint32_t errors = node.fsm.errors();
  --counts_[static_cast<std::size_t>(node.fsm.state())];
  doomed_ -= node.fsm.doomed() ? 1 : 0;
  const Action action = node.fsm.resume(event);
  ++counts_[static_cast<std::size_t>(node.fsm.state())];
  doomed_ += node.fsm.doomed() ? 1 : 0;
  misuses_ += node.fsm.errors() - errors;
  return action;
}

void Pool::step(NodeId id, Node& node, Event event, Nanos now, Actions& out) {
  switch (resume(node, event)) {
    case Action::none: return;
    case Action::connect: out.push_back({.kind = Kind::connect, .node = id}); return;
    case Action::setup: out.push_back({.kind = Kind::setup, .node = id}); return;
    case Action::close: out.push_back({.kind = Kind::close, .node = id}); return;
    case Action::offer:
      node.idle_since = now;
      idle_.push_back(id);
      arm(std::min(node.expires_at, saturating_add(now, options_.max_idle)), out);
      return;
    case Action::forget:
      --counts_[static_cast<std::size_t>(State::absent)];
      nodes_.erase(id);
      return;
  }
}

void Pool::leave_idle(NodeId id) { std::erase(idle_, id); }

void Pool::count_broken(const Node& node, Nanos now) {
  if (closing_) return;
  ++broken_;
  // Accepted and dropped at once (a proxy without a server behind it): without a pause this would
  // be a loop of connects at the speed of the network.
  if (now - node.opened_at < options_.connect_backoff_max) {
    last_error_ = Status::make(Code::unavailable, "the connection was lost right after it was made");
    refused_ = false;
    back_off(now);
  }
}

void Pool::back_off(Nanos now) {
  if (now < retry_at_) return;
  const int doublings = static_cast<int>(std::min<std::size_t>(backoff_level_ + 1, 20));
  const Nanos floor = options_.connect_backoff_min;
  const Nanos ceiling =
      floor > (options_.connect_backoff_max >> doublings) ? options_.connect_backoff_max : floor << doublings;
  const auto spread = static_cast<Nanos>(random_() * static_cast<double>(ceiling - floor));
  retry_at_ = saturating_add(now, floor + spread);
  ++backoff_level_;
}

// --- the common end of every call

void Pool::settle(Nanos now, Actions& out) {
  serve_waiters(out);
  if (!closing_) {
    fail_hopeless(now, out);
    open_connections(now, out);
    if (!waiters_.empty()) arm(saturating_add(waiters_.front().since, options_.acquire_timeout), out);
  } else if (nodes_.empty() && !closed_said_) {
    closed_said_ = true;
    out.push_back({.kind = Kind::closed});
  }
}

void Pool::serve_waiters(Actions& out) {
  while (!waiters_.empty() && !idle_.empty()) {
    const NodeId id = idle_.back();
    const WaiterId waiter = waiters_.front().id;
    idle_.pop_back();
    waiter_at_.erase(waiter);
    waiters_.pop_front();
    resume(nodes_.at(id), Event::lent);
    out.push_back({.kind = Kind::grant, .node = id, .waiter = waiter});
  }
}

void Pool::fail_hopeless(Nanos now, Actions& out) {
  if (waiters_.empty() || sound() > 0) return;
  if (down()) {
    fail_all(unreachable(), out);
  } else if (refused_ && pending() == 0 && now < retry_at_) {
    // Other attempts may still succeed (a server short of slots takes some and refuses others).
    fail_all(last_error_, out);
  }
}

void Pool::open_connections(Nanos now, Actions& out) {
  const std::size_t wanted = connections_to_open(sizing());
  if (wanted == 0) return;
  if (now < retry_at_) {
    arm(retry_at_, out);
    return;
  }
  for (std::size_t i = 0; i < wanted; ++i) {
    const NodeId id = next_node_++;
    Node& node = nodes_[id];
    ++counts_[static_cast<std::size_t>(State::absent)];
    step(id, node, Event::connect_started, now, out);
  }
}

void Pool::expire_waiters(Nanos now, Actions& out) {
  while (!waiters_.empty() && saturating_add(waiters_.front().since, options_.acquire_timeout) <= now) {
    const Waiter waiter = waiters_.front();
    out.push_back({.kind = Kind::fail, .waiter = waiter.id, .status = timed_out(now - waiter.since)});
    cancel(waiter.id);
  }
}

void Pool::retire_old_nodes(Nanos now, Actions& out) {
  std::vector<NodeId> old;
  std::size_t spare = live() > options_.min_size ? live() - options_.min_size : 0;
  for (const NodeId id : idle_) {  // from the one that is idle longest
    const Node& node = nodes_.at(id);
    const bool unused = spare > 0 && saturating_add(node.idle_since, options_.max_idle) <= now;
    if (!unused && node.expires_at > now) continue;
    if (spare > 0) --spare;
    old.push_back(id);
  }
  for (const NodeId id : old) {
    leave_idle(id);
    step(id, nodes_.at(id), Event::close, now, out);
  }
}

void Pool::fail_all(const Status& status, Actions& out) {
  for (const Waiter& waiter : waiters_) {
    out.push_back({.kind = Kind::fail, .waiter = waiter.id, .status = status});
  }
  waiters_.clear();
  waiter_at_.clear();
}

Status Pool::unreachable() const {
  Status status = last_error_;
  status.code = Code::unavailable;
  status.message +=
      " (" + std::to_string(failures_) + " failed connects in a row; trying on in the background)";
  return status;
}

Status Pool::timed_out(Nanos waited) const {
  const std::string lead = "no connection within " + duration(waited) + ": ";
  if (count(State::busy) + count(State::closing) >= options_.max_size) {
    return Status::make(Code::exhausted,
                        lead + numbers() + "; raise pool_max_size or do less per connection");
  }
  if (last_error_.ok())
    return Status::make(Code::timeout, lead + "the store has not answered yet; " + numbers());
  return Status::make(Code::unavailable, lead + last_error_.message + "; " + numbers(), last_error_.sqlstate);
}

// The timer is only ever moved to an earlier time; a tick that comes too early finds nothing to do
// and sets it anew. So a busy pool does not touch the timer per call.
void Pool::arm(Nanos at, Actions& out) {
  if (at >= armed_) return;
  armed_ = at;
  out.push_back({.kind = Kind::timer, .at = at});
}

void Pool::arm_next(Actions& out) {
  const bool can_shrink = live() > options_.min_size;
  Nanos at = kForever;
  for (const NodeId id : idle_) {
    const Node& node = nodes_.at(id);
    at = std::min(at, node.expires_at);
    if (can_shrink) at = std::min(at, saturating_add(node.idle_since, options_.max_idle));
  }
  arm(at, out);
}

}  // namespace ratesync::pool
