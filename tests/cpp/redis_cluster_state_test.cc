// State and locks on a real Redis Cluster: every shard in a slot of its own.
#include "ratesync/base/format.h"
#include "redis_cluster_fixture.h"

namespace ratesync::testing {
namespace {

class ClusterStateTest : public RedisClusterTest {
 protected:
  using RedisStateTest::run;

  ClusterStateTest() { prefix_ = "c_"; }

  static std::string url() { return "redis+cluster://127.0.0.1:" + port(1); }
  store::StateStore& here() {
    if (!here_) here_ = &state(open(url()));
    return *here_;
  }
  WaitedOp& start(StateVerb verb, std::string key, std::int64_t delta = 1) {
    WaitedOp& op = make(verb, std::move(key));
    op.delta = delta;
    here().submit(&op);
    return op;
  }
  StateReply& end(WaitedOp& op) {
    EXPECT_TRUE(wait_until([&] { return op.ended > 0; }));
    EXPECT_EQ(op.ended, 1);
    return op.reply;
  }
  StateReply& good(WaitedOp& op) {
    EXPECT_TRUE(end(op).status.ok()) << op.key << ": " << op.reply.status.message;
    return op.reply;
  }
  static int slot_of_shard(std::uint32_t shard) { return hash_slot(std::to_string(shard)); }
  std::uint32_t shard_of(const std::string& key) { return store::bucket_of(*space_, "k", key) % 64; }
  // A key whose shard lies on this node.
  std::string key_on(int node, int number = 0) {
    for (int i = 0;; ++i) {
      std::string key = formatted("k{}", i);
      if (slot_of_shard(shard_of(key)) / 5462 == node && number-- == 0) return key;
    }
  }

  store::StateStore* here_ = nullptr;
};

TEST_F(ClusterStateTest, EveryOperationOnEveryNode) {
  std::vector<WaitedOp*> all;
  for (int i = 0; i < 300; ++i) all.push_back(&start(StateVerb::create, formatted("c{}", i)));
  for (int i = 0; i < 300; ++i) all.push_back(&start(StateVerb::add, formatted("n{}", i % 50)));
  for (WaitedOp* op : all) good(*op);
  EXPECT_EQ(good(start(StateVerb::get, "n7")).value, number_value(6));
  EXPECT_EQ(good(start(StateVerb::get, "c299")).version, 1);
  for (int node = 0; node < 3; ++node) EXPECT_GT(say(node, {"DBSIZE"}).value().integer, 50);

  std::set<std::string> found;
  std::string cursor;
  do {
    const auto page =
        wait_for<store::StatePage>([&](auto done) { here().scan(space_, "k", "c", cursor, 70, done); });
    ASSERT_TRUE(page.ok()) << page.status().message;
    for (const store::StateRow& row : page.value().rows) EXPECT_TRUE(found.insert(row.key).second);
    cursor = page.value().cursor;
  } while (!cursor.empty());
  EXPECT_EQ(found.size(), 300u);

  for (int i = 0; i < 100; ++i) {
    WaitedOp& op = make(StateVerb::remove, formatted("c{}", i));
    op.expected = store::kAnyVersion;
    EXPECT_EQ(run(here(), op).outcome, Outcome::done);
  }
  EXPECT_EQ(purge(here(), 30), 30);
  EXPECT_EQ(purge(here()), 70);
  EXPECT_EQ(good(start(StateVerb::create, "c5")).version, 2);
}

TEST_F(ClusterStateTest, TheOldestTimeoutsOfAllShards) {
  for (int i = 0; i < 60; ++i) {
    WaitedOp& op = make(StateVerb::schedule, formatted("t{:02}", i));
    op.due = -10'000 + i * 10;
    op.due_in = true;
    run(here(), op);
  }
  std::vector<std::string> keys, expected;
  for (int round = 0; round < 3; ++round) {
    auto got = wait_for<std::vector<store::DueKey>>(
        [&](auto done) { here().claim_due(space_, "", 20, 60'000, done); });
    ASSERT_TRUE(got.ok()) << got.status().message;
    for (const store::DueKey& key : got.value()) keys.push_back(key.key);
  }
  for (int i = 0; i < 60; ++i) expected.push_back(formatted("t{:02}", i));
  EXPECT_EQ(keys, expected);
}

TEST_F(ClusterStateTest, ABatchWantsOneSlot) {
  WaitedBatch apart;
  for (int node = 0; node < 3; ++node) apart.ops.push_back(&make(StateVerb::create, key_on(node)));
  here().submit(&apart);
  ASSERT_TRUE(wait_until([&] { return apart.ended > 0; }));
  EXPECT_EQ(apart.status.code, Code::invalid);
  EXPECT_NE(apart.status.message.find("hash_tag"), std::string::npos) << apart.status.message;
  EXPECT_EQ(good(start(StateVerb::get, key_on(0))).outcome, Outcome::absent);

  RedisOptions with;
  with.hash_tag = "all";
  store::StateStore& together = state(open(url(), with));
  WaitedBatch batch;
  for (int i = 0; i < 40; ++i) batch.ops.push_back(&make(StateVerb::create, formatted("k{}", i)));
  together.submit(&batch);
  ASSERT_TRUE(wait_until([&] { return batch.ended > 0; }));
  EXPECT_TRUE(batch.applied) << batch.status.message;
  EXPECT_EQ(run(together, make(StateVerb::get, "k39")).version, 1);
}

TEST_F(ClusterStateTest, ANodeThatHangsHoldsUpNobodyElse) {
  const std::string slow = key_on(2), quick = key_on(1), other = key_on(0);
  for (const std::string& key : {slow, quick, other}) good(start(StateVerb::add, key));
  cluster().servers[2]->freeze();
  WaitedOp& waits = start(StateVerb::add, slow);
  for (int i = 0; i < 20; ++i) {
    good(start(StateVerb::add, quick));
    good(start(StateVerb::add, other));
  }
  EXPECT_EQ(waits.ended, 0);
  cluster().servers[2]->thaw();
  EXPECT_EQ(good(waits).value, number_value(2));
  wait_until_healthy();
}

TEST_F(ClusterStateTest, AShardThatMovesLosesNothing) {
  const std::string key = key_on(0), stays = key_on(1);
  const std::uint32_t shard = shard_of(key);
  const int slot = slot_of_shard(shard);
  std::vector<WaitedOp*> all;
  const auto some = [&] {
    for (int i = 0; i < 20; ++i) {
      all.push_back(&start(StateVerb::add, key));
      all.push_back(&start(StateVerb::add, stays));
    }
  };
  some();
  for (WaitedOp* op : all) good(*op);
  migrate(slot, 0, 2);
  some();
  for (;;) {
    const Result<Reply> keys = say(0, {"CLUSTER", "GETKEYSINSLOT", std::to_string(slot), "10"});
    if (!keys.ok() || keys.value().items.empty()) break;
    for (const Reply& one : keys.value().items)
      say(0, {"MIGRATE", "127.0.0.1", port(2), "", "0", "5000", "KEYS", one.text});
  }
  own(slot, 2);
  EXPECT_GT(say(2, {"CLUSTER", "COUNTKEYSINSLOT", std::to_string(slot)}).value().integer, 0);
  some();
  std::int64_t sum = 0;
  for (WaitedOp* op : all) {
    if (end(*op).status.ok()) sum += op->key == key;
    EXPECT_NE(op->reply.status.code, Code::in_doubt) << op->reply.status.message;
  }
  EXPECT_EQ(good(start(StateVerb::get, key)).value, number_value(sum));
  EXPECT_GE(sum, 40);
  migrate(slot, 2, 0);
  for (;;) {
    const Result<Reply> keys = say(2, {"CLUSTER", "GETKEYSINSLOT", std::to_string(slot), "10"});
    if (!keys.ok() || keys.value().items.empty()) break;
    for (const Reply& one : keys.value().items)
      say(2, {"MIGRATE", "127.0.0.1", port(0), "", "0", "5000", "KEYS", one.text});
  }
  own(slot, 0);
}

TEST_F(ClusterStateTest, LocksAndThoseWhoWait) {
  auto first = open(url()).locks(prefix()), second = open(url()).locks(prefix());
  ASSERT_TRUE(first.ok() && second.ok());
  std::deque<WaitedLock> all;
  const auto lock = [&](store::LockStore& on, LockOp::Verb verb, std::string name, std::int64_t token,
                        bool queued) -> LockReply& {
    WaitedLock& op = all.emplace_back();
    op.verb = verb;
    op.space = space_;
    op.name = std::move(name);
    op.token = token;
    op.queued = queued;
    op.ttl = 60'000;
    op.id = next_id();
    op.deadline = clock_.now() + 20 * kSecond;
    on.submit(&op);
    EXPECT_TRUE(wait_until([&] { return op.ended > 0; }));
    EXPECT_TRUE(op.reply.status.ok()) << op.reply.status.message;
    return op.reply;
  };
  for (int i = 0; i < 12; ++i) {
    const std::string name = formatted("l{}", i);
    int heard = 0;
    second.value()->on_freed([&](const Space&, const std::string& freed) { heard += freed == name; });
    const std::int64_t token = lock(*first.value(), LockOp::Verb::acquire, name, 0, false).token;
    EXPECT_EQ(lock(*second.value(), LockOp::Verb::acquire, name, 0, true).outcome, LockOutcome::taken);
    ASSERT_TRUE(wait_until([&] { return second.value()->pushes(); }));
    EXPECT_EQ(lock(*second.value(), LockOp::Verb::acquire, name, 0, true).outcome, LockOutcome::taken);
    EXPECT_EQ(lock(*first.value(), LockOp::Verb::release, name, token, false).outcome, LockOutcome::held);
    ASSERT_TRUE(wait_until([&] { return heard > 0; })) << name;
    const LockReply& next = lock(*second.value(), LockOp::Verb::acquire, name, 0, true);
    EXPECT_EQ(next.outcome, LockOutcome::held);
    EXPECT_GT(next.token, token);
  }
  auto listed =
      wait_for<std::vector<store::LockInfo>>([&](auto done) { first.value()->list(nullptr, 100, done); });
  ASSERT_TRUE(listed.ok()) << listed.status().message;
  EXPECT_EQ(listed.value().size(), 12u);
}

// The last one: it changes who is whose replica.
TEST_F(ClusterStateTest, AFailoverByHandLosesNothing) {
  std::vector<std::string> keys;
  for (int i = 0; i < 8; ++i) keys.push_back(key_on(i % 2, i));
  std::vector<WaitedOp*> all;
  const auto some = [&] {
    for (const std::string& key : keys) all.push_back(&start(StateVerb::add, key));
  };
  for (int i = 0; i < 10; ++i) some();
  for (WaitedOp* op : all) good(*op);
  ASSERT_EQ(text(say(3, {"CLUSTER", "FAILOVER"})), "OK");
  const auto took_over = [&] {
    some();
    end(*all.back());
    return text(say(3, {"INFO", "replication"})).find("role:master") != std::string::npos;
  };
  ASSERT_TRUE(wait_until(took_over));
  for (int i = 0; i < 10; ++i) some();
  std::map<std::string, std::int64_t> sums;
  for (WaitedOp* op : all) {
    if (end(*op).status.ok()) ++sums[op->key];
    EXPECT_NE(op->reply.status.code, Code::in_doubt) << op->reply.status.message;
  }
  ASSERT_TRUE(wait_until([&] {
    WaitedOp& op = start(StateVerb::get, keys[0]);
    return end(op).status.ok();
  }));
  for (const std::string& key : keys)
    EXPECT_EQ(good(start(StateVerb::get, key)).value, number_value(sums[key])) << key;
}

}  // namespace
}  // namespace ratesync::testing
