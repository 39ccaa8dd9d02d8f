// What the tests of the libpq connection share: a server, a loop that is turned by hand, and calls
// that wait for their answer.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <optional>
#include <string>
#include <vector>

#include "postgres_server.h"
#include "ratesync/postgres/connection.h"

namespace ratesync::testing {

using namespace ratesync::postgres;

inline constexpr auto kPatience = std::chrono::seconds(60);

inline ConnInfo info_of(const std::string& url) {
  Result<ConnInfo> info = parse_conninfo(url);
  EXPECT_TRUE(info.ok()) << info.status().message;
  return info.ok() ? info.value() : ConnInfo{};
}

inline std::string with_port(const std::string& url, int port) {
  ConnInfo info = info_of(url);
  std::string out = "host=127.0.0.1 port=" + std::to_string(port);
  for (const auto& [key, value] : info.settings) out += " " + key + "='" + value + "'";
  return out;
}

class ConnectionTest : public ::testing::Test {
 protected:
  std::string url() { return PostgresServer::instance().url(); }

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

  Status connect(Connection& c) {
    std::optional<Status> status;
    c.connect([&](Status s) { status = std::move(s); });
    EXPECT_FALSE(status) << "answered inside the call";
    EXPECT_TRUE(wait_until([&] { return status.has_value(); }));
    return status.value_or(Status::make(Code::internal, "no answer"));
  }

  std::shared_ptr<Connection> connected(ConnectionOptions options = {}, std::string to = {}) {
    auto c = Connection::create(io_, info_of(to.empty() ? url() : to), std::move(options));
    const Status status = connect(*c);
    EXPECT_TRUE(status.ok()) << status.message;
    return c;
  }

  PipelineResult run(Connection& c, std::vector<Call> calls) {
    std::optional<PipelineResult> result;
    c.run(std::move(calls), [&](PipelineResult r) { result = std::move(r); });
    EXPECT_FALSE(result) << "answered inside the call";
    EXPECT_TRUE(wait_until([&] { return result.has_value(); }));
    return result ? std::move(*result) : PipelineResult{};
  }

  PipelineResult run(Connection& c, std::string sql, std::vector<Param> params = {}) {
    const Statement statement{"", std::move(sql)};
    return run(c, {Call{&statement, std::move(params)}});
  }

  std::string one(Connection& c, std::string sql) {
    const PipelineResult r = run(c, std::move(sql));
    EXPECT_TRUE(r.status.ok()) << r.status.message;
    return r.status.ok() && r.results[0]->rows() ? std::string(r.results[0]->text(0, 0)) : "";
  }

  Status script(Connection& c, std::string sql) {
    std::optional<Status> status;
    c.run_script(std::move(sql), [&](Status s) { status = std::move(s); });
    EXPECT_TRUE(wait_until([&] { return status.has_value(); }));
    return status.value_or(Status{});
  }

  // Ends a session and waits at the server until it is gone (pg_terminate_backend does so from 14 on only).
  void end_session(Connection& by, const std::string& pid) {
    const Status ended =
        script(by, "SELECT pg_terminate_backend(" + pid +
                       "); DO $$ BEGIN WHILE EXISTS (SELECT FROM pg_stat_activity WHERE pid = " + pid +
                       ") LOOP PERFORM pg_sleep(0.01), pg_stat_clear_snapshot(); END LOOP; END $$");
    ASSERT_TRUE(ended.ok()) << ended.message;
  }

  asio::io_context io_;
};

}  // namespace ratesync::testing
