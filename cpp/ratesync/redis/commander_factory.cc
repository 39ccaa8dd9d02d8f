#include "ratesync/redis/commander_factory.h"

#include <utility>

#include "ratesync/redis/cluster.h"
#include "ratesync/redis/connection.h"
#include "ratesync/redis/detect.h"
#include "ratesync/redis/sentinel.h"
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
  // A cluster's node may lose its role at any time and says itself who has it now.
  const auto cluster = [&io, &clock, connection, url, subscriptions] {
    ConnectionOptions each = connection;
    each.primary_only = false;
    each.target.tls = url.tls;
    return make_cluster(io, clock, std::move(each), url.hosts, url.describe(), subscriptions);
  };
  switch (url.topology) {
    case Topology::single: {
      connection.target = url.target();
      std::unique_ptr<Commander> single = make_single(io, clock, connection, url.describe(), subscriptions);
      if (!url.path.empty() || url.db != 0) return single;  // no cluster has either
      connection.primary_only = false;
      return make_detecting(std::move(single), Connection::create(io, clock, std::move(connection)), cluster);
    }
    case Topology::sentinel: return make_sentinel(io, clock, std::move(connection), url, subscriptions);
    case Topology::cluster: return cluster();
  }
  return Status::make(Code::internal, "unknown kind of Redis url");
}

}  // namespace ratesync::redis
