// What libpq's parser says about a bad URL quotes the URL, password and all. So none of its words
// are passed on: we find out ourselves which part is wrong, and name that.
#include "ratesync/postgres/conninfo.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <string_view>

#include "ratesync/base/format.h"
#include "ratesync/postgres/libpq.h"

namespace ratesync::postgres {
namespace {

using Settings = std::vector<std::pair<std::string, std::string>>;

Status bad(std::string message) {
  return Status::make(Code::invalid, "PostgreSQL url: " + std::move(message));
}

constexpr const char* kEscapeHint =
    "special characters in user and password must be percent-encoded (@ as %40, / as %2F, : as %3A, % as "
    "%25)";

struct Choice {
  const char* keyword;
  std::vector<std::string_view> values;
};

const std::vector<Choice>& choices() {
  static const std::vector<Choice> all{
      {"sslmode", {"disable", "allow", "prefer", "require", "verify-ca", "verify-full"}},
      {"target_session_attrs", {"any", "read-write", "read-only", "primary", "standby", "prefer-standby"}},
      {"gssencmode", {"disable", "prefer", "require"}},
      {"channel_binding", {"disable", "prefer", "require"}},
      {"load_balance_hosts", {"disable", "random"}},
  };
  return all;
}

std::size_t scheme_end(std::string_view url) {
  const auto at = url.find("://");
  if (at == std::string_view::npos || at == 0) return std::string_view::npos;
  const bool word = std::all_of(
      url.begin(), url.begin() + static_cast<std::ptrdiff_t>(at),
      [](unsigned char c) { return std::isalnum(c) || c == '+' || c == '-' || c == '.' || c == '_'; });
  return word ? at + 3 : std::string_view::npos;
}

bool is_postgres_scheme(std::string_view url) {
  return url.starts_with("postgres://") || url.starts_with("postgresql://");
}

std::size_t distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t above = row[j];
      row[j] = std::min({above + 1, row[j - 1] + 1, diagonal + (a[i - 1] != b[j - 1])});
      diagonal = above;
    }
  }
  return row[b.size()];
}

std::vector<std::string> keywords() {
  std::vector<std::string> out;
  const OptionsPtr all(PQconndefaults());
  for (const PQconninfoOption* o = all.get(); o && o->keyword; ++o)
    if (o->dispchar[0] != 'D') out.emplace_back(o->keyword);
  return out;
}

// The name behind libpq's `invalid ... "name"`. It may be a piece of an unquoted password, so it is
// only repeated when it is nearly a keyword, or when there is no password that it could come from.
Status unknown_option(std::string_view text, std::string_view url) {
  const auto from = text.find('"');
  const auto to = text.rfind('"');
  const std::string name(from < to ? text.substr(from + 1, to - from - 1) : std::string_view());
  const std::vector<std::string> known = keywords();
  std::string nearest;
  for (const std::string& k : known)
    if (nearest.empty() || distance(name, k) < distance(name, nearest)) nearest = k;
  const std::string valid = formatted("valid ones: {}", fmt::join(known, ", "));
  if (name.size() > 3 && distance(name, nearest) <= 2)
    return bad(formatted("unknown option \"{}\", did you mean \"{}\"? {}", name, nearest, valid));
  const bool harmless = url.find("pass") == std::string_view::npos &&
                        url.find('@') == std::string_view::npos && url.find('%') == std::string_view::npos;
  if (harmless) return bad(formatted("unknown option \"{}\"; {}", name, valid));
  return bad(
      "an option that libpq does not know (not repeated here, it may be part of a password: quote a password "
      "that "
      "contains spaces); " +
      valid);
}

Status explain_parse_failure(const std::string& url, const std::string& said) {
  if (said.find("invalid connection option") != std::string::npos ||
      said.find("invalid URI query parameter") != std::string::npos)
    return unknown_option(said, url);
  if (!is_postgres_scheme(url)) {
    if (said.find("unterminated quoted string") != std::string::npos)
      return bad("a quoted value has no closing '");
    return bad(
        "expected key=value pairs (a value that contains spaces needs single quotes) or postgresql://...");
  }
  if (said.find("percent-encod") != std::string::npos || said.find("%00") != std::string::npos)
    return bad(formatted("bad percent-encoding; {}", kEscapeHint));
  if (said.find("IPv6") != std::string::npos) return bad("an IPv6 address must be written as [address]:port");
  if (said.find("query parameter") != std::string::npos)
    return bad(formatted("after the ? come name=value pairs joined by &; {}", kEscapeHint));
  return bad(
      formatted("malformed near host or port (expected postgresql://user:password@host:port/database); {}",
                kEscapeHint));
}

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> out(1);
  for (const char c : list)
    if (c == ',')
      out.emplace_back();
    else
      out.back() += c;
  return out;
}

Status check_port(const std::string& port) {
  int number = 0;
  const auto [end, ec] = std::from_chars(port.data(), port.data() + port.size(), number);
  // Not repeated unless it is a number: with a stray / in a password, "port" is the password.
  const bool digits = std::all_of(port.begin(), port.end(), [](unsigned char c) { return std::isdigit(c); });
  if (!digits || port.empty()) return bad(formatted("the port is not a number; {}", kEscapeHint));
  if (ec != std::errc() || number < 1 || number > 65'535)
    return bad("the port is out of range, it must be 1 to 65535");
  return Status::success();
}

// libpq's rules: as many entries as hosts, or one port for all.
Status match_hosts(const std::string& host, const std::string& hostaddr, const std::string& port,
                   const std::string& default_port, std::vector<HostPort>& out) {
  const std::vector<std::string> hosts = split(host), addresses = split(hostaddr), ports = split(port);
  const std::size_t n = hostaddr.empty() ? hosts.size() : addresses.size();
  if (!host.empty() && !hostaddr.empty() && hosts.size() != addresses.size())
    return bad(formatted("{} host names do not match {} hostaddr values", hosts.size(), addresses.size()));
  if (ports.size() != 1 && ports.size() != n)
    return bad(formatted("{} ports do not match {} hosts", ports.size(), n));
  for (std::size_t i = 0; i < n; ++i) {
    HostPort h;
    if (!host.empty()) h.host = hosts[i];
    if (!hostaddr.empty()) h.hostaddr = addresses[i];
    h.port = ports.size() == 1 ? ports[0] : ports[i];
    if (h.port.empty()) h.port = default_port;
    if (Status s = check_port(h.port); !s.ok()) return s;
    if (h.host.find('@', 1) != std::string::npos ||
        std::any_of(h.host.begin(), h.host.end(),
                    [](unsigned char c) { return std::isspace(c) && c != ' '; }))
      return bad(formatted("the host contains a character that no host has; {}", kEscapeHint));
    out.push_back(std::move(h));
  }
  return Status::success();
}

// "u:pa/ss@h/db" parses: host u, port pa, database "ss@h/db".
Status check_authority(const std::string& url) {
  if (!is_postgres_scheme(url)) return Status::success();
  const std::string_view rest = std::string_view(url).substr(scheme_end(url));
  const std::string_view authority = rest.substr(0, rest.find('/'));
  const std::string_view path = rest.substr(authority.size());
  const auto ats = std::count(authority.begin(), authority.end(), '@');
  if (ats > 1 || path.substr(0, path.find('?')).find('@') != std::string_view::npos)
    return bad(formatted("an @ in an unexpected place; {}", kEscapeHint));
  return Status::success();
}

Status check_scheme(const std::string& url) {
  if (url.find_first_not_of(" \t\r\n") == std::string::npos)
    return bad("empty; expected postgresql://user:password@host:port/database");
  if (url.find('\0') != std::string::npos) return bad("contains a NUL character");
  const std::size_t end = scheme_end(url);
  if (end != std::string::npos && !is_postgres_scheme(url)) {
    const std::string scheme = url.substr(0, end - 3);
    const bool driver = scheme.starts_with("postgres") && scheme.find('+') != std::string::npos;
    return bad(formatted("unknown scheme \"{}\"; valid ones: postgresql://, postgres://{}", scheme,
                         driver ? " (without the driver's name behind the +)" : ""));
  }
  if (end == std::string::npos && url.find('=') == std::string::npos)
    return bad("neither postgresql://user:password@host:port/database nor key=value pairs");
  return Status::success();
}

}  // namespace

std::string ConnInfo::setting(const std::string& keyword) const {
  for (const auto& [key, value] : settings)
    if (key == keyword) return value;
  return {};
}

std::string ConnInfo::describe() const {
  std::string out;
  for (const HostPort& h : hosts) {
    const std::string& name = h.host.empty() ? h.hostaddr : h.host;
    const bool v6 = name.find(':') != std::string::npos;
    if (!out.empty()) out += ',';
    out += formatted("{}{}{}:{}", v6 ? "[" : "", name.empty() ? "local socket" : name, v6 ? "]" : "", h.port);
  }
  return formatted("{}/{} as {}", out, setting("dbname"), setting("user"));
}

Result<ConnInfo> parse_conninfo(const std::string& url) {
  if (Status s = check_scheme(url); !s.ok()) return s;
  if (Status s = check_authority(url); !s.ok()) return s;
  char* error_text = nullptr;
  const OptionsPtr given(PQconninfoParse(url.c_str(), &error_text));
  const TextPtr error(error_text);
  if (!given) return explain_parse_failure(url, error ? error.get() : "out of memory");
  const OptionsPtr defaults(PQconndefaults());
  if (!defaults) return Status::make(Code::unavailable, "libpq: out of memory");

  ConnInfo info;
  Settings all;
  std::string default_port = "5432";
  // Both lists hold all keywords, in the same order.
  const PQconninfoOption* d = defaults.get();
  for (const PQconninfoOption* o = given.get(); o->keyword; ++o, ++d) {
    const std::string keyword = o->keyword;
    const std::string built_in = d->compiled ? d->compiled : "";
    const std::string fallback = d->val ? d->val : "";
    const std::string value = o->val && *o->val ? o->val : fallback;
    if (keyword == "port") default_port = built_in.empty() ? default_port : built_in;
    const bool always = keyword == "user" || keyword == "dbname" || keyword == "port";
    if (!value.empty() && (always || value != built_in || (o->val && *o->val)))
      all.emplace_back(keyword, value);
  }
  const auto take = [&all](const char* keyword) {
    std::string value;
    std::erase_if(all, [&](auto& s) { return s.first == keyword ? (value = s.second, true) : false; });
    return value;
  };

  for (const Choice& choice : choices())
    for (const auto& [keyword, value] : all)
      if (keyword == choice.keyword &&
          std::find(choice.values.begin(), choice.values.end(), value) == choice.values.end())
        return bad(formatted("{} must be one of {}", keyword, fmt::join(choice.values, ", ")));
  for (const auto& [keyword, value] : all) {
    if (keyword == "connect_timeout" &&
        (value.size() > 9 ||
         !std::all_of(value.begin(), value.end(), [](unsigned char c) { return std::isdigit(c); })))
      return bad("connect_timeout must be a whole number of seconds");
    if (keyword == "service" && given)
      for (const PQconninfoOption* o = given.get(); o->keyword; ++o)
        if (std::string_view(o->keyword) == "service" && o->val)
          return bad("service= is read from the environment only: set PGSERVICE instead");
    std::string lower = value;
    std::transform(lower.begin(), lower.end(), lower.begin(),
                   [](unsigned char c) { return std::tolower(c); });
    if (keyword == "client_encoding" && lower != "utf8" && lower != "utf-8" && lower != "auto" &&
        lower != "unicode")
      return bad("client_encoding must be UTF8");
  }

  const std::string host = take("host"), hostaddr = take("hostaddr"), port = take("port");
  (void)take("client_encoding");
  if (const std::string attrs = take("target_session_attrs"); !attrs.empty())
    info.target_session_attrs = attrs;
  if (Status s = match_hosts(host, hostaddr, port.empty() ? default_port : port, default_port, info.hosts);
      !s.ok())
    return s;
  info.settings = std::move(all);
  if (info.setting("user").empty()) return bad("no user given, and the system does not say who you are");
  if (info.setting("dbname").empty()) info.settings.emplace_back("dbname", info.setting("user"));
  return info;
}

}  // namespace ratesync::postgres
