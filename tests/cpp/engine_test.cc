// The engine with its I/O thread: queues of results that are closed or given up, and races of
// submit, cancel, release, shutdown and a moving clock - for TSan above all.
#include "ratesync/engine/engine.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

namespace ratesync::engine {
namespace {

limits::Params params(double rate, std::int64_t concurrent) {
  limits::Params p;
  p.rate_per_second = rate;
  p.max_concurrent = concurrent;
  p.timing_margin = 0;
  return p;
}

TEST(Loop, ClosedTargetOrphansWhatComesLaterAlsoWhenThatWakesOthers) {
  Engine engine(false);
  StoreEntry* entry = engine.add_store("m", "memory", {}).value();
  auto limiter = std::make_shared<LimiterCore>();
  limiter->group = std::make_shared<const store::Group>("g", params(0, 1));
  limiter->service = entry->limits.get();
  auto target = std::make_shared<LoopTarget>();
  const auto start = [&] {
    auto* task = new AcquireTask(limiter);
    task->group = limiter->group;
    task->submitted = engine.clock().now();
    task->target = target;
    ASSERT_TRUE(engine.submit(StartTask{task}));
  };
  EXPECT_EQ(target->close(), nullptr);
  for (int i = 0; i < 100; ++i) start();  // each is granted, orphaned, and so grants the next
  engine.shutdown();
  int left = 0;
  for (Completion* completion = target->take(); completion; ++left) {
    Completion* next = completion->next;
    completion->unref();
    completion = next;
  }
  EXPECT_EQ(left, 100);
  EXPECT_EQ(limiter->counters.held, 0);
}

struct Plain final : Completion {
  void orphaned() override {}
};

// A reader that was awake already takes what comes before it is signalled.
TEST(Loop, ReaderMayLetGoOfTheTargetWhileItIsToldOfTheLast) {
  for (int round = 0; round < 2'000; ++round) {
    auto* completion = new Plain;
    auto target = std::make_shared<LoopTarget>();
    LoopTarget* const raw = target.get();
    completion->target = std::move(target);  // keeps it alone
    std::thread reader([raw] {
      Completion* taken = nullptr;
      while (!taken) taken = raw->take();
      taken->unref();
    });
    raw->deliver(completion);
    reader.join();
  }
}

TEST(Sync, OneThatGaveUpLeavesNothing) {
  for (int round = 0; round < 200; ++round) {
    Engine engine(false);
    StoreEntry* entry = engine.add_store("m", "memory", {}).value();
    auto limiter = std::make_shared<LimiterCore>();
    limiter->group = std::make_shared<const store::Group>("g", params(0, 1));
    limiter->service = entry->limits.get();
    auto target = std::make_shared<SyncTarget>();
    auto* task = new AcquireTask(limiter);
    task->group = limiter->group;
    task->target = target;
    ASSERT_TRUE(engine.submit(StartTask{task}));
    if (Completion* done = target->give_up()) {
      auto* granted = static_cast<AcquireTask*>(done);
      engine.submit(GiveBack{limiter, granted->group, 1, false, {}, granted->permit});
      done->unref();
    }
    engine.shutdown();
    EXPECT_EQ(limiter->counters.held, 0);
  }
}

// One caller: acquires, sometimes cancels, reads the answer, and gives back what it was granted.
void call_many(Engine& engine, const LimiterRef& limiter, int times, unsigned seed) {
  for (int i = 0; i < times; ++i) {
    seed = seed * 1664525U + 1013904223U;
    auto target = std::make_shared<SyncTarget>();
    auto* task = new AcquireTask(limiter);
    task->group = limiter->group;
    task->submitted = engine.clock().now();
    task->deadline = saturating_add(task->submitted, (seed >> 8) % 4 == 0 ? 100 * kMicro : kForever);
    task->target = target;
    task->ref();
    if (!engine.submit(StartTask{task})) {
      task->unref();
      task->unref();
      return;
    }
    if ((seed >> 12) % 3 == 0) {
      task->ref();
      if (!engine.submit(CancelTask{task})) task->unref();
    }
    while (!target->wait(kSecond)) {
    }
    if (task->outcome == Outcome::granted && task->permit) {
      if ((seed >> 16) % 2 == 0) {
        engine.submit(ReleasePermit{task->permit});
      } else {
        engine.submit(GiveBack{limiter,
                               task->group,
                               1,
                               task->charged_rate,
                               {task->submitted + task->waited, task->stamp},
                               task->permit});
      }
    }
    task->unref();
    task->unref();
  }
}

TEST(Races, SubmitCancelReleaseFromManyThreads) {
  Engine engine(false);
  StoreEntry* entry = engine.add_store("m", "memory", {}).value();
  auto limiter = std::make_shared<LimiterCore>();
  limiter->group = std::make_shared<const store::Group>("g", params(1e6, 2));
  limiter->service = entry->limits.get();
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 6; ++t) threads.emplace_back([&, t] { call_many(engine, limiter, 300, t); });
  for (std::thread& thread : threads) thread.join();
  engine.shutdown();
  EXPECT_EQ(limiter->counters.held, 0);
  EXPECT_EQ(entry->limits->waiting(), 0U);
}

TEST(Races, ShutdownInTheMiddleAnswersEverybody) {
  for (int round = 0; round < 30; ++round) {
    Engine engine(false);
    StoreEntry* entry = engine.add_store("m", "memory", {}).value();
    auto limiter = std::make_shared<LimiterCore>();
    limiter->group = std::make_shared<const store::Group>("g", params(0, 1));
    limiter->service = entry->limits.get();
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < 4; ++t)
      threads.emplace_back([&, t] { call_many(engine, limiter, 1'000'000, t + 10); });
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    engine.shutdown();
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(limiter->counters.held, 0);
  }
}

TEST(Stepping, FiresWhatIsDueAndTellsWhatIsNext) {
  Engine engine(true);
  StoreEntry* entry = engine.add_store("m", "memory", {}).value();
  auto limiter = std::make_shared<LimiterCore>();
  limiter->group = std::make_shared<const store::Group>("g", params(1, 0));
  limiter->service = entry->limits.get();
  auto target = std::make_shared<LoopTarget>();
  const Nanos begin = engine.clock().now();
  EXPECT_EQ(engine.step(begin, false), kForever) << "nothing waits";
  for (int i = 0; i < 3; ++i) {
    auto* task = new AcquireTask(limiter);
    task->group = limiter->group;
    task->submitted = begin;
    task->target = target;
    ASSERT_TRUE(engine.submit(StartTask{task}));
  }
  EXPECT_EQ(engine.step(begin, false), begin + kSecond);
  EXPECT_EQ(engine.step(begin + kSecond / 2, true), kForever) << "only the clock";
  EXPECT_EQ(engine.clock().now(), begin + kSecond / 2);
  EXPECT_EQ(engine.step(begin, false), begin + kSecond) << "time does not go back";
  EXPECT_EQ(engine.clock().now(), begin + kSecond / 2);
  EXPECT_EQ(engine.step(begin + kSecond, false), begin + 2 * kSecond);
  EXPECT_EQ(engine.step(begin + 9 * kSecond, false), kForever);
  int granted = 0;
  for (Completion* completion = target->take(); completion; ++granted) {
    Completion* next = completion->next;
    completion->unref();
    completion = next;
  }
  EXPECT_EQ(granted, 3);
  engine.shutdown();
}

TEST(Races, AManualClockMovedWhileOthersSubmit) {
  Engine engine(true);
  StoreEntry* entry = engine.add_store("m", "memory", {}).value();
  auto limiter = std::make_shared<LimiterCore>();
  limiter->group = std::make_shared<const store::Group>("g", params(1000, 0));
  limiter->service = entry->limits.get();
  std::atomic<int> running{3};
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      call_many(engine, limiter, 100, t + 20);
      --running;
    });
  }
  while (running > 0) engine.advance(kMilli);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace ratesync::engine
