#include "tcp_proxy.h"

#include <asio/buffer.hpp>
#include <asio/write.hpp>

namespace ratesync::testing {

struct TcpProxy::Pair {
  Pair(asio::io_context& io) : client(io), server(io) {}
  tcp::socket client, server;
  std::array<char, 16'384> up{}, down{};
  std::string kept;
};

TcpProxy::TcpProxy(asio::io_context& io, std::uint16_t to, std::uint16_t on)
    : io_(io),
      to_(asio::ip::address_v4::loopback(), to),
      acceptor_(io, tcp::endpoint(asio::ip::address_v4::loopback(), on)) {
  accept();
}

TcpProxy::~TcpProxy() { *alive_ = false; }

void TcpProxy::cut() {
  for (const auto& pair : pairs_) {
    asio::error_code ignored;
    pair->client.shutdown(tcp::socket::shutdown_both, ignored);  // a child process may hold it, too
    pair->client.close(ignored);
  }
}

void TcpProxy::deliver() {
  for (const auto& pair : pairs_) {
    asio::error_code ignored;
    if (!pair->kept.empty()) asio::write(pair->server, asio::buffer(pair->kept), ignored);
    pair->kept.clear();
  }
}

std::size_t TcpProxy::kept() const {
  std::size_t out = 0;
  for (const auto& pair : pairs_) out += pair->kept.size();
  return out;
}

void TcpProxy::accept() {
  auto pair = std::make_shared<Pair>(io_);
  acceptor_.async_accept(pair->client, [this, pair, alive = alive_](asio::error_code ec) {
    if (ec || !*alive) return;
    ++accepted_;
    pairs_.push_back(pair);
    pair->server.async_connect(to_, [this, pair, alive](asio::error_code error) {
      if (error || !*alive) return;
      forward(pair, pair->client, pair->server, pair->up, false);
      forward(pair, pair->server, pair->client, pair->down, true);
    });
    accept();
  });
}

void TcpProxy::forward(std::shared_ptr<Pair> pair, tcp::socket& from, tcp::socket& to,
                       std::array<char, 16'384>& space, bool answers) {
  from.async_read_some(asio::buffer(space), [this, pair, &from, &to, &space, answers, alive = alive_](
                                                asio::error_code ec, std::size_t n) {
    if (ec || !*alive) {
      if (pair->kept.empty()) to.close(ec);
      return;
    }
    if (!answers && withheld_) {
      pair->kept.append(space.data(), n);
      forward(pair, from, to, space, answers);
      return;
    }
    if (answers && stalled_) {
      held_back_ += n;
      return;
    }
    asio::async_write(to, asio::buffer(space.data(), n),
                      [this, pair, &from, &to, &space, answers, alive](asio::error_code e, std::size_t) {
                        if (!e && *alive) forward(pair, from, to, space, answers);
                      });
  });
}

}  // namespace ratesync::testing
