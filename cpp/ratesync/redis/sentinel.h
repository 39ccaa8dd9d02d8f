// The Commander over the primary that a group of Sentinels names.
//
// They are asked before every connect, in turn: one that does not answer within 200 ms gets company by
// the next. What they name must say ROLE master. Sentinels also announce a failover (+switch-master); then
// the old primary is left at once, also when it hangs. I/O thread only.
#pragma once

#include <asio/io_context.hpp>
#include <memory>

#include "ratesync/base/clock.h"
#include "ratesync/redis/commander.h"
#include "ratesync/redis/connection.h"
#include "ratesync/redis/url.h"

namespace ratesync::redis {

// `options` of the connections to the primary, without target and locate. `subscriptions` as in single.h.
std::unique_ptr<Commander> make_sentinel(asio::io_context& io, const Clock& clock, ConnectionOptions options,
                                         const RedisUrl& url, bool subscriptions);

}  // namespace ratesync::redis
