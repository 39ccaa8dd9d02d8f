#include "ratesync/postgres/errors.h"

#include "ratesync/base/format.h"

namespace ratesync::postgres {
namespace {

std::string where(const ErrorContext& c) {
  if (c.host.empty() && c.port.empty()) return "the server";
  const bool v6 = c.host.find(':') != std::string::npos;
  return formatted("{}{}{}:{}", v6 ? "[" : "", c.host.empty() ? "local socket" : c.host, v6 ? "]" : "",
                   c.port);
}

std::string quoted(std::string_view name) {
  std::string out = "\"";
  for (const char ch : name) out.append(ch == '"' ? 2 : 1, ch);
  return out + '"';
}

std::string relation(const ErrorContext& c) {
  if (c.table.empty()) return "the table";
  return c.schema.empty() ? quoted(c.table) : quoted(c.schema) + '.' + quoted(c.table);
}

std::string grantee(const ErrorContext& c) { return c.user.empty() ? "<user>" : quoted(c.user); }

// What to do, as sentences; empty where nothing general can be said.
std::string cure(std::string_view sqlstate, const ErrorContext& c) {
  if (sqlstate == "42P01" || sqlstate == "3F000")
    return formatted("Table {} is missing{}: set auto_create = true or run `{}`, and check {}.", relation(c),
                     c.database.empty() ? "" : " in database " + quoted(c.database), c.migrate, c.options);
  if (sqlstate == "42703" || sqlstate == "42883" || sqlstate == "42804")
    return formatted(
        "The layout of {} is not the expected one: `ratesync doctor` says what differs, `{}` "
        "adds what is missing.",
        relation(c), c.migrate);
  if (sqlstate == "42501")
    return formatted(
        "Let an owner run: {}GRANT {} ON {} TO {};",
        c.schema.empty() ? "" : formatted("GRANT USAGE ON SCHEMA {} TO {}; ", quoted(c.schema), grantee(c)),
        c.privileges, c.table.empty() ? "<table>" : relation(c), grantee(c));
  if (sqlstate == "28P01" || sqlstate == "28000")
    return formatted("Check user and password in the url (host {}, database {}, user {}) and pg_hba.conf.",
                     where(c), quoted(c.database), quoted(c.user));
  if (sqlstate == "3D000")
    return formatted("Database {} does not exist at {}: check the url, or create it (createdb {}).",
                     quoted(c.database), where(c), c.database);
  if (sqlstate == "53300")
    return formatted(
        "{} has no connection slot left: lower pool_max_size, raise max_connections, or put PgBouncer in "
        "between.",
        where(c));
  if (sqlstate == "25006")
    return formatted(
        "{} is read-only (a standby?): add target_session_attrs=read-write to the url and list all hosts.",
        where(c));
  if (sqlstate == "57P03")
    return "The server is starting up or shutting down; this is tried again by itself.";
  if (sqlstate == "57P01" || sqlstate == "57P02")
    return "The server ended this session; a new one is opened by itself.";
  if (sqlstate == "57014")
    return "A statement_timeout of the server or the role is shorter than the command_timeout.";
  if (sqlstate == "53100") return "The disk of the server is full.";
  if (sqlstate == "26000" || sqlstate == "42P05")
    return "A pooler that moves sessions sits in between: set statement_cache to \"off\" or \"auto\".";
  return {};
}

}  // namespace

bool is_transient(std::string_view s) { return s == "40001" || s == "40P01" || s == "55P03"; }

bool is_row_fault(std::string_view s) {
  // Values, constraints, views with a check option, and what triggers raise: P0001 where they say
  // nothing else, 45000 as the standard has it, 38 and 39 from other languages than SQL.
  const std::string_view c = s.substr(0, 2);
  return c == "22" || c == "23" || c == "38" || c == "39" || c == "44" || c == "P0" || c == "45";
}

bool is_connection_loss(std::string_view s) {
  return s.substr(0, 2) == "08" || s == "57P01" || s == "57P02" || s == "57P03" || s == "57P04" ||
         s == "57P05";
}

bool is_worth_another_host(std::string_view s) { return is_connection_loss(s) || s == "53300"; }

Status from_server(std::string_view sqlstate, std::string_view primary, const ErrorContext& context) {
  const bool gone = is_connection_loss(sqlstate) || sqlstate == "53300";
  std::string message = formatted("PostgreSQL: {} (SQLSTATE {})", primary, sqlstate);
  if (const std::string todo = cure(sqlstate, context); !todo.empty()) message += ". " + todo;
  return Status::make(gone ? Code::unavailable : Code::server, std::move(message), std::string(sqlstate));
}

}  // namespace ratesync::postgres
