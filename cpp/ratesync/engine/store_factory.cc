#include "ratesync/engine/store_factory.h"

#include "ratesync/base/format.h"
#include "ratesync/memory/memory_store.h"
#ifdef RATESYNC_HAS_POSTGRES
#include "ratesync/postgres/postgres_store.h"
#endif
#ifdef RATESYNC_HAS_REDIS
#include "ratesync/redis/redis_store.h"
#endif

namespace ratesync::engine {

#if defined(RATESYNC_HAS_POSTGRES) || defined(RATESYNC_HAS_REDIS)
namespace {

// Reads options by name and remembers the first that does not fit. The Python layer has checked
// them already, with better words; this is what keeps the core safe from any other caller.
class Reader {
 public:
  Reader(const char* kind, const StoreOptions& options) : kind_(kind), left_(options) {}

  void text(const char* name, std::string& into) {
    read(name, "a string", [&](const Option& o) { return take(o, into); });
  }
  void flag(const char* name, bool& into) {
    read(name, "true or false", [&](const Option& o) { return take(o, into); });
  }
  void count(const char* name, std::size_t& into) {
    std::int64_t value = 0;
    read(name, "a whole number from 0", [&](const Option& o) {
      if (!take(o, value) || value < 0) return false;
      into = static_cast<std::size_t>(value);
      return true;
    });
  }
  void seconds(const char* name, Nanos& into) {
    read(name, "seconds above 0 and up to 86400", [&](const Option& o) {
      std::int64_t whole = 0;
      double value = 0;
      if (take(o, whole))
        value = static_cast<double>(whole);
      else if (!take(o, value))
        return false;
      if (!(value > 0 && value <= 86'400)) return false;
      into = from_seconds(value);
      return true;
    });
  }
  void ignore(const char* name) { left_.erase(name); }
  Status finish() {
    if (status_.ok() && !left_.empty())
      status_ = Status::make(Code::invalid,
                             formatted("the {} store has no option '{}'", kind_, left_.begin()->first));
    return status_;
  }

 private:
  template <class T>
  static bool take(const Option& option, T& into) {
    const T* value = std::get_if<T>(&option);
    if (value) into = *value;
    return value != nullptr;
  }
  template <class Take>
  void read(const char* name, const char* expected, Take take_it) {
    const auto found = left_.find(name);
    if (found == left_.end()) return;
    if (!take_it(found->second) && status_.ok())
      status_ = Status::make(Code::invalid, formatted("option {}: expected {}", name, expected));
    left_.erase(found);
  }

  const char* const kind_;
  StoreOptions left_;
  Status status_;
};

#ifdef RATESYNC_HAS_POSTGRES
Result<postgres::PostgresOptions> postgres_options(const StoreOptions& options) {
  postgres::PostgresOptions out;
  Reader reader("postgres", options);
  reader.text("url", out.url);
  reader.text("schema_name", out.schema_name);
  reader.text("table_name", out.table_name);
  reader.flag("auto_create", out.auto_create);
  reader.count("pool_min_size", out.pool_min_size);
  reader.count("pool_max_size", out.pool_max_size);
  reader.seconds("command_timeout", out.command_timeout);
  reader.seconds("connect_timeout", out.connect_timeout);
  reader.text("synchronous_commit", out.synchronous_commit);
  reader.flag("unlogged", out.unlogged);
  reader.text("statement_cache", out.statement_cache);
  reader.text("listen_url", out.listen_url);
  reader.count("lanes", out.lanes);
  reader.ignore("timing_margin_ms");  // of the limiters on the store
  Status status = reader.finish();
  if (!status.ok()) return status;
  return out;
}
#endif

#ifdef RATESYNC_HAS_REDIS
Result<redis::RedisOptions> redis_options(const StoreOptions& options) {
  redis::RedisOptions out;
  std::size_t db = 0;
  Reader reader("redis", options);
  reader.text("url", out.url);
  reader.count("db", db);
  reader.text("password", out.password);
  reader.text("key_prefix", out.key_prefix);
  reader.text("hash_tag", out.hash_tag);
  reader.ignore("pool_min_size");  // one connection carries all
  reader.count("pool_max_size", out.pool_max_size);
  reader.seconds("socket_timeout", out.socket_timeout);
  reader.seconds("socket_connect_timeout", out.socket_connect_timeout);
  reader.ignore("timing_margin_ms");  // of the limiters on the store
  Status status = reader.finish();
  if (!status.ok()) return status;
  if (db > 1'000'000) return Status::make(Code::invalid, "option db: expected a number from 0 to 1000000");
  out.db = static_cast<int>(db);
  return out;
}
#endif

}  // namespace
#endif

Result<std::unique_ptr<store::Store>> make_store(const std::string& kind, const StoreOptions& options,
                                                 asio::io_context& io, const Clock& clock) {
  (void)io;
  if (kind == "memory") {
    if (!options.empty())
      return Status::make(Code::invalid,
                          formatted("the memory store has no options, got '{}'", options.begin()->first));
    return std::unique_ptr<store::Store>(std::make_unique<memory::MemoryStore>(clock));
  }
  if (kind == "postgres") {
#ifdef RATESYNC_HAS_POSTGRES
    Result<postgres::PostgresOptions> parsed = postgres_options(options);
    if (!parsed.ok()) return parsed.status();
    return postgres::PostgresStore::create(io, clock, std::move(parsed.value()));
#else
    return Status::make(
        Code::invalid,
        "this build of ratesync has no PostgreSQL store: install libpq (Debian: libpq-dev) and "
        "build ratesync again from its source");
#endif
  }
  if (kind == "redis") {
#ifdef RATESYNC_HAS_REDIS
    Result<redis::RedisOptions> parsed = redis_options(options);
    if (!parsed.ok()) return parsed.status();
    return redis::RedisStore::create(io, clock, std::move(parsed.value()));
#else
    return Status::make(Code::invalid,
                        "this build of ratesync has no Redis store: install hiredis and OpenSSL (Debian: "
                        "libhiredis-dev, libssl-dev) and build ratesync again from its source");
#endif
  }
  return Status::make(Code::invalid,
                      formatted("unknown engine '{}': expected memory, postgres or redis", kind));
}

}  // namespace ratesync::engine
