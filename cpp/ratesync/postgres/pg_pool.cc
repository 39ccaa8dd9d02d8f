// Does what the sans-io pool decides: makes, sets up, lends and drops connections.
//
// The pool's actions are queued and carried out from the loop, never inside get() or put(): so no
// caller is called back while it is still in its own call, and a borrower that puts back inside its
// callback does not recurse through all who wait.
#include "ratesync/postgres/pg_pool.h"

#include <algorithm>
#include <asio/post.hpp>
#include <asio/steady_timer.hpp>
#include <deque>
#include <memory>
#include <random>
#include <unordered_map>
#include <utility>
#include <vector>

#include "ratesync/pool/pool.h"

namespace ratesync::postgres {
namespace {

// On close, a lent connection comes back when its pipeline ends, and command_timeout bounds that;
// this much more, and it is closed in the borrower's hands.
constexpr Nanos kCloseGrace = 500 * kMilli;

pool::PoolOptions sans_io(const PoolOptions& o) {
  pool::PoolOptions out;
  out.min_size = o.min_size;
  out.max_size = o.max_size;
  out.max_waiting = o.max_waiting;
  out.acquire_timeout = o.acquire_timeout;
  out.max_lifetime = o.max_lifetime;
  out.max_idle = o.max_idle;
  return out;
}

class Impl : public std::enable_shared_from_this<Impl> {
 public:
  Impl(asio::io_context& io, ConnInfo info, ConnectionOptions connection, const PoolOptions& options)
      : io_(io),
        info_(std::move(info)),
        connection_(std::move(connection)),
        pool_(sans_io(options),
              [random = std::minstd_rand(std::random_device{}())]() mutable {
                return std::uniform_real_distribution<>(0, 1)(random);
              }),
        timer_(std::make_unique<asio::steady_timer>(io)),
        close_timer_(std::make_unique<asio::steady_timer>(io)) {}

  void set_setup(PgPool::Setup setup) { setup_ = std::move(setup); }
  void get(PgPool::OnLease done);
  void put(const PgPool::Lease& lease);
  void close(std::function<void()> done);
  void drop_everything();
  void abandon_after_fork();
  [[nodiscard]] bool down() const { return pool_.down(); }
  void fill(store::Stats& stats) const;

 private:
  using Kind = pool::PoolAction::Kind;

  // Feeds the pool and queues what it answers.
  template <class Call>
  void feed(Call call) {
    pool::Actions out;
    call(clock_.now(), out);
    std::move(out.begin(), out.end(), std::back_inserter(queue_));
    if (queue_.empty() || scheduled_) return;
    scheduled_ = true;
    asio::post(io_, [weak = weak_from_this()] {
      if (const auto self = weak.lock()) self->drive();
    });
  }

  void drive();
  void perform(pool::PoolAction action);
  void open(pool::NodeId node);
  void set_up(pool::NodeId node);
  void drop(pool::NodeId node);
  void grant(pool::NodeId node, pool::WaiterId waiter);
  void answer(pool::WaiterId waiter, Result<PgPool::Lease> result);
  void arm(Nanos at);
  void all_closed();

  asio::io_context& io_;
  const ConnInfo info_;
  const ConnectionOptions connection_;
  const Clock clock_;
  pool::Pool pool_;
  PgPool::Setup setup_;
  std::unordered_map<pool::NodeId, std::shared_ptr<Connection>> nodes_;
  std::unordered_map<const Connection*, pool::NodeId> node_of_;
  std::unordered_map<pool::WaiterId, PgPool::OnLease> waiters_;
  pool::WaiterId next_waiter_ = 1;
  std::deque<pool::PoolAction> queue_;
  bool scheduled_ = false;
  // Behind pointers: leaked after fork, their locks may be held by a thread of the parent's.
  std::unique_ptr<asio::steady_timer> timer_;
  std::unique_ptr<asio::steady_timer> close_timer_;
  std::vector<std::function<void()>> on_closed_;
  bool closing_ = false;
  bool closed_ = false;
};

void Impl::get(PgPool::OnLease done) {
  const pool::WaiterId waiter = next_waiter_++;
  waiters_.emplace(waiter, std::move(done));
  feed([&](Nanos now, pool::Actions& out) { pool_.get(waiter, now, out); });
}

void Impl::put(const PgPool::Lease& lease) {
  const auto found = node_of_.find(lease.get());
  if (found == node_of_.end()) return lease->close();  // the pool was closed over the borrower's head
  const pool::NodeId node = found->second;
  feed([&](Nanos now, pool::Actions& out) { pool_.put(node, lease->open(), now, out); });
}

void Impl::drive() {
  scheduled_ = false;
  // Only what is there now: callbacks may go on for ever, others on the loop want their turn.
  std::deque<pool::PoolAction> batch = std::exchange(queue_, {});
  for (pool::PoolAction& action : batch) perform(std::move(action));
}

void Impl::perform(pool::PoolAction action) {
  switch (action.kind) {
    case Kind::connect: return open(action.node);
    case Kind::setup: return set_up(action.node);
    case Kind::close: return drop(action.node);
    case Kind::grant: return grant(action.node, action.waiter);
    case Kind::fail: return answer(action.waiter, std::move(action.status));
    case Kind::timer: return arm(action.at);
    case Kind::closed: return all_closed();
  }
}

void Impl::open(pool::NodeId node) {
  auto connection = Connection::create(io_, info_, connection_);
  nodes_[node] = connection;
  node_of_[connection.get()] = node;
  connection->on_broken([weak = weak_from_this(), node](const Status&) {
    if (const auto self = weak.lock())
      self->feed([&](Nanos now, pool::Actions& out) { self->pool_.broken(node, now, out); });
  });
  connection->connect([weak = weak_from_this(), node](Status status) {
    const auto self = weak.lock();
    if (!self) return;
    self->feed([&](Nanos now, pool::Actions& out) {
      if (status.ok())
        self->pool_.connected(node, now, out);
      else
        self->pool_.connect_failed(node, std::move(status), now, out);
    });
  });
}

void Impl::set_up(pool::NodeId node) {
  auto finish = [weak = weak_from_this(), node](Status status) {
    const auto self = weak.lock();
    if (!self) return;
    // What the set-up sent is idempotent and nobody's request: a lost answer is a failed connect.
    if (status.code == Code::in_doubt) status.code = Code::unavailable;
    self->feed([&](Nanos now, pool::Actions& out) {
      if (status.ok())
        self->pool_.setup_done(node, now, out);
      else
        self->pool_.connect_failed(node, std::move(status), now, out);
    });
  };
  const auto found = nodes_.find(node);
  if (found == nodes_.end()) return;
  if (!setup_) return finish(Status::success());
  setup_(found->second, std::move(finish));
}

void Impl::drop(pool::NodeId node) {
  if (const auto found = nodes_.find(node); found != nodes_.end()) {
    const std::shared_ptr<Connection> connection = std::move(found->second);
    nodes_.erase(found);
    node_of_.erase(connection.get());
    connection->close();
  }
  feed([&](Nanos now, pool::Actions& out) { pool_.closed(node, now, out); });
}

void Impl::grant(pool::NodeId node, pool::WaiterId waiter) {
  const auto found = nodes_.find(node);
  const auto asked = waiters_.find(waiter);
  if (found == nodes_.end() || asked == waiters_.end()) {
    feed([&](Nanos now, pool::Actions& out) { pool_.put(node, false, now, out); });
    return;
  }
  if (!found->second->open()) {
    // The server hung up between the decision and now: once more, with another connection.
    feed([&](Nanos now, pool::Actions& out) {
      pool_.put(node, false, now, out);
      pool_.get(waiter, now, out);
    });
    return;
  }
  answer(waiter, found->second);
}

void Impl::answer(pool::WaiterId waiter, Result<PgPool::Lease> result) {
  const auto found = waiters_.find(waiter);
  if (found == waiters_.end()) return;
  const PgPool::OnLease done = std::move(found->second);
  waiters_.erase(found);
  done(std::move(result));
}

void Impl::arm(Nanos at) {
  if (at == kForever) {
    timer_->cancel();
    return;
  }
  timer_->expires_after(std::chrono::nanoseconds(std::max<Nanos>(at - clock_.now(), 0)));
  timer_->async_wait([weak = weak_from_this()](const asio::error_code& ec) {
    const auto self = weak.lock();
    if (!ec && self) self->feed([&](Nanos now, pool::Actions& out) { self->pool_.tick(now, out); });
  });
}

void Impl::close(std::function<void()> done) {
  if (closed_) {
    asio::post(io_, std::move(done));
    return;
  }
  on_closed_.push_back(std::move(done));
  if (std::exchange(closing_, true)) return;
  close_timer_->expires_after(
      std::chrono::nanoseconds(saturating_add(connection_.command_timeout, kCloseGrace)));
  close_timer_->async_wait([weak = weak_from_this()](const asio::error_code& ec) {
    const auto self = weak.lock();
    if (ec || !self || self->closed_) return;
    self->drop_everything();
    self->all_closed();
  });
  feed([&](Nanos now, pool::Actions& out) { pool_.close(now, out); });
}

void Impl::drop_everything() {
  node_of_.clear();
  for (const auto& [node, connection] : std::exchange(nodes_, {})) connection->close();
}

void Impl::all_closed() {
  closed_ = true;
  timer_->cancel();
  close_timer_->cancel();
  for (const auto& done : std::exchange(on_closed_, {})) done();
}

void Impl::abandon_after_fork() {
  for (const auto& [node, connection] : nodes_) connection->abandon_after_fork();
  for (auto& [node, connection] : nodes_) new std::shared_ptr<Connection>(connection);
  (void)timer_.release();
  (void)close_timer_.release();
}

void Impl::fill(store::Stats& stats) const {
  const pool::Gauges gauges = pool_.gauges();
  stats.reconnects = gauges.reconnects;
  stats.connections_open = gauges.open;
  stats.connections_in_use = gauges.in_use;
  stats.connections_waiting = gauges.waiting;
}

// The unique owner's handle. What is still under way holds the Impl weakly and falls silent.
class PgPoolHandle final : public PgPool {
 public:
  explicit PgPoolHandle(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
  ~PgPoolHandle() override {
    if (!abandoned_) impl_->drop_everything();
  }

  void set_setup(Setup setup) override { impl_->set_setup(std::move(setup)); }
  void get(OnLease done) override { impl_->get(std::move(done)); }
  void put(Lease lease) override { impl_->put(lease); }
  void close(std::function<void()> done) override { impl_->close(std::move(done)); }
  void abandon_after_fork() override {
    abandoned_ = true;
    impl_->abandon_after_fork();
  }
  [[nodiscard]] bool down() const override { return impl_->down(); }
  void fill(store::Stats& stats) const override { impl_->fill(stats); }

 private:
  std::shared_ptr<Impl> impl_;
  bool abandoned_ = false;
};

}  // namespace

std::unique_ptr<PgPool> PgPool::create(asio::io_context& io, ConnInfo info, ConnectionOptions connection,
                                       PoolOptions options) {
  return std::make_unique<PgPoolHandle>(
      std::make_shared<Impl>(io, std::move(info), std::move(connection), options));
}

}  // namespace ratesync::postgres
