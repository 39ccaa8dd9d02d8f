// Text forms that PostgreSQL reads: arrays as parameters, identifiers inside statements.

#include "ratesync/base/format.h"
#include "ratesync/postgres/connection.h"

namespace ratesync::postgres {
namespace {

constexpr std::size_t kMaxIdentifier = 63;  // NAMEDATALEN - 1; longer ones are cut off silently by the server

}  // namespace

std::ptrdiff_t utf8_length(std::string_view text) {
  std::ptrdiff_t count = 0;
  for (std::size_t i = 0; i < text.size(); ++count) {
    const auto lead = static_cast<unsigned char>(text[i]);
    const std::size_t size = lead < 0x80                   ? 1
                             : lead >= 0xC2 && lead < 0xE0 ? 2
                             : (lead & 0xF0) == 0xE0       ? 3
                             : lead >= 0xF0 && lead < 0xF5 ? 4
                                                           : 0;
    if (lead == 0 || size == 0 || i + size > text.size()) return -1;
    for (std::size_t j = 1; j < size; ++j)
      if ((static_cast<unsigned char>(text[i + j]) & 0xC0) != 0x80) return -1;
    if (size > 2) {  // overlong forms, surrogates, beyond U+10FFFF
      const auto second = static_cast<unsigned char>(text[i + 1]);
      if ((lead == 0xE0 && second < 0xA0) || (lead == 0xED && second > 0x9F) ||
          (lead == 0xF0 && second < 0x90) || (lead == 0xF4 && second > 0x8F))
        return -1;
    }
    i += size;
  }
  return count;
}

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
  return formatted("{{{}}}", fmt::join(values, ","));
}

std::string quote_identifier(std::string_view name) {
  std::string out = "\"";
  for (const char c : name) out.append(c == '"' ? 2 : 1, c);
  return out += '"';
}

Status check_identifier(std::string_view option, std::string_view name) {
  const auto bad = [option](std::string_view what) {
    return Status::make(Code::invalid, formatted("{} {}", option, what));
  };
  if (name.empty()) return bad("must not be empty");
  if (name.find('\0') != std::string_view::npos) return bad("must not contain a NUL character");
  if (name.size() > kMaxIdentifier)
    return bad(
        formatted("is {} bytes long; PostgreSQL's names have at most {} bytes", name.size(), kMaxIdentifier));
  return Status::success();
}

}  // namespace ratesync::postgres
