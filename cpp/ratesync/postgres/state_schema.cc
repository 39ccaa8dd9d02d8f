#include "ratesync/postgres/state_schema.h"

#include "ratesync/base/format.h"

namespace ratesync::postgres {
namespace {

using store::Finding;
using store::MigrationStep;

constexpr std::size_t kPrefixBytes = 40;  // room for the longest name that is derived, of an index

const std::vector<std::string> kStateColumns = {"namespace", "tenant",     "kind",      "key",     "bucket",
                                                "type",      "value",      "number",    "version", "removed",
                                                "op_id",     "updated_at", "expires_at"};
const std::vector<std::string> kFloorColumns = {"bucket", "version"};
const std::vector<std::string> kTimeoutColumns = {"namespace", "tenant",  "kind", "key",
                                                  "due_at",    "next_at", "claim"};
const std::vector<std::string> kLockColumns = {"namespace", "tenant", "name",        "token",
                                               "holder_id", "holder", "acquired_at", "expires_at"};
const std::vector<std::string> kLockWaiterColumns = {"namespace", "tenant", "name",
                                                     "waiter_id", "since",  "expires_at"};

// "C": one order everywhere, that of the bytes, and the fastest to compare.
constexpr const char* kName = "TEXT COLLATE \"C\" NOT NULL";

std::string grants(const PrefixNames& n, const std::string& table) {
  return pass_on_grants(n.schema, n.state, "SELECT, INSERT, UPDATE, DELETE", "TABLE " + n.quoted(table));
}

// fillfactor: a new version of a row finds room in its page; only when the expiry changes must
// indexes follow.
std::string create_state(const PrefixNames& n, bool schema_exists) {
  std::string sql;
  if (!schema_exists) sql = formatted("CREATE SCHEMA IF NOT EXISTS {};\n", quote_identifier(n.schema));
  return sql + formatted(
                   "CREATE TABLE IF NOT EXISTS {0} (\n"
                   "    namespace {3},\n"
                   "    tenant {3},\n"
                   "    kind {3},\n"
                   "    key {3},\n"
                   "    bucket INTEGER NOT NULL,\n"
                   "    type SMALLINT NOT NULL,\n"
                   "    value BYTEA,\n"
                   "    number BIGINT,\n"
                   "    version BIGINT NOT NULL,\n"
                   "    removed BOOLEAN NOT NULL DEFAULT false,\n"
                   "    op_id BIGINT NOT NULL,\n"
                   "    updated_at TIMESTAMPTZ NOT NULL,\n"
                   "    expires_at TIMESTAMPTZ,\n"
                   "    PRIMARY KEY (namespace, tenant, kind, key)\n"
                   ") WITH (fillfactor = 80);\n"
                   "CREATE INDEX IF NOT EXISTS {1} ON {0} (expires_at) WHERE expires_at IS NOT NULL;\n"
                   "CREATE TABLE IF NOT EXISTS {2} (\n"
                   "    bucket INTEGER PRIMARY KEY,\n"
                   "    version BIGINT NOT NULL\n"
                   ") WITH (fillfactor = 80);\n",
                   n.quoted(n.state), quote_identifier("idx_" + n.state + "_end"), n.quoted(n.floors), kName);
}

std::string create_tokens(const PrefixNames& n) {
  return formatted("CREATE SEQUENCE IF NOT EXISTS {} AS BIGINT;\n", n.quoted(n.lock_tokens)) +
         pass_on_grants(n.schema, n.state, "USAGE, SELECT", "SEQUENCE " + n.quoted(n.lock_tokens));
}

std::string create_timeouts(const PrefixNames& n) {
  return formatted(
             "CREATE TABLE IF NOT EXISTS {0} (\n"
             "    namespace {2},\n"
             "    tenant {2},\n"
             "    kind {2},\n"
             "    key {2},\n"
             "    due_at TIMESTAMPTZ NOT NULL,\n"
             "    next_at TIMESTAMPTZ NOT NULL,\n"
             "    claim BIGINT NOT NULL DEFAULT 0,\n"
             "    PRIMARY KEY (namespace, tenant, kind, key)\n"
             ") WITH (fillfactor = 80);\n"
             "CREATE INDEX IF NOT EXISTS {1} ON {0} (namespace, tenant, next_at);\n",
             n.quoted(n.timeouts), quote_identifier("idx_" + n.timeouts + "_next"), kName) +
         grants(n, n.timeouts);
}

// Waiters are UNLOGGED: who waits is of no interest after a crash.
std::string create_locks(const PrefixNames& n) {
  return formatted(
             "CREATE TABLE IF NOT EXISTS {0} (\n"
             "    namespace {2},\n"
             "    tenant {2},\n"
             "    name {2},\n"
             "    token BIGINT NOT NULL,\n"
             "    holder_id BIGINT NOT NULL,\n"
             "    holder TEXT NOT NULL,\n"
             "    acquired_at TIMESTAMPTZ NOT NULL,\n"
             "    expires_at TIMESTAMPTZ NOT NULL,\n"
             "    PRIMARY KEY (namespace, tenant, name)\n"
             ") WITH (fillfactor = 70);\n"
             "CREATE UNLOGGED TABLE IF NOT EXISTS {1} (\n"
             "    namespace {2},\n"
             "    tenant {2},\n"
             "    name {2},\n"
             "    waiter_id BIGINT NOT NULL,\n"
             "    since TIMESTAMPTZ NOT NULL,\n"
             "    expires_at TIMESTAMPTZ NOT NULL,\n"
             "    PRIMARY KEY (namespace, tenant, name, waiter_id)\n"
             ") WITH (fillfactor = 70);\n",
             n.quoted(n.locks), n.quoted(n.lock_waiters), kName) +
         grants(n, n.locks) + grants(n, n.lock_waiters);
}

struct Part {
  std::string name;
  const std::vector<std::string>* columns;  // null: a sequence
};

std::string grant_statements(const PrefixNames& n, const std::vector<Part>& parts, const Inventory& found) {
  const std::string role = quote_identifier(found.user);
  std::string tables, sequences;
  for (const Part& part : parts)
    (part.columns ? tables : sequences) +=
        (part.columns && !tables.empty() ? ", " : "") + n.quoted(part.name);
  // Not needed, but without it waiters ask now and then instead of being told.
  if (parts[0].name == n.locks && found.table(n.lock_waiters).exists)
    tables += ", " + n.quoted(n.lock_waiters);
  std::string out = formatted("GRANT USAGE ON SCHEMA {} TO {}; ", quote_identifier(n.schema), role);
  out += formatted("GRANT SELECT, INSERT, UPDATE, DELETE ON {} TO {};", tables, role);
  if (!sequences.empty()) out += formatted(" GRANT USAGE ON SEQUENCE {} TO {};", sequences, role);
  return out;
}

Status check(const PrefixNames& n, const std::vector<Part>& parts, const Inventory& found, bool auto_create) {
  const auto fail = [](const char* sqlstate, std::string message) {
    return Status::make(Code::server, std::move(message), sqlstate);
  };
  if (Status standby = check_server(found); !standby.ok()) return standby;
  const std::string create_hint =
      auto_create
          ? formatted("auto_create = true could not make it: GRANT CREATE ON SCHEMA {} TO {};",
                      quote_identifier(n.schema), quote_identifier(found.user))
          : "run `ratesync migrate -c FILE` or set auto_create = true, and check prefix and schema_name";
  if (!found.schema_exists)
    return fail("3F000", formatted("schema {} does not exist, so neither does table {}: {}",
                                   quote_identifier(n.schema), n.quoted(parts[0].name), create_hint));
  for (const Part& part : parts) {
    const Inventory::Table table = found.table(part.name);
    const char* const kind = part.columns ? "table" : "sequence";
    if (!table.exists)
      return fail("42P01", formatted("{} {} does not exist: {}", kind, n.quoted(part.name), create_hint));
    if (const std::string missing = part.columns ? table.missing(*part.columns) : ""; !missing.empty())
      return fail("42703", formatted("table {} is not the one that belongs to prefix {}: column(s) {} "
                                     "missing; choose another prefix or schema_name",
                                     n.quoted(part.name), quote_identifier(n.prefix), missing));
    if (!found.schema_usage || !table.writable() || !table.can_delete)
      return fail("42501", formatted("permission denied on {} {} for role {}: run as its owner: {}", kind,
                                     n.quoted(part.name), quote_identifier(found.user),
                                     grant_statements(n, parts, found)));
  }
  return Status::success();
}

std::vector<Part> state_parts(const PrefixNames& n) {
  return {{n.state, &kStateColumns},
          {n.floors, &kFloorColumns},
          {n.timeouts, &kTimeoutColumns},
          {n.lock_tokens, nullptr}};
}

std::vector<Part> lock_parts(const PrefixNames& n) {
  return {{n.locks, &kLockColumns}, {n.lock_tokens, nullptr}};
}

}  // namespace

Result<PrefixNames> PrefixNames::make(const std::string& schema, const std::string& prefix) {
  if (prefix.find('\0') != std::string::npos)
    return Status::make(Code::invalid, "prefix must not contain a NUL character");
  if (utf8_length(prefix) < 0) return Status::make(Code::invalid, "prefix is not valid UTF-8");
  if (prefix.size() > kPrefixBytes)
    return Status::make(Code::invalid,
                        formatted("prefix: expected at most {} bytes (names of tables are derived from it), "
                                  "got {}",
                                  kPrefixBytes, prefix.size()));
  if (Status bad = check_identifier("schema_name", schema); !bad.ok()) return bad;
  return PrefixNames{schema,
                     prefix,
                     prefix + "state",
                     prefix + "floors",
                     prefix + "timeouts",
                     prefix + "locks",
                     prefix + "lock_waiters",
                     prefix + "lock_tokens",
                     prefix + "migrations"};
}

std::string PrefixNames::quoted(const std::string& table) const {
  return quote_identifier(schema) + '.' + quote_identifier(table);
}

std::vector<Param> catalogue_params(const PrefixNames& n) {
  return catalogue_params(
      n.schema, {n.state, n.floors, n.timeouts, n.locks, n.lock_waiters, n.lock_tokens, n.migrations});
}

std::vector<MigrationStep> migration_steps(const PrefixNames& n, const Inventory& found) {
  // As for limits, what the catalogue shows counts.
  const auto there = [&found](const std::string& name) { return found.table(name).exists; };
  return {
      {1, "create_state_tables", create_state(n, found.schema_exists), there(n.state) && there(n.floors)},
      {2, "create_token_sequence", create_tokens(n), there(n.lock_tokens)},
      {3, "create_timeouts_table", create_timeouts(n), there(n.timeouts)},
      {4, "create_lock_tables", create_locks(n), there(n.locks) && there(n.lock_waiters)},
  };
}

std::string migration_script(const PrefixNames& n, const std::vector<MigrationStep>& steps) {
  return migration_script(n.quoted(n.state), n.quoted(n.migrations), steps);
}

Status check_state(const PrefixNames& n, const Inventory& found, bool auto_create) {
  return check(n, state_parts(n), found, auto_create);
}

Status check_locks(const PrefixNames& n, const Inventory& found, bool auto_create) {
  return check(n, lock_parts(n), found, auto_create);
}

bool lock_waiters_usable(const PrefixNames& n, const Inventory& found) {
  return found.table(n.lock_waiters).usable(kLockWaiterColumns);
}

std::vector<Finding> prefix_findings(const PrefixNames& n, const Inventory& found, bool auto_create) {
  using Level = Finding::Level;
  std::vector<Finding> out;
  const auto add = [&](Level level, const char* subject, std::string message) {
    out.push_back({level, subject, std::move(message)});
  };
  const auto report = [&](const char* subject, const Status& status, const std::string& tables) {
    if (status.ok())
      add(Level::ok, subject, formatted("prefix {}: {} are there", quote_identifier(n.prefix), tables));
    else if (status.sqlstate == "42P01" && auto_create)
      add(Level::warning, subject,
          formatted("prefix {}: {} do not exist yet: auto_create makes them at the first use, or run "
                    "`ratesync migrate -c FILE`",
                    quote_identifier(n.prefix), tables));
    else
      add(Level::error, subject, status.message);
  };
  report("state", check_state(n, found, false),
         formatted("{}, {} and {}", n.quoted(n.state), n.quoted(n.floors), n.quoted(n.timeouts)));
  const Status locks = check_locks(n, found, false);
  report("locks", locks, formatted("{} and {}", n.quoted(n.locks), n.quoted(n.lock_tokens)));
  if (const Inventory::Table state = found.table(n.state);
      state.exists && state.missing(kStateColumns).empty() && !state.indexed.contains("expires_at"))
    add(Level::warning, "state",
        formatted("{0} has no index on expires_at, removing expired rows will be slow: CREATE INDEX {1} ON "
                  "{0} (expires_at) WHERE expires_at IS NOT NULL;",
                  n.quoted(n.state), quote_identifier("idx_" + n.state + "_end")));
  if (locks.ok() && !lock_waiters_usable(n, found))
    add(Level::warning, "locks",
        formatted("table {0} is missing or not granted: waiters for a lock ask now and then; run "
                  "`ratesync migrate -c FILE` as the owner, or GRANT SELECT, INSERT, UPDATE, DELETE ON {0} "
                  "TO {1};",
                  n.quoted(n.lock_waiters), quote_identifier(found.user)));
  return out;
}

}  // namespace ratesync::postgres
