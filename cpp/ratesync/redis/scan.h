// SCAN from cursor 0 to its end on one server.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "ratesync/base/clock.h"
#include "ratesync/base/status.h"
#include "ratesync/redis/node.h"

namespace ratesync::redis {

// Up to `limit` keys that match, each once. Errors of the server become a Status.
void scan_node(const std::shared_ptr<Node>& node, std::string pattern, std::size_t limit, Nanos deadline,
               std::function<void(Result<std::vector<std::string>>)> done);

}  // namespace ratesync::redis
