// What the tests of state and locks in Redis share: a store, and operations that wait for their end.
#pragma once

#include <deque>
#include <limits>

#include "ratesync/base/format.h"
#include "ratesync/redis/redis_store.h"
#include "redis_fixture.h"

namespace ratesync::testing {

using store::LockOp;
using store::LockReply;
using store::Space;
using store::SpaceRef;
using store::StateBatch;
using store::StateOp;
using store::StateReply;
using store::Value;
using StateVerb = StateOp::Verb;
using Outcome = StateReply::Outcome;
using LockOutcome = LockReply::Outcome;

struct WaitedOp final : StateOp {
  int ended = 0;
  void done() override { ++ended; }
};
struct WaitedBatch final : StateBatch {
  int ended = 0;
  void done() override { ++ended; }
};
struct WaitedLock final : LockOp {
  int ended = 0;
  void done() override { ++ended; }
};

inline Value text_value(std::string text) {
  Value out;
  out.type = Value::Type::text;
  out.data = std::move(text);
  return out;
}
inline Value number_value(std::int64_t number) {
  Value out;
  out.type = Value::Type::integer;
  out.number = number;
  return out;
}

class RedisStateTest : public RedisTest {
 protected:
  static constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  static constexpr std::int64_t kLeast = std::numeric_limits<std::int64_t>::min();

  void TearDown() override {
    for (auto& store : stores_) close(*store);
    stores_.clear();
    io_.restart();
    io_.poll();
  }

  static void close_quietly(store::Store& store, bool& closed) {
    store.close([&closed] { closed = true; });
  }
  void close(store::Store& store) {
    bool closed = false;
    close_quietly(store, closed);
    EXPECT_TRUE(wait_until([&] { return closed; }));
  }

  store::Store& open(const std::string& url, RedisOptions with = {}) {
    with.url = url;
    auto made = RedisStore::create(io_, clock_, std::move(with));
    EXPECT_TRUE(made.ok()) << made.status().message;
    stores_.push_back(std::move(made.value()));
    return *stores_.back();
  }
  // A prefix of its own for each test on the shared server.
  std::string prefix() {
    static int number = 0;
    if (prefix_.empty()) prefix_ = "t" + std::to_string(++number) + "_";
    return prefix_;
  }
  store::StateStore& state(store::Store& store) {
    auto made = store.state(prefix());
    EXPECT_TRUE(made.ok()) << made.status().message;
    return *made.value();
  }
  store::StateStore& state() {
    if (!state_) state_ = &state(open(shared_server().url()));
    return *state_;
  }

  std::int64_t next_id() { return ++last_id_ + 0x7000000000000000; }

  WaitedOp& make(StateVerb verb, std::string key) {
    WaitedOp& op = ops_.emplace_back();
    op.verb = verb;
    op.space = space_;
    op.kind = "k";
    op.key = std::move(key);
    op.id = next_id();
    op.deadline = clock_.now() + 20 * kSecond;
    return op;
  }
  StateReply& run(store::StateStore& on, WaitedOp& op) {
    on.submit(&op);
    EXPECT_TRUE(wait_until([&] { return op.ended > 0; }));
    EXPECT_EQ(op.ended, 1);
    EXPECT_TRUE(op.reply.status.ok()) << op.reply.status.message;
    return op.reply;
  }
  StateReply& run(WaitedOp& op) { return run(state(), op); }

  StateReply& get(std::string key) { return run(make(StateVerb::get, std::move(key))); }
  StateReply& write(StateVerb verb, std::string key, Value value, std::int64_t ttl = store::kNoTtl,
                    std::int64_t expected = 0) {
    WaitedOp& op = make(verb, std::move(key));
    op.value = std::move(value);
    op.ttl = ttl;
    op.expected = expected;
    return run(op);
  }
  StateReply& create(std::string key, std::int64_t ttl = store::kNoTtl) {
    return write(StateVerb::create, std::move(key), text_value("1"), ttl);
  }
  StateReply& add(std::string key, std::int64_t delta, std::int64_t ttl = store::kNoTtl, bool renew = false) {
    WaitedOp& op = make(StateVerb::add, std::move(key));
    op.delta = delta;
    op.ttl = ttl;
    op.renew = renew;
    return run(op);
  }
  StateReply& remove(std::string key, std::int64_t expected = store::kAnyVersion) {
    WaitedOp& op = make(StateVerb::remove, std::move(key));
    op.expected = expected;
    return run(op);
  }
  StateReply& touch(std::string key, std::int64_t ttl, std::int64_t expected = store::kAnyVersion) {
    WaitedOp& op = make(StateVerb::touch, std::move(key));
    op.expected = expected;
    op.ttl = ttl;
    return run(op);
  }

  template <class T, class Ask>
  Result<T> wait_for(Ask ask) {
    std::optional<Result<T>> out;
    ask([&](Result<T> result) { out = std::move(result); });
    EXPECT_TRUE(wait_until([&] { return out.has_value(); }));
    return out ? std::move(*out) : Result<T>(Status::make(Code::internal, "no answer"));
  }
  std::int64_t purge(store::StateStore& on, std::size_t limit = 10'000) {
    auto out = wait_for<std::int64_t>([&](auto done) { on.purge(limit, done); });
    EXPECT_TRUE(out.ok()) << out.status().message;
    return out.ok() ? out.value() : -1;
  }

  // The server's own connection, to look behind the store's back.
  Result<Reply> say(std::initializer_list<std::string_view> words) {
    if (!control_) control_ = connection(options(shared_server().port()));
    return send(*control_, words);
  }
  std::string row_name(const std::string& key) {
    return formatted("{}state:{{{}}}:default:default:k:{}", prefix(),
                     store::bucket_of(*space_, "k", key) % 64, key);
  }
  std::int64_t server_ms() {
    const Result<Reply> time = say({"TIME"});
    return std::stoll(time.value().items[0].text) * 1'000 + std::stoll(time.value().items[1].text) / 1'000;
  }
  // Until this many ms have passed on the server.
  void let_pass(std::int64_t ms) {
    const std::int64_t until = server_ms() + ms + 1;
    EXPECT_TRUE(wait_until([&] { return server_ms() > until; }));
  }

  SpaceRef space_ = std::make_shared<const Space>();
  std::deque<WaitedOp> ops_;
  std::vector<std::unique_ptr<store::Store>> stores_;
  store::StateStore* state_ = nullptr;
  std::string prefix_;
  std::shared_ptr<Connection> control_;
  std::int64_t last_id_ = 0;
};

}  // namespace ratesync::testing
