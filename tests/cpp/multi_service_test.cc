// Several limits in one call: all or nothing over two stores, lines, offers of slots, outages, and a
// cancel or a shutdown in every state. What the stores answer is scripted (slow_store.h).
#include "ratesync/engine/multi_service.h"

#include <map>

#include "slow_store.h"

namespace ratesync::engine {
namespace {

using store::Verdict;
using Ids = std::vector<std::string>;

// Two remote stores; limiters named "a..." live on the first, the others on the second.
struct Multi : HandMoved {
  Multi() {
    one.serve(&multi);
    two.serve(&multi);
  }
  ~Multi() {
    one.shutdown();
    two.shutdown();
    for (SlowStore* store : {&first, &second}) {
      while (!store->asked.empty()) store->fail(Code::closed);
      while (!store->asked_all.empty()) store->fail_all(Code::closed);
    }
    EXPECT_EQ(multi.waiting(), 0U);
    EXPECT_EQ(timers.size(), 0U);
    inbox->forget();
  }
  LimiterRef limiter(const std::string& id) {
    LimiterRef& found = limiters[id];
    if (!found) {
      found = std::make_shared<LimiterCore>();
      limits::Params p =
          params(id.find('r') == std::string::npos ? 0 : 1, id.find('c') == std::string::npos ? 0 : 2);
      found->group = std::make_shared<const store::Group>(id, p);
      found->policy = policy;
      found->service = id[0] == 'a' ? &one : &two;
    }
    return found;
  }
  MultiTask* start(const Ids& ids, Nanos timeout = kForever, std::int64_t cost = 1) {
    std::vector<MultiPart> parts;
    for (const std::string& id : ids) {
      MultiPart part;
      part.limiter = limiter(id);
      part.group = part.limiter->group;
      part.cost = cost;
      parts.push_back(part);
    }
    auto* task = new MultiTask(multi, std::move(parts));
    task->submitted = clock.now();
    task->deadline = saturating_add(clock.now(), timeout);
    task->target = inbox;
    task->start();
    return task;
  }
  AcquireTask* start_one(const std::string& id, Nanos timeout = kForever) {
    auto* task = new AcquireTask(limiter(id));
    task->group = task->limiter->group;
    task->submitted = clock.now();
    task->deadline = saturating_add(clock.now(), timeout);
    task->target = inbox;
    task->start();
    return task;
  }
  void release(MultiTask* task) {
    for (MultiPart& part : task->limits)
      if (part.permit) part.limiter->service->release(part.permit);
  }
  bool done(const Completion* task) const { return inbox->has(task); }

  Policy policy;
  SlowStore first{clock};
  SlowStore second{clock};
  MultiService multi{timers};
  LimitService one{first, timers, 1};
  LimitService two{second, timers, 2};
  std::shared_ptr<Inbox> inbox = std::make_shared<Inbox>();
  std::map<std::string, LimiterRef> limiters;
};

// --- all or nothing ---------------------------------------------------------------------------------

TEST(AllOrNothing, OneQuestionPerStoreAndSortedWithin) {
  Multi rig;
  MultiTask* task = rig.start({"ar2", "b1", "ar1"});
  ASSERT_EQ(rig.first.asked_all.size(), 1U);
  EXPECT_TRUE(rig.second.asked_all.empty()) << "one store after the other";
  EXPECT_EQ(rig.first.asked_all[0]->parts[0].group->id, "ar1");
  EXPECT_EQ(rig.first.asked_all[0]->parts[1].group->id, "ar2");
  rig.first.grant_all(5, 9);
  rig.second.grant_all(6, 3);
  ASSERT_TRUE(rig.done(task));
  EXPECT_EQ(task->outcome, Outcome::granted);
  EXPECT_EQ(task->limits[0].stamp, 5);
  EXPECT_EQ(task->limits[1].remaining, 3);
  EXPECT_EQ(rig.first.questions + rig.second.questions, 2);
  for (const char* id : {"ar1", "ar2", "b1"}) EXPECT_EQ(rig.limiter(id)->counters.acquisitions, 1U);
}

TEST(AllOrNothing, WhatTheFirstStoreGrantedGoesBackWhenTheSecondRefuses) {
  Multi rig;
  MultiTask* task = rig.start({"arc", "br"}, 0);
  rig.first.grant_all(42);
  EXPECT_EQ(rig.limiter("arc")->counters.held, 1);
  rig.second.refuse_all({{"br", kSecond}});
  ASSERT_TRUE(rig.done(task));
  EXPECT_EQ(task->outcome, Outcome::refused);
  EXPECT_EQ(task->why, Verdict::rate_limited);
  EXPECT_EQ(task->blocking, 1U);
  EXPECT_EQ(task->retry_after, kSecond);
  EXPECT_EQ(rig.first.refunds, std::vector<std::int64_t>{42});
  EXPECT_EQ(rig.first.released, 1);
  EXPECT_EQ(rig.limiter("arc")->counters.held, 0);
  EXPECT_EQ(rig.limiter("arc")->counters.timeouts, 0U) << "it did not refuse";
  EXPECT_EQ(rig.limiter("br")->counters.refused_rate, 1U);
}

TEST(AllOrNothing, WhatGoesBackServesASleeperOfThisProcess) {
  Multi rig;
  MultiTask* task = rig.start({"ar", "br"}, 0);
  rig.first.grant_all(1);
  AcquireTask* sleeper = rig.start_one("ar");
  rig.first.grant(kSecond, 2, 0);
  rig.second.refuse_all({{"br", kSecond}});
  EXPECT_TRUE(rig.done(task));
  EXPECT_TRUE(rig.done(sleeper)) << "it took the slot";
  EXPECT_EQ(rig.first.refunds, std::vector<std::int64_t>{2}) << "and its own went back";
}

TEST(AllOrNothing, OrphanedResultsAreGivenBackWhole) {
  Multi rig;
  MultiTask* task = rig.start({"arc", "brc"});
  rig.first.grant_all(1);
  rig.second.grant_all(2);
  task->orphaned();
  EXPECT_EQ(rig.first.released + rig.second.released, 2);
  EXPECT_EQ(rig.first.refunds.size() + rig.second.refunds.size(), 2U);
  task->orphaned();
  EXPECT_EQ(rig.first.released, 1) << "once";
}

// --- waiting for a time -------------------------------------------------------------------------------

TEST(Time, AsksAgainWhenTheLatestOfTheTimesHasComeAndNotBefore) {
  Multi rig;
  MultiTask* task = rig.start({"ar1", "ar2"});
  rig.first.refuse_all({{"ar1", kSecond}, {"ar2", 3 * kSecond}});
  EXPECT_EQ(rig.multi.waiting(), 1U);
  rig.pass(3 * kSecond - 10 * kMilli);
  EXPECT_EQ(rig.first.questions, 1);
  rig.run(10 * kMilli);
  ASSERT_EQ(rig.first.questions, 2);
  rig.first.grant_all();
  ASSERT_TRUE(rig.done(task));
  EXPECT_EQ(task->waited, 3 * kSecond);
}

TEST(Time, BeyondTheDeadlineIsRefusedAtOnceAlsoForThoseBehind) {
  Multi rig;
  MultiTask* patient = rig.start({"ar", "br"});
  MultiTask* hasty = rig.start({"br", "ar"}, kSecond);
  EXPECT_EQ(rig.first.questions, 1) << "the same limits in another order: one line";
  rig.first.grant_all();
  rig.second.refuse_all({{"br", 2 * kSecond}});
  EXPECT_FALSE(rig.done(patient));
  ASSERT_TRUE(rig.done(hasty));
  EXPECT_EQ(hasty->why, Verdict::rate_limited);
  EXPECT_EQ(hasty->blocking, 0U);
  EXPECT_EQ(hasty->retry_after, 2 * kSecond);
  MultiTask* later = rig.start({"ar", "br"}, kSecond);
  EXPECT_TRUE(rig.done(later));
  EXPECT_EQ(rig.first.questions, 1);
}

TEST(Time, TenThousandInLineAskOnceEachTime) {
  Multi rig;
  std::vector<MultiTask*> tasks;
  tasks.push_back(rig.start({"ar1", "ar2"}));
  rig.first.refuse_all({{"ar1", kSecond}});
  for (int i = 1; i < 10'000; ++i) tasks.push_back(rig.start({"ar1", "ar2"}));
  rig.pass(990 * kMilli);
  EXPECT_EQ(rig.first.questions, 1);
  rig.run(10 * kMilli);
  EXPECT_EQ(rig.first.questions, 2);
  rig.first.grant_all(0, 0);
  EXPECT_EQ(rig.first.questions, 3) << "nothing is left: one asks, to learn the time";
  rig.first.refuse_all({{"ar1", 100 * kSecond}});
  rig.pass(90 * kSecond);
  EXPECT_EQ(rig.first.questions, 3);
  rig.run(10 * kSecond);
  // Plenty now: the number that asks doubles with every success.
  std::size_t asking = 0;
  while (rig.inbox->arrived.size() < 10'000) {
    asking = std::max(asking, rig.first.asked_all.size());
    rig.first.grant_all(0, 1'000'000);
  }
  EXPECT_GT(asking, 100U);
  for (std::size_t i = 0; i < tasks.size(); ++i) ASSERT_EQ(rig.inbox->arrived[i], tasks[i]) << "in order";
}

TEST(Time, ARefusalEndsTheDoubling) {
  Multi rig;
  for (int i = 0; i < 20; ++i) rig.start({"ar1", "ar2"});
  for (int i = 0; i < 20; ++i) rig.first.refuse_all({{"ar1", kSecond}});
  rig.run(kSecond);
  for (int i = 0; i < 3; ++i) rig.first.grant_all();
  EXPECT_EQ(rig.first.asked_all.size(), 8U);
  while (!rig.first.asked_all.empty()) rig.first.refuse_all({{"ar1", kSecond}});
  rig.run(kSecond);
  EXPECT_EQ(rig.first.asked_all.size(), 1U);
}

TEST(Time, TheGrantOfAYoungerGoesToTheOlderOfTheSameCost) {
  Multi rig;
  MultiTask* older = rig.start({"arc", "br"});
  rig.first.refuse_all({{"arc", kSecond}});
  MultiTask* younger = rig.start({"arc", "br"});
  rig.run(kSecond);
  rig.first.grant_all();
  rig.second.grant_all();
  ASSERT_TRUE(rig.done(older));
  EXPECT_FALSE(rig.done(younger));
}

TEST(Time, ALeavingFirstWithAnotherCostMakesTheNextAsk) {
  for (const bool same : {true, false}) {
    Multi rig;
    MultiTask* big = rig.start({"ar1", "ar2"}, kForever, 5);
    rig.first.refuse_all({{"ar1", 100 * kSecond}});
    rig.start({"ar1", "ar2"}, kForever, same ? 5 : 1);
    rig.multi.cancel(big);
    EXPECT_EQ(rig.first.questions, same ? 1 : 2);
  }
}

TEST(Time, ALineOfImpatientOnesDoesNotAskOneByOne) {
  Multi rig;
  rig.start({"ar1", "ar2"});
  rig.first.refuse_all({{"ar1", kSecond}});
  for (int i = 0; i < 1000; ++i) rig.start({"ar1", "ar2"}, 2 * kSecond);
  MultiTask* last = rig.start({"ar1", "ar2"});
  rig.run(kSecond);
  rig.first.grant_all(0, 0);
  rig.first.refuse_all({{"ar1", 10 * kSecond}});
  EXPECT_EQ(rig.inbox->arrived.size(), 1001U);
  EXPECT_EQ(rig.first.questions, 3);
  EXPECT_FALSE(rig.done(last));
  rig.run(10 * kSecond);
  rig.first.grant_all();
  EXPECT_TRUE(rig.done(last));
}

TEST(Time, TenThousandLinesThroughOneLimitTakeTurns) {
  Multi rig;
  std::vector<MultiTask*> tasks;
  for (int i = 0; i < 10'000; ++i) {
    tasks.push_back(rig.start({"ar", "ax" + std::to_string(i)}));
    rig.first.refuse_all({{"ar", 100 * kSecond}});
  }
  int asked = rig.first.questions;
  for (int round = 0; round < 100; ++round) {
    rig.run(100 * kSecond);
    ASSERT_EQ(rig.first.asked_all.size(), 1U);
    rig.first.grant_all(0, 0);
    ASSERT_TRUE(rig.done(tasks[static_cast<std::size_t>(round)])) << "in order of arrival";
    ASSERT_EQ(rig.first.asked_all.size(), 1U) << "the next learns the time";
    rig.first.refuse_all({{"ar", 100 * kSecond}});
  }
  EXPECT_EQ(rig.first.questions - asked, 200);
  asked = rig.first.questions;
  rig.run(100 * kSecond);
  std::size_t most = 0;
  while (rig.inbox->arrived.size() < tasks.size()) {
    most = std::max(most, rig.first.asked_all.size());
    ASSERT_FALSE(rig.first.asked_all.empty());
    rig.first.grant_all(0, 1'000'000);
  }
  EXPECT_GT(most, 100U);
  EXPECT_EQ(rig.first.questions - asked, 9'900);
  for (std::size_t i = 0; i < tasks.size(); ++i) ASSERT_EQ(rig.inbox->arrived[i], tasks[i]);
}

TEST(Time, ATurnIsPassedOnByWhoeverCannotUseIt) {
  for (int way = 0; way < 4; ++way) {
    Multi rig;
    rig.first.can_abandon = true;
    MultiTask* one = rig.start({"ar", "axr1"});
    rig.first.refuse_all({{"ar", kSecond}});
    MultiTask* two = rig.start({"ar", "axr2"});
    rig.first.refuse_all({{"ar", kSecond}});
    if (way == 3) one->cancel();
    rig.run(kSecond);
    if (way == 0) rig.first.refuse_all({{"axr1", 100 * kSecond}});
    if (way == 1) rig.first.fail_all(Code::protocol);
    if (way == 2) one->cancel();
    rig.pass(20 * kMilli);
    ASSERT_EQ(rig.first.asked_all.size(), 1U) << way;
    rig.first.grant_all();
    EXPECT_TRUE(rig.done(two));
  }
}

TEST(Time, OneWithALaterTimeThatLeavesDoesNotKeepTheOthersAsleep) {
  Multi rig;
  MultiTask* big = rig.start({"ar", "ax1"}, kForever, 100);
  rig.first.refuse_all({{"ar", 1000 * kSecond}});
  MultiTask* small = rig.start({"ar", "ax2"});
  rig.first.refuse_all({{"ar", kSecond}});
  big->cancel();
  rig.pass(kSecond + 20 * kMilli);
  ASSERT_EQ(rig.first.asked_all.size(), 1U);
  rig.first.grant_all();
  EXPECT_TRUE(rig.done(small));
}

// --- waiting for slots --------------------------------------------------------------------------------

TEST(Slots, AReleaseHereIsOfferedInOrderOfArrivalOverBothKinds) {
  Multi rig;
  MultiTask* holder = rig.start({"ac1", "ac2"});
  rig.first.grant_all();
  MultiTask* multi = rig.start({"ac1", "ac2"});
  rig.first.refuse_all({}, {"ac1"});
  AcquireTask* single = rig.start_one("ac1");
  EXPECT_EQ(rig.first.questions, 2) << "it queues behind";
  rig.one.release(holder->limits[0].permit);
  ASSERT_EQ(rig.first.asked_all.size(), 1U);
  EXPECT_TRUE(rig.first.asked.empty());
  rig.first.grant_all();
  EXPECT_TRUE(rig.done(multi));
  EXPECT_FALSE(rig.done(single));
  rig.one.release(multi->limits[0].permit);
  ASSERT_EQ(rig.first.asked.size(), 1U);
  rig.first.grant();
  EXPECT_TRUE(rig.done(single));
}

TEST(Slots, AnOlderSingleGoesFirst) {
  Multi rig;
  MultiTask* holder = rig.start({"ac1", "ac2"});
  rig.first.grant_all();
  AcquireTask* single = rig.start_one("ac1");
  rig.first.refuse(Verdict::concurrency_full);
  MultiTask* multi = rig.start({"ac1", "ac2"});
  EXPECT_TRUE(rig.first.asked_all.empty()) << "nobody overtakes";
  rig.one.release(holder->limits[0].permit);
  ASSERT_EQ(rig.first.asked.size(), 1U);
  EXPECT_TRUE(rig.first.asked_all.empty());
  rig.first.grant();
  EXPECT_TRUE(rig.done(single));
  rig.one.release(single->permit);
  ASSERT_EQ(rig.first.asked_all.size(), 1U);
  rig.first.grant_all();
  EXPECT_TRUE(rig.done(multi));
}

TEST(Slots, WhoCannotUseItLeavesItToThoseBehind) {
  Multi rig;
  MultiTask* multi = rig.start({"ac1", "ac2"});
  rig.first.refuse_all({}, {"ac1"});
  AcquireTask* single = rig.start_one("ac1");
  rig.one.slot_freed("ac1");
  rig.first.refuse_all({}, {"ac2"});  // the other one is full by now
  ASSERT_EQ(rig.first.asked.size(), 1U);
  rig.first.grant();
  EXPECT_TRUE(rig.done(single));
  rig.one.slot_freed("ac2");
  ASSERT_EQ(rig.first.asked_all.size(), 1U);
  rig.first.grant_all();
  EXPECT_TRUE(rig.done(multi));
}

TEST(Slots, NobodyAsksWhileAnotherOfTheLimitsIsKnownToBeFull) {
  Multi rig;
  MultiTask* multi = rig.start({"ac1", "ac2"});
  rig.first.refuse_all({}, {"ac1", "ac2"});
  for (int i = 0; i < 10; ++i) rig.one.slot_freed("ac1");
  EXPECT_EQ(rig.first.questions, 1);
  rig.one.slot_freed("ac2");
  ASSERT_EQ(rig.first.questions, 2);
  rig.first.grant_all();
  EXPECT_TRUE(rig.done(multi));
}

TEST(Slots, AFreedSlotBeforeTheTimeHasComeIsLeftToOthersAndAskedForThen) {
  Multi rig;
  MultiTask* multi = rig.start({"ac", "ar"});
  rig.first.refuse_all({{"ar", kSecond}}, {"ac"});
  rig.one.slot_freed("ac");
  EXPECT_EQ(rig.first.questions, 1);
  AcquireTask* single = rig.start_one("ac");
  rig.first.grant();
  EXPECT_TRUE(rig.done(single)) << "a free slot is not kept for the one whose time has not come";
  rig.run(kSecond);
  ASSERT_EQ(rig.first.asked_all.size(), 1U);
  rig.first.grant_all();
  EXPECT_TRUE(rig.done(multi));
}

TEST(Slots, FreedWhileTheQuestionIsUnderWayIsNotForgotten) {
  Multi rig;
  MultiTask* multi = rig.start({"ac1", "ac2"});
  rig.first.refuse_all({}, {"ac1"});
  rig.one.slot_freed("ac1");
  ASSERT_EQ(rig.first.asked_all.size(), 1U);
  rig.one.slot_freed("ac1");
  rig.first.refuse_all({}, {"ac1"});
  ASSERT_EQ(rig.first.asked_all.size(), 1U) << "it asks again at once";
  rig.first.grant_all();
  EXPECT_TRUE(rig.done(multi));
}

TEST(Slots, ManyLinesThroughOneLimitMoveOneByOne) {
  Multi rig;
  std::vector<MultiTask*> tasks;
  for (int i = 0; i < 1000; ++i) {
    tasks.push_back(rig.start({"ac", "ax" + std::to_string(i)}));
    if (i == 0) rig.first.refuse_all({}, {"ac"});
  }
  EXPECT_EQ(rig.first.questions, 1);
  for (std::size_t i = 0; i < tasks.size(); ++i) {
    rig.one.slot_freed("ac");
    ASSERT_EQ(rig.first.asked_all.size(), 1U);
    rig.first.grant_all();
    ASSERT_TRUE(rig.done(tasks[i]));
  }
  EXPECT_EQ(rig.first.questions, 1001);
}

TEST(Slots, DeadlinesPassWhileWaiting) {
  Multi rig;
  MultiTask* task = rig.start({"ac1", "ac2"}, kSecond);
  rig.first.refuse_all({}, {"ac2"});
  MultiTask* now = rig.start({"ac1", "ac2"}, 0);
  ASSERT_TRUE(rig.done(now)) << "others wait, and it does not";
  EXPECT_EQ(now->why, Verdict::concurrency_full);
  EXPECT_EQ(now->blocking, 1U);
  for (int i = 0; i < 100; ++i) {
    rig.run(10 * kMilli);
    if (!rig.first.asked_all.empty()) rig.first.refuse_all({}, {"ac2"});
  }
  ASSERT_TRUE(rig.done(task));
  EXPECT_EQ(task->outcome, Outcome::refused);
  EXPECT_EQ(task->why, Verdict::concurrency_full);
  EXPECT_EQ(task->blocking, 1U);
  EXPECT_EQ(rig.first.stopped, std::vector<std::string>{"ac2"});
}

// --- outages ------------------------------------------------------------------------------------------

TEST(Outage, AnOpenLimitPassesAndTheOthersAreHeld) {
  Multi rig;
  MultiTask* task = rig.start({"arc", "br"});
  rig.first.grant_all();
  rig.second.fail_all(Code::unavailable);
  ASSERT_TRUE(rig.done(task));
  EXPECT_EQ(task->outcome, Outcome::passed_open);
  EXPECT_TRUE(task->limits[0].granted);
  EXPECT_FALSE(task->limits[1].granted);
  EXPECT_EQ(rig.limiter("arc")->counters.acquisitions, 1U);
  EXPECT_EQ(rig.limiter("br")->counters.passed_open, 1U);
  rig.release(task);
  EXPECT_EQ(rig.first.released, 1);
}

TEST(Outage, AClosedOneFailsTheCallAndTheOthersGoBack) {
  Multi rig;
  rig.limiter("br")->policy.fail_closed = true;
  MultiTask* task = rig.start({"arc", "b", "br"});
  rig.first.grant_all();
  rig.second.fail_all(Code::unavailable);
  ASSERT_TRUE(rig.done(task));
  EXPECT_EQ(task->outcome, Outcome::failed);
  EXPECT_TRUE(task->outage);
  EXPECT_EQ(task->blocking, 2U);
  EXPECT_EQ(rig.first.released, 1);
  EXPECT_EQ(rig.first.refunds.size(), 1U);
}

TEST(Outage, AMistakeIsAlwaysSeen) {
  Multi rig;
  MultiTask* task = rig.start({"ar", "br"});
  rig.first.fail_all(Code::server, "42P01");
  ASSERT_TRUE(rig.done(task));
  EXPECT_EQ(task->outcome, Outcome::failed);
  EXPECT_FALSE(task->outage);
  EXPECT_EQ(rig.second.questions, 0);
}

TEST(Outage, ASilentStoreCostsTheSmallestBudgetOnceAndItsLateGrantGoesBack) {
  Multi rig;
  rig.limiter("ar")->policy.outage_budget = 100 * kMilli;
  MultiTask* task = rig.start({"arc", "ar", "br"});
  rig.pass(150 * kMilli);
  ASSERT_EQ(rig.second.asked_all.size(), 1U);
  rig.second.refuse_all({{"br", kSecond}});
  rig.run(kSecond);
  ASSERT_EQ(rig.second.asked_all.size(), 1U) << "the store that is out is not asked twice by one call";
  EXPECT_EQ(rig.first.questions, 1);
  rig.second.grant_all();
  ASSERT_TRUE(rig.done(task));
  EXPECT_EQ(task->outcome, Outcome::passed_open);
  rig.first.grant_all(9);
  EXPECT_EQ(rig.first.released, 1);
  EXPECT_EQ(rig.first.refunds, (std::vector<std::int64_t>{9, 9}));
}

TEST(Outage, OneInLineWhoFindsOutDoesNotLetAllOthersPass) {
  Multi rig;
  for (int i = 0; i < 100; ++i) {
    rig.start({"ac1", "ac2"});
    if (i == 0) rig.first.refuse_all({}, {"ac1"});
  }
  rig.one.slot_freed("ac1");
  rig.first.fail_all(Code::in_doubt);
  EXPECT_EQ(rig.inbox->arrived.size(), 1U);
  ASSERT_EQ(rig.first.asked_all.size(), 2U) << "twice as many find out next";
  while (rig.inbox->arrived.size() < 100) rig.first.fail_all(Code::unavailable);
  EXPECT_EQ(rig.first.questions, 101);
}

// --- cancel and shutdown, in every state ----------------------------------------------------------------

enum class At { first_store, second_store, time, slot, behind, asking_again };
class Leaving : public testing::TestWithParam<std::tuple<At, bool>> {};

TEST_P(Leaving, LeavesNothingBehind) {
  for (const bool shutdown : {false, true}) {
    Multi rig;
    const auto [at, can_abandon] = GetParam();
    rig.first.can_abandon = rig.second.can_abandon = can_abandon;
    MultiTask* other = at == At::behind ? rig.start({"arc", "brc"}) : nullptr;
    MultiTask* task = rig.start({"arc", "brc"});
    if (at != At::first_store && at != At::behind) rig.first.grant_all(1);
    if (at == At::time) rig.second.refuse_all({{"brc", kSecond}});
    if (at == At::slot || at == At::asking_again) rig.second.refuse_all({}, {"brc"});
    if (at == At::asking_again) rig.two.slot_freed("brc");
    rig.first.refunds.clear();
    rig.first.released = 0;
    const bool held = at == At::second_store;
    shutdown ? rig.one.shutdown() : task->cancel();
    ASSERT_TRUE(rig.done(task));
    EXPECT_EQ(task->outcome, shutdown ? Outcome::failed : Outcome::cancelled);
    EXPECT_EQ(task->status.code, shutdown ? Code::closed : Code::ok);
    EXPECT_EQ(rig.first.released, held);
    EXPECT_EQ(rig.first.refunds.size(), held ? 1U : 0U);
    EXPECT_EQ(rig.limiter("arc")->counters.held, 0);
    const bool sent_to_first = at == At::first_store || at == At::asking_again;
    if (!can_abandon && sent_to_first) {
      rig.first.grant_all(2);
      EXPECT_EQ(rig.first.refunds.back(), 2);
      EXPECT_EQ(rig.first.released, 1);
    }
    if (!can_abandon && at == At::second_store) {
      rig.second.grant_all(2);
      EXPECT_EQ(rig.second.refunds, std::vector<std::int64_t>{2});
      EXPECT_EQ(rig.second.released, 1);
    }
    task->cancel();  // once more changes nothing
    if (other && !shutdown) {
      rig.first.grant_all();
      rig.second.grant_all();
      EXPECT_TRUE(rig.done(other));
    }
    EXPECT_EQ(std::count(rig.inbox->arrived.begin(), rig.inbox->arrived.end(), task), 1);
  }
}

INSTANTIATE_TEST_SUITE_P(States, Leaving,
                         testing::Combine(testing::Values(At::first_store, At::second_store, At::time,
                                                          At::slot, At::behind, At::asking_again),
                                          testing::Bool()));

TEST(Leaving, AnAskingFirstLeavesTheQuestionToTheNext) {
  Multi rig;
  rig.first.can_abandon = true;
  MultiTask* first = rig.start({"ac1", "ac2"});
  rig.first.refuse_all({}, {"ac1"});
  MultiTask* second = rig.start({"ac1", "ac2"});
  rig.one.slot_freed("ac1");
  first->cancel();
  EXPECT_TRUE(rig.first.asked_all.empty());
  rig.pass(50 * kMilli);
  ASSERT_EQ(rig.first.asked_all.size(), 1U);
  rig.first.grant_all();
  EXPECT_TRUE(rig.done(second));
}

TEST(Leaving, ThousandsCancelledOneByOneDoNotAllAskFirst) {
  Multi rig;
  rig.first.can_abandon = true;
  std::vector<MultiTask*> tasks;
  for (int i = 0; i < 10'000; ++i) {
    tasks.push_back(rig.start({"ac1", "ac2"}));
    if (i == 0) rig.first.refuse_all({}, {"ac1"});
  }
  rig.one.slot_freed("ac1");
  for (MultiTask* task : tasks) task->cancel();
  EXPECT_EQ(rig.first.questions, 2);
  EXPECT_EQ(rig.first.stopped.size(), 1U);
}

TEST(Leaving, AResetMakesTheFirstAskAtOnce) {
  Multi rig;
  MultiTask* task = rig.start({"ar1", "ar2"});
  rig.first.refuse_all({{"ar1", 100 * kSecond}});
  rig.one.was_reset("ar2");
  ASSERT_EQ(rig.first.asked_all.size(), 1U);
  rig.first.grant_all();
  EXPECT_TRUE(rig.done(task));
}

TEST(Leaving, ALostLeaseIsSeenByThePartAlone) {
  Multi rig;
  MultiTask* task = rig.start({"ac1", "ac2"});
  rig.first.grant_all();
  rig.first.lost("ac1", 7);
  EXPECT_TRUE(task->limits[0].permit->lost);
  EXPECT_FALSE(task->limits[1].permit->lost);
  rig.release(task);
  EXPECT_EQ(rig.first.released, 1);
}

}  // namespace
}  // namespace ratesync::engine
