// What INFO says, field by field.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace ratesync::redis {

// The value of a field of INFO; empty: not there.
std::string_view info_field(std::string_view info, std::string_view field);

struct ServerInfo {
  static ServerInfo parse(std::string_view info);
  std::string product;  // Redis or Valkey
  std::string version;
  int major = 0;  // of the Redis that it is compatible with; 0: does not say
  int minor = 0;
};

}  // namespace ratesync::redis
