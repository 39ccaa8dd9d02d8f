// Rate and concurrency decisions of one process against a real PostgreSQL, with a witness that looks
// at the rows.
#include <random>

#include "limit_rig.h"
#include "ratesync/limits/gcra.h"
#include "ratesync/postgres/limit_params.h"
#include "ratesync/postgres/limit_plan.h"

using namespace ratesync;
using namespace ratesync::testing;
using namespace ratesync::postgres;
using store::Verdict;

namespace {

std::string row_of(const Schema& schema, const std::string& group) {
  return Witness().value("SELECT xmin::text || ' ' || version || ' ' || last_acquisition_at FROM " +
                         schema.table() + " WHERE group_id = '" + group + "'");
}

}  // namespace

// --- cost ---------------------------------------------------------------------------------------

TEST(PostgresLimit, ALoneRequestIsOneStatementInOneRoundTrip) {
  Schema schema;
  Process p(schema);
  const auto group = make_group("api", 1000);
  ASSERT_EQ(p.acquire(group).verdict, Verdict::granted);
  const store::Stats before = p.store->stats();
  for (int i = 0; i < 10; ++i) p.acquire(group);
  const store::Stats after = p.store->stats();
  EXPECT_EQ(after.round_trips - before.round_trips, 10u);
  EXPECT_EQ(after.statements - before.statements, 10u);
}

TEST(PostgresLimit, ASlotIsALockAndADecisionInOneRoundTrip) {
  Schema schema;
  Process p(schema);
  const auto group = make_group("api", 0, 1, 5);
  ASSERT_TRUE(p.initialize().ok());
  const store::Stats before = p.store->stats();
  EXPECT_EQ(p.acquire(group).verdict, Verdict::granted);
  const store::Stats after = p.store->stats();
  EXPECT_EQ(after.round_trips - before.round_trips, 1u);
  EXPECT_EQ(after.statements - before.statements, 2u);
}

TEST(PostgresLimit, AThousandWaitingRequestsAreOneStatementAndEachHasItsOwnSlot) {
  Schema schema;
  Process p(schema);
  const auto group = make_group("api", 100, 5);
  ASSERT_TRUE(p.initialize().ok());
  const store::Stats before = p.store->stats();
  const std::vector<Request> requests = p.acquire_many(group, 1000);
  const store::Stats after = p.store->stats();
  EXPECT_EQ(after.round_trips - before.round_trips, 1u);
  EXPECT_EQ(after.batched_ops - before.batched_ops, 1000u);
  for (std::size_t i = 0; i < requests.size(); ++i) {
    ASSERT_TRUE(requests[i].granted());
    ASSERT_EQ(requests[i].reply.wait, i < 5 ? 0 : static_cast<Nanos>(i - 4) * 10 * kMilli) << i;
  }
  EXPECT_EQ(Witness().value("SELECT version FROM " + schema.table()), "1") << "one write for all of them";
}

TEST(PostgresLimit, ManyGroupsAreOneStatement) {
  Schema schema;
  Process p(schema);
  ASSERT_TRUE(p.initialize().ok());
  const store::Stats before = p.store->stats();
  std::vector<Request> requests(500);
  std::size_t answered = 0;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    requests[i].group = make_group("key " + std::to_string(i * 7919 % 500), 10);
    requests[i].then = [&](Request&) { ++answered; };
  }
  for (Request& request : requests) p.store->limits()->acquire(&request);
  ASSERT_TRUE(p.until([&] { return answered == requests.size(); }));
  EXPECT_LE(p.store->stats().statements - before.statements, 4u) << "two lanes, each at most twice";
  for (const Request& request : requests) EXPECT_TRUE(request.granted() && request.reply.wait == 0);
}

// --- rate ---------------------------------------------------------------------------------------

TEST(PostgresLimit, TheStatementDoesTheSumsOfTheTokenBucket) {
  Schema schema;
  ASSERT_TRUE(Process(schema).initialize().ok());
  Witness witness;
  const LimitSql sql = make_limit_sql({schema.table(), ""});
  std::mt19937 random(7);
  const auto any = [&](std::int64_t from, std::int64_t to) {
    return std::uniform_int_distribution<std::int64_t>(from, to)(random);
  };
  for (int i = 0; i < 150; ++i) {
    limits::Params limit;
    limit.rate_per_second = static_cast<double>(std::vector<int>{1, 10, 40, 100, 250, 1000}[any(0, 5)]);
    limit.burst = any(1, 5);
    limit.timing_margin = any(0, 20) * kMilli;
    postgres::Run run{
        std::make_shared<const store::Group>(store::Group{"g" + std::to_string(any(0, 9)), limit}),
        any(1, 4),
        any(0, 400) * kMilli,
        false,
        {}};
    if (any(0, 4) == 0) run.patience = kForever;
    run.ops.resize(static_cast<std::size_t>(any(1, 30)));
    std::vector<Param> params = run_params({run});
    params.push_back(Param::text("t"));
    std::vector<Call> calls;
    calls.push_back({&sql.rate, std::move(params)});
    const PipelineResult result = witness.run(std::move(calls));
    ASSERT_TRUE(result.status.ok()) << result.status.message;
    const Rows& row = *result.results[0];
    const int last = row.rows() - 1;  // the one before tells of a row that was made
    const Nanos tat = row.integer(last, 2) * kMicro;
    const limits::Deal want =
        limits::deal(limit, tat, 0, static_cast<std::int64_t>(run.ops.size()), run.cost, run.patience);
    ASSERT_EQ(row.integer(last, 1), want.granted) << "ahead " << tat << " rate " << limit.rate_per_second;
  }
}

TEST(PostgresLimit, ARefusalWritesNothingAndSaysWhenToComeBack) {
  Schema schema;
  Process p(schema);
  const auto group = make_group("slow", 0.01);
  ASSERT_EQ(p.acquire(group).verdict, Verdict::granted);
  const std::string before = row_of(schema, "slow");
  const store::AcquireReply reply = p.acquire(group, 0);
  EXPECT_EQ(reply.verdict, Verdict::rate_limited);
  EXPECT_GT(reply.retry_after, 50 * kSecond);
  EXPECT_LE(reply.retry_after, 100 * kSecond);
  EXPECT_EQ(row_of(schema, "slow"), before);
}

TEST(PostgresLimit, ARequestIsMeasuredByItsOwnDeadlineEvenInsideARun) {
  Schema schema;
  Process p(schema);
  const auto group = make_group("api", 100);
  ASSERT_TRUE(p.initialize().ok());
  // About the same patience, hence one run; the last request's own deadline is past its slot.
  std::vector<Request> requests(4);
  std::size_t answered = 0;
  const Nanos now = p.clock.now() + 20 * kSecond;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    requests[i].group = group;
    requests[i].deadline = now + static_cast<Nanos>(i) * 300 * kMicro;
    requests[i].then = [&](Request&) { ++answered; };
  }
  for (Request& request : requests) p.store->limits()->acquire(&request);
  ASSERT_TRUE(p.until([&] { return answered == requests.size(); }));
  for (std::size_t i = 0; i < requests.size(); ++i) {
    ASSERT_TRUE(requests[i].granted()) << i;
    EXPECT_NEAR(static_cast<double>(requests[i].reply.wait), static_cast<double>(i) * 1e7, 5e6);
  }
}

TEST(PostgresLimit, DifferentCostsAndDeadlinesOfOneGroupShareATrip) {
  Schema schema;
  Process p(schema);
  const auto group = make_group("api", 1000, 100);
  ASSERT_TRUE(p.initialize().ok());
  const store::Stats before = p.store->stats();
  std::vector<Request> requests(40);
  std::size_t answered = 0;
  std::int64_t units = 0;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    requests[i].group = group;
    requests[i].cost = 1 + static_cast<std::int64_t>(i % 4);
    requests[i].deadline = i % 2 ? kForever : p.clock.now() + 10 * kSecond;
    requests[i].then = [&](Request&) { ++answered; };
    units += requests[i].cost;
  }
  const std::string start = Witness().value("SELECT clock_timestamp()");
  for (Request& request : requests) p.store->limits()->acquire(&request);
  ASSERT_TRUE(p.until([&] { return answered == requests.size(); }));
  EXPECT_EQ(p.store->stats().round_trips - before.round_trips, 1u);
  for (const Request& request : requests) EXPECT_TRUE(request.granted());
  const double ahead = std::stod(Witness().value("SELECT date_part('epoch', last_acquisition_at - '" + start +
                                                 "') FROM " + schema.table()));
  EXPECT_GE(ahead, static_cast<double>(units - 1) / 1000) << "all units are charged";
}

TEST(PostgresLimit, AnIdleGrantLeavesTheMomentItWasGiven) {
  Schema schema;
  Process p(schema);
  Witness witness;
  ASSERT_TRUE(p.initialize().ok());
  const std::string before = witness.value("SELECT clock_timestamp()");
  p.acquire(make_group("rate", 10));
  p.acquire(make_group("slots", 0, 1, 3));
  EXPECT_EQ(witness.value("SELECT count(*) FROM " + schema.table() + " WHERE last_acquisition_at BETWEEN '" +
                          before + "' AND clock_timestamp() AND version = 1"),
            "2");
}

TEST(PostgresLimit, TheVersionWrapsAtTheEndOfInteger) {
  Schema schema;
  Process p(schema);
  const auto group = make_group("old", 1e6);
  const auto slots = make_group("old slots", 0, 1, 5);
  p.acquire(group);
  p.acquire(slots);
  Witness witness;
  witness.script("UPDATE " + schema.table() + " SET version = 2147483647");
  EXPECT_EQ(p.acquire(group).verdict, Verdict::granted);
  EXPECT_EQ(p.acquire(slots).verdict, Verdict::granted);
  EXPECT_EQ(witness.ask("SELECT version FROM " + schema.table()), (Table{{"1"}, {"1"}}));
}

TEST(PostgresLimit, RowsThatHoldInfinityDoNotBreakTheStatement) {
  Schema schema;
  Process p(schema);
  ASSERT_TRUE(p.initialize().ok());
  Witness().script("INSERT INTO " + schema.table() +
                   " (group_id, last_acquisition_at) VALUES ('never', '-infinity'), ('always', 'infinity')");
  EXPECT_EQ(p.acquire(make_group("never", 1), 0).verdict, Verdict::granted);
  EXPECT_EQ(p.acquire(make_group("always", 1), 0).verdict, Verdict::rate_limited);
}

// --- giving back --------------------------------------------------------------------------------

TEST(PostgresLimit, ARefundCountsOnlyWhileItsGrantIsTheNewest) {
  Schema schema;
  Process p(schema);
  const auto group = make_group("api", 1, 1);
  const store::AcquireReply first = p.acquire(group);
  const store::AcquireReply second = p.acquire(group);
  store::LimitStore& limits = *p.store->limits();
  const std::string before = row_of(schema, "api");
  limits.refund(group, 1, first.stamp);
  EXPECT_NEAR(static_cast<double>(p.peek(group).full_after), 2e9, 3e8) << "a later grant: nothing";
  EXPECT_EQ(row_of(schema, "api"), before);
  // The second refund follows the first.
  const std::int64_t stamp = limits.refund(group, 1, second.stamp);
  limits.refund(group, 1, stamp);
  EXPECT_EQ(p.peek(group).available, 1);
}

TEST(PostgresLimit, SettleChargesAndGivesBackWhateverHappenedSince) {
  Schema schema;
  Process p(schema);
  const auto group = make_group("api", 1, 10);
  p.acquire(group);
  store::LimitStore& limits = *p.store->limits();
  ASSERT_TRUE(p.finish([&](auto done) { limits.settle(group, 5, done); }).ok());
  EXPECT_EQ(p.peek(group).available, 4);
  ASSERT_TRUE(p.finish([&](auto done) { limits.settle(group, -3, done); }).ok());
  EXPECT_EQ(p.peek(group).available, 7);
}

TEST(PostgresLimit, ResetForgetsConsumptionAndSlots) {
  Schema schema;
  Process p(schema);
  const auto group = make_group("api", 0.001, 2, 2);
  std::vector<store::HolderId> lost;
  p.store->limits()->on_lost([&](const std::string&, store::HolderId holder) { lost.push_back(holder); });
  const store::HolderId holder = p.acquire(group).holder;
  p.acquire(group);
  EXPECT_NE(p.acquire(group, 0).verdict, Verdict::granted);
  ASSERT_TRUE(p.finish([&](auto done) { p.store->limits()->reset(group, done); }).ok());
  EXPECT_EQ(lost, std::vector<store::HolderId>{holder}) << "one report for the incarnation";
  EXPECT_EQ(p.peek(group).in_use, 0);
  const std::vector<Request> again = p.acquire_many(group, 2, 0);
  EXPECT_TRUE(again[0].granted() && again[1].granted());
  EXPECT_NE(again[0].reply.holder, holder);
}

TEST(PostgresLimit, APeekChargesNothing) {
  Schema schema;
  Process p(schema);
  const auto group = make_group("api", 1, 3);
  EXPECT_EQ(p.peek(group).available, 3) << "no row yet";
  EXPECT_EQ(Witness().value("SELECT count(*) FROM " + schema.table()), "0");
  p.acquire(group);
  const std::string before = row_of(schema, "api");
  for (int i = 0; i < 3; ++i) EXPECT_EQ(p.peek(group).available, 2);
  EXPECT_EQ(row_of(schema, "api"), before);
}

// --- bounds and ends ----------------------------------------------------------------------------

TEST(PostgresLimit, GroupIdsThatTheColumnCannotHoldAreRefusedBeforeTheyAreSent) {
  Schema schema;
  Process p(schema);
  std::string wide;
  for (int i = 0; i < 255; ++i) wide += "\u00e9";
  EXPECT_EQ(p.acquire(make_group(wide, 10)).verdict, Verdict::granted) << "255 characters, 510 bytes";
  for (const std::string& id : {std::string(), std::string(256, 'x'), std::string("a\0b", 3),
                                std::string("\xff"), std::string("\xed\xa0\x80"), std::string("\xc3")}) {
    EXPECT_EQ(p.acquire(make_group(id, 10)).status.code, Code::invalid) << id;
  }
  EXPECT_EQ(p.acquire(make_group("it's {\"a\",\\}, ok", 10)).verdict, Verdict::granted);
  EXPECT_EQ(
      Witness().value("SELECT count(*) FROM " + schema.table() + " WHERE group_id = 'it''s {\"a\",\\}, ok'"),
      "1");
}

TEST(PostgresLimit, WhatIsNotSentCanBeTakenBackAndWhatIsSentCannot) {
  Schema schema;
  Process p(schema);
  Request waiting;
  waiting.group = make_group("api", 1);
  p.store->limits()->acquire(&waiting);  // no connection yet
  EXPECT_TRUE(p.store->limits()->abandon(&waiting));
  EXPECT_FALSE(p.store->limits()->abandon(&waiting));
  ASSERT_TRUE(p.initialize().ok());
  const store::AcquireReply reply = p.acquire(waiting.group);
  EXPECT_EQ(reply.wait, 0) << "the one taken back was not charged";
  EXPECT_FALSE(waiting.answered);
}

TEST(PostgresLimit, CloseAnswersWhatIsQueuedAndGivesSlotsBack) {
  Schema schema;
  Request queued;
  {
    Process p(schema);
    const auto group = make_group("jobs", 0, 1, 3);
    const store::HolderId holder = p.acquire(group).holder;
    p.store->limits()->release(group, holder);
    queued.group = group;
    p.store->limits()->acquire(&queued);
  }
  EXPECT_TRUE(queued.answered);
  EXPECT_EQ(
      Witness().value("SELECT coalesce(sum(slots), 0) FROM " + schema.table("rate_limiter_state_leases")),
      queued.granted() ? "1" : "0");
}

TEST(PostgresLimit, AConnectionThatDiedWhileIdleCostsNobodyAnything) {
  Schema schema;
  Process p(schema);
  const auto group = make_group("api", 1000);
  p.acquire(group);
  Witness().ask(
      "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'ratesync' "
      "AND pid <> pg_backend_pid()");
  const store::AcquireReply reply = p.acquire(group);
  EXPECT_TRUE(reply.status.ok() || reply.status.code == Code::in_doubt) << reply.status.message;
  EXPECT_TRUE(p.acquire(group).status.ok()) << "and it recovers";
}

TEST(PostgresLimit, PureRatesCommitLazilyAndTheSettingEndsWithTheTransaction) {
  Schema schema;
  ASSERT_TRUE(Process(schema).initialize().ok());
  Witness witness;
  const LimitSql sql = make_limit_sql({schema.table(), ""});
  const Statement show{"", "SELECT current_setting('synchronous_commit')"};
  postgres::Run run{make_group("api", 10), 1, kForever, false, {nullptr}};
  std::vector<Param> params = run_params({run});
  params.push_back(Param::text("t"));
  std::vector<Call> calls;
  calls.push_back({&sql.rate, std::move(params)});
  calls.push_back({&show, {}});
  const PipelineResult result = witness.run(std::move(calls));
  ASSERT_TRUE(result.status.ok()) << result.status.message;
  EXPECT_EQ(result.results[1]->text(0, 0), "off");
  EXPECT_EQ(witness.value("SHOW synchronous_commit"), "on");
}

TEST(PostgresLimit, UpdatedAtMovesAtMostOnceAMinuteSoThatUpdatesStayInTheirPage) {
  Schema schema;
  Process p(schema);
  const auto group = make_group("api", 1e6);
  p.acquire(group);
  Witness witness;
  const std::string select = "SELECT updated_at FROM " + schema.table();
  const std::string first = witness.value(select);
  for (int i = 0; i < 3; ++i) p.acquire(group);
  EXPECT_EQ(witness.value(select), first);
  witness.script("UPDATE " + schema.table() + " SET updated_at = updated_at - interval '2 minutes'");
  p.acquire(group);
  EXPECT_GE(witness.value(select), first);
}
