// The url of a Redis store, taken apart.
//
//     redis://[user[:password]@]host[:port][/db]              one server; rediss:// with TLS
//     unix:///path/to.sock?db=0                               also redis+unix://
//     redis+sentinel://[user:password@]h1:26379,h2/name[/db]  rediss+sentinel:// with TLS
//     redis+cluster://[user:password@]h1:7000,h2:7001         rediss+cluster:// with TLS
//
// Everything between the separators may be percent-encoded; IPv6 addresses stand in brackets. No message
// shows a password.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "ratesync/base/status.h"
#include "ratesync/net/stream.h"

namespace ratesync::redis {

enum class Topology { single, sentinel, cluster };

struct HostPort {
  std::string host;
  std::uint16_t port = 0;
  bool operator==(const HostPort&) const = default;
};

struct RedisUrl {
  Topology topology = Topology::single;
  std::vector<HostPort> hosts;  // one for a single server; empty with a path
  std::string path;             // Unix socket
  std::string user;             // empty: the default user
  std::string password;
  int db = 0;
  std::string primary_name;       // Sentinel: what it calls the group
  std::string sentinel_user;      // of the Sentinels themselves
  std::string sentinel_password;  // empty: they want none
  net::TlsOptions tls;            // Sentinel, Cluster: of every connection

  // For messages: scheme, hosts, db; user, but no password.
  [[nodiscard]] std::string describe() const;
  [[nodiscard]] net::StreamTarget target(const HostPort& host) const;
  [[nodiscard]] net::StreamTarget target() const;  // of a single server
};

// `db` and `password` are the store's options of these names; what the url says wins over them.
Result<RedisUrl> parse_url(std::string_view url, int db = 0, std::string_view password = {});

}  // namespace ratesync::redis
