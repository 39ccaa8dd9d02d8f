// SCAN from cursor 0 to its end on one server.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "ratesync/base/clock.h"
#include "ratesync/base/status.h"
#include "ratesync/redis/commander.h"
#include "ratesync/redis/node.h"

namespace ratesync::redis {

// Commander::walk on one server; whether `each` wants more. Errors of the server become a Status.
void walk_node(const std::shared_ptr<Node>& node, std::string pattern, KeySink each, Nanos deadline,
               std::function<void(Result<bool>)> done);

}  // namespace ratesync::redis
