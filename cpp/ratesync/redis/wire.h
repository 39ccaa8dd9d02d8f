// Commands to bytes: RESP arrays of bulk strings, straight into the buffer that will be written.
// (hiredis' formatter allocates a buffer per command, which would then be copied.)
#pragma once

#include <charconv>
#include <cstddef>
#include <initializer_list>
#include <string>
#include <string_view>

#include "ratesync/redis/commander.h"

namespace ratesync::redis {

inline void append_header(std::string& out, char type, std::size_t value) {
  char text[24];
  text[0] = type;
  char* end = std::to_chars(text + 1, text + 22, value).ptr;
  *end++ = '\r';
  *end++ = '\n';
  out.append(text, static_cast<std::size_t>(end - text));
}

inline void append_argument(std::string& out, std::string_view argument) {
  append_header(out, '$', argument.size());
  out.append(argument).append("\r\n", 2);
}

inline void append_command(std::string& out, std::initializer_list<std::string_view> head,
                           const Command& rest) {
  append_header(out, '*', head.size() + rest.size());
  for (const std::string_view argument : head) append_argument(out, argument);
  for (std::size_t i = 0; i < rest.size(); ++i) append_argument(out, rest[i]);
}

}  // namespace ratesync::redis
