// One multiplexed, pipelined connection to one Redis server, which comes back by itself.
//
// Any number of commands are under way at once; the server answers in order. A lone command is written
// at once; what is sent while others are under way leaves together at the end of the loop's turn.
// I/O thread only; callbacks come there, exactly once, never inside the call that they were given to,
// and may do anything, also close the connection. It connects with the first command and again after a
// loss, with a jittered, growing pause, while commands wait, while down(), or while kept open.
//
// What becomes of a command when the connection is lost: sent ones are Code::in_doubt, those not sent
// wait for the next connection until their deadline (Code::timeout), or until the server's own refusal
// or the second failed connect in a row (then also new ones fail at once, until a connect succeeds).
#pragma once

#include <asio/io_context.hpp>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>

#include "ratesync/base/clock.h"
#include "ratesync/base/status.h"
#include "ratesync/net/stream.h"
#include "ratesync/redis/commander.h"

namespace ratesync::redis {

// Finds out where to connect, before each try: Sentinel's question. It answers once, on the loop.
using Locate = std::function<void(std::function<void(Result<net::StreamTarget>)>)>;

struct ConnectionOptions {
  net::StreamTarget target;
  Locate locate;     // set: asked before every connect, and `target` serves only for messages
  std::string user;  // empty: the default user
  std::string password;
  int db = 0;
  std::string client_name = "ratesync";
  bool primary_only = false;            // asks ROLE after connecting; a replica counts as unavailable
  Nanos connect_timeout = 5 * kSecond;  // name look-up, TLS and AUTH included
  Nanos command_timeout = 5 * kSecond;  // the oldest sent command waits no longer: then the connection goes
  std::size_t max_pending = 200'000;    // commands sent or waiting; more get Code::exhausted
  std::size_t max_pending_bytes = 256u << 20;  // of commands not yet sent
};

class Connection : public std::enable_shared_from_this<Connection> {
 public:
  using Done = std::function<void(Status)>;

  static std::shared_ptr<Connection> create(asio::io_context& io, const Clock& clock,
                                            ConnectionOptions options);
  virtual ~Connection() = default;

  // Answered when connected, or with the failure of the first try.
  virtual void connect(Done done) = 0;
  // Sends one command. An error reply of the server is handed over raw, as Reply::Kind::error: see
  // errors.h. Two calls in one turn of the loop reach the server one right after the other (ASKING).
  // `deadline`, on the engine's clock, counts until the command is sent; then command_timeout does.
  virtual void send(const Command& command, Nanos deadline, ReplyCallback done) = 0;
  // The same with arguments put before the command's: {"EVALSHA", sha1}.
  virtual void send(std::initializer_list<std::string_view> head, const Command& rest, Nanos deadline,
                    ReplyCallback done) = 0;

  // After every successful connect, before anything that waits is sent.
  virtual void on_up(std::function<void()> listener) = 0;
  // After every loss and every failed connect; not for close().
  virtual void on_lost(std::function<void(const Status&)> listener) = 0;
  // Stay connected also when nothing waits (also makes it connect).
  virtual void keep_open(bool keep) = 0;
  // Drops the present connection, as if it broke for this reason (a primary that became a replica).
  virtual void drop(Status why) = 0;
  // From the next connect on, talk to this server; drops the present connection when it is another one.
  virtual void retarget(net::StreamTarget target) = 0;

  // For good: commands not sent get `why`, sent ones Code::in_doubt.
  virtual void close(Status why) = 0;
  // Takes no more commands, lets those under way be answered, for `grace` at most, then closes.
  virtual void finish(Nanos grace, std::function<void()> done) = 0;
  virtual void abandon_after_fork() = 0;

  [[nodiscard]] virtual bool open() const = 0;
  [[nodiscard]] virtual bool down() const = 0;            // two failed connects in a row, or more
  [[nodiscard]] virtual std::size_t pending() const = 0;  // commands without an answer
  [[nodiscard]] virtual std::uint64_t reconnects() const = 0;
  [[nodiscard]] virtual std::uint64_t commands() const = 0;  // sent so far
  [[nodiscard]] virtual std::uint64_t writes() const = 0;    // that carried them
  [[nodiscard]] virtual std::string peer() const = 0;        // "host:port", never a password
};

}  // namespace ratesync::redis
