// A free port of 127.0.0.1 that nobody else gets, also while its server is down.
//
// A socket is bound to it that never listens. Linux gives such a port to nobody who asks for a free one and
// to no outgoing connection; a server that sets SO_REUSEADDR, as all do, may listen on it all the same.
// Elsewhere the port was free at the moment of choice, and no more.
#pragma once

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <stdexcept>
#include <string>

namespace ratesync::testing {

class HeldPort {
 public:
  HeldPort() : fd_(::socket(AF_INET, SOCK_STREAM, 0)) {
    fcntl(fd_, F_SETFD, FD_CLOEXEC);
    const int yes = 1;
    setsockopt(fd_, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof address;
    if (bind(fd_, reinterpret_cast<sockaddr*>(&address), length) != 0) {
      close(fd_);
      throw std::runtime_error("no free port");
    }
    getsockname(fd_, reinterpret_cast<sockaddr*>(&address), &length);
    number_ = ntohs(address.sin_port);
#if !defined(__linux__)
    close(fd_);
    fd_ = -1;
#endif
  }
  ~HeldPort() {
    if (fd_ >= 0) close(fd_);
  }
  HeldPort(const HeldPort&) = delete;
  HeldPort& operator=(const HeldPort&) = delete;

  [[nodiscard]] int number() const { return number_; }
  [[nodiscard]] std::string text() const { return std::to_string(number_); }

 private:
  int fd_;
  int number_ = 0;
};

}  // namespace ratesync::testing
