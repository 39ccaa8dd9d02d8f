// The Commander over one server: scripts that get lost, subscriptions that come back, errors with cures.
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <asio/post.hpp>

#include "redis_fixture.h"

namespace ratesync::testing {
namespace {

class RedisSingleTest : public RedisTest {
 protected:
  // The server is the authority on the SHA1, so that the test needs no implementation of it.
  Script script(Commander& c, std::string name, std::string source) {
    const Result<Reply> sha1 = call(c, {"SCRIPT", "LOAD", source});
    EXPECT_TRUE(sha1.ok()) << sha1.status().message;
    EXPECT_TRUE(call(c, {"SCRIPT", "FLUSH"}).ok());
    return {std::move(name), std::move(source), text(sha1)};
  }
  Script increment(Commander& c) {
    return script(c, "increment", "return redis.call('INCRBY', KEYS[1], ARGV[1])");
  }
  static Command arguments(std::string_view key, std::string_view by) { return command({"1", key, by}); }
  Result<Reply> eval(Commander& c, const Script& s, std::string_view key, std::string_view by) {
    std::optional<Result<Reply>> reply;
    c.eval(s, key, arguments(key, by), kForever, [&](Result<Reply> r) { reply = std::move(r); });
    EXPECT_FALSE(reply) << "answered inside the call";
    EXPECT_TRUE(wait_until([&] { return reply.has_value(); }));
    return reply ? std::move(*reply) : Status::make(Code::internal, "no answer");
  }
  static std::int64_t integer(const Result<Reply>& r) {
    EXPECT_TRUE(r.ok()) << r.status().message;
    return r.ok() ? r.value().integer : -1;
  }
  // How often the server was told this command since it started.
  std::int64_t calls_of(Commander& c, const std::string& name) {
    const std::string stats = text(call(c, {"INFO", "commandstats"}));
    const std::size_t at = stats.find("cmdstat_" + name + ":calls=");
    return at == std::string::npos ? 0 : std::atoll(stats.c_str() + at + name.size() + 15);
  }
};

TEST_F(RedisSingleTest, OneLoadServesAllCallsThatMetNoscript) {
  RedisServer server;
  auto c = commander(server.url());
  const Script s = increment(*c);
  const std::int64_t loads = calls_of(*c, "script|load");
  int good = 0, all = 0;
  for (int i = 0; i < 1'000; ++i)
    c->eval(s, "n", arguments("n", "2"), kForever, [&](const Result<Reply>& r) {
      ++all;
      good += r.ok();
    });
  ASSERT_TRUE(wait_until([&] { return all == 1'000; }));
  EXPECT_EQ(good, 1'000);
  EXPECT_EQ(text(call(*c, {"GET", "n"})), "2000") << "each exactly once";
  EXPECT_EQ(calls_of(*c, "script|load"), loads + 1);
}

TEST_F(RedisSingleTest, ScriptsSurviveFlushAndRestart) {
  RedisServer server;
  auto c = commander(server.url());
  const Script s = increment(*c);
  EXPECT_EQ(integer(eval(*c, s, "n", "1")), 1);
  // A flush in the middle of a burst.
  int good = 0, all = 0;
  for (int i = 0; i < 300; ++i) {
    if (i % 100 == 50) c->call("", command({"SCRIPT", "FLUSH"}), kForever, [](const Result<Reply>&) {});
    c->eval(s, "n", arguments("n", "1"), kForever, [&](const Result<Reply>& r) {
      ++all;
      good += r.ok();
    });
  }
  ASSERT_TRUE(wait_until([&] { return all == 300; }));
  EXPECT_EQ(good, 300);
  EXPECT_EQ(integer(eval(*c, s, "n", "0")), 301);
  int reconnected = 0;
  c->on_reconnect([&] { ++reconnected; });
  server.kill();
  server.start();
  ASSERT_TRUE(wait_until([&] { return eval(*c, s, "n", "0").ok(); }));
  EXPECT_EQ(integer(eval(*c, s, "n", "1")), 1) << "empty after the restart";
  EXPECT_EQ(reconnected, 1);
}

TEST_F(RedisSingleTest, AScriptThatCannotBeLoadedIsAnErrorNotALoop) {
  RedisServer server;
  auto c = commander(server.url());
  const Script broken{"broken", "this is no Lua", std::string(40, 'a')};
  const Result<Reply> r = eval(*c, broken, "n", "1");
  EXPECT_EQ(r.status().code, Code::server);
  EXPECT_NE(r.status().message.find("compiling"), std::string::npos) << r.status().message;
  const Script liar{"liar", "return 1", std::string(40, 'b')};
  EXPECT_EQ(eval(*c, liar, "n", "1").status().sqlstate, "NOSCRIPT");
  EXPECT_EQ(text(call(*c, {"PING"})), "PONG");
}

TEST_F(RedisSingleTest, ErrorsOfTheServerSayTheCure) {
  RedisServer server({"--user", "few", "on", ">pw", "~mine*", "&*", "+@all", "-set"});
  auto c = commander("redis://few:pw@127.0.0.1:" + std::to_string(server.port()));
  const Result<Reply> forbidden = call(*c, {"SET", "mine", "x"});
  EXPECT_EQ(forbidden.status().code, Code::server);
  EXPECT_EQ(forbidden.status().sqlstate, "NOPERM");
  EXPECT_NE(forbidden.status().message.find("ACL SETUSER few"), std::string::npos)
      << forbidden.status().message;
  EXPECT_EQ(call(*c, {"GET", "other"}).status().sqlstate, "NOPERM");
  EXPECT_TRUE(call(*c, {"LPUSH", "mine", "x"}).ok());
  EXPECT_EQ(call(*c, {"GET", "mine"}).status().sqlstate, "WRONGTYPE");

  auto admin = commander(server.url());
  ASSERT_TRUE(call(*admin, {"CONFIG", "SET", "maxmemory", "1"}).ok());
  const Result<Reply> full = call(*admin, {"SET", "k", "v"});
  EXPECT_EQ(full.status().sqlstate, "OOM");
  EXPECT_NE(full.status().message.find("maxmemory-policy"), std::string::npos) << full.status().message;
  const Script s = increment(*admin);
  EXPECT_EQ(eval(*admin, s, "n", "1").status().sqlstate, "OOM") << "also from inside a script";
  ASSERT_TRUE(call(*admin, {"CONFIG", "SET", "maxmemory", "0"}).ok());
  EXPECT_EQ(integer(eval(*admin, s, "n", "1")), 1);
}

TEST_F(RedisSingleTest, TheRightsThatTheManualNamesSuffice) {
  RedisServer server({"--user", "app", "on", ">pw", "~limits*", "&limits*", "+@all", "-@admin", "-@dangerous",
                      "+info", "+role"});
  auto c = commander("redis://app:pw@127.0.0.1:" + std::to_string(server.port()));
  auto admin = commander(server.url());
  const Script s = increment(*admin);
  EXPECT_EQ(integer(eval(*c, s, "limits:n", "3")), 3) << "with its load";
  c->subscribe("limits:freed", [](std::string_view) {});
  ASSERT_TRUE(wait_until([&] { return c->subscribed(); }));
  EXPECT_EQ(call(*c, {"PUBLISH", "limits:freed", "x"}).value().integer, 1);
  EXPECT_TRUE(call(*c, {"INFO"}).ok());
  EXPECT_TRUE(call(*c, {"SCAN", "0"}).ok());
  EXPECT_EQ(call(*c, {"GET", "elsewhere"}).status().sqlstate, "NOPERM");
}

// A channel that may not be heard is asked for again now and then, not in a busy loop.
TEST_F(RedisSingleTest, AForbiddenChannelIsNoBusyLoop) {
  RedisServer server({"--user", "few", "on", ">pw", "~*", "resetchannels", "+@all"});
  auto c = commander("redis://few:pw@127.0.0.1:" + std::to_string(server.port()));
  c->subscribe("one", [](std::string_view) {});
  auto admin = commander(server.url());
  ASSERT_TRUE(wait_until([&] { return calls_of(*admin, "role") >= 3; }));
  EXPECT_FALSE(c->subscribed());
  EXPECT_EQ(text(call(*c, {"PING"})), "PONG");
  ASSERT_EQ(text(call(*admin, {"ACL", "SETUSER", "few", "&*"})), "OK");
  ASSERT_TRUE(wait_until([&] { return c->subscribed(); })) << "and it recovers";
  EXPECT_LT(calls_of(*admin, "role"), 60);
}

TEST_F(RedisSingleTest, ADemotedPrimaryIsLeftAndFoundAgainWhenPromoted) {
  RedisServer server, other;
  auto c = commander(server.url());
  EXPECT_EQ(text(call(*c, {"SET", "k", "v"})), "OK");
  auto admin = connection(options(server.port()));
  ASSERT_EQ(text(send(*admin, {"REPLICAOF", "127.0.0.1", std::to_string(other.port())})), "OK");
  const Result<Reply> refused = call(*c, {"SET", "k", "w"});
  EXPECT_EQ(refused.status().code, Code::unavailable) << "certainly not executed";
  EXPECT_EQ(refused.status().sqlstate, "READONLY");
  ASSERT_TRUE(wait_until([&] {
    (void)call(*c, {"SET", "k", "w"}, clock_.now() + 100 * kMilli);
    return c->down();
  }));
  ASSERT_EQ(text(send(*admin, {"REPLICAOF", "NO", "ONE"})), "OK");
  ASSERT_TRUE(wait_until([&] { return text(call(*c, {"SET", "k", "x"})) == "OK"; }));
}

TEST_F(RedisSingleTest, ScanFindsEveryKeyOnceAndStopsAtItsBound) {
  RedisServer server;
  auto c = commander(server.url());
  for (int i = 0; i < 5'000; ++i)
    c->call("", command({"SET", "p:" + std::to_string(i), "1"}), kForever, [](const Result<Reply>&) {});
  ASSERT_EQ(text(call(*c, {"SET", "other", "1"})), "OK");
  std::optional<Result<std::vector<std::string>>> found;
  c->scan("p:*", 100'000, kForever, [&](auto r) { found = std::move(r); });
  ASSERT_TRUE(wait_until([&] { return found.has_value(); }));
  ASSERT_TRUE(found->ok()) << found->status().message;
  EXPECT_EQ(found->value().size(), 5'000u);
  found.reset();
  c->scan("p:*", 10, kForever, [&](auto r) { found = std::move(r); });
  ASSERT_TRUE(wait_until([&] { return found.has_value(); }));
  EXPECT_EQ(found->value().size(), 10u);
}

TEST_F(RedisSingleTest, SubscriptionsAreRestoredAfterARestart) {
  RedisServer server;
  auto c = commander(server.url());
  std::vector<std::string> heard;
  EXPECT_FALSE(c->subscribed());
  c->subscribe("one", [&](std::string_view m) { heard.push_back("one:" + std::string(m)); });
  c->subscribe("two", [&](std::string_view m) { heard.push_back("two:" + std::string(m)); });
  ASSERT_TRUE(wait_until([&] { return c->subscribed(); }));
  c->subscribe("three", [&](std::string_view m) { heard.push_back("three:" + std::string(m)); });
  EXPECT_FALSE(c->subscribed()) << "not before the server confirmed it";
  ASSERT_TRUE(wait_until([&] { return c->subscribed(); }));
  EXPECT_EQ(call(*c, {"PUBLISH", "one", "hello"}).value().integer, 1);
  EXPECT_EQ(call(*c, {"PUBLISH", "three", std::string("a\0b", 3)}).value().integer, 1);
  ASSERT_TRUE(wait_until([&] { return heard.size() == 2; }));
  EXPECT_EQ(heard[1], std::string("three:a\0b", 9));
  server.kill();
  ASSERT_TRUE(wait_until([&] { return !c->subscribed(); }));
  server.start();
  ASSERT_TRUE(wait_until([&] { return c->subscribed(); }));
  ASSERT_TRUE(wait_until([&] { return call(*c, {"PUBLISH", "two", "again"}).ok(); }));
  ASSERT_TRUE(wait_until([&] { return heard.size() == 3; }));
  EXPECT_EQ(heard[2], "two:again");
  store::Stats stats;
  c->add_stats(stats);
  EXPECT_EQ(stats.connections_open, 2u);
  EXPECT_GE(stats.reconnects, 2u);
}

TEST_F(RedisSingleTest, WithAPoolOfOneThereIsNoSubscription) {
  CommanderOptions with;
  with.pool_max_size = 1;
  auto c = commander(shared_server().url(), with);
  c->subscribe("one", [](std::string_view) {});
  EXPECT_EQ(text(call(*c, {"PING"})), "PONG");
  EXPECT_FALSE(c->subscribed());
  store::Stats stats;
  c->add_stats(stats);
  EXPECT_EQ(stats.connections_open, 1u);
}

TEST_F(RedisSingleTest, CloseAnswersWhatIsUnderWayAndRefusesTheRest) {
  RedisServer server;
  auto c = commander(server.url());
  c->subscribe("one", [](std::string_view) {});
  EXPECT_EQ(text(call(*c, {"PING"})), "PONG");
  std::vector<Code> codes;
  const auto note = [&](const Result<Reply>& r) { codes.push_back(r.status().code); };
  c->call("", command({"SET", "k", "v"}), kForever, note);
  bool closed = false;
  c->close([&] { closed = true; });
  c->call("", command({"SET", "k", "w"}), kForever, note);
  ASSERT_TRUE(wait_until([&] { return closed && codes.size() == 2; }));
  EXPECT_EQ(std::count(codes.begin(), codes.end(), Code::ok), 1);
  EXPECT_EQ(std::count(codes.begin(), codes.end(), Code::closed), 1);
  EXPECT_EQ(text(send(*connection(options(server.port())), {"GET", "k"})), "v");
}

TEST_F(RedisSingleTest, ClosingAHungServerTakesNoLongerThanItsGrace) {
  RedisServer server;
  auto c = commander(server.url());
  EXPECT_EQ(text(call(*c, {"PING"})), "PONG");
  server.freeze();
  Code code = Code::ok;
  c->call("", command({"PING"}), kForever, [&](const Result<Reply>& r) { code = r.status().code; });
  bool closed = false;
  c->close([&] { closed = true; });
  ASSERT_TRUE(wait_until([&] { return closed; }));
  EXPECT_EQ(code, Code::in_doubt);
}

TEST_F(RedisSingleTest, LettingGoUnclosedAnswersEveryCall) {
  auto c = commander(shared_server().url());
  const Script s = increment(*c);
  int all = 0;
  for (int i = 0; i < 10; ++i)
    c->eval(s, "gone", arguments("gone", "1"), kForever, [&](const Result<Reply>&) { ++all; });
  c.reset();
  ASSERT_TRUE(wait_until([&] { return all == 10; }));
}

TEST_F(RedisSingleTest, AForkedChildClosesItsDescriptorAndTheParentGoesOn) {
  auto c = commander(shared_server().url());
  c->subscribe("one", [](std::string_view) {});
  ASSERT_TRUE(wait_until([&] { return c->subscribed(); }));
  EXPECT_EQ(text(call(*c, {"SET", "forked", "no"})), "OK");
  const auto sockets = [] {
    int count = 0;
    struct stat s;
    for (int fd = 3; fd < 256; ++fd) count += fstat(fd, &s) == 0 && S_ISSOCK(s.st_mode);
    return count;
  };
  ASSERT_GE(sockets(), 2);
  const int before = sockets();
  const pid_t child = fork();
  if (child == 0) {
    c->abandon_after_fork();
    (void)c.release();
    _exit(sockets() == before - 2 ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0) << "the child closes both of its sockets";
  EXPECT_EQ(text(call(*c, {"GET", "forked"})), "no");
  EXPECT_TRUE(c->subscribed());
}

}  // namespace
}  // namespace ratesync::testing
