// Operations on state on their way through a store that answers late, never, or after nobody wants to know.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <future>
#include <random>
#include <set>
#include <thread>

#include "inbox.h"
#include "ratesync/engine/op_ids.h"
#include "ratesync/net/io_thread.h"
#include "slow_state.h"

namespace ratesync::engine {
namespace {

using Verb = store::StateOp::Verb;

struct StateRig : HandMoved {
  ~StateRig() {
    service.shutdown();
    inbox->forget();
    store.answer_all();  // what was given up is still the store's
  }
  StateTask* start(Nanos timeout = kForever, Verb verb = Verb::set) {
    auto* task = new StateTask(service);
    task->verb = verb;
    task->deadline = saturating_add(clock.now(), timeout);
    task->target = inbox;
    task->start();
    return task;
  }
  StateManyTask* start_many(int count, bool atomic, Nanos timeout = kForever) {
    auto* task = new StateManyTask(service, atomic);
    for (int i = 0; i < count; ++i) task->add().verb = i == 0 ? Verb::get : Verb::set;
    task->deadline = saturating_add(clock.now(), timeout);
    task->target = inbox;
    task->start();
    return task;
  }
  bool done(const Completion* task) const { return inbox->has(task); }

  SlowState store;
  std::shared_ptr<Inbox> inbox = std::make_shared<Inbox>();
  StateService service{store, timers};
};

TEST(StateService, DeliversTheAnswer) {
  StateRig rig;
  StateTask* task = rig.start(kSecond);
  EXPECT_FALSE(rig.done(task));
  rig.store.answer(task, 7);
  ASSERT_TRUE(rig.done(task));
  EXPECT_TRUE(task->status().ok());
  EXPECT_EQ(task->reply.version, 7);
  EXPECT_EQ(rig.service.in_store(), 0u);
  rig.run(10 * kSecond);
  EXPECT_EQ(rig.inbox->arrived.size(), 1u);
}

TEST(StateService, TakesBackWhatWasNotSentByItsDeadline) {
  StateRig rig;
  StateTask* task = rig.start(kSecond);
  rig.run(kSecond - 1);
  EXPECT_FALSE(rig.done(task));
  rig.run(1);
  ASSERT_TRUE(rig.done(task));
  EXPECT_EQ(task->status().code, Code::timeout);
  EXPECT_TRUE(rig.store.ops.empty());
}

TEST(StateService, SaysInDoubtOfAWriteThatWasSentAndTimeoutOfARead) {
  StateRig rig;
  StateTask* write = rig.start(kSecond);
  StateTask* read = rig.start(kSecond, Verb::get);
  rig.store.send_all();
  rig.run(kSecond);
  EXPECT_FALSE(rig.done(write));  // the store may know more in a moment
  rig.run(kSecond);
  ASSERT_TRUE(rig.done(write) && rig.done(read));
  EXPECT_EQ(write->status().code, Code::in_doubt);
  EXPECT_EQ(read->status().code, Code::timeout);
  rig.store.answer(write, 3);  // too late: nobody is told, nothing is freed twice
  EXPECT_EQ(write->status().code, Code::in_doubt);
  EXPECT_EQ(rig.inbox->arrived.size(), 2u);
}

TEST(StateService, PrefersWhatTheStoreFoundOutAtTheDeadline) {
  StateRig rig;
  StateTask* task = rig.start(kSecond);
  rig.store.send_all();
  rig.run(kSecond);
  rig.run(100 * kMilli);
  rig.store.answer(task, 4);
  ASSERT_TRUE(rig.done(task));
  EXPECT_TRUE(task->status().ok());
  EXPECT_EQ(task->reply.version, 4);
}

TEST(StateService, CancelTakesBackOrDropsTheAnswer) {
  StateRig rig;
  StateTask* unsent = rig.start();
  StateTask* sent = rig.start();
  rig.store.sent.insert(static_cast<store::StateOp*>(sent));
  unsent->cancel();
  sent->cancel();
  ASSERT_TRUE(rig.done(unsent) && rig.done(sent));
  EXPECT_EQ(unsent->status().code, Code::cancelled);
  EXPECT_EQ(sent->status().code, Code::cancelled);
  ASSERT_EQ(rig.store.ops.size(), 1u);
  sent->cancel();  // finished: nothing
  rig.store.answer(sent, 1);
  unsent->cancel();
  EXPECT_EQ(rig.inbox->arrived.size(), 2u);
}

TEST(StateService, ClosingAnswersEverything) {
  StateRig rig;
  StateTask* sent = rig.start();
  StateManyTask* many = rig.start_many(3, false);
  StateManyTask* batch = rig.start_many(2, true);
  rig.store.send_all();
  StateTask* unsent = rig.start(kSecond);
  rig.service.shutdown();
  for (const StateTask* task : {sent, unsent}) {
    ASSERT_TRUE(rig.done(task));
    EXPECT_EQ(task->status().code, Code::closed);
  }
  EXPECT_NE(sent->status().message.find("may have been executed"), std::string::npos);
  EXPECT_NE(unsent->status().message.find("was not executed"), std::string::npos);
  ASSERT_TRUE(rig.done(many) && rig.done(batch));
  EXPECT_EQ(many->parts[1].status().code, Code::closed);
  EXPECT_EQ(batch->failure().code, Code::closed);
  StateTask* late = rig.start();
  ASSERT_TRUE(rig.done(late));
  EXPECT_EQ(late->status().code, Code::closed);
  rig.run(10 * kSecond);
  rig.store.answer_all();
  EXPECT_EQ(rig.inbox->arrived.size(), 5u);
}

TEST(StateService, ManyEndWithTheirLastPart) {
  StateRig rig;
  StateManyTask* task = rig.start_many(3, false);
  ASSERT_EQ(rig.store.ops.size(), 3u);
  rig.store.answer(rig.store.ops[2], 5);
  rig.store.answer(rig.store.ops[0], 6);
  EXPECT_FALSE(rig.done(task));
  rig.store.answer(rig.store.ops[0], 7);
  ASSERT_TRUE(rig.done(task));
  EXPECT_EQ(task->parts[0].reply.version, 6);
  EXPECT_EQ(task->parts[1].reply.version, 7);
  EXPECT_EQ(task->parts[2].reply.version, 5);
}

TEST(StateService, ManyAnsweredInsideTheCallEndOnce) {
  StateRig rig;
  rig.store.prompt = true;
  StateManyTask* task = rig.start_many(5, false);
  ASSERT_TRUE(rig.done(task));
  EXPECT_TRUE(rig.done(rig.start_many(0, false)));
  EXPECT_EQ(rig.service.in_store(), 0u);
}

TEST(StateService, ManyAtTheDeadlineAreToldApart) {
  StateRig rig;
  StateManyTask* task = rig.start_many(4, false, kSecond);
  store::StateOp* const read = rig.store.ops[0];
  store::StateOp* const answered = rig.store.ops[1];
  store::StateOp* const write = rig.store.ops[2];
  rig.store.sent = {read, write};
  rig.store.answer(answered, 9);
  rig.run(kSecond);
  EXPECT_FALSE(rig.done(task));
  EXPECT_EQ(rig.store.ops.size(), 2u);  // the unsent one is taken back
  rig.run(kSecond);
  ASSERT_TRUE(rig.done(task));
  EXPECT_EQ(task->parts[0].status().code, Code::timeout);
  EXPECT_EQ(task->parts[1].reply.version, 9);
  EXPECT_EQ(task->parts[2].status().code, Code::in_doubt);
  EXPECT_EQ(task->parts[3].status().code, Code::timeout);
  rig.store.answer(write, 1);
  EXPECT_EQ(task->parts[2].status().code, Code::in_doubt);
}

TEST(StateService, ABatchIsTakenBackWhole) {
  StateRig rig;
  StateManyTask* unsent = rig.start_many(2, true, kSecond);
  StateManyTask* sent = rig.start_many(2, true, kSecond);
  StateManyTask* cancelled = rig.start_many(2, true);
  rig.store.sent.insert(static_cast<store::StateBatch*>(sent));
  cancelled->cancel();
  EXPECT_EQ(cancelled->failure().code, Code::cancelled);
  rig.run(kSecond);
  ASSERT_TRUE(rig.done(unsent));
  EXPECT_EQ(unsent->failure().code, Code::timeout);
  rig.run(kSecond);
  ASSERT_TRUE(rig.done(sent));
  EXPECT_EQ(sent->failure().code, Code::in_doubt);
  EXPECT_EQ(rig.store.batches.size(), 1u);
}

TEST(StateService, AQuestionIsAnsweredOnceInTime) {
  StateRig rig;
  std::vector<store::Callback<int>> asked;
  std::vector<std::string> answers;
  const auto ask = [&](bool changes, bool prompt = false) {
    rig.service.ask<int>(
        kSecond, changes,
        [&asked, prompt](store::Callback<int> done) {
          if (prompt) return done(1);
          asked.push_back(std::move(done));
        },
        [&answers](Result<int> result) {
          answers.emplace_back(result.ok() ? "answered" : to_string(result.status().code));
        });
  };
  ask(true, true);
  ask(true);
  asked[0](1);
  asked[0](1);  // a store that answers twice is told nothing
  EXPECT_EQ(answers, (std::vector<std::string>{"answered", "answered"}));
  answers.clear();
  ask(true);
  ask(false);
  ask(false);
  rig.run(kSecond);
  EXPECT_TRUE(answers.empty());
  asked[3](1);
  rig.run(kSecond);
  EXPECT_EQ(answers, (std::vector<std::string>{"answered", "in_doubt", "timeout"}));
  asked[1](1);
  ask(false);
  rig.service.shutdown();
  ask(false);
  asked[4](1);
  EXPECT_EQ(answers, (std::vector<std::string>{"answered", "in_doubt", "timeout", "closed", "closed"}));
  EXPECT_EQ(rig.service.in_store(), 0u);
}

// Every call ends exactly once, whatever meets: answers, deadlines, cancels, sending.
TEST(StateService, EndsEveryCallOnceWhateverMeets) {
  for (unsigned seed = 1; seed <= 30; ++seed) {
    StateRig rig;
    std::mt19937 random(seed);
    std::vector<Acquisition*> all;
    const auto some = [&random](std::size_t below) { return static_cast<std::size_t>(random() % below); };
    for (int step = 0; step < 600; ++step) {
      switch (some(7)) {
        case 0:
        case 1:
          all.push_back(rig.start(static_cast<Nanos>(some(200)) * kMilli, some(2) ? Verb::get : Verb::add));
          break;
        case 2:
          all.push_back(rig.start_many(1 + static_cast<int>(some(4)), some(2) == 0,
                                       static_cast<Nanos>(some(200)) * kMilli));
          break;
        case 3:
          if (!all.empty()) all[some(all.size())]->cancel();
          break;
        case 4:
          if (!rig.store.ops.empty()) rig.store.answer(rig.store.ops[some(rig.store.ops.size())], 1);
          break;
        case 5:
          if (some(4) == 0) rig.store.send_all();
          break;
        case 6: rig.run(static_cast<Nanos>(some(60)) * kMilli); break;
      }
      for (Acquisition* task : all)
        ASSERT_LE(std::count(rig.inbox->arrived.begin(), rig.inbox->arrived.end(), task), 1);
    }
    rig.run(kSecond);
    rig.run(kSecond);  // the patience of what was sent
    for (Acquisition* task : all) ASSERT_TRUE(rig.done(task)) << "seed " << seed;
    ASSERT_EQ(rig.inbox->arrived.size(), all.size());
    ASSERT_EQ(rig.service.in_store(), 0u);
  }
}

// --- across threads -------------------------------------------------------------------------------

class Counting final : public CompletionTarget {
 public:
  void deliver(Completion* completion) override {
    delivered.fetch_add(1);
    completion->unref();
  }
  std::atomic<int> delivered{0};
};

TEST(StateServiceThreads, SubmitAndCancelWhileTheStoreAnswers) {
  constexpr int kThreads = 4;
  constexpr int kEach = 500;
  Clock clock;
  net::IoThread io;
  Timers timers(io.context(), clock);
  SlowState store;
  StateService service(store, timers);
  auto target = std::make_shared<Counting>();
  io.start();
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(static_cast<unsigned>(t));
      for (int i = 0; i < kEach; ++i) {
        auto* task = new StateTask(service);
        task->id = next_op_id();
        task->deadline = clock.now() + static_cast<Nanos>(random() % 20) * kMilli;
        task->target = target;
        task->ref();  // for the cancel
        io.post([task] { task->start(); });
        if (i % 3 == 0) io.post([&store] { store.send_all(); });
        if (i % 2 == 0)
          io.post([&store] {
            if (!store.ops.empty()) store.answer(store.ops.back(), 1);
          });
        const bool cancels = i % 5 == 0;
        io.post([task, cancels] {
          if (cancels) task->cancel();
          task->unref();
        });
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::promise<void> closed;
  io.post([&] {
    service.shutdown();
    store.answer_all();
    closed.set_value();
  });
  closed.get_future().wait();
  io.post([&timers] { timers.stop(); });
  io.stop();
  EXPECT_EQ(target->delivered.load(), kThreads * kEach);
}

TEST(OpIds, AreNeverGivenTwice) {
  constexpr int kThreads = 4;
  constexpr std::size_t kEach = 50'000;
  std::vector<std::vector<std::int64_t>> drawn(kThreads);
  std::vector<std::thread> threads;
  for (auto& mine : drawn)
    threads.emplace_back([&mine] {
      for (std::size_t i = 0; i < kEach; ++i) mine.push_back(next_op_id());
    });
  for (std::thread& thread : threads) thread.join();
  std::set<std::int64_t> all;
  for (const auto& mine : drawn) {
    all.insert(mine.begin(), mine.end());
    for (const std::int64_t id : mine) ASSERT_GT(id, 0);
  }
  EXPECT_EQ(all.size(), kThreads * kEach);
}

TEST(OpIds, AForkedChildGoesAnotherWay) {
  constexpr int kIds = 1'000;
  (void)next_op_id();
  int pipe_ends[2];
  ASSERT_EQ(pipe(pipe_ends), 0);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  std::set<std::int64_t> all;
  if (child == 0) {
    for (int i = 0; i < kIds; ++i) {
      const std::int64_t id = next_op_id();
      if (write(pipe_ends[1], &id, sizeof id) != sizeof id) _exit(1);
    }
    _exit(0);
  }
  for (int i = 0; i < kIds; ++i) all.insert(next_op_id());
  for (int i = 0; i < kIds; ++i) {
    std::int64_t id = 0;
    ASSERT_EQ(read(pipe_ends[0], &id, sizeof id), static_cast<ssize_t>(sizeof id));
    EXPECT_TRUE(all.insert(id).second);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  close(pipe_ends[0]);
  close(pipe_ends[1]);
}

}  // namespace
}  // namespace ratesync::engine
