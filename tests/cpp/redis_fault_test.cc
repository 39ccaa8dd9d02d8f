// What a Redis connection does when the server hangs, dies, refuses or talks nonsense. Each test ends
// with "and it recovers", or with why it cannot.
#include <asio/ip/tcp.hpp>
#include <asio/write.hpp>

#include "redis_fixture.h"
#include "tcp_proxy.h"

namespace ratesync::testing {
namespace {

using RedisFaultTest = RedisTest;

// Accepts, and answers the first read of each connection with the first text, and so on; the last one is
// said again and again, or once, and then it hangs up.
class Parrot {
 public:
  Parrot(asio::io_context& io, std::vector<std::string> says, bool hangs_up)
      : acceptor_(io, {asio::ip::address_v4::loopback(), 0}), says_(std::move(says)), hangs_up_(hangs_up) {
    accept();
  }
  [[nodiscard]] int port() const { return acceptor_.local_endpoint().port(); }
  [[nodiscard]] int accepted() const { return accepted_; }

 private:
  struct Peer {
    explicit Peer(const asio::any_io_executor& io) : socket(io) {}
    asio::ip::tcp::socket socket;
    std::array<char, 4096> input{};
    std::size_t reads = 0;
  };
  void accept() {
    auto peer = std::make_shared<Peer>(acceptor_.get_executor());
    acceptor_.async_accept(peer->socket, [this, peer](asio::error_code ec) {
      if (ec) return;
      ++accepted_;
      listen(peer);
      accept();
    });
  }
  void listen(const std::shared_ptr<Peer>& peer) {
    peer->socket.async_read_some(asio::buffer(peer->input), [this, peer](asio::error_code ec, std::size_t) {
      if (ec) return;
      const std::size_t turn = std::min(peer->reads++, says_.size() - 1);
      asio::write(peer->socket, asio::buffer(says_[turn]), ec);
      if (hangs_up_ && turn + 1 == says_.size())
        peer->socket.close(ec);
      else
        listen(peer);
    });
  }
  asio::ip::tcp::acceptor acceptor_;
  const std::vector<std::string> says_;
  const bool hangs_up_;
  int accepted_ = 0;
};

const std::string kGreeting = "+OK\r\n+PONG\r\n";

TEST_F(RedisFaultTest, KilledServerLeavesInDoubtAndComesBack) {
  RedisServer server;
  auto c = connection(options(server.port()));
  ASSERT_EQ(text(send(*c, {"SET", "k", "v"})), "OK");
  std::string lost;
  c->on_lost([&](const Status& why) { lost += why.message; });
  int up = 0;
  c->on_up([&] { ++up; });
  server.freeze();
  std::vector<Code> codes;
  for (int i = 0; i < 3; ++i)
    c->send(command({"INCR", "n"}), kForever,
            [&](const Result<Reply>& r) { codes.push_back(r.status().code); });
  io_.restart();
  io_.poll();
  server.kill();
  ASSERT_TRUE(wait_until([&] { return codes.size() == 3; }));
  EXPECT_EQ(codes, std::vector<Code>(3, Code::in_doubt));
  EXPECT_FALSE(lost.empty());

  server.start();
  ASSERT_TRUE(wait_until([&] {
    if (c->open()) return true;
    (void)send(*c, {"PING"});
    return c->open();
  }));
  EXPECT_EQ(send(*c, {"GET", "k"}).value().kind, Reply::Kind::nil) << "the memory was lost";
  EXPECT_EQ(up, 1);
  EXPECT_EQ(c->reconnects(), 1u);
  EXPECT_FALSE(c->down());
}

TEST_F(RedisFaultTest, NobodyThereFailsFastAfterTwoTriesAndRecoversUnasked) {
  const HeldPort held;
  const int port = held.number();
  auto c = connection(options(port));
  const Result<Reply> first = send(*c, {"PING"});
  ASSERT_FALSE(first.ok());
  EXPECT_EQ(first.status().code, Code::unavailable);
  EXPECT_NE(first.status().message.find(std::to_string(port)), std::string::npos) << first.status().message;
  EXPECT_TRUE(c->down());
  const Result<Reply> second = send(*c, {"PING"});
  EXPECT_EQ(second.status().code, Code::unavailable);
  EXPECT_NE(second.status().message.find("Redis is down"), std::string::npos) << second.status().message;
  // Somebody answers on that port from now on.
  RedisServer server;
  TcpProxy proxy(io_, static_cast<std::uint16_t>(server.port()), static_cast<std::uint16_t>(port));
  ASSERT_TRUE(wait_until([&] { return !c->down() && c->open(); })) << "nobody asked, it probes by itself";
  EXPECT_EQ(text(send(*c, {"PING"})), "PONG");
}

TEST_F(RedisFaultTest, AServerThatHangsIsDroppedAfterTheCommandTimeout) {
  RedisServer server;
  ConnectionOptions with = options(server.port());
  with.command_timeout = 3 * kSecond;  // until then the server answers, also on a busy machine
  auto c = connection(with);
  ASSERT_EQ(text(send(*c, {"PING"})), "PONG");
  server.freeze();
  const Result<Reply> lost = send(*c, {"PING"});
  EXPECT_EQ(lost.status().code, Code::in_doubt);
  EXPECT_NE(lost.status().message.find("no answer within 3000 ms"), std::string::npos)
      << lost.status().message;
  EXPECT_FALSE(c->open());
  server.thaw();
  ASSERT_TRUE(wait_until([&] { return text(send(*c, {"PING"})) == "PONG"; }));
}

TEST_F(RedisFaultTest, AServerThatAcceptsAndIsSilentFailsTheConnectInTime) {
  RedisServer server;
  TcpProxy proxy(io_, static_cast<std::uint16_t>(server.port()));
  proxy.stall();
  ConnectionOptions with = options(proxy.port());
  with.connect_timeout = 150 * kMilli;
  auto c = connection(with);
  const Status status = connect(*c);
  EXPECT_EQ(status.code, Code::unavailable);
  EXPECT_NE(status.message.find("does not answer"), std::string::npos) << status.message;
}

TEST_F(RedisFaultTest, WhatWasNotSentHasADeadlineAndIsNeverExecuted) {
  RedisServer server;
  TcpProxy proxy(io_, static_cast<std::uint16_t>(server.port()));
  proxy.stall();
  ConnectionOptions with = options(proxy.port());
  auto c = connection(with);
  std::optional<Status> early;
  c->send(command({"INCR", "n"}), clock_.now() + 50 * kMilli,
          [&](const Result<Reply>& r) { early = r.status(); });
  ASSERT_TRUE(wait_until([&] { return early.has_value(); }));
  EXPECT_EQ(early->code, Code::timeout) << early->message;
  c->close(Status::make(Code::closed, ""));
  auto direct = connection(options(server.port()));
  EXPECT_EQ(send(*direct, {"GET", "n"}).value().kind, Reply::Kind::nil);
}

TEST_F(RedisFaultTest, AFullSocketKeepsTheRestUnsent) {
  RedisServer server;
  ConnectionOptions with = options(server.port());
  with.command_timeout = 60 * kSecond;
  auto c = connection(with);
  ASSERT_TRUE(connect(*c).ok());
  server.freeze();
  // More than all socket buffers take.
  const std::string big(1'000'000, 'x');
  int in_doubt = 0, late = 0, all = 0;
  constexpr int kCount = 40;
  for (int i = 0; i < kCount; ++i)
    c->send(command({"APPEND", "log", big}), clock_.now() + 200 * kMilli, [&](const Result<Reply>& r) {
      ++all;
      in_doubt += r.status().code == Code::in_doubt;
      late += r.status().code == Code::timeout;
    });
  ASSERT_TRUE(wait_until([&] { return late > 0; }));
  server.thaw();
  ASSERT_TRUE(wait_until([&] { return all == kCount; }));
  EXPECT_EQ(in_doubt, 0);
  const Result<Reply> length = send(*c, {"STRLEN", "log"});
  ASSERT_TRUE(length.ok()) << length.status().message;
  EXPECT_EQ(length.value().integer, (kCount - late) * 1'000'000)
      << "late ones were not executed, the others once";
}

// At every byte of an answer: what was complete counts, the rest is in doubt, and each is told once.
TEST_F(RedisFaultTest, CutAtEveryByteOfTheReplies) {
  const std::vector<std::string> replies = {"$5\r\nhello\r\n", "*3\r\n:-1\r\n$-1\r\n*1\r\n+deep\r\n",
                                            "-ERR no\r\n", ":12\r\n"};
  std::string all;
  for (const std::string& one : replies) all += one;
  for (std::size_t cut = 0; cut <= all.size(); ++cut) {
    Parrot parrot(io_, {kGreeting, all.substr(0, cut)}, true);
    auto c = connection(options(parrot.port()));
    std::vector<Code> codes;
    for (std::size_t i = 0; i < replies.size(); ++i)
      c->send(command({"GET", "k"}), kForever,
              [&](const Result<Reply>& r) { codes.push_back(r.status().code); });
    ASSERT_TRUE(wait_until([&] { return codes.size() == replies.size(); })) << cut;
    std::vector<Code> expected;
    std::size_t end = 0;
    for (const std::string& one : replies)
      expected.push_back((end += one.size()) <= cut ? Code::ok : Code::in_doubt);
    EXPECT_EQ(codes, expected) << cut;
    EXPECT_EQ(c->pending(), 0u);
    c->close(Status::make(Code::closed, ""));
  }
}

// The same for the handshake: nothing was sent yet, so nothing is in doubt.
TEST_F(RedisFaultTest, CutAtEveryByteOfTheHandshake) {
  for (std::size_t cut = 0; cut < kGreeting.size(); ++cut) {
    Parrot parrot(io_, {kGreeting.substr(0, cut)}, true);
    auto c = connection(options(parrot.port()));
    std::vector<Code> codes;
    for (int i = 0; i < 2; ++i)
      c->send(command({"GET", "k"}), kForever,
              [&](const Result<Reply>& r) { codes.push_back(r.status().code); });
    ASSERT_TRUE(wait_until([&] { return codes.size() == 2; })) << cut;
    EXPECT_EQ(codes, std::vector<Code>(2, Code::unavailable)) << cut;
    EXPECT_EQ(parrot.accepted(), 2) << "tried twice, then down";
    c->close(Status::make(Code::closed, ""));
  }
}

TEST_F(RedisFaultTest, WhatIsNoRedisIsSaidSo) {
  for (const char* nonsense :
       {"HTTP/1.1 400 Bad Request\r\n\r\n", "*2000000000\r\n", "$-7\r\n", ":not a number\r\n",
        "*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n*1\r\n:1\r\n",
        "\x15\x03\x01\x00\x02\x02\x46"}) {
    Parrot parrot(io_, {nonsense}, false);
    ConnectionOptions with = options(parrot.port());
    with.connect_timeout = kSecond;
    auto c = connection(with);
    const Status status = connect(*c);
    EXPECT_FALSE(status.ok()) << nonsense;
    if (nonsense[0] == 'H') {
      EXPECT_EQ(status.code, Code::protocol);
      EXPECT_NE(status.message.find("does not speak the Redis protocol"), std::string::npos)
          << status.message;
    }
  }
}

TEST_F(RedisFaultTest, AnswersThatNobodyAskedForEndTheConnection) {
  Parrot parrot(io_, {kGreeting + "+A\r\n+B\r\n"}, false);
  auto c = connection(options(parrot.port()));
  std::vector<std::string> lost;
  c->on_lost([&](const Status& why) { lost.push_back(why.message); });
  ASSERT_TRUE(connect(*c).ok());
  ASSERT_TRUE(wait_until([&] { return !lost.empty(); }));
  EXPECT_NE(lost.at(0).find("not asked"), std::string::npos) << lost.at(0);
}

TEST_F(RedisFaultTest, WrongPasswordSaysTheCureAndDoesNotCountAsDown) {
  RedisServer server({"--requirepass", "right", "--user", "app", "on", ">apppw", "~*", "&*", "+@all"});
  ConnectionOptions with = options(server.port());
  const Result<Reply> none = send(*connection(with), {"PING"});
  EXPECT_EQ(none.status().code, Code::server);
  EXPECT_EQ(none.status().sqlstate, "NOAUTH");
  EXPECT_NE(none.status().message.find("redis://:PASSWORD@host"), std::string::npos) << none.status().message;
  with.password = "hunter2";
  auto wrong = connection(with);
  const Result<Reply> refused = send(*wrong, {"PING"});
  EXPECT_EQ(refused.status().sqlstate, "WRONGPASS");
  EXPECT_EQ(refused.status().message.find("hunter2"), std::string::npos) << refused.status().message;
  for (int i = 0; i < 3; ++i) EXPECT_EQ(send(*wrong, {"PING"}).status().code, Code::server);
  EXPECT_FALSE(wrong->down()) << "the server is there";
  with.password = "right";
  EXPECT_EQ(text(send(*connection(with), {"PING"})), "PONG");
  with.user = "app";
  with.password = "apppw";
  EXPECT_EQ(text(send(*connection(with), {"ACL", "WHOAMI"})), "app");
}

TEST_F(RedisFaultTest, AUserWithFewRightsStillConnects) {
  RedisServer server({"--user", "few", "on", ">pw", "~*", "&*", "+evalsha", "+get"});
  ConnectionOptions with = options(server.port());
  with.user = "few";
  with.password = "pw";
  with.primary_only = true;
  auto c = connection(with);
  const Result<Reply> got = send(*c, {"GET", "k"});
  ASSERT_TRUE(got.ok()) << got.status().message;
  EXPECT_EQ(got.value().kind, Reply::Kind::nil);
}

TEST_F(RedisFaultTest, PasswordWhereNoneIsWantedAndDatabaseOutOfRange) {
  ConnectionOptions with = options(shared_server().port());
  with.password = "x";
  const Status status = connect(*connection(with));
  EXPECT_EQ(status.code, Code::server);
  EXPECT_NE(status.message.find("remove it from the url"), std::string::npos) << status.message;
  with.password.clear();
  with.db = 9'999;
  EXPECT_NE(connect(*connection(with)).message.find("\"databases\""), std::string::npos);
}

TEST_F(RedisFaultTest, ARefusedHandshakeIsTriedAgainWithPauses) {
  Parrot parrot(io_, {"-LOADING Redis is loading the dataset in memory\r\n"}, true);
  auto c = connection(options(parrot.port()));
  const Result<Reply> reply = send(*c, {"PING"});
  EXPECT_EQ(reply.status().code, Code::unavailable);
  EXPECT_EQ(reply.status().sqlstate, "LOADING");
  EXPECT_EQ(parrot.accepted(), 2) << "down after two tries";
}

TEST_F(RedisFaultTest, AReplicaIsNoPrimaryUntilItIsPromoted) {
  RedisServer primary;
  RedisServer replica({"--replicaof", "127.0.0.1", std::to_string(primary.port())});
  ConnectionOptions with = options(replica.port());
  with.primary_only = true;
  auto c = connection(with);
  const Status status = connect(*c);
  EXPECT_EQ(status.code, Code::unavailable);
  EXPECT_NE(status.message.find("redis+sentinel://"), std::string::npos) << status.message;
  auto any = connection(options(replica.port()));
  EXPECT_EQ(text(send(*any, {"REPLICAOF", "NO", "ONE"})), "OK");
  ASSERT_TRUE(wait_until([&] { return text(send(*c, {"PING"})) == "PONG"; }));
}

TEST_F(RedisFaultTest, RetargetMovesWhatWaitsToTheNewServer) {
  RedisServer one, two;
  auto c = connection(options(one.port()));
  ASSERT_EQ(text(send(*c, {"SET", "who", "one"})), "OK");
  EXPECT_EQ(text(send(*connection(options(two.port())), {"SET", "who", "two"})), "OK");
  std::vector<std::string> answers;
  const auto note = [&](const Result<Reply>& r) { answers.push_back(text(r)); };
  c->send(command({"GET", "who"}), kForever, note);  // leaves at once
  c->retarget(options(two.port()).target);
  c->send(command({"GET", "who"}), kForever, note);
  ASSERT_TRUE(wait_until([&] { return answers.size() == 2; }));
  EXPECT_EQ(answers, (std::vector<std::string>{"one", "two"}));
  one.kill();
  EXPECT_EQ(text(send(*c, {"GET", "who"})), "two");
}

}  // namespace
}  // namespace ratesync::testing
