// Looks at the schema over one connection of the pool, creates what is missing where that is configured,
// and carries out migrations. One for each set of tables; whoever asks while a look is under way waits for
// its outcome. I/O thread only.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "ratesync/postgres/inventory.h"
#include "ratesync/postgres/pg_pool.h"
#include "ratesync/store/store.h"

namespace ratesync::postgres {

class SchemaWatch {
 public:
  struct Hooks {
    std::function<std::vector<Param>()> params;  // of catalogue_statement()
    std::function<std::vector<store::MigrationStep>(const Inventory&)> steps;
    std::function<std::string(const std::vector<store::MigrationStep>&)> script;
    // Whether a missing table may be made at first use.
    std::function<bool(const Inventory&)> may_create;
    // Takes note of what is there, and says whether it will do.
    std::function<Status(const Inventory&)> found;
    std::function<void()> migrated;  // what was found before is out of date
    // The server's refusal in words.
    std::function<Status(const PipelineResult&)> explain;
  };
  using OnInventory = std::function<void(Result<Inventory>)>;

  SchemaWatch(PgPool& pool, Hooks hooks) : pool_(pool), hooks_(std::move(hooks)) {}
  ~SchemaWatch() { *alive_ = false; }
  SchemaWatch(const SchemaWatch&) = delete;
  SchemaWatch& operator=(const SchemaWatch&) = delete;

  // Looks, creates, looks again. `done` gets what `found` said last, or why nobody could look.
  void check(Connection::Done done);
  void migrate(bool dry_run, store::Callback<std::vector<store::MigrationStep>> done);
  // Only looks; the connection stays the caller's.
  void look(const PgPool::Lease& connection, OnInventory done);
  [[nodiscard]] std::size_t looks() const { return looks_; }  // round trips

 private:
  void check_on(const PgPool::Lease& connection);
  void check_again(const PgPool::Lease& connection, Status creation);
  void checked(const Status& status);

  PgPool& pool_;
  const Hooks hooks_;
  bool checking_ = false;
  std::size_t looks_ = 0;
  std::vector<Connection::Done> waiting_;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace ratesync::postgres
