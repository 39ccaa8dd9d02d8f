// TLS against a real server with certificates of our own authority.
#include "redis_fixture.h"
#include "tcp_proxy.h"

namespace ratesync::testing {
namespace {

class RedisTlsTest : public RedisTest {
 protected:
  static RedisServer& server() {
    static RedisServer one({}, true);
    return one;
  }
  ConnectionOptions tls() {
    ConnectionOptions out = options(server().tls_port());
    out.target.host = "localhost";
    out.target.tls.on = true;
    out.target.tls.ca_file = server().directory() + "/ca.pem";
    return out;
  }
};

TEST_F(RedisTlsTest, ManyCommandsAndBigValues) {
  auto c = connection(tls());
  const std::string big(2'000'000, 'x');
  EXPECT_EQ(text(send(*c, {"SET", "big", big})), "OK");
  EXPECT_TRUE(text(send(*c, {"GET", "big"})) == big);
  int next = 0;
  bool ordered = true;
  for (int i = 0; i < 20'000; ++i)
    c->send(command({"ECHO", std::to_string(i)}), kForever, [&, i](const Result<Reply>& r) {
      ordered = ordered && i == next++ && text(r) == std::to_string(i);
    });
  ASSERT_TRUE(wait_until([&] { return next == 20'000; }));
  EXPECT_TRUE(ordered);
}

TEST_F(RedisTlsTest, ByUrlWithClientCertificate) {
  const std::string dir = server().directory();
  RedisServer strict({"--tls-auth-clients", "yes"}, true);
  const std::string at = "rediss://localhost:" + std::to_string(strict.tls_port()) +
                         "/2?ssl_ca_certs=" + strict.directory() + "/ca.pem";
  auto without = commander(at);
  const Result<Reply> refused = call(*without, {"PING"}, clock_.now() + 5 * kSecond);
  EXPECT_FALSE(refused.ok());
  auto with = commander(at + "&ssl_certfile=" + strict.directory() +
                        "/client.pem&ssl_keyfile=" + strict.directory() + "/client.key");
  EXPECT_EQ(text(call(*with, {"PING"})), "PONG");
}

TEST_F(RedisTlsTest, UnknownAuthorityIsRefusedWithTheCure) {
  ConnectionOptions with = tls();
  with.target.tls.ca_file.clear();
  const Status status = connect(*connection(with));
  EXPECT_EQ(status.code, Code::server);
  EXPECT_NE(status.message.find("ssl_ca_certs=FILE"), std::string::npos) << status.message;
  with.target.tls.verify = false;
  EXPECT_EQ(text(send(*connection(with), {"PING"})), "PONG");
}

TEST_F(RedisTlsTest, ACertificateForAnotherNameIsRefused) {
  ConnectionOptions with = tls();
  with.target.host = "127.0.0.1";
  const Status status = connect(*connection(with));
  EXPECT_EQ(status.code, Code::server);
  EXPECT_NE(status.message.find("was not accepted"), std::string::npos) << status.message;
}

TEST_F(RedisTlsTest, MissingAndBrokenFilesAreTheCallersFault) {
  ConnectionOptions with = tls();
  with.target.tls.ca_file = "/nonexistent/ca.pem";
  Status status = connect(*connection(with));
  EXPECT_EQ(status.code, Code::invalid);
  EXPECT_NE(status.message.find("ssl_ca_certs"), std::string::npos) << status.message;
  with = tls();
  with.target.tls.cert_file = server().directory() + "/log";
  status = connect(*connection(with));
  EXPECT_EQ(status.code, Code::invalid);
  EXPECT_NE(status.message.find("ssl_certfile"), std::string::npos) << status.message;
  with.target.tls.cert_file = server().directory() + "/client.pem";
  status = connect(*connection(with));
  EXPECT_EQ(status.code, Code::invalid) << "the key is not in it";
  EXPECT_NE(status.message.find("ssl_keyfile"), std::string::npos) << status.message;
}

TEST_F(RedisTlsTest, TlsToAPlainPortAndPlainToATlsPort) {
  ConnectionOptions with = tls();
  with.target.port = static_cast<std::uint16_t>(server().port());
  with.connect_timeout = 2 * kSecond;
  Status status = connect(*connection(with));
  EXPECT_FALSE(status.ok());
  EXPECT_NE(status.message.find("redis://"), std::string::npos) << status.message;
  status = connect(*connection(options(server().tls_port())));
  EXPECT_FALSE(status.ok());
}

TEST_F(RedisTlsTest, ASilentServerFailsTheHandshakeInTime) {
  TcpProxy proxy(io_, static_cast<std::uint16_t>(server().tls_port()));
  proxy.stall();
  ConnectionOptions with = tls();
  with.target.port = proxy.port();
  with.connect_timeout = 200 * kMilli;
  const Status status = connect(*connection(with));
  EXPECT_EQ(status.code, Code::unavailable);
  EXPECT_NE(status.message.find("handshake"), std::string::npos) << status.message;
}

TEST_F(RedisTlsTest, KilledServerRecovers) {
  RedisServer own({}, true);
  ConnectionOptions with = tls();
  with.target.port = static_cast<std::uint16_t>(own.tls_port());
  with.target.tls.ca_file = own.directory() + "/ca.pem";
  auto c = connection(with);
  ASSERT_EQ(text(send(*c, {"PING"})), "PONG");
  own.freeze();
  const std::string big(1'000'000, 'x');
  int all = 0;
  for (int i = 0; i < 30; ++i)
    c->send(command({"SET", "k", big}), kForever, [&](const Result<Reply>&) { ++all; });
  io_.restart();
  io_.run_for(std::chrono::milliseconds(50));
  own.kill();
  own.start();
  ASSERT_TRUE(wait_until([&] { return all == 30; }));
  ASSERT_TRUE(wait_until([&] { return text(send(*c, {"PING"})) == "PONG"; }));
}

}  // namespace
}  // namespace ratesync::testing
