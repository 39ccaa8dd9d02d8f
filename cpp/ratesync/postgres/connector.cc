#include "ratesync/postgres/connector.h"

#include <algorithm>
#include <asio/post.hpp>
#include <charconv>
#include <cstring>
#include <random>

#include "ratesync/base/format.h"

namespace ratesync::postgres {
namespace {

bool is_socket_path(const std::string& host) { return !host.empty() && (host[0] == '/' || host[0] == '@'); }

Nanos timeout_of(const ConnInfo& info, Nanos fallback) {
  const std::string text = info.setting("connect_timeout");
  std::int64_t seconds = 0;
  std::from_chars(text.data(), text.data() + text.size(), seconds);
  return seconds > 0 && seconds < 86'400 ? seconds * kSecond : fallback;
}

// The five characters out of "FATAL:  28P01: password ...", the form that PQERRORS_VERBOSE gives.
// libpq has no accessor for the SQLSTATE of a failed connect; the severity word is translated, the
// two spaces after its colon are not. The text after the code goes to `primary`.
std::string sqlstate_in(const std::string& text, std::string& primary) {
  for (std::size_t i = text.find(":  "); i != std::string::npos; i = text.find(":  ", i + 1)) {
    const std::string code = text.substr(i + 3, 5);
    const bool shaped = code.size() == 5 && std::all_of(code.begin(), code.end(), [](char c) {
                          return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z');
                        });
    if (!shaped || text.compare(i + 8, 2, ": ") != 0) continue;
    primary = text.substr(i + 10, text.find('\n', i) - (i + 10));
    return code;
  }
  return {};
}

}  // namespace

Connector::Connector(asio::io_context& io, ConnInfo info, const ConnectionOptions& options)
    : io_(io),
      info_(std::move(info)),
      application_name_(options.application_name),
      timeout_(timeout_of(info_, options.connect_timeout)),
      resolver_(std::make_unique<net::Resolver>(io)),
      timer_(std::make_unique<asio::steady_timer>(io)) {
  std::vector<std::size_t> order(info_.hosts.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  if (info_.setting("load_balance_hosts") == "random") {
    std::minstd_rand random{std::random_device{}()};
    std::shuffle(order.begin(), order.end(), random);
  }
  // prefer-standby is two passes: libpq, seeing one host at a time, would accept the first it meets.
  const bool two_passes = info_.target_session_attrs == "prefer-standby";
  for (const std::size_t host : order)
    plan_.push_back({host, two_passes ? "standby" : info_.target_session_attrs});
  if (two_passes)
    for (const std::size_t host : order) plan_.push_back({host, "any"});
}

void Connector::start(Done done) {
  done_ = std::move(done);
  asio::post(io_, [self = shared_from_this()] {
    if (self->done_) self->next_host();
  });
}

void Connector::cancel() {
  ++generation_;
  done_ = nullptr;
  resolver_->cancel();
  timer_->cancel();
  link_.reset();
}

void Connector::abandon_after_fork() {
  if (link_) link_->abandon_after_fork();
  (void)link_.release();
  (void)resolver_.release();
  (void)timer_.release();
  // done_ is captured state of the parent's; keep it alive with us. The owner leaks us as well.
}

void Connector::next_host() {
  if (at_ == plan_.size()) return finish(overall_failure());
  const HostPort& h = host();
  const bool path = is_socket_path(h.host);
  context_ = {};
  context_.host = h.host.empty() ? h.hostaddr : h.host;
  context_.port = h.port;
  context_.database = info_.setting("dbname");
  context_.user = info_.setting("user");
  host_started_ = clock_.now();
  host_deadline_ = saturating_add(host_started_, timeout_);
  if (!h.hostaddr.empty() || h.host.empty() || path) {
    addresses_ = {path ? std::string() : h.hostaddr};
    return next_address();
  }
  ++generation_;
  arm(host_deadline_, &Connector::resolve_expired);
  resolver_->resolve(h.host, [weak = weak_from_this()](Result<std::vector<std::string>> found) {
    const auto self = weak.lock();
    if (!self || !self->done_) return;
    self->addresses_.clear();
    if (!found.ok()) return self->attempt_failed(found.status());
    self->addresses_ = std::move(found.value());
    self->next_address();
  });
}

void Connector::resolve_expired() {
  resolver_->cancel();
  addresses_.clear();
  attempt_failed(Status::make(Code::unavailable,
                              formatted("cannot resolve host name \"{}\": no answer from DNS within {} ms",
                                        host().host, timeout_ / kMilli)));
}

void Connector::next_address() {
  if (addresses_.empty()) {
    ++at_;
    return next_host();
  }
  const std::string address = addresses_.front();
  // An address that swallows packets must not use up the time of those after it.
  const Nanos now = clock_.now();
  const Nanos left = std::max<Nanos>(host_deadline_ - now, 0);
  const Nanos share = left / static_cast<Nanos>(addresses_.size());
  addresses_.erase(addresses_.begin());
  ++generation_;
  arm(saturating_add(now, share), &Connector::address_expired);
  connect_to(address);
}

void Connector::connect_to(const std::string& address) {
  const HostPort& h = host();
  std::vector<std::pair<std::string, std::string>> options = info_.settings;
  const auto set = [&options](const char* keyword, const std::string& value) {
    std::erase_if(options, [keyword](const auto& o) { return o.first == keyword; });
    options.emplace_back(keyword, value);
  };
  // The name goes along with the address: TLS verification and ~/.pgpass look at it.
  set("host", h.host);
  set("hostaddr", address);
  set("port", h.port);
  set("target_session_attrs", plan_[at_].attrs);
  set("client_encoding", "UTF8");
  if (info_.setting("application_name").empty()) set("fallback_application_name", application_name_);
  // "prefer", the default, looks into credential caches and may ask DNS: blocking calls.
  if (info_.setting("gssencmode").empty()) set("gssencmode", "disable");

  std::vector<const char*> keys, values;
  for (const auto& [key, value] : options) {
    keys.push_back(key.c_str());
    values.push_back(value.c_str());
  }
  keys.push_back(nullptr);
  values.push_back(nullptr);
  PGconn* conn = PQconnectStartParams(keys.data(), values.data(), 0);
  if (!conn) return attempt_failed(Status::make(Code::unavailable, "libpq: out of memory"));
  link_ = std::make_unique<Link>(io_, conn);
  PQsetErrorVerbosity(conn, PQERRORS_VERBOSE);  // puts the SQLSTATE into the message, see sqlstate_in
  if (PQstatus(conn) == CONNECTION_BAD) return attempt_failed(failure_of_libpq());
  wait_for(PGRES_POLLING_WRITING);  // as libpq's manual wants before the first poll
}

void Connector::wait_for(PostgresPollingStatusType state) {
  if (!link_->attach())
    return attempt_failed(
        Status::make(Code::unavailable, "the system refuses to watch the socket (descriptor limit?)"));
  const auto kind = state == PGRES_POLLING_READING ? Link::Wait::wait_read : Link::Wait::wait_write;
  link_->wait(kind, [weak = weak_from_this(), generation = generation_](const asio::error_code&) {
    // Also after an error: PQconnectPoll finds out itself, and with better words.
    const auto self = weak.lock();
    if (self && self->done_ && self->generation_ == generation) self->poll();
  });
}

void Connector::poll() {
  ++generation_;
  // The socket may change inside PQconnectPoll (TLS refused, next try without): let go of it
  // before, look it up again after.
  link_->detach();
  const PostgresPollingStatusType state = PQconnectPoll(link_->pg());
  if (state == PGRES_POLLING_FAILED) return attempt_failed(failure_of_libpq());
  if (state != PGRES_POLLING_OK) return wait_for(state);
  PQsetErrorVerbosity(link_->pg(), PQERRORS_DEFAULT);
  if (const char* database = PQdb(link_->pg())) context_.database = database;
  if (const char* user = PQuser(link_->pg())) context_.user = user;
  finish(Established{std::move(link_), std::move(context_)});
}

void Connector::arm(Nanos deadline, void (Connector::*expired)()) {
  // Armed once per host or address; generation_ moves on with every poll, so this handler knows its
  // turn by the timer's own expiry: expires_after cancels the earlier wait.
  const Nanos in = std::max<Nanos>(deadline - clock_.now(), 0);
  timer_->expires_after(std::chrono::nanoseconds(in));
  timer_->async_wait([weak = weak_from_this(), at = timer_->expiry(), expired](const asio::error_code& ec) {
    const auto self = weak.lock();
    if (ec || !self || !self->done_ || self->timer_->expiry() != at) return;
    (self.get()->*expired)();
  });
}

void Connector::address_expired() {
  const double elapsed = static_cast<double>(clock_.now() - host_started_) / kMilli;
  const bool reached = link_ && PQstatus(link_->pg()) != CONNECTION_STARTED;
  if (link_) link_->doom();
  attempt_failed(Status::make(
      Code::unavailable,
      formatted("could not connect to PostgreSQL at {}:{} within connect_timeout: {} after {:.0f} ms",
                context_.host, context_.port,
                reached ? "it accepts connections and does not answer" : "no answer", elapsed)));
}

Status Connector::failure_of_libpq() const {
  std::string text = PQerrorMessage(link_->pg());
  // With several tries in one (TLS, then plain), the last one is what decided.
  if (const auto last = text.rfind("connection to server "); last != std::string::npos) text.erase(0, last);
  std::string primary;
  if (const std::string sqlstate = sqlstate_in(text, primary); !sqlstate.empty())
    return from_server(sqlstate, primary, context_);
  if (PQconnectionNeedsPassword(link_->pg()))
    return from_server("28P01", "the server wants a password and none is given", context_);
  if (const auto failed = text.find(" failed: "); failed != std::string::npos) text.erase(0, failed + 9);
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.back()))) text.pop_back();
  for (std::size_t i; (i = text.find("\n\t")) != std::string::npos;) text.replace(i, 2, ". ");
  std::replace(text.begin(), text.end(), '\n', ' ');
  const double elapsed = static_cast<double>(clock_.now() - host_started_) / kMilli;
  return Status::make(
      Code::unavailable,
      formatted("could not connect to PostgreSQL at {}:{} after {:.0f} ms: {}",
                context_.host.empty() ? "local socket" : context_.host, context_.port, elapsed, text));
}

void Connector::attempt_failed(Status status) {
  ++generation_;
  timer_->cancel();
  link_.reset();
  const bool hopeless = status.code == Code::server && !is_worth_another_host(status.sqlstate);
  failures_.push_back(std::move(status));
  if (hopeless) return finish(failures_.back());
  next_address();
}

Status Connector::overall_failure() const {
  if (failures_.size() == 1) return failures_.front();
  std::string message = formatted("no usable PostgreSQL among {}", info_.describe());
  if (info_.target_session_attrs != "any")
    message += formatted(" (target_session_attrs={})", info_.target_session_attrs);
  const char* separator = ": ";
  for (const Status& failure : failures_) {
    message += separator + failure.message;
    separator = "; ";
  }
  return Status::make(Code::unavailable, std::move(message), failures_.back().sqlstate);
}

void Connector::finish(Result<Established> result) {
  ++generation_;
  timer_->cancel();
  resolver_->cancel();
  if (const Done done = std::exchange(done_, nullptr)) done(std::move(result));
}

}  // namespace ratesync::postgres
