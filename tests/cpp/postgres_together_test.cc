// Several limits at once: all or nothing, in one round trip, with everybody else at the same rows.
#include <random>
#include <thread>

#include "limit_rig.h"
#include "tcp_proxy.h"

using namespace ratesync;
using namespace ratesync::testing;
using namespace ratesync::postgres;
using limits::Algorithm;
using store::Verdict;

namespace {

constexpr Nanos kHour = 3'600 * kSecond;

struct All final : store::AcquireAllOp {
  void done() override { answered = true; }
  bool answered = false;
};

store::GroupRef window(const std::string& id, Algorithm algorithm, std::int64_t limit,
                       std::int64_t slots = 0) {
  limits::Params params;
  params.algorithm = algorithm;
  params.limit = limit;
  params.window = kHour;
  params.max_concurrent = slots;
  return std::make_shared<const store::Group>(store::Group{id, params});
}

All ask(Process& p, std::vector<store::Part> parts) {
  All op;
  op.parts = std::move(parts);
  p.store->limits()->acquire_all(&op);
  EXPECT_TRUE(p.until([&] { return op.answered; }));
  EXPECT_TRUE(op.status.ok()) << op.status.message;
  return op;
}

std::vector<All> ask_many(Process& p, std::size_t n,
                          const std::function<std::vector<store::Part>(std::size_t)>& parts) {
  std::vector<All> ops(n);
  for (std::size_t i = 0; i < n; ++i) ops[i].parts = parts(i);
  for (All& op : ops) p.store->limits()->acquire_all(&op);
  EXPECT_TRUE(p.until(
      [&] { return std::all_of(ops.begin(), ops.end(), [](const All& op) { return op.answered; }); }));
  return ops;
}

std::string everything(const Schema& schema) {
  std::string out;
  for (const char* table : {"", "_leases", "_windows", "_window_log"})
    out += Witness().value("SELECT coalesce(string_agg(t::text, ';' ORDER BY t::text), '') FROM " +
                           schema.table(std::string("rate_limiter_state") + table) + " AS t") +
           '\n';
  return out;
}

}  // namespace

TEST(PostgresTogether, EveryKindIsChargedInOneRoundTrip) {
  Schema schema;
  Process p(schema);
  ASSERT_TRUE(p.initialize().ok());
  const std::vector<store::Part> parts = {{window("z", Algorithm::sliding_window, 5), 2},
                                          {make_group("m", 1, 10), 3},
                                          {window("a", Algorithm::fixed_window, 5, 2), 1},
                                          {window("c", Algorithm::sliding_counter, 7), 4},
                                          {make_group("s", 0, 1, 4), 1}};
  const store::Stats before = p.store->stats();
  const All op = ask(p, parts);
  EXPECT_LE(p.store->stats().round_trips - before.round_trips, 2u) << "a trip and perhaps a purge";
  ASSERT_TRUE(op.granted);
  ASSERT_EQ(op.replies.size(), parts.size());
  const std::int64_t remaining[] = {3, 7, 4, 3, 3};
  for (std::size_t i = 0; i < parts.size(); ++i) {
    EXPECT_EQ(op.replies[i].verdict, Verdict::granted) << i;
    EXPECT_EQ(op.replies[i].wait, 0) << i;
    EXPECT_EQ(op.replies[i].remaining, remaining[i]) << i;
    EXPECT_EQ(op.replies[i].holder != 0, parts[i].group->params.has_concurrency()) << i;
    EXPECT_EQ(op.replies[i].stamp != 0, parts[i].group->params.has_rate()) << i;
  }
  EXPECT_EQ(p.peek(parts[4].group).in_use, 1);
  p.store->limits()->release(parts[4].group, op.replies[4].holder);
  EXPECT_TRUE(p.until([&] { return p.peek(parts[4].group).in_use == 0; }));
  EXPECT_EQ(p.store->limits()->refund(parts[0].group, 2, op.replies[0].stamp), 0);
  EXPECT_EQ(p.peek(parts[0].group).available, 5);
}

TEST(PostgresTogether, ARefusalChargesNothingAnywhereAndEachPartSaysWhy) {
  Schema schema;
  Process p(schema);
  const auto free = window("free", Algorithm::sliding_window, 5),
             spent = window("spent", Algorithm::fixed_window, 1), full = make_group("full", 0, 1, 1),
             bucket = make_group("bucket", 0.01, 1);
  p.acquire(spent);
  p.acquire(full);
  p.acquire(bucket);
  p.acquire(free);
  const std::string before = everything(schema);
  const All op = ask(p, {{free, 1}, {spent, 1}, {full, 1}, {bucket, 1}, {make_group("new", 1), 1}});
  EXPECT_FALSE(op.granted);
  EXPECT_EQ(op.replies[0].verdict, Verdict::granted);
  EXPECT_EQ(op.replies[0].remaining, 4);
  EXPECT_EQ(op.replies[1].verdict, Verdict::rate_limited);
  EXPECT_GT(op.replies[1].retry_after, 0);
  EXPECT_EQ(op.replies[2].verdict, Verdict::concurrency_full);
  EXPECT_EQ(op.replies[3].verdict, Verdict::rate_limited);
  EXPECT_GT(op.replies[3].retry_after, 90 * kSecond);
  EXPECT_EQ(op.replies[4].verdict, Verdict::granted);
  Witness().script("DELETE FROM " + schema.table() + " WHERE group_id = 'new'");  // made idle, to be locked
  EXPECT_EQ(everything(schema), before);
}

TEST(PostgresTogether, ItNeverWaitsForASlotOfTheFuture) {
  Schema schema;
  Process p(schema);
  const auto a = make_group("a", 0.01), b = make_group("b", 100'000, 1'000);
  EXPECT_TRUE(ask(p, {{a, 1}, {b, 1}}).granted);
  const All op = ask(p, {{b, 1}, {a, 1}});
  EXPECT_FALSE(op.granted);
  EXPECT_EQ(op.replies[1].verdict, Verdict::rate_limited);
  EXPECT_LE(op.replies[1].retry_after, 100 * kSecond);
}

TEST(PostgresTogether, ManyOfTheSameAreOneStatementAndCountExactly) {
  Schema schema;
  Process p(schema);
  ASSERT_TRUE(p.initialize().ok());
  const auto user = window("user", Algorithm::sliding_window, 60), jobs = make_group("jobs", 0, 1, 25),
             site = make_group("site", 0.001, 40);
  const store::Stats before = p.store->stats();
  const std::vector<All> ops = ask_many(p, 100, [&](std::size_t i) {
    std::vector<store::Part> parts = {{user, 2}, {jobs, 1}, {site, 1}};
    if (i % 2) std::reverse(parts.begin(), parts.end());
    return parts;
  });
  EXPECT_LE(p.store->stats().round_trips - before.round_trips, 3u);
  for (std::size_t i = 0; i < ops.size(); ++i)
    EXPECT_EQ(ops[i].granted, i < 25) << i << ": first come, first served";
  const store::AcquireReply& refused = ops[99].replies[1];
  EXPECT_EQ(refused.verdict, Verdict::concurrency_full);
  EXPECT_EQ(p.peek(user).available, 10);
  EXPECT_EQ(p.peek(jobs).in_use, 25);
  EXPECT_EQ(p.peek(site).available, 15);
}

TEST(PostgresTogether, SetsThatOverlapTakeTurnsInOneTrip) {
  Schema schema;
  Process p(schema);
  ASSERT_TRUE(p.initialize().ok());
  std::vector<store::GroupRef> groups;
  for (int i = 0; i < 5; ++i) groups.push_back(window("g" + std::to_string(i), Algorithm::fixed_window, 3));
  const store::Stats before = p.store->stats();
  // A chain: each shares one with the next.
  const std::vector<All> ops = ask_many(p, 10, [&](std::size_t i) {
    return std::vector<store::Part>{{groups[i % 5], 1}, {groups[(i + 1) % 5], 1}};
  });
  EXPECT_LE(p.store->stats().round_trips - before.round_trips, 4u);
  std::int64_t granted = 0;
  for (const All& op : ops) granted += op.granted;
  EXPECT_EQ(granted, 7) << "15 units, two for each; the first five take ten, two more fit";
  std::int64_t left = 0;
  for (const auto& group : groups) left += p.peek(group).available;
  EXPECT_EQ(left, 15 - 2 * granted);
}

TEST(PostgresTogether, WhatWasNotSentIsTakenBack) {
  Schema schema;
  Process p(schema);
  All op;
  op.parts = {{make_group("a", 1), 1}, {make_group("b", 1), 1}};
  p.store->limits()->acquire_all(&op);
  EXPECT_TRUE(p.store->limits()->abandon(&op));
  EXPECT_FALSE(p.store->limits()->abandon(&op));
  EXPECT_EQ(p.acquire(make_group("a", 1)).wait, 0);
  EXPECT_FALSE(op.answered);
}

TEST(PostgresTogether, ItsSlotsAreLeasesLikeOthersAndDoNotMixWithThem) {
  Schema schema;
  Process p(schema), other(schema);
  const auto jobs = make_group("jobs", 0, 1, 4, 12 * kSecond), more = make_group("more", 0, 1, 4);
  const store::AcquireReply single = p.acquire(jobs);
  const All op = ask(p, {{jobs, 1}, {more, 1}});
  ASSERT_TRUE(op.granted);
  EXPECT_NE(op.replies[0].holder, single.holder);
  p.acquire(jobs);
  EXPECT_EQ(other.peek(jobs).in_use, 3);
  Witness witness;
  const std::string leases = schema.table("rate_limiter_state_leases");
  const std::string first =
      witness.value("SELECT min(expires_at) FROM " + leases + " WHERE group_id = 'jobs'");
  // Both are renewed for longer than they were made for.
  EXPECT_TRUE(p.until([&] {
    return witness.value("SELECT (min(expires_at) > '" + first +
                         "'::timestamptz + interval '0.5 s')::text FROM " + leases +
                         " WHERE group_id = 'jobs'") == "true";
  }));
  EXPECT_EQ(p.store->stats().leases_lost, 0u);
  p.store->limits()->release(jobs, op.replies[0].holder);
  EXPECT_TRUE(other.until([&] {
    p.io.restart();
    p.io.poll();
    return other.peek(jobs).in_use == 2;
  }));
  ASSERT_TRUE(p.finish([&](store::Callback<store::Unit> done) {
                 p.store->limits()->reset(more, std::move(done));
               }).ok());
  EXPECT_EQ(other.peek(more).in_use, 0);
  EXPECT_EQ(p.store->stats().leases_lost, 1u);
}

TEST(PostgresTogether, SlotsHeldTogetherGoBackWhenTheStoreCloses) {
  Schema schema;
  const auto a = make_group("a", 0, 1, 1), b = make_group("b", 0, 1, 1);
  {
    Process p(schema);
    const All op = ask(p, {{a, 1}, {b, 1}});
    ASSERT_TRUE(op.granted);
    p.store->limits()->release(a, op.replies[0].holder);
    p.store->limits()->release(b, op.replies[1].holder);
  }
  Process p(schema);
  EXPECT_TRUE(ask(p, {{b, 1}, {a, 1}}).granted);
}

TEST(PostgresTogether, OnTheDocumentedTableAloneToo) {
  Schema schema;
  schema.create_seed_table();
  Process p(schema, [](PostgresOptions& options) { options.auto_create = false; });
  const auto slots = make_group("slots", 0, 1, 2), rate = make_group("rate", 0.01, 5);
  const All first = ask(p, {{slots, 1}, {rate, 2}});
  EXPECT_TRUE(first.granted);
  EXPECT_TRUE(ask(p, {{slots, 1}, {rate, 2}}).granted);
  EXPECT_FALSE(ask(p, {{slots, 1}, {rate, 1}}).granted);
  EXPECT_EQ(p.peek(rate).available, 1);
  p.store->limits()->release(slots, first.replies[0].holder);
  EXPECT_TRUE(p.until([&] { return p.peek(slots).in_use == 1; }));
  EXPECT_TRUE(ask(p, {{rate, 1}, {slots, 1}}).granted);
  All windows;
  windows.parts = {{window("w", Algorithm::fixed_window, 1), 1}, {rate, 1}};
  p.store->limits()->acquire_all(&windows);
  ASSERT_TRUE(p.until([&] { return windows.answered; }));
  EXPECT_EQ(windows.status.sqlstate, "42P01");
}

TEST(PostgresTogether, ATriggerThatSwallowsOneWriteChargesNothing) {
  Schema schema;
  Process p(schema);
  const auto a = window("a", Algorithm::fixed_window, 5), b = window("b", Algorithm::fixed_window, 5);
  ASSERT_TRUE(ask(p, {{a, 1}, {b, 1}}).granted);
  Witness().script(
      "CREATE FUNCTION " + schema.quoted() +
      ".no() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'; CREATE TRIGGER no BEFORE "
      "UPDATE ON " +
      schema.table() + " FOR EACH ROW WHEN (old.group_id = 'b') EXECUTE FUNCTION " + schema.quoted() +
      ".no()");
  All op;
  op.parts = {{a, 1}, {b, 1}};
  p.store->limits()->acquire_all(&op);
  ASSERT_TRUE(p.until([&] { return op.answered; }));
  EXPECT_FALSE(op.status.ok());
  EXPECT_EQ(p.peek(a).available, 4);
}

TEST(PostgresTogether, ProcessesWithOverlappingSetsInAnyOrderNeitherDeadlockNorOvercharge) {
  Schema schema;
  ASSERT_TRUE(Process(schema).initialize().ok());
  Witness witness;
  const std::string deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
  const std::string before = witness.value(deadlocks);
  std::vector<store::GroupRef> groups;
  for (int i = 0; i < 6; ++i) {
    const std::string id = "g" + std::to_string(i);
    groups.push_back(i % 3 == 0   ? window(id, Algorithm::sliding_window, 100)
                     : i % 3 == 1 ? make_group(id, 0.0001, 100)
                                  : window(id, Algorithm::fixed_window, 100, 50));
  }
  std::atomic<int> taken[6] = {}, conflicts{0};
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < 6; ++i)
    threads.emplace_back([&, i] {
      Process p(schema, [](PostgresOptions& options) { options.pool_max_size = 2; });
      std::mt19937 random(i);
      for (int round = 0; round < 12; ++round) {
        std::vector<All> ops(6);
        for (All& op : ops) {
          std::vector<std::size_t> order = {0, 1, 2, 3, 4, 5};
          std::shuffle(order.begin(), order.end(), random);
          order.resize(2 + random() % 3);
          for (const std::size_t g : order) op.parts.push_back({groups[g], 1});
          p.store->limits()->acquire_all(&op);
        }
        std::vector<Request> singles(4);
        for (std::size_t s = 0; s < singles.size(); ++s) {
          singles[s].group = groups[(s + i) % 6];
          singles[s].deadline = p.clock.now();
          p.store->limits()->acquire(&singles[s]);
        }
        ASSERT_TRUE(p.until([&] {
          return std::all_of(ops.begin(), ops.end(), [](const All& op) { return op.answered; }) &&
                 std::all_of(singles.begin(), singles.end(), [](const Request& r) { return r.answered; });
        }));
        const auto use = [&](const store::GroupRef& group, const store::AcquireReply& reply) {
          ++taken[group->id[1] - '0'];
          if (reply.holder) p.store->limits()->release(group, reply.holder);
        };
        for (const All& op : ops) {
          ASSERT_TRUE(op.status.ok()) << op.status.message;
          for (std::size_t part = 0; op.granted && part < op.parts.size(); ++part)
            use(op.parts[part].group, op.replies[part]);
        }
        for (const Request& single : singles)
          if (single.granted()) use(single.group, single.reply);
      }
      conflicts += static_cast<int>(p.store->stats().conflicts);
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(witness.value(deadlocks), before);
  EXPECT_EQ(conflicts, 0);
  Process p(schema);
  for (int i = 0; i < 6; ++i) {
    EXPECT_LE(taken[i], 100) << i;
    EXPECT_EQ(p.peek(groups[static_cast<std::size_t>(i)]).in_use, 0) << i;
    if (i % 3 != 1) {
      EXPECT_EQ(witness.value("SELECT total FROM " + schema.table("rate_limiter_state_windows") +
                              " WHERE group_id = 'g" + std::to_string(i) + "'"),
                std::to_string(taken[i]));
    }
  }
  EXPECT_GT(taken[0], 50);
}

TEST(PostgresTogether, ALostAnswerIsInDoubtAndTheSlotsHeal) {
  Schema schema;
  const auto a = make_group("a", 0, 1, 1), b = make_group("b", 0, 1, 1);
  asio::io_context proxy_io;
  const std::string url = PostgresServer::instance().url();
  const ConnInfo info = parse_conninfo(url).value();
  const auto port = static_cast<std::uint16_t>(std::stoi(info.hosts.front().port));
  auto proxy = std::make_unique<TcpProxy>(proxy_io, port);
  Process p(schema, [&](PostgresOptions& options) {
    options.url = "host=127.0.0.1 port=" + std::to_string(proxy->port());
    for (const auto& [key, value] : info.settings) options.url += " " + key + "='" + value + "'";
    options.command_timeout = kSecond;
    options.connect_timeout = 2 * kSecond;
  });
  const auto until = [&](const std::function<bool()>& ready) {
    return p.until([&] {
      proxy_io.restart();
      proxy_io.poll();
      return ready();
    });
  };
  std::optional<Status> up;
  p.store->initialize([&](Result<store::Unit> r) { up = r.status(); });
  ASSERT_TRUE(until([&] { return up.has_value(); }));
  proxy->stall();
  All op;
  op.parts = {{a, 1}, {b, 1}};
  p.store->limits()->acquire_all(&op);
  ASSERT_TRUE(until([&] { return op.answered; }));
  EXPECT_EQ(op.status.code, Code::in_doubt);
  const std::uint16_t on = proxy->port();
  proxy.reset();
  proxy_io.restart();
  proxy_io.poll();
  proxy = std::make_unique<TcpProxy>(proxy_io, port, on);
  Witness witness;
  EXPECT_TRUE(until([&] {
    return witness.value("SELECT count(*) FROM " + schema.table("rate_limiter_state_leases")) == "0";
  })) << "the slots that nobody uses are told to be free";
  All again;
  again.parts = {{b, 1}, {a, 1}};
  p.store->limits()->acquire_all(&again);
  ASSERT_TRUE(until([&] { return again.answered; }));
  EXPECT_TRUE(again.granted) << "and it recovers";
  bool closed = false;
  p.store->close([&] { closed = true; });
  EXPECT_TRUE(until([&] { return closed; }));
  p.store.reset();
}
