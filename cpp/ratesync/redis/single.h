// The Commander over one server. Sentinel's is the same with another way to find that server.
#pragma once

#include <asio/io_context.hpp>
#include <memory>

#include "ratesync/base/clock.h"
#include "ratesync/redis/commander.h"
#include "ratesync/redis/connection.h"

namespace ratesync::redis {

class SingleCommander : public Commander {
 public:
  // From now on another server is the one: leaves the present one at once.
  virtual void retarget(net::StreamTarget target) = 0;
};

// `description` is what target() says. With `subscriptions` off, subscribe() does nothing and subscribed()
// stays false.
std::unique_ptr<SingleCommander> make_single(asio::io_context& io, const Clock& clock,
                                             ConnectionOptions options, std::string description,
                                             bool subscriptions);

}  // namespace ratesync::redis
