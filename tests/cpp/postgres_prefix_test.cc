// The tables of a prefix: made by auto_create (ten processes at once) or by `migrate`, used by a role that
// owns nothing, under hostile prefixes, and what is said when something is missing.
#include "limit_rig.h"

using namespace ratesync;
using namespace ratesync::testing;
using namespace ratesync::postgres;

namespace {

class Role {
 public:
  Role() : name("state_role_" + std::to_string(getpid())) {
    Witness().script("DO $$ BEGIN CREATE ROLE " + name +
                     " LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$");
  }
  ~Role() { Witness().script("DROP OWNED BY " + name + "; DROP ROLE " + name); }
  const std::string name;
};

const auto by_hand = [](PostgresOptions& options) { options.auto_create = false; };

Status initialize_state(Process& p, const std::string& prefix) {
  auto state = p.store->state(prefix);
  if (!state.ok()) return state.status();
  return p.finish([&](auto done) { state.value()->initialize(done); });
}

Status initialize_locks(Process& p, const std::string& prefix) {
  auto locks = p.store->locks(prefix);
  if (!locks.ok()) return locks.status();
  return p.finish([&](auto done) { locks.value()->initialize(done); });
}

std::vector<store::MigrationStep> migrate(Process& p, const std::string& prefix, bool dry_run) {
  std::optional<Result<std::vector<store::MigrationStep>>> out;
  p.store->migrate_state(prefix, dry_run, [&](auto r) { out = std::move(r); });
  EXPECT_TRUE(p.until([&] { return out.has_value(); }));
  EXPECT_TRUE(out->ok()) << out->status().message;
  return out->ok() ? out->value() : std::vector<store::MigrationStep>{};
}

std::string finding(const std::vector<store::Finding>& all, const std::string& subject,
                    store::Finding::Level level) {
  for (const store::Finding& f : all)
    if (f.subject == subject && f.level == level) return f.message;
  return "";
}

bool mentions(const std::string& text, std::initializer_list<std::string> parts) {
  for (const std::string& part : parts)
    if (text.find(part) == std::string::npos) return false;
  return true;
}

}  // namespace

TEST(PostgresPrefix, AutoCreateByTenProcessesAtOnceMakesEachTableOnce) {
  Schema schema;
  std::vector<std::unique_ptr<Process>> processes;
  std::vector<std::optional<Status>> said(10);
  for (std::size_t i = 0; i < said.size(); ++i) {
    processes.push_back(std::make_unique<Process>(schema, [](auto& o) { o.pool_max_size = 1; }));
    processes.back()->store->state("acteon_").value()->initialize(
        [&said, i](Result<store::Unit> r) { said[i] = r.status(); });
  }
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  const auto missing = [&] {
    return std::any_of(said.begin(), said.end(), [](const auto& one) { return !one.has_value(); });
  };
  while (missing() && std::chrono::steady_clock::now() < end)
    for (auto& p : processes) {
      p->io.restart();
      p->io.poll();
    }
  for (const auto& status : said) {
    ASSERT_TRUE(status.has_value());
    EXPECT_TRUE(status->ok()) << status->message;
  }
  EXPECT_EQ(Witness().value("SELECT count(*) FROM pg_class WHERE relkind IN ('r', 'S') AND relnamespace = '" +
                            schema.quoted() + "'::regnamespace"),
            "7");
  EXPECT_EQ(Witness().value("SELECT string_agg(name, ',' ORDER BY number) FROM " +
                            schema.table("acteon_migrations")),
            "create_state_tables,create_token_sequence,create_timeouts_table,create_lock_tables");
}

TEST(PostgresPrefix, StateNeedsNoTableOfLimitsAndLimitsNoneOfState) {
  Schema schema;
  Process owner(schema, by_hand);
  EXPECT_FALSE(migrate(owner, "acteon_", true)[0].applied);
  EXPECT_EQ(Witness().value("SELECT count(*) FROM pg_class WHERE relnamespace = '" + schema.quoted() +
                            "'::regnamespace"),
            "0")
      << "dry run";
  migrate(owner, "acteon_", false);
  for (const store::MigrationStep& step : migrate(owner, "acteon_", true))
    EXPECT_TRUE(step.applied) << step.name;
  EXPECT_TRUE(initialize_state(owner, "acteon_").ok());
  EXPECT_TRUE(initialize_locks(owner, "acteon_").ok());
  EXPECT_TRUE(owner.initialize().ok()) << owner.initialize().message;
  for (const store::Finding& f : owner.doctor())
    EXPECT_NE(f.level, store::Finding::Level::error) << f.message;
  EXPECT_TRUE(
      mentions(finding(owner.doctor(), "state", store::Finding::Level::ok), {"acteon_state", "timeouts"}));

  Schema other;
  Process limits(other);
  EXPECT_TRUE(limits.acquire(make_group("api", 10)).status.ok());
  EXPECT_EQ(Witness().value("SELECT to_regclass('" + other.quoted() + ".acteon_state') IS NULL"), "t");
}

TEST(PostgresPrefix, AMissingTableIsNamedWithTheCureAndFoundOnceItIsThere) {
  Schema schema;
  Process p(schema, by_hand);
  const Status status = initialize_state(p, "acteon_");
  EXPECT_EQ(status.sqlstate, "42P01");
  EXPECT_TRUE(
      mentions(status.message, {schema.name, "acteon_state", "auto_create", "ratesync migrate -c FILE"}))
      << status.message;
  EXPECT_TRUE(mentions(finding(p.doctor(), "locks", store::Finding::Level::error), {"acteon_locks"}));
  migrate(p, "acteon_", false);
  EXPECT_TRUE(initialize_state(p, "acteon_").ok()) << "and it recovers";
  Witness().script("DROP TABLE " + schema.table("acteon_locks"));
  EXPECT_TRUE(initialize_state(p, "acteon_").ok()) << "locks are another matter";
  Process fresh(schema, by_hand);
  EXPECT_TRUE(initialize_state(fresh, "acteon_").ok());
  EXPECT_TRUE(mentions(initialize_locks(fresh, "acteon_").message, {"acteon_locks"}));
  migrate(fresh, "acteon_", false);
  EXPECT_TRUE(initialize_locks(fresh, "acteon_").ok());
}

TEST(PostgresPrefix, ARoleThatOwnsNothingWorksWithTheGrantsThatAreSaid) {
  Role role;
  Schema schema;
  Process owner(schema);
  migrate(owner, "acteon_", false);
  Process app(schema, {}, role.name);
  for (const auto& facet : {initialize_state, initialize_locks}) {
    const Status status = facet(app, "acteon_");
    EXPECT_EQ(status.sqlstate, "42501");
    const std::size_t from = status.message.find("GRANT ");
    ASSERT_NE(from, std::string::npos) << status.message;
    Witness().script(status.message.substr(from));
    EXPECT_TRUE(facet(app, "acteon_").ok()) << facet(app, "acteon_").message;
  }
}

TEST(PostgresPrefix, LaterTablesGrantThemselvesToWhoeverMayWriteState) {
  Role role;
  Schema schema;
  Process owner(schema);
  migrate(owner, "p_", false);
  Witness().script("DROP TABLE " + schema.table("p_locks") + ", " + schema.table("p_lock_waiters") + ", " +
                   schema.table("p_timeouts") + "; DROP SEQUENCE " + schema.table("p_lock_tokens") +
                   "; GRANT USAGE ON SCHEMA " + schema.quoted() + " TO " + role.name +
                   "; GRANT SELECT, INSERT, UPDATE, DELETE ON " + schema.table("p_state") + ", " +
                   schema.table("p_floors") + " TO " + role.name);
  migrate(owner, "p_", false);
  Process app(schema, by_hand, role.name);
  EXPECT_TRUE(initialize_state(app, "p_").ok()) << initialize_state(app, "p_").message;
  EXPECT_TRUE(initialize_locks(app, "p_").ok());
}

TEST(PostgresPrefix, HostilePrefixesAreOnlyNames) {
  Schema schema;
  Process p(schema);
  for (const std::string& prefix :
       {std::string("a\"b.c'd {0} $1 @x@; --\\"), std::string("$ratesync$; DROP"), std::string(),
        std::string(40, 'p'), std::string("\xC3\xA4\xE2\x82\xAC_")}) {
    const Status status = initialize_state(p, prefix);
    EXPECT_TRUE(status.ok()) << prefix << ": " << status.message;
    EXPECT_EQ(Witness().value("SELECT count(*) FROM " + schema.table(prefix + "state")), "0");
    migrate(p, prefix, false);
  }
  EXPECT_TRUE(mentions(p.store->state(std::string(41, 'p')).status().message, {"prefix", "40 bytes", "41"}));
  EXPECT_EQ(p.store->state(std::string("a\0b", 3)).status().code, Code::invalid);
  EXPECT_EQ(p.store->locks("\xff").status().code, Code::invalid);
}

TEST(PostgresPrefix, ATableOfSomethingElseIsRefusedByItsColumns) {
  Schema schema;
  Process p(schema);
  ASSERT_TRUE(p.initialize().ok());  // rate_limiter_state
  EXPECT_TRUE(mentions(initialize_state(p, "rate_limiter_").message, {"another prefix", "namespace"}))
      << initialize_state(p, "rate_limiter_").message;
}
