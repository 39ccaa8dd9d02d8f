#include "ratesync/postgres/inventory.h"

#include <algorithm>
#include <cstdlib>

#include "ratesync/base/format.h"

namespace ratesync::postgres {
namespace {

using store::MigrationStep;

// One column each; a NUL or a quote in a name cannot break it, names travel as parameters.
constexpr const char* kCatalogue = R"(
WITH names AS (SELECT $1::text AS schema_name, $2::text[] AS tables),
space AS (SELECT n.oid FROM pg_catalog.pg_namespace AS n, names WHERE n.nspname = names.schema_name),
tables AS (
  SELECT c.oid, c.relname, c.relowner, c.relkind FROM pg_catalog.pg_class AS c, space, names
  WHERE c.relnamespace = space.oid AND c.relname = ANY (names.tables) AND c.relkind IN ('r', 'p', 'v', 'f', 'S')
)
SELECT 'server', current_setting('server_version_num'), pg_is_in_recovery()::text,
       current_setting('default_transaction_isolation'), current_user::text, NULL::text, NULL::text
UNION ALL
SELECT 'schema', has_schema_privilege(oid, 'USAGE')::text, has_schema_privilege(oid, 'CREATE')::text,
       NULL, NULL, NULL, NULL FROM space
UNION ALL
SELECT 'table', relname::text, has_table_privilege(oid, 'SELECT')::text, has_table_privilege(oid, 'INSERT')::text,
       has_table_privilege(oid, 'UPDATE')::text, has_table_privilege(oid, 'DELETE')::text,
       pg_has_role(relowner, 'USAGE')::text FROM tables WHERE relkind <> 'S'
UNION ALL
SELECT 'sequence', relname::text,
       CASE WHEN relkind = 'S' THEN has_sequence_privilege(oid, 'USAGE, UPDATE')::text END,
       pg_has_role(relowner, 'USAGE')::text, NULL, NULL, NULL FROM tables WHERE relkind = 'S'
UNION ALL
SELECT 'column', t.relname::text, a.attname::text, format_type(a.atttypid, a.atttypmod), NULL, NULL, NULL
FROM tables AS t JOIN pg_catalog.pg_attribute AS a ON a.attrelid = t.oid
WHERE a.attnum > 0 AND NOT a.attisdropped AND t.relkind <> 'S'
UNION ALL
SELECT 'index', t.relname::text, a.attname::text,
       (x.indisunique AND x.indnkeyatts = 1 AND x.indpred IS NULL)::text, NULL, NULL, NULL
FROM tables AS t JOIN pg_catalog.pg_index AS x ON x.indrelid = t.oid AND x.indisvalid
JOIN pg_catalog.pg_attribute AS a ON a.attrelid = t.oid AND a.attnum = x.indkey[0])";

}  // namespace

std::string Inventory::Table::missing(const std::vector<std::string>& wanted) const {
  std::string out;
  for (const std::string& column : wanted)
    if (!columns.contains(column)) out += formatted("{}{}", out.empty() ? "" : ", ", column);
  return out;
}

Inventory::Table Inventory::table(const std::string& name) const {
  const auto found = tables.find(name);
  return found == tables.end() ? Table{} : found->second;
}

const Statement& catalogue_statement() {
  static const Statement statement{"", kCatalogue};
  return statement;
}

std::vector<Param> catalogue_params(const std::string& schema, const std::vector<std::string_view>& tables) {
  return {Param::text(schema), Param::text(array_of_text(tables))};
}

Result<Inventory> read_inventory(const Rows& rows) {
  if (rows.columns() != 7)
    return Status::make(Code::protocol, "the catalogue query returned an unexpected shape");
  Inventory out;
  for (int r = 0; r < rows.rows(); ++r) {
    const std::string_view kind = rows.text(r, 0);
    const auto yes = [&](int column) { return rows.text(r, column) == "true"; };
    const auto table = [&]() -> Inventory::Table& { return out.tables[std::string(rows.text(r, 1))]; };
    if (kind == "server") {
      out.server_version = static_cast<int>(std::strtol(std::string(rows.text(r, 1)).c_str(), nullptr, 10));
      out.in_recovery = yes(2);
      out.isolation = rows.text(r, 3);
      out.user = rows.text(r, 4);
    } else if (kind == "schema") {
      out.schema_exists = true;
      out.schema_usage = yes(1);
      out.schema_create = yes(2);
    } else if (kind == "table") {
      Inventory::Table& t = table();
      t.exists = true;
      t.can_select = yes(2);
      t.can_insert = yes(3);
      t.can_update = yes(4);
      t.can_delete = yes(5);
      t.owned = yes(6);
    } else if (kind == "sequence") {
      Inventory::Table& t = table();
      t.exists = true;
      t.can_select = t.can_insert = t.can_update = t.can_delete = yes(2);
      t.owned = yes(3);
    } else if (kind == "column") {
      table().columns[std::string(rows.text(r, 2))] = rows.text(r, 3);
    } else if (kind == "index") {
      table().indexed.emplace(rows.text(r, 2));
      if (yes(3)) table().keys.emplace(rows.text(r, 2));
    }
  }
  return out;
}

Status check_server(const Inventory& found) {
  if (!found.in_recovery) return Status::success();
  return Status::make(
      Code::unavailable,
      "the server is a standby and read-only: add target_session_attrs=read-write to the url and "
      "list all hosts",
      "25006");
}

std::string literal(std::string_view text) {
  // E'' in no case: with standard_conforming_strings a backslash is only a backslash.
  std::string out = "'";
  for (const char ch : text) out.append(ch == '\'' ? 2 : 1, ch);
  return out + '\'';
}

std::string pass_on_grants(const std::string& schema, const std::string& from, const std::string& privileges,
                           const std::string& to) {
  const std::string body = formatted(
      "DECLARE grantee text;\n"
      "BEGIN\n"
      "  FOR grantee IN\n"
      "    SELECT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END\n"
      "    FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace,\n"
      "         aclexplode(c.relacl) AS a\n"
      "    WHERE n.nspname = {0} AND c.relname = {1} AND a.privilege_type = 'UPDATE'\n"
      "  LOOP\n"
      "    EXECUTE format('GRANT {2} ON %s TO %s', {3}, grantee);\n"
      "  END LOOP;\n"
      "END",
      literal(schema), literal(from), privileges, literal(to));
  // A name may hold anything, the quotes of the block too.
  std::string tag = "$ratesync$";
  while (body.find(tag) != std::string::npos) tag.insert(tag.size() - 1, 1, 'x');
  return formatted("DO {0}\n{1} {0};\n", tag, body);
}

std::string migration_script(const std::string& subject, const std::string& record,
                             const std::vector<MigrationStep>& steps) {
  if (std::all_of(steps.begin(), steps.end(), [](const MigrationStep& s) { return s.applied; })) return {};
  std::string before, after;
  for (const MigrationStep& step : steps) {
    if (step.applied) continue;
    // The record needs the schema, which the first step may have to create.
    (step.number == 1 ? before : after) += step.sql;
    after += formatted("INSERT INTO {} (number, name) VALUES ({}, {}) ON CONFLICT (number) DO NOTHING;\n",
                       record, step.number, literal(step.name));
  }
  return formatted(
      "BEGIN ISOLATION LEVEL READ COMMITTED;\n"
      "SELECT pg_advisory_xact_lock(hashtextextended({}, 0));\n"
      "{}"
      "CREATE TABLE IF NOT EXISTS {} (number BIGINT PRIMARY KEY, name TEXT NOT NULL, applied_at TIMESTAMPTZ "
      "NOT NULL "
      "DEFAULT NOW());\n"
      "{}"
      "COMMIT;\n",
      literal("ratesync:" + subject), before, record, after);
}

}  // namespace ratesync::postgres
