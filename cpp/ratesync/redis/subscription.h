// Channels of one server, on a connection of their own (RESP2 allows nothing else on it), restored
// after every loss. I/O thread only; close() before letting go.
#pragma once

#include <asio/io_context.hpp>
#include <asio/steady_timer.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>

#include "ratesync/redis/backoff.h"
#include "ratesync/redis/connection.h"
#include "ratesync/redis/session.h"

namespace ratesync::redis {

class Subscription : public std::enable_shared_from_this<Subscription> {
 public:
  using Listener = std::function<void(std::string_view message)>;

  Subscription(asio::io_context& io, ConnectionOptions options);
  ~Subscription();

  // Connects with the first channel. Messages published while there is no connection are lost.
  void subscribe(const std::string& channel, Listener listener);
  // The server has confirmed every channel on the present connection.
  [[nodiscard]] bool subscribed() const;
  // Each time that it came into force: what happened before may have been missed.
  void on_up(std::function<void()> listener) { up_ = std::move(listener); }
  // From the next connect on, and at once when connected elsewhere.
  void retarget(net::StreamTarget target);
  void close();
  void abandon_after_fork();

  [[nodiscard]] bool open() const { return state_ == State::open; }
  [[nodiscard]] std::string peer() const { return target_.describe(); }
  [[nodiscard]] std::uint64_t reconnects() const { return connects_ > 0 ? connects_ - 1 : 0; }
  [[nodiscard]] const Status& last_error() const { return backoff_.last_error(); }

 private:
  enum class State : std::uint8_t { idle, connecting, open, closed };
  struct Channel {
    Listener listener;
    bool confirmed = false;
  };

  void connect();
  void open_session(net::StreamTarget target);
  void connected();
  void say(const Command& command);
  void flush();
  void received(Reply reply);
  void lose(Status why, bool refused = false);
  void wait(Nanos time);
  void tick();

  asio::io_context& io_;
  const Clock clock_;
  const std::shared_ptr<const ConnectionOptions> options_;
  net::StreamTarget target_;
  State state_ = State::idle;
  Backoff backoff_;
  std::unordered_map<std::string, Channel> channels_;
  std::size_t confirmed_ = 0;
  std::shared_ptr<Session> session_;
  std::uint64_t attempt_ = 0;
  std::string unsent_, writing_;
  bool write_busy_ = false;
  std::unique_ptr<asio::steady_timer> timer_;  // the next connect, or the next look at the connection
  Nanos heard_at_ = 0;
  bool pinged_ = false;
  std::function<void()> up_;
  std::uint64_t connects_ = 0;
};

}  // namespace ratesync::redis
