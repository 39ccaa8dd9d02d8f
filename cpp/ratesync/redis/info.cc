#include "ratesync/redis/info.h"

#include <charconv>

namespace ratesync::redis {

std::string_view info_field(std::string_view info, std::string_view field) {
  while (!info.empty()) {
    const std::size_t end = info.find('\n');
    std::string_view line = info.substr(0, end);
    info = end == std::string_view::npos ? std::string_view() : info.substr(end + 1);
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
    if (line.size() > field.size() && line.starts_with(field) && line[field.size()] == ':')
      return line.substr(field.size() + 1);
  }
  return {};
}

ServerInfo ServerInfo::parse(std::string_view info) {
  ServerInfo out;
  const std::string_view valkey = info_field(info, "valkey_version");
  const std::string_view redis = info_field(info, "redis_version");
  out.product = valkey.empty() ? "Redis" : "Valkey";
  out.version = valkey.empty() ? redis : valkey;
  const char* const end = redis.data() + redis.size();
  const auto [after, error] = std::from_chars(redis.data(), end, out.major);
  if (error == std::errc() && after != end && *after == '.') std::from_chars(after + 1, end, out.minor);
  return out;
}

}  // namespace ratesync::redis
