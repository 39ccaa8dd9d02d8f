#include "ratesync/postgres/postgres_store.h"

#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <utility>

#include "ratesync/postgres/sql_text.h"

namespace ratesync::postgres {

using store::Finding;

namespace {

// How long close() lets trips end and slots be given back before it closes the sockets.
constexpr Nanos kClosePatience = 2 * kSecond;

ErrorContext context_of(const ConnInfo& info, const TableNames& names) {
  return {info.hosts.front().host,
          info.hosts.front().port,
          info.setting("dbname"),
          info.setting("user"),
          names.schema,
          names.state};
}

std::string holder_text(const ConnInfo& info) {
  char host[256] = "?";
  (void)gethostname(host, sizeof host - 1);
  const std::string application = info.setting("application_name");
  return fmt::format("{}:{} {}", host, getpid(), application.empty() ? "ratesync" : application);
}

// On sessions that are ours alone. Plans of prepared statements are kept; made while the table was
// small they would scan it for ever, so scanning is off and the first plan is the last. A connection
// that we dropped (command_timeout) while its backend waits for a lock ends there too, or a row that
// stays locked would collect backends up to max_connections; PostgreSQL 14 and later can.
const Statement kSession{"", R"(
SELECT set_config('enable_seqscan', 'off', false), set_config('enable_mergejoin', 'off', false),
       set_config('plan_cache_mode', 'force_generic_plan', false), set_config('jit', 'off', false),
       set_config('default_transaction_isolation', 'read committed', false),
       (SELECT set_config(name, '2s', false) FROM pg_catalog.pg_settings
        WHERE name = 'client_connection_check_interval' AND setting = '0'))"};

void set_up_session(const std::shared_ptr<Connection>& connection, const Connection::Done& done) {
  if (!connection->named_statements()) return done(Status::success());
  std::vector<Call> calls;
  calls.push_back({&kSession, {}});
  connection->run(std::move(calls), [connection, done](const PipelineResult& result) {
    // An old or exotic server that refuses one of these is only slower.
    done(result.status.code == Code::server ? Status::success() : result.status);
  });
}

Status bad_option(std::string_view option, std::string_view expected, const std::string& received) {
  return Status::make(Code::invalid, fmt::format("{}: expected {}, got {}", option, expected, received));
}

Result<ConnectionOptions::StatementCache> statement_cache(const std::string& text) {
  using Cache = ConnectionOptions::StatementCache;
  if (text == "auto" || text == "automatic") return Cache::automatic;
  if (text == "on") return Cache::on;
  if (text == "off") return Cache::off;
  return bad_option("statement_cache", "\"auto\", \"on\" or \"off\"", '"' + text + '"');
}

Result<LimitStoreOptions::Durability> durability(const std::string& text) {
  using Durability = LimitStoreOptions::Durability;
  if (text == "auto") return Durability::automatic;
  if (text == "on") return Durability::on;
  if (text == "off") return Durability::off;
  return bad_option("synchronous_commit", "\"auto\", \"on\" or \"off\"", '"' + text + '"');
}

}  // namespace

Result<std::unique_ptr<store::Store>> PostgresStore::create(asio::io_context& io, const Clock& clock,
                                                            PostgresOptions options) {
  Result<TableNames> names = TableNames::make(options.schema_name, options.table_name);
  if (!names.ok()) return names.status();
  if (options.auto_create && !names.value().can_migrate())
    return bad_option("table_name",
                      "at most 51 bytes with auto_create = true (names of an index and of two more tables "
                      "are derived from it)",
                      fmt::format("{} bytes", options.table_name.size()));
  if (options.pool_max_size < 1 || options.pool_max_size > 10'000)
    return bad_option("pool_max_size", "a whole number from 1 to 10000",
                      std::to_string(options.pool_max_size));
  if (options.pool_min_size > options.pool_max_size)
    return bad_option("pool_min_size", fmt::format("at most pool_max_size ({})", options.pool_max_size),
                      std::to_string(options.pool_min_size));
  if (options.command_timeout <= 0)
    return bad_option("command_timeout", "a number above 0", fmt::format("{} ns", options.command_timeout));
  if (options.connect_timeout <= 0)
    return bad_option("connect_timeout", "a number above 0", fmt::format("{} ns", options.connect_timeout));
  if (auto bad = statement_cache(options.statement_cache); !bad.ok()) return bad.status();
  if (auto bad = durability(options.synchronous_commit); !bad.ok()) return bad.status();
  Result<ConnInfo> info = parse_conninfo(options.url);
  if (!info.ok()) return info.status();
  Result<ConnInfo> listen = parse_conninfo(options.listen_url.empty() ? options.url : options.listen_url);
  if (!listen.ok()) {
    Status bad = listen.status();
    bad.message = "listen_url: " + bad.message;
    return bad;
  }
  return std::unique_ptr<store::Store>(new PostgresStore(io, clock, std::move(options),
                                                         std::move(names.value()), std::move(info.value()),
                                                         std::move(listen.value())));
}

PostgresStore::PostgresStore(asio::io_context& io, const Clock& clock, PostgresOptions options,
                             TableNames names, ConnInfo info, ConnInfo listen)
    : clock_(clock),
      options_(std::move(options)),
      names_(std::move(names)),
      info_(std::move(info)),
      context_(context_of(info_, names_)) {
  ConnectionOptions connection;
  connection.connect_timeout = options_.connect_timeout;
  connection.command_timeout = options_.command_timeout;
  connection.statement_cache = statement_cache(options_.statement_cache).value();
  PoolOptions pool;
  pool.min_size = options_.pool_min_size;
  pool.max_size = options_.pool_max_size;
  pool.acquire_timeout = options_.connect_timeout;
  pool_ = PgPool::create(io, info_, connection, pool);
  // A pooler's session is everybody's: leave it as it is.
  if (connection.statement_cache == ConnectionOptions::StatementCache::automatic)
    pool_->set_setup(set_up_session);

  LimitStoreOptions limits;
  limits.durability = durability(options_.synchronous_commit).value();
  limits.lanes = options_.lanes;
  limits.holder = holder_text(info_);
  limits.listen = std::move(listen);
  limits.connection = connection;
  // The names of schema and table may be long: a hash of them, and who is meant.
  limits.channel = named("freed", names_.quoted(names_.state)).name + '_';
  limits_ = std::make_unique<PgLimitStore>(io, clock_, static_cast<LimitBackend&>(*this), std::move(limits));
}

PostgresStore::~PostgresStore() { *alive_ = false; }

store::Capabilities PostgresStore::capabilities() const {
  store::Capabilities caps;
  caps.limits = true;
  caps.shared = true;
  caps.durable = true;
  return caps;
}

bool PostgresStore::down() const { return pool_->down(); }

void PostgresStore::abandon_after_fork() {
  limits_->abandon_after_fork();
  pool_->abandon_after_fork();
}

void PostgresStore::close(std::function<void()> done) {
  limits_->close(kClosePatience, [this, done = std::move(done)] { pool_->close(done); });
}

store::Stats PostgresStore::stats() const {
  store::Stats out = stats_;
  limits_->fill(out);
  pool_->fill(out);
  return out;
}

void PostgresStore::count(std::size_t statements) {
  ++stats_.round_trips;
  stats_.statements += statements;
}

Status PostgresStore::explain(const PipelineResult& result) {
  if (result.status.code != Code::server) return result.status;
  // Class 42: a table, column or privilege went away. Look before the next trip.
  if (result.status.sqlstate.starts_with("42") || result.status.sqlstate.starts_with("3F")) ready_ = false;
  return from_server(result.status.sqlstate, result.server_message, context_);
}

// --- the schema ---------------------------------------------------------------------------------

void PostgresStore::look(const PgPool::Lease& connection, OnCatalogue done) {
  count(1);
  std::vector<Call> calls;
  calls.push_back({&catalogue_statement(), catalogue_params(names_)});
  connection->run(std::move(calls), [this, alive = alive_, done = std::move(done)](PipelineResult result) {
    if (!*alive) return;
    if (!result.status.ok()) return done(explain(result));
    done(read_catalogue(names_, *result.results[0]));
  });
}

void PostgresStore::when_ready(Connection::Done done) {
  if (ready_) return done(Status::success());
  waiting_.push_back(std::move(done));
  if (std::exchange(checking_, true)) return;
  pool_->get([this, alive = alive_](Result<PgPool::Lease> got) {
    if (!*alive) return;
    if (!got.ok()) return checked(got.status());
    check(got.value());
  });
}

void PostgresStore::check(const PgPool::Lease& connection) {
  look(connection, [this, connection, alive = alive_](Result<Catalogue> found) {
    const auto finish = [&](Status status) {
      pool_->put(connection);
      checked(std::move(status));
    };
    if (!found.ok()) return finish(found.status());
    const Catalogue& catalogue = found.value();
    std::string script;
    // A table of rate-sync 0.2 is converted by `migrate` only: its processes may still be at work.
    if (options_.auto_create && !catalogue.legacy() && !catalogue.in_recovery)
      script = migration_script(names_, migration_steps(names_, catalogue, {options_.unlogged}));
    if (script.empty()) {
      Status status = check_catalogue(names_, catalogue, options_.auto_create);
      if (status.ok()) use(catalogue);
      return finish(std::move(status));
    }
    count(1);
    connection->run_script(std::move(script), [this, connection, alive](Status creation) {
      if (*alive) check_again(connection, std::move(creation));
    });
  });
}

// Whether creation failed does not matter when all is there: another instance was faster, or only
// the leases could not be made and slots are counted without them.
void PostgresStore::check_again(const PgPool::Lease& connection, Status creation) {
  look(connection, [this, connection, creation = std::move(creation)](Result<Catalogue> found) {
    Status status = found.ok() ? check_catalogue(names_, found.value(), true) : found.status();
    if (status.ok()) {
      use(found.value());
    } else if (!creation.ok()) {
      status.message += fmt::format(" (creating it failed: {})", creation.message);
    }
    pool_->put(connection);
    checked(std::move(status));
  });
}

void PostgresStore::use(const Catalogue& found) {
  const auto where = [this](bool usable, const std::string& table) {
    return usable ? names_.quoted(table) : std::string();
  };
  LimitTables tables{names_.quoted(names_.state), where(found.leases_usable(), names_.leases),
                     where(found.windows_usable(), names_.windows), where(found.windows_usable(), names_.log),
                     where(found.waiters_usable(), names_.waiters)};
  no_windows_ = check_windows(names_, found, options_.auto_create);
  if (!sql_ || tables != tables_) {
    all_sql_.push_back(std::make_unique<LimitSql>(make_limit_sql(tables)));
    sql_ = all_sql_.back().get();
    tables_ = std::move(tables);
  }
  ready_ = true;
}

Status PostgresStore::no_windows() {
  ready_ = false;
  return no_windows_;
}

void PostgresStore::checked(Status status) {
  checking_ = false;
  for (const Connection::Done& done : std::exchange(waiting_, {})) done(status);
}

void PostgresStore::initialize(store::Callback<store::Unit> done) {
  when_ready([done = std::move(done)](Status status) {
    if (status.ok()) return done(store::Unit{});
    done(std::move(status));
  });
}

void PostgresStore::migrate(bool dry_run, store::Callback<std::vector<store::MigrationStep>> done) {
  if (!names_.can_migrate())
    return done(bad_option("table_name", "at most 51 bytes for migrations",
                           fmt::format("{} bytes", names_.state.size())));
  pool_->get([this, dry_run, done = std::move(done), alive = alive_](Result<PgPool::Lease> got) mutable {
    if (!*alive || !got.ok()) return done(got.status());
    const PgPool::Lease connection = got.value();
    look(connection, [this, dry_run, done = std::move(done), connection, alive](Result<Catalogue> found) {
      const auto finish = [&](Result<std::vector<store::MigrationStep>> result) {
        pool_->put(connection);
        done(std::move(result));
      };
      if (!found.ok()) return finish(found.status());
      std::vector<store::MigrationStep> steps = migration_steps(names_, found.value(), {options_.unlogged});
      std::string script = migration_script(names_, steps);
      if (dry_run || script.empty()) return finish(std::move(steps));
      count(1);
      connection->run_script(std::move(script), [this, done, connection, alive,
                                                 steps = std::move(steps)](Status status) mutable {
        if (!*alive) return;
        pool_->put(connection);
        ready_ = false;
        if (status.ok()) return done(std::move(steps));
        done(std::move(status));
      });
    });
  });
}

// --- doctor -------------------------------------------------------------------------------------

struct PostgresStore::Checkup {
  PgPool::Lease connection;
  store::Callback<std::vector<Finding>> done;
  std::vector<Finding> findings;
  Catalogue catalogue;

  void add(Finding::Level level, std::string subject, std::string message) {
    findings.push_back({level, std::move(subject), std::move(message)});
  }
};

void PostgresStore::doctor(store::Callback<std::vector<Finding>> done) {
  pool_->get([this, done = std::move(done), alive = alive_](Result<PgPool::Lease> got) mutable {
    if (!*alive) return;
    auto checkup = std::make_shared<Checkup>();
    if (!got.ok()) {
      checkup->add(Finding::Level::error, "connection", got.status().message);
      return done(std::move(checkup->findings));
    }
    checkup->connection = got.value();
    checkup->done = std::move(done);
    look(checkup->connection, [this, checkup](Result<Catalogue> found) {
      if (!found.ok()) {
        checkup->add(Finding::Level::error, "catalogue", found.status().message);
        pool_->put(checkup->connection);
        return checkup->done(std::move(checkup->findings));
      }
      checkup->catalogue = std::move(found.value());
      examine(checkup);
    });
  });
}

void PostgresStore::examine(const std::shared_ptr<Checkup>& checkup) {
  static const Statement query{"", R"(
SELECT (date_part('epoch', clock_timestamp()) * 1000000)::int8, current_setting('max_connections')::int8,
       pg_catalog.pg_total_relation_size(c.oid), c.reltuples::int8, c.relpersistence = 'u'
FROM (SELECT $1::text AS schema_name, $2::text AS table_name) AS names
LEFT JOIN pg_catalog.pg_namespace AS n ON n.nspname = names.schema_name
LEFT JOIN pg_catalog.pg_class AS c ON c.relnamespace = n.oid AND c.relname = names.table_name)"};
  using Level = Finding::Level;
  count(1);
  std::vector<Call> calls;
  calls.push_back({&query, {Param::text(names_.schema), Param::text(names_.state)}});
  const auto wall = [] {
    return std::chrono::duration_cast<std::chrono::microseconds>(
               std::chrono::system_clock::now().time_since_epoch())
        .count();
  };
  const std::int64_t before = wall();
  checkup->connection->run(std::move(calls), [this, checkup, alive = alive_, wall,
                                              before](PipelineResult result) {
    if (!*alive) return;
    const std::int64_t after = wall();
    const Catalogue& found = checkup->catalogue;
    const int major = found.server_version / 10'000;
    checkup->add(major < 12 ? Level::error : Level::ok, "server version",
                 fmt::format("PostgreSQL {}.{} at {}{}", major, found.server_version % 10'000,
                             checkup->connection->peer(), major < 12 ? ": 12 is the oldest that works" : ""));
    for (Finding& finding : schema_findings(names_, found, options_.auto_create))
      checkup->findings.push_back(std::move(finding));
    if (result.status.ok() && result.results[0]->rows() == 1) {
      const Rows& row = *result.results[0];
      const std::int64_t skew = row.integer(0, 0) - (before + after) / 2;
      checkup->add(
          std::abs(skew) > 1'000'000 ? Level::warning : Level::ok, "clock",
          fmt::format("the server's clock is {:.3f} s ahead of this host's; limits use the server's alone",
                      static_cast<double>(skew) / 1e6));
      const auto most = static_cast<std::size_t>(row.integer(0, 1));
      checkup->add(options_.pool_max_size * 4 > most ? Level::warning : Level::ok, "connections",
                   fmt::format("pool_max_size is {} of the server's max_connections {}, for each process",
                               options_.pool_max_size, most));
      if (!row.is_null(0, 2)) {
        const std::int64_t rows = row.integer(0, 3);
        checkup->add(
            Level::ok, "size",
            fmt::format("{} bytes with indexes, {}{}", row.integer(0, 2),
                        rows < 0 ? std::string("rows not counted yet") : fmt::format("about {} rows", rows),
                        row.boolean(0, 4) ? ", unlogged: a crash of the server empties it" : ""));
      }
    } else if (!result.status.ok()) {
      checkup->add(Level::warning, "size", result.status.message);
    }
    const bool automatic = options_.statement_cache == "auto" || options_.statement_cache == "automatic";
    if (automatic && !checkup->connection->named_statements())
      checkup->add(Level::ok, "pooler",
                   "a pooler sits in between: statements are not prepared; with PgBouncer 1.21 or later and "
                   "max_prepared_statements, statement_cache = \"on\" is faster");
    if (limits_->deaf() ||
        (automatic && options_.listen_url.empty() && !checkup->connection->named_statements()))
      checkup->add(
          Level::warning, "listen",
          "notifications do not arrive through a pooler in transaction mode: waiters for a slot that "
          "another process holds ask now and then; set listen_url to the server itself");
    pool_->put(checkup->connection);
    checkup->done(std::move(checkup->findings));
  });
}

}  // namespace ratesync::postgres
