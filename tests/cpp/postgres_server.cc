#include "postgres_server.h"

#include <glob.h>
#include <pwd.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>

namespace ratesync::testing {

PostgresServer& PostgresServer::instance() {
  static PostgresServer server;
  return server;
}

PostgresServer::PostgresServer() {
  if (const char* given = std::getenv("RATESYNC_TEST_POSTGRES_URL"); given && *given) {
    url_ = given;
    return;
  }
  const std::string bin = find_binaries();
  const std::string& directory = home_.emplace("pg").directory;
  const passwd* account = nullptr;
  // PostgreSQL refuses to run as root.
  if (geteuid() == 0) {
    account = getpwnam("postgres");
    if (!account) account = getpwnam("nobody");
    if (chown(directory.c_str(), account->pw_uid, account->pw_gid) != 0)
      throw std::runtime_error("chown failed");
  }
  const std::string data = directory + "/data";
  const pid_t initdb = home_->spawn(
      {bin + "/initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"},
      SIGQUIT, account);
  int status = 0;
  if (waitpid(initdb, &status, 0) != initdb || status != 0)
    throw std::runtime_error("initdb failed: " + home_->log());
  {
    std::ofstream hba(data + "/pg_hba.conf");
    hba << "host all guarded 127.0.0.1/32 scram-sha-256\nhost all all 127.0.0.1/32 trust\nlocal all all "
           "trust\n";
  }
  // Before 14 passwords are md5 unless told.
  pid_ = home_->spawn({bin + "/postgres", "-D", data, "-k", directory, "-p", port_.text(), "-c",
                       "listen_addresses=127.0.0.1", "-c", "fsync=off", "-c", "max_connections=100", "-c",
                       "superuser_reserved_connections=1", "-c", "password_encryption=scram-sha-256"},
                      SIGQUIT, account);
  url_ = "postgresql://postgres@127.0.0.1:" + port_.text() + "/postgres";
  const auto ready = [&data] {
    std::ifstream in(data + "/postmaster.pid");
    std::string line;
    for (int n = 0; n < 8 && std::getline(in, line); ++n) {
    }
    return line.starts_with("ready");
  };
  home_->wait_until(ready, "PostgreSQL", pid_);
}

PostgresServer::~PostgresServer() {
  if (pid_ > 0) {
    kill(pid_, SIGINT);
    int status = 0;
    waitpid(pid_, &status, 0);
  }
}

std::string PostgresServer::find_binaries() {
  if (const char* given = std::getenv("RATESYNC_PG_BIN"); given && *given) return given;
  glob_t found{};
  std::string bin;
  for (const char* pattern : {"/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin",
                              "/opt/homebrew/opt/postgresql*/bin", "/usr/local/pgsql/bin", "/usr/bin"}) {
    if (glob(pattern, 0, nullptr, &found) == 0)
      for (std::size_t i = 0; i < found.gl_pathc; ++i)
        if (access((std::string(found.gl_pathv[i]) + "/initdb").c_str(), X_OK) == 0) bin = found.gl_pathv[i];
    globfree(&found);
    if (!bin.empty()) return bin;
  }
  throw std::runtime_error("no PostgreSQL server found; set RATESYNC_PG_BIN or RATESYNC_TEST_POSTGRES_URL");
}

}  // namespace ratesync::testing
