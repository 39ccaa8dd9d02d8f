// Windows in the embedded store, by their promises.
#include <gtest/gtest.h>

#include <atomic>
#include <ctime>
#include <thread>
#include <vector>

#include "memory_rig.h"

namespace ratesync::memory {
namespace {

using limits::Algorithm;
using store::Verdict;

constexpr Algorithm kWindows[] = {Algorithm::fixed_window, Algorithm::sliding_counter,
                                  Algorithm::sliding_window};

store::GroupRef window(Algorithm algorithm, std::int64_t limit, Nanos length, const std::string& id = "w",
                       std::int64_t concurrent = 0) {
  limits::Params params;
  params.algorithm = algorithm;
  params.limit = limit;
  params.window = length;
  params.max_concurrent = concurrent;
  return std::make_shared<const store::Group>(id, params);
}

class MemoryWindow : public ::testing::TestWithParam<Algorithm> {
 protected:
  [[nodiscard]] store::GroupRef group(std::int64_t limit, Nanos length = 10 * kSecond,
                                      const std::string& id = "w") const {
    return window(GetParam(), limit, length, id);
  }
  int at_once(const store::GroupRef& group) {
    int granted = 0;
    while (granted < 1000 && rig.store.try_now(*group, 1).verdict == Quick::granted) ++granted;
    return granted;
  }
  Rig rig;
};

TEST_P(MemoryWindow, GrantsItsLimitAndSaysWhenTheNextComes) {
  const auto g = group(3);
  EXPECT_EQ(at_once(g), 3);
  const store::Peek seen = rig.peek(g);
  EXPECT_EQ(seen.available, 0);
  EXPECT_EQ(seen.used, 3);
  EXPECT_GT(seen.retry_after, 0);
  EXPECT_GE(seen.full_after, seen.retry_after);
  rig.clock.advance(seen.retry_after - 1);
  EXPECT_EQ(rig.store.try_now(*g, 1).verdict, Quick::refused);
  rig.clock.advance(1);
  EXPECT_EQ(rig.store.try_now(*g, 1).verdict, Quick::granted);
}

TEST_P(MemoryWindow, ARefusalChargesNothing) {
  const auto g = group(3);
  EXPECT_EQ(rig.store.try_now(*g, 2).verdict, Quick::granted);
  const QuickReply refused = rig.store.try_now(*g, 2);
  EXPECT_EQ(refused.why, Verdict::rate_limited);
  EXPECT_EQ(rig.peek(g).available, 1);
  const auto late = rig.ask(g, rig.clock.now() + refused.retry_after - 1, 2);
  EXPECT_EQ(late.verdict, Verdict::rate_limited);
  EXPECT_EQ(late.retry_after, refused.retry_after);
  EXPECT_EQ(rig.peek(g).available, 1);
  const auto in_time = rig.ask(g, rig.clock.now() + refused.retry_after, 2);
  EXPECT_EQ(in_time.verdict, Verdict::granted);
  EXPECT_EQ(in_time.wait, refused.retry_after);
  EXPECT_EQ(rig.peek(g).available, 0) << "nobody overtakes one who waits";
}

TEST_P(MemoryWindow, AChangedLimitKeepsWhatWasConsumed) {
  EXPECT_EQ(at_once(group(3)), 3);
  EXPECT_EQ(at_once(group(5)), 2);
  EXPECT_EQ(at_once(group(4)), 0);
  EXPECT_EQ(rig.peek(group(4)).used, 4);
}

TEST_P(MemoryWindow, SettleAndRefundAndReset) {
  const auto g = group(10);
  const auto first = rig.ask(g, kForever, 4);
  rig.store.settle(g, -3, [](Result<store::Unit> done) { EXPECT_TRUE(done.ok()); });
  EXPECT_EQ(rig.peek(g).available, 9);
  const auto second = rig.ask(g, kForever, 4);
  EXPECT_EQ(second.remaining, 5);
  EXPECT_EQ(rig.store.refund(g, 4, first.stamp), first.stamp) << "not the newest deal";
  EXPECT_EQ(rig.store.refund(g, 4, second.stamp), first.stamp);
  EXPECT_EQ(rig.peek(g).available, 9);
  rig.store.settle(g, 20, [](Result<store::Unit> done) { EXPECT_TRUE(done.ok()); });
  EXPECT_EQ(rig.peek(g).available, 0);
  rig.reset(g);
  EXPECT_EQ(rig.peek(g).available, 10);
  EXPECT_EQ(rig.peek(g).full_after, 0);
}

TEST_P(MemoryWindow, WaitersWhoLeaveDoNotBlockWindowsToCome) {
  const auto g = group(2);
  EXPECT_EQ(at_once(g), 2);
  const Nanos before = rig.peek(g).retry_after;
  std::vector<std::int64_t> stamps;
  for (int i = 0; i < 6; ++i) stamps.push_back(rig.ask(g).stamp);
  EXPECT_GT(rig.peek(g).retry_after, before);
  for (; !stamps.empty(); stamps.pop_back()) (void)rig.store.refund(g, 1, stamps.back());
  // What lay before the window that the counter went back to is taken as full.
  const Nanos spare = GetParam() == Algorithm::sliding_counter ? 20 * kSecond : 0;
  EXPECT_LE(rig.peek(g).retry_after, before + spare);
  rig.clock.advance(before + spare);
  EXPECT_EQ(rig.store.try_now(*g, 1).verdict, Quick::granted);
}

TEST_P(MemoryWindow, AStampFromBeforeItsStateWasForgottenRefundsNobodyElse) {
  const auto g = group(10, kSecond);
  const auto old = rig.ask(g);
  rig.reset(g);
  rig.clock.advance(5);
  const auto young = rig.ask(g);
  EXPECT_NE(old.stamp, young.stamp);
  (void)rig.store.refund(g, 1, old.stamp);
  EXPECT_EQ(rig.peek(g).available, 9);
}

TEST_P(MemoryWindow, KeysThatWentQuietAreSweptAndBusyOnesAreNot) {
  const auto busy = group(1, 86'400 * kSecond, "busy");
  EXPECT_EQ(rig.store.try_now(*busy, 1).verdict, Quick::granted);
  for (int i = 0; i < 200'000; ++i) {
    (void)rig.store.try_now(*group(5, 10 * kMilli, "k" + std::to_string(i)), 1);
    if (i % 100 == 0) rig.clock.advance(kMilli);
  }
  EXPECT_LT(rig.store.cells(), 60'000U);
  EXPECT_EQ(rig.store.try_now(*busy, 1).verdict, Quick::refused);
}

TEST_P(MemoryWindow, AnotherAlgorithmStartsAfresh) {
  EXPECT_EQ(at_once(group(3)), 3);
  limits::Params bucket;
  bucket.rate_per_second = 0.001;
  const auto token = std::make_shared<const store::Group>("w", bucket);
  EXPECT_EQ(rig.store.try_now(*token, 1).verdict, Quick::granted);
  EXPECT_EQ(at_once(group(3)), 0) << "each keeps its own";
  for (const Algorithm other : kWindows) {
    if (other == GetParam()) continue;
    const auto changed = window(other, 3, 10 * kSecond);
    EXPECT_EQ(rig.peek(changed).available, 3);
    const auto stale = rig.ask(group(3));
    EXPECT_EQ(at_once(changed), 3);
    EXPECT_EQ(rig.store.refund(group(3), 1, stale.stamp), stale.stamp);
    EXPECT_EQ(at_once(changed), 0);
    return;
  }
}

TEST_P(MemoryWindow, SlotsAndUnitsAreOneDecision) {
  const auto g = window(GetParam(), 2, 10 * kSecond, "w", 1);
  const QuickReply held = rig.store.try_now(*g, 1);
  ASSERT_EQ(held.verdict, Quick::granted);
  EXPECT_EQ(rig.store.try_now(*g, 1).why, Verdict::concurrency_full);
  EXPECT_EQ(rig.ask(g).verdict, Verdict::concurrency_full);
  EXPECT_EQ(rig.peek(g).used, 1) << "refused for the slot: not charged";
  rig.store.release_slot("w", held.holder);
  const auto again = rig.ask(g);
  EXPECT_EQ(again.remaining, 0);
  rig.store.release_slot("w", again.holder);
  EXPECT_EQ(rig.store.try_now(*g, 1).why, Verdict::rate_limited);
  EXPECT_EQ(rig.peek(g).in_use, 0) << "refused for the units: no slot taken";
}

TEST_P(MemoryWindow, SeveralLimitsAreChargedTogetherOrNotAtAll) {
  limits::Params slots;
  slots.max_concurrent = 1;
  store::AcquireAllOp* op = nullptr;
  struct All final : store::AcquireAllOp {
    void done() override { ++answers; }
    int answers = 0;
  } all;
  op = &all;
  const auto wide = group(5, 10 * kSecond, "wide"), narrow = group(2, 10 * kSecond, "narrow");
  op->parts = {{wide, 2}, {narrow, 2}, {std::make_shared<const store::Group>("slots", slots), 1}};
  rig.store.acquire_all(op);
  ASSERT_TRUE(op->granted);
  EXPECT_EQ(op->replies[0].remaining, 3);
  EXPECT_EQ(op->replies[1].remaining, 0);
  const auto stamp = op->replies[1].stamp;
  rig.store.acquire_all(op);
  EXPECT_FALSE(op->granted);
  EXPECT_EQ(op->replies[0].verdict, Verdict::granted);
  EXPECT_EQ(op->replies[1].verdict, Verdict::rate_limited);
  EXPECT_EQ(op->replies[1].retry_after, rig.store.try_now(*narrow, 2).retry_after);
  EXPECT_EQ(op->replies[2].verdict, Verdict::concurrency_full);
  EXPECT_EQ(rig.peek(wide).available, 3) << "charged nowhere";
  EXPECT_LT(rig.store.refund(narrow, 2, stamp), stamp) << "and a grant of several is refunded like one alone";
  EXPECT_EQ(rig.peek(narrow).available, 2);
  EXPECT_EQ(all.answers, 2);
}

TEST_P(MemoryWindow, ThreadsTogetherGetExactlyTheLimit) {
  // A real clock: who comes second must not find its slot a moment ahead, and go away with nothing.
  Clock clock;
  MemoryStore store(clock);
  const auto g = group(1000, 300 * 86'400 * kSecond);
  std::atomic<int> granted{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t)
    threads.emplace_back([&] {
      for (int i = 0; i < 125; ++i)
        if (store.try_now(*g, 1).verdict == Quick::granted) ++granted;
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(granted, 1000);
  EXPECT_EQ(store.try_now(*g, 1).verdict, Quick::refused);
}

std::string name_of(const ::testing::TestParamInfo<Algorithm>& info) { return limits::to_string(info.param); }
INSTANTIATE_TEST_SUITE_P(Each, MemoryWindow, ::testing::ValuesIn(kWindows), name_of);

TEST(MemoryFixedWindow, FollowsTheCalendarOfTheSystem) {
  Clock clock;
  MemoryStore store(clock);
  const Nanos length = 366LL * 86'400 * kSecond;
  const auto g = window(Algorithm::fixed_window, 1, length);
  ASSERT_EQ(store.try_now(*g, 1).verdict, Quick::granted);
  const Nanos expected = length - static_cast<Nanos>(std::time(nullptr)) * kSecond % length;
  EXPECT_NEAR(static_cast<double>(store.try_now(*g, 1).retry_after), static_cast<double>(expected), 3e9);
}

TEST(MemoryFixedWindow, IsAtOneWithItsManualClock) {
  Rig rig;  // 1000 s after its epoch
  const auto g = window(Algorithm::fixed_window, 1, 60 * kSecond);
  ASSERT_EQ(rig.store.try_now(*g, 1).verdict, Quick::granted);
  EXPECT_EQ(rig.store.try_now(*g, 1).retry_after, 20 * kSecond);
}

}  // namespace
}  // namespace ratesync::memory
