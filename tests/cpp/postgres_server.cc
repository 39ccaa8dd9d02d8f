#include "postgres_server.h"

#include <fcntl.h>
#include <glob.h>
#include <grp.h>
#include <pwd.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/prctl.h>
#endif

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

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
  char pattern[] = "/tmp/ratesync-pg-XXXXXX";
  if (!mkdtemp(pattern)) throw std::runtime_error("mkdtemp failed");
  directory_ = pattern;
  // PostgreSQL refuses to run as root.
  if (geteuid() == 0) {
    account_ = getpwnam("postgres");
    if (!account_) account_ = getpwnam("nobody");
    if (chown(pattern, account_->pw_uid, account_->pw_gid) != 0) throw std::runtime_error("chown failed");
  }
  const std::string data = directory_ + "/data";
  const pid_t initdb = spawn({bin + "/initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8",
                              "--locale=C", "--no-sync"});
  int status = 0;
  if (waitpid(initdb, &status, 0) != initdb || status != 0)
    throw std::runtime_error("initdb failed: " + log());
  {
    std::ofstream hba(data + "/pg_hba.conf");
    hba << "host all guarded 127.0.0.1/32 scram-sha-256\nhost all all 127.0.0.1/32 trust\nlocal all all "
           "trust\n";
  }
  pid_ = spawn({bin + "/postgres", "-D", data, "-k", directory_, "-p", port_.text(), "-c",
                "listen_addresses=127.0.0.1", "-c", "fsync=off", "-c", "max_connections=20", "-c",
                "superuser_reserved_connections=1", "-c",
                "password_encryption=scram-sha-256"});  // md5 before 14
  url_ = "postgresql://postgres@127.0.0.1:" + port_.text() + "/postgres";
  wait_until_ready(data + "/postmaster.pid");
}

PostgresServer::~PostgresServer() {
  if (pid_ > 0) {
    kill(pid_, SIGINT);
    int status = 0;
    waitpid(pid_, &status, 0);
  }
  std::error_code ignored;
  if (!directory_.empty()) std::filesystem::remove_all(directory_, ignored);
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

pid_t PostgresServer::spawn(const std::vector<std::string>& command) const {
  std::vector<char*> argv;
  for (const std::string& word : command) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(nullptr);
  const std::string log_file = directory_ + "/log";
  const pid_t pid = fork();
  if (pid != 0) return pid;
  if (account_ &&
      (setgroups(0, nullptr) != 0 || setgid(account_->pw_gid) != 0 || setuid(account_->pw_uid) != 0))
    _exit(126);
#if defined(__linux__)
  prctl(PR_SET_PDEATHSIG, SIGQUIT);  // also when a test crashes
#endif
  const int out = open(log_file.c_str(), O_CREAT | O_WRONLY | O_APPEND, 0644);
  dup2(out, 1);
  dup2(out, 2);
  execv(argv[0], argv.data());
  _exit(127);
}

std::string PostgresServer::log() const {
  std::ifstream in(directory_ + "/log");
  return {std::istreambuf_iterator<char>(in), {}};
}

void PostgresServer::wait_until_ready(const std::string& pid_file) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  for (;;) {
    std::ifstream in(pid_file);
    std::string line;
    for (int n = 0; n < 8 && std::getline(in, line); ++n) {
    }
    if (line.starts_with("ready")) return;
    const bool ended = waitpid(pid_, nullptr, WNOHANG) == pid_;
    if (ended) pid_ = 0;
    if (ended || std::chrono::steady_clock::now() > end)
      throw std::runtime_error(std::string("PostgreSQL ") +
                               (ended ? "did not start: " : "was not ready within 60 s: ") + log());
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
}

}  // namespace ratesync::testing
