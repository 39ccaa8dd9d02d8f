// The embedded store by its promises: nobody is granted more than the limit, nobody overtakes, a
// reset forgets, idle groups cost nothing, and any thread may ask.
#include "ratesync/memory/memory_store.h"

#include <gtest/gtest.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "memory_rig.h"

namespace ratesync::memory {
namespace {

using store::Verdict;

store::GroupRef group(double rate, std::int64_t burst, std::int64_t concurrent, const std::string& id = "g") {
  limits::Params params;
  params.rate_per_second = rate;
  params.burst = burst;
  params.max_concurrent = concurrent;
  params.timing_margin = 0;
  return std::make_shared<const store::Group>(id, params);
}

TEST(MemoryStore, ARefusalChargesNothing) {
  Rig rig;
  const auto g = group(1, 2, 0);
  EXPECT_EQ(rig.store.try_now(*g, 2).verdict, Quick::granted);
  const QuickReply refused = rig.store.try_now(*g, 1);
  EXPECT_EQ(refused.verdict, Quick::refused);
  EXPECT_EQ(refused.retry_after, kSecond);
  EXPECT_EQ(rig.peek(g).full_after, 2 * kSecond);
  EXPECT_EQ(rig.ask(g, rig.clock.now() + kSecond - 1).verdict, Verdict::rate_limited);
  EXPECT_EQ(rig.peek(g).full_after, 2 * kSecond);
  EXPECT_EQ(rig.ask(g, rig.clock.now() + kSecond).wait, kSecond);  // the deadline is the slot: in time
}

TEST(MemoryStore, AFullSemaphoreTakesNoRate) {
  Rig rig;
  const auto g = group(1, 5, 1);
  EXPECT_EQ(rig.store.try_now(*g, 1).verdict, Quick::granted);
  EXPECT_EQ(rig.store.try_now(*g, 1).why, Verdict::concurrency_full);
  EXPECT_EQ(rig.ask(g).verdict, Verdict::concurrency_full);
  EXPECT_EQ(rig.peek(g).full_after, kSecond);
}

TEST(MemoryStore, TheShortWayIsClosedWhileOthersWait) {
  Rig rig;
  const auto g = group(0, 1, 2);
  rig.store.set_waiters("g", 1);
  EXPECT_EQ(rig.store.try_now(*g, 1).verdict, Quick::refused);
  rig.store.set_waiters("g", 0);
  EXPECT_EQ(rig.store.try_now(*g, 1).verdict, Quick::granted);
}

TEST(MemoryStore, ReleaseTellsWhetherSomebodyWaits) {
  Rig rig;
  const auto g = group(0, 1, 1);
  const QuickReply held = rig.store.try_now(*g, 1);
  rig.store.set_waiters("g", 3);
  EXPECT_TRUE(rig.store.release_slot("g", held.holder));
  EXPECT_FALSE(rig.store.release_slot("g", held.holder)) << "nothing is held any more";
  EXPECT_EQ(rig.peek(g).in_use, 0);
}

TEST(MemoryStore, ASlotFromBeforeAResetFreesNobodyElses) {
  Rig rig;
  const auto g = group(0, 1, 1);
  const QuickReply old = rig.store.try_now(*g, 1);
  rig.reset(g);
  const QuickReply young = rig.store.try_now(*g, 1);
  ASSERT_EQ(young.verdict, Quick::granted);
  EXPECT_FALSE(rig.store.release_slot("g", old.holder));
  EXPECT_EQ(rig.store.try_now(*g, 1).verdict, Quick::refused);
  rig.store.release_slot("g", young.holder);
  EXPECT_EQ(rig.peek(g).in_use, 0);
}

TEST(MemoryStore, NorDoesOneWhoseGroupWasForgottenInBetween) {
  Rig rig;
  const auto g = group(0, 1, 1);
  const QuickReply old = rig.store.try_now(*g, 1);
  rig.reset(g);
  for (int i = 0; i < 50'000; ++i)
    (void)rig.store.try_now(*group(1e6, 1, 0, "filler" + std::to_string(i)), 1);
  rig.clock.advance(kSecond);
  for (int i = 0; i < 50'000; ++i) (void)rig.store.try_now(*group(1e6, 1, 0, "more" + std::to_string(i)), 1);
  ASSERT_EQ(rig.store.try_now(*g, 1).verdict, Quick::granted);
  rig.store.release_slot("g", old.holder);
  EXPECT_EQ(rig.peek(g).in_use, 1);
}

TEST(MemoryStore, OnlyTheNewestDealIsRefunded) {
  Rig rig;
  const auto g = group(1, 1, 0);
  (void)rig.ask(g);
  const auto second = rig.ask(g);
  const auto third = rig.ask(g);
  EXPECT_EQ(rig.store.refund(g, 1, second.stamp), second.stamp) << "the third would lose its time";
  EXPECT_EQ(rig.peek(g).full_after, 3 * kSecond);
  EXPECT_EQ(rig.store.refund(g, 1, third.stamp), second.stamp);
  EXPECT_EQ(rig.store.refund(g, 1, second.stamp), second.stamp - kSecond)
      << "and now the second is the newest";
  EXPECT_EQ(rig.peek(g).full_after, kSecond);
}

TEST(MemoryStore, NoSumOverflows) {
  Rig rig;
  const auto g = group(1e-9, 1, 0);  // one unit in 31 years
  for (int i = 0; i < 100; ++i) (void)rig.ask(g);
  EXPECT_EQ(rig.ask(g).verdict, Verdict::rate_limited) << "63 years ahead is the end, whatever the deadline";
  for (int i = 0; i < 100; ++i) rig.store.settle(g, 1, [](Result<store::Unit>) {});
  EXPECT_EQ(rig.store.try_now(*g, 1).verdict, Quick::refused);
  EXPECT_GT(rig.peek(g).full_after, 0);
  for (int i = 0; i < 100; ++i) rig.store.settle(g, -1, [](Result<store::Unit>) {});
  EXPECT_EQ(rig.store.try_now(*g, 1).verdict, Quick::granted);
  EXPECT_EQ(rig.store.try_now(*g, 1).verdict, Quick::refused) << "units never charged cannot be saved up";
}

TEST(MemoryStore, IdleGroupsAreForgottenAndBusyOnesAreNot) {
  Rig rig;
  const auto held = group(0, 1, 1, "held");
  (void)rig.store.try_now(*held, 1);
  const Pin pin = rig.store.pin("pinned");
  const auto charged = group(0.001, 1, 0, "charged");
  (void)rig.store.try_now(*charged, 1);
  for (int i = 0; i < 200'000; ++i) {
    (void)rig.store.try_now(*group(1000, 1, 0, "k" + std::to_string(i)), 1);
    if (i % 100 == 0) rig.clock.advance(kMilli);
  }
  EXPECT_LT(rig.store.cells(), 60'000U);
  EXPECT_EQ(rig.peek(held).in_use, 1);
  EXPECT_EQ(rig.store.try_now(*charged, 1).verdict, Quick::refused);
  EXPECT_EQ(rig.store.try_now(*pin.shard(), *pin.cell(), *group(1, 1, 0, "pinned"), 1).verdict,
            Quick::granted);
}

TEST(MemoryStore, ThreadsTogetherGetExactlyTheLimit) {
  Rig rig;
  const auto rated = group(1e-3, 500, 0, "rated");
  const auto counted = group(0, 1, 3, "counted");
  std::atomic<int> granted{0}, inside{0}, most{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 2000; ++i) {
        if (rig.store.try_now(*rated, 1).verdict == Quick::granted) ++granted;
        const QuickReply reply = rig.store.try_now(*counted, 1);
        if (reply.verdict != Quick::granted) continue;
        const int now = ++inside;
        int seen = most.load();
        while (now > seen && !most.compare_exchange_weak(seen, now)) {
        }
        --inside;
        rig.store.release_slot("counted", reply.holder);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(granted, 500);
  EXPECT_LE(most, 3);
  EXPECT_EQ(rig.peek(counted).in_use, 0);
}

TEST(MemoryStore, ListingIsBoundedAndSaysSo) {
  Rig rig;
  for (int i = 0; i < 100; ++i) (void)rig.store.try_now(*group(1, 1, 1, "g" + std::to_string(i)), 1);
  std::size_t groups = 0;
  bool truncated = false;
  const auto read = [&](Result<store::Listing> listing) {
    groups = listing.value().groups.size();
    truncated = listing.value().truncated;
  };
  rig.store.list(10, read);
  EXPECT_EQ(groups, 10U);
  EXPECT_TRUE(truncated);
  rig.store.list(1000, read);
  EXPECT_EQ(groups, 100U);
  EXPECT_FALSE(truncated);
}

// --- several limits at once -------------------------------------------------------------------------

struct All final : store::AcquireAllOp {
  void done() override { ++answers; }
  int answers = 0;
};

store::Part part_of(const std::string& id, double rate, std::int64_t burst, std::int64_t concurrent,
                    std::int64_t cost = 1) {
  limits::Params p;
  p.rate_per_second = rate;
  p.burst = burst;
  p.max_concurrent = concurrent;
  p.timing_margin = 0;
  return {std::make_shared<const store::Group>(id, p), cost};
}

TEST(AcquireAll, AllOrNothingAndEachPartSaysWhy) {
  Clock clock(true);
  MemoryStore store(clock);
  All op;
  op.parts = {part_of("rate", 1, 2, 0), part_of("slots", 0, 1, 1), part_of("both", 1, 5, 9)};
  store.acquire_all(&op);
  ASSERT_TRUE(op.granted);
  EXPECT_EQ(op.replies[0].remaining, 1);
  EXPECT_EQ(op.replies[1].remaining, 0);
  EXPECT_NE(op.replies[2].holder, 0U);
  store.acquire_all(&op);
  EXPECT_EQ(op.answers, 2);
  EXPECT_FALSE(op.granted);
  EXPECT_EQ(op.replies[0].verdict, store::Verdict::granted);
  EXPECT_EQ(op.replies[1].verdict, store::Verdict::concurrency_full);
  store.release(op.parts[1].group, 1);
  store.acquire_all(&op);
  EXPECT_TRUE(op.granted) << "the refusal charged nothing";
  store.release(op.parts[1].group, 1);
  store.acquire_all(&op);
  EXPECT_EQ(op.replies[0].verdict, store::Verdict::rate_limited);
  EXPECT_EQ(op.replies[0].retry_after, kSecond);
  EXPECT_EQ(op.replies[1].verdict, store::Verdict::granted);
}

TEST(AcquireAll, TheQuickFormOvertakesNobodyWhoWaits) {
  Clock clock(true);
  MemoryStore store(clock);
  const std::vector<store::Part> parts = {part_of("a", 0, 1, 5), part_of("b", 1, 5, 0)};
  std::vector<store::AcquireReply> replies;
  store.set_waiters("a", 1);
  EXPECT_FALSE(store.try_all_now(parts, &replies));
  EXPECT_EQ(replies[0].verdict, store::Verdict::concurrency_full);
  All op;
  op.parts = parts;
  store.acquire_all(&op);
  EXPECT_TRUE(op.granted) << "the engine asks for those who wait";
  store.set_waiters("a", 0);
  EXPECT_TRUE(store.try_all_now(parts, &replies));
}

TEST(AcquireAll, ThreadsWithOverlappingSetsInAnyOrderNeverExceedNorDeadlock) {
  Clock clock(true);
  MemoryStore store(clock);
  std::vector<std::string> ids;
  for (int i = 0; i < 40; ++i) ids.push_back("k" + std::to_string(i));
  std::atomic<int> granted{0};
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 4; ++t)
    threads.emplace_back([&, seed = t] {
      std::vector<store::AcquireReply> replies;
      for (unsigned i = 0; i < 5000; ++i) {
        const unsigned first = (seed * 7919 + i * 104729) % 40;
        const unsigned second = (first + 1 + i % 39) % 40;
        const std::vector<store::Part> parts = {part_of(ids[first], 0, 1, 1), part_of("all", 1, 1000, 0),
                                                part_of(ids[second], 0, 1, 1)};
        if (!store.try_all_now(parts, &replies)) continue;
        ++granted;
        store.release(parts[0].group, replies[0].holder);
        store.release(parts[2].group, replies[2].holder);
      }
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(granted, 1000);
  for (const std::string& id : ids)
    store.peek(part_of(id, 0, 1, 1).group,
               [](Result<store::Peek> seen) { EXPECT_EQ(seen.value().in_use, 0); });
}

TEST(AcquireAll, MillionsOfKeysAreSweptWhileOneOfThemIsAsked) {
  Clock clock(true);
  MemoryStore store(clock);
  std::vector<store::AcquireReply> replies;
  for (int i = 0; i < 60'000; ++i) {
    clock.advance(2 * kSecond);
    ASSERT_TRUE(store.try_all_now(
        {part_of("x" + std::to_string(i), 1, 1, 0), part_of("y" + std::to_string(i), 1, 1, 0)}, &replies));
  }
  EXPECT_LT(store.cells(), 40'000U);
}

}  // namespace
}  // namespace ratesync::memory
