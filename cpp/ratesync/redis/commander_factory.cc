#include "ratesync/redis/commander_factory.h"

#include <utility>

#include "ratesync/redis/connection.h"
#include "ratesync/redis/single.h"
#include "ratesync/redis/url.h"

namespace ratesync::redis {
namespace {

ConnectionOptions connection_options(const RedisUrl& url, const CommanderOptions& options) {
  ConnectionOptions out;
  out.user = url.user;
  out.password = url.password;
  out.db = url.db;
  out.client_name = options.client_name;
  out.connect_timeout = options.socket_connect_timeout;
  out.command_timeout = options.socket_timeout;
  out.primary_only = true;
  return out;
}

}  // namespace

Result<std::unique_ptr<Commander>> make_commander(asio::io_context& io, const Clock& clock,
                                                  CommanderOptions options) {
  Result<RedisUrl> parsed = parse_url(options.url, options.db, options.password);
  if (!parsed.ok()) return parsed.status();
  const RedisUrl& url = parsed.value();
  ConnectionOptions connection = connection_options(url, options);
  const bool subscriptions = options.pool_max_size > 1;
  switch (url.topology) {
    case Topology::single:
      connection.target = url.target();
      return make_single(io, clock, std::move(connection), url.describe(), subscriptions);
    case Topology::sentinel:
    case Topology::cluster: break;
  }
  return Status::make(Code::invalid,
                      "this build serves single Redis servers only: use redis:// or rediss://");
}

}  // namespace ratesync::redis
