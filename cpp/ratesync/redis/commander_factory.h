// Makes the Commander that fits a url: one server, Sentinel or Cluster.
#pragma once

#include <asio/io_context.hpp>
#include <memory>
#include <string>

#include "ratesync/base/clock.h"
#include "ratesync/base/status.h"
#include "ratesync/redis/commander.h"

namespace ratesync::redis {

struct CommanderOptions {
  std::string url;
  int db = 0;            // the url's wins
  std::string password;  // the url's wins
  std::string client_name = "ratesync";
  // Connections that this process may open to one server: one carries all commands (they are
  // multiplexed), one more the subscription. 1: no subscription, waiters ask now and then.
  std::size_t pool_max_size = 10;
  Nanos socket_timeout = 5 * kSecond;          // of one command
  Nanos socket_connect_timeout = 5 * kSecond;  // of one connect
};

// `clock` is the engine's. Code::invalid says what is wrong with the url.
Result<std::unique_ptr<Commander>> make_commander(asio::io_context& io, const Clock& clock,
                                                  CommanderOptions options);

}  // namespace ratesync::redis
