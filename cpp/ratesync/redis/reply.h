// A decoded RESP2 value.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace ratesync::redis {

struct Reply {
  enum class Kind { nil, integer, text, status, error, array };
  Kind kind = Kind::nil;
  std::int64_t integer = 0;
  std::string text;  // of text, status and error
  std::vector<Reply> items;
};

}  // namespace ratesync::redis
