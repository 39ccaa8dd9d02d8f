// One map from SQLSTATE to what it means for us: which Code, and a message that says the cure.
//
// Everything that turns an error of PostgreSQL into words goes through here, so that the same
// failure reads the same at connect, in a statement and in `doctor`.
#pragma once

#include <string>
#include <string_view>

#include "ratesync/base/status.h"

namespace ratesync::postgres {

// What the message can name. Empty fields are left out.
struct ErrorContext {
  std::string host;
  std::string port;
  std::string database;
  std::string user;
  std::string schema;
  std::string table;
  // What the table's name is made of, what its user needs, and what makes it.
  std::string options = "table_name and schema_name";
  std::string privileges = "SELECT, INSERT, UPDATE";
  std::string migrate = "ratesync migrate";
};

// The server's own refusal. Code::unavailable when the session or the server is going away or full
// (class 08, 57P0x, 53300): certainly not executed. Code::server otherwise. `primary` is the
// server's primary message; it is repeated, followed by the cure where there is one.
Status from_server(std::string_view sqlstate, std::string_view primary, const ErrorContext& context);

// A refusal whose cause goes away by itself; the same transaction may be run again:
// serialization failure, deadlock, lock not available.
bool is_transient(std::string_view sqlstate);
// The data of one row is at fault (classes 22 and 23): a batch is worth trying without that row.
bool is_row_fault(std::string_view sqlstate);
// The session is gone or never came to be: class 08, 57P01 to 57P05.
bool is_connection_loss(std::string_view sqlstate);
// At connect: another host may do better (starting up, shutting down, full). A wrong password is
// not tried on the next host, as in libpq.
bool is_worth_another_host(std::string_view sqlstate);

}  // namespace ratesync::postgres
