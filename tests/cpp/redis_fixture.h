// What the tests of the Redis transport share: a loop that is turned by hand, and calls that wait for
// their answer.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ratesync/redis/commander.h"
#include "ratesync/redis/commander_factory.h"
#include "ratesync/redis/connection.h"
#include "redis_server.h"

namespace ratesync::testing {

using namespace ratesync::redis;

inline constexpr auto kPatience = std::chrono::seconds(60);

inline Command command(std::initializer_list<std::string_view> words) {
  Command out(*words.begin());
  for (const std::string_view* word = words.begin() + 1; word != words.end(); ++word) out.add(*word);
  return out;
}

class RedisTest : public ::testing::Test {
 protected:
  // One for all tests of a file that do not hurt it.
  static RedisServer& shared_server() {
    static RedisServer server;
    return server;
  }

  template <class Predicate>
  bool wait_until(Predicate done) {
    const auto end = std::chrono::steady_clock::now() + kPatience;
    while (!done()) {
      if (std::chrono::steady_clock::now() > end) return false;
      io_.restart();
      io_.run_one_for(std::chrono::milliseconds(200));
    }
    return true;
  }

  ConnectionOptions options(int port) {
    ConnectionOptions out;
    out.target.host = "127.0.0.1";
    out.target.port = static_cast<std::uint16_t>(port);
    return out;
  }
  std::shared_ptr<Connection> connection(ConnectionOptions with) {
    return Connection::create(io_, clock_, std::move(with));
  }

  Status connect(Connection& c) {
    std::optional<Status> status;
    c.connect([&](Status s) { status = std::move(s); });
    EXPECT_FALSE(status) << "answered inside the call";
    EXPECT_TRUE(wait_until([&] { return status.has_value(); }));
    return status.value_or(Status::make(Code::internal, "no answer"));
  }

  Result<Reply> send(Connection& c, std::initializer_list<std::string_view> words) {
    std::optional<Result<Reply>> reply;
    c.send(command(words), kForever, [&](Result<Reply> r) { reply = std::move(r); });
    EXPECT_FALSE(reply) << "answered inside the call";
    EXPECT_TRUE(wait_until([&] { return reply.has_value(); }));
    return reply ? std::move(*reply) : Status::make(Code::internal, "no answer");
  }

  std::unique_ptr<Commander> commander(const std::string& url, CommanderOptions with = {}) {
    with.url = url;
    auto made = make_commander(io_, clock_, std::move(with));
    EXPECT_TRUE(made.ok()) << made.status().message;
    return made.ok() ? std::move(made.value()) : nullptr;
  }

  Result<Reply> call(Commander& c, std::initializer_list<std::string_view> words, Nanos deadline = kForever) {
    std::optional<Result<Reply>> reply;
    c.call("", command(words), deadline, [&](Result<Reply> r) { reply = std::move(r); });
    EXPECT_FALSE(reply) << "answered inside the call";
    EXPECT_TRUE(wait_until([&] { return reply.has_value(); }));
    return reply ? std::move(*reply) : Status::make(Code::internal, "no answer");
  }

  static std::string text(const Result<Reply>& reply) {
    return reply.ok() ? reply.value().text : "status: " + reply.status().message;
  }

  asio::io_context io_;
  Clock clock_;
};

}  // namespace ratesync::testing
