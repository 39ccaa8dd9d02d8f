// The tables of one prefix and the two stores on them, which share the pool of the PostgreSQL store.
//
// State and locks ask for their own tables only, and neither for those of limits. The schema is looked at
// before the first trip and again after a failure. On the I/O thread, but for the construction.
#pragma once

#include <asio/io_context.hpp>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "ratesync/base/clock.h"
#include "ratesync/postgres/conninfo.h"
#include "ratesync/postgres/errors.h"
#include "ratesync/postgres/pg_pool.h"
#include "ratesync/postgres/schema_watch.h"
#include "ratesync/postgres/state_schema.h"
#include "ratesync/store/store.h"

namespace ratesync::postgres {

class PgLockStore;
class PgStateStore;

struct PrefixOptions {
  bool auto_create = false;
  std::size_t lanes = 2;         // trips at the same time
  std::string holder;            // who we are, for people: host:pid application
  ConnInfo listen;               // where LISTEN works
  ConnectionOptions connection;  // for it
};

enum class Facet : std::uint8_t { state, locks };

class PrefixBackend {
 public:
  PrefixBackend(asio::io_context& io, const Clock& clock, PgPool& pool, PrefixNames names,
                ErrorContext context, PrefixOptions options);
  ~PrefixBackend();

  // For the stores.
  asio::io_context& io() { return io_; }
  const Clock& clock() const { return clock_; }
  PgPool& pool() { return pool_; }
  const PrefixNames& names() const { return names_; }
  const PrefixOptions& options() const { return options_; }
  // Once the tables of that facet are known to be in order; at once when they are.
  void when_ready(Facet facet, Connection::Done done);
  // The same, and then a connection. `alive`: of the store that asks; false: it is gone, and `use` is told
  // so.
  void lend(Facet facet, std::shared_ptr<bool> alive, PgPool::OnLease use);
  // The server's refusal in words. May look at the schema anew before the next trip.
  Status explain(Facet facet, const PipelineResult& result);
  // After when_ready(locks): whether there is a table of waiters.
  [[nodiscard]] bool lock_waiters() const { return lock_waiters_; }

  // For the store around.
  [[nodiscard]] store::StateStore* state() const;
  [[nodiscard]] store::LockStore* locks() const;
  void migrate(bool dry_run, store::Callback<std::vector<store::MigrationStep>> done) {
    schema_.migrate(dry_run, std::move(done));
  }
  void examine(const PgPool::Lease& connection, std::function<void(std::vector<store::Finding>)> done);
  void close(Nanos patience, std::function<void()> done);
  void abandon_after_fork();
  void fill(store::Stats& stats) const;

  // The next older one of the same store; never changes once others can see this one.
  PrefixBackend* older = nullptr;

 private:
  SchemaWatch::Hooks schema_hooks();

  asio::io_context& io_;
  const Clock& clock_;
  PgPool& pool_;
  const PrefixNames names_;
  const PrefixOptions options_;
  const ErrorContext context_;
  Status found_[2];  // by facet
  bool ready_[2] = {false, false};
  bool lock_waiters_ = false;
  SchemaWatch schema_;
  std::unique_ptr<PgStateStore> state_;
  std::unique_ptr<PgLockStore> locks_;
};

}  // namespace ratesync::postgres
