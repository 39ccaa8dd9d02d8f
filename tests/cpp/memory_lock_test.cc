// Locks in memory by their promises: one holder, tokens that grow, a release that says the truth, waiters
// that are told, and nothing kept of locks that nobody holds.
#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "ratesync/memory/memory_locks.h"
#include "ratesync/memory/memory_store.h"

namespace ratesync::memory {
namespace {

using Verb = store::LockOp::Verb;
using Outcome = store::LockReply::Outcome;

struct LockCall final : store::LockOp {
  void done() override { ++answers; }
  int answers = 0;
};

struct LockRig {
  Clock clock{true};
  MemoryStore store{clock};
  store::LockStore& locks = *store.locks("t_").value();
  store::SpaceRef space = std::make_shared<const store::Space>();
  std::int64_t ids = 0;

  void pass(std::int64_t ms) { clock.advance(ms * kMilli); }
  store::LockReply run(Verb verb, const std::string& name, std::int64_t token, std::int64_t ttl,
                       std::int64_t id = 0, bool queued = false) {
    LockCall call;
    call.verb = verb;
    call.space = space;
    call.name = name;
    call.token = token;
    call.ttl = ttl;
    call.id = id;
    call.queued = queued;
    locks.submit(&call);
    EXPECT_EQ(call.answers, 1);
    EXPECT_TRUE(call.reply.status.ok());
    return call.reply;
  }
  store::LockReply acquire(const std::string& name, std::int64_t ttl = 1000, bool queued = false) {
    return run(Verb::acquire, name, 0, ttl, ++ids, queued);
  }
  store::LockReply renew(const std::string& name, std::int64_t token, std::int64_t ttl) {
    return run(Verb::renew, name, token, ttl);
  }
  Outcome release(const std::string& name, std::int64_t token) {
    return run(Verb::release, name, token, 0).outcome;
  }
  Outcome break_it(const std::string& name, std::int64_t token) {
    return run(Verb::break_, name, token, 0).outcome;
  }
  std::vector<store::LockInfo> list(std::size_t limit = 100, bool all = false) {
    std::vector<store::LockInfo> out;
    locks.list(all ? nullptr : space, limit, [&](auto rows) { out = std::move(rows.value()); });
    return out;
  }
  [[nodiscard]] std::size_t kept() { return static_cast<MemoryLocks&>(locks).kept(); }
};

TEST(MemoryLocks, OneHolderAtATimeAndTokensGrow) {
  LockRig rig;
  const auto first = rig.acquire("a");
  EXPECT_EQ(first.outcome, Outcome::held);
  EXPECT_GT(first.token, 0);
  EXPECT_EQ(first.remaining, 1000);
  rig.pass(400);
  const auto second = rig.acquire("a");
  EXPECT_EQ(second.outcome, Outcome::taken);
  EXPECT_EQ(second.token, first.token);
  EXPECT_EQ(second.remaining, 600);
  EXPECT_EQ(second.holder, "this process");
  EXPECT_EQ(rig.release("a", first.token), Outcome::held);
  const auto third = rig.acquire("a");
  EXPECT_EQ(third.outcome, Outcome::held);
  EXPECT_GT(third.token, first.token) << "although nothing was kept of the lock";
  EXPECT_EQ(rig.release("a", first.token), Outcome::lost);
  EXPECT_EQ(rig.acquire("a").outcome, Outcome::taken) << "a stale release frees nobody else's";
}

TEST(MemoryLocks, AnExpiredLeaseIsTakenOverInOneStep) {
  LockRig rig;
  const auto first = rig.acquire("a", 10);
  rig.clock.advance(10 * kMilli - 1);
  const auto refused = rig.acquire("a");
  EXPECT_EQ(refused.outcome, Outcome::taken);
  EXPECT_EQ(refused.remaining, 1) << "rounded up: who waits that long gets it";
  rig.clock.advance(1);
  const auto second = rig.acquire("a", 10);
  EXPECT_EQ(second.outcome, Outcome::held);
  EXPECT_GT(second.token, first.token);
  EXPECT_EQ(rig.renew("a", first.token, 1000).outcome, Outcome::lost);
  EXPECT_EQ(rig.release("a", first.token), Outcome::lost);
  EXPECT_EQ(rig.release("a", second.token), Outcome::held);
}

TEST(MemoryLocks, ALateRenewalHoldsWhereNobodyTookTheLock) {
  LockRig rig;
  const auto held = rig.acquire("a", 10);
  rig.pass(500);
  EXPECT_EQ(rig.renew("a", held.token, 1000).outcome, Outcome::held);
  EXPECT_EQ(rig.acquire("a").remaining, 1000);
  rig.pass(1000);
  EXPECT_EQ(rig.release("a", held.token), Outcome::lost) << "its time was over";
  EXPECT_EQ(rig.renew("a", held.token, 1000).outcome, Outcome::lost) << "released is released";
  EXPECT_EQ(rig.renew("a", 0, 1000).outcome, Outcome::lost);
}

TEST(MemoryLocks, AFreeLockIsNotRenewedByNobody) {
  LockRig rig;
  const auto held = rig.acquire("a");
  rig.acquire("a", 1000, true);
  rig.release("a", held.token);
  EXPECT_EQ(rig.kept(), 1u);
  EXPECT_EQ(rig.renew("a", 0, 1000).outcome, Outcome::lost);
  EXPECT_EQ(rig.release("a", 0), Outcome::lost);
  EXPECT_EQ(rig.acquire("a").outcome, Outcome::held);
}

TEST(MemoryLocks, TheSameAcquireSentAgainFindsItsOwnLock) {
  LockRig rig;
  const auto first = rig.run(Verb::acquire, "a", 0, 1000, 77);
  rig.pass(300);
  const auto again = rig.run(Verb::acquire, "a", 0, 1000, 77);
  EXPECT_EQ(again.outcome, Outcome::held);
  EXPECT_EQ(again.token, first.token);
  EXPECT_EQ(rig.acquire("a").remaining, 1000) << "its lease begins with the last request";
  rig.release("a", first.token);
  EXPECT_GT(rig.run(Verb::acquire, "a", 0, 1000, 77).token, first.token) << "what was released is not held";
}

TEST(MemoryLocks, BrokenByHandTheHolderIsTold) {
  LockRig rig;
  const auto held = rig.acquire("a");
  EXPECT_EQ(rig.break_it("a", held.token + 1), Outcome::lost);
  EXPECT_EQ(rig.break_it("a", held.token), Outcome::held);
  EXPECT_EQ(rig.renew("a", held.token, 1000).outcome, Outcome::lost);
  EXPECT_EQ(rig.break_it("a", 0), Outcome::lost) << "nothing there";
  rig.acquire("a");
  EXPECT_EQ(rig.break_it("a", 0), Outcome::held) << "whoever it is";
  EXPECT_EQ(rig.acquire("a").outcome, Outcome::held);
}

TEST(MemoryLocks, WhoStandsInLineIsToldOfEveryRelease) {
  LockRig rig;
  EXPECT_TRUE(rig.locks.pushes());
  std::vector<std::string> freed;
  rig.locks.on_freed([&](const store::Space& space, const std::string& name) {
    freed.push_back(space.tenant + "/" + name);
  });
  auto held = rig.acquire("a");
  EXPECT_EQ(rig.acquire("a").outcome, Outcome::taken);
  rig.release("a", held.token);
  EXPECT_TRUE(freed.empty()) << "nobody waits";
  held = rig.acquire("a");
  rig.acquire("a", 1000, true);
  rig.release("a", held.token);
  EXPECT_EQ(freed, std::vector<std::string>{"default/a"});
  held = rig.acquire("a");
  rig.break_it("a", 0);
  EXPECT_EQ(freed.size(), 2u) << "still in line";
  held = rig.acquire("a");
  rig.locks.stop_waiting(rig.space, "a");
  rig.release("a", held.token);
  EXPECT_EQ(freed.size(), 2u);
  rig.locks.stop_waiting(rig.space, "never heard of");
}

TEST(MemoryLocks, TheListenerMayUseTheLockAtOnce) {
  LockRig rig;
  store::LockReply next;
  rig.locks.on_freed([&](const store::Space&, const std::string& name) { next = rig.acquire(name); });
  const auto held = rig.acquire("a");
  rig.acquire("a", 1000, true);
  EXPECT_EQ(rig.release("a", held.token), Outcome::held);
  EXPECT_EQ(next.outcome, Outcome::held);
  EXPECT_GT(next.token, held.token);
}

TEST(MemoryLocks, ListedByName) {
  LockRig rig;
  const auto b = rig.acquire("b", 1000);
  rig.acquire("a", 10);
  rig.acquire("b", 1000, true);
  rig.pass(100);
  auto rows = rig.list();
  ASSERT_EQ(rows.size(), 2u);
  EXPECT_EQ(rows[0].name, "a");
  EXPECT_EQ(rows[0].expires_in, -90) << "expired, taken by nobody";
  EXPECT_EQ(rows[1].name, "b");
  EXPECT_EQ(rows[1].token, b.token);
  EXPECT_EQ(rows[1].held_for, 100);
  EXPECT_EQ(rows[1].expires_in, 900);
  EXPECT_EQ(rows[1].waiters, 1);
  EXPECT_EQ(rig.list(1).size(), 1u);
  rig.space = std::make_shared<const store::Space>(store::Space{"default", "other"});
  EXPECT_TRUE(rig.list().empty());
  EXPECT_EQ(rig.list(100, true).size(), 2u);
  EXPECT_EQ(rig.acquire("b").outcome, Outcome::held) << "tenants do not meet";
}

TEST(MemoryLocks, NamesDoNotRunTogether) {
  LockRig rig;
  rig.space = std::make_shared<const store::Space>(store::Space{"a:b", "c"});
  rig.acquire("x");
  rig.space = std::make_shared<const store::Space>(store::Space{"a", "b:c"});
  EXPECT_EQ(rig.acquire("x").outcome, Outcome::held);
}

TEST(MemoryLocks, NothingIsKeptOfLocksThatNobodyHolds) {
  LockRig rig;
  for (int i = 0; i < 1000; ++i) {
    const std::string name = "lock" + std::to_string(i);
    EXPECT_EQ(rig.release(name, rig.acquire(name).token), Outcome::held);
  }
  EXPECT_EQ(rig.kept(), 0u);
  const auto held = rig.acquire("a");
  rig.acquire("a", 1000, true);
  rig.release("a", held.token);
  EXPECT_EQ(rig.kept(), 1u) << "somebody waits";
  rig.locks.stop_waiting(rig.space, "a");
  EXPECT_EQ(rig.kept(), 0u);
  // Abandoned ones go when their time and the time to come back are over.
  for (int i = 0; i < 200'000; ++i) rig.acquire("left" + std::to_string(i), 10);
  rig.pass(61'000);
  for (int i = 0; i < 200'000; ++i) rig.acquire("more" + std::to_string(i), 10);
  EXPECT_LT(rig.kept(), 250'000u);
}

TEST(MemoryLocks, WhoStandsInLineIsNotForgottenWithAnExpiredLock) {
  LockRig rig;
  int freed = 0;
  rig.locks.on_freed([&](const store::Space&, const std::string&) { ++freed; });
  const auto held = rig.acquire("a", 10);
  rig.acquire("a", 10, true);
  rig.pass(3'600'000);
  for (int i = 0; i < 200'000; ++i) rig.acquire("more" + std::to_string(i), 10);
  EXPECT_EQ(rig.release("a", held.token), Outcome::lost);
  EXPECT_EQ(freed, 1);
}

TEST(MemoryLocks, AVeryLongLeaseDoesNotOverflow) {
  LockRig rig;
  const auto held = rig.acquire("a", std::numeric_limits<std::int64_t>::max());
  EXPECT_EQ(held.outcome, Outcome::held);
  rig.pass(1'000'000'000);
  EXPECT_EQ(rig.acquire("a").outcome, Outcome::taken);
  EXPECT_EQ(rig.renew("a", held.token, std::numeric_limits<std::int64_t>::max()).outcome, Outcome::held);
}

}  // namespace
}  // namespace ratesync::memory
