// A real Redis for C++ tests: each object starts one on a free port and a Unix socket, in a directory of
// its own, and takes it down with itself. It can be killed, started again on the same port, and stopped.
#pragma once

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
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
#include <utility>
#include <vector>

namespace ratesync::testing {

class RedisServer {
 public:
  // `arguments` as on the command line: {"--requirepass", "secret"}. `config` becomes a configuration file
  // (Sentinel wants one that it can write). With `tls`, tls_port() listens too and
  // the certificates of directory() are made: ca.pem, server.pem and client.pem (+ .key) for "localhost".
  explicit RedisServer(std::vector<std::string> arguments = {}, bool tls = false,
                       const std::string& config = {})
      : arguments_(std::move(arguments)) {
    char pattern[] = "/tmp/ratesync-redis-XXXXXX";
    if (!mkdtemp(pattern)) throw std::runtime_error("mkdtemp failed");
    directory_ = pattern;
    port_ = free_port();
    if (!config.empty()) {
      config_ = directory_ + "/conf";
      std::ofstream(config_) << config;
    }
    if (tls) {
      tls_port_ = free_port();
      make_certificates();
    }
    start();
  }
  ~RedisServer() {
    kill();
    std::error_code ignored;
    std::filesystem::remove_all(directory_, ignored);
  }
  RedisServer(const RedisServer&) = delete;
  RedisServer& operator=(const RedisServer&) = delete;

  [[nodiscard]] int port() const { return port_; }
  [[nodiscard]] int tls_port() const { return tls_port_; }
  [[nodiscard]] std::string socket() const { return directory_ + "/sock"; }
  [[nodiscard]] const std::string& directory() const { return directory_; }
  [[nodiscard]] std::string url() const { return "redis://127.0.0.1:" + std::to_string(port_) + "/0"; }

  void start() {
    std::vector<std::string> command = {"redis-server", "--port",    std::to_string(port_),
                                        "--unixsocket", socket(),    "--dir",
                                        directory_,     "--save",    "",
                                        "--bind",       "127.0.0.1", "--enable-debug-command",
                                        "yes"};
    if (!config_.empty()) command.insert(command.begin() + 1, config_);
    if (tls_port_ != 0)
      for (const std::string& word :
           {std::string("--tls-port"), std::to_string(tls_port_), std::string("--tls-ca-cert-file"),
            directory_ + "/ca.pem", std::string("--tls-cert-file"), directory_ + "/server.pem",
            std::string("--tls-key-file"), directory_ + "/server.key", std::string("--tls-auth-clients"),
            std::string("optional")})
        command.push_back(word);
    command.insert(command.end(), arguments_.begin(), arguments_.end());
    pid_ = spawn(command);
    wait_until_ready();
  }
  // Nothing is saved: it starts again empty.
  void kill() {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGKILL);
    int status = 0;
    waitpid(pid_, &status, 0);
    pid_ = 0;
    std::error_code ignored;
    std::filesystem::remove(socket(), ignored);
  }
  void freeze() const { ::kill(pid_, SIGSTOP); }
  void thaw() const { ::kill(pid_, SIGCONT); }

  static int free_port() {
    const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof address;
    if (bind(fd, reinterpret_cast<sockaddr*>(&address), length) != 0)
      throw std::runtime_error("no free port");
    getsockname(fd, reinterpret_cast<sockaddr*>(&address), &length);
    close(fd);
    return ntohs(address.sin_port);
  }

 private:
  pid_t spawn(const std::vector<std::string>& command) const {
    std::vector<char*> argv;
    for (const std::string& word : command) argv.push_back(const_cast<char*>(word.c_str()));
    argv.push_back(nullptr);
    const std::string log_file = directory_ + "/log";
    const pid_t pid = fork();
    if (pid != 0) return pid;
#if defined(__linux__)
    prctl(PR_SET_PDEATHSIG, SIGKILL);  // also when a test crashes
#endif
    const int out = open(log_file.c_str(), O_CREAT | O_WRONLY | O_APPEND, 0644);
    dup2(out, 1);
    dup2(out, 2);
    execvp(argv[0], argv.data());
    _exit(127);
  }

  void run(const std::vector<std::string>& command) const {
    const pid_t pid = spawn(command);
    int status = 0;
    if (waitpid(pid, &status, 0) != pid || status != 0) throw std::runtime_error("openssl failed: " + log());
  }

  void make_certificates() const {
    const std::string at = directory_ + "/";
    run({"openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-days", "2", "-keyout", at + "ca.key", "-out", at + "ca.pem", "-subj",
         "/CN=ratesync test authority"});
    { std::ofstream(at + "ext") << "subjectAltName=DNS:localhost\n"; }
    for (const std::string name : {"server", "client"}) {
      run({"openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout",
           at + name + ".key", "-out", at + name + ".csr", "-subj", "/CN=" + name});
      run({"openssl", "x509", "-req", "-in", at + name + ".csr", "-CA", at + "ca.pem", "-CAkey",
           at + "ca.key", "-CAcreateserial", "-days", "2", "-out", at + name + ".pem", "-extfile",
           at + "ext"});
    }
  }

  // Any answer will do, also that a password is wanted.
  [[nodiscard]] bool answers() const {
    const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons(static_cast<std::uint16_t>(port_));
    char answer[16];
    const bool yes = ::connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0 &&
                     ::write(fd, "PING\r\n", 6) == 6 && ::read(fd, answer, sizeof answer) > 0;
    close(fd);
    return yes;
  }

  void wait_until_ready() const {
    for (int i = 0; i < 2'000; ++i) {
      if (answers()) return;
      if (waitpid(pid_, nullptr, WNOHANG) == pid_) break;
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    throw std::runtime_error("redis-server did not start: " + log());
  }

  [[nodiscard]] std::string log() const {
    std::ifstream in(directory_ + "/log");
    return {std::istreambuf_iterator<char>(in), {}};
  }

  const std::vector<std::string> arguments_;
  std::string directory_;
  std::string config_;
  int port_ = 0;
  int tls_port_ = 0;
  pid_t pid_ = 0;
};

}  // namespace ratesync::testing
