#include "redis_server.h"

#include <fcntl.h>
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
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

namespace ratesync::testing {

RedisServer::RedisServer(std::vector<std::string> arguments, bool tls, const std::string& config)
    : arguments_(std::move(arguments)) {
  char pattern[] = "/tmp/ratesync-redis-XXXXXX";
  if (!mkdtemp(pattern)) throw std::runtime_error("mkdtemp failed");
  directory_ = pattern;
  if (!config.empty()) {
    config_ = directory_ + "/conf";
    std::ofstream(config_) << config;
  }
  if (tls) {
    tls_port_.emplace();
    make_certificates();
  }
  start();
}

RedisServer::~RedisServer() {
  kill();
  std::error_code ignored;
  std::filesystem::remove_all(directory_, ignored);
}

void RedisServer::start() {
  std::vector<std::string> command = {
      "redis-server", "--port", port_.text(), "--unixsocket", socket(),    "--dir",
      directory_,     "--save", "",           "--bind",       "127.0.0.1", "--enable-debug-command",
      "yes"};
  if (!config_.empty()) command.insert(command.begin() + 1, config_);
  if (tls_port_)
    for (const std::string& word :
         {std::string("--tls-port"), tls_port_->text(), std::string("--tls-ca-cert-file"),
          directory_ + "/ca.pem", std::string("--tls-cert-file"), directory_ + "/server.pem",
          std::string("--tls-key-file"), directory_ + "/server.key", std::string("--tls-auth-clients"),
          std::string("optional")})
      command.push_back(word);
  command.insert(command.end(), arguments_.begin(), arguments_.end());
  pid_ = spawn(command);
  wait_until_ready();
}

void RedisServer::kill() {
  if (pid_ <= 0) return;
  ::kill(pid_, SIGKILL);
  int status = 0;
  waitpid(pid_, &status, 0);
  pid_ = 0;
  std::error_code ignored;
  std::filesystem::remove(socket(), ignored);
}

pid_t RedisServer::spawn(const std::vector<std::string>& command) const {
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

void RedisServer::run(const std::vector<std::string>& command) const {
  const pid_t pid = spawn(command);
  int status = 0;
  if (waitpid(pid, &status, 0) != pid || status != 0) throw std::runtime_error("openssl failed: " + log());
}

void RedisServer::make_certificates() const {
  const std::string at = directory_ + "/";
  run({"openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
       "-days", "2", "-keyout", at + "ca.key", "-out", at + "ca.pem", "-subj",
       "/CN=ratesync test authority"});
  { std::ofstream(at + "ext") << "subjectAltName=DNS:localhost\n"; }
  for (const std::string name : {"server", "client"}) {
    run({"openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout",
         at + name + ".key", "-out", at + name + ".csr", "-subj", "/CN=" + name});
    run({"openssl", "x509", "-req", "-in", at + name + ".csr", "-CA", at + "ca.pem", "-CAkey", at + "ca.key",
         "-CAcreateserial", "-days", "2", "-out", at + name + ".pem", "-extfile", at + "ext"});
  }
}

bool RedisServer::serves() const {
  const int fd = ::socket(AF_UNIX, SOCK_STREAM, 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  socket().copy(address.sun_path, sizeof address.sun_path - 1);
  char answer[16];
  ssize_t size = -1;
  if (::connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0 &&
      ::write(fd, "PING\r\n", 6) == 6)
    size = ::read(fd, answer, sizeof answer);
  close(fd);
  return size > 0 && !std::string_view(answer, static_cast<std::size_t>(size)).starts_with("-LOADING");
}

void RedisServer::wait_until_ready() {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (!serves()) {
    const bool ended = waitpid(pid_, nullptr, WNOHANG) == pid_;
    if (ended) pid_ = 0;
    if (ended || std::chrono::steady_clock::now() > end)
      throw std::runtime_error(std::string("redis-server ") +
                               (ended ? "did not start: " : "did not serve within 60 s: ") + log());
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

std::string RedisServer::log() const {
  std::ifstream in(directory_ + "/log");
  return {std::istreambuf_iterator<char>(in), {}};
}

}  // namespace ratesync::testing
