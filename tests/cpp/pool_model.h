// A model of the glue and of the server for the random test of the pool: it does what the pool asks,
// at random times and in random order, keeps its own books, and compares them after every event.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "ratesync/pool/pool.h"

namespace ratesync::pool {

class Model {
 public:
  enum class Server { up, unreachable, refusing };

  explicit Model(unsigned seed) : rng_(seed) {
    options_.min_size = dice(4);
    options_.max_size = std::max<std::size_t>(options_.min_size, 1 + dice(5));
    options_.max_waiting = 1 + dice(12);
    options_.acquire_timeout = chance(10) ? kForever : (1 + dice(5'000)) * kMilli;
    options_.max_lifetime = chance(5) ? kForever : (1 + dice(20)) * kSecond;
    options_.max_idle = chance(5) ? kForever : (1 + dice(5)) * kSecond;
    options_.fail_after = 1 + dice(3);
    pool_.emplace(options_, [this] { return std::uniform_real_distribution<double>(0, 1)(rng_); });
  }

  void random_event() {
    switch (dice(16)) {
      case 0:
      case 1:
      case 2: get(); return;
      case 3: return cancel();
      case 4:
      case 5:
      case 6: return put(!chance(8));
      case 7:
      case 8:
      case 9: return advance_one_connect();
      case 10: return report_broken();
      case 11: return report_closed();
      case 12: return late_report();
      case 13: return pass((1 + dice(400)) * kMilli);
      case 14: return pass(timer_ == kForever ? kMilli : std::max<Nanos>(timer_ - now_, 0));
      case 15:
        if (chance(20)) server_ = Server{static_cast<int>(dice(3))};
        return;
    }
  }

  // The server is well again: everybody is answered, and a newcomer gets a connection.
  void recover() {
    server_ = Server::up;
    for (int i = 0; i < 1'000 && !waiting_.empty() && !failed(); ++i) settle_once();
    EXPECT_TRUE(waiting_.empty()) << waiting_.size() << " waiters were forgotten";
    for (int i = 0; i < 20 && !failed(); ++i) settle_once();
    EXPECT_FALSE(pool_->down());
    if (failed()) return;
    // A time-out shorter than a connect lets the first ones go; what they opened serves a later one.
    const std::size_t before = granted_.size();
    for (int i = 0; i < 100 && granted_.size() == before && !failed(); ++i) {
      get();
      settle_once();
    }
    EXPECT_GT(granted_.size(), before) << "and it recovers";
  }

  void close() {
    closing_ = true;
    call([&](Actions& out) { pool_->close(now_, out); });
    EXPECT_TRUE(waiting_.empty());
    get();
    for (int i = 0; i < 100 && !nodes_.empty() && !failed(); ++i) settle_once();
    EXPECT_TRUE(nodes_.empty());
    EXPECT_TRUE(said_closed_);
    EXPECT_EQ(answers_ + cancelled_, asked_) << "every waiter is answered exactly once";
  }

  [[nodiscard]] std::size_t grants() const { return granted_.size(); }
  static bool failed() { return ::testing::Test::HasFailure(); }

 private:
  enum class At { connecting, setting_up, idle, lent, closing };
  struct Waiting {
    WaiterId id;
    Nanos since;
  };

  unsigned dice(unsigned n) { return static_cast<unsigned>(rng_() % n); }
  bool chance(unsigned one_in) { return dice(one_in) == 0; }

  template <class F>
  void call(F&& f) {
    Actions out;
    f(out);
    for (PoolAction& action : out) todo_.push_back(std::move(action));
    while (!todo_.empty()) {
      const PoolAction action = std::move(todo_.front());
      todo_.pop_front();
      perform(action);
    }
    check();
  }

  void perform(const PoolAction& a) {
    switch (a.kind) {
      case PoolAction::Kind::connect:
        EXPECT_FALSE(closing_);
        EXPECT_TRUE(used_.insert(a.node).second) << "a node id is used twice";
        nodes_[a.node] = At::connecting;
        return;
      case PoolAction::Kind::setup:
        EXPECT_EQ(nodes_.at(a.node), At::connecting);
        nodes_[a.node] = At::setting_up;
        return;
      case PoolAction::Kind::close:
        EXPECT_NE(nodes_.at(a.node), At::closing) << "closed twice";
        EXPECT_NE(nodes_.at(a.node), At::lent) << "pulled away from its borrower";
        nodes_[a.node] = At::closing;
        if (chance(2)) report_closed_now(a.node);  // from inside of the glue's loop
        return;
      case PoolAction::Kind::grant:
        ASSERT_FALSE(waiting_.empty());
        EXPECT_EQ(waiting_.front().id, a.waiter) << "first come, first served";
        waiting_.pop_front();
        EXPECT_EQ(nodes_.at(a.node), At::idle) << "only open connections are lent";
        EXPECT_FALSE(broken_.contains(a.node)) << "a broken one was lent";
        nodes_[a.node] = At::lent;
        granted_.insert(a.waiter);
        ++answers_;
        return;
      case PoolAction::Kind::fail: {
        ASSERT_FALSE(waiting_.empty());
        EXPECT_FALSE(a.status.ok());
        EXPECT_FALSE(a.status.message.empty());
        const bool refused_newcomer = a.status.code == Code::exhausted && waiting_.back().id == a.waiter &&
                                      waiting_.back().since == now_;
        if (refused_newcomer) {
          waiting_.pop_back();
        } else {
          EXPECT_EQ(waiting_.front().id, a.waiter);
          waiting_.pop_front();
        }
        ++answers_;
        return;
      }
      case PoolAction::Kind::timer: timer_ = std::min(timer_, a.at); return;
      case PoolAction::Kind::closed:
        EXPECT_TRUE(closing_);
        EXPECT_FALSE(said_closed_);
        said_closed_ = true;
        return;
    }
  }

  std::size_t count(At at) const {
    return static_cast<std::size_t>(
        std::count_if(nodes_.begin(), nodes_.end(), [at](const auto& n) { return n.second == at; }));
  }

  void check() {
    const Gauges gauges = pool_->gauges();
    EXPECT_LE(nodes_.size(), options_.max_size);
    EXPECT_EQ(gauges.open, count(At::idle) + count(At::lent));
    EXPECT_EQ(gauges.in_use, count(At::lent));
    EXPECT_EQ(gauges.pending, count(At::connecting) + count(At::setting_up));
    EXPECT_EQ(gauges.closing, count(At::closing));
    EXPECT_EQ(gauges.waiting, waiting_.size());
    EXPECT_LE(waiting_.size(), options_.max_waiting);
    EXPECT_LE(gauges.reconnects, breaks_);
    EXPECT_EQ(pool_->misuses(), 0u);
    EXPECT_EQ(said_closed_, closing_ && nodes_.empty());
    if (waiting_.empty()) return;
    EXPECT_EQ(count(At::idle), 0u) << "somebody waits beside an idle connection";
    EXPECT_TRUE(!nodes_.empty() || timer_ != kForever) << "nothing will ever wake the waiters";
    EXPECT_LE(timer_, saturating_add(waiting_.front().since, options_.acquire_timeout));
  }

  // --- events

  void get() {
    const WaiterId id = ++asked_;
    waiting_.push_back({id, now_});
    call([&](Actions& out) { pool_->get(id, now_, out); });
  }

  void cancel() {
    if (!waiting_.empty() && chance(2)) {
      const auto at = waiting_.begin() + dice(static_cast<unsigned>(waiting_.size()));
      EXPECT_TRUE(pool_->cancel(at->id));
      waiting_.erase(at);
      ++cancelled_;
    } else if (!granted_.empty()) {
      EXPECT_FALSE(pool_->cancel(*granted_.rbegin()));
    }
    check();
  }

  std::vector<NodeId> those(std::initializer_list<At> states) const {
    std::vector<NodeId> ids;
    for (const auto& [id, at] : nodes_) {
      if (std::find(states.begin(), states.end(), at) != states.end()) ids.push_back(id);
    }
    return ids;
  }
  NodeId any(std::initializer_list<At> states) {  // 0: none
    const auto ids = those(states);
    return ids.empty() ? 0 : ids[dice(static_cast<unsigned>(ids.size()))];
  }

  void put(bool open) {
    const NodeId id = any({At::lent});
    if (id == 0) return;
    if (!open) note_break(id);
    nodes_[id] = At::idle;  // until told otherwise
    call([&](Actions& out) { pool_->put(id, open, now_, out); });
  }

  void note_break(NodeId id) { breaks_ += broken_.insert(id).second ? 1 : 0; }

  void advance_one_connect() {
    const NodeId id = any({At::connecting, At::setting_up});
    if (id == 0) return;
    if (server_ != Server::up) {
      auto status = server_ == Server::refusing ? Status::make(Code::server, "no", "28P01")
                                                : Status::make(Code::unavailable, "nobody there");
      call([&](Actions& out) { pool_->connect_failed(id, std::move(status), now_, out); });
      EXPECT_TRUE(!nodes_.contains(id) || nodes_.at(id) == At::closing);
    } else if (nodes_.at(id) == At::connecting) {
      call([&](Actions& out) { pool_->connected(id, now_, out); });
    } else {
      nodes_[id] = At::idle;
      call([&](Actions& out) { pool_->setup_done(id, now_, out); });
    }
  }

  void report_broken() {
    const NodeId id = any({At::connecting, At::setting_up, At::idle, At::lent});
    if (id == 0 || !chance(3)) return;
    const At before = nodes_.at(id);
    if (before == At::idle || before == At::lent) note_break(id);
    call([&](Actions& out) { pool_->broken(id, now_, out); });
    EXPECT_TRUE(before == At::lent || !nodes_.contains(id) || nodes_.at(id) == At::closing);
  }

  void report_closed_now(NodeId id) {
    nodes_.erase(id);
    broken_.erase(id);
    Actions out;
    pool_->closed(id, now_, out);
    for (PoolAction& action : out) todo_.push_back(std::move(action));
  }
  void report_closed() {
    const NodeId id = any({At::closing});
    if (id == 0) return;
    report_closed_now(id);
    call([](Actions&) {});
  }

  // What was under way when a connection was closed still arrives, and must change nothing.
  void late_report() {
    NodeId id = any({At::closing});
    if (id == 0) {
      if (used_.empty() || nodes_.contains(*used_.begin())) return;
      id = *used_.begin();
    }
    const unsigned what = dice(4);
    call([&](Actions& out) {
      if (what == 0) pool_->connected(id, now_, out);
      if (what == 1) pool_->setup_done(id, now_, out);
      if (what == 2) pool_->connect_failed(id, Status::make(Code::unavailable, "late"), now_, out);
      if (what == 3) pool_->broken(id, now_, out);
    });
  }

  void pass(Nanos by) {
    const Nanos target = now_ + by;
    while (timer_ <= target && !failed()) {
      now_ = std::max(now_, timer_);
      timer_ = kForever;
      call([&](Actions& out) { pool_->tick(now_, out); });
      EXPECT_GT(timer_, now_) << "a timer in the past would spin";
    }
    now_ = target;
  }

  void settle_once() {
    report_closed();
    advance_one_connect();
    put(true);
    pass(100 * kMilli);
  }

  std::mt19937 rng_;
  PoolOptions options_;
  std::optional<Pool> pool_;
  Server server_ = Server::up;
  Nanos now_ = 1'000 * kSecond;
  Nanos timer_ = kForever;
  std::deque<PoolAction> todo_;

  std::map<NodeId, At> nodes_;
  std::set<NodeId> used_, broken_;
  std::deque<Waiting> waiting_;
  std::set<WaiterId> granted_;
  WaiterId asked_ = 0;
  std::uint64_t answers_ = 0, cancelled_ = 0, breaks_ = 0;
  bool closing_ = false, said_closed_ = false;
};

}  // namespace ratesync::pool
