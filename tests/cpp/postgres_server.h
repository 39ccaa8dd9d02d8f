// A real PostgreSQL for C++ tests: the one of RATESYNC_TEST_POSTGRES_URL, or a temporary one (programs of
// RATESYNC_PG_BIN, or the newest found) that this process starts on a free port and a Unix socket and takes
// down with itself.
#pragma once

#include <pwd.h>
#include <sys/types.h>

#include <optional>
#include <string>

#include "held_port.h"
#include "server_home.h"

namespace ratesync::testing {

class PostgresServer {
 public:
  static PostgresServer& instance();

  // Superuser, TCP.
  [[nodiscard]] const std::string& url() const { return url_; }
  // True for the temporary one: then pg_hba.conf asks role "guarded" for a password, and the
  // server's socket directory is known.
  [[nodiscard]] bool own() const { return pid_ > 0; }
  [[nodiscard]] std::string socket_directory() const { return home_ ? home_->directory : std::string(); }
  [[nodiscard]] int port() const { return port_.number(); }

 private:
  PostgresServer();
  ~PostgresServer();
  static std::string find_binaries();

  std::string url_;
  std::optional<ServerHome> home_;
  HeldPort port_;
  pid_t pid_ = 0;
};

}  // namespace ratesync::testing
