// What lies in a schema of the server, and how migrations are carried out there: the same for the
// tables of limits and for those of a prefix. Pure text and values.
#pragma once

#include <map>
#include <set>
#include <string>
#include <vector>

#include "ratesync/base/status.h"
#include "ratesync/postgres/connection.h"
#include "ratesync/store/store.h"

namespace ratesync::postgres {

// One answer of the catalogue query.
struct Inventory {
  int server_version = 0;  // 150018
  bool in_recovery = false;
  std::string isolation;  // default_transaction_isolation
  std::string user;
  bool schema_exists = false, schema_usage = false, schema_create = false;
  struct Table {
    bool exists = false;
    // Of a sequence: all four tell whether nextval() is allowed.
    bool can_select = false, can_insert = false, can_update = false, can_delete = false;
    bool owned = false;                          // by the user or a role that it is a member of
    std::map<std::string, std::string> columns;  // name → type, as format_type prints it
    std::set<std::string> indexed;               // columns that some index begins with
    std::set<std::string> keys;                  // columns with a unique index of their own

    [[nodiscard]] bool writable() const { return can_select && can_insert && can_update; }
    // Those of `wanted` that it has not, for people.
    [[nodiscard]] std::string missing(const std::vector<std::string>& wanted) const;
    [[nodiscard]] bool usable(const std::vector<std::string>& wanted) const {
      return writable() && can_delete && missing(wanted).empty();
    }
  };
  std::map<std::string, Table> tables;  // of those asked for

  [[nodiscard]] Table table(const std::string& name) const;
};

// $1 schema, $2 text[] names of tables and sequences.
const Statement& catalogue_statement();
std::vector<Param> catalogue_params(const std::string& schema, const std::vector<std::string_view>& tables);
Result<Inventory> read_inventory(const Rows& rows);

// A standby cannot be used, whatever lies there.
Status check_server(const Inventory& found);

std::string literal(std::string_view text);  // 'it''s'

// DO block: whoever may UPDATE `from` is granted `privileges` on `to` ("TABLE x" or "SEQUENCE x"), so
// that the owner runs `migrate` and another role works.
std::string pass_on_grants(const std::string& schema, const std::string& from, const std::string& privileges,
                           const std::string& to);

// The steps that are not applied as one script: one transaction under an advisory lock that belongs to
// `subject`, so that any number of instances may run it at once. Empty when nothing is to be done.
// `record`: the quoted table that remembers the steps. Step 1 may have to create the schema.
std::string migration_script(const std::string& subject, const std::string& record,
                             const std::vector<store::MigrationStep>& steps);

}  // namespace ratesync::postgres
