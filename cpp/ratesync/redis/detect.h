// The Commander of a plain redis:// url: one server, or, when that server says that it is a node of a
// cluster, the Cluster.
#pragma once

#include <functional>
#include <memory>

#include "ratesync/redis/commander.h"
#include "ratesync/redis/connection.h"

namespace ratesync::redis {

// `single` talks to the server; `make_cluster` is called once, if it turns out to be a cluster's. `probe` is
// a connection that asks which, and may end at a replica: the node named may have lost its role since.
std::unique_ptr<Commander> make_detecting(std::unique_ptr<Commander> single,
                                          std::shared_ptr<Connection> probe,
                                          std::function<std::unique_ptr<Commander>()> make_cluster);

}  // namespace ratesync::redis
