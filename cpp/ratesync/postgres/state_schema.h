// The tables of one prefix: state, version floors, timeouts, locks and their waiters. Pure text and
// values, as schema.h for limits. README.md in this folder says why they look as they do.
#pragma once

#include <string>
#include <vector>

#include "ratesync/base/status.h"
#include "ratesync/postgres/inventory.h"
#include "ratesync/store/store.h"

namespace ratesync::postgres {

struct PrefixNames {
  std::string schema;
  std::string prefix;
  std::string state, floors, timeouts, locks, lock_waiters, lock_tokens, migrations;

  static Result<PrefixNames> make(const std::string& schema, const std::string& prefix);
  [[nodiscard]] std::string quoted(const std::string& table) const;  // "schema"."table"
};

std::vector<Param> catalogue_params(const PrefixNames& names);

std::vector<store::MigrationStep> migration_steps(const PrefixNames& names, const Inventory& found);
std::string migration_script(const PrefixNames& names, const std::vector<store::MigrationStep>& steps);

// Ok when it can work; else what is missing and the cure.
Status check_state(const PrefixNames& names, const Inventory& found, bool auto_create);
Status check_locks(const PrefixNames& names, const Inventory& found, bool auto_create);
// Whether processes can be told that a lock was freed.
bool lock_waiters_usable(const PrefixNames& names, const Inventory& found);
std::vector<store::Finding> prefix_findings(const PrefixNames& names, const Inventory& found,
                                            bool auto_create);

}  // namespace ratesync::postgres
