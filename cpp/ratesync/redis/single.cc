#include "ratesync/redis/single.h"

#include <asio/post.hpp>
#include <utility>

#include "ratesync/redis/errors.h"
#include "ratesync/redis/node.h"
#include "ratesync/redis/scan.h"
#include "ratesync/redis/subscription.h"

namespace ratesync::redis {
namespace {

// How long close() lets commands under way be answered: releases of slots, mostly.
constexpr Nanos kCloseGrace = kSecond;

class Single final : public SingleCommander {
 public:
  Single(asio::io_context& io, const Clock& clock, ConnectionOptions options, std::string description,
         bool subscriptions)
      : description_(std::move(description)),
        user_(std::make_shared<const std::string>(options.user)),
        subscriptions_(subscriptions) {
    subscription_ = std::make_shared<Subscription>(io, options);
    connection_ = Connection::create(io, clock, std::move(options));
    node_ = std::make_shared<Node>(connection_);
  }
  ~Single() override {
    connection_->close(Status::make(Code::closed, "the store was closed"));
    subscription_->close();
  }

  void connect(std::function<void(Status)> done) override { connection_->connect(std::move(done)); }

  void call(std::string_view, Command command, Nanos deadline, ReplyCallback done) override {
    std::string name(command[0]);
    node_->call(command, deadline, check(std::move(name), std::move(done)));
  }
  void eval(const Script& script, std::string_view, Command arguments, Nanos deadline,
            ReplyCallback done) override {
    node_->eval(script, std::move(arguments), deadline, check(script.name, std::move(done)));
  }
  void call_all(Command command, Nanos deadline,
                std::function<void(std::vector<Result<Reply>>)> done) override {
    call({}, std::move(command), deadline, [done = std::move(done)](Result<Reply> reply) {
      std::vector<Result<Reply>> all;
      all.push_back(std::move(reply));
      done(std::move(all));
    });
  }
  void walk(std::string pattern, KeySink each, Nanos deadline, std::function<void(Status)> done) override {
    walk_node(node_, std::move(pattern), std::move(each), deadline,
              [done = std::move(done)](const Result<bool>& ended) { done(ended.status()); });
  }

  [[nodiscard]] std::uint16_t slot_of(std::string_view) const override { return 0; }
  [[nodiscard]] bool clustered() const override { return false; }

  void subscribe(std::string channel, std::function<void(std::string_view)> listener) override {
    if (subscriptions_) subscription_->subscribe(channel, std::move(listener));
  }
  [[nodiscard]] bool subscribed() const override { return subscription_->subscribed(); }
  void on_reconnect(std::function<void()> listener) override { connection_->on_up(std::move(listener)); }

  [[nodiscard]] bool down() const override { return connection_->down(); }
  void add_stats(store::Stats& stats) const override {
    stats.round_trips += connection_->writes();
    stats.statements += connection_->commands();
    stats.reconnects += connection_->reconnects() + subscription_->reconnects();
    stats.connections_open += (connection_->open() ? 1 : 0) + (subscription_->open() ? 1 : 0);
    stats.connections_in_use += (connection_->pending() > 0 ? 1 : 0) + (subscription_->open() ? 1 : 0);
    if (!connection_->open()) stats.connections_waiting += connection_->pending();
  }
  [[nodiscard]] std::string target() const override { return description_; }

  void close(std::function<void()> done) override {
    subscription_->close();
    connection_->finish(kCloseGrace, std::move(done));
  }
  void retarget(net::StreamTarget target) override {
    connection_->retarget(target);
    subscription_->retarget(std::move(target));
  }
  void abandon_after_fork() override {
    connection_->abandon_after_fork();
    subscription_->abandon_after_fork();
    // Nothing of the parent's is to be destroyed here.
    (void)new auto(connection_);
    (void)new auto(subscription_);
  }

 private:
  // Error replies become a Status; a primary that was demoted is left.
  ReplyCallback check(std::string name, ReplyCallback done) {
    return [connection = std::weak_ptr(connection_), user = user_, name = std::move(name),
            done = std::move(done)](Result<Reply> result) {
      if (!result.ok() || result.value().kind != Reply::Kind::error) return done(std::move(result));
      const auto held = connection.lock();
      Status status = from_server(result.value().text, {held ? held->peer() : "", *user, name});
      if (held && is_wrong_role(status.sqlstate)) held->drop(status);
      done(std::move(status));
    };
  }

  const std::string description_;
  const std::shared_ptr<const std::string> user_;
  const bool subscriptions_;
  std::shared_ptr<Connection> connection_;
  std::shared_ptr<Subscription> subscription_;
  std::shared_ptr<Node> node_;
};

}  // namespace

std::unique_ptr<SingleCommander> make_single(asio::io_context& io, const Clock& clock,
                                             ConnectionOptions options, std::string description,
                                             bool subscriptions) {
  return std::make_unique<Single>(io, clock, std::move(options), std::move(description), subscriptions);
}

}  // namespace ratesync::redis
