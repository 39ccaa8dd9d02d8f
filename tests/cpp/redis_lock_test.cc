// Locks in a real Redis: who holds one, until when, and who is next.
#include <algorithm>

#include "redis_state_rig.h"

namespace ratesync::testing {
namespace {

class LockTest : public RedisStateTest {
 protected:
  store::LockStore& locks(store::Store& store) {
    auto made = store.locks(prefix());
    EXPECT_TRUE(made.ok()) << made.status().message;
    return *made.value();
  }
  // Each is a process of its own to the server.
  store::LockStore& process(std::size_t number) {
    while (processes_.size() <= number) processes_.push_back(&locks(open(shared_server().url())));
    return *processes_[number];
  }
  WaitedLock& lock_op(LockOp::Verb verb, std::string name) {
    WaitedLock& op = locks_.emplace_back();
    op.verb = verb;
    op.space = space_;
    op.name = std::move(name);
    op.id = next_id();
    op.ttl = 60'000;
    op.deadline = clock_.now() + 20 * kSecond;
    return op;
  }
  LockReply& run(store::LockStore& on, WaitedLock& op) {
    op.ended = 0;
    on.submit(&op);
    EXPECT_TRUE(wait_until([&] { return op.ended > 0; }));
    EXPECT_EQ(op.ended, 1);
    EXPECT_TRUE(op.reply.status.ok()) << op.reply.status.message;
    return op.reply;
  }
  LockReply& acquire(std::size_t who, std::string name, std::int64_t ttl = 60'000, bool queued = false) {
    WaitedLock& op = lock_op(LockOp::Verb::acquire, std::move(name));
    op.ttl = ttl;
    op.queued = queued;
    return run(process(who), op);
  }
  LockReply& with_token(LockOp::Verb verb, std::size_t who, std::string name, std::int64_t token,
                        std::int64_t ttl = 60'000) {
    WaitedLock& op = lock_op(verb, std::move(name));
    op.token = token;
    op.ttl = ttl;
    return run(process(who), op);
  }
  LockOutcome release(std::size_t who, std::string name, std::int64_t token) {
    return with_token(LockOp::Verb::release, who, std::move(name), token).outcome;
  }
  std::vector<store::LockInfo> list(std::size_t limit = 100, SpaceRef space = nullptr) {
    auto out =
        wait_for<std::vector<store::LockInfo>>([&](auto done) { process(0).list(space, limit, done); });
    EXPECT_TRUE(out.ok()) << out.status().message;
    return out.ok() ? std::move(out.value()) : std::vector<store::LockInfo>();
  }

  std::deque<WaitedLock> locks_;
  std::vector<store::LockStore*> processes_;
};

TEST_F(LockTest, OneHoldsIt) {
  const LockReply& mine = acquire(0, "a");
  EXPECT_EQ(mine.outcome, LockOutcome::held);
  EXPECT_GT(mine.token, 0);
  EXPECT_EQ(mine.remaining, 60'000);
  const LockReply& other = acquire(1, "a");
  EXPECT_EQ(other.outcome, LockOutcome::taken);
  EXPECT_EQ(other.token, mine.token);
  EXPECT_GT(other.remaining, 0);
  EXPECT_LE(other.remaining, 60'000);
  EXPECT_NE(other.holder, "");
  EXPECT_EQ(release(1, "a", mine.token + 1), LockOutcome::lost);
  EXPECT_EQ(release(0, "a", mine.token), LockOutcome::held);
  EXPECT_EQ(release(0, "a", mine.token), LockOutcome::lost);
  const LockReply& next = acquire(1, "a");
  EXPECT_EQ(next.outcome, LockOutcome::held);
  EXPECT_GT(next.token, mine.token);
  EXPECT_EQ(with_token(LockOp::Verb::renew, 0, "a", mine.token).outcome, LockOutcome::lost);
}

TEST_F(LockTest, TheSameAcquisitionSentAgain) {
  WaitedLock& op = lock_op(LockOp::Verb::acquire, "a");
  const std::int64_t token = run(process(0), op).token;
  EXPECT_EQ(run(process(1), op).token, token);
  EXPECT_EQ(op.reply.outcome, LockOutcome::held);
  EXPECT_EQ(acquire(0, "a").outcome, LockOutcome::taken) << "another one of the same process";
}

TEST_F(LockTest, LeasesEnd) {
  const std::int64_t first = acquire(0, "a", 1).token;
  let_pass(3);
  EXPECT_EQ(with_token(LockOp::Verb::renew, 0, "a", first, 1).outcome, LockOutcome::held)
      << "taken by nobody";
  let_pass(3);
  EXPECT_EQ(list()[0].token, first);
  EXPECT_LE(list()[0].expires_in, 0);
  const LockReply& second = acquire(1, "a");
  EXPECT_EQ(second.outcome, LockOutcome::held);
  EXPECT_GT(second.token, first);
  EXPECT_EQ(with_token(LockOp::Verb::renew, 0, "a", first).outcome, LockOutcome::lost);
  EXPECT_EQ(release(0, "a", first), LockOutcome::lost);
  EXPECT_EQ(with_token(LockOp::Verb::renew, 1, "a", second.token, 120'000).remaining, 120'000);
  acquire(0, "b", 1);
  let_pass(3);
  EXPECT_EQ(release(0, "b", list()[1].token), LockOutcome::lost) << "its lease was over";
  EXPECT_EQ(list().size(), 1u);
}

TEST_F(LockTest, BrokenByHand) {
  const std::int64_t token = acquire(0, "a").token;
  EXPECT_EQ(with_token(LockOp::Verb::break_, 1, "a", token + 1).outcome, LockOutcome::lost);
  EXPECT_EQ(with_token(LockOp::Verb::break_, 1, "a", 0).outcome, LockOutcome::held);
  EXPECT_EQ(with_token(LockOp::Verb::break_, 1, "a", 0).outcome, LockOutcome::lost);
  EXPECT_EQ(release(0, "a", token), LockOutcome::lost);
  EXPECT_EQ(release(0, "a", 0), LockOutcome::lost) << "only break_ knows 0";
}

TEST_F(LockTest, WaitersAreWokenInOrder) {
  std::vector<std::vector<std::string>> heard(4);
  for (std::size_t i = 0; i < heard.size(); ++i)
    process(i).on_freed([&, i](const Space& space, const std::string& name) {
      EXPECT_EQ(space.name_space, "default");
      heard[i].push_back(name);
    });
  std::int64_t token = acquire(0, "a:%*").token;
  for (const std::size_t i : {2, 1, 3}) {
    EXPECT_EQ(acquire(i, "a:%*", 60'000, true).outcome, LockOutcome::taken);
    ASSERT_TRUE(wait_until([&] { return process(i).pushes(); }));
    EXPECT_EQ(acquire(i, "a:%*", 60'000, true).outcome, LockOutcome::taken) << "now it says that it hears";
  }
  EXPECT_EQ(list()[0].waiters, 3);
  for (const std::size_t i : {2, 1, 3}) {
    EXPECT_EQ(release(0, "a:%*", token), LockOutcome::held);
    ASSERT_TRUE(wait_until([&] { return !heard[i].empty(); }));
    for (const auto& each : heard) EXPECT_LE(each.size(), 1u);
    EXPECT_EQ(heard[i], std::vector<std::string>{"a:%*"});
    heard[i].clear();
    const LockReply& early = acquire(0, "a:%*");
    EXPECT_EQ(early.outcome, LockOutcome::taken) << "it is kept for the first in line";
    token = acquire(i, "a:%*", 60'000, true).token;
    EXPECT_EQ(locks_.back().reply.outcome, LockOutcome::held);
    process(i).stop_waiting(space_, "a:%*");
  }
  EXPECT_EQ(release(0, "a:%*", token), LockOutcome::held);
  EXPECT_EQ(acquire(0, "a:%*").outcome, LockOutcome::held) << "nobody waits any more";
}

TEST_F(LockTest, WhoGivesUpWakesTheNext) {
  std::vector<int> heard(3);
  for (std::size_t i = 0; i < heard.size(); ++i)
    process(i).on_freed([&, i](const Space&, const std::string&) { ++heard[i]; });
  const std::int64_t token = acquire(0, "a").token;
  for (const std::size_t i : {1, 2}) {
    acquire(i, "a", 60'000, true);
    ASSERT_TRUE(wait_until([&] { return process(i).pushes(); }));
    acquire(i, "a", 60'000, true);
  }
  release(0, "a", token);
  ASSERT_TRUE(wait_until([&] { return heard[1] == 1; }));
  process(1).stop_waiting(space_, "a");
  ASSERT_TRUE(wait_until([&] { return heard[2] == 1; }));
  EXPECT_EQ(acquire(2, "a").outcome, LockOutcome::held);
}

TEST_F(LockTest, OneWhoDoesNotComeHoldsUpNobody) {
  const std::int64_t token = acquire(0, "a").token;
  acquire(1, "a", 60'000, true);
  release(0, "a", token);
  ASSERT_TRUE(wait_until([&] { return acquire(0, "a").outcome == LockOutcome::held; }));
}

TEST_F(LockTest, ABellTellsAllWhoWaitThereOnce) {
  std::vector<std::vector<std::string>> heard(4);
  const auto ask = [&](LockOp::Verb verb, std::size_t who, const std::string& bell) {
    WaitedLock& op = lock_op(verb, bell);
    op.queued = verb == LockOp::Verb::stand;
    return run(process(who), op).outcome;
  };
  const std::string name = "\x01kind\x01a:%*{x}";
  for (std::size_t i = 0; i < heard.size(); ++i)
    process(i).on_freed([&, i](const Space&, const std::string& bell) { heard[i].push_back(bell); });
  for (const std::size_t i : {0, 1, 2, 3}) {
    const std::string bell = i == 3 ? "other" : name;
    EXPECT_EQ(ask(LockOp::Verb::stand, i, bell), LockOutcome::taken);
    ASSERT_TRUE(wait_until([&] { return process(i).pushes(); }));
    EXPECT_EQ(ask(LockOp::Verb::stand, i, bell), LockOutcome::taken);
  }
  EXPECT_EQ(ask(LockOp::Verb::ring, 0, name), LockOutcome::held);
  for (const std::size_t i : {1, 2}) {
    ASSERT_TRUE(wait_until([&] { return !heard[i].empty(); }));
    EXPECT_EQ(heard[i], std::vector<std::string>{name});
  }
  ask(LockOp::Verb::ring, 0, name);
  ask(LockOp::Verb::ring, 0, "other");
  ASSERT_TRUE(wait_until([&] { return !heard[3].empty(); }));
  EXPECT_EQ(heard[0].size(), 0u) << "it rang itself";
  EXPECT_EQ(heard[1].size() + heard[2].size(), 2u);
  EXPECT_TRUE(list().empty());
}

TEST_F(LockTest, ListsThemByName) {
  for (const char* name : {"b", "a", "c:{x}"}) acquire(0, name);
  WaitedLock& other = lock_op(LockOp::Verb::acquire, "z");
  other.space = std::make_shared<const Space>(Space{"a:b", "*"});
  run(process(0), other);
  std::vector<std::string> names;
  for (const store::LockInfo& info : list())
    names.push_back(info.name_space + "/" + info.tenant + "/" + info.name);
  EXPECT_EQ(names, (std::vector<std::string>{"a:b/*/z", "default/default/a", "default/default/b",
                                             "default/default/c:{x}"}));
  EXPECT_EQ(list(2).size(), 2u);
  EXPECT_EQ(list(10, other.space).size(), 1u);
  EXPECT_GE(list()[0].held_for, 0);
  EXPECT_NE(list()[0].holder, "");
}

}  // namespace
}  // namespace ratesync::testing
