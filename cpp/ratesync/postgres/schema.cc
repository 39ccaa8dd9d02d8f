#include "ratesync/postgres/schema.h"

#include <utility>

#include "ratesync/base/format.h"

namespace ratesync::postgres {
namespace {

using store::Finding;
using store::MigrationStep;

constexpr std::size_t kIdentifierBytes = 63;

std::string fitting(std::string name) { return name.size() <= kIdentifierBytes ? name : std::string(); }

const std::vector<std::string> kStateColumns = {"group_id",           "last_acquisition_at", "version",
                                                "current_concurrent", "created_at",          "updated_at"};
const std::vector<std::string> kLeaseColumns = {"group_id", "holder_id",   "holder",
                                                "slots",    "acquired_at", "expires_at"};
const std::vector<std::string> kWindowColumns = {"group_id", "algorithm", "total",     "dealt_at",
                                                 "current",  "previous",  "expires_at"};
const std::vector<std::string> kLogColumns = {"group_id", "seq", "units", "dealt_at", "expires_at"};
const std::vector<std::string> kWaiterColumns = {"group_id", "waiter_id", "since", "expires_at"};

std::string create_state(const TableNames& n, const Catalogue& found, const SchemaOptions& options) {
  std::string sql;
  if (!found.schema_exists) sql += formatted("CREATE SCHEMA IF NOT EXISTS {};\n", quote_identifier(n.schema));
  sql += formatted(
      "CREATE {}TABLE IF NOT EXISTS {} (\n"
      "    group_id VARCHAR(255) PRIMARY KEY,\n"
      "    last_acquisition_at TIMESTAMPTZ NOT NULL,\n"
      "    version INTEGER NOT NULL DEFAULT 1,\n"
      "    current_concurrent INTEGER NOT NULL DEFAULT 0,\n"
      "    created_at TIMESTAMPTZ NOT NULL DEFAULT NOW(),\n"
      "    updated_at TIMESTAMPTZ NOT NULL DEFAULT NOW()\n"
      ") WITH (fillfactor = 70);\n"
      "CREATE INDEX IF NOT EXISTS {} ON {} (updated_at);\n",
      options.unlogged ? "UNLOGGED " : "", n.quoted(n.state), quote_identifier(n.index), n.quoted(n.state));
  return sql;
}

// Whoever may write the state row may write the other tables: the owner runs `migrate`, another
// role works.
std::string pass_on_grants(const TableNames& n, const std::string& table) {
  return postgres::pass_on_grants(n.schema, n.state, "SELECT, INSERT, UPDATE, DELETE",
                                  "TABLE " + n.quoted(table));
}

std::string create_leases(const TableNames& n, const SchemaOptions& options) {
  return formatted(
             "CREATE {0}TABLE IF NOT EXISTS {1} (\n"
             "    group_id VARCHAR(255) NOT NULL,\n"
             "    holder_id BIGINT NOT NULL,\n"
             "    holder TEXT NOT NULL,\n"
             "    slots INTEGER NOT NULL,\n"
             "    acquired_at TIMESTAMPTZ NOT NULL,\n"
             "    expires_at TIMESTAMPTZ NOT NULL,\n"
             "    PRIMARY KEY (group_id, holder_id)\n"
             ") WITH (fillfactor = 70);\n",
             options.unlogged ? "UNLOGGED " : "", n.quoted(n.leases)) +
         pass_on_grants(n, n.leases);
}

// Times are microseconds since 1970 where sums are done with them. expires_at is for the purge alone.
std::string create_windows(const TableNames& n, const SchemaOptions& options) {
  return formatted(
             "CREATE {0}TABLE IF NOT EXISTS {1} (\n"
             "    group_id VARCHAR(255) PRIMARY KEY,\n"
             "    algorithm SMALLINT NOT NULL,\n"
             "    total BIGINT NOT NULL,\n"
             "    dealt_at BIGINT NOT NULL,\n"
             "    current BIGINT NOT NULL,\n"
             "    previous BIGINT NOT NULL,\n"
             "    expires_at TIMESTAMPTZ NOT NULL\n"
             ") WITH (fillfactor = 70);\n"
             "CREATE INDEX IF NOT EXISTS {2} ON {1} (expires_at);\n"
             "CREATE {0}TABLE IF NOT EXISTS {3} (\n"
             "    group_id VARCHAR(255) NOT NULL,\n"
             "    seq BIGINT NOT NULL,\n"
             "    units BIGINT NOT NULL,\n"
             "    dealt_at BIGINT NOT NULL,\n"
             "    expires_at TIMESTAMPTZ NOT NULL,\n"
             "    PRIMARY KEY (group_id, seq)\n"
             ");\n"
             "CREATE INDEX IF NOT EXISTS {4} ON {3} (expires_at);\n",
             options.unlogged ? "UNLOGGED " : "", n.quoted(n.windows),
             quote_identifier("idx_" + n.state + "_wend"), n.quoted(n.log),
             quote_identifier("idx_" + n.state + "_wlog")) +
         pass_on_grants(n, n.windows) + pass_on_grants(n, n.log);
}

// Always UNLOGGED: who waits is of no interest after a crash.
std::string create_waiters(const TableNames& n) {
  return formatted(
             "CREATE UNLOGGED TABLE IF NOT EXISTS {0} (\n"
             "    group_id VARCHAR(255) NOT NULL,\n"
             "    waiter_id BIGINT NOT NULL,\n"
             "    since TIMESTAMPTZ NOT NULL,\n"
             "    expires_at TIMESTAMPTZ NOT NULL,\n"
             "    PRIMARY KEY (group_id, waiter_id)\n"
             ") WITH (fillfactor = 70);\n",
             n.quoted(n.waiters)) +
         pass_on_grants(n, n.waiters);
}

std::string convert_legacy(const TableNames& n) {
  const std::string table = n.quoted(n.state);
  return formatted(
      "ALTER TABLE {0} RENAME COLUMN concurrent_count TO current_concurrent;\n"
      "UPDATE {0} SET current_concurrent = 0 WHERE current_concurrent IS NULL;\n"
      "ALTER TABLE {0}\n"
      "    ALTER COLUMN version DROP DEFAULT,\n"
      "    ALTER COLUMN version TYPE INTEGER USING (((coalesce(version, 1) - 1) % 2147483647 + 2147483647) % "
      "2147483647 "
      "+ 1)::integer,\n"
      "    ALTER COLUMN version SET DEFAULT 1,\n"
      "    ALTER COLUMN version SET NOT NULL,\n"
      "    ALTER COLUMN current_concurrent SET DEFAULT 0,\n"
      "    ALTER COLUMN current_concurrent SET NOT NULL,\n"
      "    ADD COLUMN IF NOT EXISTS created_at TIMESTAMPTZ NOT NULL DEFAULT NOW(),\n"
      "    ADD COLUMN IF NOT EXISTS updated_at TIMESTAMPTZ NOT NULL DEFAULT NOW();\n"
      "CREATE INDEX IF NOT EXISTS {1} ON {0} (updated_at);\n",
      table, quote_identifier(n.index));
}

std::string state_grants(const TableNames& n, const Catalogue& found) {
  return formatted("GRANT USAGE ON SCHEMA {} TO {}; GRANT SELECT, INSERT, UPDATE ON {} TO {};",
                   quote_identifier(n.schema), quote_identifier(found.user), n.quoted(n.state),
                   quote_identifier(found.user));
}

std::string full_grants(const std::string& tables, const Catalogue& found) {
  return formatted("GRANT SELECT, INSERT, UPDATE, DELETE ON {} TO {};", tables, quote_identifier(found.user));
}

}  // namespace

Result<TableNames> TableNames::make(const std::string& schema, const std::string& table) {
  if (Status bad = check_identifier("schema_name", schema); !bad.ok()) return bad;
  if (Status bad = check_identifier("table_name", table); !bad.ok()) return bad;
  return TableNames{schema,
                    table,
                    fitting(table + "_leases"),
                    fitting(table + "_migrations"),
                    fitting("idx_" + table + "_updated"),
                    fitting(table + "_windows"),
                    fitting(table + "_window_log"),
                    fitting(table + "_waiters")};
}

std::string TableNames::quoted(const std::string& table) const {
  return quote_identifier(schema) + '.' + quote_identifier(table);
}

bool Catalogue::legacy() const {
  return state.exists && state.columns.contains("concurrent_count") &&
         !state.columns.contains("current_concurrent");
}

bool Catalogue::leases_usable() const { return leases.usable(kLeaseColumns); }
bool Catalogue::windows_usable() const { return windows.usable(kWindowColumns) && log.usable(kLogColumns); }
bool Catalogue::waiters_usable() const { return waiters.usable(kWaiterColumns); }

std::vector<Param> catalogue_params(const TableNames& n) {
  return catalogue_params(n.schema, {n.state, n.leases, n.migrations, n.windows, n.log, n.waiters});
}

Catalogue read_catalogue(const TableNames& names, Inventory found) {
  Catalogue out{std::move(found), {}, {}, {}, {}, {}, {}};
  out.state = out.table(names.state);
  out.leases = out.table(names.leases);
  out.migrations = out.table(names.migrations);
  out.windows = out.table(names.windows);
  out.log = out.table(names.log);
  out.waiters = out.table(names.waiters);
  out.updated_index = out.state.indexed.contains("updated_at");
  out.group_key = out.state.keys.contains("group_id");
  return out;
}

std::vector<MigrationStep> migration_steps(const TableNames& n, const Catalogue& found,
                                           const SchemaOptions& options) {
  // What the catalogue shows counts, not what the migrations table says: a table made by hand from
  // the documentation needs no step.
  return {
      {1, "create_state_table", create_state(n, found, options), found.state.exists},
      {2, "create_leases_table", create_leases(n, options), found.leases.exists},
      {3, "convert_rate_sync_0_2", convert_legacy(n), !found.legacy()},
      {4, "create_window_tables", create_windows(n, options), found.windows.exists && found.log.exists},
      {5, "create_waiters_table", create_waiters(n), found.waiters.exists},
  };
}

std::string migration_script(const TableNames& n, const std::vector<MigrationStep>& steps) {
  return migration_script(n.quoted(n.state), n.quoted(n.migrations), steps);
}

Status check_catalogue(const TableNames& n, const Catalogue& found, bool auto_create) {
  const auto fail = [](const char* sqlstate, std::string message) {
    return Status::make(Code::server, std::move(message), sqlstate);
  };
  const std::string table = n.quoted(n.state);
  if (Status standby = check_server(found); !standby.ok()) return standby;
  const std::string create_hint =
      auto_create
          ? formatted("auto_create = true could not make it: GRANT CREATE ON SCHEMA {} TO {};",
                      quote_identifier(n.schema), quote_identifier(found.user))
          : "set auto_create = true, run `ratesync migrate`, or create it by hand, and check table_name and "
            "schema_name";
  if (!found.schema_exists)
    return fail("3F000", formatted("schema {} does not exist, so neither does table {}: {}",
                                   quote_identifier(n.schema), table, create_hint));
  if (!found.state.exists) return fail("42P01", formatted("table {} does not exist: {}", table, create_hint));
  if (!found.schema_usage || !found.state.writable())
    return fail("42501", formatted("permission denied on table {} for role {}: run as its owner: {}", table,
                                   quote_identifier(found.user), state_grants(n, found)));
  if (found.legacy())
    return fail("42703",
                formatted("table {} was made by rate-sync 0.2: run `ratesync migrate` as its owner, or:\n{}",
                          table, convert_legacy(n)));
  if (const std::string missing = found.state.missing(kStateColumns); !missing.empty())
    return fail("42703",
                formatted("table {} is not a rate limiter table: column(s) {} missing; check table_name and "
                          "schema_name",
                          table, missing));
  if (!found.group_key)
    return fail("42P10", formatted("table {} has no unique index on group_id: ALTER TABLE {} ADD PRIMARY KEY "
                                   "(group_id);",
                                   table, table));
  // Counting without leases beside others who count with them would grant too much.
  if (found.leases.exists && !found.leases_usable())
    return fail("42501", formatted("table {} exists, but role {} may not use it: run as its owner: {}",
                                   n.quoted(n.leases), quote_identifier(found.user),
                                   full_grants(n.quoted(n.leases), found)));
  return Status::success();
}

Status check_windows(const TableNames& n, const Catalogue& found, bool auto_create) {
  if (found.windows_usable()) return Status::success();
  const auto fail = [](const char* sqlstate, std::string message) {
    return Status::make(Code::server, "sliding_window, sliding_counter and fixed_window: " + message,
                        sqlstate);
  };
  if (!n.can_migrate())
    return fail("42P01", formatted("table_name {} is too long for the names derived from it (at most 51 "
                                   "bytes), so their tables cannot be made",
                                   quote_identifier(n.state)));
  const std::string tables = n.quoted(n.windows) + ", " + n.quoted(n.log);
  if (!found.windows.exists || !found.log.exists)
    return fail(
        "42P01",
        formatted("tables {} do not exist: {}run `ratesync migrate` as the owner of {}", tables,
                  auto_create ? "auto_create = true could not make them; " : "set auto_create = true, or ",
                  n.quoted(n.state)));
  return fail("42501", formatted("role {} may not use tables {}: run as their owner: {}",
                                 quote_identifier(found.user), tables, full_grants(tables, found)));
}

std::vector<Finding> schema_findings(const TableNames& n, const Catalogue& found, bool auto_create) {
  using Level = Finding::Level;
  std::vector<Finding> out;
  const auto add = [&out](Level level, std::string subject, std::string message) {
    out.push_back({level, std::move(subject), std::move(message)});
  };
  const std::string table = n.quoted(n.state);
  const Status status = check_catalogue(n, found, false);
  if (status.sqlstate == "42P01" && auto_create) {
    add(Level::warning, "table",
        formatted("{} does not exist yet: auto_create makes it at the first use, or run `ratesync migrate`",
                  table));
    return out;
  }
  if (!status.ok()) {
    add(Level::error, "table", status.message);
  } else {
    add(Level::ok, "table", formatted("{} has all columns", table));
    add(Level::ok, "grants",
        formatted("role {} may select, insert and update", quote_identifier(found.user)));
  }
  if (found.state.exists && !found.updated_index)
    add(Level::warning, "index",
        n.index.empty()
            ? formatted("{} has no index on updated_at", table)
            : formatted("{0} has no index on updated_at, clean-up of old rows will be slow: CREATE INDEX "
                        "{1} ON {0} (updated_at);",
                        table, quote_identifier(n.index)));
  if (!n.can_migrate())
    add(Level::warning, "leases",
        formatted("table_name {} is too long for the names derived from it (at most 51 bytes): "
                  "max_concurrent works "
                  "without expiry of dead holders",
                  quote_identifier(n.state)));
  else if (!found.leases.exists)
    add(Level::warning, "leases",
        formatted(
            "table {} is missing: max_concurrent works through current_concurrent, and slots of a process "
            "that "
            "dies are never given back; run `ratesync migrate` as the owner, then restart the applications",
            n.quoted(n.leases)));
  else if (found.leases_usable())
    add(Level::ok, "leases", formatted("{} is there: slots of dead holders expire", n.quoted(n.leases)));
  if (const Status windows = check_windows(n, found, auto_create); windows.ok())
    add(Level::ok, "windows", formatted("{} and {} are there", n.quoted(n.windows), n.quoted(n.log)));
  else if (status.ok())
    add(Level::warning, "windows", windows.message);
  if (found.waiters_usable())
    add(Level::ok, "waiters",
        formatted("{} is there: a release wakes waiters of other processes", n.quoted(n.waiters)));
  else if (status.ok() && found.waiters.exists)
    add(Level::warning, "waiters",
        formatted(
            "role {} may not use table {}, so waiters for a slot ask now and then: run as its owner: {}",
            quote_identifier(found.user), n.quoted(n.waiters), full_grants(n.quoted(n.waiters), found)));
  else if (status.ok() && n.can_migrate())
    add(Level::warning, "waiters",
        formatted("table {} is missing: waiters for a slot that another process holds ask now and then; run "
                  "`ratesync migrate` as the owner",
                  n.quoted(n.waiters)));
  if (found.isolation != "read committed")
    add(Level::warning, "isolation",
        formatted(
            "default_transaction_isolation is {}: correct, but conflicts are retried; ALTER ROLE {} SET "
            "default_transaction_isolation = 'read committed';",
            found.isolation, quote_identifier(found.user)));
  return out;
}

}  // namespace ratesync::postgres
