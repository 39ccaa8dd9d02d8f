#include "ratesync/net/stream.h"

#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <asio/generic/stream_protocol.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/local/stream_protocol.hpp>
#include <asio/post.hpp>
#include <asio/ssl/stream.hpp>
#include <asio/steady_timer.hpp>
#include <asio/write.hpp>
#include <optional>
#include <utility>
#include <vector>

#include "ratesync/base/format.h"
#include "ratesync/net/resolver.h"
#include "ratesync/net/tls.h"

namespace ratesync::net {
namespace {

using Socket = asio::generic::stream_protocol::socket;
using Endpoint = asio::generic::stream_protocol::endpoint;
using Tls = asio::ssl::stream<Socket&>;

// One try. Operations under way keep it alive: after close() they end on a closed descriptor, and never
// meet the socket of the next try.
struct Link {
  explicit Link(asio::io_context& io) : socket(io) {}
  Socket socket;
  std::optional<Tls> tls;
  std::string writing;  // a TLS write that was closed may look at its bytes once more
};

// A peer that vanished without a word is noticed on an idle connection after about a minute.
void set_tcp_options(Socket& socket) {
  asio::error_code ignored;
  socket.set_option(asio::ip::tcp::no_delay(true), ignored);
  socket.set_option(asio::socket_base::keep_alive(true), ignored);
#if defined(TCP_KEEPIDLE)
  const int idle = 30, interval = 10, count = 3;
  ::setsockopt(socket.native_handle(), IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
  ::setsockopt(socket.native_handle(), IPPROTO_TCP, TCP_KEEPINTVL, &interval, sizeof interval);
  ::setsockopt(socket.native_handle(), IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof count);
#endif
}

class NetStream final : public Stream {
 public:
  NetStream(asio::io_context& io, StreamTarget target)
      : io_(io),
        target_(std::move(target)),
        resolver_(std::make_unique<Resolver>(io)),
        timer_(std::make_unique<asio::steady_timer>(io)),
        link_(std::make_shared<Link>(io)) {}

  void connect(Nanos timeout, Done done) override;
  void read(char* into, std::size_t size, Received done) override;
  bool write(std::string_view bytes, Done done) override;
  void close() override;
  void abandon_after_fork() override;

 private:
  std::shared_ptr<NetStream> self() { return std::static_pointer_cast<NetStream>(shared_from_this()); }
  void resolve();
  void next_address();
  void connect_to(const Endpoint& endpoint);
  void handshake();
  void arm(Nanos deadline);
  void attempt_failed(Status status);
  void finish_connect(Status status);
  [[nodiscard]] Status broken(std::string_view doing, const asio::error_code& ec) const;
  [[nodiscard]] double elapsed_ms() const { return static_cast<double>(clock_.now() - started_) / kMilli; }

  asio::io_context& io_;
  const StreamTarget target_;
  const Clock clock_;
  // Behind pointers: leaked after fork.
  std::unique_ptr<Resolver> resolver_;
  std::unique_ptr<asio::steady_timer> timer_;
  std::shared_ptr<Link> link_;
  std::shared_ptr<asio::ssl::context> context_;
  std::vector<Endpoint> endpoints_;  // not tried yet
  Nanos started_ = 0;
  Nanos deadline_ = kForever;
  std::uint64_t step_ = 0;  // of connecting: answers of an earlier one are stale
  const char* doing_ = "";
  Status failure_;  // the most telling of the addresses tried
  Done connected_;
  bool closed_ = false;
};

void NetStream::connect(Nanos timeout, Done done) {
  connected_ = std::move(done);
  started_ = clock_.now();
  deadline_ = saturating_add(started_, timeout);
  asio::post(io_, [self = self()] {
    if (self->closed_) return;
    if (self->target_.tls.on && self->target_.path.empty()) {
      auto context = make_tls_context(self->target_.tls);
      if (!context.ok()) return self->finish_connect(context.status());
      self->context_ = std::move(context.value());
    }
    self->resolve();
  });
}

void NetStream::resolve() {
  if (!target_.path.empty()) {
    if (target_.path.size() >= sizeof(sockaddr_un::sun_path))
      return finish_connect(
          Status::make(Code::invalid, formatted("the path of the Unix socket is longer than {} bytes: {}",
                                                sizeof(sockaddr_un::sun_path) - 1, target_.path)));
    endpoints_ = {asio::local::stream_protocol::endpoint(target_.path)};
    return next_address();
  }
  doing_ = "no answer from DNS";
  arm(deadline_);
  resolver_->resolve(target_.host, [self = self()](Result<std::vector<std::string>> found) {
    if (self->closed_ || !self->connected_) return;
    if (!found.ok()) return self->finish_connect(found.status());
    for (const std::string& address : found.value()) {
      asio::error_code ec;
      const auto ip = asio::ip::make_address(address, ec);
      if (!ec) self->endpoints_.emplace_back(asio::ip::tcp::endpoint(ip, self->target_.port));
    }
    self->next_address();
  });
}

void NetStream::next_address() {
  if (endpoints_.empty()) return finish_connect(std::move(failure_));
  // An address that swallows packets must not use up the time of those after it.
  const Nanos now = clock_.now();
  const Nanos share = std::max<Nanos>(deadline_ - now, 0) / static_cast<Nanos>(endpoints_.size());
  const Endpoint endpoint = endpoints_.front();
  endpoints_.erase(endpoints_.begin());
  doing_ = "no answer";
  arm(saturating_add(now, share));
  connect_to(endpoint);
}

void NetStream::connect_to(const Endpoint& endpoint) {
  link_ = std::make_shared<Link>(io_);
  const auto handler = [self = self(), link = link_, step = step_](const asio::error_code& error) {
    if (self->closed_ || self->step_ != step) return;
    if (error)
      return self->attempt_failed(Status::make(
          Code::unavailable, formatted("could not connect to {} after {:.0f} ms: {}",
                                       self->target_.describe(), self->elapsed_ms(), error.message())));
    if (self->target_.path.empty()) set_tcp_options(link->socket);
    asio::error_code ignored;
    link->socket.non_blocking(true, ignored);
    if (self->context_) return self->handshake();
    self->finish_connect(Status::success());
  };
  link_->socket.async_connect(endpoint, handler);
}

void NetStream::handshake() {
  Tls& tls = link_->tls.emplace(link_->socket, *context_);
  if (Status status = prepare_tls(tls.native_handle(), target_.host, target_.tls); !status.ok())
    return finish_connect(std::move(status));
  doing_ =
      "it accepts connections and does not answer the TLS handshake (a port without TLS wants redis:// "
      "instead of rediss://)";
  tls.async_handshake(Tls::client, [self = self(), link = link_, step = step_](const asio::error_code& ec) {
    if (self->closed_ || self->step_ != step) return;
    if (!ec) return self->finish_connect(Status::success());
    self->attempt_failed(tls_failure(link->tls->native_handle(), ec, self->target_));
  });
}

void NetStream::arm(Nanos deadline) {
  const std::uint64_t step = ++step_;
  timer_->expires_after(std::chrono::nanoseconds(std::max<Nanos>(deadline - clock_.now(), 0)));
  timer_->async_wait([weak = weak_from_this(), step](const asio::error_code& ec) {
    const auto me = std::static_pointer_cast<NetStream>(weak.lock());
    if (ec || !me || me->closed_ || me->step_ != step || !me->connected_) return;
    me->resolver_->cancel();
    me->attempt_failed(
        Status::make(Code::unavailable, formatted("could not connect to {}: {} after {:.0f} ms",
                                                  me->target_.describe(), me->doing_, me->elapsed_ms())));
  });
}

void NetStream::attempt_failed(Status status) {
  ++step_;
  // A server that answered and was not to our liking tells more than an address where nobody is.
  if (failure_.code != Code::server) failure_ = std::move(status);
  asio::error_code ignored;
  link_->socket.close(ignored);
  next_address();
}

void NetStream::finish_connect(Status status) {
  ++step_;
  timer_->cancel();
  if (const Done done = std::exchange(connected_, nullptr)) done(std::move(status));
}

void NetStream::read(char* into, std::size_t size, Received done) {
  const auto answer = [self = self(), done = std::move(done)](const asio::error_code& ec, std::size_t n) {
    if (self->closed_) return;
    if (ec)
      done(self->broken("reading from", ec), 0);
    else
      done(Status::success(), n);
  };
  if (link_->tls)
    link_->tls->async_read_some(asio::buffer(into, size), answer);
  else
    link_->socket.async_read_some(asio::buffer(into, size), answer);
}

bool NetStream::write(std::string_view bytes, Done done) {
  const auto answer = [self = self(), done = std::move(done)](const asio::error_code& ec, std::size_t) {
    if (!self->closed_) done(ec ? self->broken("writing to", ec) : Status::success());
  };
  if (link_->tls) {
    link_->writing.assign(bytes);
    asio::async_write(*link_->tls, asio::buffer(link_->writing),
                      [link = link_, answer](const asio::error_code& ec, std::size_t n) { answer(ec, n); });
    return false;
  }
  asio::error_code ec;
  const std::size_t written = link_->socket.write_some(asio::buffer(bytes), ec);
  if (!ec && written == bytes.size()) return true;
  // Also after an error: the write that follows meets it again, from the loop.
  asio::async_write(link_->socket, asio::buffer(bytes.substr(ec ? 0 : written)), answer);
  return false;
}

Status NetStream::broken(std::string_view doing, const asio::error_code& ec) const {
  const bool ended = ec == asio::error::eof || ec == asio::ssl::error::stream_truncated;
  return Status::make(Code::unavailable,
                      formatted("{} {}: {}", doing, target_.describe(),
                                ended ? std::string("the server closed the connection") : ec.message()));
}

void NetStream::close() {
  if (closed_) return;
  closed_ = true;
  ++step_;
  connected_ = nullptr;
  resolver_->cancel();
  timer_->cancel();
  asio::error_code ignored;
  link_->socket.close(ignored);
}

void NetStream::abandon_after_fork() {
  closed_ = true;
  // The epoll descriptor is shared with the parent: Asio's own close would unregister its socket.
  if (link_->socket.is_open()) ::close(link_->socket.native_handle());
  (void)new std::shared_ptr<Link>(link_);
  (void)timer_.release();
  (void)resolver_.release();
}

}  // namespace

std::string StreamTarget::describe() const {
  if (!path.empty()) return path;
  const bool v6 = host.find(':') != std::string::npos;
  return formatted("{}{}{}:{}", v6 ? "[" : "", host, v6 ? "]" : "", port);
}

std::shared_ptr<Stream> Stream::create(asio::io_context& io, StreamTarget target) {
  return std::make_shared<NetStream>(io, std::move(target));
}

}  // namespace ratesync::net
