// What the capabilities need of a Redis deployment, whether one server, a Sentinel group or a Cluster.
//
// All methods run on the I/O thread; callbacks come there too, exactly once, and never from inside
// the call. An error reply of the server is a Status made by errors.h: Code::server, or unavailable when
// the server cannot serve now; its first word ("OOM") in Status::sqlstate. The other codes: unavailable
// (certainly not executed), in_doubt (sent, answer lost), timeout (the deadline passed before it was
// sent), exhausted (a queue is full), closed. A command that was sent is not bound by its deadline but
// by the store's socket_timeout, after which the connection is dropped: in_doubt.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "ratesync/base/clock.h"
#include "ratesync/base/status.h"
#include "ratesync/redis/reply.h"
#include "ratesync/store/store.h"

namespace ratesync::redis {

// A command under construction: one flat buffer, so that it can be sent again (MOVED, NOSCRIPT).
class Command {
 public:
  explicit Command(std::string_view name) { add(name); }
  Command& add(std::string_view argument) {
    bytes_.append(argument);
    ends_.push_back(bytes_.size());
    return *this;
  }
  Command& add(std::int64_t argument) { return add(std::to_string(argument)); }
  [[nodiscard]] std::size_t size() const { return ends_.size(); }
  [[nodiscard]] std::string_view operator[](std::size_t i) const {
    const std::size_t begin = i == 0 ? 0 : ends_[i - 1];
    return std::string_view(bytes_).substr(begin, ends_[i] - begin);
  }

 private:
  std::string bytes_;
  std::vector<std::size_t> ends_;  // of each argument in bytes_
};

// A Lua script and the SHA1 of its source, as 40 hex digits.
struct Script {
  std::string name;  // for messages
  std::string source;
  std::string sha1;
};

using ReplyCallback = std::function<void(Result<Reply>)>;
using KeySink = std::function<bool(std::string key)>;

class Commander {
 public:
  virtual ~Commander() = default;

  // Connects, authenticates, finds the topology.
  virtual void connect(std::function<void(Status)> done) = 0;
  // Sends one command to the primary that owns `key` (empty: any primary). Commands to one node are
  // pipelined and answered in order. `deadline` is on the engine's clock.
  virtual void call(std::string_view key, Command command, Nanos deadline, ReplyCallback done) = 0;
  // EVALSHA on the primary that owns `key`; a server that does not know the script is given it, once
  // for all calls that met NOSCRIPT. `arguments` is everything after the SHA1: number of keys, keys, values.
  virtual void eval(const Script& script, std::string_view key, Command arguments, Nanos deadline,
                    ReplyCallback done) = 0;
  // On every primary, for SCAN and INFO: `done` gets one result per primary.
  virtual void call_all(Command command, Nanos deadline,
                        std::function<void(std::vector<Result<Reply>>)> done) = 0;
  // Shows `each` all keys that match the glob pattern, on all primaries, in no order and some perhaps twice,
  // until it answers false. Never more than a page of them is held.
  virtual void walk(std::string pattern, KeySink each, Nanos deadline, std::function<void(Status)> done) = 0;
  // Collects them, each once, up to `limit`.
  void scan(std::string pattern, std::size_t limit, Nanos deadline,
            std::function<void(Result<std::vector<std::string>>)> done);

  // The hash slot of a key (0..16383) where it matters, else 0: keys of different slots cannot be
  // touched by one script.
  [[nodiscard]] virtual std::uint16_t slot_of(std::string_view key) const = 0;
  [[nodiscard]] virtual bool clustered() const = 0;

  // One channel, on a connection of its own that exists from the first subscribe() on and is restored
  // after failures. `listener` gets each message.
  virtual void subscribe(std::string channel, std::function<void(std::string_view message)> listener) = 0;
  // Whether the subscription is in force at this moment.
  [[nodiscard]] virtual bool subscribed() const = 0;
  // Called after every new connection to a primary: what was remembered of the server may be gone.
  virtual void on_reconnect(std::function<void()> listener) = 0;

  [[nodiscard]] virtual bool down() const = 0;
  virtual void add_stats(store::Stats& stats) const = 0;
  // Where it talks to, without password, for messages and doctor.
  [[nodiscard]] virtual std::string target() const = 0;
  virtual void close(std::function<void()> done) = 0;
  virtual void abandon_after_fork() = 0;
};

}  // namespace ratesync::redis
