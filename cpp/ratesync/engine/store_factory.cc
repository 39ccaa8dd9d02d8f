#include "ratesync/engine/store_factory.h"

#include <fmt/format.h>

#include "ratesync/memory/memory_store.h"
#ifdef RATESYNC_HAS_POSTGRES
#include "ratesync/postgres/postgres_store.h"
#endif

namespace ratesync::engine {

Result<std::unique_ptr<store::Store>> make_store(const std::string& kind, const StoreOptions& options,
                                                 asio::io_context& io, const Clock& clock) {
  (void)io;
  if (kind == "memory") {
    if (!options.empty())
      return Status::make(Code::invalid, fmt::format("the memory store has no options, got '{}'", options.begin()->first));
    return std::unique_ptr<store::Store>(std::make_unique<memory::MemoryStore>(clock));
  }
  if (kind == "postgres") {
#ifdef RATESYNC_HAS_POSTGRES
    return postgres::PostgresStore::create(io, clock, options);
#else
    return Status::make(Code::invalid,
                        "this build of ratesync has no PostgreSQL store: install libpq (Debian: libpq-dev) and "
                        "build again with  pip install --no-binary ratesync \"ratesync[postgres]\"");
#endif
  }
  return Status::make(Code::invalid, fmt::format("unknown engine '{}': expected memory or postgres", kind));
}

}  // namespace ratesync::engine
