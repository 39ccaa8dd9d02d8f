// A parsed PostgreSQL URL or key=value string: hosts, and everything else as libpq keywords.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "ratesync/base/status.h"

namespace ratesync::postgres {

struct HostPort {
  std::string host;      // name, address, or an absolute directory for a Unix socket
  std::string hostaddr;  // as given; usually empty
  std::string port;
};

struct ConnInfo {
  std::vector<HostPort> hosts;               // never empty
  std::string target_session_attrs = "any";  // any read-write read-only primary standby prefer-standby
  // Other libpq keywords, as given or from environment and service file; libpq's built-in defaults
  // left out. user and dbname are always there.
  std::vector<std::pair<std::string, std::string>> settings;

  [[nodiscard]] std::string setting(const std::string& keyword) const;
  // "host:port/database as user", several hosts comma-separated. Never a password.
  [[nodiscard]] std::string describe() const;
};

// Uses libpq's own parser (PQconninfoParse) and its defaults (environment, service file). Errors
// name the part that is wrong and never repeat a password. `postgres://`, `postgresql://` and
// key=value are accepted; a URL of another scheme is refused with the valid ones.
Result<ConnInfo> parse_conninfo(const std::string& url);

// The URL with its password replaced by ***; safe for logs. Also for strings that do not parse:
// in doubt it hides too much.
std::string mask_url(const std::string& url);

}  // namespace ratesync::postgres
