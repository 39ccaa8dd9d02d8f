// One server as a Commander sees it: a Connection, and the scripts that the server is to know.
// I/O thread only.
#pragma once

#include <asio/io_context.hpp>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "ratesync/redis/commander.h"
#include "ratesync/redis/connection.h"

namespace ratesync::redis {

class Node : public std::enable_shared_from_this<Node> {
 public:
  explicit Node(std::shared_ptr<Connection> connection) : connection_(std::move(connection)) {}

  [[nodiscard]] Connection& connection() { return *connection_; }

  // Both hand over error replies raw (Reply::Kind::error).
  void call(const Command& command, Nanos deadline, ReplyCallback done) {
    connection_->send(command, deadline, std::move(done));
  }
  // EVALSHA. All calls that meet NOSCRIPT wait for one SCRIPT LOAD and are sent again; a call goes through
  // that three times at most. `asking`: ASKING goes before each EVALSHA. `script` outlives us.
  void eval(const Script& script, Command arguments, Nanos deadline, ReplyCallback done, bool asking = false);

 private:
  struct Call {
    const Script* script;
    Command arguments;
    Nanos deadline;
    ReplyCallback done;
    bool asking;
    int loads = 0;
  };
  using CallRef = std::shared_ptr<Call>;

  void run(CallRef call);
  void load(CallRef call);

  std::shared_ptr<Connection> connection_;
  std::unordered_map<std::string, std::vector<CallRef>> loading_;  // by SHA1: who waits for the load
};

}  // namespace ratesync::redis
