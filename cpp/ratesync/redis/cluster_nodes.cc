#include "ratesync/redis/cluster_nodes.h"

#include <algorithm>
#include <asio/post.hpp>
#include <chrono>
#include <utility>

#include "ratesync/base/format.h"
#include "ratesync/redis/errors.h"

namespace ratesync::redis {
namespace {

constexpr Nanos kPause = 100 * kMilli;  // between two questions for the map
constexpr Nanos kMaxPause = kSecond;    // while no node answers
constexpr Nanos kHedge = 200 * kMilli;  // then the next node is asked too
constexpr Nanos kSilent = 500 * kMilli;

std::string key_of(const HostPort& node) { return formatted("{}:{}", node.host, node.port); }

}  // namespace

ClusterNodes::ClusterNodes(asio::io_context& io, const Clock& clock, ConnectionOptions options,
                           std::vector<HostPort> seeds)
    : io_(io),
      clock_(clock),
      options_(std::move(options)),
      seeds_(std::move(seeds)),
      timer_(std::make_unique<asio::steady_timer>(io)),
      watch_timer_(std::make_unique<asio::steady_timer>(io)) {}

// --- who owns what ------------------------------------------------------------------------------------

MemberRef ClusterNodes::at(const HostPort& node) {
  MemberRef& member = members_[key_of(node)];
  if (member) return member;
  ConnectionOptions options = options_;
  options.target.host = node.host;
  options.target.port = node.port;
  member = std::make_shared<Member>();
  member->at = node;
  member->connection = Connection::create(io_, clock_, std::move(options));
  member->node = std::make_shared<Node>(member->connection);
  member->connection->on_up([weak = weak_from_this(), node] {
    const auto self = weak.lock();
    if (self && self->known_ && self->map_.owns_any(node)) self->tell_connected();
  });
  member->connection->on_lost([weak = weak_from_this()](const Status&) {
    if (const auto self = weak.lock()) self->refresh();
  });
  return member;
}

MemberRef ClusterNodes::owner(std::uint16_t slot) {
  const std::size_t index = map_.owner(slot);
  if (index == SlotMap::kNobody) return nullptr;
  MemberRef& member = owners_[index];
  if (!member) member = at(map_.primaries()[index]);
  return member;
}

std::vector<MemberRef> ClusterNodes::primaries() {
  std::vector<MemberRef> out;
  for (const HostPort& node : map_.primaries())
    if (map_.owns_any(node)) out.push_back(at(node));
  return out;
}

MemberRef ClusterNodes::any() {
  std::vector<MemberRef> all = primaries();
  if (all.empty()) return nullptr;
  const Nanos now = real_.now();
  const auto works = [&](const MemberRef& m) { return m->connection->open() && !is_silent(*m, now); };
  if (const auto found = std::find_if(all.begin(), all.end(), works); found != all.end()) return *found;
  return all[random_() % all.size()];
}

net::StreamTarget ClusterNodes::listening_post() {
  std::vector<HostPort> nodes;
  const Nanos now = real_.now();
  for (const auto& [key, member] : members_)
    if (member->connection->open() && !is_silent(*member, now)) nodes.push_back(member->at);
  if (nodes.empty()) nodes = known_ ? map_.primaries() : seeds_;
  const HostPort& chosen = nodes[random_() % nodes.size()];
  net::StreamTarget target = options_.target;
  target.host = chosen.host;
  target.port = chosen.port;
  return target;
}

void ClusterNodes::moved(std::uint16_t slot, const HostPort& node) {
  if (map_.assign(slot, node)) owners_.resize(map_.primaries().size());
  refresh();
}

// --- asking for the map -------------------------------------------------------------------------------

void ClusterNodes::connect(Done done) {
  if (known_ || closed_) {
    Status status = known_ ? Status::success() : Status::make(Code::closed, "the store was closed");
    asio::post(io_, [done = std::move(done), status = std::move(status)] { done(status); });
    return;
  }
  connecting_.push_back(std::move(done));
  refresh();
}

void ClusterNodes::refresh() {
  if (refreshing_ || scheduled_ || closed_) return;
  scheduled_ = true;
  arm(std::max<Nanos>(0, not_before_ - real_.now()));
}

void ClusterNodes::arm(Nanos delay) {
  timer_->expires_after(std::chrono::nanoseconds(delay));
  timer_->async_wait([weak = weak_from_this()](const asio::error_code& ec) {
    const auto self = weak.lock();
    if (ec || !self || self->closed_) return;
    if (std::exchange(self->scheduled_, false))
      self->begin();
    else if (self->refreshing_ && self->real_.now() >= self->give_up_at_)
      self->fail();
    else if (self->refreshing_)
      self->ask_next();
  });
}

void ClusterNodes::begin() {
  refreshing_ = true;
  ++attempt_;
  attempt_error_ = Status::success();
  next_ = unanswered_ = 0;
  const Nanos now = real_.now();
  give_up_at_ = now + options_.connect_timeout;
  candidates_.clear();
  const auto add = [this](const HostPort& node) {
    if (std::find(candidates_.begin(), candidates_.end(), node) == candidates_.end())
      candidates_.push_back(node);
  };
  const auto add_shuffled = [&](std::vector<HostPort> nodes) {
    std::shuffle(nodes.begin(), nodes.end(), random_);
    for (const HostPort& node : nodes) add(node);
  };
  std::vector<HostPort> working;
  for (const auto& [key, member] : members_)
    if (member->connection->open() && !is_silent(*member, now)) working.push_back(member->at);
  add_shuffled(std::move(working));
  add_shuffled(map_.primaries());
  add_shuffled(map_.replicas());
  add_shuffled(seeds_);
  ask_next();
}

void ClusterNodes::ask_next() {
  static const Command kQuestion = [] {
    Command command("CLUSTER");
    command.add("SLOTS");
    return command;
  }();
  if (next_ == candidates_.size()) {
    if (unanswered_ == 0) return fail();
    return arm(std::max<Nanos>(0, give_up_at_ - real_.now()));
  }
  const MemberRef member = at(candidates_[next_++]);
  ++unanswered_;
  asked(*member);
  member->node->call(kQuestion, saturating_add(clock_.now(), options_.connect_timeout),
                     [weak = weak_from_this(), attempt = attempt_, member](Result<Reply> reply) {
                       const auto self = weak.lock();
                       if (!self) return;
                       self->answered(*member);
                       if (self->attempt_ == attempt && self->refreshing_)
                         self->take(member, std::move(reply));
                     });
  arm(kHedge);
}

void ClusterNodes::take(const MemberRef& from, Result<Reply> reply) {
  --unanswered_;
  if (reply.ok())
    reply = checked(std::move(reply.value()), {key_of(from->at), options_.user, "CLUSTER SLOTS"});
  Status status = reply.status();
  if (status.ok()) {
    Result<SlotMap> map = SlotMap::parse(reply.value(), from->at.host);
    if (map.ok()) return adopt(std::move(map.value()));
    status = map.status();
  }
  // This question asked for nothing: whatever became of it, the cluster cannot be reached.
  if (status.code == Code::in_doubt || status.code == Code::timeout) status.code = Code::unavailable;
  // What one node refuses (a password) tells more than that another one is away.
  if (attempt_error_.ok() || attempt_error_.code == Code::unavailable) attempt_error_ = std::move(status);
  ask_next();
}

void ClusterNodes::adopt(SlotMap map) {
  refreshing_ = false;
  ++attempt_;
  timer_->cancel();
  bool taken_over = false;
  for (const HostPort& node : map_.primaries())
    taken_over = taken_over || (map_.owns_any(node) && !map.owns_any(node));
  map_ = std::move(map);
  owners_.assign(map_.primaries().size(), nullptr);
  known_ = true;
  down_ = false;
  failures_ = 0;
  last_error_ = Status::success();
  not_before_ = real_.now() + kPause;
  prune();
  if (taken_over) tell_connected();
  for (const Done& done : std::exchange(connecting_, {})) done(Status::success());
  if (news_) news_();
}

void ClusterNodes::fail() {
  refreshing_ = false;
  ++attempt_;
  last_error_ = attempt_error_;
  if (last_error_.ok())
    last_error_ = Status::make(Code::unavailable,
                               formatted("no node of the cluster answered within {} ms ({} were asked)",
                                         options_.connect_timeout / kMilli, candidates_.size()));
  down_ = true;
  const Nanos span = std::min(kMaxPause, kPause << std::min(failures_++, 10));
  not_before_ = real_.now() + std::uniform_int_distribution<Nanos>(span / 2, span)(random_);
  const Status why = last_error_;
  for (const Done& done : std::exchange(connecting_, {})) done(why);
  if (news_) news_();
  refresh();  // until one answers
}

// Lets go of nodes that own nothing: at once where commands would wait for them.
void ClusterNodes::prune() {
  const Nanos now = real_.now();
  for (auto at = members_.begin(); at != members_.end();) {
    Member& member = *at->second;
    Connection& connection = *member.connection;
    const bool busy = member.in_flight > 0 && connection.open() && !is_silent(member, now);
    if (busy || map_.owns_any(member.at)) {
      ++at;
      continue;
    }
    count(connection, retired_);
    connection.close(Status::make(Code::unavailable,
                                  formatted("the node at {} owns no slot any more", key_of(member.at))));
    at = members_.erase(at);
  }
}

void ClusterNodes::tell_connected() {
  for (std::size_t i = 0; i < up_.size(); ++i) up_[i]();
}

// --- nodes that do not answer ---------------------------------------------------------------------------

bool ClusterNodes::is_silent(const Member& member, Nanos now) const {
  return member.in_flight > 0 && now - member.heard_at >= kSilent;
}

void ClusterNodes::asked(Member& member) {
  if (member.in_flight++ == 0) member.heard_at = real_.now();
  ++in_flight_;
  if (!std::exchange(watching_, true)) watch();
}

void ClusterNodes::answered(Member& member) {
  --member.in_flight;
  --in_flight_;
  member.heard_at = real_.now();
}

void ClusterNodes::watch() {
  watch_timer_->expires_after(std::chrono::nanoseconds(kSilent / 2));
  watch_timer_->async_wait([weak = weak_from_this()](const asio::error_code& ec) {
    const auto self = weak.lock();
    if (ec || !self || self->closed_) return;
    const Nanos now = self->real_.now();
    for (const auto& [key, member] : self->members_) {
      if (!self->is_silent(*member, now)) continue;
      self->refresh();
      if (self->silent_) self->silent_(*member);
    }
    if (self->in_flight_ > 0) return self->watch();
    self->watching_ = false;
  });
}

// --- the end ------------------------------------------------------------------------------------------

void ClusterNodes::count(const Connection& connection, store::Stats& stats) {
  stats.round_trips += connection.writes();
  stats.statements += connection.commands();
  stats.reconnects += connection.reconnects();
}

void ClusterNodes::add_stats(store::Stats& stats) const {
  stats.round_trips += retired_.round_trips;
  stats.statements += retired_.statements;
  stats.reconnects += retired_.reconnects;
  for (const auto& [key, member] : members_) {
    const Connection& connection = *member->connection;
    count(connection, stats);
    stats.connections_open += connection.open() ? 1 : 0;
    stats.connections_in_use += connection.pending() > 0 ? 1 : 0;
    if (!connection.open()) stats.connections_waiting += connection.pending();
  }
}

void ClusterNodes::finish(Nanos grace, std::function<void()> done) {
  closed_ = true;
  timer_->cancel();
  watch_timer_->cancel();
  const Status why = Status::make(Code::closed, "the store was closed");
  for (Done& waiter : connecting_) asio::post(io_, [waiter = std::move(waiter), why] { waiter(why); });
  connecting_.clear();
  // The last of them to end says so; without any, the post does.
  const auto last =
      std::shared_ptr<void>(nullptr, [&io = io_, done = std::move(done)](void*) { asio::post(io, done); });
  for (const auto& [key, member] : members_) member->connection->finish(grace, [last] {});
}

void ClusterNodes::close(const Status& why) {
  closed_ = true;
  timer_->cancel();
  watch_timer_->cancel();
  for (const auto& [key, member] : members_) member->connection->close(why);
}

void ClusterNodes::abandon_after_fork() {
  closed_ = true;
  for (const auto& [key, member] : members_) member->connection->abandon_after_fork();
  (void)timer_.release();
  (void)watch_timer_.release();
}

}  // namespace ratesync::redis
