#include "ratesync/postgres/postgres_store.h"

#include <unistd.h>

#include <chrono>
#include <utility>

#include "ratesync/base/format.h"
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
  return formatted("{}:{} {}", host, getpid(), application.empty() ? "ratesync" : application);
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
  return Status::make(Code::invalid, formatted("{}: expected {}, got {}", option, expected, received));
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
                      formatted("{} bytes", options.table_name.size()));
  if (options.pool_max_size < 1 || options.pool_max_size > 10'000)
    return bad_option("pool_max_size", "a whole number from 1 to 10000",
                      std::to_string(options.pool_max_size));
  if (options.pool_min_size > options.pool_max_size)
    return bad_option("pool_min_size", formatted("at most pool_max_size ({})", options.pool_max_size),
                      std::to_string(options.pool_min_size));
  if (options.command_timeout <= 0)
    return bad_option("command_timeout", "a number above 0", formatted("{} ns", options.command_timeout));
  if (options.connect_timeout <= 0)
    return bad_option("connect_timeout", "a number above 0", formatted("{} ns", options.connect_timeout));
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
    : io_(io),
      clock_(clock),
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
  schema_ = std::make_unique<SchemaWatch>(*pool_, schema_hooks());

  LimitStoreOptions limits;
  limits.durability = durability(options_.synchronous_commit).value();
  limits.lanes = options_.lanes;
  limits.holder = holder_text(info_);
  limits.listen = listen;
  limits.connection = connection;
  prefix_options_ = {options_.auto_create, options_.lanes, limits.holder, std::move(listen), connection};
  // The names of schema and table may be long: a hash of them, and who is meant.
  limits.channel = named("freed", names_.quoted(names_.state)).name + '_';
  limits_ = std::make_unique<PgLimitStore>(io, clock_, static_cast<LimitBackend&>(*this), std::move(limits));
}

PostgresStore::~PostgresStore() {
  *alive_ = false;
  for (PrefixBackend* one = prefixes_; one;) delete std::exchange(one, one->older);
}

store::Capabilities PostgresStore::capabilities() const {
  store::Capabilities caps;
  caps.limits = true;
  caps.locks = true;
  caps.state = true;
  caps.shared = true;
  caps.durable = true;
  return caps;
}

bool PostgresStore::down() const { return pool_->down(); }

void PostgresStore::abandon_after_fork() {
  limits_->abandon_after_fork();
  for (PrefixBackend* one = prefixes_; one; one = one->older) one->abandon_after_fork();
  pool_->abandon_after_fork();
}

void PostgresStore::close(std::function<void()> done) {
  auto left = std::make_shared<std::size_t>(1);
  for (PrefixBackend* one = prefixes_; one; one = one->older) ++*left;
  const auto closed = [this, left, done = std::move(done)] {
    if (--*left == 0) pool_->close(done);
  };
  // Those that are counted: another thread may be adding one.
  PrefixBackend* one = prefixes_;
  for (std::size_t n = *left - 1; n > 0; --n, one = one->older) one->close(kClosePatience, closed);
  limits_->close(kClosePatience, closed);
}

store::Stats PostgresStore::stats() const {
  store::Stats out = stats_;
  out.round_trips += schema_->looks();
  out.statements += schema_->looks();
  limits_->fill(out);
  for (PrefixBackend* one = prefixes_; one; one = one->older) one->fill(out);
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

SchemaWatch::Hooks PostgresStore::schema_hooks() {
  SchemaWatch::Hooks hooks;
  hooks.params = [this] { return catalogue_params(names_); };
  hooks.steps = [this](const Inventory& found) {
    return migration_steps(names_, read_catalogue(names_, found), {options_.unlogged});
  };
  hooks.script = [this](const std::vector<store::MigrationStep>& steps) {
    return migration_script(names_, steps);
  };
  // A table of rate-sync 0.2 is converted by `migrate` only: its processes may still be at work.
  hooks.may_create = [this](const Inventory& found) {
    return options_.auto_create && !read_catalogue(names_, found).legacy();
  };
  hooks.found = [this](const Inventory& found) {
    const Catalogue catalogue = read_catalogue(names_, found);
    Status status = check_catalogue(names_, catalogue, options_.auto_create);
    if (status.ok()) use(catalogue);
    return status;
  };
  hooks.migrated = [this] { ready_ = false; };
  hooks.explain = [this](const PipelineResult& result) { return explain(result); };
  return hooks;
}

void PostgresStore::when_ready(Connection::Done done) {
  limits_asked_ = true;
  if (ready_) return done(Status::success());
  schema_->check(std::move(done));
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

void PostgresStore::initialize(store::Callback<store::Unit> done) {
  const auto finish = [this, done = std::move(done)](Status status) {
    if (status.ok() || ((status.sqlstate == "42P01" || status.sqlstate == "3F000") && without_limits()))
      return done(store::Unit{});
    done(std::move(status));
  };
  if (ready_) return finish(Status::success());
  schema_->check(finish);
}

// --- the tables of a prefix ---------------------------------------------------------------------

Result<PrefixBackend*> PostgresStore::backend_of(const std::string& prefix) {
  const std::lock_guard lock(prefixes_lock_);
  for (PrefixBackend* one = prefixes_; one; one = one->older)
    if (one->names().prefix == prefix) return one;
  Result<PrefixNames> names = PrefixNames::make(options_.schema_name, prefix);
  if (!names.ok()) return names.status();
  ErrorContext context = context_;
  context.options = "prefix and schema_name";
  context.privileges = "SELECT, INSERT, UPDATE, DELETE";
  context.migrate = "ratesync migrate -c FILE";
  auto made = std::make_unique<PrefixBackend>(io_, clock_, *pool_, std::move(names.value()),
                                              std::move(context), prefix_options_);
  made->older = prefixes_;
  prefixes_ = made.get();
  return made.release();
}

Result<store::StateStore*> PostgresStore::state(const std::string& prefix) {
  Result<PrefixBackend*> backend = backend_of(prefix);
  if (!backend.ok()) return backend.status();
  return backend.value()->state();
}

Result<store::LockStore*> PostgresStore::locks(const std::string& prefix) {
  Result<PrefixBackend*> backend = backend_of(prefix);
  if (!backend.ok()) return backend.status();
  return backend.value()->locks();
}

void PostgresStore::migrate_state(const std::string& prefix, bool dry_run,
                                  store::Callback<std::vector<store::MigrationStep>> done) {
  Result<PrefixBackend*> backend = backend_of(prefix);
  if (!backend.ok()) return done(backend.status());
  backend.value()->migrate(dry_run, std::move(done));
}

void PostgresStore::migrate(bool dry_run, store::Callback<std::vector<store::MigrationStep>> done) {
  if (!names_.can_migrate())
    return done(bad_option("table_name", "at most 51 bytes for migrations",
                           formatted("{} bytes", names_.state.size())));
  schema_->migrate(dry_run, std::move(done));
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
    schema_->look(checkup->connection, [this, checkup](Result<Inventory> found) {
      if (!found.ok()) {
        checkup->add(Finding::Level::error, "catalogue", found.status().message);
        pool_->put(checkup->connection);
        return checkup->done(std::move(checkup->findings));
      }
      checkup->catalogue = read_catalogue(names_, std::move(found.value()));
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
                 formatted("PostgreSQL {}.{} at {}{}", major, found.server_version % 10'000,
                           checkup->connection->peer(), major < 12 ? ": 12 is the oldest that works" : ""));
    if (!found.state.exists && without_limits())
      checkup->add(Level::ok, "table",
                   formatted("{} does not exist; only limits need it", names_.quoted(names_.state)));
    else
      for (Finding& finding : schema_findings(names_, found, options_.auto_create))
        checkup->findings.push_back(std::move(finding));
    if (result.status.ok() && result.results[0]->rows() == 1) {
      const Rows& row = *result.results[0];
      const std::int64_t skew = row.integer(0, 0) - (before + after) / 2;
      checkup->add(
          std::abs(skew) > 1'000'000 ? Level::warning : Level::ok, "clock",
          formatted("the server's clock is {:.3f} s ahead of this host's; limits use the server's alone",
                    static_cast<double>(skew) / 1e6));
      const auto most = static_cast<std::size_t>(row.integer(0, 1));
      checkup->add(options_.pool_max_size * 4 > most ? Level::warning : Level::ok, "connections",
                   formatted("pool_max_size is {} of the server's max_connections {}, for each process",
                             options_.pool_max_size, most));
      if (!row.is_null(0, 2)) {
        const std::int64_t rows = row.integer(0, 3);
        checkup->add(
            Level::ok, "size",
            formatted("{} bytes with indexes, {}{}", row.integer(0, 2),
                      rows < 0 ? std::string("rows not counted yet") : formatted("about {} rows", rows),
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
    examine(checkup, prefixes_);
  });
}

void PostgresStore::examine(const std::shared_ptr<Checkup>& checkup, PrefixBackend* prefix) {
  if (!prefix) {
    pool_->put(checkup->connection);
    return checkup->done(std::move(checkup->findings));
  }
  prefix->examine(checkup->connection, [this, checkup, prefix](std::vector<Finding> findings) {
    for (Finding& finding : findings) checkup->findings.push_back(std::move(finding));
    examine(checkup, prefix->older);
  });
}

}  // namespace ratesync::postgres
