// The pool of one PostgreSQL store against a real server: lends, sets up, replaces, and closes.
#include "ratesync/postgres/pg_pool.h"

#include <gtest/gtest.h>

#include "connection_fixture.h"
#include "held_port.h"
#include "tcp_proxy.h"

using namespace ratesync;
using namespace ratesync::postgres;
using ratesync::testing::HeldPort;
using ratesync::testing::info_of;
using ratesync::testing::TcpProxy;
using ratesync::testing::with_port;

namespace {

class PgPoolTest : public ratesync::testing::ConnectionTest {
 protected:
  std::unique_ptr<PgPool> pool(PoolOptions options, std::string to = {}, ConnectionOptions connection = {}) {
    return PgPool::create(io_, info_of(to.empty() ? url() : to), std::move(connection), options);
  }

  Result<PgPool::Lease> get(PgPool& p) {
    std::optional<Result<PgPool::Lease>> result;
    p.get([&](Result<PgPool::Lease> r) { result = std::move(r); });
    EXPECT_FALSE(result) << "answered inside the call";
    EXPECT_TRUE(wait_until([&] { return result.has_value(); }));
    return std::move(*result);
  }

  void close(PgPool& p) {
    bool closed = false;
    p.close([&] { closed = true; });
    EXPECT_TRUE(wait_until([&] { return closed; }));
  }

  static store::Stats stats(const PgPool& p) {
    store::Stats s;
    p.fill(s);
    return s;
  }
};

PoolOptions sizes(std::size_t min, std::size_t max) {
  PoolOptions o;
  o.min_size = min;
  o.max_size = max;
  return o;
}

}  // namespace

TEST_F(PgPoolTest, LendsAndTakesBackTheSameConnection) {
  auto p = pool(sizes(0, 1));
  auto first = get(*p);
  ASSERT_TRUE(first.ok()) << first.status().message;
  const std::string pid = one(*first.value(), "SELECT pg_backend_pid()");
  EXPECT_EQ(stats(*p).connections_in_use, 1u);
  p->put(std::move(first.value()));
  auto second = get(*p);
  EXPECT_EQ(one(*second.value(), "SELECT pg_backend_pid()"), pid);
  p->put(second.value());
  close(*p);
  EXPECT_EQ(get(*p).status().code, Code::closed);
}

TEST_F(PgPoolTest, WaitersAreServedInTheOrderTheyCame) {
  auto p = pool(sizes(0, 1));
  auto lease = get(*p);
  std::vector<int> served;
  for (int i = 0; i < 50; ++i)
    p->get([&, i](Result<PgPool::Lease> r) {
      ASSERT_TRUE(r.ok());
      served.push_back(i);
      p->put(r.value());
    });
  EXPECT_EQ(stats(*p).connections_waiting, 50u);
  p->put(lease.value());
  ASSERT_TRUE(wait_until([&] { return served.size() == 50; }));
  EXPECT_TRUE(std::is_sorted(served.begin(), served.end()));
  close(*p);
}

TEST_F(PgPoolTest, RunsTheSetUpOnEveryNewConnectionAndItsRefusalReachesTheCaller) {
  auto p = pool(sizes(0, 2));
  int runs = 0;
  const Statement probe{"", "SELECT 1 FROM rs_no_such_table"}, fine{"", "SELECT 1"};
  bool broken_schema = true;
  p->set_setup([&](std::shared_ptr<Connection> c, Connection::Done done) {
    ++runs;
    c->run({Call{broken_schema ? &probe : &fine, {}}}, [done](PipelineResult r) { done(r.status); });
  });
  const auto refused = get(*p);
  EXPECT_EQ(refused.status().sqlstate, "42P01") << refused.status().message;
  broken_schema = false;
  std::optional<Status> status;
  while (!status || status->sqlstate == "42P01") {  // the pool rests a moment after a refusal
    auto r = get(*p);
    status = r.status();
    if (r.ok()) p->put(r.value());
  }
  EXPECT_TRUE(status->ok()) << status->message;
  EXPECT_GE(runs, 2);
  close(*p);
}

TEST_F(PgPoolTest, ReplacesAConnectionThatTheServerEnded) {
  auto killer = connected();
  auto p = pool(sizes(1, 1));
  auto lease = get(*p);
  const std::string pid = one(*lease.value(), "SELECT pg_backend_pid()");
  p->put(std::move(lease.value()));
  ASSERT_NO_FATAL_FAILURE(end_session(*killer, pid));
  ASSERT_TRUE(wait_until([&] { return stats(*p).reconnects == 1; }));
  auto next = get(*p);
  ASSERT_TRUE(next.ok()) << next.status().message;
  EXPECT_NE(one(*next.value(), "SELECT pg_backend_pid()"), pid);
  // And one that dies in the borrower's hands.
  next.value()->close();
  p->put(std::move(next.value()));
  auto last = get(*p);
  ASSERT_TRUE(last.ok()) << last.status().message;
  p->put(last.value());
  close(*p);
}

TEST_F(PgPoolTest, IsDownAfterRepeatedFailuresAndComesBackByItself) {
  const HeldPort held;
  const auto port = static_cast<std::uint16_t>(held.number());
  auto p = pool(sizes(1, 2), with_port(url(), port));
  const auto failed = get(*p);
  EXPECT_EQ(failed.status().code, Code::unavailable);
  EXPECT_NE(failed.status().message.find("127.0.0.1:" + std::to_string(port)), std::string::npos)
      << failed.status().message;
  ASSERT_TRUE(wait_until([&] { return p->down(); }));
  TcpProxy back(io_, static_cast<std::uint16_t>(std::stoi(info_of(url()).hosts[0].port)), port);
  ASSERT_TRUE(wait_until([&] { return !p->down(); }));
  auto lease = get(*p);
  ASSERT_TRUE(lease.ok()) << lease.status().message;
  EXPECT_EQ(one(*lease.value(), "SELECT 1"), "1");
  p->put(lease.value());
  close(*p);
}

TEST_F(PgPoolTest, CloseWaitsForALentConnectionButNotForEver) {
  ConnectionOptions connection;
  connection.command_timeout = 300 * kMilli;
  auto p = pool(sizes(0, 2), {}, connection);
  auto returned = get(*p), kept = get(*p);
  bool closed = false;
  p->close([&] { closed = true; });
  p->put(returned.value());
  io_.restart();
  io_.poll();
  EXPECT_FALSE(closed);
  ASSERT_TRUE(wait_until([&] { return closed; }));
  EXPECT_FALSE(kept.value()->open());
  p->put(kept.value());  // late, and harmless
}

TEST_F(PgPoolTest, MayBeDestroyedAtAnyTime) {
  for (int steps = 0; steps < 40; steps += 3) {
    auto p = pool(sizes(2, 4));
    for (int i = 0; i < 3; ++i) p->get([](Result<PgPool::Lease>) {});
    for (int i = 0; i < steps; ++i) {
      io_.restart();
      io_.run_one_for(std::chrono::milliseconds(100));
    }
  }
  io_.restart();
  while (io_.poll() > 0) {
  }
}
