// Waiting, cancelling, failure policy, leases and shutdown, in every state an acquisition can be in.
#include <chrono>

#include "ratesync/memory/memory_store.h"
#include "slow_store.h"

namespace ratesync::engine {
namespace {

using store::Verdict;
using Local = Rig<memory::MemoryStore>;

// --- what is counted and told ---------------------------------------------------------------------

TEST(Counted, EveryGrantIsInOneBucketOfTheHistogram) {
  Local rig(params(100, 0));
  for (int i = 0; i < 4; ++i) rig.start();
  rig.pass(50 * kMilli);
  const auto& waits = rig.limiter->counters.waits;
  EXPECT_EQ(waits[0], 1U) << "at once";
  EXPECT_EQ(waits[2], 1U) << "10 ms, the bucket's upper bound";
  EXPECT_EQ(waits[3], 1U) << "20 ms";
  EXPECT_EQ(waits[4], 1U) << "30 ms";
  EXPECT_EQ(rig.limiter->counters.acquisitions, 4U);
}

TEST(Counted, WhatWaitedLongerThanTheLastBoundHasABucketOfItsOwn) {
  Local rig(params(0.05, 0));
  rig.start();
  rig.start();
  rig.run(20 * kSecond);
  EXPECT_EQ(rig.limiter->counters.waits.back(), 1U);
}

TEST(Counted, LostRacesBelongToTheLimiterAlsoWhenNothingIsGranted) {
  Slow rig(params(1, 0));
  rig.start();
  rig.store.asked.front()->conflicts = 3;
  rig.store.grant();
  rig.start(0);
  rig.store.asked.front()->conflicts = 2;
  rig.store.refuse(Verdict::rate_limited);
  EXPECT_EQ(rig.limiter->counters.cas_failures, 5U);
}

TEST(Told, WhenAllIsBackIsAMomentAndNotASpan) {
  Slow rig(params(1, 0));
  AcquireTask* task = rig.start();
  store::AcquireReply reply;
  reply.wait = 2 * kSecond;
  reply.full_after = 5 * kSecond;
  const Nanos asked = rig.clock.now();
  rig.store.answer(reply);
  rig.run(2 * kSecond);
  ASSERT_TRUE(rig.done(task));
  EXPECT_EQ(task->full_at, asked + 5 * kSecond);
  AcquireTask* silent = rig.start();
  rig.store.grant();
  ASSERT_TRUE(rig.done(silent));
  EXPECT_LT(silent->full_at, 0) << "a store that does not say";
}

// --- failure policy -------------------------------------------------------------------------------

Policy policy(bool closed, Nanos budget = kSecond / 4) {
  Policy p;
  p.fail_closed = closed;
  p.outage_budget = budget;
  return p;
}

TEST(Outage, ASilentStoreCostsTheBudgetAndLetsPass) {
  Slow rig(params(0, 2), policy(false));
  AcquireTask* task = rig.start();
  rig.pass(240 * kMilli);
  EXPECT_FALSE(rig.done(task));
  rig.pass(60 * kMilli);
  ASSERT_TRUE(rig.done(task));
  EXPECT_EQ(task->outcome, Outcome::passed_open);
  EXPECT_EQ(task->status.code, Code::in_doubt) << "it was sent";
  EXPECT_EQ(rig.limiter->counters.passed_open, 1U);
}

TEST(Outage, FailClosedRefusesInstead) {
  Slow rig(params(0, 2), policy(true));
  rig.store.can_abandon = true;
  AcquireTask* task = rig.start();
  rig.pass(300 * kMilli);
  ASSERT_TRUE(rig.done(task));
  EXPECT_EQ(task->outcome, Outcome::failed);
  EXPECT_EQ(task->status.code, Code::unavailable) << "it was taken back unsent";
  EXPECT_TRUE(rig.store.asked.empty());
}

TEST(Outage, AGrantThatComesTooLateGoesBack) {
  Slow rig(params(1, 2), policy(false));
  AcquireTask* task = rig.start();
  rig.pass(300 * kMilli);
  ASSERT_TRUE(rig.done(task));
  rig.store.grant(kSecond, 42);
  EXPECT_EQ(rig.store.released, 1);
  EXPECT_EQ(rig.store.refunds, std::vector<std::int64_t>{42});
  EXPECT_EQ(rig.limiter->counters.held, 0);
}

TEST(Outage, AnAnswerToAnybodyShowsThatTheStoreLives) {
  Slow rig(params(0, 9), policy(true));
  AcquireTask* slow = rig.start();
  for (int i = 0; i < 10; ++i) {
    rig.start();
    std::swap(rig.store.asked.front(), rig.store.asked.back());
    rig.store.grant();
    rig.pass(100 * kMilli);
    EXPECT_FALSE(rig.done(slow));
  }
  rig.pass(300 * kMilli);
  EXPECT_TRUE(rig.done(slow));
}

TEST(Outage, AStoreThatAnswersOthersForEverDoesNotExcuseOneCallForEver) {
  Slow rig(params(0, 100), policy(false));
  AcquireTask* stuck = rig.start();
  for (int i = 0; i < 24 && !rig.done(stuck); ++i) {
    rig.start();
    std::swap(rig.store.asked.front(), rig.store.asked.back());
    rig.store.grant();
    rig.pass(100 * kMilli);
  }
  ASSERT_TRUE(rig.done(stuck));
  EXPECT_EQ(stuck->outcome, Outcome::passed_open);
}

struct FailureCase {
  Code code;
  const char* sqlstate;
  bool outage;
};
class FailurePolicy : public testing::TestWithParam<FailureCase> {};

TEST_P(FailurePolicy, OutagesFollowThePolicyAndMistakesAreAlwaysSeen) {
  for (const bool closed : {false, true}) {
    Slow rig(params(0, 2), policy(closed));
    AcquireTask* task = rig.start();
    rig.store.fail(GetParam().code, GetParam().sqlstate);
    ASSERT_TRUE(rig.done(task));
    EXPECT_EQ(task->outcome, GetParam().outage && !closed ? Outcome::passed_open : Outcome::failed);
    EXPECT_EQ(task->status.code, GetParam().code);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Codes, FailurePolicy,
    testing::Values(FailureCase{Code::unavailable, "", true}, FailureCase{Code::in_doubt, "", true},
                    FailureCase{Code::timeout, "", true}, FailureCase{Code::server, "57P03", true},
                    FailureCase{Code::server, "28P01", true}, FailureCase{Code::server, "53300", true},
                    FailureCase{Code::server, "42P01", false}, FailureCase{Code::server, "42501", false},
                    FailureCase{Code::exhausted, "", false}, FailureCase{Code::protocol, "", false},
                    FailureCase{Code::closed, "", false}, FailureCase{Code::internal, "", false}));

TEST(Outage, AWaiterWhoseQuestionIsLostFollowsThePolicyToo) {
  Slow rig(params(0, 1), policy(false));
  AcquireTask* task = rig.start();
  rig.store.refuse(Verdict::concurrency_full);
  rig.pass(60 * kMilli);
  ASSERT_EQ(rig.store.asked.size(), 1U) << "the fallback poll";
  rig.pass(400 * kMilli);
  ASSERT_TRUE(rig.done(task));
  EXPECT_EQ(task->outcome, Outcome::passed_open);
  EXPECT_EQ(rig.service.waiting(), 0U);
}

// --- cancel in every state ------------------------------------------------------------------------

TEST(Cancel, UnsentIsTakenBack) {
  Slow rig;
  rig.store.can_abandon = true;
  AcquireTask* task = rig.start();
  rig.service.cancel(task);
  ASSERT_TRUE(rig.done(task));
  EXPECT_EQ(task->outcome, Outcome::cancelled);
  EXPECT_TRUE(rig.store.asked.empty());
}

TEST(Cancel, SentIsAnsweredAtOnceAndItsGrantGivenBack) {
  Slow rig(params(5, 2));
  AcquireTask* task = rig.start();
  rig.service.cancel(task);
  ASSERT_TRUE(rig.done(task));
  rig.store.grant(0, 9);
  EXPECT_EQ(rig.store.released, 1);
  EXPECT_EQ(rig.store.refunds, std::vector<std::int64_t>{9});
  EXPECT_EQ(rig.inbox->arrived.size(), 1U) << "answered once";
}

TEST(Cancel, SentAndRefusedOrFailedNeedsNothing) {
  for (const bool fails : {false, true}) {
    Slow rig;
    rig.service.cancel(rig.start());
    fails ? rig.store.fail(Code::in_doubt) : rig.store.refuse(Verdict::concurrency_full);
    EXPECT_EQ(rig.store.released, 0);
    EXPECT_EQ(rig.inbox->arrived.size(), 1U);
  }
}

TEST(Cancel, AWaiterLeavesTheQueueAlsoWhileAsking) {
  for (const bool asking : {false, true}) {
    Slow rig(params(0, 1));
    AcquireTask* first = rig.start();
    rig.store.refuse(Verdict::concurrency_full);
    AcquireTask* second = rig.start();
    ASSERT_TRUE(rig.store.asked.empty()) << "it queues behind the first without asking";
    if (asking) rig.service.slot_freed("g");
    rig.service.cancel(first);
    ASSERT_TRUE(rig.done(first));
    if (asking) {
      rig.store.grant();
      EXPECT_EQ(rig.store.released, 1);
    } else {
      rig.pass(100 * kMilli);  // the poll goes on for who is left
    }
    ASSERT_EQ(rig.store.asked.size(), 1U);
    rig.store.grant();
    EXPECT_TRUE(rig.done(second));
    EXPECT_EQ(rig.service.waiting(), 0U);
  }
}

TEST(Cancel, AWaiterTakenBackWhileAskingLeavesThePollToTheOthers) {
  Slow rig(params(0, 1));
  rig.store.can_abandon = true;
  AcquireTask* first = rig.start();
  rig.store.refuse(Verdict::concurrency_full);
  AcquireTask* second = rig.start();
  rig.pass(100 * kMilli);
  ASSERT_EQ(rig.store.asked.size(), 1U);
  rig.service.cancel(first);  // the only one that was asking
  ASSERT_TRUE(rig.store.asked.empty());
  rig.pass(100 * kMilli);
  ASSERT_EQ(rig.store.asked.size(), 1U) << "nobody asks for the second";
  rig.store.grant();
  EXPECT_TRUE(rig.done(second));
}

TEST(Cancel, ASleepersSlotGoesToTheNextAndTheLastIsRefunded) {
  Slow rig(params(1, 0));
  AcquireTask* tasks[3];
  for (int i = 0; i < 3; ++i) {
    tasks[i] = rig.start();
    rig.store.grant((i + 1) * kSecond, 100 + i, 0);
  }
  rig.service.cancel(tasks[0]);
  EXPECT_EQ(rig.store.refunds, std::vector<std::int64_t>{102});
  rig.run(kSecond);
  EXPECT_TRUE(rig.done(tasks[1]));
  EXPECT_EQ(tasks[1]->stamp, 100);
  EXPECT_FALSE(rig.done(tasks[2]));
  rig.run(kSecond);
  EXPECT_TRUE(rig.done(tasks[2]));
}

TEST(Cancel, RefundsOfOneBatchFollowEachOther) {
  // A remote store stamps a batch, not a grant; each refund names what the one before left.
  Slow rig(params(1, 0));
  std::vector<AcquireTask*> tasks;
  for (int i = 0; i < 3; ++i) {
    tasks.push_back(rig.start());
    rig.store.grant((i + 1) * kSecond, 100, 0);
  }
  for (AcquireTask* task : tasks) rig.service.cancel(task);
  EXPECT_EQ(rig.store.refunds, (std::vector<std::int64_t>{100, 99, 98}));
}

TEST(Cancel, ADealAfterARefundMayBearTheSameStamp) {
  Local rig(params(8, 0));
  rig.start();
  AcquireTask* first = rig.start();
  AcquireTask* second = rig.start();
  rig.service.cancel(first);
  AcquireTask* third = rig.start();  // dealt what was just given back
  rig.service.cancel(third);
  rig.service.cancel(second);
  rig.store.peek(rig.limiter->group,
                 [](Result<store::Peek> seen) { EXPECT_EQ(seen.value().full_after, kSecond / 8); });
}

TEST(Cancel, AfterTheEndItChangesNothing) {
  Slow rig;
  AcquireTask* task = rig.start();
  rig.store.grant();
  ASSERT_TRUE(rig.done(task));
  rig.service.cancel(task);
  EXPECT_EQ(task->outcome, Outcome::granted);
  EXPECT_EQ(rig.inbox->arrived.size(), 1U);
  rig.service.give_back(task->group, 1, task->charged_rate, {rig.clock.now(), task->stamp}, task->permit);
  rig.service.give_back(task->group, 1, false, {}, task->permit);
  EXPECT_EQ(rig.store.released, 1) << "once, however often it is given back";
  EXPECT_EQ(rig.limiter->counters.held, 0);
}

TEST(Cancel, AGrantNobodyReadsGoesToTheNextSleeperWhenItIsFresh) {
  for (const bool fresh : {true, false}) {
    Slow rig(params(1, 0));
    AcquireTask* first = rig.start();
    rig.store.grant(kSecond, 1, 0);
    AcquireTask* second = rig.start();
    rig.store.grant(2 * kSecond, 2, 0);
    rig.run(kSecond);
    ASSERT_TRUE(rig.done(first));
    if (!fresh) rig.run(kSecond / 2);  // now two grants would come within half a second
    rig.service.give_back(first->group, 1, true, {first->submitted + first->waited, first->stamp}, nullptr);
    EXPECT_EQ(rig.done(second), fresh);
    EXPECT_EQ(rig.store.refunds, std::vector<std::int64_t>{fresh ? 2 : 1});
  }
}

TEST(Cancel, ThousandsOfSleepersInAnyOrderTakeNoTimeWorthMentioning) {
  for (const bool forwards : {true, false}) {
    Slow rig(params(1, 0));
    std::vector<AcquireTask*> tasks;
    for (int i = 0; i < 20'000; ++i) {
      tasks.push_back(rig.start());
      rig.store.grant((i + 1) * kSecond, i + 1, 0);
    }
    if (!forwards) std::reverse(tasks.begin(), tasks.end());
    const auto begun = std::chrono::steady_clock::now();
    for (AcquireTask* task : tasks) rig.service.cancel(task);
    EXPECT_LT(std::chrono::steady_clock::now() - begun, std::chrono::seconds(5));
    EXPECT_EQ(rig.service.waiting(), 0U);
    EXPECT_LE(rig.timers.size(), 1U) << "at most the outage check is left";
  }
}

// --- the end, in every state ----------------------------------------------------------------------

TEST(Shutdown, AnswersEveryStateOnceAndGivesHeldSlotsBack) {
  Slow rig(params(1, 4));
  AcquireTask* holding = rig.start();
  rig.store.grant(0, 1);
  AcquireTask* sleeping = rig.start();
  rig.store.grant(kSecond, 2);
  AcquireTask* waiting = rig.start();
  rig.store.refuse(Verdict::concurrency_full);
  AcquireTask* behind = rig.start();
  rig.service.slot_freed("g");  // `waiting` is asking now
  rig.service.shutdown();
  for (const AcquireTask* task : {holding, sleeping, waiting, behind}) EXPECT_TRUE(rig.done(task));
  for (const AcquireTask* task : {sleeping, waiting, behind}) {
    EXPECT_EQ(task->outcome, Outcome::failed);
    EXPECT_EQ(task->status.code, Code::closed);
  }
  EXPECT_EQ(rig.store.released, 2);
  EXPECT_EQ(rig.limiter->counters.held, 0);
  EXPECT_EQ(rig.service.waiting(), 0U);
  rig.store.grant();
  EXPECT_EQ(rig.store.released, 3) << "granted after the end";
  EXPECT_TRUE(rig.done(rig.start())) << "later calls are answered at once";
  EXPECT_EQ(rig.timers.size(), 0U);
}

TEST(Shutdown, TwiceIsOnce) {
  Slow rig;
  AcquireTask* task = rig.start();
  rig.store.grant();
  ASSERT_TRUE(rig.done(task));
  rig.service.shutdown();
  rig.service.shutdown();
  EXPECT_EQ(rig.store.released, 1);
}

// --- leases and holds -----------------------------------------------------------------------------

TEST(Lease, ALostOneIsSeenByThePermitAndReleasedNoMore) {
  Slow rig(params(0, 2));
  AcquireTask* task = rig.start();
  rig.store.grant(0, 0, 7);
  rig.store.lost("g", 8);
  EXPECT_FALSE(task->permit->lost);
  rig.store.lost("g", 7);
  EXPECT_TRUE(task->permit->lost);
  rig.service.release(task->permit);
  EXPECT_EQ(rig.store.released, 0);
  EXPECT_EQ(rig.limiter->counters.held, 0);
  EXPECT_EQ(rig.limiter->counters.leases_lost, 1U);
}

TEST(Lease, AHoldThatIsTooLongEnds) {
  Policy p;
  p.max_hold = kSecond;
  Slow rig(params(0, 1), p);
  AcquireTask* task = rig.start();
  rig.store.grant();
  AcquireTask* next = rig.start();
  rig.store.refuse(Verdict::concurrency_full);
  rig.run(kSecond);
  EXPECT_TRUE(task->permit->lost);
  EXPECT_EQ(rig.store.released, 1);
  ASSERT_FALSE(rig.store.asked.empty());
  rig.store.grant();
  EXPECT_TRUE(rig.done(next));
  rig.service.release(task->permit);
  EXPECT_EQ(rig.store.released, 1);
}

// --- order, when answers come late ------------------------------------------------------------------

// Two questions under way at once: the older is refused, then the younger is granted, `wait` ahead.
void younger_is_granted(Slow& rig, Nanos wait) {
  rig.store.refuse(Verdict::concurrency_full);
  rig.store.grant(wait, 1);
}

TEST(Order, TheGrantOfAYoungerGoesToTheOlderThatWaits) {
  Slow rig(params(1, 1));
  AcquireTask* older = rig.start();
  AcquireTask* younger = rig.start();
  younger_is_granted(rig, 0);
  EXPECT_TRUE(rig.done(older));
  EXPECT_FALSE(rig.done(younger));
}

TEST(Order, ButNotWhenItsSlotIsTooLateForTheOlder) {
  Slow rig(params(1, 1));
  AcquireTask* older = rig.start(kSecond / 2);
  AcquireTask* younger = rig.start();
  younger_is_granted(rig, kSecond);
  rig.run(kSecond / 2);
  if (!rig.store.asked.empty()) rig.store.refuse(Verdict::concurrency_full);  // it had asked again
  ASSERT_TRUE(rig.done(older));
  EXPECT_EQ(older->outcome, Outcome::refused) << "granted before the slot that was dealt: above the rate";
  EXPECT_FALSE(rig.done(younger));
  rig.run(kSecond / 2);
  ASSERT_TRUE(rig.done(younger));
  EXPECT_EQ(younger->outcome, Outcome::granted);
}

// --- waiting on the memory store -------------------------------------------------------------------

TEST(Waiting, IsFirstComeFirstServed) {
  Local rig(params(0, 1));
  std::vector<AcquireTask*> tasks;
  for (int i = 0; i < 10; ++i) tasks.push_back(rig.start());
  for (std::size_t i = 0; i < tasks.size(); ++i) {
    ASSERT_EQ(rig.inbox->arrived.size(), i + 1);
    EXPECT_EQ(rig.inbox->arrived[i], tasks[i]);
    rig.service.release(tasks[i]->permit);
  }
}

TEST(Waiting, OneWhoseDeadlinePassesIsRefusedThenAndNotBefore) {
  Local rig(params(0, 1));
  rig.start();
  AcquireTask* waiter = rig.start(kSecond);
  rig.run(kSecond - 1);
  EXPECT_FALSE(rig.done(waiter));
  rig.run(1);
  ASSERT_TRUE(rig.done(waiter));
  EXPECT_EQ(waiter->outcome, Outcome::refused);
  EXPECT_EQ(waiter->why, Verdict::concurrency_full);
}

TEST(Waiting, OneWhomTheRateRefusesLeavesTheSlotToTheNext) {
  Local rig(params(1, 1));
  AcquireTask* holder = rig.start();
  std::vector<AcquireTask*> hasty;
  for (int i = 0; i < 5000; ++i) hasty.push_back(rig.start(kSecond / 2));
  AcquireTask* patient = rig.start(10 * kSecond);
  rig.service.release(holder->permit);
  for (const AcquireTask* task : hasty) EXPECT_EQ(task->outcome, Outcome::refused);
  rig.run(kSecond);
  EXPECT_TRUE(rig.done(patient));
}

TEST(Waiting, AResetServesAsManyAsThereAreSlots) {
  Local rig(params(0, 3));
  for (int i = 0; i < 3; ++i) rig.start();
  std::vector<AcquireTask*> waiters;
  for (int i = 0; i < 4; ++i) waiters.push_back(rig.start());
  rig.store.reset(rig.limiter->group, [](Result<store::Unit>) {});
  rig.service.was_reset("g");
  EXPECT_EQ(rig.inbox->arrived.size(), 6U);
  EXPECT_FALSE(rig.done(waiters[3]));
}

TEST(Waiting, AResetWakesSleepersInOrderAndChargesThemAnew) {
  Local rig(params(1, 0));
  std::vector<AcquireTask*> tasks;
  for (int i = 0; i < 4; ++i) tasks.push_back(rig.start());
  ASSERT_EQ(rig.inbox->arrived.size(), 1U);
  rig.store.reset(rig.limiter->group, [](Result<store::Unit>) {});
  rig.service.was_reset("g");
  EXPECT_TRUE(rig.done(tasks[1]));
  EXPECT_FALSE(rig.done(tasks[2]));
  rig.run(2 * kSecond);
  EXPECT_TRUE(rig.done(tasks[3]));
}

}  // namespace
}  // namespace ratesync::engine
