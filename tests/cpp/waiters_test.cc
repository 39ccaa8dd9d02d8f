// Waiters across processes, the engine's half: what the store is told and how often it is asked. Counted
// in questions, not in time.
#include "slow_store.h"

namespace ratesync::engine {
namespace {

using store::Verdict;

// 10,000 tasks wait for the two slots of a group.
struct Crowd : Slow {
  explicit Crowd(bool tells = true) {
    store.tells = tells;
    tasks.push_back(start());
    store.refuse(Verdict::concurrency_full);
    for (int i = 1; i < 10'000; ++i) tasks.push_back(start());
    asked = store.questions;
  }
  int asked_since() { return store.questions - std::exchange(asked, store.questions); }
  std::vector<AcquireTask*> tasks;
  int asked = 0;
};

TEST(Waiters, WhoCanWaitIsQueuedAndWhoCannotIsNot) {
  Slow rig;
  rig.start(kSecond);
  EXPECT_TRUE(rig.store.asked.back()->queued);
  rig.start(0);
  EXPECT_FALSE(rig.store.asked.back()->queued);
  Slow rate(params(1, 0));
  rate.start(kSecond);
  EXPECT_FALSE(rate.store.asked.back()->queued) << "nobody waits for slots of a mere rate";
}

TEST(Waiters, OnlyTheHeadAsksAndRarelyWhereTheStoreTells) {
  for (const bool tells : {true, false}) {
    Crowd rig(tells);
    EXPECT_EQ(rig.asked, 1);
    for (Nanos passed = 0; passed < 30 * kSecond; passed += 10 * kMilli) {
      rig.run(10 * kMilli);
      ASSERT_LE(rig.store.asked.size(), 1U);
      if (!rig.store.asked.empty()) {
        EXPECT_EQ(rig.store.asked.front(), rig.tasks[0]);
        EXPECT_TRUE(rig.store.asked.front()->queued);
        rig.store.refuse(Verdict::concurrency_full);
      }
    }
    const int asked = rig.asked_since();
    EXPECT_GE(asked, tells ? 20 : 80);
    EXPECT_LE(asked, tells ? 62 : 260);
    EXPECT_LE(rig.timers.size(), 2U) << "one poll, one outage check";
  }
}

TEST(Waiters, AMessageMakesTheHeadAskAtOnceAndSuccessTwiceAsMany) {
  Crowd rig;
  rig.store.freed("g");
  EXPECT_EQ(rig.asked_since(), 1);
  rig.store.grant();
  EXPECT_EQ(rig.asked_since(), 2);
  rig.store.grant();
  rig.store.grant();
  EXPECT_GE(rig.asked_since(), 4);
  while (!rig.store.asked.empty()) rig.store.refuse(Verdict::concurrency_full);
  rig.asked_since();
  rig.store.freed("g");
  EXPECT_EQ(rig.asked_since(), 1) << "a refusal starts anew";
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(rig.done(rig.tasks[i]));
}

TEST(Waiters, AReleaseHereAsksForOneSlotAndNoMore) {
  Crowd rig;
  rig.service.slot_freed("g");
  EXPECT_EQ(rig.asked_since(), 1);
  rig.store.grant();
  EXPECT_EQ(rig.asked_since(), 0) << "the slot that was freed is taken";
}

TEST(Waiters, AMessageForAGroupNobodyWaitsForIsNothing) {
  Slow rig;
  rig.store.freed("g");
  rig.store.freed("other");
  EXPECT_EQ(rig.store.questions, 0);
}

TEST(Waiters, TheStoreIsToldOnceWhenTheLastOneLeaves) {
  Crowd rig;
  for (std::size_t i = 0; i + 1 < rig.tasks.size(); ++i) rig.service.cancel(rig.tasks[i]);
  EXPECT_TRUE(rig.store.stopped.empty());
  rig.service.cancel(rig.tasks.back());
  EXPECT_EQ(rig.store.stopped, std::vector<std::string>{"g"});
}

TEST(Waiters, TheLastOneThatIsGrantedLeavesToo) {
  Slow rig;
  rig.start();
  rig.store.refuse(Verdict::concurrency_full);
  rig.store.freed("g");
  rig.store.grant();
  EXPECT_EQ(rig.store.stopped, std::vector<std::string>{"g"});
  rig.start();
  rig.store.grant();
  EXPECT_EQ(rig.store.stopped.size(), 1U) << "who never waited is not taken back";
}

TEST(Waiters, ARefusalThatNobodyWaitsForAnyMoreIsTakenBack) {
  Slow rig;
  rig.service.cancel(rig.start());
  rig.store.refuse(Verdict::concurrency_full);  // the store remembers us by now
  EXPECT_EQ(rig.store.stopped, std::vector<std::string>{"g"});
}

TEST(Waiters, ADeadStoreIsFoundOutInRoundsThatDouble) {
  Policy open;
  Slow rig(params(0, 2), open);
  for (int i = 0; i < 1000; ++i) {
    rig.start();
    if (i == 0) rig.store.refuse(Verdict::concurrency_full);
  }
  rig.pass(30 * kMilli);
  std::vector<std::size_t> rounds;
  while (rig.service.waiting() > 0 && rounds.size() < 50) {
    const std::size_t before = rig.inbox->arrived.size();
    rig.pass(300 * kMilli);
    rounds.push_back(rig.inbox->arrived.size() - before);
  }
  EXPECT_EQ(rig.service.waiting(), 0U);
  EXPECT_LE(rounds.size(), 15U);
  EXPECT_LE(rounds.front(), 3U) << "one lost answer does not let everybody pass";
}

}  // namespace
}  // namespace ratesync::engine
