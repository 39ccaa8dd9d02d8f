// sliding_window, sliding_counter and fixed_window in PostgreSQL: the sums against a model that deals
// one request at a time, exactness over processes, boundaries, refunds, and what is left behind.
#include <random>
#include <thread>

#include "json.h"
#include "limit_rig.h"
#include "ratesync/limits/window.h"
#include "ratesync/postgres/limit_params.h"
#include "ratesync/postgres/sql_text.h"

using namespace ratesync;
using namespace ratesync::testing;
using namespace ratesync::postgres;
using limits::Algorithm;
using store::Verdict;

namespace {

constexpr Algorithm kWindows[] = {Algorithm::sliding_window, Algorithm::sliding_counter,
                                  Algorithm::fixed_window};

store::GroupRef window_group(const std::string& id, Algorithm algorithm, std::int64_t limit, Nanos window,
                             std::int64_t max_concurrent = 0) {
  limits::Params params;
  params.algorithm = algorithm;
  params.limit = limit;
  params.window = window;
  params.max_concurrent = max_concurrent;
  return std::make_shared<const store::Group>(store::Group{id, params});
}

std::string windows_of(const Schema& schema) { return schema.table("rate_limiter_state_windows"); }
std::string log_of(const Schema& schema) { return schema.table("rate_limiter_state_window_log"); }
std::string row_of(const Schema& schema, const std::string& group) {
  return Witness().value("SELECT s.version || ' ' || s.last_acquisition_at || ' ' || w FROM " +
                         schema.table() + " AS s LEFT JOIN " + windows_of(schema) +
                         " AS w USING (group_id) WHERE group_id = '" + group + "'");
}
LimitTables tables_of(const Schema& schema) {
  return {schema.table(), schema.table("rate_limiter_state_leases"), windows_of(schema), log_of(schema), ""};
}

// A statement whose clock is a setting.
Statement set_clock(const Statement& statement) {
  std::string sql = statement.sql;
  const std::string clock = "clock_timestamp()";
  const std::string then =
      "('1970-01-01 00:00:00+00'::timestamptz + current_setting('test.now')::int8 * interval '1 "
      "microsecond')";
  for (std::size_t at = sql.find(clock); at != std::string::npos; at = sql.find(clock, at + then.size()))
    sql.replace(at, clock.size(), then);
  return {statement.name + "_set", sql};
}

// The statements of the store on a server whose clock we set.
struct Bench {
  explicit Bench(const Schema& schema)
      : sql(make_limit_sql(tables_of(schema))),
        windows(set_clock(sql.windows)),
        adjust_windows(set_clock(sql.adjust_windows)),
        peek_windows(set_clock(sql.peek_windows)) {}

  struct Answer {
    std::vector<std::int64_t> waits;
    std::int64_t retry = 0, remaining = 0, stamp = 0, full_after = 0;
  };
  Answer acquire(const store::GroupRef& group, std::int64_t now, std::int64_t n, std::int64_t cost,
                 std::int64_t patience) {
    Run run{group, cost, patience > kForever / kMicro ? kForever : patience * kMicro, false, {}};
    run.ops.resize(static_cast<std::size_t>(n));
    std::vector<Param> params = run_params({run});
    params.push_back(Param::text("{NULL}"));
    for (int i = 0; i < 4; ++i) params.push_back(Param::text("{0}"));
    add_window_params({run}, params);
    params.push_back(Param::text("somebody"));
    const PipelineResult result = under_lock(group, now, windows, std::move(params));
    const Rows& rows = *result.results[2];
    EXPECT_EQ(rows.rows(), 1);
    Answer out{integers(rows.text(0, 8)), rows.integer(0, 9), rows.integer(0, 10), rows.integer(0, 3),
               rows.integer(0, 11)};
    EXPECT_EQ(static_cast<std::int64_t>(out.waits.size()), rows.integer(0, 1));
    return out;
  }
  void adjust(const store::GroupRef& group, std::int64_t now, AdjustMode mode, std::int64_t units,
              std::optional<std::int64_t> stamp) {
    const Adjustment adjustment{group, mode, units, stamp, {}};
    under_lock(group, now, adjust_windows, adjust_windows_params({&adjustment}));
  }
  store::Peek peek(const store::GroupRef& group, std::int64_t now) {
    QueuedOp op{QueuedOp::Kind::peek, false, group, nullptr, nullptr};
    const PipelineResult result = under_lock(group, now, peek_windows, peek_windows_params({&op}));
    return read_window_peek(group->params, *result.results[2], 0);
  }
  std::int64_t total(const Schema& schema, const store::GroupRef& group) {
    return std::stoll("0" + witness.value("SELECT total FROM " + windows_of(schema) + " WHERE group_id = '" +
                                          group->id + "'"));
  }
  PipelineResult under_lock(const store::GroupRef& group, std::int64_t now, const Statement& statement,
                            std::vector<Param> params) {
    std::vector<Call> calls;
    static const Statement set_now{
        "set_now",
        "SELECT set_config('test.now', $1, true), set_config('plan_cache_mode', 'force_generic_plan', true)"};
    calls.push_back({&sql.lock, {Param::text(array_of_text({group->id}))}});
    calls.push_back({&set_now, {Param::text(std::to_string(now))}});
    calls.push_back({&statement, std::move(params)});
    calls.push_back({&sql.close_gaps, {Param::text(array_of_text({group->id}))}});
    PipelineResult result = witness.run(std::move(calls));
    EXPECT_TRUE(result.status.ok()) << result.status.message;
    if (!result.status.ok()) std::abort();
    return result;
  }

  LimitSql sql;
  Statement windows, adjust_windows, peek_windows;
  Witness witness;
};

}  // namespace

// --- the sums -----------------------------------------------------------------------------------

TEST(PostgresWindow, TheStatementsDoTheSumsOfTheVectorFile) {
  Schema schema;
  ASSERT_TRUE(Process(schema).initialize().ok());
  Bench bench(schema);
  const Json file = read_json(RATESYNC_VECTORS "/windows.json");
  int number = 0;
  for (const Json& story : file["cases"].items) {
    const std::string id = "story " + std::to_string(number++);
    Algorithm algorithm = Algorithm::token_bucket;
    ASSERT_TRUE(limits::parse_algorithm(story["algorithm"].text, &algorithm));
    for (const Json& step : story["steps"].items) {
      SCOPED_TRACE(story["name"].text + ", " + story["algorithm"].text + ": " + step["op"].text);
      const std::int64_t now = step["now"].number;
      const auto group = window_group(id, algorithm, step["limit"].number, step["window"].number * kMicro);
      const Json& expect = step["expect"];
      const std::string& op = step["op"].text;
      if (op == "acquire") {
        const Bench::Answer got = bench.acquire(group, now, 1, step["cost"].number, step["max_wait"].number);
        ASSERT_EQ(!got.waits.empty(), expect["granted"].number != 0);
        ASSERT_EQ(got.waits.empty() ? got.retry : got.waits[0],
                  expect["wait"].number + expect["retry_after"].number);
      } else if (op == "settle") {
        const std::int64_t delta = step["delta"].number;
        bench.adjust(group, now, delta > 0 ? AdjustMode::charge : AdjustMode::give_back, std::abs(delta),
                     std::nullopt);
      } else if (op == "refund") {
        bench.adjust(group, now, AdjustMode::give_back, step["cost"].number, step["stamp"].number);
      }
      if (expect.has("stamp")) {
        ASSERT_EQ(bench.total(schema, group), expect["stamp"].number);
      }
      if (!expect.has("remaining")) continue;
      const store::Peek peek = bench.peek(group, now);
      ASSERT_EQ(peek.available, expect["remaining"].number);
      ASSERT_EQ(peek.full_after, expect["full_after"].number * kMicro);
      if (op == "peek") {
        ASSERT_EQ(peek.retry_after, expect["retry_after"].number * kMicro);
      }
    }
  }
  EXPECT_GT(number, 60);
}

TEST(PostgresWindow, ARunIsDealtLikeItsRequestsOneAfterTheOther) {
  Schema schema;
  ASSERT_TRUE(Process(schema).initialize().ok());
  Bench bench(schema);
  std::mt19937 random(11);
  const auto any = [&](std::int64_t from, std::int64_t to) {
    return std::uniform_int_distribution<std::int64_t>(from, to)(random);
  };
  for (int round = 0; round < 30; ++round) {
    const Algorithm algorithm = kWindows[round % 3];
    limits::Quota quota{any(1, 12), any(1, 50) * 1'000};
    limits::WindowState model(algorithm, 0);
    std::int64_t now = 1'700'000'000'000'000 + any(0, 1'000'000);
    for (int step = 0; step < 40; ++step) {
      if (any(0, 9) == 0) quota.limit = any(1, 12);  // live
      const auto group =
          window_group("g" + std::to_string(round), algorithm, quota.limit, quota.window * kMicro);
      now += any(0, 3) == 0 ? 0 : any(0, quota.window);
      SCOPED_TRACE("round " + std::to_string(round) + " step " + std::to_string(step) + ' ' +
                   limits::to_string(algorithm) + " limit " + std::to_string(quota.limit) + " window " +
                   std::to_string(quota.window));
      const std::int64_t kind = any(0, 9), units = any(1, 3);
      if (kind == 0 && model.total() >= units) {
        bench.adjust(group, now, AdjustMode::give_back, units, model.total() + 1);  // not the newest: nothing
        bench.adjust(group, now, AdjustMode::give_back, units, model.total());
        model.refund(quota, units, model.total());
        continue;
      }
      if (kind == 1) {
        const std::int64_t delta = any(-4, 3);
        if (delta == 0) continue;
        bench.adjust(group, now, delta > 0 ? AdjustMode::charge : AdjustMode::give_back, std::abs(delta),
                     std::nullopt);
        model.settle(quota, now, delta);
        continue;
      }
      const std::int64_t n = any(1, 8), cost = any(1, std::min<std::int64_t>(3, quota.limit));
      const std::int64_t patience = any(0, 2) == 0 ? 0 : any(0, 4 * quota.window);
      std::vector<std::int64_t> waits;
      std::int64_t retry = 0;
      for (std::int64_t i = 0; i < n && retry == 0; ++i) {
        const limits::WindowDeal deal = model.take(quota, now, cost, patience);
        if (deal.granted)
          waits.push_back(deal.wait);
        else
          retry = deal.wait;
      }
      const Bench::Answer got = bench.acquire(group, now, n, cost, patience);
      ASSERT_EQ(got.waits, waits);
      ASSERT_EQ(got.retry, retry);
      ASSERT_EQ(got.remaining, model.available(quota, now));
      ASSERT_EQ(got.full_after, model.full_after(quota, now));
      ASSERT_EQ(got.stamp, model.total());
    }
  }
}

TEST(PostgresWindow, ATripIsOneRoundTripAndALoneWriteForAllItsRequests) {
  Schema schema;
  Process p(schema);
  const auto first = window_group("first", Algorithm::fixed_window, 1, kSecond);
  p.acquire(first);
  for (int i = 0; i < 5; ++i) p.peek(first);  // meanwhile the first purge
  for (const Algorithm algorithm : kWindows) {
    const auto group = window_group("g" + std::to_string(static_cast<int>(algorithm)), algorithm, 1'000,
                                    30 * 86'400 * kSecond);
    p.acquire(group);
    const store::Stats before = p.store->stats();
    const std::vector<Request> requests = p.acquire_many(group, 400);
    EXPECT_LE(p.store->stats().round_trips - before.round_trips, 2u) << "a trip, and perhaps a purge";
    for (const Request& request : requests) ASSERT_TRUE(request.granted() && request.reply.wait == 0);
    EXPECT_EQ(requests.back().reply.stamp, 401);
    EXPECT_EQ(requests.back().reply.remaining, 599);
    EXPECT_EQ(
        Witness().value("SELECT version FROM " + schema.table() + " WHERE group_id = '" + group->id + "'"),
        "2");
  }
  EXPECT_EQ(Witness().value("SELECT count(*) FROM " + log_of(schema)), "2") << "one entry for each moment";
}

TEST(PostgresWindow, ARefusalWritesNothingAndSaysWhenToComeBack) {
  Schema schema;
  Process p(schema);
  for (const Algorithm algorithm : kWindows) {
    const auto group =
        window_group("g" + std::to_string(static_cast<int>(algorithm)), algorithm, 3, 3'600 * kSecond);
    for (const Request& request : p.acquire_many(group, 3, 0)) ASSERT_TRUE(request.granted());
    const std::string before = row_of(schema, group->id),
                      log = Witness().value("SELECT count(*) FROM " + log_of(schema));
    const std::vector<Request> refused = p.acquire_many(group, 5, 0);
    for (const Request& request : refused) {
      EXPECT_EQ(request.reply.verdict, Verdict::rate_limited);
      EXPECT_GT(request.reply.retry_after, 0);
      EXPECT_LE(request.reply.retry_after, 2 * 3'600 * kSecond);
      EXPECT_EQ(request.reply.remaining, 0);
    }
    EXPECT_EQ(row_of(schema, group->id), before);
    EXPECT_EQ(Witness().value("SELECT count(*) FROM " + log_of(schema)), log);
    const store::Peek peek = p.peek(group);
    EXPECT_EQ(peek.available, 0);
    EXPECT_NEAR(static_cast<double>(peek.retry_after), static_cast<double>(refused[0].reply.retry_after),
                60e9);
    EXPECT_EQ(row_of(schema, group->id), before);
  }
}

TEST(PostgresWindow, LaterSlotsAreDealtInOrderAndTheStateRowSaysTheLatest) {
  Schema schema;
  Process p(schema);
  Witness witness;
  for (const Algorithm algorithm : kWindows) {
    const auto group =
        window_group("g" + std::to_string(static_cast<int>(algorithm)), algorithm, 2, 3'600 * kSecond);
    const std::vector<Request> requests = p.acquire_many(group, 7);
    for (std::size_t i = 0; i < requests.size(); ++i) {
      ASSERT_TRUE(requests[i].granted());
      if (i > 0) {
        EXPECT_GE(requests[i].reply.wait, requests[i - 1].reply.wait);
      }
    }
    EXPECT_GT(requests[6].reply.wait, 2 * 3'600 * kSecond);
    const std::string off =
        witness.value("SELECT abs(extract(epoch FROM last_acquisition_at - clock_timestamp()) - " +
                      std::to_string(static_cast<double>(requests[6].reply.wait) / 1e9) + ") < 60 FROM " +
                      schema.table() + " WHERE group_id = '" + group->id + "'");
    EXPECT_EQ(off, "t");
    // The last one was not wanted after all: the next is dealt the same moment.
    const std::int64_t stamp = p.store->limits()->refund(group, 1, requests[6].reply.stamp);
    EXPECT_EQ(stamp, 6);
    EXPECT_EQ(p.store->limits()->refund(group, 1, 999), 998) << "not the newest: changes nothing";
    const store::AcquireReply again = p.acquire(group);
    EXPECT_NEAR(static_cast<double>(again.wait), static_cast<double>(requests[6].reply.wait), 60e9);
    EXPECT_EQ(again.stamp, 7);
  }
}

TEST(PostgresWindow, SettlingChargesOrGivesBackAndResetForgets) {
  Schema schema;
  Process p(schema);
  for (const Algorithm algorithm : kWindows) {
    const auto group =
        window_group("g" + std::to_string(static_cast<int>(algorithm)), algorithm, 100, 3'600 * kSecond);
    const auto settle = [&](std::int64_t delta) {
      return p.finish([&](store::Callback<store::Unit> done) {
        p.store->limits()->settle(group, delta, std::move(done));
      });
    };
    p.acquire(group, kForever, 10);
    ASSERT_TRUE(settle(5).ok());
    EXPECT_EQ(p.peek(group).available, 85);
    ASSERT_TRUE(settle(-12).ok());
    EXPECT_EQ(p.peek(group).available, 97);
    ASSERT_TRUE(settle(-50).ok());
    EXPECT_EQ(p.peek(group).available, 100) << "never below nothing";
    ASSERT_TRUE(settle(500).ok());
    EXPECT_EQ(p.acquire(group, 0).verdict, Verdict::rate_limited);
    EXPECT_GT(p.peek(group).full_after, 0);
    ASSERT_TRUE(p.finish([&](store::Callback<store::Unit> done) {
                   p.store->limits()->reset(group, std::move(done));
                 }).ok());
    const store::Peek peek = p.peek(group);
    EXPECT_EQ(peek.available, 100);
    EXPECT_EQ(peek.full_after, 0);
    for (const Request& request : p.acquire_many(group, 100, 0)) ASSERT_TRUE(request.granted());
    EXPECT_EQ(p.acquire(group, 0).verdict, Verdict::rate_limited);
  }
}

TEST(PostgresWindow, ALimitMayChangeWhileItsConsumptionStays) {
  Schema schema;
  Process p(schema);
  for (const Algorithm algorithm : kWindows) {
    const std::string id = "g" + std::to_string(static_cast<int>(algorithm));
    for (const Request& request : p.acquire_many(window_group(id, algorithm, 10, 3'600 * kSecond), 6, 0))
      ASSERT_TRUE(request.granted());
    EXPECT_EQ(p.peek(window_group(id, algorithm, 10, 3'600 * kSecond)).available, 4);
    EXPECT_EQ(p.peek(window_group(id, algorithm, 20, 3'600 * kSecond)).available, 14);
    EXPECT_EQ(p.acquire(window_group(id, algorithm, 5, 3'600 * kSecond), 0).verdict, Verdict::rate_limited);
    EXPECT_EQ(p.acquire(window_group(id, algorithm, 7, 3'600 * kSecond), 0).verdict, Verdict::granted);
    EXPECT_EQ(p.acquire(window_group(id, algorithm, 7, 7'200 * kSecond), 0).verdict, Verdict::rate_limited);
  }
}

TEST(PostgresWindow, SlotsAndWindowsAreDecidedTogether) {
  Schema schema;
  Process p(schema);
  for (const Algorithm algorithm : kWindows) {
    const auto group =
        window_group("g" + std::to_string(static_cast<int>(algorithm)), algorithm, 3, 3'600 * kSecond, 2);
    const std::vector<Request> requests = p.acquire_many(group, 4, 0);
    EXPECT_TRUE(requests[0].granted() && requests[1].granted());
    EXPECT_EQ(requests[2].reply.verdict, Verdict::concurrency_full);
    EXPECT_EQ(p.peek(group).in_use, 2);
    p.store->limits()->release(group, requests[0].reply.holder);
    const store::AcquireReply third = p.acquire(group, 0);
    EXPECT_EQ(third.verdict, Verdict::granted) << "a full limiter charged nothing";
    EXPECT_EQ(third.stamp, 3);
    p.store->limits()->release(group, third.holder);
    EXPECT_EQ(p.acquire(group, 0).verdict, Verdict::rate_limited);
  }
}

TEST(PostgresWindow, ACostAboveTheLimitIsRefusedWithoutATrip) {
  Schema schema;
  Process p(schema);
  const store::AcquireReply reply =
      p.acquire(window_group("g", Algorithm::fixed_window, 3, kSecond), kForever, 4);
  EXPECT_EQ(reply.status.code, Code::invalid);
  EXPECT_EQ(p.store->stats().round_trips, 0u);
}

TEST(PostgresWindow, HostileIdsAreOnlyNames) {
  Schema schema;
  Process p(schema);
  for (const char* id :
       {"'; DROP TABLE x; --", "{a,\"b\"}", "back\\slash", "NULL", "{0}@window_levels@", "\xF0\x9F\x92\xA9"})
    for (const Algorithm algorithm : kWindows) {
      const auto group =
          window_group(id + std::to_string(static_cast<int>(algorithm)), algorithm, 1, 3'600 * kSecond);
      EXPECT_EQ(p.acquire(group, 0).verdict, Verdict::granted) << id;
      EXPECT_EQ(p.acquire(group, 0).verdict, Verdict::rate_limited) << id;
      EXPECT_EQ(p.peek(group).available, 0) << id;
    }
}

TEST(PostgresWindow, AnotherAlgorithmStartsAfreshAndMixesNoNumbers) {
  Schema schema;
  Process p(schema);
  for (int i = 0; i < 9; ++i) {
    const auto group = window_group("g", kWindows[i % 3], 4, 3'600 * kSecond);
    for (const Request& request : p.acquire_many(group, 4, 0)) ASSERT_TRUE(request.granted()) << i;
    EXPECT_EQ(p.acquire(group, 0).verdict, Verdict::rate_limited) << i;
  }
}

// --- several processes --------------------------------------------------------------------------

TEST(PostgresWindow, NoWindowHoldsMoreThanItsLimitWhenEightProcessesAsk) {
  Schema schema;
  ASSERT_TRUE(Process(schema).initialize().ok());
  constexpr int kProcesses = 8, kRounds = 12;
  std::vector<store::GroupRef> groups;
  for (const Algorithm algorithm : kWindows)
    groups.push_back(
        window_group("g" + std::to_string(static_cast<int>(algorithm)), algorithm, 5, 40 * kMilli));
  std::atomic<int> granted{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < kProcesses; ++i)
    threads.emplace_back([&, i] {
      Process p(schema, [](PostgresOptions& options) { options.pool_max_size = 1; });
      for (int round = 0; round < kRounds; ++round)
        for (std::size_t g = 0; g < groups.size(); ++g)  // in different order
          for (const Request& request :
               p.acquire_many(groups[(g + static_cast<std::size_t>(i)) % groups.size()], 3, 0))
            granted += request.granted();
    });
  for (std::thread& thread : threads) thread.join();
  Witness witness;
  EXPECT_GT(granted, 0);
  EXPECT_EQ(witness.value("SELECT sum(total) FROM " + windows_of(schema)), std::to_string(granted));
  // The log says when; what was pruned had left the window.
  EXPECT_EQ(witness.value("SELECT coalesce(max(units), 0) <= 5 FROM (SELECT sum(units) OVER (PARTITION BY "
                          "group_id ORDER BY dealt_at RANGE "
                          "BETWEEN 39999 PRECEDING AND CURRENT ROW) AS units FROM " +
                          log_of(schema) + ") AS w"),
            "t");
}

TEST(PostgresWindow, UnitsThatWaitAddUpExactlyOverProcesses) {
  Schema schema;
  ASSERT_TRUE(Process(schema).initialize().ok());
  const auto group = window_group("g", Algorithm::sliding_window, 7, 3'600 * kSecond);
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i)
    threads.emplace_back([&] {
      Process p(schema, [](PostgresOptions& options) { options.pool_max_size = 1; });
      for (int round = 0; round < 5; ++round)
        for (const Request& request : p.acquire_many(group, 5)) EXPECT_TRUE(request.granted());
    });
  for (std::thread& thread : threads) thread.join();
  Witness witness;
  EXPECT_EQ(witness.value("SELECT sum(units) FROM " + log_of(schema)), "200");
  EXPECT_EQ(witness.value(
                "SELECT max(units) FROM (SELECT sum(units) OVER (ORDER BY dealt_at RANGE BETWEEN 3599999999 "
                "PRECEDING AND CURRENT ROW) AS units FROM " +
                log_of(schema) + ") AS w"),
            "7");
}

// --- what is left behind ------------------------------------------------------------------------

TEST(PostgresWindow, ASteadyGroupKeepsNoMoreThanOneWindowOfItsLog) {
  Schema schema;
  Process p(schema);
  const auto group = window_group("g", Algorithm::sliding_window, 5, 2 * kMilli);
  Witness witness;
  for (int i = 0; i < 60; ++i) {
    ASSERT_EQ(p.acquire(group).verdict, Verdict::granted);
    witness.ask("SELECT pg_sleep(0.001)");
  }
  EXPECT_EQ(witness.value("SELECT count(*) <= 6 FROM " + log_of(schema)), "t");
}

TEST(PostgresWindow, WhoeverWritesPurgesWhatIdleGroupsLeft) {
  Schema schema;
  const auto quiet = window_group("quiet", Algorithm::sliding_window, 5, 10 * kSecond);
  const auto busy = window_group("busy", Algorithm::sliding_window, 5, 10 * kSecond);
  {
    Process p(schema);
    p.acquire(quiet);
    p.acquire(window_group("fixed", Algorithm::fixed_window, 5, 10 * kSecond));
  }
  Witness witness;
  for (const std::string& table : {windows_of(schema), log_of(schema)})
    witness.script("UPDATE " + table + " SET expires_at = now() - interval '1 hour'");
  Process p(schema);
  p.acquire(busy);
  EXPECT_TRUE(p.until([&] { return witness.value("SELECT count(*) FROM " + log_of(schema)) == "1"; }));
  EXPECT_TRUE(p.until([&] { return witness.value("SELECT count(*) FROM " + windows_of(schema)) == "1"; }));
}

TEST(PostgresWindow, ALogWithoutItsRowGoesOnCounting) {
  Schema schema;
  Process p(schema);
  const auto group = window_group("g", Algorithm::sliding_window, 5, 3'600 * kSecond);
  p.acquire(group, kForever, 4);
  Witness().script("DELETE FROM " + windows_of(schema));
  EXPECT_EQ(p.acquire(group, 0, 2).verdict, Verdict::rate_limited);
  EXPECT_EQ(p.acquire(group, 0).verdict, Verdict::granted);
  Witness().script("DELETE FROM " + schema.table());
  EXPECT_EQ(p.acquire(group, 0).verdict, Verdict::rate_limited) << "clean-up of state rows forgets no unit";
}

// --- the tables ---------------------------------------------------------------------------------

TEST(PostgresWindow, TheDocumentedTableAloneSaysWhatToDo) {
  Schema schema;
  schema.create_seed_table();
  Process p(schema, [](PostgresOptions& options) { options.auto_create = false; });
  const auto group = window_group("g", Algorithm::fixed_window, 5, kSecond);
  const Status status = p.acquire(group).status;
  EXPECT_EQ(status.sqlstate, "42P01");
  for (const char* word : {"ratesync migrate", "auto_create", "rate_limiter_state_windows"})
    EXPECT_NE(status.message.find(word), std::string::npos) << status.message;
  EXPECT_EQ(p.acquire(make_group("rate", 100)).verdict, Verdict::granted) << "all else works";
  bool told = false;
  for (const store::Finding& finding : p.doctor())
    told = told ||
           (finding.subject == "windows" && finding.message.find("ratesync migrate") != std::string::npos);
  EXPECT_TRUE(told);
  {
    Process other(schema);  // auto_create
    EXPECT_EQ(other.acquire(group).verdict, Verdict::granted);
  }
  EXPECT_TRUE(p.until([&] { return p.acquire(group).status.ok(); })) << "and it recovers";
}

TEST(PostgresWindow, MissingGrantsAreSaid) {
  Schema schema;
  ASSERT_TRUE(Process(schema).initialize().ok());
  const std::string role = "window_" + std::to_string(getpid());
  Witness().script("CREATE ROLE " + role + " LOGIN; GRANT USAGE ON SCHEMA " + schema.quoted() + " TO " +
                   role + "; GRANT SELECT, INSERT, UPDATE ON " + schema.table() + " TO " + role +
                   "; GRANT SELECT, INSERT, UPDATE, DELETE ON " + schema.table("rate_limiter_state_leases") +
                   " TO " + role);
  {
    Process p(
        schema, [](PostgresOptions& options) { options.auto_create = false; }, role);
    const auto group = window_group("g", Algorithm::sliding_window, 5, 3'600 * kSecond);
    const Status status = p.acquire(group).status;
    EXPECT_EQ(status.sqlstate, "42501");
    const std::size_t grant = status.message.find("GRANT ");
    ASSERT_NE(grant, std::string::npos) << status.message;
    EXPECT_EQ(p.acquire(make_group("rate", 100)).verdict, Verdict::granted);
    Witness().script(status.message.substr(grant));
    EXPECT_EQ(p.acquire(group).verdict, Verdict::granted) << "and it recovers";
    EXPECT_EQ(p.acquire(group).verdict, Verdict::granted);
  }
  Witness().script("DROP OWNED BY " + role + "; DROP ROLE " + role);
}
