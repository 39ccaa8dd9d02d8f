// One connection to a real server: what goes in comes out, in order, and few writes carry it.
#include <asio/post.hpp>

#include "redis_fixture.h"

namespace ratesync::testing {
namespace {

using RedisConnectionTest = RedisTest;

TEST_F(RedisConnectionTest, ConnectsWithTheFirstCommand) {
  auto c = connection(options(shared_server().port()));
  EXPECT_FALSE(c->open());
  EXPECT_EQ(text(send(*c, {"SET", "k", "v"})), "OK");
  EXPECT_TRUE(c->open());
  const Result<Reply> got = send(*c, {"GET", "k"});
  ASSERT_TRUE(got.ok());
  EXPECT_EQ(got.value().kind, Reply::Kind::text);
  EXPECT_EQ(got.value().text, "v");
  EXPECT_EQ(c->reconnects(), 0u);
}

TEST_F(RedisConnectionTest, EveryKindOfReplyComesThrough) {
  auto c = connection(options(shared_server().port()));
  EXPECT_EQ(send(*c, {"GET", "nothing-here"}).value().kind, Reply::Kind::nil);
  const Result<Reply> nested =
      send(*c, {"EVAL", "return {1, -5, 'text', {'deep', {}}, redis.error_reply('ODD one'), false}", "0"});
  ASSERT_TRUE(nested.ok()) << nested.status().message;
  const std::vector<Reply>& items = nested.value().items;
  ASSERT_EQ(items.size(), 6u);
  EXPECT_EQ(items[0].integer, 1);
  EXPECT_EQ(items[1].integer, -5);
  EXPECT_EQ(items[2].text, "text");
  ASSERT_EQ(items[3].items.size(), 2u);
  EXPECT_EQ(items[3].items[0].text, "deep");
  EXPECT_EQ(items[3].items[1].kind, Reply::Kind::array);
  EXPECT_EQ(items[4].kind, Reply::Kind::error);
  EXPECT_EQ(items[5].kind, Reply::Kind::nil);
  EXPECT_EQ(send(*c, {"NO-SUCH-COMMAND"}).value().kind, Reply::Kind::error);
}

TEST_F(RedisConnectionTest, BytesOfAnyKindAndSizeSurvive) {
  auto c = connection(options(shared_server().port()));
  const std::string hostile("\0\r\n$5\r\n*1\r\n\xff", 12);
  std::string big(3'000'000, 'x');
  big[1'000'000] = '\0';
  EXPECT_EQ(text(send(*c, {"SET", hostile, hostile})), "OK");
  EXPECT_EQ(text(send(*c, {"GET", hostile})), hostile);
  EXPECT_EQ(text(send(*c, {"SET", "big", big})), "OK");
  EXPECT_TRUE(text(send(*c, {"GET", "big"})) == big);
  EXPECT_EQ(text(send(*c, {"SET", "", ""})), "OK");
  EXPECT_EQ(text(send(*c, {"GET", ""})), "");
}

TEST_F(RedisConnectionTest, HundredThousandCommandsAreAnsweredInOrderByFewWrites) {
  auto c = connection(options(shared_server().port()));
  ASSERT_TRUE(connect(*c).ok());
  constexpr int kCount = 100'000;
  int next = 0;
  bool ordered = true;
  for (int i = 0; i < kCount; ++i)
    c->send(command({"ECHO", std::to_string(i)}), kForever, [&, i](Result<Reply> r) {
      ordered = ordered && r.ok() && i == next && r.value().text == std::to_string(i);
      ++next;
    });
  ASSERT_TRUE(wait_until([&] { return next == kCount; }));
  EXPECT_TRUE(ordered);
  EXPECT_EQ(c->commands(), static_cast<std::uint64_t>(kCount));
  EXPECT_LT(c->writes(), 500u);
  EXPECT_EQ(c->pending(), 0u);
}

TEST_F(RedisConnectionTest, ALoneCommandLeavesInsideTheCallAndABurstInTwoWrites) {
  auto c = connection(options(shared_server().port()));
  ASSERT_TRUE(connect(*c).ok());
  int answered = 0;
  const auto count = [&](const Result<Reply>&) { ++answered; };
  c->send(command({"PING"}), kForever, count);
  EXPECT_EQ(c->writes(), 1u);
  for (int i = 0; i < 50; ++i) c->send(command({"PING"}), kForever, count);
  EXPECT_EQ(c->writes(), 1u);
  ASSERT_TRUE(wait_until([&] { return answered == 51; }));
  EXPECT_EQ(c->writes(), 2u);
}

TEST_F(RedisConnectionTest, WhatCallbacksSendLeavesTogether) {
  auto c = connection(options(shared_server().port()));
  ASSERT_TRUE(connect(*c).ok());
  // One script's answers arrive in one piece, so their callbacks run in one turn.
  int answered = 0;
  c->send(command({"MULTI"}), kForever, [](const Result<Reply>&) {});
  for (int i = 0; i < 20; ++i)
    c->send(command({"ECHO", "x"}), kForever, [&](const Result<Reply>&) {
      c->send(command({"PING"}), kForever, [&](const Result<Reply>&) { ++answered; });
    });
  c->send(command({"EXEC"}), kForever, [](const Result<Reply>&) {});
  ASSERT_TRUE(wait_until([&] { return answered == 20; }));
  EXPECT_LE(c->writes(), 4u);
}

TEST_F(RedisConnectionTest, ChoosesDatabaseAndTellsItsName) {
  ConnectionOptions with = options(shared_server().port());
  with.db = 5;
  with.client_name = "my app\n1";
  auto c = connection(with);
  const std::string info = text(send(*c, {"CLIENT", "INFO"}));
  EXPECT_NE(info.find(" db=5 "), std::string::npos) << info;
  EXPECT_NE(info.find(" name=my_app_1 "), std::string::npos) << info;
}

TEST_F(RedisConnectionTest, UnixSocket) {
  ConnectionOptions with;
  with.target.path = shared_server().socket();
  auto c = connection(with);
  EXPECT_EQ(text(send(*c, {"PING"})), "PONG");
  with.target.path = std::string(300, 'x');
  auto too_long = connection(with);
  EXPECT_EQ(connect(*too_long).code, Code::invalid);
}

TEST_F(RedisConnectionTest, TheQueueIsBounded) {
  ConnectionOptions with = options(shared_server().port());
  with.max_pending = 3;
  auto c = connection(with);
  std::vector<Code> codes;
  for (int i = 0; i < 5; ++i)
    c->send(command({"PING"}), kForever, [&](const Result<Reply>& r) {
      codes.push_back(r.status().code);
      if (r.ok()) return;
      EXPECT_NE(r.status().message.find("the bounds are 3 commands"), std::string::npos)
          << r.status().message;
    });
  ASSERT_TRUE(wait_until([&] { return codes.size() == 5; }));
  EXPECT_EQ(std::count(codes.begin(), codes.end(), Code::exhausted), 2);
  EXPECT_EQ(std::count(codes.begin(), codes.end(), Code::ok), 3);
}

TEST_F(RedisConnectionTest, ClosingAnswersEveryCommandOnce) {
  auto c = connection(options(shared_server().port()));
  ASSERT_TRUE(connect(*c).ok());
  std::vector<Code> codes;
  for (int i = 0; i < 3; ++i)
    c->send(command({"PING"}), kForever, [&](const Result<Reply>& r) { codes.push_back(r.status().code); });
  c->close(Status::make(Code::closed, "enough"));
  EXPECT_TRUE(codes.empty()) << "answered inside the call";
  c->send(command({"PING"}), kForever, [&](const Result<Reply>& r) { codes.push_back(r.status().code); });
  ASSERT_TRUE(wait_until([&] { return codes.size() == 4; }));
  // The first was written at once, the other two were to follow at the end of the turn.
  EXPECT_EQ(codes, (std::vector{Code::in_doubt, Code::closed, Code::closed, Code::closed}));
}

TEST_F(RedisConnectionTest, LettingGoInsideACallbackIsAllowed) {
  auto c = connection(options(shared_server().port()));
  ASSERT_TRUE(connect(*c).ok());
  int answered = 0;
  Code second = Code::ok;
  c->send(command({"PING"}), kForever, [&](const Result<Reply>&) {
    ++answered;
    c.reset();
  });
  c->send(command({"PING"}), kForever, [&](const Result<Reply>& r) {
    ++answered;
    second = r.status().code;
  });
  ASSERT_TRUE(wait_until([&] { return answered == 2; }));
  EXPECT_NE(second, Code::ok);
}

TEST_F(RedisConnectionTest, FinishLetsCommandsUnderWayBeAnswered) {
  auto c = connection(options(shared_server().port()));
  ASSERT_TRUE(connect(*c).ok());
  int good = 0;
  bool finished = false;
  for (int i = 0; i < 100; ++i)
    c->send(command({"PING"}), kForever, [&](const Result<Reply>& r) { good += r.ok(); });
  c->finish(20 * kSecond, [&] {
    finished = true;
    EXPECT_EQ(good, 100);
  });
  ASSERT_TRUE(wait_until([&] { return finished; }));
  EXPECT_FALSE(c->open());
}

}  // namespace
}  // namespace ratesync::testing
