// The tables: made by hand with the documented grants, made by auto_create, made by rate-sync 0.2,
// under hostile names, and what is said when something is missing.
#include "limit_rig.h"

using namespace ratesync;
using namespace ratesync::testing;
using namespace ratesync::postgres;
using store::Verdict;

namespace {

// A role with nothing but what the test grants.
class Role {
 public:
  Role() : name("limits_role_" + std::to_string(getpid())) {
    Witness().script("DO $$ BEGIN CREATE ROLE " + name +
                     " LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$");
  }
  ~Role() { Witness().script("DROP OWNED BY " + name + "; DROP ROLE " + name); }
  const std::string name;
};

const auto by_hand = [](PostgresOptions& options) { options.auto_create = false; };

bool mentions(const std::string& text, std::initializer_list<const char*> parts) {
  for (const char* part : parts)
    if (text.find(part) == std::string::npos) return false;
  return true;
}

std::string finding(const std::vector<store::Finding>& all, const std::string& subject,
                    store::Finding::Level level) {
  for (const store::Finding& f : all)
    if (f.subject == subject && f.level == level) return f.message;
  return "";
}

Result<std::vector<store::MigrationStep>> migrate(Process& p, bool dry_run) {
  std::optional<Result<std::vector<store::MigrationStep>>> out;
  p.store->migrate(dry_run, [&](Result<std::vector<store::MigrationStep>> r) { out = std::move(r); });
  EXPECT_TRUE(p.until([&] { return out.has_value(); }));
  return std::move(*out);
}

}  // namespace

TEST(PostgresSchema, TheDocumentedTableWithTheDocumentedGrantsDoesEverythingDocumented) {
  Role role;
  Schema schema;
  schema.create_seed_table();
  Witness().script("GRANT USAGE ON SCHEMA " + schema.quoted() + " TO " + role.name +
                   "; GRANT SELECT, INSERT, UPDATE ON " + schema.table() + " TO " + role.name);
  Process a(schema, by_hand, role.name), b(schema, by_hand, role.name);
  ASSERT_TRUE(a.initialize().ok()) << a.initialize().message;
  EXPECT_EQ(a.acquire(make_group("api", 10)).verdict, Verdict::granted);

  const auto group = make_group("jobs", 0, 1, 2);
  const store::AcquireReply first = a.acquire(group), second = a.acquire(group);
  EXPECT_EQ(second.verdict, Verdict::granted);
  EXPECT_EQ(b.acquire(group).verdict, Verdict::concurrency_full);
  EXPECT_EQ(Witness().value("SELECT current_concurrent FROM " + schema.table() + " WHERE group_id = 'jobs'"),
            "2");
  a.store->limits()->release(group, first.holder);
  EXPECT_EQ(a.peek(group).in_use, 1);
  EXPECT_EQ(b.acquire(group).verdict, Verdict::granted);
  ASSERT_TRUE(a.finish([&](auto done) { a.store->limits()->reset(group, done); }).ok());
  EXPECT_EQ(b.peek(group).in_use, 0);

  const std::string missing = finding(a.doctor(), "leases", store::Finding::Level::warning);
  EXPECT_TRUE(mentions(missing, {"rate_limiter_state_leases", "ratesync migrate"})) << missing;
}

TEST(PostgresSchema, ARoleThatOwnsNothingInitialisesWhereEverythingIsThere) {
  Role role;
  Schema schema;
  Witness witness;
  schema.create_seed_table();
  witness.script("GRANT USAGE ON SCHEMA " + schema.quoted() + " TO " + role.name +
                 "; GRANT SELECT, INSERT, UPDATE ON " + schema.table() + " TO " + role.name);
  {
    Process owner(schema);
    ASSERT_TRUE(migrate(owner, false).ok());
  }
  // The migration passed the right to the leases on to who may write the state table.
  Process app(schema, {}, role.name);
  const Status status = app.initialize();
  ASSERT_TRUE(status.ok()) << status.message;
  const auto group = make_group("jobs", 10, 1, 2);
  app.store->limits()->release(group, app.acquire(group).holder);
  EXPECT_EQ(app.peek(group).in_use, 0);
  EXPECT_EQ(finding(app.doctor(), "leases", store::Finding::Level::warning), "");
  // Leases that others use and we may not: counting on our own would grant too much.
  witness.script("REVOKE ALL ON " + schema.table("rate_limiter_state_leases") + " FROM " + role.name);
  Process blind(schema, {}, role.name);
  EXPECT_TRUE(mentions(blind.initialize().message, {"GRANT SELECT, INSERT, UPDATE, DELETE", "_leases"}));
}

TEST(PostgresSchema, AMissingTableIsNamedWithTheCureAndFoundOnceItIsThere) {
  Schema schema;
  Process p(schema, by_hand);
  const Status status = p.initialize();
  EXPECT_EQ(status.code, Code::server);
  EXPECT_EQ(status.sqlstate, "42P01");
  EXPECT_TRUE(mentions(status.message,
                       {schema.name.c_str(), "rate_limiter_state", "auto_create", "ratesync migrate"}))
      << status.message;
  EXPECT_EQ(p.acquire(make_group("api", 10)).status.sqlstate, "42P01");
  schema.create_seed_table();
  EXPECT_EQ(p.acquire(make_group("api", 10)).verdict, Verdict::granted);
  Witness().script("DROP TABLE " + schema.table());
  EXPECT_EQ(p.acquire(make_group("api", 10)).status.sqlstate, "42P01");
  schema.create_seed_table();
  EXPECT_EQ(p.acquire(make_group("api", 10)).verdict, Verdict::granted) << "and it recovers";
}

TEST(PostgresSchema, AMissingGrantIsPrintedReadyToRun) {
  Role role;
  Schema schema;
  schema.create_seed_table();
  Process p(schema, by_hand, role.name);
  const Status status = p.initialize();
  EXPECT_EQ(status.sqlstate, "42501");
  const std::size_t from = status.message.find("GRANT ");
  ASSERT_NE(from, std::string::npos) << status.message;
  Witness().script(status.message.substr(from));
  EXPECT_TRUE(p.initialize().ok());
}

TEST(PostgresSchema, AutoCreateWithoutTheRightToCreateSaysWhichRight) {
  Role role;
  Schema schema;
  Witness().script("GRANT USAGE ON SCHEMA " + schema.quoted() + " TO " + role.name);
  Process p(schema, {}, role.name);
  const Status status = p.initialize();
  EXPECT_TRUE(mentions(status.message, {"GRANT CREATE ON SCHEMA", role.name.c_str(), "permission denied"}))
      << status.message;
}

TEST(PostgresSchema, WhatAutoCreateMakesIsTheDocumentedTable) {
  Schema made, seed;
  seed.create_seed_table();
  ASSERT_TRUE(Process(made).initialize().ok());
  Witness witness;
  const auto columns = [&](const Schema& schema) {
    return witness.ask(
        "SELECT column_name, data_type, character_maximum_length, is_nullable, column_default "
        "FROM information_schema.columns WHERE table_name = 'rate_limiter_state' AND table_schema = '" +
        schema.name + "' ORDER BY ordinal_position");
  };
  EXPECT_EQ(columns(made), columns(seed));
  EXPECT_EQ(columns(made).size(), 6u);
  const auto indexes = [&](const Schema& schema) {
    return witness.ask(
        "SELECT indexname, replace(indexdef, schemaname, '') FROM pg_indexes WHERE schemaname = '" +
        schema.name + "' AND tablename = 'rate_limiter_state' ORDER BY 1");
  };
  EXPECT_EQ(indexes(made), indexes(seed));
}

TEST(PostgresSchema, UnloggedTablesAreMadeOnRequest) {
  Schema schema;
  ASSERT_TRUE(Process(schema, [](PostgresOptions& o) { o.unlogged = true; }).initialize().ok());
  EXPECT_EQ(
      Witness().value(
          "SELECT string_agg(relpersistence::text, '' ORDER BY relname) FROM pg_class WHERE relkind = 'r' "
          "AND relname IN ('rate_limiter_state', 'rate_limiter_state_leases') "
          "AND relnamespace = '" +
          schema.quoted() + "'::regnamespace"),
      "uu");
}

TEST(PostgresSchema, HostileNamesAreOnlyNames) {
  const std::string table = "a\"b.c'd {0} {1} $1 @last@; --\\";
  Schema schema("we\"ird sch'ema." + std::to_string(getpid()) + "; DROP");
  Process p(schema, [&](PostgresOptions& o) { o.table_name = table; });
  const Status status = p.initialize();
  ASSERT_TRUE(status.ok()) << status.message;
  EXPECT_EQ(p.acquire(make_group("api", 10)).verdict, Verdict::granted);
  const auto group = make_group("jobs", 10, 1, 1);
  p.store->limits()->release(group, p.acquire(group).holder);
  EXPECT_EQ(p.peek(group).in_use, 0);
  EXPECT_TRUE(p.finish([&](auto done) { p.store->limits()->reset(group, done); }).ok());
  EXPECT_EQ(Witness().value("SELECT count(*) FROM " + schema.table(table)), "2");
}

TEST(PostgresSchema, NamesThatPostgresWouldCutAreRefused) {
  asio::io_context io;
  const Clock clock;
  const auto made = [&](std::size_t length, bool auto_create) {
    PostgresOptions options;
    options.url = PostgresServer::instance().url();
    options.table_name = std::string(length, 't');
    options.auto_create = auto_create;
    auto result = PostgresStore::create(io, clock, options);
    return result.ok() ? Status::success() : result.status();
  };
  EXPECT_TRUE(made(51, true).ok());
  EXPECT_TRUE(mentions(made(52, true).message, {"table_name", "51 bytes"})) << made(52, true).message;
  EXPECT_TRUE(made(63, false).ok());
  EXPECT_TRUE(mentions(made(64, false).message, {"table_name", "63"})) << made(64, false).message;
  EXPECT_FALSE(made(0, false).ok());
}

TEST(PostgresSchema, ALongNameMadeByHandWorksWithoutLeases) {
  Schema schema;
  const std::string table(63, 't');
  schema.create_seed_table(table);
  Process p(schema, [&](PostgresOptions& o) {
    o.table_name = table;
    o.auto_create = false;
  });
  ASSERT_TRUE(p.initialize().ok()) << p.initialize().message;
  EXPECT_EQ(p.acquire(make_group("jobs", 0, 1, 1)).verdict, Verdict::granted);
  EXPECT_EQ(migrate(p, true).status().code, Code::invalid);
}

TEST(PostgresSchema, TablesOfRateSync02AreRecognisedAndConverted) {
  Schema schema;
  Witness witness;
  witness.script("CREATE TABLE " + schema.table() +
                 " (group_id VARCHAR(255) PRIMARY KEY, last_acquisition_at TIMESTAMPTZ NOT NULL,"
                 " version BIGINT NOT NULL DEFAULT 1, concurrent_count INTEGER DEFAULT 0);"
                 "INSERT INTO " +
                 schema.table() +
                 " VALUES ('a', now(), 7, 3), ('b', now(), 2147483648, NULL), "
                 "('c', now(), 2147483647, 0)");
  Process p(schema);
  const Status status = p.initialize();
  EXPECT_TRUE(mentions(status.message, {"rate-sync 0.2", "ratesync migrate", "ALTER TABLE"}))
      << status.message;
  const auto plan = migrate(p, true);
  ASSERT_TRUE(plan.ok());
  EXPECT_FALSE(plan.value()[2].applied);
  EXPECT_EQ(witness.value("SELECT count(*) FROM " + schema.table() + " WHERE concurrent_count = 3"), "1")
      << "dry run";
  const auto done = migrate(p, false);
  ASSERT_TRUE(done.ok()) << done.status().message;
  EXPECT_EQ(witness.ask("SELECT version, current_concurrent FROM " + schema.table() + " ORDER BY group_id"),
            (Table{{"7", "3"}, {"1", "0"}, {"2147483647", "0"}}));
  ASSERT_TRUE(p.initialize().ok());
  EXPECT_EQ(p.acquire(make_group("c", 1e6)).verdict, Verdict::granted);
  const auto after = migrate(p, true);
  for (const store::MigrationStep& step : after.value()) EXPECT_TRUE(step.applied) << step.name;
}

TEST(PostgresSchema, ATableOfSomethingElseIsRefusedByItsColumns) {
  Schema schema;
  Witness().script("CREATE TABLE " + schema.table() + " (group_id TEXT PRIMARY KEY, amount INTEGER)");
  Process p(schema);
  EXPECT_TRUE(mentions(p.initialize().message, {"last_acquisition_at", "table_name"}))
      << p.initialize().message;
}

TEST(PostgresSchema, BadOptionsNameTheFieldTheExpectedAndTheReceived) {
  asio::io_context io;
  const Clock clock;
  const auto said = [&](const std::function<void(PostgresOptions&)>& change) {
    PostgresOptions options;
    options.url = PostgresServer::instance().url();
    change(options);
    auto result = PostgresStore::create(io, clock, options);
    return result.ok() ? std::string() : result.status().message;
  };
  EXPECT_TRUE(mentions(said([](auto& o) { o.synchronous_commit = "remote"; }),
                       {"synchronous_commit", "auto", "remote"}));
  EXPECT_TRUE(mentions(said([](auto& o) { o.statement_cache = "maybe"; }), {"statement_cache", "maybe"}));
  EXPECT_TRUE(
      mentions(said([](auto& o) { o.pool_min_size = 11; }), {"pool_min_size", "pool_max_size (10)", "11"}));
  EXPECT_TRUE(mentions(said([](auto& o) { o.pool_max_size = 0; }), {"pool_max_size"}));
  EXPECT_TRUE(mentions(said([](auto& o) { o.url = "mysql://x"; }), {"mysql"}));
}

TEST(PostgresSchema, DoctorKnowsServerTableGrantsIndexClockAndSize) {
  Schema schema;
  Process p(schema);
  ASSERT_TRUE(p.initialize().ok());
  const std::vector<store::Finding> findings = p.doctor();
  for (const char* subject :
       {"server version", "table", "grants", "leases", "clock", "connections", "size"}) {
    bool found = false;
    for (const store::Finding& f : findings) found = found || f.subject == subject;
    EXPECT_TRUE(found) << subject;
  }
  for (const store::Finding& f : findings)
    EXPECT_NE(f.level, store::Finding::Level::error) << f.subject << f.message;
  Witness().script("DROP INDEX " + schema.quoted() + ".idx_rate_limiter_state_updated");
  EXPECT_TRUE(mentions(finding(p.doctor(), "index", store::Finding::Level::warning), {"CREATE INDEX"}));
}
