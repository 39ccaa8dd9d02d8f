// The tables of a PostgreSQL store: what must be there, what is there, and how to get from one to
// the other. Pure text and values; postgres_store.cc talks to the server.
//
// The state table and its grants are a contract with users who made it by hand. Everything else
// lives in tables of its own, which migrations add.
#pragma once

#include <string>
#include <vector>

#include "ratesync/base/status.h"
#include "ratesync/postgres/connection.h"
#include "ratesync/postgres/inventory.h"
#include "ratesync/postgres/limit_sql.h"
#include "ratesync/store/store.h"

namespace ratesync::postgres {

struct TableNames {
  std::string schema;
  std::string state;
  std::string leases;      // state + "_leases"; empty when that name would be cut at 63 bytes
  std::string migrations;  // state + "_migrations", likewise
  std::string index;       // "idx_" + state + "_updated", likewise
  std::string windows;     // state + "_windows", likewise
  std::string log;         // state + "_window_log", likewise
  std::string waiters;     // state + "_waiters", likewise

  // Checks lengths and characters. The derived names may be empty, see above.
  static Result<TableNames> make(const std::string& schema, const std::string& table);
  [[nodiscard]] bool can_migrate() const {
    return !leases.empty() && !migrations.empty() && !index.empty() && !log.empty();
  }
  [[nodiscard]] std::string quoted(const std::string& table) const;  // "schema"."table"
};

// What the server has of them.
struct Catalogue : Inventory {
  Table state, leases, migrations, windows, log, waiters;
  bool updated_index = false;  // some index whose first column is updated_at
  bool group_key = false;      // a unique index on group_id alone

  [[nodiscard]] bool legacy() const;  // made by rate-sync 0.2
  [[nodiscard]] bool leases_usable() const;
  [[nodiscard]] bool windows_usable() const;  // both of their tables
  [[nodiscard]] bool waiters_usable() const;
};

std::vector<Param> catalogue_params(const TableNames& names);
Catalogue read_catalogue(const TableNames& names, Inventory found);

struct SchemaOptions {
  bool unlogged = false;
};

// All steps in order; `applied` tells which of them the catalogue shows to be done.
std::vector<store::MigrationStep> migration_steps(const TableNames& names, const Catalogue& found,
                                                  const SchemaOptions& options);
std::string migration_script(const TableNames& names, const std::vector<store::MigrationStep>& steps);

// Ok when the store can work; else what is missing and the cure.
Status check_catalogue(const TableNames& names, const Catalogue& found, bool auto_create);
// Why windows do not work, with the cure; ok when they do.
Status check_windows(const TableNames& names, const Catalogue& found, bool auto_create);
// The same and more, as a list.
std::vector<store::Finding> schema_findings(const TableNames& names, const Catalogue& found,
                                            bool auto_create);

}  // namespace ratesync::postgres
