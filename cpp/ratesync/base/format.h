#pragma once

#include <fmt/format.h>

#include <string>

namespace ratesync {

std::string format_args(fmt::string_view format, fmt::format_args args);

// fmt::format, whose printers are compiled once in format.cc: each file that calls fmt's own takes two
// and a half seconds longer to compile. The format string is checked while compiling, as with fmt.
template <class... T>
std::string formatted(fmt::format_string<T...> format, T&&... args) {
  return format_args(format, fmt::make_format_args(args...));
}

}  // namespace ratesync
