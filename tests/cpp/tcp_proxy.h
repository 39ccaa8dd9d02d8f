// A TCP proxy on the test's own loop that can stop forwarding, to play a server that hangs: the
// connection stays open and nothing comes back; or lose its clients, before or after what they said arrived.
#pragma once

#include <array>
#include <asio/buffer.hpp>
#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <asio/write.hpp>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace ratesync::testing {

class TcpProxy {
 public:
  using tcp = asio::ip::tcp;

  TcpProxy(asio::io_context& io, std::uint16_t to, std::uint16_t on = 0)
      : io_(io),
        to_(asio::ip::address_v4::loopback(), to),
        acceptor_(io, tcp::endpoint(asio::ip::address_v4::loopback(), on)) {
    accept();
  }

  [[nodiscard]] std::uint16_t port() const { return acceptor_.local_endpoint().port(); }
  void stall() { *stalled_ = true; }      // answers are held back from now on
  void withhold() { *withheld_ = true; }  // requests are held back from now on
  void flow() { *stalled_ = *withheld_ = false; }
  // Hangs up on every client. The server is not told: what was withheld may still reach it.
  void cut() {
    for (const auto& pair : pairs_) {
      asio::error_code ignored;
      pair->client.shutdown(tcp::socket::shutdown_both, ignored);  // a child process may hold it, too
      pair->client.close(ignored);
    }
  }
  // Requests that were withheld reach the server now.
  void deliver() {
    for (const auto& pair : pairs_) {
      asio::error_code ignored;
      if (!pair->kept.empty()) asio::write(pair->server, asio::buffer(pair->kept), ignored);
      pair->kept.clear();
    }
  }
  [[nodiscard]] std::size_t kept() const {  // bytes withheld
    std::size_t out = 0;
    for (const auto& pair : pairs_) out += pair->kept.size();
    return out;
  }
  [[nodiscard]] int accepted() const { return accepted_; }
  [[nodiscard]] std::size_t held_back() const { return *held_back_; }  // answers withheld, bytes

 private:
  struct Pair {
    Pair(asio::io_context& io) : client(io), server(io) {}
    tcp::socket client, server;
    std::array<char, 16'384> up{}, down{};
    std::string kept;
  };

  void accept() {
    auto pair = std::make_shared<Pair>(io_);
    acceptor_.async_accept(pair->client, [this, pair](asio::error_code ec) {
      if (ec) return;
      ++accepted_;
      pairs_.push_back(pair);
      pair->server.async_connect(to_, [this, pair](asio::error_code error) {
        if (error) return;
        forward(pair, pair->client, pair->server, pair->up, false);
        forward(pair, pair->server, pair->client, pair->down, true);
      });
      accept();
    });
  }

  void forward(std::shared_ptr<Pair> pair, tcp::socket& from, tcp::socket& to,
               std::array<char, 16'384>& space, bool answers) {
    from.async_read_some(
        asio::buffer(space), [this, pair, &from, &to, &space, answers, stalled = stalled_,
                              withheld = withheld_, held = held_back_](asio::error_code ec, std::size_t n) {
          if (ec) {
            if (pair->kept.empty()) to.close(ec);
            return;
          }
          if (!answers && *withheld) {
            pair->kept.append(space.data(), n);
            forward(pair, from, to, space, answers);
            return;
          }
          if (answers && *stalled) {
            *held += n;
            return;
          }
          asio::async_write(to, asio::buffer(space.data(), n),
                            [this, pair, &from, &to, &space, answers](asio::error_code e, std::size_t) {
                              if (!e) forward(pair, from, to, space, answers);
                            });
        });
  }

  asio::io_context& io_;
  tcp::endpoint to_;
  tcp::acceptor acceptor_;
  int accepted_ = 0;
  std::vector<std::shared_ptr<Pair>> pairs_;
  std::shared_ptr<bool> stalled_ = std::make_shared<bool>(false);
  std::shared_ptr<bool> withheld_ = std::make_shared<bool>(false);
  std::shared_ptr<std::size_t> held_back_ = std::make_shared<std::size_t>(0);
};

}  // namespace ratesync::testing
