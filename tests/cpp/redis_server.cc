#include "redis_server.h"

#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace ratesync::testing {

RedisServer::RedisServer(std::vector<std::string> arguments, bool tls, const std::string& config)
    : arguments_(std::move(arguments)) {
  if (!config.empty()) {
    config_ = directory() + "/conf";
    std::ofstream(config_) << config;
  }
  if (tls) {
    tls_port_.emplace();
    make_certificates();
  }
  start();
}

RedisServer::~RedisServer() { kill(); }

void RedisServer::start() {
  std::vector<std::string> command = {
      "redis-server", "--port", port_.text(), "--unixsocket", socket(),    "--dir",
      directory(),    "--save", "",           "--bind",       "127.0.0.1", "--enable-debug-command",
      "yes"};
  if (!config_.empty()) command.insert(command.begin() + 1, config_);
  if (tls_port_)
    for (const std::string& word :
         {std::string("--tls-port"), tls_port_->text(), std::string("--tls-ca-cert-file"),
          directory() + "/ca.pem", std::string("--tls-cert-file"), directory() + "/server.pem",
          std::string("--tls-key-file"), directory() + "/server.key", std::string("--tls-auth-clients"),
          std::string("optional")})
      command.push_back(word);
  command.insert(command.end(), arguments_.begin(), arguments_.end());
  pid_ = home_.spawn(command, SIGKILL);
  home_.wait_until([this] { return serves(); }, "redis-server", pid_);
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

void RedisServer::run(const std::vector<std::string>& command) const {
  const pid_t pid = home_.spawn(command, SIGKILL);
  int status = 0;
  if (waitpid(pid, &status, 0) != pid || status != 0)
    throw std::runtime_error("openssl failed: " + home_.log());
}

void RedisServer::make_certificates() const {
  const std::string at = directory() + "/";
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

}  // namespace ratesync::testing
