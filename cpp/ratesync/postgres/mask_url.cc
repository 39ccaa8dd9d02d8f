// Hides passwords in anything that might be a connection string, well-formed or not. Errs on the
// side of hiding too much; needs no parser of any store, so it works for every scheme.
#include <cctype>
#include <string_view>

#include "ratesync/postgres/conninfo.h"

namespace ratesync::postgres {
namespace {

constexpr std::string_view kMask = "***";

int hex(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

// Decodes %XX and lowers case: "%70assWord" is a password too.
std::string plain(std::string_view text) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    char c = text[i];
    if (c == '%' && i + 2 < text.size() && hex(text[i + 1]) >= 0 && hex(text[i + 2]) >= 0) {
      c = static_cast<char>(hex(text[i + 1]) * 16 + hex(text[i + 2]));
      i += 2;
    }
    out += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  }
  return out;
}

bool is_secret(std::string_view keyword) {
  const std::string name = plain(keyword);
  return name.find("pass") != std::string::npos ? name != "passfile"
                                                : name.find("secret") != std::string::npos || name == "pwd";
}

bool is_word(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '%'; }

// One past the '&' from which a well-formed "name=" follows: an & inside a raw password is not one.
std::size_t next_parameter(std::string_view query, std::size_t from) {
  for (std::size_t i = query.find('&', from); i != std::string_view::npos; i = query.find('&', i + 1)) {
    std::size_t end = i + 1;
    while (end < query.size() && is_word(query[end])) ++end;
    if (end > i + 1 && end < query.size() && query[end] == '=') return i + 1;
  }
  return query.size() + 1;
}

std::string mask_query(std::string_view query) {
  std::string out;
  for (std::size_t at = 0; at < query.size();) {
    const std::size_t next = next_parameter(query, at);
    const std::string_view one = query.substr(at, next - 1 - at);
    const std::size_t equals = one.find('=');
    if (!out.empty()) out += '&';
    if (equals != std::string_view::npos && is_secret(one.substr(0, equals)))
      out.append(one.substr(0, equals + 1)).append(kMask);
    else
      out += one;
    at = next;
  }
  return out;
}

// The @ that ends user and password. The right one is the last before the first '/'; a '/' or '?'
// in an unescaped password moves it behind, and then everything up to it is hidden.
std::size_t end_of_userinfo(std::string_view rest) {
  const std::size_t slash = rest.find('/');
  if (const std::size_t at = rest.substr(0, slash).rfind('@'); at != std::string_view::npos) return at;
  const std::size_t question = rest.find('?');
  if (const std::size_t at = rest.substr(0, question).rfind('@'); at != std::string_view::npos) return at;
  const std::size_t at = rest.rfind('@');
  if (at == std::string_view::npos) return at;
  // Only in the query: fine in "host:5432/db?user=me@tenant", not when the "port" is no number.
  const std::string_view authority = rest.substr(0, rest.find_first_of("/?"));
  const std::size_t colon = authority.find(':');
  const bool port = colon == std::string_view::npos || authority.substr(colon + 1).find_first_not_of(
                                                           "0123456789,:.[]") == std::string_view::npos;
  return port ? std::string_view::npos : at;
}

std::string mask_authority_form(std::string_view prefix, std::string_view rest) {
  std::string out(prefix);
  const std::size_t at = end_of_userinfo(rest);
  if (at != std::string_view::npos) {
    const std::size_t colon = rest.substr(0, at).find(':');
    out += rest.substr(0, colon == std::string_view::npos ? at : colon);
    if (colon != std::string_view::npos) out.append(":").append(kMask);
    rest.remove_prefix(at);
  }
  const std::size_t question = rest.find('?');
  out += rest.substr(0, question);
  if (question != std::string_view::npos) out.append("?").append(mask_query(rest.substr(question + 1)));
  return out;
}

// key = 'va\'lue with spaces' pairs. What is between two pairs and is no pair (the tail of an
// unquoted password with spaces) is hidden as well once a password was seen.
std::string mask_pairs(std::string_view text) {
  std::string out;
  std::size_t i = 0;
  bool hiding = false;
  const auto space = [&](std::size_t at) {
    return at < text.size() && std::isspace(static_cast<unsigned char>(text[at]));
  };
  while (i < text.size()) {
    const std::size_t gap = i;
    while (space(i)) ++i;
    const std::string_view blank = text.substr(gap, i - gap);
    std::size_t end = i;
    while (end < text.size() && is_word(text[end])) ++end;
    std::size_t equals = end;
    while (space(equals)) ++equals;
    if (end == i || equals >= text.size() || text[equals] != '=') {
      std::size_t stop = i;
      while (stop < text.size() && !space(stop)) ++stop;
      if (!hiding) out.append(blank).append(text.substr(i, stop - i));
      i = stop;
      continue;
    }
    hiding = is_secret(text.substr(i, end - i));
    std::size_t value = equals + 1;
    while (space(value)) ++value;
    std::size_t stop = value;
    if (value < text.size() && text[value] == '\'') {
      for (++stop; stop < text.size() && text[stop] != '\''; ++stop)
        if (text[stop] == '\\') ++stop;
      stop = std::min(stop + 1, text.size());
    } else {
      for (; stop < text.size() && !space(stop); ++stop)
        if (text[stop] == '\\') ++stop;
      stop = std::min(stop, text.size());
    }
    out.append(blank).append(text.substr(i, value - i));
    out.append(hiding ? kMask : text.substr(value, stop - value));
    i = stop;
  }
  return out;
}

}  // namespace

std::string mask_url(const std::string& url) {
  const std::string_view text = url;
  const std::size_t scheme = text.find("://");
  const std::size_t equals = text.find('=');
  if (scheme != std::string_view::npos && (equals == std::string_view::npos || scheme < equals))
    return mask_authority_form(text.substr(0, scheme + 3), text.substr(scheme + 3));
  if (equals != std::string_view::npos) return mask_pairs(text);
  return mask_authority_form({}, text);
}

}  // namespace ratesync::postgres
