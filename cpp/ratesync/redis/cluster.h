// The Commander over a Redis Cluster.
//
// Each command goes to the primary that owns the slot of its key, on one multiplexed connection per node.
// What a node says it has not executed is sent again until the deadline: MOVED and ASK at once (with a
// bound), TRYAGAIN, CLUSTERDOWN and LOADING after a short, jittered pause, or as soon as a new map is known.
// The same for a node that cannot be reached, but not for long. A command that was sent and lost is in
// doubt and never sent again.
#pragma once

#include <asio/io_context.hpp>
#include <memory>
#include <vector>

#include "ratesync/base/clock.h"
#include "ratesync/redis/commander.h"
#include "ratesync/redis/connection.h"
#include "ratesync/redis/url.h"

namespace ratesync::redis {

// `options` of every connection, without target. `description` is what target() says. With
// `subscriptions` off, subscribe() does nothing and subscribed() stays false.
std::unique_ptr<Commander> make_cluster(asio::io_context& io, const Clock& clock, ConnectionOptions options,
                                        std::vector<HostPort> seeds, std::string description,
                                        bool subscriptions);

}  // namespace ratesync::redis
