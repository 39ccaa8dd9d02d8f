// The LISTEN connection of a process: hears which group has a slot for one of its waiters.
//
// It exists only while somebody of this process waits, and a while longer. Whether notifications arrive is
// tried, not assumed: through a pooler in transaction mode LISTEN succeeds and brings nothing. A notice to
// ourselves, sent over another connection, has to come back before active() is true.
// I/O thread only.
#pragma once

#include <asio/io_context.hpp>
#include <asio/steady_timer.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "ratesync/base/clock.h"
#include "ratesync/postgres/connection.h"
#include "ratesync/postgres/pg_pool.h"

namespace ratesync::postgres {

class Listener {
 public:
  struct Hooks {
    std::function<void(const std::string& group)> freed;
    std::function<void()> back;  // active from now on; what was told before was missed
    // Notifies the channel over another connection.
    std::function<void(const std::string& channel, const std::string& payload)> probe;
  };

  Listener(asio::io_context& io, const Clock& clock, ConnInfo info, ConnectionOptions options,
           std::string channel, Hooks hooks);
  ~Listener();

  void want(bool somebody_waits);
  [[nodiscard]] bool active() const { return state_ == State::active; }
  // Connected, but what we told ourselves did not come back.
  [[nodiscard]] bool deaf() const { return deaf_; }
  void close();
  void abandon_after_fork();

 private:
  enum class State : std::uint8_t { off, connecting, probing, active };

  void connect();
  void listen();
  void heard(const std::string& payload);
  void lost();
  void drop();
  void arm(Nanos in);
  void on_timer();

  asio::io_context& io_;
  const Clock& clock_;
  const ConnInfo info_;
  const ConnectionOptions options_;
  const std::string channel_;
  const Statement listen_;
  const Hooks hooks_;
  State state_ = State::off;
  bool wanted_ = false;
  bool closed_ = false;
  bool deaf_ = false;
  Nanos idle_since_ = 0;
  Nanos pause_ = 0;  // before the next attempt
  std::uint64_t attempt_ = 0;
  std::string probe_;
  std::shared_ptr<Connection> connection_;
  std::unique_ptr<asio::steady_timer> timer_;  // behind a pointer: leaked after fork
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

// Sends one notice over a connection of the pool, as Hooks::probe wants. Lost where that fails. `alive`:
// while true, the pool is there.
void notify(PgPool& pool, const std::shared_ptr<bool>& alive, const std::string& channel,
            const std::string& payload);

}  // namespace ratesync::postgres
