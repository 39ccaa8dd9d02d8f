// Locks of the memory store from several threads: what is decided on the calling thread and what waits on the
// I/O thread exclude each other, and nobody is forgotten in line. For TSan above all.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "ratesync/engine/lock_service.h"
#include "ratesync/memory/memory_locks.h"
#include "ratesync/net/io_thread.h"

namespace ratesync::engine {
namespace {

struct Rig {
  Rig() { io.start(); }
  ~Rig() {
    io.post([this] {
      keeper.shutdown();
      service.shutdown([] {});
      timers.stop();
    });
    io.stop();
  }
  // As `with lock` does: at once, or in line.
  HeldLockRef take(const std::string& name) {
    store::LockReply reply;
    if (!service.somebody_waits())
      if (HeldLockRef lease = service.take_now(space, name, 30'000, true, &reply)) return lease;
    auto target = std::make_shared<SyncTarget>();
    auto* task = new LockAcquire(service);
    task->space = space;
    task->name = name;
    task->lease_ms = 30'000;
    task->submitted = clock.now();
    task->target = target;
    io.post([task] { task->start(); });
    Completion* done = nullptr;
    for (int i = 0; i < 60 && !done; ++i) done = target->wait(kSecond);
    HeldLockRef lease = done ? task->lease : nullptr;
    if (done) task->unref();
    return lease;
  }

  Clock clock;
  net::IoThread io;
  memory::MemoryLocks locks{clock};
  Timers timers{io.context(), clock};
  Keeper keeper{timers, 1};
  store::SpaceRef space = std::make_shared<const store::Space>();
  LockService service{
      locks, keeper, timers, false, [this](std::function<void()> work) { io.post(std::move(work)); }, 1};
};

TEST(LockRace, ThreadsExcludeEachOtherAndNobodyIsForgotten) {
  Rig rig;
  std::atomic<int> inside{0};
  std::atomic<int> worst{0};
  std::atomic<int> forgotten{0};
  std::int64_t last_token = 0;  // guarded by the lock under test
  bool ordered = true;
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&] {
      for (int turn = 0; turn < 500; ++turn) {
        const HeldLockRef lease = rig.take("a");
        if (!lease) {
          ++forgotten;
          return;
        }
        const int now = ++inside;
        if (now > worst) worst = now;
        ordered = ordered && lease->token > last_token;
        last_token = lease->token;
        --inside;
        EXPECT_TRUE(rig.service.release_now(lease));
      }
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(worst, 1);
  EXPECT_EQ(forgotten, 0);
  EXPECT_TRUE(ordered);
}

TEST(LockRace, CancelledWhileItIsHandedOver) {
  Rig rig;
  for (int round = 0; round < 300; ++round) {
    HeldLockRef first = rig.take("b");
    ASSERT_TRUE(first);
    auto target = std::make_shared<SyncTarget>();
    auto* task = new LockAcquire(rig.service);
    task->space = rig.space;
    task->name = "b";
    task->lease_ms = 30'000;
    task->submitted = rig.clock.now();
    task->target = target;
    task->ref();
    rig.io.post([task] { task->start(); });
    std::thread releasing([&] { rig.service.release_now(first); });
    task->ref();
    rig.io.post([task] {
      task->cancel();
      task->unref();
    });
    releasing.join();
    Completion* done = nullptr;
    for (int i = 0; i < 60 && !done; ++i) done = target->wait(kSecond);
    ASSERT_TRUE(done);
    if (task->lease) rig.service.let_go(task->lease);
    task->unref();
    task->unref();
    // It is free again, whoever won.
    HeldLockRef next = rig.take("b");
    ASSERT_TRUE(next) << round;
    EXPECT_TRUE(rig.service.release_now(next));
  }
}

TEST(LockRace, ASignalAndAReleaseOnAnotherThread) {
  Rig rig;
  for (int round = 0; round < 300; ++round) {
    HeldLockRef lease = rig.take("c");
    auto target = std::make_shared<SyncTarget>();
    auto* signal = new LossSignal(lease);
    signal->target = target;
    rig.io.post([signal] { signal->start(); });
    rig.service.release_now(lease);
    Completion* done = nullptr;
    for (int i = 0; i < 60 && !done; ++i) done = target->wait(kSecond);
    ASSERT_TRUE(done) << round;
    EXPECT_FALSE(signal->lost);
    signal->unref();
  }
}

}  // namespace
}  // namespace ratesync::engine
