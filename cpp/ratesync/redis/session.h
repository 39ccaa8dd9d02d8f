// One established connection to a Redis server, from the connect to its loss: stream, handshake, reader.
//
// It does not come back by itself: Connection and Subscription do, with a new Session each time.
// I/O thread only. Callbacks never run inside a call of ours, and not at all after close().
#pragma once

#include <array>
#include <asio/io_context.hpp>
#include <asio/steady_timer.hpp>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "ratesync/base/clock.h"
#include "ratesync/base/status.h"
#include "ratesync/net/stream.h"
#include "ratesync/redis/connection.h"
#include "ratesync/redis/reader.h"

namespace ratesync::redis {

class Session : public std::enable_shared_from_this<Session> {
 public:
  using Done = std::function<void(Status)>;
  struct Handlers {
    std::function<void(Reply)> reply;  // each, in order
    std::function<void()> drained;     // after the replies of one read
    std::function<void(Status)> lost;  // once; then nothing more comes
  };

  Session(asio::io_context& io, std::shared_ptr<const ConnectionOptions> options, net::StreamTarget target);

  // Connects, then AUTH, SELECT, CLIENT SETNAME, PING and, where asked for, ROLE in one round trip; all
  // within connect_timeout.
  void open(Handlers handlers, Done done);
  // One at a time, as in net::Stream: true when all of it left at once, else `done` says when. A failed
  // write says nothing: the server may have said why it hung up, and reading finds that or the end.
  bool write(std::string_view bytes, std::function<void()> done);
  void close();
  void abandon_after_fork();
  [[nodiscard]] std::string peer() const { return target_.describe(); }

 private:
  enum class Greeting : std::uint8_t { auth, select, name, role, ping };

  void greet();
  void read();
  void received(std::size_t size);
  void greeted(Reply reply);
  Status check_role(const Reply& role) const;
  void finish_open(Status status);
  void fail(Status status);

  const std::shared_ptr<const ConnectionOptions> options_;
  const net::StreamTarget target_;
  const Clock clock_;
  std::shared_ptr<net::Stream> stream_;
  std::unique_ptr<asio::steady_timer> timer_;  // of the handshake; behind a pointer: leaked after fork
  Reader reader_;
  Handlers handlers_;
  Done opened_;
  Nanos started_ = 0;
  std::string greeting_;
  std::vector<Greeting> greetings_;  // what was said
  std::size_t answered_ = 0;         // of them
  bool greeting_written_ = false;
  bool closed_ = false;
  std::array<char, 16'384> input_;
};

}  // namespace ratesync::redis
