// Text forms that PostgreSQL reads: arrays as parameters, identifiers inside statements.
#include <fmt/format.h>

#include "ratesync/postgres/connection.h"

namespace ratesync::postgres {
namespace {

constexpr std::size_t kMaxIdentifier = 63;  // NAMEDATALEN - 1; longer ones are cut off silently by the server

}  // namespace

std::string array_of_text(const std::vector<std::string_view>& values) {
  std::size_t size = 2;
  for (const std::string_view v : values) size += v.size() + 3;
  std::string out;
  out.reserve(size);
  out += '{';
  for (const std::string_view v : values) {
    if (out.size() > 1) out += ',';
    out += '"';
    for (const char c : v) {
      if (c == '"' || c == '\\') out += '\\';
      out += c;
    }
    out += '"';
  }
  return out += '}';
}

std::string array_of_int(const std::vector<std::int64_t>& values) {
  return fmt::format("{{{}}}", fmt::join(values, ","));
}

std::string quote_identifier(std::string_view name) {
  std::string out = "\"";
  for (const char c : name) out.append(c == '"' ? 2 : 1, c);
  return out += '"';
}

Status check_identifier(std::string_view option, std::string_view name) {
  const auto bad = [option](std::string_view what) {
    return Status::make(Code::invalid, fmt::format("{} {}", option, what));
  };
  if (name.empty()) return bad("must not be empty");
  if (name.find('\0') != std::string_view::npos) return bad("must not contain a NUL character");
  if (name.size() > kMaxIdentifier)
    return bad(fmt::format("is {} bytes long; PostgreSQL's names have at most {} bytes", name.size(),
                           kMaxIdentifier));
  return Status::success();
}

}  // namespace ratesync::postgres
