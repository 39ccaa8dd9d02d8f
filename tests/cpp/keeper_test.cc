// Leases kept alive: renewed in time, lost exactly once, never revived.
#include "ratesync/engine/keeper.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <vector>

#include "ratesync/engine/kept_row.h"
#include "slow_locks.h"

namespace ratesync::engine {
namespace {

// A lease whose renewals the test answers.
class Scripted final : public Kept {
 public:
  using Kept::Kept;
  void ask(std::int64_t ttl_ms) override {
    asked.push_back(ttl_ms);
    ++open;
  }
  void on_lost() override { ++losses; }
  void answer(Keeper::Answer answer) {
    --open;
    keeper().answered(*this, answer, Status::make(Code::unavailable, "scripted"));
  }
  std::vector<std::int64_t> asked;
  int losses = 0;
  int open = 0;
};

struct Rig : KeeperRig {
  ~Rig() {
    keeper.shutdown();
    arrivals->forget();
    for (const auto& kept : all)
      while (kept->open > 0) kept->answer(Keeper::Answer::failed);
    arrivals->forget();
  }
  std::shared_ptr<Scripted> keep(std::int64_t ttl_ms = 3000, bool auto_renew = true) {
    auto kept = std::make_shared<Scripted>(keeper, ttl_ms, auto_renew, clock.now() + ttl_ms * kMilli);
    keeper.keep(kept, clock.now());
    all.push_back(kept);
    return kept;
  }

  std::vector<std::shared_ptr<Scripted>> all;
};

using Answer = Keeper::Answer;
using Fate = Kept::Fate;

TEST(Keeper, RenewsAtAThirdOfTheTtlAndCountsFromTheSending) {
  Rig rig;
  const auto kept = rig.keep(3000);
  rig.pass(790 * kMilli);
  EXPECT_TRUE(kept->asked.empty());
  rig.pass(215 * kMilli);
  ASSERT_EQ(kept->asked, std::vector<std::int64_t>{3000});
  const Nanos left = kept->remaining(rig.clock.now());
  rig.pass(500 * kMilli);  // the answer takes its time
  kept->answer(Answer::held);
  // From the sending, which was when the remaining time was `left`: 500 ms ago, and a step at most.
  EXPECT_LE(kept->remaining(rig.clock.now()), 2500 * kMilli);
  EXPECT_GT(kept->remaining(rig.clock.now()), 2200 * kMilli);
  EXPECT_LT(left, 2300 * kMilli);
  rig.pass(505 * kMilli);
  EXPECT_EQ(kept->asked.size(), 2U);
}

TEST(Keeper, LivesAsLongAsRenewalsAreAnswered) {
  Rig rig;
  const auto kept = rig.keep(300);
  for (int i = 0; i < 200; ++i) {
    rig.pass(100 * kMilli);
    if (!kept->asked.empty()) kept->answer(Answer::held);
    kept->asked.clear();
    ASSERT_EQ(rig.fate(kept), Fate::held);
  }
}

TEST(Keeper, TriesAgainAfterFailuresUntilTheEndAndIsLostOnce) {
  Rig rig;
  const auto kept = rig.keep(3000);
  LossSignal* signal = rig.signal(kept);
  std::size_t tries = 0;
  for (int i = 0; i < 590; ++i) {
    rig.run(5 * kMilli);
    if (kept->asked.empty()) continue;
    ++tries;
    kept->asked.clear();
    kept->answer(Answer::failed);
  }
  EXPECT_EQ(rig.fate(kept), Fate::held);
  EXPECT_GE(tries, 3U);
  EXPECT_LE(tries, 20U);
  EXPECT_FALSE(rig.arrivals->has(signal));
  rig.pass(100 * kMilli);
  EXPECT_EQ(rig.fate(kept), Fate::lost);
  EXPECT_EQ(kept->losses, 1);
  ASSERT_TRUE(rig.arrivals->has(signal));
  EXPECT_TRUE(signal->lost);
  kept->asked.clear();
  rig.pass(5 * kSecond);
  EXPECT_TRUE(kept->asked.empty());
  EXPECT_EQ(kept->losses, 1);
  EXPECT_EQ(rig.timers.size(), 0U);
}

TEST(Keeper, AFailureOnceIsNoLoss) {
  Rig rig;
  const auto kept = rig.keep(3000);
  rig.pass(kSecond);
  kept->answer(Answer::failed);
  kept->asked.clear();
  rig.pass(300 * kMilli);
  ASSERT_EQ(kept->asked.size(), 1U);
  kept->answer(Answer::held);
  rig.pass(2 * kSecond);
  EXPECT_EQ(rig.fate(kept), Fate::held);
}

TEST(Keeper, TheStoreSaysLost) {
  Rig rig;
  const auto kept = rig.keep();
  LossSignal* first = rig.signal(kept);
  LossSignal* second = rig.signal(kept);
  rig.pass(kSecond);
  kept->answer(Answer::lost);
  EXPECT_EQ(rig.fate(kept), Fate::lost);
  EXPECT_EQ(kept->losses, 1);
  EXPECT_TRUE(first->lost && second->lost);
  EXPECT_TRUE(rig.signal(kept)->lost);  // asked for afterwards
  EXPECT_EQ(rig.arrivals->arrived.size(), 3U);
  EXPECT_EQ(rig.keeper.kept(), 0U);
}

TEST(Keeper, AnAnswerAfterTheEndRevivesNothing) {
  Rig rig;
  const auto kept = rig.keep(3000);
  rig.pass(kSecond);
  ASSERT_EQ(kept->asked.size(), 1U);
  rig.clock.advance(2 * kSecond);  // the process stood still; the answer is read before any timer
  kept->answer(Answer::held);
  EXPECT_EQ(rig.fate(kept), Fate::lost);
  EXPECT_EQ(kept->losses, 1);
  rig.run();
  EXPECT_EQ(kept->losses, 1);
}

TEST(Keeper, ATimerThatComesTooLateLooksAtTheClockFirst) {
  Rig rig;
  const auto kept = rig.keep(3000);
  LossSignal* signal = rig.signal(kept);
  rig.run(10 * kSecond);
  EXPECT_TRUE(kept->asked.empty());  // no renewal of what is over
  EXPECT_EQ(kept->losses, 1);
  EXPECT_TRUE(rig.arrivals->has(signal) && signal->lost);
}

TEST(Keeper, WhoSeesTheEndFirstMakesItFinal) {
  Rig rig;
  const auto kept = rig.keep(3000);
  LossSignal* signal = rig.signal(kept);
  rig.pass(kSecond);
  rig.clock.advance(2 * kSecond);
  EXPECT_EQ(rig.fate(kept), Fate::lost);  // another thread reads `lost`
  EXPECT_EQ(kept->losses, 0);
  kept->answer(Answer::held);
  EXPECT_EQ(rig.fate(kept), Fate::lost);
  EXPECT_EQ(kept->losses, 1);
  EXPECT_TRUE(signal->lost);
}

TEST(Keeper, WithoutRenewalsItIsLostAtTheEnd) {
  Rig rig;
  const auto kept = rig.keep(3000, false);
  rig.pass(2990 * kMilli);
  EXPECT_EQ(rig.fate(kept), Fate::held);
  rig.pass(20 * kMilli);
  EXPECT_EQ(rig.fate(kept), Fate::lost);
  EXPECT_EQ(kept->losses, 1);
  EXPECT_TRUE(kept->asked.empty());
}

TEST(Keeper, EndedIsNotLost) {
  Rig rig;
  const auto kept = rig.keep();
  LossSignal* signal = rig.signal(kept);
  rig.pass(kSecond);
  ASSERT_EQ(kept->asked.size(), 1U);
  EXPECT_TRUE(rig.keeper.end(kept));
  EXPECT_TRUE(rig.arrivals->has(signal));
  EXPECT_FALSE(signal->lost);
  kept->answer(Answer::lost);  // of course: it is given back
  EXPECT_EQ(rig.fate(kept), Fate::ended);
  EXPECT_EQ(kept->losses, 0);
  EXPECT_FALSE(rig.keeper.end(kept));
  EXPECT_EQ(rig.timers.size(), 0U);
}

TEST(Keeper, ALongerTtlCountsWhenTheStoreHasIt) {
  Rig rig;
  const auto kept = rig.keep(3000, false);
  Extension* longer = rig.extend(kept, 60'000);
  ASSERT_EQ(kept->asked, std::vector<std::int64_t>{60'000});
  EXPECT_LE(kept->remaining(rig.clock.now()), 3 * kSecond);
  kept->answer(Answer::held);
  EXPECT_TRUE(rig.arrivals->has(longer) && longer->status.ok() && !longer->lost);
  rig.pass(50 * kSecond);
  EXPECT_EQ(rig.fate(kept), Fate::held);
  EXPECT_EQ(kept->ttl_ms(), 60'000);
}

TEST(Keeper, AShorterTtlCountsAtOnceSinceTheStoreMayHaveIt) {
  Rig rig;
  const auto kept = rig.keep(60'000, false);
  Extension* shorter = rig.extend(kept, 1000);
  EXPECT_LE(kept->remaining(rig.clock.now()), kSecond);
  rig.pass(2 * kSecond);
  EXPECT_EQ(rig.fate(kept), Fate::lost);
  kept->answer(Answer::held);
  EXPECT_TRUE(rig.arrivals->has(shorter) && shorter->lost);
}

TEST(Keeper, AnExtensionWaitsForTheRenewalUnderWayAndSetsThePaceFromThenOn) {
  Rig rig;
  const auto kept = rig.keep(3000);
  rig.pass(kSecond);
  Extension* extension = rig.extend(kept, 9000);
  EXPECT_EQ(kept->asked, std::vector<std::int64_t>{3000});
  kept->answer(Answer::held);
  ASSERT_EQ(kept->asked, (std::vector<std::int64_t>{3000, 9000}));
  EXPECT_FALSE(rig.arrivals->has(extension));
  kept->answer(Answer::held);
  EXPECT_TRUE(rig.arrivals->has(extension) && !extension->lost);
  rig.pass(2300 * kMilli);
  EXPECT_EQ(kept->asked.size(), 2U);
  rig.pass(800 * kMilli);
  EXPECT_EQ(kept->asked, (std::vector<std::int64_t>{3000, 9000, 9000}));
}

TEST(Keeper, AnExtensionThatFailsSaysSoAndLosesNothing) {
  Rig rig;
  const auto kept = rig.keep(3000);
  Extension* extension = rig.extend(kept, 9000);
  kept->answer(Answer::failed);
  ASSERT_TRUE(rig.arrivals->has(extension));
  EXPECT_EQ(extension->status.code, Code::unavailable);
  EXPECT_FALSE(extension->lost);
  EXPECT_EQ(rig.fate(kept), Fate::held);
  EXPECT_EQ(kept->ttl_ms(), 3000);
}

TEST(Keeper, ExtensionsInLineEndWithTheLease) {
  Rig rig;
  const auto kept = rig.keep(3000);
  Extension* sent = rig.extend(kept, 5000);
  Extension* waiting = rig.extend(kept, 6000);
  rig.run(4 * kSecond);
  EXPECT_TRUE(rig.arrivals->has(waiting) && waiting->lost);
  EXPECT_FALSE(rig.arrivals->has(sent));  // it is in the store
  kept->answer(Answer::held);
  EXPECT_TRUE(rig.arrivals->has(sent) && sent->lost);
  Extension* after = rig.extend(kept, 6000);
  EXPECT_TRUE(rig.arrivals->has(after) && after->lost);
  EXPECT_EQ(kept->losses, 1);
}

TEST(Keeper, ASignalCanBeCancelledAndAskedForAgain) {
  Rig rig;
  const auto kept = rig.keep(3000, false);
  LossSignal* first = rig.signal(kept);
  LossSignal* second = rig.signal(kept);
  first->cancel();
  EXPECT_TRUE(rig.arrivals->has(first));
  first->cancel();
  EXPECT_EQ(rig.arrivals->arrived.size(), 1U);
  rig.pass(3100 * kMilli);
  EXPECT_TRUE(rig.arrivals->has(second) && second->lost);
  EXPECT_EQ(rig.arrivals->arrived.size(), 2U);
}

TEST(Keeper, ShutdownLeavesNobodyWaiting) {
  Rig rig;
  const auto kept = rig.keep(3000);
  LossSignal* signal = rig.signal(kept);
  rig.pass(kSecond);
  rig.keeper.shutdown();
  ASSERT_TRUE(rig.arrivals->has(signal));
  EXPECT_EQ(signal->status.code, Code::closed);
  kept->answer(Answer::failed);  // the store closes
  EXPECT_EQ(rig.timers.size(), 0U);
  LossSignal* late = rig.signal(kept);
  EXPECT_EQ(late->status.code, Code::closed);
  Extension* extension = rig.extend(kept, 1000);
  EXPECT_EQ(extension->status.code, Code::closed);
}

TEST(Keeper, AnAbsurdTtlDoesNotOverflow) {
  Rig rig;
  const auto kept = rig.keep(3000);
  rig.extend(kept, kForever);
  kept->answer(Answer::held);
  rig.pass(20 * kSecond);
  EXPECT_EQ(rig.fate(kept), Fate::held);
}

// --- rows of the state ----------------------------------------------------------------------------

struct SlowRows final : store::StateStore {
  void submit(store::StateOp* op) override { asked.push_back(op); }
  void submit(store::StateBatch*) override {}
  bool abandon(store::StateOp*) override { return false; }
  bool abandon(store::StateBatch*) override { return false; }
  void scan(const store::SpaceRef&, const std::string&, const std::string&, const std::string&, std::size_t,
            store::Callback<store::StatePage>) override {}
  void claim_due(const store::SpaceRef&, const std::string&, std::size_t, std::int64_t,
                 store::Callback<std::vector<store::DueKey>>) override {}
  void purge(std::size_t, store::Callback<std::int64_t>) override {}
  void initialize(store::Callback<store::Unit>) override {}
  std::vector<store::StateOp*> asked;
};

TEST(KeptRow, IsTouchedInItsVersionAndLostWithIt) {
  Rig rig;
  SlowRows rows;
  const auto row = std::make_shared<KeptRow>(rig.keeper, rows, std::make_shared<const store::Space>(), "idem",
                                             "k", 7, 3000, rig.clock.now() + 3 * kSecond);
  rig.keeper.keep(row, rig.clock.now());
  rig.pass(kSecond);
  ASSERT_EQ(rows.asked.size(), 1U);
  store::StateOp* touch = rows.asked.back();
  EXPECT_EQ(touch->verb, store::StateOp::Verb::touch);
  EXPECT_EQ(touch->kind + "/" + touch->key, "idem/k");
  EXPECT_EQ(touch->expected, 7);
  EXPECT_EQ(touch->ttl, 3000);
  touch->done();
  EXPECT_EQ(rig.fate(row), Fate::held);
  rig.pass(kSecond);
  ASSERT_EQ(rows.asked.size(), 2U);
  touch->reply.outcome = store::StateReply::Outcome::stale;
  touch->done();
  EXPECT_EQ(rig.fate(row), Fate::lost);
}

// --- any thread -----------------------------------------------------------------------------------

TEST(KeeperRace, NoReaderSeesALeaseComeBack) {
  for (int round = 0; round < 300; ++round) {
    Clock clock(true);
    asio::io_context io;
    Timers timers(io, clock);
    Keeper keeper(timers, 1);
    const auto kept = std::make_shared<Scripted>(keeper, 10, true, clock.now() + 10 * kMilli);
    keeper.keep(kept, clock.now());
    std::atomic<bool> stop{false};
    std::atomic<int> revived{0};
    std::vector<std::thread> readers;
    for (int i = 0; i < 2; ++i)
      readers.emplace_back([&] {
        bool lost = false;
        while (!stop) {
          const bool now = kept->fate(clock.now()) == Fate::lost;
          if (lost && !now) ++revived;
          if (now && kept->remaining(clock.now()) != 0) ++revived;
          lost = now;
        }
      });
    for (int i = 0; i < 60; ++i) {
      clock.advance((round % 7 + 1) * kMilli);
      if (!kept->asked.empty()) {
        kept->asked.clear();
        kept->answer(Answer::held);
      }
      timers.run_due();
    }
    stop = true;
    for (std::thread& reader : readers) reader.join();
    EXPECT_EQ(revived, 0);
    EXPECT_LE(kept->losses, 1);
    while (kept->open > 0) kept->answer(Answer::failed);
    keeper.shutdown();
  }
}

}  // namespace
}  // namespace ratesync::engine
