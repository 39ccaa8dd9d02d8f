#include "ratesync/redis/cluster.h"

#include <algorithm>
#include <asio/post.hpp>
#include <asio/steady_timer.hpp>
#include <chrono>
#include <random>
#include <utility>

#include "ratesync/base/format.h"
#include "ratesync/redis/cluster_nodes.h"
#include "ratesync/redis/errors.h"
#include "ratesync/redis/scan.h"
#include "ratesync/redis/slots.h"
#include "ratesync/redis/subscription.h"

namespace ratesync::redis {
namespace {

constexpr int kMaxRedirects = 64;
constexpr int kQuickRedirects = 4;        // further ones pause first: two nodes may disagree for a while
constexpr Nanos kMinPause = 4 * kMilli;   // before a command is sent again; doubles ...
constexpr Nanos kMaxPause = 64 * kMilli;  // ... up to here
// How long a command waits for a successor of a node that cannot be reached. A failover takes longer than
// anybody's time budget, and the nodes that still answer would make that budget a generous one.
constexpr Nanos kUnreachable = 150 * kMilli;
constexpr Nanos kCloseGrace = kSecond;  // for commands under way: releases of slots, mostly
constexpr std::size_t kMaxParked = 200'000;

// One command on its way, from call() or eval() to its answer.
struct Call {
  bool keyed = false;
  std::uint16_t slot = 0;
  const Script* script = nullptr;  // eval: then `command` is what follows the SHA1
  Command command;
  Nanos deadline = 0;
  ReplyCallback done;
  int redirects = 0;
  int pauses = 0;
  Nanos unreachable_since = kForever;

  [[nodiscard]] std::string name() const { return script ? script->name : std::string(command[0]); }
};
using CallRef = std::shared_ptr<Call>;

class Core : public std::enable_shared_from_this<Core> {
 public:
  Core(asio::io_context& io, const Clock& clock, ConnectionOptions options, std::vector<HostPort> seeds,
       bool subscriptions)
      : io_(io),
        clock_(clock),
        user_(options.user),
        subscriptions_(subscriptions),
        nodes_(std::make_shared<ClusterNodes>(io, clock, options, std::move(seeds))),
        timer_(std::make_unique<asio::steady_timer>(io)) {
    options.locate = [nodes = nodes_, &io](std::function<void(Result<net::StreamTarget>)> found) {
      asio::post(io, [nodes, found = std::move(found)] { found(nodes->listening_post()); });
    };
    subscription_ = std::make_shared<Subscription>(io, std::move(options));
  }

  void start();
  void run(const CallRef& call);
  void run_at(const MemberRef& member, const CallRef& call, bool asking);
  void call_all(const Command& command, Nanos deadline, std::function<void(std::vector<Result<Reply>>)> done);
  void walk(const std::string& pattern, KeySink each, Nanos deadline, std::function<void(Status)> done);
  void close(std::function<void()> done);
  void drop();
  void abandon_after_fork();

  ClusterNodes& nodes() { return *nodes_; }
  Subscription& subscription() { return *subscription_; }
  [[nodiscard]] bool subscriptions() const { return subscriptions_; }

 private:
  struct Parked {
    CallRef call;
    Nanos due;
    Status why;
  };

  void answered(const MemberRef& member, const CallRef& call, Result<Reply> result);
  void refused(const MemberRef& member, const CallRef& call, const Reply& error);
  void park(const CallRef& call, Status why);
  void unpark(bool all);
  void arm();
  void end_parked(const Status& why);
  void fail_later(const CallRef& call, Status why);

  asio::io_context& io_;
  const Clock& clock_;
  const std::string user_;
  const bool subscriptions_;
  const std::shared_ptr<ClusterNodes> nodes_;
  std::shared_ptr<Subscription> subscription_;
  std::minstd_rand random_{std::random_device{}()};
  std::vector<Parked> parked_;
  std::unique_ptr<asio::steady_timer> timer_;  // behind a pointer: leaked after fork
  Nanos armed_ = kForever;
  bool closed_ = false;
};

void Core::start() {
  nodes_->on_news([weak = weak_from_this()] {
    if (const auto self = weak.lock()) self->unpark(true);
  });
  nodes_->on_silent([weak = weak_from_this()](const Member& member) {
    const auto self = weak.lock();
    if (!self || !self->subscription_->open()) return;
    // Where the subscription is. Restored on another node; what was published meanwhile is lost.
    if (self->subscription_->peer() == member.connection->peer())
      self->subscription_->retarget(self->nodes_->listening_post());
  });
}

// --- one command --------------------------------------------------------------------------------------

void Core::run(const CallRef& call) {
  if (closed_) return fail_later(call, Status::make(Code::closed, "the store was closed"));
  // While no node answers, what comes anew fails at once; nothing was sent.
  if (nodes_->down()) return fail_later(call, nodes_->last_error());
  const MemberRef member = call->keyed ? nodes_->owner(call->slot) : nodes_->any();
  if (member) return run_at(member, call, false);
  nodes_->refresh();
  park(call, Status::make(
                 Code::unavailable,
                 formatted("no node of the Redis Cluster owns slot {} (or none was found yet)", call->slot)));
}

void Core::run_at(const MemberRef& member, const CallRef& call, bool asking) {
  nodes_->asked(*member);
  auto done = [weak = weak_from_this(), nodes = nodes_, member, call](Result<Reply> result) {
    nodes->answered(*member);
    if (const auto self = weak.lock())
      self->answered(member, call, std::move(result));
    else
      call->done(std::move(result));
  };
  if (call->script)
    return member->node->eval(*call->script, call->command, call->deadline, std::move(done), asking);
  static const Command kAsking("ASKING");
  if (asking) member->connection->send(kAsking, call->deadline, [](const Result<Reply>&) {});
  member->node->call(call->command, call->deadline, std::move(done));
}

void Core::answered(const MemberRef& member, const CallRef& call, Result<Reply> result) {
  if (result.ok()) {
    if (result.value().kind == Reply::Kind::error) return refused(member, call, result.value());
    return call->done(std::move(result));
  }
  Status status = result.status();
  if (status.code == Code::unavailable) {
    nodes_->refresh();
    const Nanos now = clock_.now();
    call->unreachable_since = std::min(call->unreachable_since, now);
    if (now - call->unreachable_since < kUnreachable) return park(call, std::move(status));
  }
  // Sent and lost, or late: the node may be gone.
  if (status.code == Code::in_doubt || status.code == Code::timeout) nodes_->refresh();
  call->done(std::move(status));
}

void Core::refused(const MemberRef& member, const CallRef& call, const Reply& error) {
  call->unreachable_since = kForever;
  const auto redirect = parse_redirect(error.text, member->at.host);
  if (redirect && !closed_) {
    if (!redirect->ask) nodes_->moved(redirect->slot, redirect->node);
    if (++call->redirects > kMaxRedirects)
      return call->done(
          Status::make(Code::unavailable,
                       formatted("the nodes of the Redis Cluster sent {} from one to the other {} times: {}",
                                 call->name(), kMaxRedirects, error.text)));
    if (call->redirects <= kQuickRedirects && clock_.now() < call->deadline)
      return run_at(nodes_->at(redirect->node), call, redirect->ask);
    return park(call, from_server(error.text, {member->connection->peer(), user_, call->name()}));
  }
  Status status = from_server(error.text, {member->connection->peer(), user_, call->name()});
  const std::string& kind = status.sqlstate;
  // TRYAGAIN: some of the keys are on their way to another node.
  if (kind == "CLUSTERDOWN" || is_wrong_role(kind)) nodes_->refresh();
  if (kind == "TRYAGAIN" || kind == "CLUSTERDOWN" || kind == "LOADING" || is_wrong_role(kind))
    return park(call, std::move(status));
  call->done(std::move(status));
}

// --- commands that wait to be sent again ----------------------------------------------------------------

void Core::park(const CallRef& call, Status why) {
  if (closed_) return fail_later(call, Status::make(Code::closed, "the store was closed"));
  if (parked_.size() >= kMaxParked)
    return fail_later(
        call, Status::make(Code::exhausted, formatted("{} commands wait for a node of the Redis Cluster: {}",
                                                      kMaxParked, why.message)));
  const Nanos span = std::min(kMaxPause, kMinPause << std::min(call->pauses++, 10));
  const Nanos pause = std::uniform_int_distribution<Nanos>(span / 2, span)(random_);
  parked_.push_back({call, clock_.now() + pause, std::move(why)});
  arm();
}

void Core::arm() {
  Nanos first = kForever;
  for (const Parked& one : parked_) first = std::min({first, one.due, one.call->deadline});
  if (first >= armed_) return;
  armed_ = first;
  timer_->expires_after(std::chrono::nanoseconds(std::max<Nanos>(0, first - clock_.now())));
  timer_->async_wait([weak = weak_from_this()](const asio::error_code& ec) {
    const auto self = weak.lock();
    if (ec || !self || self->closed_) return;
    self->armed_ = kForever;
    self->unpark(false);
  });
}

void Core::unpark(bool all) {
  const auto held = shared_from_this();
  const Nanos now = clock_.now();
  std::vector<Parked> ready;
  const auto is_ready = [&](const Parked& one) { return all || one.due <= now || one.call->deadline <= now; };
  const auto rest = std::stable_partition(parked_.begin(), parked_.end(), is_ready);
  ready.assign(std::make_move_iterator(parked_.begin()), std::make_move_iterator(rest));
  parked_.erase(parked_.begin(), rest);
  for (Parked& one : ready) {
    if (one.call->deadline <= now)
      one.call->done(std::move(one.why));  // certainly not executed, and why
    else
      run(one.call);
  }
  if (!parked_.empty()) arm();
}

void Core::end_parked(const Status& why) {
  for (Parked& one : std::exchange(parked_, {})) fail_later(one.call, why);
}

void Core::fail_later(const CallRef& call, Status why) {
  asio::post(io_, [call, why = std::move(why)] { call->done(why); });
}

// --- all nodes ------------------------------------------------------------------------------------------

void Core::call_all(const Command& command, Nanos deadline,
                    std::function<void(std::vector<Result<Reply>>)> done) {
  struct Gather {
    std::vector<Result<Reply>> results;
    std::size_t missing;
    std::function<void(std::vector<Result<Reply>>)> done;
  };
  const std::vector<MemberRef> nodes = closed_ ? std::vector<MemberRef>() : nodes_->primaries();
  if (nodes.empty()) {
    Status why = closed_ ? Status::make(Code::closed, "the store was closed") : nodes_->last_error();
    if (why.ok()) why = Status::make(Code::unavailable, "no node of the Redis Cluster was found yet");
    asio::post(io_, [done = std::move(done), why] {
      std::vector<Result<Reply>> one;
      one.emplace_back(why);
      done(std::move(one));
    });
    return;
  }
  auto gather = std::make_shared<Gather>(Gather{{}, nodes.size(), std::move(done)});
  gather->results.resize(nodes.size(), Result<Reply>(Reply{}));
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    nodes_->asked(*nodes[i]);
    nodes[i]->node->call(
        command, deadline,
        [nodes = nodes_, member = nodes[i], gather, i, user = user_,
         name = std::string(command[0])](Result<Reply> reply) {
          nodes->answered(*member);
          if (reply.ok()) reply = checked(std::move(reply.value()), {member->connection->peer(), user, name});
          gather->results[i] = std::move(reply);
          if (--gather->missing == 0) gather->done(std::move(gather->results));
        });
  }
}

void Core::walk(const std::string& pattern, KeySink each, Nanos deadline, std::function<void(Status)> done) {
  // Node after node; a key that moves meanwhile may be met twice.
  struct Walk : std::enable_shared_from_this<Walk> {
    std::vector<MemberRef> left;
    std::string pattern;
    KeySink each;
    Nanos deadline = 0;
    std::function<void(Status)> done;

    void next() {
      if (left.empty()) return done(Status::success());
      const MemberRef member = std::move(left.back());
      left.pop_back();
      walk_node(
          member->node, pattern,
          [self = shared_from_this()](std::string key) { return self->each(std::move(key)); }, deadline,
          [self = shared_from_this()](const Result<bool>& more) {
            if (!more.ok() || !more.value()) return self->done(more.status());
            self->next();
          });
    }
  };
  const auto walk = std::make_shared<Walk>();
  if (!closed_) walk->left = nodes_->primaries();
  walk->pattern = pattern;
  walk->each = std::move(each);
  walk->deadline = deadline;
  walk->done = std::move(done);
  if (walk->left.empty()) {
    Status why = closed_ ? Status::make(Code::closed, "the store was closed") : nodes_->last_error();
    if (why.ok()) why = Status::make(Code::unavailable, "no node of the Redis Cluster was found yet");
    return asio::post(io_, [walk, why] { walk->done(why); });
  }
  asio::post(io_, [walk] { walk->next(); });
}

// --- the end --------------------------------------------------------------------------------------------

void Core::close(std::function<void()> done) {
  closed_ = true;
  timer_->cancel();
  subscription_->close();
  end_parked(Status::make(Code::closed, "the store was closed"));
  nodes_->finish(kCloseGrace, std::move(done));
}

void Core::drop() {
  const Status why = Status::make(Code::closed, "the store was closed");
  closed_ = true;
  timer_->cancel();
  subscription_->close();
  end_parked(why);
  nodes_->close(why);
}

void Core::abandon_after_fork() {
  closed_ = true;
  nodes_->abandon_after_fork();
  subscription_->abandon_after_fork();
  (void)timer_.release();
  // Nothing of the parent's is to be destroyed here.
  (void)new auto(shared_from_this());
}

class Cluster final : public Commander {
 public:
  Cluster(std::shared_ptr<Core> core, std::string description)
      : core_(std::move(core)), description_(std::move(description)) {}
  ~Cluster() override { core_->drop(); }

  void connect(std::function<void(Status)> done) override { core_->nodes().connect(std::move(done)); }

  void call(std::string_view key, Command command, Nanos deadline, ReplyCallback done) override {
    submit(nullptr, key, std::move(command), deadline, std::move(done));
  }
  void eval(const Script& script, std::string_view key, Command arguments, Nanos deadline,
            ReplyCallback done) override {
    submit(&script, key, std::move(arguments), deadline, std::move(done));
  }
  void call_all(Command command, Nanos deadline,
                std::function<void(std::vector<Result<Reply>>)> done) override {
    core_->call_all(command, deadline, std::move(done));
  }
  void walk(std::string pattern, KeySink each, Nanos deadline, std::function<void(Status)> done) override {
    core_->walk(pattern, std::move(each), deadline, std::move(done));
  }

  [[nodiscard]] std::uint16_t slot_of(std::string_view key) const override { return hash_slot(key); }
  [[nodiscard]] bool clustered() const override { return true; }

  void subscribe(std::string channel, std::function<void(std::string_view)> listener) override {
    if (core_->subscriptions()) core_->subscription().subscribe(channel, std::move(listener));
  }
  [[nodiscard]] bool subscribed() const override { return core_->subscription().subscribed(); }
  void on_reconnect(std::function<void()> listener) override { core_->nodes().on_up(std::move(listener)); }

  [[nodiscard]] bool down() const override { return core_->nodes().down(); }
  void add_stats(store::Stats& stats) const override {
    core_->nodes().add_stats(stats);
    const Subscription& subscription = core_->subscription();
    stats.reconnects += subscription.reconnects();
    stats.connections_open += subscription.open() ? 1 : 0;
    stats.connections_in_use += subscription.open() ? 1 : 0;
  }
  [[nodiscard]] std::string target() const override { return description_; }
  void close(std::function<void()> done) override { core_->close(std::move(done)); }
  void abandon_after_fork() override { core_->abandon_after_fork(); }

 private:
  void submit(const Script* script, std::string_view key, Command command, Nanos deadline,
              ReplyCallback done) {
    core_->run(std::make_shared<Call>(
        Call{!key.empty(), hash_slot(key), script, std::move(command), deadline, std::move(done)}));
  }

  const std::shared_ptr<Core> core_;
  const std::string description_;
};

}  // namespace

std::unique_ptr<Commander> make_cluster(asio::io_context& io, const Clock& clock, ConnectionOptions options,
                                        std::vector<HostPort> seeds, std::string description,
                                        bool subscriptions) {
  auto core = std::make_shared<Core>(io, clock, std::move(options), std::move(seeds), subscriptions);
  core->start();
  return std::make_unique<Cluster>(std::move(core), std::move(description));
}

}  // namespace ratesync::redis
