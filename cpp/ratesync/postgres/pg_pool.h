// The pool of one PostgreSQL store: glue between the sans-io pool (pool/) and Connection.
// I/O thread only.
#pragma once

#include <asio/io_context.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "ratesync/base/clock.h"
#include "ratesync/base/status.h"
#include "ratesync/postgres/connection.h"
#include "ratesync/store/store.h"

namespace ratesync::postgres {

struct PoolOptions {
  std::size_t min_size = 2;
  std::size_t max_size = 10;
  std::size_t max_waiting = 1'000;
  Nanos acquire_timeout = 5 * kSecond;
  Nanos max_lifetime = 3'600 * kSecond;  // jittered by up to 10 %
  Nanos max_idle = 600 * kSecond;        // beyond min_size
};

class PgPool {
 public:
  // A borrowed connection. Give it back with `put`, exactly once, whatever became of it.
  using Lease = std::shared_ptr<Connection>;
  using OnLease = std::function<void(Result<Lease>)>;
  // Runs on every new connection before it is handed out (schema check); may use it.
  using Setup = std::function<void(std::shared_ptr<Connection>, Connection::Done)>;

  static std::unique_ptr<PgPool> create(asio::io_context& io, ConnInfo info, ConnectionOptions connection,
                                        PoolOptions options);
  virtual ~PgPool() = default;

  virtual void set_setup(Setup setup) = 0;
  // FIFO; `done` runs on the loop, never inside get(). Errors: unavailable (fail fast while down;
  // message has host, port and elapsed), timeout/exhausted (message has sizes, waiters and
  // pool_max_size), closed, server (authentication, database missing: with the cure).
  virtual void get(OnLease done) = 0;
  virtual void put(Lease lease) = 0;  // a connection that is not open() any more is dropped
  // Waiters get Code::closed; lent connections may finish their pipeline, for command_timeout at
  // most, and are then closed in the borrower's hands.
  virtual void close(std::function<void()> done) = 0;
  virtual void abandon_after_fork() = 0;
  [[nodiscard]] virtual bool down() const = 0;
  virtual void fill(store::Stats& stats) const = 0;  // reconnects and the three gauges
};

}  // namespace ratesync::postgres
