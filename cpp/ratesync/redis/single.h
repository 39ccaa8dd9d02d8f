// The Commander over one server. Sentinel's is the same with another way to find that server.
#pragma once

#include <asio/io_context.hpp>
#include <memory>

#include "ratesync/base/clock.h"
#include "ratesync/redis/commander.h"
#include "ratesync/redis/connection.h"

namespace ratesync::redis {

// `description` is what target() says. With `subscriptions` off, subscribe() does nothing and subscribed()
// stays false.
std::unique_ptr<Commander> make_single(asio::io_context& io, const Clock& clock, ConnectionOptions options,
                                       std::string description, bool subscriptions);

}  // namespace ratesync::redis
