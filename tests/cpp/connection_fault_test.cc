// The libpq connection when things go wrong: hosts that refuse, hang or want another password, time
// running out, callbacks that pull the rug away, and a fork.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>

#include "connection_fixture.h"
#include "ratesync/postgres/connection.h"
#include "tcp_proxy.h"

using namespace ratesync;
using namespace ratesync::postgres;
using ratesync::testing::info_of;
using ratesync::testing::PostgresServer;
using ratesync::testing::TcpProxy;
using ratesync::testing::with_port;

namespace {

class ConnectionFaultTest : public ratesync::testing::ConnectionTest {
 protected:
  Status failure(const std::string& to, ConnectionOptions options = {}) {
    auto c = Connection::create(io_, info_of(to), std::move(options));
    const Status status = connect(*c);
    EXPECT_FALSE(c->open());
    return status;
  }
  int real_port() { return std::stoi(info_of(url()).hosts[0].port); }
  std::string real_host() { return info_of(url()).hosts[0].host; }
  bool has(const Status& s, std::string_view part) {
    EXPECT_NE(s.message.find(part), std::string::npos) << s.message;
    return s.message.find(part) != std::string::npos;
  }

  // Bound and not listening: refuses for as long as it lives.
  struct ClosedPort {
    explicit ClosedPort(asio::io_context& io) : socket(io) {
      socket.open(asio::ip::tcp::v4());
      socket.bind({asio::ip::address_v4::loopback(), 0});
    }
    [[nodiscard]] std::string text() const { return std::to_string(socket.local_endpoint().port()); }
    asio::ip::tcp::socket socket;
  };
};

}  // namespace

TEST_F(ConnectionFaultTest, ARefusedConnectionNamesHostPortAndTime) {
  const ClosedPort port(io_);
  const Status s = failure("postgresql://me@127.0.0.1:" + port.text() + "/db");
  EXPECT_EQ(s.code, Code::unavailable);
  has(s, "127.0.0.1:" + port.text());
  has(s, " ms: Connection refused");
}

TEST_F(ConnectionFaultTest, AMissingDatabaseSaysSo) {
  const Status s = failure("host=" + real_host() + " port=" + std::to_string(real_port()) +
                           " dbname=no_such_db user=" + info_of(url()).setting("user") + " password='" +
                           info_of(url()).setting("password") + "'");
  EXPECT_EQ(s.code, Code::server);
  EXPECT_EQ(s.sqlstate, "3D000");
  has(s, "Database \"no_such_db\" does not exist");
}

TEST_F(ConnectionFaultTest, AWrongOrMissingPasswordIsTheServersRefusalAndIsNotShown) {
  if (!PostgresServer::instance().own()) GTEST_SKIP() << "needs a pg_hba.conf of its own";
  auto admin = connected();
  ASSERT_TRUE(script(*admin, "CREATE ROLE guarded LOGIN PASSWORD 'right'").ok());
  const std::string at = "@127.0.0.1:" + std::to_string(real_port()) + "/postgres";
  for (const char* user : {"guarded:S3CR3T", "guarded"}) {
    const Status s = failure("postgresql://" + std::string(user) + at);
    EXPECT_EQ(s.code, Code::server) << s.message;
    EXPECT_EQ(s.sqlstate, "28P01");
    has(s, "Check user and password in the url (host 127.0.0.1:");
    EXPECT_EQ(s.message.find("S3CR3T"), std::string::npos);
  }
  EXPECT_EQ(one(*connected({}, "postgresql://guarded:right" + at), "SELECT current_user"), "guarded");
  ASSERT_TRUE(script(*admin, "DROP ROLE guarded").ok());
}

TEST_F(ConnectionFaultTest, AFullServerIsUnavailableWithTheCure) {
  auto admin = connected();
  ASSERT_TRUE(script(*admin, "CREATE ROLE rs_limited LOGIN CONNECTION LIMIT 0").ok());
  if (PostgresServer::instance().own()) {
    const Status s =
        failure("postgresql://rs_limited@127.0.0.1:" + std::to_string(real_port()) + "/postgres");
    EXPECT_EQ(s.code, Code::unavailable);
    EXPECT_EQ(s.sqlstate, "53300");
    has(s, "pool_max_size");
  }
  ASSERT_TRUE(script(*admin, "DROP ROLE rs_limited").ok());
}

TEST_F(ConnectionFaultTest, AnUnresolvableHostIsNamed) {
  const std::string impossible = std::string(70, 'x') + ".invalid";
  const Status s = failure("postgresql://me@" + impossible + "/db");
  EXPECT_EQ(s.code, Code::unavailable);
  has(s, "cannot resolve host name \"" + impossible);
}

TEST_F(ConnectionFaultTest, ConnectsThroughANameAndThroughTheUnixSocket) {
  if (!PostgresServer::instance().own()) GTEST_SKIP() << "needs a known socket directory";
  const std::string port = std::to_string(real_port());
  EXPECT_EQ(one(*connected({}, "postgresql://postgres@localhost:" + port + "/postgres"), "SELECT 1"), "1");
  const std::string socket =
      "host=" + PostgresServer::instance().socket_directory() + " port=" + port + " user=postgres";
  EXPECT_EQ(one(*connected({}, socket), "SELECT inet_client_addr() IS NULL"), "t");
}

TEST_F(ConnectionFaultTest, AServerThatHangsWhileConnectingCostsTheConnectTimeout) {
  TcpProxy proxy(io_, static_cast<std::uint16_t>(real_port()));
  proxy.stall();
  ConnectionOptions options;
  options.connect_timeout = 100 * kMilli;
  const Status s = failure(with_port(url(), proxy.port()), options);
  EXPECT_EQ(s.code, Code::unavailable);
  has(s, "within connect_timeout");
  EXPECT_EQ(proxy.accepted(), 1);
}

TEST_F(ConnectionFaultTest, AServerThatHangsInAPipelineCostsTheCommandTimeoutAndIsInDoubt) {
  TcpProxy proxy(io_, static_cast<std::uint16_t>(real_port()));
  ConnectionOptions options;
  options.command_timeout = 3 * kSecond;  // until then the server answers, also on a busy machine
  auto c = connected(options, with_port(url(), proxy.port()));
  EXPECT_EQ(one(*c, "SELECT 1"), "1");
  proxy.stall();
  const PipelineResult r = run(*c, "SELECT 1");
  EXPECT_EQ(r.status.code, Code::in_doubt);
  has(r.status, "no answer within 3000 ms");
  EXPECT_GT(proxy.held_back(), 0u) << "the server did execute it";
  EXPECT_FALSE(c->open());
}

TEST_F(ConnectionFaultTest, GoesOnToTheNextHost) {
  const ClosedPort dead(io_);
  TcpProxy hanging(io_, static_cast<std::uint16_t>(real_port()));
  hanging.stall();
  ConnInfo info = info_of(url());
  HostPort good = info.hosts[0];
  info.hosts = {{"127.0.0.1", "", dead.text()}, {"127.0.0.1", "", std::to_string(hanging.port())}, good};
  ConnectionOptions options;
  options.connect_timeout = 5 * kSecond;
  auto c = Connection::create(io_, info, options);
  const Status s = connect(*c);
  ASSERT_TRUE(s.ok()) << s.message;
  EXPECT_NE(c->peer().find(":" + good.port + "/"), std::string::npos) << c->peer();
  EXPECT_EQ(one(*c, "SELECT 1"), "1");
}

TEST_F(ConnectionFaultTest, HonoursTargetSessionAttrs) {
  ConnInfo info = info_of(url());
  const auto with = [&](const char* attrs) {
    info.target_session_attrs = attrs;
    auto c = Connection::create(io_, info, {});
    return connect(*c);
  };
  for (const char* attrs : {"any", "read-write", "primary", "prefer-standby"})
    EXPECT_TRUE(with(attrs).ok()) << attrs;
  for (const char* attrs : {"standby", "read-only"}) EXPECT_EQ(with(attrs).code, Code::unavailable) << attrs;
  info.hosts.push_back(info.hosts[0]);
  has(with("standby"), "target_session_attrs=standby");
}

TEST_F(ConnectionFaultTest, CloseWhileConnectingAnswersClosed) {
  TcpProxy proxy(io_, static_cast<std::uint16_t>(real_port()));
  proxy.stall();
  auto c = Connection::create(io_, info_of(with_port(url(), proxy.port())), {});
  std::optional<Status> status;
  c->connect([&](Status s) { status = std::move(s); });
  ASSERT_TRUE(wait_until([&] { return proxy.held_back() > 0 || proxy.accepted() > 0; }));
  c->close();
  EXPECT_FALSE(status);
  ASSERT_TRUE(wait_until([&] { return status.has_value(); }));
  EXPECT_EQ(status->code, Code::closed);
}

TEST_F(ConnectionFaultTest, CloseAtEveryStepOfAConnectIsSafe) {
  for (int step = 0; step < 60; ++step) {
    auto c = Connection::create(io_, info_of(url()), {});
    std::optional<Status> status;
    c->connect([&](Status s) { status = std::move(s); });
    for (int i = 0; i < step && !status; ++i) {
      io_.restart();
      io_.run_one_for(std::chrono::seconds(1));
    }
    c->close();
    c.reset();
    ASSERT_TRUE(wait_until([&] { return status.has_value(); })) << step;
    EXPECT_TRUE(status->ok() || status->code == Code::closed) << status->message;
  }
}

TEST_F(ConnectionFaultTest, CloseInTheMiddleOfAPipelineIsInDoubtAndTwiceIsHarmless) {
  auto c = connected();
  std::optional<Status> status;
  const Statement nap{"", "SELECT pg_sleep(30)"};
  c->run({Call{&nap, {}}}, [&](PipelineResult r) { status = r.status; });
  c->close();
  c->close();
  EXPECT_FALSE(status);
  ASSERT_TRUE(wait_until([&] { return status.has_value(); }));
  EXPECT_EQ(status->code, Code::in_doubt);
}

TEST_F(ConnectionFaultTest, ACallbackMayRunAgainCloseOrLetGoOfTheConnection) {
  const Statement ping{"", "SELECT 1"};
  std::shared_ptr<Connection> c = connected();
  int left = 20;
  std::function<void(PipelineResult)> again = [&](PipelineResult r) {
    EXPECT_TRUE(r.status.ok());
    if (--left > 0) return c->run({Call{&ping, {}}}, again);
    c->close();
    c.reset();
  };
  c->run({Call{&ping, {}}}, again);
  ASSERT_TRUE(wait_until([&] { return left == 0; }));
  EXPECT_FALSE(c);

  c = connected();
  bool done = false;
  c->run({Call{&ping, {}}}, [&](PipelineResult) {
    c.reset();  // the last reference
    done = true;
  });
  ASSERT_TRUE(wait_until([&] { return done; }));

  c = connected();
  auto killer = connected();
  const std::string pid = one(*c, "SELECT pg_backend_pid()");
  c->on_broken([&](const Status&) { c.reset(); });
  EXPECT_EQ(one(*killer, "SELECT pg_terminate_backend(" + pid + ")"), "t");
  ASSERT_TRUE(wait_until([&] { return !c; }));

  c = Connection::create(io_, info_of(url()), {});
  done = false;
  c->connect([&](const Status&) {
    c.reset();
    done = true;
  });
  ASSERT_TRUE(wait_until([&] { return done; }));
}

TEST_F(ConnectionFaultTest, LettingGoDuringAPipelineStillBringsItsAnswer) {
  auto c = connected();
  const Statement ping{"", "SELECT 1"};
  std::optional<Status> status;
  c->run({Call{&ping, {}}}, [&](PipelineResult r) { status = r.status; });
  std::weak_ptr<Connection> weak = c;
  c.reset();
  ASSERT_TRUE(wait_until([&] { return status.has_value(); }));
  EXPECT_TRUE(status->ok());
  EXPECT_TRUE(weak.expired()) << "and then it is gone";
}

TEST_F(ConnectionFaultTest, AnIdleConnectionWakesNobody) {
  auto c = connected();
  EXPECT_EQ(one(*c, "SELECT 1"), "1");
  while (io_.poll() > 0) {
  }
  io_.restart();
  EXPECT_EQ(io_.run_for(std::chrono::milliseconds(50)), 0u);
}

TEST_F(ConnectionFaultTest, AForkedChildThatAbandonsItLeavesTheParentsSessionAlone) {
  auto c = connected();
  const std::string pid = one(*c, "SELECT pg_backend_pid()");
  std::optional<PipelineResult> r;
  const Statement nap{"", "SELECT pg_sleep(0.1), pg_backend_pid()"};
  c->run({Call{&nap, {}}}, [&](PipelineResult result) { r = std::move(result); });
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    c->abandon_after_fork();
    const bool gone = !c->open();
    c->close();
    _exit(gone ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  ASSERT_TRUE(wait_until([&] { return r.has_value(); }));
  ASSERT_TRUE(r->status.ok()) << r->status.message;
  EXPECT_EQ(r->results[0]->text(0, 1), pid);
  EXPECT_EQ(one(*c, "SELECT pg_backend_pid()"), pid);
}
