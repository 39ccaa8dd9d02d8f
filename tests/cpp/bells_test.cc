// Bells against a store that answers when the test says so: who waits looks after it got a place, when it
// rings, and now and then; a place that nobody needs any more is left.
#include "ratesync/engine/bells.h"

#include <gtest/gtest.h>

#include "slow_locks.h"

namespace ratesync::engine {
namespace {

struct BellRig : LockRig {
  BellWait* wait(std::int64_t seen = 0, Nanos timeout = kForever) {
    auto* task = new BellWait(service.bells(), space, "k");
    task->seen = seen;
    task->until = saturating_add(clock.now(), timeout);
    task->target = arrivals;
    task->start();
    return task;
  }
  // Has a place, and looked since: waits for what comes.
  BellWait* waiting(Nanos timeout = kForever) {
    BellWait* first = wait();
    locks.taken();
    EXPECT_TRUE(done(first));
    BellWait* second = wait(first->seen, timeout);
    EXPECT_FALSE(done(second));
    return second;
  }
};

TEST(Bells, WhoeverGotAPlaceLooksOnceMoreAndThenWaitsUntilItRings) {
  BellRig rig;
  BellWait* first = rig.wait();
  EXPECT_EQ(rig.locks.pending(), "stand k");
  EXPECT_FALSE(rig.done(first));
  rig.locks.taken();
  ASSERT_TRUE(rig.done(first) && first->status.ok());
  EXPECT_GT(first->seen, 0);
  BellWait* second = rig.wait(first->seen);
  EXPECT_FALSE(rig.done(second));
  EXPECT_EQ(rig.locks.pending(), "");
  rig.locks.freed("k");
  ASSERT_TRUE(rig.done(second));
  // The place went with the ring: whoever goes on waiting gets another one, and looks after that.
  BellWait* third = rig.wait(second->seen);
  EXPECT_EQ(rig.locks.pending(), "stand k");
  rig.locks.taken();
  EXPECT_TRUE(rig.done(third));
  EXPECT_EQ(rig.locks.questions, 2);
}

TEST(Bells, OnePlaceIsForAllWhoWaitHere) {
  BellRig rig;
  BellWait* first = rig.waiting();
  BellWait* late = rig.wait();  // looked before it knew of the place
  EXPECT_TRUE(rig.done(late));
  late = rig.wait(late->seen);
  EXPECT_EQ(rig.locks.questions, 1);
  rig.locks.freed("k");
  EXPECT_TRUE(rig.done(first) && rig.done(late));
}

TEST(Bells, ARingHereWakesHereAndGoesToTheStore) {
  BellRig rig;
  BellWait* task = rig.waiting();
  EXPECT_TRUE(rig.service.bells().awaited());
  rig.service.bells().ring(rig.space, "k");
  EXPECT_TRUE(rig.done(task));
  EXPECT_EQ(rig.locks.pending(), "ring k");
  rig.service.bells().ring(rig.space, "other");
  EXPECT_EQ(rig.locks.pending(), "ring k, ring other");
}

TEST(Bells, ARingBetweenLookAndWaitIsNotMissed) {
  BellRig rig;
  BellWait* task = rig.waiting();
  rig.run(2 * kSecond);  // now and then everybody looks
  ASSERT_TRUE(rig.done(task));
  rig.locks.freed("k");  // while it looks
  BellWait* next = rig.wait(task->seen);
  EXPECT_EQ(rig.locks.pending(), "stand k, stand k");
  rig.locks.taken();  // asked before it rang: that place may be gone
  EXPECT_FALSE(rig.done(next));
  rig.locks.taken();
  EXPECT_TRUE(rig.done(next));
}

TEST(Bells, ARingWhileThePlaceIsAskedForIsNotMissed) {
  BellRig rig;
  BellWait* task = rig.wait();
  rig.locks.freed("k");
  ASSERT_TRUE(rig.done(task));
  BellWait* next = rig.wait(task->seen);
  rig.locks.taken();
  EXPECT_FALSE(rig.done(next));
  rig.locks.taken();
  EXPECT_TRUE(rig.done(next));
}

TEST(Bells, LooksNowAndThenAndStaysRemembered) {
  BellRig rig;
  BellWait* task = rig.waiting();
  for (int i = 0; i < 5; ++i) {
    const int before = rig.locks.questions;
    rig.pass(1600 * kMilli);
    ASSERT_TRUE(rig.done(task));
    EXPECT_EQ(rig.locks.pending(), "stand k");
    EXPECT_EQ(rig.locks.questions, before + 1);
    rig.locks.taken();
    task = rig.wait(task->seen);
    EXPECT_FALSE(rig.done(task)) << "the same place";
  }
}

TEST(Bells, WhereTheStoreCannotPushTheyLookMoreOftenAndLessAndLess) {
  BellRig rig;
  rig.locks.tells = false;
  BellWait* task = rig.wait();
  rig.locks.taken();
  int looks = 0;
  for (Nanos gone = 0; gone < 5 * kSecond; gone += 10 * kMilli) {
    if (rig.done(task)) {
      ++looks;
      task = rig.wait(task->seen);
    }
    rig.run(10 * kMilli);
  }
  EXPECT_GE(looks, 8);
  EXPECT_LE(looks, 25);
  EXPECT_EQ(rig.locks.questions, 1);
  // From when it can, a place is worth having.
  rig.locks.tells = true;
  rig.pass(kSecond);
  ASSERT_TRUE(rig.done(task));
  EXPECT_EQ(rig.locks.pending(), "stand k");
}

TEST(Bells, AStoreThatRefusesAPlaceIsLookedAtAndAskedNowAndThen) {
  BellRig rig;
  BellWait* task = rig.wait();
  int looks = 0;
  for (Nanos gone = 0; gone < 5 * kSecond; gone += 10 * kMilli) {
    while (!rig.locks.asked.empty()) rig.locks.fail(Code::server);
    if (rig.done(task)) {
      ++looks;
      EXPECT_TRUE(task->status.ok());
      task = rig.wait(task->seen);
    }
    rig.run(10 * kMilli);
  }
  EXPECT_GE(looks, 8);
  EXPECT_GE(rig.locks.questions, 3);
  EXPECT_LE(rig.locks.questions, 6);
}

TEST(Bells, AStoreThatRefusesARingIsLeftAloneForAWhile) {
  BellRig rig;
  BellWait* task = rig.waiting();
  rig.service.bells().ring(rig.space, "other");
  rig.locks.fail(Code::server);
  rig.service.bells().ring(rig.space, "k");
  EXPECT_TRUE(rig.done(task)) << "who waits here needs no store";
  EXPECT_EQ(rig.locks.pending(), "");
  rig.pass(1100 * kMilli);
  rig.service.bells().ring(rig.space, "other");
  EXPECT_EQ(rig.locks.pending(), "ring other");
}

TEST(Bells, APlaceIsLeftOnceNobodyComesBack) {
  BellRig rig;
  BellWait* task = rig.waiting(100 * kMilli);
  rig.run(100 * kMilli);
  ASSERT_TRUE(rig.done(task) && task->status.ok());
  EXPECT_TRUE(rig.locks.stopped.empty()) << "it may come back";
  rig.pass(4 * kSecond);
  EXPECT_EQ(rig.locks.stopped, std::vector<std::string>{"k"});
  EXPECT_FALSE(rig.service.bells().awaited());
  EXPECT_EQ(rig.timers.size(), 0U);
}

TEST(Bells, ACancelledCallLeavesTheOthersWaiting) {
  BellRig rig;
  BellWait* one = rig.waiting();
  BellWait* two = rig.wait(one->seen);
  one->cancel();
  EXPECT_TRUE(rig.done(one));
  EXPECT_EQ(one->status.code, Code::cancelled);
  EXPECT_FALSE(rig.done(two));
  rig.locks.freed("k");
  EXPECT_TRUE(rig.done(two));
  one->cancel();  // finished: nothing
}

TEST(Bells, APlaceThatCameTooLateIsLeft) {
  BellRig rig;
  BellWait* task = rig.wait();
  task->cancel();
  rig.pass(4 * kSecond);
  EXPECT_FALSE(rig.service.bells().awaited());
  rig.locks.taken();
  EXPECT_EQ(rig.locks.stopped, std::vector<std::string>{"k"});
}

TEST(Bells, ClosingAnswersEverybodyAndWaitsForRings) {
  BellRig rig;
  BellWait* task = rig.waiting();
  rig.service.bells().ring(rig.space, "other");
  bool closed = false;
  rig.service.shutdown([&] { closed = true; });
  EXPECT_EQ(task->status.code, Code::closed);
  EXPECT_TRUE(rig.done(task));
  EXPECT_FALSE(closed);
  rig.locks.done();
  EXPECT_TRUE(closed);
  EXPECT_EQ(rig.wait()->status.code, Code::closed);
}

TEST(Bells, InOneProcessNoStoreIsAsked) {
  BellRig rig;
  Bells bells(rig.locks, rig.timers, false, 1, [] {});
  const auto wait = [&](std::int64_t seen) {
    auto* task = new BellWait(bells, rig.space, "k");
    task->seen = seen;
    task->target = rig.arrivals;
    task->start();
    return task;
  };
  EXPECT_FALSE(bells.awaited());
  BellWait* first = wait(0);
  EXPECT_TRUE(bells.awaited());
  ASSERT_TRUE(rig.done(first)) << "it may have rung before";
  BellWait* second = wait(first->seen);
  EXPECT_FALSE(rig.done(second));
  bells.ring(rig.space, "other");
  EXPECT_FALSE(rig.done(second));
  bells.ring(rig.space, "k");
  EXPECT_TRUE(rig.done(second));
  EXPECT_EQ(rig.locks.questions, 0);
  bells.shutdown();
}

TEST(Bells, NamesAreNoLongerThanALockMayBeAndEndWithACharacter) {
  EXPECT_EQ(Bells::name_of("idempotency", "k"), "\x01idempotency\x01k");
  EXPECT_NE(Bells::name_of("a", "b"), Bells::name_of("ab", ""));
  std::string key = "x";
  for (int i = 0; i < 341; ++i) key += "\xE2\x98\x83";
  const std::string name = Bells::name_of("kind", key);
  EXPECT_LE(name.size(), 1'024U);
  EXPECT_GE(name.size(), 1'020U);
  EXPECT_EQ(name.substr(name.size() - 3), "\xE2\x98\x83");
}

}  // namespace
}  // namespace ratesync::engine
