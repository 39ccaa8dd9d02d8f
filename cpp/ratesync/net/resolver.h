// Host names to addresses without blocking the loop: getaddrinfo runs on Asio's resolver thread.
//
// libpq would call getaddrinfo on the calling thread, for seconds when DNS is down; so names are
// resolved here and libpq gets numeric addresses only. One lookup at a time per Resolver.
#pragma once

#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <functional>
#include <string>
#include <vector>

#include "ratesync/base/status.h"

namespace ratesync::net {

class Resolver {
 public:
  // Addresses in the system's order of preference, without duplicates, never empty when ok.
  using Done = std::function<void(Result<std::vector<std::string>>)>;

  explicit Resolver(asio::io_context& io) : resolver_(io) {}

  // `done` runs on the loop, never inside this call; not at all after cancel() or destruction. A
  // numeric address is its own answer, without a lookup. A running getaddrinfo cannot be
  // interrupted: cancel() only lets go of its answer.
  void resolve(const std::string& host, Done done);
  void cancel();

 private:
  asio::ip::tcp::resolver resolver_;
  std::shared_ptr<bool> alive_;
};

bool is_numeric_address(const std::string& host);

}  // namespace ratesync::net
