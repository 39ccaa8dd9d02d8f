// Messages name parts of the url, never its text: a password with a raw '/', '?' or '@' may be anywhere.
#include "ratesync/redis/url.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <limits>
#include <map>
#include <optional>
#include <utility>

#include "ratesync/base/format.h"
#include "ratesync/net/resolver.h"

namespace ratesync::redis {
namespace {

constexpr std::size_t kMaxLength = 16'384;
constexpr std::string_view kEscape =
    "A '/', '?', '#', '@', ':' or ',' in a user name or password must be percent-encoded (%2F, %3F, %23, "
    "%40, "
    "%3A, %2C).";

Status invalid(std::string text) { return Status::make(Code::invalid, "Redis url: " + std::move(text)); }

struct Scheme {
  std::string_view name;
  Topology topology;
  bool tls;
  bool path;  // of a Unix socket
};

constexpr std::array kSchemes = {
    Scheme{"redis", Topology::single, false, false},
    Scheme{"rediss", Topology::single, true, false},
    Scheme{"unix", Topology::single, false, true},
    Scheme{"redis+unix", Topology::single, false, true},
    Scheme{"redis+sentinel", Topology::sentinel, false, false},
    Scheme{"rediss+sentinel", Topology::sentinel, true, false},
    Scheme{"redis+cluster", Topology::cluster, false, false},
    Scheme{"rediss+cluster", Topology::cluster, true, false},
};

int hex(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

std::optional<std::string> decode(std::string_view text) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '%') {
      out += text[i];
      continue;
    }
    if (i + 2 >= text.size() || hex(text[i + 1]) < 0 || hex(text[i + 2]) < 0) return std::nullopt;
    out += static_cast<char>(hex(text[i + 1]) * 16 + hex(text[i + 2]));
    i += 2;
  }
  return out;
}

template <class Number>
bool number(std::string_view text, Number& into) {
  const auto [end, ec] = std::from_chars(text.data(), text.data() + text.size(), into);
  return ec == std::errc() && end == text.data() + text.size();
}

bool is_host_name(std::string_view name) {
  return !name.empty() && name.size() <= 253 && std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' ||
           c == '-' || c == '_';
  });
}

class Parser {
 public:
  Parser(std::string_view url, int db, std::string_view password)
      : rest_(url), db_(db), password_(password) {}

  Result<RedisUrl> run() {
    for (const auto step : {&Parser::scheme, &Parser::query, &Parser::authority, &Parser::path,
                            &Parser::options, &Parser::database}) {
      if (Status status = (this->*step)(); !status.ok()) return status;
    }
    return std::move(url_);
  }

 private:
  Status scheme();
  Status query();
  Status authority();
  Status hosts(std::string_view list);
  Result<HostPort> host(std::string_view text) const;
  Status path();
  Status options();
  Status tls_options();
  Status database();
  Status set_db(std::string_view text);
  // The value of a query option, taken out.
  std::optional<std::string> take(const std::string& key);

  std::string_view rest_;
  const int db_;
  const std::string_view password_;
  const Scheme* scheme_ = nullptr;
  std::map<std::string, std::string> query_;
  std::optional<int> path_db_;
  std::optional<std::string> url_password_;
  bool query_password_ = false;
  RedisUrl url_;
};

Status Parser::scheme() {
  if (rest_.size() > kMaxLength) return invalid(formatted("longer than {} bytes", kMaxLength));
  if (std::any_of(rest_.begin(), rest_.end(), [](char c) { return c == 0x7f || (c >= 0 && c <= ' '); }))
    return invalid("blanks and control characters must be percent-encoded");
  const std::size_t end = rest_.find("://");
  if (end != std::string_view::npos) {
    std::string name(rest_.substr(0, end));
    std::transform(name.begin(), name.end(), name.begin(),
                   [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    for (const Scheme& one : kSchemes)
      if (one.name == name) scheme_ = &one;
  }
  if (!scheme_)
    return invalid(
        "it must begin with redis://, rediss:// (TLS), unix://, redis+sentinel:// or redis+cluster://, for "
        "example redis://localhost:6379/0");
  rest_.remove_prefix(end + 3);
  url_.topology = scheme_->topology;
  url_.tls.on = scheme_->tls;
  if (rest_.find('#') != std::string_view::npos) return invalid("it holds a '#'. " + std::string(kEscape));
  return Status::success();
}

Status Parser::query() {
  const std::size_t question = rest_.find('?');
  if (question == std::string_view::npos) return Status::success();
  std::string_view text = rest_.substr(question + 1);
  rest_ = rest_.substr(0, question);
  while (!text.empty()) {
    const std::string_view one = text.substr(0, text.find('&'));
    text.remove_prefix(std::min(text.size(), one.size() + 1));
    if (one.empty()) continue;
    const std::size_t equals = one.find('=');
    if (equals == std::string_view::npos)
      return invalid("an option after '?' has no value (name=value&name=value). " + std::string(kEscape));
    std::optional<std::string> key = decode(one.substr(0, equals)), value = decode(one.substr(equals + 1));
    query_password_ |= key && key->find("password") != std::string::npos;
    if (!key || !value) return invalid("a '%' after '?' is not followed by two hex digits: write %25");
    if (!query_.emplace(*key, std::move(*value)).second) return invalid("an option after '?' is given twice");
  }
  return Status::success();
}

Status Parser::authority() {
  const std::size_t slash = std::min(rest_.find('/'), rest_.size());
  std::string_view text = rest_.substr(0, slash);
  rest_.remove_prefix(slash);
  if (rest_.find('@') != std::string_view::npos && !scheme_->path)
    return invalid("there is an '@' behind the first '/'. " + std::string(kEscape));
  if (const std::size_t at = text.rfind('@'); at != std::string_view::npos) {
    const std::string_view login = text.substr(0, at);
    if (login.find('@') != std::string_view::npos)
      return invalid("there are two '@' before the host. " + std::string(kEscape));
    const std::size_t colon = login.find(':');
    std::optional<std::string> user = decode(login.substr(0, colon));
    if (colon != std::string_view::npos) {
      url_password_ = decode(login.substr(colon + 1));
      if (!url_password_) user.reset();
    }
    if (!user)
      return invalid("a '%' in the user name or password is not followed by two hex digits: write %25");
    url_.user = std::move(*user);
    text.remove_prefix(at + 1);
  }
  return hosts(text);
}

Status Parser::hosts(std::string_view list) {
  if (scheme_->path) {
    if (!list.empty())
      return invalid("a Unix socket has no host: write unix:///absolute/path, with three slashes");
    return Status::success();
  }
  if (list.empty() && url_.topology == Topology::single) list = "localhost";
  while (true) {
    const std::size_t comma = list.find(',');
    Result<HostPort> one = host(list.substr(0, comma));
    if (!one.ok()) return one.status();
    const auto& known = url_.hosts;
    if (std::find(known.begin(), known.end(), one.value()) == known.end())
      url_.hosts.push_back(std::move(one.value()));
    if (comma == std::string_view::npos) break;
    list.remove_prefix(comma + 1);
  }
  if (url_.topology == Topology::single && url_.hosts.size() > 1)
    return invalid(
        "it names several hosts: use redis+sentinel://host1,host2/name or redis+cluster://host1,host2");
  return Status::success();
}

Result<HostPort> Parser::host(std::string_view text) const {
  HostPort out;
  out.port = url_.topology == Topology::sentinel ? 26'379 : 6'379;
  std::string_view port;
  bool has_port = false;
  if (text.starts_with('[')) {
    const std::size_t end = text.find(']');
    if (end == std::string_view::npos) return invalid("a '[' before an IPv6 address has no ']'");
    out.host = text.substr(1, end - 1);
    if (out.host.find(':') == std::string::npos || !net::is_numeric_address(out.host))
      return invalid("what stands in brackets is no IPv6 address, as in redis://[::1]:6379");
    port = text.substr(end + 1);
    if (!port.empty() && port[0] != ':') return invalid("only a port, :6379, may follow an IPv6 address");
    has_port = !port.empty();
    if (has_port) port.remove_prefix(1);
  } else {
    const std::size_t colon = text.find(':');
    if (colon != std::string_view::npos && text.find(':', colon + 1) != std::string_view::npos)
      return invalid("a host holds several ':'. An IPv6 address stands in brackets, as in [::1]:6379. " +
                     std::string(kEscape));
    const std::optional<std::string> name = decode(text.substr(0, colon));
    if (!name || !is_host_name(*name))
      return invalid("a host name is missing or holds characters that no host name has. " +
                     std::string(kEscape));
    out.host = *name;
    has_port = colon != std::string_view::npos;
    if (has_port) port = text.substr(colon + 1);
  }
  if (has_port && !(number(port, out.port) && out.port > 0))
    return invalid("a port is no number from 1 to 65535. " + std::string(kEscape));
  return out;
}

Status Parser::path() {
  std::optional<std::string> decoded = decode(rest_);
  if (!decoded) return invalid("a '%' in the path is not followed by two hex digits: write %25");
  if (decoded->find('\0') != std::string::npos) return invalid("the path holds a NUL character");
  if (scheme_->path) {
    if (decoded->size() < 2)
      return invalid("the path of the Unix socket is missing: unix:///absolute/path?db=0");
    url_.path = std::move(*decoded);
    return Status::success();
  }
  std::string_view text = rest_;
  if (!text.empty()) text.remove_prefix(1);
  if (url_.topology == Topology::sentinel) {
    const std::size_t slash = text.find('/');
    std::optional<std::string> name = decode(text.substr(0, slash));
    if (!name || name->empty())
      return invalid(
          "the name under which Sentinel knows the primary is missing: "
          "redis+sentinel://host1:26379,host2:26379/mymaster/0");
    url_.primary_name = std::move(*name);
    text = slash == std::string_view::npos ? std::string_view() : text.substr(slash + 1);
  }
  if (text.ends_with('/')) text.remove_suffix(1);
  if (text.empty()) return Status::success();
  return set_db(text);
}

Status Parser::set_db(std::string_view text) {
  int db = -1;
  if (!number(text, db) || db < 0)
    return invalid(formatted("the db, at the end of the path or as db=, is no whole number from 0 to {}",
                             std::numeric_limits<int>::max()));
  path_db_ = db;
  return Status::success();
}

std::optional<std::string> Parser::take(const std::string& key) {
  const auto found = query_.find(key);
  if (found == query_.end()) return std::nullopt;
  std::string value = std::move(found->second);
  query_.erase(found);
  return value;
}

Status Parser::options() {
  if (const auto db = take("db"))
    if (Status status = set_db(*db); !status.ok()) return status;
  if (const auto user = take("username"); user && url_.user.empty()) url_.user = *user;
  if (const auto password = take("password"); password && !url_password_) url_password_ = *password;
  url_.password = url_password_.value_or(std::string(password_));
  const bool sentinel = url_.topology == Topology::sentinel;
  if (sentinel) {
    url_.sentinel_user = take("sentinel_username").value_or("");
    url_.sentinel_password = take("sentinel_password").value_or("");
  }
  if (url_.tls.on)
    if (Status status = tls_options(); !status.ok()) return status;
  if (query_.empty()) return Status::success();

  const std::string& key = query_.begin()->first;
  if (key.starts_with("sentinel_")) return invalid("sentinel_* options need a redis+sentinel:// url");
  if (key.starts_with("ssl_"))
    return invalid("ssl_* options need a url with TLS: rediss:// instead of redis://");
  // What looks unlike an option may be the rest of a password.
  const bool showable =
      !query_password_ && key.size() <= 32 &&
      std::all_of(key.begin(), key.end(), [](char c) { return (c >= 'a' && c <= 'z') || c == '_'; });
  return invalid(formatted("unknown option{} after '?'. Known are db, username, password{}{}. {}",
                           showable && query_.begin()->second.find('@') == std::string::npos
                               ? formatted(" '{}'", key)
                               : std::string(),
                           sentinel ? ", sentinel_username, sentinel_password" : "",
                           url_.tls.on ? ", ssl_ca_certs, ssl_cert_reqs, ssl_certfile, ssl_keyfile" : "",
                           showable ? std::string_view() : kEscape));
}

Status Parser::tls_options() {
  const std::string demand = take("ssl_cert_reqs").value_or("required");
  if (demand != "required" && demand != "none")
    return invalid("ssl_cert_reqs must be required (the default) or none (testing: any certificate will do)");
  url_.tls.verify = demand == "required";
  url_.tls.ca_file = take("ssl_ca_certs").value_or("");
  url_.tls.cert_file = take("ssl_certfile").value_or("");
  url_.tls.key_file = take("ssl_keyfile").value_or("");
  if (url_.tls.cert_file.empty() && !url_.tls.key_file.empty())
    return invalid("ssl_keyfile needs ssl_certfile beside it");
  for (const std::string* file : {&url_.tls.ca_file, &url_.tls.cert_file, &url_.tls.key_file})
    if (file->find('\0') != std::string::npos)
      return invalid("the path of a certificate holds a NUL character");
  return Status::success();
}

Status Parser::database() {
  if (!path_db_ && db_ < 0) return invalid("the option db must be a whole number from 0");
  url_.db = path_db_.value_or(db_);
  if (url_.topology == Topology::cluster && url_.db != 0)
    return invalid("a cluster has only db 0: leave the db out of the url and the options");
  return Status::success();
}

}  // namespace

Result<RedisUrl> parse_url(std::string_view url, int db, std::string_view password) {
  return Parser(url, db, password).run();
}

std::string RedisUrl::describe() const {
  std::string out = path.empty() ? (tls.on ? "rediss" : "redis") : "unix";
  if (topology == Topology::sentinel) out += "+sentinel";
  if (topology == Topology::cluster) out += "+cluster";
  out += "://";
  if (!user.empty()) out += user + "@";
  for (std::size_t i = 0; i < hosts.size(); ++i) out.append(i ? "," : "").append(target(hosts[i]).describe());
  if (!path.empty()) return out + path + formatted("?db={}", db);
  if (topology == Topology::sentinel) out += "/" + primary_name;
  if (topology != Topology::cluster) out += formatted("/{}", db);
  return out;
}

net::StreamTarget RedisUrl::target(const HostPort& host) const { return {host.host, host.port, {}, tls}; }

net::StreamTarget RedisUrl::target() const {
  if (!path.empty() || hosts.empty()) return {{}, 0, path, {}};
  return target(hosts.front());
}

}  // namespace ratesync::redis
