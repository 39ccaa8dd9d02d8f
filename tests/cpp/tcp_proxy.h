// A TCP proxy on the test's own loop that can stop forwarding, to play a server that hangs: the
// connection stays open and nothing comes back; or lose its clients, before or after what they said arrived.
#pragma once

#include <array>
#include <asio/io_context.hpp>
#include <asio/ip/tcp.hpp>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace ratesync::testing {

class TcpProxy {
 public:
  using tcp = asio::ip::tcp;

  TcpProxy(asio::io_context& io, std::uint16_t to, std::uint16_t on = 0);
  ~TcpProxy();
  TcpProxy(const TcpProxy&) = delete;
  TcpProxy& operator=(const TcpProxy&) = delete;

  [[nodiscard]] std::uint16_t port() const { return acceptor_.local_endpoint().port(); }
  void stall() { stalled_ = true; }      // answers are held back from now on
  void withhold() { withheld_ = true; }  // requests are held back from now on
  void flow() { stalled_ = withheld_ = false; }
  // Hangs up on every client. The server is not told: what was withheld may still reach it.
  void cut();
  // Requests that were withheld reach the server now.
  void deliver();
  [[nodiscard]] std::size_t kept() const;  // bytes withheld
  [[nodiscard]] int accepted() const { return accepted_; }
  [[nodiscard]] std::size_t held_back() const { return held_back_; }  // answers withheld, bytes

 private:
  struct Pair;

  void accept();
  void forward(std::shared_ptr<Pair> pair, tcp::socket& from, tcp::socket& to,
               std::array<char, 16'384>& space, bool answers);

  asio::io_context& io_;
  tcp::endpoint to_;
  tcp::acceptor acceptor_;
  int accepted_ = 0;
  std::vector<std::shared_ptr<Pair>> pairs_;
  bool stalled_ = false, withheld_ = false;
  std::size_t held_back_ = 0;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);  // what is under way outlives the proxy
};

}  // namespace ratesync::testing
