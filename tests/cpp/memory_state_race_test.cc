// State and locks in memory asked by many threads at once, for ThreadSanitizer, too: one winner of many
// creates, exact sums, batches that nobody sees by half, timeouts of one claimer each, tokens that grow.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "memory_state_rig.h"

namespace ratesync::memory {
namespace {

constexpr int kThreads = 6;

void together(const std::function<void(int)>& body) {
  std::atomic<int> ready{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i)
    threads.emplace_back([&, i] {
      ++ready;
      while (ready < kThreads) std::this_thread::yield();
      body(i);
    });
  for (std::thread& thread : threads) thread.join();
}

// The rig's `op` counts ids, which nobody reads here: each thread makes its operations by itself.
StateCall make(const StateRig& rig, Verb verb, const std::string& key) {
  StateCall call;
  call.verb = verb;
  call.space = rig.space;
  call.kind = rig.own_kind;
  call.key = key;
  call.expected = store::kAnyVersion;
  call.value = text("v");
  return call;
}

TEST(MemoryStateRace, OneWinnerOfManyCreates) {
  StateRig rig;
  constexpr int kKeys = 20'000;
  std::vector<std::atomic<int>> winners(kKeys);
  together([&](int) {
    const FamilyRef held = rig.memory.family(*rig.space, "k");
    const Family& family = *held;
    const ValueView one{store::Value::Type::text, "1", 0};
    for (int i = 0; i < kKeys; ++i)
      if (rig.memory.create(family, "key" + std::to_string(i), one, store::kNoTtl)) ++winners[i];
  });
  for (const std::atomic<int>& count : winners) ASSERT_EQ(count, 1);
  EXPECT_EQ(rig.memory.rows(), static_cast<std::size_t>(kKeys));
}

TEST(MemoryStateRace, SumsAndVersionsAreExact) {
  StateRig rig;
  constexpr int kAdds = 20'000;
  together([&](int) {
    for (int i = 0; i < kAdds; ++i) {
      StateCall add = make(rig, Verb::add, std::string(1, static_cast<char>('0' + i % 3)));
      add.delta = 1 + i % 2;
      rig.state.submit(&add);
    }
  });
  std::int64_t sum = 0;
  std::int64_t versions = 0;
  for (const char* name : {"0", "1", "2"}) {
    sum += rig.get(name).value.number;
    versions += rig.get(name).version;
  }
  EXPECT_EQ(sum, kThreads * kAdds * 3 / 2);
  EXPECT_EQ(versions, kThreads * kAdds);
}

TEST(MemoryStateRace, SwapsLoseNoUpdate) {
  StateRig rig;
  rig.set("a", integer(0));
  constexpr int kTurns = 3000;
  together([&](int) {
    for (int done = 0; done < kTurns;) {
      StateCall get = make(rig, Verb::get, "a");
      rig.state.submit(&get);
      StateCall swap = make(rig, Verb::swap, "a");
      swap.expected = get.reply.version;
      swap.value = integer(get.reply.value.number + 1);
      rig.state.submit(&swap);
      if (swap.reply.outcome == Outcome::done) ++done;
    }
  });
  EXPECT_EQ(rig.get("a").value, integer(kThreads * kTurns));
}

TEST(MemoryStateRace, NobodySeesHalfOfABatch) {
  StateRig rig;
  const std::vector<std::string> accounts = {"a", "b", "c", "d", "e"};
  for (const std::string& account : accounts) rig.set(account, integer(100));
  std::atomic<int> torn{0};
  together([&](int which) {
    for (int i = 0; i < 3000; ++i) {
      BatchCall batch;
      std::vector<StateCall> calls;
      if (which % 2 == 0) {  // from one to another, in any order of keys
        calls = {make(rig, Verb::add, accounts[static_cast<std::size_t>(i + which) % 5]),
                 make(rig, Verb::add, accounts[static_cast<std::size_t>(2 * i + which + 1 + i / 7) % 5])};
        if (calls[0].key == calls[1].key) continue;
        calls[0].delta = -7;
        calls[1].delta = 7;
      } else {
        for (const std::string& account : accounts) calls.push_back(make(rig, Verb::get, account));
      }
      for (StateCall& call : calls) batch.ops.push_back(&call);
      rig.state.submit(&batch);
      if (which % 2 == 0) continue;
      std::int64_t sum = 0;
      for (const StateCall& call : calls) sum += call.reply.value.number;
      if (sum != 500) ++torn;
    }
  });
  EXPECT_EQ(torn, 0);
}

TEST(MemoryStateRace, VersionsGrowWhileRowsDieAndAreThrownAway) {
  StateRig rig;
  constexpr int kKeys = 40;
  std::vector<std::vector<std::pair<std::int64_t, int>>> seen(kThreads);
  together([&](int which) {
    for (int i = 0; i < 20'000; ++i) {
      if (which == 0 && i % 10 == 0) rig.pass(1);
      if (which == 1 && i % 50 == 0) rig.purge(100);
      const int key = (i * 7 + which) % kKeys;
      StateCall call = make(rig, i % 5 == 0 ? Verb::remove : Verb::create, "key" + std::to_string(key));
      call.ttl = 3;
      rig.state.submit(&call);
      if (call.verb == Verb::create && call.reply.outcome == Outcome::done)
        seen[static_cast<std::size_t>(which)].emplace_back(call.reply.version, key);
    }
  });
  std::set<std::pair<int, std::int64_t>> all;
  for (const auto& mine : seen)
    for (const auto& [version, key] : mine) EXPECT_TRUE(all.emplace(key, version).second) << key;
  EXPECT_GT(all.size(), 1000u);
}

TEST(MemoryStateRace, ScansRunWhileOthersWrite) {
  StateRig rig;
  for (int i = 0; i < 500; ++i) rig.create("steady" + std::to_string(i));
  std::atomic<int> wrong{0};
  together([&](int which) {
    for (int i = 0; i < 60; ++i) {
      if (which < 2) {
        std::multiset<std::string> keys;
        for (const std::string& key : rig.keys("steady", 70)) keys.insert(key);
        if (keys.size() != 500 || std::set<std::string>(keys.begin(), keys.end()).size() != 500) ++wrong;
        continue;
      }
      for (int n = 0; n < 300; ++n) {
        StateCall call = make(rig, n % 3 == 0 ? Verb::remove : Verb::set,
                              "passing" + std::to_string(which * 1000 + (n * i) % 700));
        rig.state.submit(&call);
      }
    }
  });
  EXPECT_EQ(wrong, 0);
}

TEST(MemoryStateRace, EachTimeoutGoesToOneClaimer) {
  StateRig rig;
  constexpr int kTimeouts = 3000;
  for (int i = 0; i < kTimeouts; ++i) rig.schedule("key" + std::to_string(i), i % 100, true);
  rig.pass(100);
  std::vector<std::vector<store::DueKey>> got(kThreads);
  together([&](int which) {
    auto& mine = got[static_cast<std::size_t>(which)];
    for (auto due = rig.claim_due(7, 1000); !due.empty(); due = rig.claim_due(7, 1000))
      mine.insert(mine.end(), due.begin(), due.end());
  });
  std::set<std::string> keys;
  std::set<std::int64_t> claims;
  for (const auto& mine : got)
    for (const store::DueKey& due : mine) {
      EXPECT_TRUE(keys.insert(due.key).second);
      EXPECT_TRUE(claims.insert(due.claim).second);
    }
  EXPECT_EQ(keys.size(), static_cast<std::size_t>(kTimeouts));
}

// --- locks ----------------------------------------------------------------------------------------

struct LockCall final : store::LockOp {
  void done() override {}
};

TEST(MemoryStateRace, FamiliesComeAndGoAndNoVersionIsUsedTwice) {
  StateRig rig;
  constexpr int kRounds = 20'000;
  std::vector<std::vector<std::int64_t>> versions(kThreads);
  together([&](int which) {
    for (int i = 0; i < kRounds; ++i) {
      // One that all write, and one of its own that is gone at once.
      for (const bool shared : {true, false}) {
        StateCall set = make(rig, Verb::set, "k");
        set.kind = shared ? "shared" : std::to_string(which) + "/" + std::to_string(i);
        set.ttl = shared && i % 4 != 0 ? store::kNoTtl : 1;
        rig.state.submit(&set);
        if (shared) versions[static_cast<std::size_t>(which)].push_back(set.reply.version);
      }
      if (i % 64 == 0) rig.clock.advance(5 * kSecond);
    }
  });
  std::set<std::int64_t> all;
  for (const auto& mine : versions) {
    all.insert(mine.begin(), mine.end());
    EXPECT_TRUE(std::is_sorted(mine.begin(), mine.end()));
  }
  EXPECT_EQ(all.size(), static_cast<std::size_t>(kThreads) * kRounds) << "no version twice";
  EXPECT_LE(rig.memory.families(), 40'000u);
}

TEST(MemoryLockRace, OneHolderAtATimeWithTokensThatGrow) {
  Clock clock{true};
  MemoryStore store{clock};
  store::LockStore& locks = *store.locks("").value();
  const auto space = std::make_shared<const store::Space>();
  std::atomic<int> told{0};
  locks.on_freed([&](const store::Space&, const std::string&) { ++told; });
  struct Guarded {  // plain: ThreadSanitizer sees whether the lock guards it
    std::int64_t newest = 0;
    int entered = 0;
  } guarded[2];
  constexpr int kTurns = 2000;
  std::vector<std::vector<std::int64_t>> tokens(kThreads);
  together([&](int which) {
    for (int done = 0; done < kTurns;) {
      LockCall call;
      call.space = space;
      call.name = done % 2 == 0 ? "even" : "odd";
      call.ttl = 1000;
      call.id = which * kTurns + done + 1;
      call.queued = done % 5 == 0;
      locks.submit(&call);
      if (call.reply.outcome != store::LockReply::Outcome::held) {
        std::this_thread::yield();
        continue;
      }
      Guarded& mine = guarded[done % 2];
      EXPECT_GT(call.reply.token, mine.newest);
      mine.newest = call.reply.token;
      ++mine.entered;
      tokens[static_cast<std::size_t>(which)].push_back(call.reply.token);
      call.verb = store::LockOp::Verb::release;
      call.token = call.reply.token;
      locks.submit(&call);
      EXPECT_EQ(call.reply.outcome, store::LockReply::Outcome::held);
      if (done % 7 == 0) locks.stop_waiting(space, call.name);
      ++done;
    }
  });
  EXPECT_EQ(guarded[0].entered + guarded[1].entered, kThreads * kTurns);
  std::set<std::int64_t> all;
  for (const auto& mine : tokens) all.insert(mine.begin(), mine.end());
  EXPECT_EQ(all.size(), static_cast<std::size_t>(kThreads * kTurns)) << "no token twice";
}

TEST(MemoryStoreRace, APrefixHasOneInstance) {
  Clock clock{true};
  MemoryStore store{clock};
  std::vector<store::StateStore*> states(kThreads);
  std::vector<store::LockStore*> locks(kThreads);
  together([&](int which) {
    states[static_cast<std::size_t>(which)] = store.state("p").value();
    locks[static_cast<std::size_t>(which)] = store.locks("p").value();
  });
  EXPECT_EQ(std::count(states.begin(), states.end(), states[0]), kThreads);
  EXPECT_EQ(std::count(locks.begin(), locks.end(), locks[0]), kThreads);
}

}  // namespace
}  // namespace ratesync::memory
