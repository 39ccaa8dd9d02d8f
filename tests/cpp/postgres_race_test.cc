// Several processes at one limit: nothing is granted twice, nothing is lost, nobody deadlocks.
// Each "process" is a thread with an engine loop, a store and connections of its own.
#include <random>
#include <thread>

#include "limit_rig.h"

using namespace ratesync;
using namespace ratesync::testing;
using store::Verdict;

namespace {

void in_threads(int count, const std::function<void(int)>& work) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back([&work, i] { work(i); });
  for (std::thread& thread : threads) thread.join();
}

const auto one_connection = [](postgres::PostgresOptions& options) { options.pool_max_size = 1; };

}  // namespace

TEST(PostgresRace, GrantsOfTwoProcessesAddUpExactly) {
  Schema schema;
  ASSERT_TRUE(Process(schema).initialize().ok());
  const auto group = make_group("api", 1000);
  Witness witness;
  constexpr int kRounds = 40, kEach = 25;
  const std::string before = witness.value("SELECT clock_timestamp()");
  std::atomic<int> granted{0};
  in_threads(2, [&](int) {
    Process p(schema);
    for (int i = 0; i < kRounds; ++i)
      for (const Request& request : p.acquire_many(group, kEach)) granted += request.granted();
  });
  ASSERT_EQ(granted, 2 * kRounds * kEach);
  // One slot each millisecond from the first on, none dealt twice.
  EXPECT_EQ(witness.value("SELECT (last_acquisition_at >= '" + before +
                          "'::timestamptz + interval '1.999 s')::text FROM " + schema.table()),
            "true");
  EXPECT_EQ(witness.value("SELECT (version <= 80)::text FROM " + schema.table()), "true");
}

TEST(PostgresRace, TheFirstInsertIsWonOnceAndEverybodyGetsAnAnswer) {
  Schema schema;
  ASSERT_TRUE(Process(schema).initialize().ok());
  for (int round = 0; round < 5; ++round) {
    const std::string id = "new " + std::to_string(round);
    const auto rate = make_group(id, 0.001, 3), slots = make_group(id + " slots", 0, 1, 3);
    std::atomic<int> granted{0}, held{0}, answered{0}, ready{0};
    in_threads(14, [&](int) {
      Process p(schema, one_connection);
      ASSERT_TRUE(p.initialize().ok());
      ++ready;
      while (ready < 14) std::this_thread::yield();
      granted += p.acquire_many(rate, 1, 0)[0].granted();
      held += p.acquire_many(slots, 1, 0)[0].granted();
      ++answered;
      while (answered < 14) std::this_thread::yield();  // a slot is given back by close
    });
    EXPECT_EQ(granted, 3);
    EXPECT_EQ(held, 3);
  }
}

TEST(PostgresRace, MaxConcurrentIsNeverExceededByThirtyTwoClients) {
  Schema schema;
  ASSERT_TRUE(Process(schema).initialize().ok());
  constexpr int kLimit = 5;
  const auto group = make_group("jobs", 0, 1, kLimit);
  std::atomic<int> active{0}, most{0}, total{0};
  in_threads(4, [&](int seed) {
    Process p(schema, one_connection);
    std::minstd_rand random(static_cast<unsigned>(seed) + 1);
    std::vector<Request> clients(8);
    int left = 150;
    std::size_t stopped = 0;
    store::LimitStore& limits = *p.store->limits();
    for (Request& client : clients) {
      client.group = group;
      client.then = [&](Request& me) {
        if (me.granted()) {
          const int now = ++active;
          for (int seen = most; now > seen && !most.compare_exchange_weak(seen, now);) {
          }
          ++total;
          --left;
          asio::post(p.io, [&] {
            --active;
            limits.release(group, me.reply.holder);
            if (left > 0) return limits.acquire(&me);
            ++stopped;
          });
        } else if (left > 0 && me.reply.status.ok()) {
          asio::post(p.io, [&] { limits.acquire(&me); });
        } else {
          ++stopped;
        }
      };
      limits.acquire(&client);
    }
    EXPECT_TRUE(p.until([&] { return stopped == clients.size(); }));
  });
  EXPECT_LE(most, kLimit);
  EXPECT_GE(total, 4 * 150);
  EXPECT_EQ(Witness().value("SELECT count(*) FROM " + schema.table("rate_limiter_state_leases")), "0");
}

TEST(PostgresRace, TripsOverManySharedKeysDoNotDeadlock) {
  Schema schema;
  ASSERT_TRUE(Process(schema).initialize().ok());
  const std::string deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
  const std::string before = Witness().value(deadlocks);
  for (const std::int64_t max_concurrent : {0, 1'000}) {
    in_threads(3, [&](int seed) {
      Process p(schema);
      std::minstd_rand random(static_cast<unsigned>(seed) + 1);
      for (int round = 0; round < 15; ++round) {
        std::vector<Request> requests(200);
        std::size_t answered = 0;
        for (Request& request : requests) {
          request.group = make_group("k" + std::to_string(random() % 400) + (max_concurrent ? " slots" : ""),
                                     1e6, 1, max_concurrent);
          request.then = [&](Request& me) {
            EXPECT_TRUE(me.granted()) << me.reply.status.message;
            ++answered;
          };
        }
        for (Request& request : requests) p.store->limits()->acquire(&request);
        ASSERT_TRUE(p.until([&] { return answered == requests.size(); }));
      }
    });
  }
  EXPECT_EQ(Witness().value(deadlocks), before);
}

TEST(PostgresRace, TenInstancesCreateTheTablesAtOnce) {
  Schema schema;
  std::atomic<int> ok{0};
  in_threads(10, [&](int) {
    Process p(schema, one_connection);
    const Status status = p.initialize();
    EXPECT_TRUE(status.ok()) << status.message;
    ok += status.ok();
  });
  EXPECT_EQ(ok, 10);
  EXPECT_EQ(Witness().ask("SELECT number, name FROM " + schema.table("rate_limiter_state_migrations") +
                          " ORDER BY 1"),
            (Table{{"1", "create_state_table"},
                   {"2", "create_leases_table"},
                   {"4", "create_window_tables"},
                   {"5", "create_waiters_table"}}));
}
