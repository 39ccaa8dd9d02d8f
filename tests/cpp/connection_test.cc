// The libpq connection against a real server: one pipeline is one transaction, and what the server
// says about it arrives whole.
#include "ratesync/postgres/connection.h"

#include <gtest/gtest.h>

#include "connection_fixture.h"

using namespace ratesync;
using namespace ratesync::postgres;
using ratesync::testing::ConnectionTest;

TEST_F(ConnectionTest, RunsSeveralStatementsAsOnePipeline) {
  auto c = connected();
  const Statement a{"", "SELECT $1::int + 1, NULL, true"}, b{"", "SELECT g FROM generate_series(1, 3) g"},
      d{"", ""};
  PipelineResult r = run(*c, {Call{&a, {Param::text("41")}}, Call{&b, {}}, Call{&d, {}}});
  ASSERT_TRUE(r.status.ok()) << r.status.message;
  ASSERT_EQ(r.results.size(), 3u);
  EXPECT_EQ(r.results[0]->integer(0, 0), 42);
  EXPECT_TRUE(r.results[0]->is_null(0, 1));
  EXPECT_EQ(r.results[0]->integer(0, 1), 0);
  EXPECT_TRUE(r.results[0]->boolean(0, 2));
  EXPECT_EQ(r.results[1]->rows(), 3);
  EXPECT_EQ(r.results[2]->rows(), 0);
  c->close();
  EXPECT_EQ(r.results[1]->text(2, 0), "3") << "results outlive the connection";
  EXPECT_EQ(r.results[1]->text(9, 9), "");
}

TEST_F(ConnectionTest, AnErrorInTheMiddleUndoesItsNeighboursAndTheConnectionGoesOn) {
  auto c = connected();
  ASSERT_TRUE(script(*c, "CREATE TEMP TABLE t(x int CHECK (x > 0))").ok());
  const Statement insert{"", "INSERT INTO t VALUES ($1)"};
  const auto value = [](const char* v) { return std::vector<Param>{Param::text(v)}; };
  const PipelineResult r =
      run(*c, {Call{&insert, value("1")}, Call{&insert, value("-1")}, Call{&insert, value("2")}});
  EXPECT_EQ(r.status.code, Code::server);
  EXPECT_EQ(r.status.sqlstate, "23514");
  EXPECT_EQ(r.failed_call, 1u);
  EXPECT_NE(r.server_message.find("check constraint"), std::string::npos);
  EXPECT_TRUE(r.results.empty());
  EXPECT_EQ(one(*c, "SELECT count(*) FROM t"), "0");
}

TEST_F(ConnectionTest, ACommitThatFailsIsAnErrorOfTheLastCall) {
  auto c = connected();
  ASSERT_TRUE(script(*c, "CREATE TEMP TABLE d(x int UNIQUE DEFERRABLE INITIALLY DEFERRED)").ok());
  const Statement insert{"", "INSERT INTO d VALUES (1)"};
  const PipelineResult r = run(*c, {Call{&insert, {}}, Call{&insert, {}}});
  EXPECT_EQ(r.status.code, Code::server) << r.status.message;
  EXPECT_EQ(r.status.sqlstate, "23505");
  EXPECT_EQ(one(*c, "SELECT count(*) FROM d"), "0");
}

TEST_F(ConnectionTest, AnEmptyPipelineIsFine) {
  auto c = connected();
  EXPECT_TRUE(run(*c, std::vector<Call>{}).status.ok());
  EXPECT_EQ(one(*c, "SELECT 7"), "7");
}

TEST_F(ConnectionTest, NamedStatementsArePreparedOnceAndUsedAgain) {
  auto c = connected();
  ASSERT_TRUE(c->named_statements()) << "no pooler in between";
  const Statement named{"rs_add", "SELECT $1::int + $2::int"};
  const std::vector<Param> params{Param::text("1"), Param::text("2")};
  for (int i = 0; i < 3; ++i) {
    const PipelineResult r = run(*c, {Call{&named, params}, Call{&named, params}});
    ASSERT_TRUE(r.status.ok()) << r.status.message;
    EXPECT_EQ(r.results.size(), 2u);
    EXPECT_EQ(r.results[1]->integer(0, 0), 3);
  }
  // How often it was used is counted from PostgreSQL 14 on.
  EXPECT_EQ(one(*c,
                "SELECT coalesce((j->>'generic_plans')::int + (j->>'custom_plans')::int, 6) FROM (SELECT "
                "to_jsonb(p) AS j FROM pg_prepared_statements p WHERE name = 'rs_add') AS s"),
            "6");
}

TEST_F(ConnectionTest, AStatementPreparedInAFailedPipelineIsNotPreparedTwice) {
  auto c = connected();
  const Statement named{"rs_div", "SELECT 1 / $1::int"};
  EXPECT_EQ(run(*c, {Call{&named, {Param::text("0")}}}).status.sqlstate, "22012");
  EXPECT_TRUE(run(*c, {Call{&named, {Param::text("1")}}}).status.ok());
  EXPECT_TRUE(c->named_statements()) << "no fall-back was needed";
}

TEST_F(ConnectionTest, SurvivesDeallocateBehindItsBack) {
  auto c = connected();
  ASSERT_TRUE(script(*c, "CREATE TEMP TABLE n(x int)").ok());
  const Statement first{"rs_first", "INSERT INTO n VALUES (1)"},
      second{"rs_second", "SELECT count(*) FROM n"};
  const std::vector<Call> calls{Call{&first, {}}, Call{&second, {}}};
  ASSERT_TRUE(run(*c, calls).status.ok());
  ASSERT_TRUE(script(*c, "DEALLOCATE ALL").ok());
  for (int i = 2; i < 6; ++i) {
    const PipelineResult r = run(*c, calls);
    ASSERT_TRUE(r.status.ok()) << r.status.message;
    EXPECT_EQ(r.results[1]->integer(0, 0), i) << "each pipeline counted exactly once";
  }
  EXPECT_TRUE(c->named_statements());
}

TEST_F(ConnectionTest, ANameTakenBySomebodyElseIsNotUsed) {
  ConnectionOptions on;
  on.statement_cache = ConnectionOptions::StatementCache::on;
  auto c = connected(on);
  ASSERT_TRUE(script(*c, "PREPARE rs_taken AS SELECT 'theirs'").ok());
  const Statement ours{"rs_taken", "SELECT 'ours'"};
  const PipelineResult r = run(*c, {Call{&ours, {}}});
  ASSERT_TRUE(r.status.ok()) << r.status.message;
  EXPECT_EQ(r.results[0]->text(0, 0), "ours");
  EXPECT_FALSE(c->named_statements());
}

TEST_F(ConnectionTest, ATableChangedUnderANamedStatementIsNoError) {
  auto c = connected();
  ASSERT_TRUE(script(*c, "CREATE TEMP TABLE w(a int); INSERT INTO w VALUES (1)").ok());
  const Statement star{"rs_star", "SELECT * FROM w"};
  ASSERT_TRUE(run(*c, {Call{&star, {}}}).status.ok());
  ASSERT_TRUE(script(*c, "ALTER TABLE w ADD b int DEFAULT 2").ok());
  const PipelineResult r = run(*c, {Call{&star, {}}});
  ASSERT_TRUE(r.status.ok()) << r.status.message;
  EXPECT_EQ(r.results[0]->columns(), 2);
}

TEST_F(ConnectionTest, StatementCacheOffPreparesNothing) {
  ConnectionOptions off;
  off.statement_cache = ConnectionOptions::StatementCache::off;
  auto c = connected(off);
  const Statement named{"rs_never", "SELECT 1"};
  ASSERT_TRUE(run(*c, {Call{&named, {}}}).status.ok());
  EXPECT_EQ(one(*c, "SELECT count(*) FROM pg_prepared_statements"), "0");
}

TEST_F(ConnectionTest, AMegabyteGoesInAndManyRowsComeOut) {
  auto c = connected();
  const std::string big(3'000'000, 'x');
  const Statement echo{"", "SELECT length($1), $1"},
      rows{"", "SELECT g, repeat('y', 50) FROM generate_series(1, 50000) g"};
  const PipelineResult r =
      run(*c, {Call{&echo, {Param::text(big)}}, Call{&rows, {}}, Call{&echo, {Param::text(big)}}});
  ASSERT_TRUE(r.status.ok()) << r.status.message;
  EXPECT_EQ(r.results[0]->integer(0, 0), 3'000'000);
  EXPECT_EQ(r.results[2]->text(0, 1), big);
  ASSERT_EQ(r.results[1]->rows(), 50'000);
  EXPECT_EQ(r.results[1]->integer(49'999, 0), 50'000);
}

TEST_F(ConnectionTest, ManyLargeAnswersAndRequestsAtOnceDoNotLockUp) {
  auto c = connected();
  const std::string big(300'000, 'z');
  const Statement echo{"", "SELECT $1::text"};
  const PipelineResult r = run(*c, std::vector<Call>(60, Call{&echo, {Param::text(big)}}));
  ASSERT_TRUE(r.status.ok()) << r.status.message;
  EXPECT_EQ(r.results[59]->text(0, 0), big);
}

TEST_F(ConnectionTest, ANulInAParameterIsRefusedBeforeItIsCutInHalf) {
  auto c = connected();
  EXPECT_EQ(run(*c, "SELECT $1::text", {Param::text(std::string("a\0b", 3))}).status.code, Code::invalid);
  EXPECT_EQ(one(*c, "SELECT 1"), "1");
}

TEST_F(ConnectionTest, ARunWhileAnotherIsUnderWayIsRefusedAndDisturbsNothing) {
  auto c = connected();
  const Statement nap{"", "SELECT pg_sleep(0.05)"};
  std::optional<Status> first, second;
  c->run({Call{&nap, {}}}, [&](PipelineResult r) { first = r.status; });
  c->run({Call{&nap, {}}}, [&](PipelineResult r) { second = r.status; });
  ASSERT_TRUE(wait_until([&] { return first && second; }));
  EXPECT_TRUE(first->ok());
  EXPECT_EQ(second->code, Code::internal);
}

TEST_F(ConnectionTest, NoticesDisturbNobody) {
  auto c = connected();
  ::testing::internal::CaptureStderr();
  EXPECT_TRUE(script(*c, "DO $$ BEGIN RAISE WARNING 'hush'; END $$").ok());
  EXPECT_TRUE(run(*c, "DO $$ BEGIN RAISE WARNING 'hush'; END $$").status.ok());
  EXPECT_EQ(::testing::internal::GetCapturedStderr(), "");
}

TEST_F(ConnectionTest, AScriptThatFailsInItsTransactionLeavesNothingOpen) {
  auto c = connected();
  const Status status = script(*c, "BEGIN; CREATE TABLE rs_half(x int); SELECT 1/0; COMMIT");
  EXPECT_EQ(status.code, Code::server);
  EXPECT_EQ(status.sqlstate, "22012");
  EXPECT_TRUE(c->open());
  EXPECT_EQ(one(*c, "SELECT count(*) FROM pg_class WHERE relname = 'rs_half'"), "0");
  EXPECT_TRUE(script(*c, "BEGIN; SELECT 1; COMMIT").ok());
}

TEST_F(ConnectionTest, APipelineThatLeavesATransactionOpenLosesTheConnection) {
  auto c = connected();
  EXPECT_TRUE(run(*c, "BEGIN").status.ok());
  EXPECT_FALSE(c->open());
}

TEST_F(ConnectionTest, NoticesAtOnceThatTheServerEndedAnIdleSession) {
  auto c = connected(), killer = connected();
  std::optional<Status> broken;
  c->on_broken([&](Status s) {
    EXPECT_FALSE(broken) << "told twice";
    broken = std::move(s);
  });
  const std::string pid = one(*c, "SELECT pg_backend_pid()");
  EXPECT_EQ(one(*killer, "SELECT pg_terminate_backend(" + pid + ")"), "t");
  ASSERT_TRUE(wait_until([&] { return broken.has_value(); }));
  EXPECT_EQ(broken->code, Code::unavailable);
  EXPECT_EQ(broken->sqlstate, "57P01");
  EXPECT_FALSE(c->open());
  EXPECT_EQ(run(*c, "SELECT 1").status.code, Code::unavailable);
}

TEST_F(ConnectionTest, ASessionEndedBetweenPipelinesIsUnavailableNotInDoubt) {
  auto c = connected(), killer = connected();
  const std::string pid = one(*c, "SELECT pg_backend_pid()");
  ASSERT_NO_FATAL_FAILURE(end_session(*killer, pid));
  const PipelineResult r = run(*c, "SELECT 1");
  EXPECT_EQ(r.status.code, Code::unavailable) << r.status.message;
}

TEST_F(ConnectionTest, ASessionEndedInTheMiddleIsInDoubt) {
  auto c = connected(), killer = connected();
  const std::string pid = one(*c, "SELECT pg_backend_pid()");
  std::optional<PipelineResult> r;
  const Statement nap{"", "SELECT pg_sleep(30)"};
  c->run({Call{&nap, {}}}, [&](PipelineResult result) { r = std::move(result); });
  while (one(*killer, "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND pid = " + pid) ==
         "0") {
  }
  EXPECT_EQ(one(*killer, "SELECT pg_terminate_backend(" + pid + ")"), "t");
  ASSERT_TRUE(wait_until([&] { return r.has_value(); }));
  EXPECT_EQ(r->status.code, Code::in_doubt);
  EXPECT_EQ(r->status.sqlstate, "57P01");
  EXPECT_FALSE(c->open());
}
