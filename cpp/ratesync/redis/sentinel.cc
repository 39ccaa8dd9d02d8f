#include "ratesync/redis/sentinel.h"

#include <algorithm>
#include <asio/post.hpp>
#include <asio/steady_timer.hpp>
#include <charconv>
#include <chrono>
#include <sstream>
#include <utility>
#include <vector>

#include "ratesync/base/format.h"
#include "ratesync/redis/errors.h"
#include "ratesync/redis/forward.h"
#include "ratesync/redis/single.h"
#include "ratesync/redis/subscription.h"

namespace ratesync::redis {
namespace {

constexpr Nanos kHedge = 200 * kMilli;  // then the next Sentinel is asked too

using Found = std::function<void(Result<net::StreamTarget>)>;

// Of the Sentinels themselves.
ConnectionOptions sentinel_options(ConnectionOptions options, const RedisUrl& url) {
  options.user = url.sentinel_user;
  options.password = url.sentinel_password;
  options.db = 0;
  options.primary_only = false;
  return options;
}

// Asks the Sentinels who the primary is.
class Finder : public std::enable_shared_from_this<Finder> {
 public:
  Finder(asio::io_context& io, const Clock& clock, const ConnectionOptions& options, const RedisUrl& url)
      : io_(io), clock_(clock), url_(url), patience_(options.connect_timeout) {
    for (const HostPort& host : url.hosts) {
      ConnectionOptions one = options;
      one.target = url.target(host);
      sentinels_.push_back(Connection::create(io, clock, std::move(one)));
    }
  }

  // Never answers inside the call. Questions do not share answers: each starts with the Sentinel after
  // the one that answered last, since what that one named may be why we ask again.
  void locate(Found found) {
    const auto search = std::make_shared<Search>(io_);
    search->found = std::move(found);
    search->first = turn_;
    search->give_up_at = real_.now() + patience_;
    asio::post(io_, [weak = weak_from_this(), search] {
      if (const auto self = weak.lock()) self->ask_next(search);
    });
  }
  // One of them, for the subscription.
  net::StreamTarget any() const { return url_.target(url_.hosts[turn_ % url_.hosts.size()]); }
  void turn() { ++turn_; }

  void close() {
    for (const auto& one : sentinels_) one->close(Status::make(Code::closed, "the store was closed"));
  }
  void abandon_after_fork() {
    for (const auto& one : sentinels_) one->abandon_after_fork();
  }
  void add_stats(store::Stats& stats) const {
    for (const auto& one : sentinels_) stats.connections_open += one->open() ? 1 : 0;
  }

 private:
  struct Search {
    explicit Search(asio::io_context& io) : timer(io) {}
    Found found;
    std::size_t first = 0;
    std::size_t asked = 0;
    std::size_t unanswered = 0;
    Nanos give_up_at = 0;
    Status why;
    asio::steady_timer timer;
  };
  using SearchRef = std::shared_ptr<Search>;

  void ask_next(const SearchRef& search) {
    if (!search->found) return;
    if (search->asked == sentinels_.size()) {
      if (search->unanswered == 0 || real_.now() >= search->give_up_at) return fail(search);
      return wait(search, search->give_up_at - real_.now());
    }
    const std::size_t which = (search->first + search->asked++) % sentinels_.size();
    ++search->unanswered;
    Command command("SENTINEL");
    command.add("GET-MASTER-ADDR-BY-NAME").add(url_.primary_name);
    sentinels_[which]->send(command, saturating_add(clock_.now(), patience_),
                            [weak = weak_from_this(), search, which](Result<Reply> reply) {
                              if (const auto self = weak.lock()) self->take(search, which, std::move(reply));
                            });
    wait(search, kHedge);
  }

  void wait(const SearchRef& search, Nanos time) {
    search->timer.expires_after(std::chrono::nanoseconds(std::max<Nanos>(time, 0)));
    search->timer.async_wait([weak = weak_from_this(), search](const asio::error_code& ec) {
      if (const auto self = weak.lock(); self && !ec) self->ask_next(search);
    });
  }

  void take(const SearchRef& search, std::size_t which, Result<Reply> reply) {
    if (!search->found) return;
    --search->unanswered;
    Result<net::StreamTarget> target = read(which, std::move(reply));
    if (target.ok()) {
      turn_ = which + 1;
      return end(search, std::move(target));
    }
    // What a Sentinel says tells more than that another one is away.
    if (search->why.ok() || search->why.code == Code::unavailable) search->why = target.status();
    ask_next(search);
  }

  Result<net::StreamTarget> read(std::size_t which, Result<Reply> reply) const {
    if (!reply.ok()) return explained(reply.status());
    const std::string peer = sentinels_[which]->peer();
    const ErrorContext context{peer, url_.sentinel_user, "SENTINEL GET-MASTER-ADDR-BY-NAME"};
    reply = checked(std::move(reply.value()), context);
    if (!reply.ok()) return explained(reply.status());
    const Reply& value = reply.value();
    if (value.kind == Reply::Kind::nil)
      return Status::make(Code::invalid,
                          formatted("the Sentinel at {} knows no group named {}: redis-cli -p 26379 SENTINEL "
                                    "MASTERS lists the names; the url ends with one",
                                    peer, url_.primary_name));
    if (value.kind != Reply::Kind::array || value.items.size() != 2) return odd(peer);
    return address(value.items[0].text, value.items[1].text, peer);
  }

 public:
  Result<net::StreamTarget> address(const std::string& host, const std::string& port,
                                    const std::string& peer) const {
    std::uint16_t number = 0;
    const auto [end, error] = std::from_chars(port.data(), port.data() + port.size(), number);
    if (error != std::errc() || end != port.data() + port.size() || number == 0 || host.empty())
      return odd(peer);
    return url_.target({host, number});
  }

 private:
  static Status odd(const std::string& peer) {
    return Status::make(Code::protocol,
                        formatted("the Sentinel at {} named the primary's address in an unknown form", peer));
  }
  static Status explained(Status status) {
    if (status.sqlstate == "NOAUTH" || status.sqlstate == "WRONGPASS")
      status.message += " This is a Sentinel: its password is the url's ?sentinel_password=...";
    return status;
  }
  void fail(const SearchRef& search) {
    Status why = search->why;
    if (why.ok()) why = Status::make(Code::unavailable, "no answer");
    why.message = formatted("no Sentinel of {} named the primary: {}", url_.describe(), why.message);
    ++turn_;
    end(search, std::move(why));
  }
  static void end(const SearchRef& search, Result<net::StreamTarget> result) {
    search->timer.cancel();
    std::exchange(search->found, nullptr)(std::move(result));
  }

  asio::io_context& io_;
  const Clock& clock_;
  const Clock real_;
  const RedisUrl url_;
  const Nanos patience_;
  std::vector<std::shared_ptr<Connection>> sentinels_;
  std::size_t turn_ = 0;
};

class Sentinel final : public Forward {
 public:
  Sentinel(std::unique_ptr<SingleCommander> primary, std::shared_ptr<Finder> finder,
           std::shared_ptr<Subscription> watch, std::string name)
      : Forward(nullptr), finder_(std::move(finder)), watch_(std::move(watch)), name_(std::move(name)) {
    primary_ = std::make_shared<SingleCommander*>(primary.get());
    inner_ = std::move(primary);
  }
  ~Sentinel() override {
    watch_->close();
    finder_->close();
  }

  void connect(std::function<void(Status)> done) override {
    const std::weak_ptr<SingleCommander*> primary = primary_;
    // What happened while we did not listen.
    watch_->on_up([primary, finder = finder_] {
      finder->locate([primary](Result<net::StreamTarget> found) { follow(primary, std::move(found)); });
    });
    watch_->subscribe("+switch-master", [primary, finder = finder_, name = name_](std::string_view message) {
      std::istringstream words{std::string(message)};
      std::string who, old_host, old_port, host, port;
      if (words >> who >> old_host >> old_port >> host >> port && who == name)
        follow(primary, finder->address(host, port, "+switch-master"));
    });
    inner_->connect(std::move(done));
  }
  void add_stats(store::Stats& stats) const override {
    inner_->add_stats(stats);
    finder_->add_stats(stats);
    stats.connections_open += watch_->open() ? 1 : 0;
  }
  void close(std::function<void()> done) override {
    watch_->close();
    finder_->close();
    inner_->close(std::move(done));
  }
  void abandon_after_fork() override {
    watch_->abandon_after_fork();
    finder_->abandon_after_fork();
    inner_->abandon_after_fork();
    // Nothing of the parent's is to be destroyed here.
    (void)new auto(watch_);
    (void)new auto(finder_);
  }

 private:
  static void follow(const std::weak_ptr<SingleCommander*>& primary, Result<net::StreamTarget> target) {
    if (const auto held = primary.lock(); held && target.ok()) (*held)->retarget(std::move(target.value()));
  }

  const std::shared_ptr<Finder> finder_;
  const std::shared_ptr<Subscription> watch_;
  const std::string name_;
  std::shared_ptr<SingleCommander*> primary_;  // what callbacks reach it by, while we live
};

}  // namespace

std::unique_ptr<Commander> make_sentinel(asio::io_context& io, const Clock& clock, ConnectionOptions options,
                                         const RedisUrl& url, bool subscriptions) {
  ConnectionOptions theirs = sentinel_options(options, url);
  const auto finder = std::make_shared<Finder>(io, clock, theirs, url);
  theirs.locate = [finder, &io](Found found) {
    finder->turn();
    asio::post(io, [target = finder->any(), found = std::move(found)] { found(target); });
  };
  auto watch = std::make_shared<Subscription>(io, std::move(theirs));
  options.primary_only = true;
  options.locate = [finder](Found found) { finder->locate(std::move(found)); };
  auto primary = make_single(io, clock, std::move(options), url.describe(), subscriptions);
  return std::make_unique<Sentinel>(std::move(primary), finder, std::move(watch), url.primary_name);
}

}  // namespace ratesync::redis
