// A real Redis for C++ tests: each object starts one on a free port and a Unix socket, in a directory of
// its own, and takes it down with itself. It can be killed, started again on the same port, and stopped.
#pragma once

#include <signal.h>
#include <sys/types.h>

#include <optional>
#include <string>
#include <vector>

#include "held_port.h"
#include "server_home.h"

namespace ratesync::testing {

class RedisServer {
 public:
  // `arguments` as on the command line: {"--requirepass", "secret"}. `config` becomes a configuration file
  // (Sentinel wants one that it can write). With `tls`, tls_port() listens too and
  // the certificates of directory() are made: ca.pem, server.pem and client.pem (+ .key) for "localhost".
  explicit RedisServer(std::vector<std::string> arguments = {}, bool tls = false,
                       const std::string& config = {});
  ~RedisServer();
  RedisServer(const RedisServer&) = delete;
  RedisServer& operator=(const RedisServer&) = delete;

  [[nodiscard]] int port() const { return port_.number(); }
  [[nodiscard]] int tls_port() const { return tls_port_ ? tls_port_->number() : 0; }
  [[nodiscard]] std::string socket() const { return home_.directory + "/sock"; }
  [[nodiscard]] const std::string& directory() const { return home_.directory; }
  [[nodiscard]] std::string url() const { return "redis://127.0.0.1:" + port_.text() + "/0"; }

  void start();
  // Nothing is saved: it starts again empty.
  void kill();
  void freeze() const { ::kill(pid_, SIGSTOP); }
  void thaw() const { ::kill(pid_, SIGCONT); }

 private:
  void run(const std::vector<std::string>& command) const;
  void make_certificates() const;
  // Any answer will do, also that a password is wanted, but not that it still reads its data. Asked on the
  // socket of our own directory, where nobody else answers.
  [[nodiscard]] bool serves() const;

  const std::vector<std::string> arguments_;
  const ServerHome home_{"redis"};
  std::string config_;
  HeldPort port_;
  std::optional<HeldPort> tls_port_;
  pid_t pid_ = 0;
};

}  // namespace ratesync::testing
