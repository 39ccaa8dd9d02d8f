#include "ratesync/postgres/schema_watch.h"

#include <utility>

#include "ratesync/base/format.h"

namespace ratesync::postgres {

using store::MigrationStep;

void SchemaWatch::look(const PgPool::Lease& connection, OnInventory done) {
  ++looks_;
  std::vector<Call> calls;
  calls.push_back({&catalogue_statement(), hooks_.params()});
  connection->run(std::move(calls), [this, alive = alive_, done = std::move(done)](PipelineResult result) {
    if (!*alive) return;
    if (!result.status.ok()) return done(hooks_.explain(result));
    done(read_inventory(*result.results[0]));
  });
}

void SchemaWatch::check(Connection::Done done) {
  waiting_.push_back(std::move(done));
  if (std::exchange(checking_, true)) return;
  pool_.get([this, alive = alive_](Result<PgPool::Lease> got) {
    if (!*alive) return;
    if (!got.ok()) return checked(got.status());
    check_on(got.value());
  });
}

void SchemaWatch::check_on(const PgPool::Lease& connection) {
  look(connection, [this, connection, alive = alive_](Result<Inventory> found) {
    std::string script;
    if (found.ok() && !found.value().in_recovery && hooks_.may_create(found.value()))
      script = hooks_.script(hooks_.steps(found.value()));
    if (script.empty()) {
      Status status = found.ok() ? hooks_.found(found.value()) : found.status();
      pool_.put(connection);
      return checked(status);
    }
    ++looks_;
    connection->run_script(std::move(script), [this, connection, alive](Status creation) {
      if (*alive) check_again(connection, std::move(creation));
    });
  });
}

// Whether creation failed does not matter when all is there: another instance was faster, or only
// what is optional could not be made.
void SchemaWatch::check_again(const PgPool::Lease& connection, Status creation) {
  look(connection, [this, connection, creation = std::move(creation)](Result<Inventory> found) {
    Status status = found.ok() ? hooks_.found(found.value()) : found.status();
    if (!status.ok() && !creation.ok())
      status.message += formatted(" (creating it failed: {})", creation.message);
    pool_.put(connection);
    checked(status);
  });
}

void SchemaWatch::checked(const Status& status) {
  checking_ = false;
  for (const Connection::Done& done : std::exchange(waiting_, {})) done(status);
}

void SchemaWatch::migrate(bool dry_run, store::Callback<std::vector<MigrationStep>> done) {
  pool_.get([this, dry_run, done = std::move(done), alive = alive_](Result<PgPool::Lease> got) mutable {
    if (!*alive || !got.ok()) return done(got.status());
    const PgPool::Lease connection = got.value();
    look(connection, [this, dry_run, done = std::move(done), connection, alive](Result<Inventory> found) {
      const auto finish = [&](Result<std::vector<MigrationStep>> result) {
        pool_.put(connection);
        done(std::move(result));
      };
      if (!found.ok()) return finish(found.status());
      std::vector<MigrationStep> steps = hooks_.steps(found.value());
      std::string script = hooks_.script(steps);
      if (dry_run || script.empty()) return finish(std::move(steps));
      ++looks_;
      connection->run_script(std::move(script), [this, done, connection, alive,
                                                 steps = std::move(steps)](Status status) mutable {
        if (!*alive) return;
        pool_.put(connection);
        hooks_.migrated();
        if (status.ok()) return done(std::move(steps));
        done(std::move(status));
      });
    });
  });
}

}  // namespace ratesync::postgres
