// One configured PostgreSQL store: its pool, its tables, and the capabilities on top of them.
//
// The schema is looked at once, before the first trip, and again after a failure: a table that is
// made or a grant that is given later takes effect without a restart.
#pragma once

#include <asio/io_context.hpp>
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "ratesync/base/clock.h"
#include "ratesync/postgres/conninfo.h"
#include "ratesync/postgres/errors.h"
#include "ratesync/postgres/limit_store.h"
#include "ratesync/postgres/pg_pool.h"
#include "ratesync/postgres/prefix_backend.h"
#include "ratesync/postgres/schema.h"
#include "ratesync/postgres/schema_watch.h"
#include "ratesync/store/store.h"

namespace ratesync::postgres {

struct PostgresOptions {
  std::string url;  // postgresql://user:password@host:port/database?..., or key=value
  std::string schema_name = "public";
  std::string table_name = "rate_limiter_state";  // at most 51 bytes where tables are to be created
  bool auto_create = false;                       // create what is missing; needs CREATE on the schema
  std::size_t pool_min_size = 2;
  std::size_t pool_max_size = 10;  // from 1; at the server, all hosts together
  Nanos command_timeout = 5 * kSecond;
  Nanos connect_timeout = 5 * kSecond;  // per host
  // auto: pure rates do not wait for the disk, max_concurrent does. on: as the server is
  // configured. off: nothing waits.
  std::string synchronous_commit = "auto";
  bool unlogged = false;                 // auto_create makes UNLOGGED tables: emptied by a crash
  std::string statement_cache = "auto";  // auto: unless a pooler sits in between
  std::string listen_url;                // where LISTEN works, when url leads to a pooler; empty: url
  std::size_t lanes = 2;                 // trips at the same time, for rates, slots and windows each
};

class PostgresStore final : public store::Store, private LimitBackend {
 public:
  // Checks the options; connects nothing.
  static Result<std::unique_ptr<store::Store>> create(asio::io_context& io, const Clock& clock,
                                                      PostgresOptions options);
  ~PostgresStore() override;

  [[nodiscard]] store::Capabilities capabilities() const override;
  void initialize(store::Callback<store::Unit> done) override;
  void migrate(bool dry_run, store::Callback<std::vector<store::MigrationStep>> done) override;
  void doctor(store::Callback<std::vector<store::Finding>> done) override;
  [[nodiscard]] store::Stats stats() const override;
  void close(std::function<void()> done) override;
  void abandon_after_fork() override;
  [[nodiscard]] bool down() const override;
  [[nodiscard]] store::LimitStore* limits() override { return limits_.get(); }
  Result<store::StateStore*> state(const std::string& prefix) override;
  Result<store::LockStore*> locks(const std::string& prefix) override;
  void migrate_state(const std::string& prefix, bool dry_run,
                     store::Callback<std::vector<store::MigrationStep>> done) override;

 private:
  struct Checkup;

  PostgresStore(asio::io_context& io, const Clock& clock, PostgresOptions options, TableNames names,
                ConnInfo info, ConnInfo listen);

  // LimitBackend
  void when_ready(Connection::Done done) override;
  PgPool& pool() override { return *pool_; }
  const LimitSql& limit_sql() const override { return *sql_; }
  bool ready() const override { return sql_ != nullptr; }
  Status no_windows() override;
  Status explain(const PipelineResult& result) override;

  SchemaWatch::Hooks schema_hooks();
  void use(const Catalogue& found);
  void examine(const std::shared_ptr<Checkup>& checkup);
  void examine(const std::shared_ptr<Checkup>& checkup, PrefixBackend* prefix);
  Result<PrefixBackend*> backend_of(const std::string& prefix);
  // Of a store that carries state or locks only, the table of limits may be missing.
  [[nodiscard]] bool without_limits() const { return !limits_asked_ && prefixes_.load() != nullptr; }
  void count(std::size_t statements);

  asio::io_context& io_;
  const Clock& clock_;
  const PostgresOptions options_;
  const TableNames names_;
  const ConnInfo info_;
  const ErrorContext context_;
  std::unique_ptr<PgPool> pool_;
  std::unique_ptr<SchemaWatch> schema_;
  // Pipelines under way point into the statements, so older sets are kept; a new one is made only
  // when a table came or went.
  std::vector<std::unique_ptr<LimitSql>> all_sql_;
  const LimitSql* sql_ = nullptr;
  LimitTables tables_;
  Status no_windows_;
  bool ready_ = false;
  store::Stats stats_;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
  std::unique_ptr<PgLimitStore> limits_;
  bool limits_asked_ = false;
  PrefixOptions prefix_options_;
  std::mutex prefixes_lock_;                        // who adds one
  std::atomic<PrefixBackend*> prefixes_ = nullptr;  // the newest; read without a lock, after a fork too
};

}  // namespace ratesync::postgres
