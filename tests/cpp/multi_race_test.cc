// Several limits in one call while threads submit, cancel, release, decide past the engine and shut it
// down - for TSan above all. Nobody is ever inside a limit of one together with somebody else.
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "ratesync/engine/engine.h"
#include "ratesync/memory/memory_store.h"

namespace ratesync::engine {
namespace {

constexpr std::size_t kSlots = 5;

// Five limits of one slot, over two stores of this process, and a rate.
struct World {
  World() {
    for (std::size_t i = 0; i <= kSlots; ++i) {
      limits::Params p;
      p.timing_margin = 0;
      (i < kSlots ? p.max_concurrent : p.burst) = 1;
      if (i == kSlots) p.rate_per_second = 1e5;
      limiters.push_back(std::make_shared<LimiterCore>());
      limiters[i]->group = std::make_shared<const store::Group>(std::to_string(i), p);
      limiters[i]->service = (i < 3 ? one : two)->limits.get();
    }
  }
  Engine engine{false};
  StoreEntry* one = engine.add_store("one", "memory", {}).value();
  StoreEntry* two = engine.add_store("two", "memory", {}).value();
  std::vector<LimiterRef> limiters;
  std::array<std::atomic<int>, kSlots> inside{};
  std::atomic<int> granted{0};
  std::atomic<bool> crowded{false};

  // False: the engine was shut down.
  bool call(unsigned seed) {
    std::vector<MultiPart> parts;
    std::vector<std::size_t> slots;
    for (std::size_t i = 0; i < 3; ++i) {
      const std::size_t at = (seed >> (4 * i + 4)) % (kSlots + 1);
      MultiPart part;
      part.limiter = limiters[at];
      part.group = part.limiter->group;
      bool known = false;
      for (const MultiPart& other : parts) known |= other.group == part.group;
      if (known) continue;
      parts.push_back(part);
      if (at < kSlots) slots.push_back(at);
    }
    auto target = std::make_shared<SyncTarget>();
    auto* task = new MultiTask(engine.multi(), std::move(parts));
    task->submitted = engine.clock().now();
    task->deadline = saturating_add(task->submitted, seed % 5 == 0 ? 50 * kMicro : kForever);
    task->target = target;
    task->ref();
    if (!engine.submit(StartTask{task})) {
      task->unref();
      task->unref();
      return false;
    }
    if (seed % 3 == 0) {
      task->ref();
      if (!engine.submit(CancelTask{task})) task->unref();
    }
    while (!target->wait(kSecond)) {
    }
    if (task->outcome == Outcome::granted) {
      ++granted;
      for (const std::size_t at : slots)
        if (++inside[at] > 1) crowded = true;
      for (const std::size_t at : slots) --inside[at];
      for (const MultiPart& part : task->limits) {
        if (seed % 2 == 0 && part.permit) engine.submit(ReleasePermit{part.permit});
        if (seed % 2 == 1)
          engine.submit(
              GiveBack{part.limiter, part.group, 1, part.charged, {part.at, part.stamp}, part.permit});
      }
    }
    task->unref();
    task->unref();
    return true;
  }

  // The way past the engine that bindings take.
  void quick(unsigned seed) {
    auto& memory = static_cast<memory::MemoryStore&>(*one->store);
    const std::vector<store::Part> parts = {{limiters[seed % 3]->group, 1},
                                            {limiters[(seed + 1) % 3]->group, 1}};
    std::vector<store::AcquireReply> replies;
    if (!memory.try_all_now(parts, &replies)) return;
    for (const std::size_t at : {seed % 3, (seed + 1) % 3})
      if (++inside[at] > 1) crowded = true;
    for (const std::size_t at : {seed % 3, (seed + 1) % 3}) --inside[at];
    for (std::size_t i = 0; i < 2; ++i)
      if (memory.release_slot(parts[i].group->id, replies[i].holder))
        engine.submit(SlotFreed{limiters[0], parts[i].group->id});
  }

  void run(unsigned thread, int times) {
    unsigned seed = thread * 7919 + 1;
    for (int i = 0; i < times; ++i) {
      seed = seed * 1664525U + 1013904223U;
      if (thread % 3 == 0) {
        quick(seed >> 8);
      } else if (!call(seed >> 8)) {
        return;
      }
    }
  }
};

TEST(MultiRaces, SubmitCancelReleaseAndDecideFromManyThreads) {
  World world;
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 6; ++t) threads.emplace_back([&, t] { world.run(t, 300); });
  for (std::thread& thread : threads) thread.join();
  world.engine.shutdown();
  EXPECT_FALSE(world.crowded);
  EXPECT_GT(world.granted, 100);
  EXPECT_EQ(world.engine.multi().waiting(), 0U);
  for (const LimiterRef& limiter : world.limiters) EXPECT_EQ(limiter->counters.held, 0);
}

TEST(MultiRaces, ShutdownInTheMiddleAnswersEverybody) {
  for (int round = 0; round < 20; ++round) {
    World world;
    std::vector<std::thread> threads;
    for (unsigned t = 1; t < 6; ++t)
      if (t % 3 != 0) threads.emplace_back([&, t] { world.run(t, 1'000'000); });
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    world.engine.shutdown();
    for (std::thread& thread : threads) thread.join();
    EXPECT_FALSE(world.crowded);
    for (const LimiterRef& limiter : world.limiters) EXPECT_EQ(limiter->counters.held, 0);
  }
}

}  // namespace
}  // namespace ratesync::engine
