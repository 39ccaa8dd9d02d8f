// Waiting for locks against a store that answers when the test says so: lines, handovers, cancels and
// timeouts at every step, lost answers, outages. Real time and threads: lock_race_test.cc.
#include "ratesync/engine/lock_service.h"

#include <gtest/gtest.h>

#include <vector>

#include "slow_locks.h"

namespace ratesync::engine {
namespace {

using Outcome = LockAcquire::Outcome;
using Fate = Kept::Fate;

TEST(Lock, IsAskedForOnceAndGivenBackExactly) {
  LockRig rig;
  LockAcquire* task = rig.start();
  EXPECT_EQ(rig.locks.pending(), "acquire a");
  EXPECT_TRUE(rig.locks.asked[0]->queued);
  EXPECT_EQ(rig.locks.asked[0]->ttl, 30'000);
  EXPECT_GT(rig.locks.asked[0]->id, 0);
  rig.locks.hold();
  ASSERT_TRUE(rig.got(task));
  EXPECT_EQ(task->lease->token, 1);
  EXPECT_EQ(task->lease->remaining(rig.clock.now()), 30 * kSecond);
  LockRelease* release = rig.release(task->lease);
  EXPECT_EQ(rig.locks.pending(), "release a");
  EXPECT_EQ(rig.locks.asked[0]->token, 1);
  EXPECT_FALSE(rig.done(release));
  rig.locks.done();
  EXPECT_TRUE(rig.done(release) && release->was_held);
  // A second time there is nothing to ask.
  LockRelease* again = rig.release(task->lease);
  EXPECT_TRUE(rig.done(again) && !again->was_held);
  EXPECT_EQ(rig.locks.questions, 2);
}

TEST(Lock, ReleaseSaysWhenItWasNotHeldAnyMore) {
  LockRig rig;
  const HeldLockRef lease = rig.held();
  LockRelease* release = rig.release(lease);
  rig.locks.lost();
  EXPECT_TRUE(rig.done(release) && release->status.ok() && !release->was_held);
}

TEST(Lock, AReleaseOfWhatIsOverHereIsNoMatterWhatTheStoreSays) {
  LockRig rig;
  const HeldLockRef lease = rig.held("a", 1000, false);
  rig.run(2 * kSecond);
  EXPECT_EQ(rig.fate(lease), Fate::lost);
  LockRelease* release = rig.release(lease);
  rig.locks.done();  // nobody took it meanwhile
  EXPECT_TRUE(rig.done(release) && !release->was_held);
}

TEST(Lock, AReleaseThatFailedCanBeRepeated) {
  LockRig rig;
  const HeldLockRef lease = rig.held();
  LockRelease* release = rig.release(lease);
  rig.locks.fail(Code::unavailable);
  EXPECT_EQ(release->status.code, Code::unavailable);
  EXPECT_EQ(rig.fate(lease), Fate::ended);  // not renewed any more
  LockRelease* again = rig.release(lease);
  rig.locks.done();
  EXPECT_TRUE(again->status.ok() && again->was_held);
}

TEST(Lock, AReleaseWhoseAnswerWasLostIsSentAgainAndWasHeld) {
  LockRig rig;
  const HeldLockRef lease = rig.held();
  LockRelease* release = rig.release(lease);
  rig.locks.fail(Code::in_doubt);
  EXPECT_EQ(rig.locks.pending(), "release a");
  rig.locks.lost();  // the first one did it
  EXPECT_TRUE(rig.done(release) && release->was_held);
}

TEST(Lock, WhoLeavesWaitsForASecondAtMost) {
  LockRig rig;
  const HeldLockRef lease = rig.held();
  LockRelease* release = rig.release(lease, true);
  rig.run(kLeavingTime - kMilli);
  EXPECT_FALSE(rig.done(release));
  rig.run(kMilli);
  ASSERT_TRUE(rig.done(release));
  EXPECT_TRUE(release->status.code == Code::timeout && release->was_held);
  // It is given back all the same.
  rig.locks.fail(Code::in_doubt);
  EXPECT_EQ(rig.locks.pending(), "release a");
  rig.locks.done();
  EXPECT_TRUE(lease->answered && release->status.code == Code::timeout && release->was_held);
}

TEST(Lock, WhoLeavesIsToldWhatTheStoreSaysInTime) {
  LockRig rig;
  LockRelease* release = rig.release(rig.held(), true);
  rig.run(kLeavingTime / 2);
  rig.locks.lost();
  EXPECT_TRUE(rig.done(release) && release->status.ok() && !release->was_held);
  rig.run(kLeavingTime);  // nothing fires
}

// --- lines ----------------------------------------------------------------------------------------

TEST(LockLine, OnlyTheFirstAsks) {
  LockRig rig;
  std::vector<LockAcquire*> tasks;
  for (int i = 0; i < 100; ++i) tasks.push_back(rig.start());
  EXPECT_EQ(rig.locks.pending(), "acquire a");
  rig.locks.taken();
  rig.pass(500 * kMilli);
  EXPECT_EQ(rig.locks.questions, 1);
  EXPECT_TRUE(rig.arrivals->arrived.empty());
}

TEST(LockLine, AReleaseIsFollowedByTheNextQuestionAtOnceInOrder) {
  LockRig rig;
  LockAcquire* first = rig.start();
  LockAcquire* second = rig.start();
  LockAcquire* third = rig.start();
  rig.locks.hold();
  ASSERT_TRUE(rig.got(first));
  EXPECT_EQ(rig.locks.pending(), "");  // held here: nobody asks
  rig.release(first->lease);
  EXPECT_EQ(rig.locks.pending(), "release a, acquire a");  // one trip
  rig.locks.done();
  rig.locks.hold();
  ASSERT_TRUE(rig.got(second));
  EXPECT_FALSE(rig.done(third));
  rig.release(second->lease);
  rig.locks.done();
  rig.locks.hold();
  EXPECT_TRUE(rig.got(third));
}

TEST(LockLine, NamesAndSpacesDoNotMeet) {
  LockRig rig;
  LockAcquire* a = rig.start(kForever, "a");
  LockAcquire* b = rig.start(kForever, "b");
  rig.space = std::make_shared<const store::Space>(store::Space{"default", "other"});
  LockAcquire* other = rig.start(kForever, "a");
  EXPECT_EQ(rig.locks.pending(), "acquire a, acquire b, acquire a");
  rig.locks.hold();
  rig.locks.hold();
  rig.locks.hold();
  EXPECT_TRUE(rig.got(a) && rig.got(b) && rig.got(other));
}

TEST(LockLine, TryingWhatIsHeldHereAsksNobody) {
  LockRig rig;
  const HeldLockRef lease = rig.held();
  LockAcquire* task = rig.start(0);
  EXPECT_TRUE(rig.late(task));
  EXPECT_EQ(rig.locks.questions, 1);
  EXPECT_EQ(task->remaining_ms, 30'000);
}

TEST(LockLine, TryingAsksOnceAndTakesNoPlace) {
  LockRig rig;
  LockAcquire* task = rig.start(0);
  EXPECT_FALSE(rig.locks.asked[0]->queued);
  EXPECT_FALSE(rig.done(task));
  rig.run(kSecond);
  EXPECT_FALSE(rig.done(task));  // the first answer may take longer than nothing
  rig.locks.taken(5000);
  EXPECT_TRUE(rig.late(task));
  EXPECT_EQ(task->holder, "elsewhere");
  EXPECT_EQ(task->remaining_ms, 5000);
  rig.pass(10 * kSecond);
  EXPECT_EQ(rig.locks.questions, 1);
}

TEST(LockLine, FreedElsewhereTheFirstAsks) {
  LockRig rig;
  LockAcquire* first = rig.start();
  rig.start();
  rig.locks.taken();
  rig.locks.freed("a");
  EXPECT_EQ(rig.locks.pending(), "acquire a");
  rig.locks.hold();
  EXPECT_TRUE(rig.got(first));
}

TEST(LockLine, FreedWhileTheFirstWasAskingItAsksAgain) {
  LockRig rig;
  LockAcquire* first = rig.start();
  rig.locks.freed("a");  // overtakes the refusal
  EXPECT_EQ(rig.locks.pending(), "acquire a");
  rig.locks.taken();
  EXPECT_EQ(rig.locks.pending(), "acquire a");
  rig.locks.taken();
  EXPECT_EQ(rig.locks.pending(), "");  // once
  EXPECT_FALSE(rig.done(first));
}

TEST(LockLine, TheEndOfTheHoldersLeaseIsAskedAt) {
  LockRig rig;
  rig.start();
  rig.locks.taken(300);
  rig.pass(290 * kMilli);
  EXPECT_EQ(rig.locks.questions, 1);
  rig.pass(20 * kMilli);
  EXPECT_EQ(rig.locks.questions, 2);
}

TEST(LockLine, AStoreThatCannotPushIsAskedNowAndThenAtAGrowingPace) {
  LockRig rig;
  rig.locks.tells = false;
  rig.start();
  rig.locks.taken(3'600'000);
  std::vector<Nanos> gaps;
  Nanos since = rig.clock.now();
  while (gaps.size() < 40) {
    rig.run(kMilli);
    if (rig.locks.asked.empty()) continue;
    gaps.push_back(rig.clock.now() - since);
    since = rig.clock.now();
    rig.locks.taken(3'600'000);
  }
  EXPECT_LE(gaps[0], 31 * kMilli);
  EXPECT_GE(gaps[0], 9 * kMilli);
  for (std::size_t i = 6; i < gaps.size(); ++i) {
    EXPECT_GE(gaps[i], 124 * kMilli);
    EXPECT_LE(gaps[i], 377 * kMilli);
  }
}

TEST(LockLine, AStoreThatPushesIsAskedRarely) {
  LockRig rig;
  rig.start();
  rig.locks.taken(3'600'000);
  int asked = 0;
  for (int i = 0; i < 1000; ++i) {
    rig.run(10 * kMilli);
    if (rig.locks.asked.empty()) continue;
    ++asked;
    rig.locks.taken(3'600'000);
  }
  EXPECT_GE(asked, 5);  // in case a message was lost
  EXPECT_LE(asked, 21);
}

TEST(LockLine, ThePlaceIsLeftWithTheLastOfTheProcess) {
  LockRig rig;
  LockAcquire* first = rig.start();
  LockAcquire* second = rig.start();
  rig.locks.taken();
  first->cancel();
  EXPECT_TRUE(rig.locks.stopped.empty());
  second->cancel();
  EXPECT_EQ(rig.locks.stopped, std::vector<std::string>{"a"});
}

TEST(LockLine, WhoWasNeverRefusedHasNoPlaceToLeave) {
  LockRig rig;
  const HeldLockRef lease = rig.held();
  rig.release(lease);
  rig.locks.done();
  EXPECT_TRUE(rig.locks.stopped.empty());
}

TEST(LockLine, HandoversAreBoundedAndThenTheStoreDecides) {
  LockRig rig;
  std::vector<LockAcquire*> tasks;
  for (int i = 0; i < kMaxHandovers + 4; ++i) tasks.push_back(rig.start());
  rig.locks.hold();
  for (int i = 0; i < kMaxHandovers; ++i) {
    ASSERT_TRUE(rig.got(tasks[static_cast<std::size_t>(i)])) << i;
    rig.release(tasks[static_cast<std::size_t>(i)]->lease);
    ASSERT_EQ(rig.locks.pending(), "release a, acquire a") << i;
    rig.locks.done();
    rig.locks.hold();
  }
  // The last of the row: the next one takes a place in the store's line while the lock is held here.
  LockAcquire* last = tasks[kMaxHandovers];
  ASSERT_TRUE(rig.got(last));
  ASSERT_EQ(rig.locks.pending(), "acquire a");
  EXPECT_TRUE(rig.locks.asked[0]->queued);
  rig.locks.taken();
  rig.release(last->lease);
  EXPECT_EQ(rig.locks.pending(), "release a");
  rig.locks.done();
  rig.run(100 * kMilli);
  EXPECT_EQ(rig.locks.pending(), "");  // others have their turn
  rig.locks.freed("a");
  EXPECT_EQ(rig.locks.pending(), "acquire a");
  rig.locks.hold();
  EXPECT_TRUE(rig.got(tasks[kMaxHandovers + 1]));
  // And from the beginning.
  rig.release(tasks[kMaxHandovers + 1]->lease);
  EXPECT_EQ(rig.locks.pending(), "release a, acquire a");
}

TEST(LockLine, WhereTheMessageIsLostTheNextAsksAllTheSame) {
  LockRig rig;
  std::vector<LockAcquire*> tasks;
  for (int i = 0; i < kMaxHandovers + 2; ++i) tasks.push_back(rig.start());
  rig.locks.hold();
  for (int i = 0; i < kMaxHandovers; ++i) {
    rig.release(tasks[static_cast<std::size_t>(i)]->lease);
    rig.locks.done();
    rig.locks.hold();
  }
  rig.locks.taken();
  rig.release(tasks[kMaxHandovers]->lease);
  rig.locks.done();
  rig.pass(1600 * kMilli);
  ASSERT_EQ(rig.locks.pending(), "acquire a");
  rig.locks.hold();
  EXPECT_TRUE(rig.got(tasks[kMaxHandovers + 1]));
}

TEST(LockLine, ALostLeaseLetsTheNextAsk) {
  LockRig rig;
  const HeldLockRef lease = rig.held("a", 3000);
  LockAcquire* next = rig.start();
  EXPECT_EQ(rig.locks.pending(), "");
  rig.pass(kSecond);
  ASSERT_EQ(rig.locks.pending(), "renew a");
  rig.locks.lost();
  EXPECT_EQ(rig.fate(lease), Fate::lost);
  EXPECT_EQ(rig.locks.pending(), "acquire a");
  rig.locks.hold();
  EXPECT_TRUE(rig.got(next));
}

TEST(LockLine, ALeaseThatIsNotRenewedLetsTheNextAskAtItsEnd) {
  LockRig rig;
  const HeldLockRef lease = rig.held("a", 3000, false);
  LockAcquire* next = rig.start();
  rig.pass(2990 * kMilli);
  EXPECT_EQ(rig.locks.pending(), "");
  rig.pass(20 * kMilli);
  EXPECT_EQ(rig.locks.pending(), "acquire a");
  rig.locks.hold();
  EXPECT_TRUE(rig.got(next));
}

TEST(LockLine, ADroppedLeaseIsRenewedNoMoreAndRunsOut) {
  LockRig rig;
  HeldLockRef lease = rig.held("a", 3000);
  LockAcquire* next = rig.start();
  rig.service.drop(lease);
  lease.reset();
  ASSERT_EQ(rig.locks.pending(), "acquire a");  // to learn how long it still runs
  rig.locks.taken(3000);
  rig.pass(2990 * kMilli, kMilli);
  while (!rig.locks.asked.empty()) rig.locks.taken(10);
  EXPECT_FALSE(rig.done(next));
  rig.pass(12 * kMilli, kMilli);
  ASSERT_EQ(rig.locks.pending(), "acquire a");
  rig.locks.hold();
  EXPECT_TRUE(rig.got(next));
}

// --- timeouts -------------------------------------------------------------------------------------

TEST(LockTimeout, InLineItIsOverOnTime) {
  LockRig rig;
  rig.start();
  LockAcquire* second = rig.start(kSecond);
  rig.locks.taken();
  rig.pass(990 * kMilli);
  EXPECT_FALSE(rig.done(second));
  rig.pass(20 * kMilli);
  EXPECT_TRUE(rig.late(second));
}

TEST(LockTimeout, TheFirstInLineLeavesItsQuestionsToTheNext) {
  LockRig rig;
  LockAcquire* first = rig.start(kSecond);
  LockAcquire* second = rig.start();
  rig.locks.taken(5000);
  while (!rig.done(first)) {
    rig.run(10 * kMilli);
    while (!rig.locks.asked.empty()) rig.locks.taken(5000);
  }
  EXPECT_TRUE(rig.late(first));
  rig.pass(2 * kSecond);
  ASSERT_EQ(rig.locks.pending(), "acquire a");
  rig.locks.hold();
  EXPECT_TRUE(rig.got(second));
}

TEST(LockTimeout, AskingAgainWhatComesTooLateIsGivenBack) {
  LockRig rig;
  LockAcquire* task = rig.start(kSecond);
  rig.locks.taken(5000);
  rig.locks.freed("a");
  ASSERT_EQ(rig.locks.pending(), "acquire a");
  rig.pass(1100 * kMilli);
  EXPECT_TRUE(rig.late(task));
  rig.locks.hold();
  EXPECT_EQ(rig.locks.pending(), "release a");
  EXPECT_EQ(rig.locks.asked[0]->token, 1);
  rig.locks.done();
}

TEST(LockTimeout, WithoutAnyAnswerItIsAnErrorAndALittleLater) {
  LockRig rig;
  LockAcquire* task = rig.start(kSecond);
  rig.pass(4900 * kMilli);
  EXPECT_FALSE(rig.done(task));
  rig.pass(200 * kMilli);
  EXPECT_EQ(rig.failed(task), Code::timeout);
  rig.locks.hold();
  EXPECT_EQ(rig.locks.pending(), "release a");
}

TEST(LockTimeout, AGrantThatTookLongerThanItsLeaseIsNone) {
  LockRig rig;
  LockAcquire* task = rig.start(kForever, "a", 1000);
  const std::int64_t id = rig.locks.asked[0]->id;
  rig.run(1500 * kMilli);
  rig.locks.hold();
  EXPECT_FALSE(rig.done(task));
  ASSERT_EQ(rig.locks.pending(), "release a, acquire a");
  EXPECT_NE(rig.locks.asked[1]->id, id);
  rig.locks.done();
  rig.locks.hold();
  EXPECT_TRUE(rig.got(task));
  EXPECT_EQ(task->lease->token, 2);
}

// --- cancelled at every step ----------------------------------------------------------------------

TEST(LockCancel, InLine) {
  LockRig rig;
  LockAcquire* first = rig.start();
  LockAcquire* second = rig.start();
  LockAcquire* third = rig.start();
  rig.locks.taken();
  second->cancel();
  EXPECT_TRUE(rig.done(second) && second->outcome == Outcome::cancelled);
  rig.locks.freed("a");
  rig.locks.hold();
  ASSERT_TRUE(rig.got(first));
  rig.release(first->lease);
  rig.locks.done();
  rig.locks.hold();
  EXPECT_TRUE(rig.got(third));
}

TEST(LockCancel, AskedButNotSentIsTakenBackAndTheNextAsks) {
  LockRig rig;
  rig.locks.can_abandon = true;
  LockAcquire* first = rig.start();
  LockAcquire* second = rig.start();
  first->cancel();
  EXPECT_TRUE(rig.done(first));
  ASSERT_EQ(rig.locks.asked.size(), 1U);
  rig.locks.hold();
  EXPECT_TRUE(rig.got(second));
}

TEST(LockCancel, SentItsGrantIsGivenBackToTheNext) {
  LockRig rig;
  LockAcquire* first = rig.start();
  LockAcquire* second = rig.start();
  first->cancel();
  EXPECT_TRUE(rig.done(first));
  EXPECT_EQ(rig.locks.pending(), "acquire a, acquire a");  // the next does not wait for that answer
  rig.locks.hold();
  rig.locks.taken(30'000);  // of course: the cancelled one has it
  EXPECT_EQ(rig.locks.pending(), "release a");
  rig.locks.done();
  rig.locks.freed("a");
  rig.locks.hold();
  EXPECT_TRUE(rig.got(second));
  EXPECT_EQ(second->lease->token, 2);
}

TEST(LockCancel, SentAndRefusedItLeavesNoPlaceBehind) {
  LockRig rig;
  LockAcquire* task = rig.start();
  task->cancel();
  rig.locks.taken();
  EXPECT_EQ(rig.locks.stopped, std::vector<std::string>{"a"});
}

TEST(LockCancel, SentAndInDoubtTheTruthIsFoundOutAndGivenBack) {
  LockRig rig;
  LockAcquire* task = rig.start();
  const std::int64_t id = rig.locks.asked[0]->id;
  task->cancel();
  rig.locks.fail(Code::in_doubt);
  ASSERT_EQ(rig.locks.pending(), "acquire a");
  EXPECT_EQ(rig.locks.asked[0]->id, id);
  EXPECT_FALSE(rig.locks.asked[0]->queued);
  rig.locks.hold();
  EXPECT_EQ(rig.locks.pending(), "release a");
}

TEST(LockCancel, OfAnUnansweredReleaseChangesNothing) {
  LockRig rig;
  const HeldLockRef lease = rig.held();
  LockRelease* release = rig.release(lease);
  release->cancel();
  rig.locks.done();
  EXPECT_TRUE(rig.done(release) && release->was_held);
}

TEST(LockCancel, AResultThatNobodyReadsIsGivenBack) {
  LockRig rig;
  LockAcquire* task = rig.start();
  rig.locks.hold();
  ASSERT_TRUE(rig.got(task));
  task->orphaned();
  EXPECT_EQ(rig.locks.pending(), "release a");
}

TEST(LockCancel, AThousandInAnyOrderLeaveTheRest) {
  LockRig rig;
  std::vector<LockAcquire*> tasks;
  for (int i = 0; i < 1000; ++i) tasks.push_back(rig.start(i % 3 == 0 ? kForever : 3600 * kSecond));
  rig.locks.taken();
  for (std::size_t i = 0; i < tasks.size(); ++i)
    if ((i * 7919) % 1000 >= 5) tasks[i]->cancel();
  while (!rig.locks.asked.empty()) rig.locks.taken();
  int got = 0;
  for (int turn = 0; turn < 5; ++turn) {
    rig.locks.freed("a");
    while (rig.locks.pending() != "") {
      rig.locks.asked[0]->verb == store::LockOp::Verb::release ? rig.locks.done() : rig.locks.hold();
      for (LockAcquire* task : tasks)
        if (rig.got(task) && rig.fate(task->lease) == Fate::held) {
          ++got;
          rig.release(task->lease);
        }
    }
  }
  EXPECT_EQ(got, 5);
}

// --- lost answers and outages ---------------------------------------------------------------------

TEST(LockOutage, AnAnswerThatWasLostIsAskedForAgainUnderTheSameId) {
  LockRig rig;
  LockAcquire* task = rig.start();
  const std::int64_t id = rig.locks.asked[0]->id;
  rig.locks.fail(Code::in_doubt);
  ASSERT_EQ(rig.locks.pending(), "acquire a");
  EXPECT_EQ(rig.locks.asked[0]->id, id);
  rig.locks.fail(Code::in_doubt);
  EXPECT_EQ(rig.locks.pending(), "");
  rig.pass(200 * kMilli);
  ASSERT_EQ(rig.locks.pending(), "acquire a");
  EXPECT_EQ(rig.locks.asked[0]->id, id);
  rig.locks.hold(20'000);  // it has been running for a while
  ASSERT_TRUE(rig.got(task));
  EXPECT_LE(task->lease->remaining(rig.clock.now()), 20 * kSecond);
}

TEST(LockOutage, DoubtThatDoesNotEndIsAnError) {
  LockRig rig;
  LockAcquire* task = rig.start();
  for (int i = 0; i < 3000 && !rig.done(task); ++i) {
    while (!rig.locks.asked.empty()) rig.locks.fail(i % 2 == 0 ? Code::in_doubt : Code::unavailable);
    rig.run(10 * kMilli);
  }
  ASSERT_TRUE(rig.done(task));
  EXPECT_EQ(task->outcome, Outcome::failed);
}

TEST(LockOutage, InDoubtAtItsTimeoutItIsAnErrorNotARefusal) {
  LockRig rig;
  LockAcquire* task = rig.start(kSecond);
  for (int i = 0; i < 600 && !rig.done(task); ++i) {
    while (!rig.locks.asked.empty()) rig.locks.fail(Code::in_doubt);
    rig.run(10 * kMilli);
  }
  ASSERT_TRUE(rig.done(task));
  EXPECT_EQ(task->outcome, Outcome::failed);
}

TEST(LockOutage, ALostReleaseIsSentAgainWhileTheLeaseLasts) {
  LockRig rig;
  LockRelease* release = rig.release(rig.held("a", 3'000));
  EXPECT_EQ(rig.locks.asked[0]->deadline, rig.clock.now() + 3 * kSecond);
  rig.run(2 * kSecond);
  rig.locks.fail(Code::in_doubt);
  ASSERT_EQ(rig.locks.pending(), "release a");
  EXPECT_EQ(rig.locks.asked[0]->deadline, rig.clock.now() + kSecond);
  rig.run(2 * kSecond);
  rig.locks.fail(Code::in_doubt);
  EXPECT_EQ(rig.locks.pending(), "");  // others could have it by now
  ASSERT_TRUE(rig.done(release));
  EXPECT_EQ(release->status.code, Code::in_doubt);
  EXPECT_TRUE(release->was_held);
}

TEST(LockOutage, AFailedReleaseOfALostLeaseSaysThatItWasLost) {
  LockRig rig;
  const HeldLockRef lease = rig.held("a", 300, false);
  rig.run(kSecond);
  EXPECT_EQ(rig.fate(lease), Fate::lost);
  LockRelease* release = rig.release(lease);
  EXPECT_EQ(rig.locks.asked[0]->deadline, rig.clock.now() + kSecond);
  rig.locks.fail(Code::unavailable);
  ASSERT_TRUE(rig.done(release));
  EXPECT_EQ(release->status.code, Code::unavailable);
  EXPECT_FALSE(release->was_held);
}

TEST(LockOutage, ADeadStoreFailsOneAfterTheOtherWithoutRecursion) {
  LockRig rig;
  std::vector<LockAcquire*> tasks;
  for (int i = 0; i < 10'000; ++i) tasks.push_back(rig.start());
  int answers = 0;
  while (!rig.locks.asked.empty()) {
    rig.locks.fail(Code::unavailable);
    ++answers;
  }
  EXPECT_EQ(answers, 10'000);
  for (LockAcquire* task : tasks) ASSERT_EQ(rig.failed(task), Code::unavailable);
}

TEST(LockOutage, ALineOutlastsAFailover) {
  LockRig rig;
  LockAcquire* first = rig.start(60 * kSecond);
  LockAcquire* second = rig.start(60 * kSecond);
  rig.locks.taken(90'000);
  for (int i = 0; i < 20; ++i) {  // the store is away for some ten seconds
    rig.pass(kSecond / 2);
    if (!rig.locks.asked.empty()) rig.locks.fail(Code::unavailable);
  }
  EXPECT_FALSE(rig.done(first) || rig.done(second));
  rig.pass(kSecond / 2);
  ASSERT_EQ(rig.locks.pending(), "acquire a");
  rig.locks.hold();
  ASSERT_TRUE(rig.got(first));
  EXPECT_FALSE(rig.done(second));
}

TEST(LockOutage, WhoStandsBehindTheFirstOutlastsItToo) {
  LockRig rig;
  LockAcquire* first = rig.start(60 * kSecond);
  LockAcquire* second = rig.start(60 * kSecond);
  rig.locks.taken(90'000);
  rig.pass(2 * kSecond);
  rig.locks.fail(Code::unavailable);
  first->cancel();
  rig.pass(kSecond / 2);
  ASSERT_EQ(rig.locks.pending(), "acquire a");
  rig.locks.fail(Code::unavailable);
  EXPECT_FALSE(rig.done(second)) << "though it was never told that the lock is taken";
  rig.pass(kSecond / 2);
  rig.locks.hold();
  EXPECT_TRUE(rig.got(second));
}

TEST(LockOutage, ATimeoutDuringAnOutageIsAnErrorThatNamesIt) {
  LockRig rig;
  LockAcquire* task = rig.start(5 * kSecond);
  rig.locks.taken(90'000);
  for (int i = 0; i < 100 && !rig.done(task); ++i) {
    rig.run(100 * kMilli);
    if (!rig.locks.asked.empty()) rig.locks.fail(Code::unavailable);
  }
  EXPECT_EQ(rig.failed(task), Code::unavailable);
}

TEST(LockOutage, WhoeverWaitsWithoutEndLearnsOfALongOutageAndTheLineEnds) {
  LockRig rig;
  LockAcquire* first = rig.start();
  LockAcquire* second = rig.start();
  rig.locks.taken(90'000);
  Nanos passed = 0;
  for (; passed < 300 * kSecond && !rig.done(second); passed += kSecond / 10) {
    rig.run(kSecond / 10);
    while (!rig.locks.asked.empty()) rig.locks.fail(Code::unavailable);
  }
  EXPECT_EQ(rig.failed(first), Code::unavailable);
  EXPECT_EQ(rig.failed(second), Code::unavailable);
  EXPECT_GT(passed, 60 * kSecond);
  EXPECT_LT(passed, 65 * kSecond);
}

TEST(LockOutage, AHeldLockSurvivesAnOutageShorterThanItsTtl) {
  LockRig rig;
  const HeldLockRef lease = rig.held("a", 3000);
  for (int i = 0; i < 250; ++i) {  // 2.5 s
    while (!rig.locks.asked.empty()) rig.locks.fail(Code::unavailable);
    rig.run(10 * kMilli);
  }
  EXPECT_EQ(rig.fate(lease), Fate::held);
  for (int i = 0; i < 40 && rig.locks.asked.empty(); ++i) rig.run(10 * kMilli);
  ASSERT_EQ(rig.locks.pending(), "renew a");
  rig.locks.done();
  rig.pass(kSecond);
  EXPECT_EQ(rig.fate(lease), Fate::held);
  if (!rig.locks.asked.empty()) rig.locks.done();
}

// --- the end --------------------------------------------------------------------------------------

TEST(LockBreaking, ALeaseOfThisProcessKnowsAtOnce) {
  LockRig rig;
  const HeldLockRef lease = rig.held();
  LossSignal* signal = rig.signal(lease);
  auto* breaking = new LockBreak(rig.service);
  breaking->space = rig.space;
  breaking->name = "a";
  breaking->target = rig.arrivals;
  breaking->start();
  EXPECT_EQ(rig.locks.pending(), "break a");
  rig.locks.done();
  EXPECT_TRUE(rig.done(breaking) && breaking->was_held);
  EXPECT_EQ(rig.fate(lease), Fate::lost);
  EXPECT_TRUE(rig.done(signal) && signal->lost);
}

TEST(LockShutdown, WaitingEndsHeldIsGivenBackAndOnlyThenItSaysGoodbye) {
  LockRig rig;
  const HeldLockRef lease = rig.held("held");
  LockAcquire* asking = rig.start(kForever, "b");
  LockAcquire* waiting = rig.start(kForever, "held");
  bool goodbye = false;
  rig.service.shutdown([&] { goodbye = true; });
  EXPECT_EQ(rig.failed(asking), Code::closed);
  EXPECT_EQ(rig.failed(waiting), Code::closed);
  EXPECT_EQ(rig.locks.pending(), "acquire b, release held");
  rig.locks.hold();  // under way when it ended: given back, too
  EXPECT_FALSE(goodbye);
  rig.locks.done();
  EXPECT_FALSE(goodbye);
  EXPECT_EQ(rig.locks.pending(), "release b");
  rig.locks.done();
  EXPECT_TRUE(goodbye);
  LockAcquire* late = rig.start();
  EXPECT_EQ(rig.failed(late), Code::closed);
}

TEST(LockShutdown, TwiceEverybodyIsTold) {
  LockRig rig;
  const HeldLockRef lease = rig.held();
  int told = 0;
  rig.service.shutdown([&] { told += 1; });
  rig.service.shutdown([&] { told += 10; });
  EXPECT_EQ(told, 0);
  rig.locks.done();
  EXPECT_EQ(told, 11);
  rig.service.shutdown([&] { told += 100; });
  EXPECT_EQ(told, 111);
  rig.pass(kSecond);
  EXPECT_EQ(told, 111);
}

TEST(LockShutdown, AStoreThatDoesNotAnswerIsWaitedForOnlySoLong) {
  LockRig rig;
  const HeldLockRef lease = rig.held();
  bool goodbye = false;
  rig.service.shutdown([&] { goodbye = true; });
  EXPECT_EQ(rig.locks.pending(), "release a");
  rig.pass(690 * kMilli);
  EXPECT_FALSE(goodbye);
  rig.pass(20 * kMilli);
  EXPECT_TRUE(goodbye);
  rig.locks.done();  // too late: nobody is told twice
  EXPECT_EQ(rig.timers.size(), 0U);
}

}  // namespace
}  // namespace ratesync::engine
