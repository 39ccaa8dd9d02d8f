// The Commander over a Redis Cluster of three primaries, one of them with a replica, all real.

#include <algorithm>

#include "ratesync/base/format.h"
#include "ratesync/redis/cluster.h"
#include "redis_cluster_fixture.h"

namespace ratesync::testing {
namespace {

const Script kPut = {"put", "redis.call('SET', KEYS[1], ARGV[1]) return redis.call('GET', KEYS[1])",
                     "f2db93b4cb5b30b12a9c9ba8aa5e2d5a4d70da7d"};

TEST_F(RedisClusterTest, SendsEachKeyToItsOwner) {
  Commander& c = cluster_commander();
  EXPECT_TRUE(connect_all(c).ok());
  EXPECT_TRUE(c.clustered());
  for (int i = 0; i < 30; ++i) {
    const std::string key = formatted("{{t{}}}:x", i);
    EXPECT_EQ(text(keyed(c, key, {"SET", key, "v"})), "OK");
    EXPECT_EQ(say(0, {"CLUSTER", "KEYSLOT", key}).value().integer, c.slot_of(key));
  }
  const std::string odd("\xff\x00{\xfe}\x80", 6);
  EXPECT_EQ(say(0, {"CLUSTER", "KEYSLOT", odd}).value().integer, c.slot_of(odd));
  EXPECT_EQ(text(keyed(c, "", {"PING"})), "PONG");
}

TEST_F(RedisClusterTest, NeedsNoConnectBeforeTheFirstCall) {
  Commander& c = cluster_commander();
  EXPECT_EQ(text(keyed(c, "a", {"SET", "a", "1"})), "OK");
}

TEST_F(RedisClusterTest, FindsTheClusterFromAnySeedThatLives) {
  Commander& c = cluster_commander("redis+cluster://127.0.0.1:1,127.0.0.1:2,127.0.0.1:" + port(3));
  EXPECT_TRUE(connect_all(c).ok());
  EXPECT_EQ(text(keyed(c, key_at(0), {"SET", key_at(0), "1"})), "OK");
}

TEST_F(RedisClusterTest, IsFoundBehindAPlainUrlAlsoOfAReplica) {
  for (const int node : {0, 3}) {
    Commander& c = cluster_commander("redis://127.0.0.1:" + port(node));
    int ups = 0;
    c.on_reconnect([&] { ++ups; });
    EXPECT_TRUE(connect_all(c).ok());
    EXPECT_TRUE(c.clustered());
    for (int i = 0; i < 3; ++i) EXPECT_EQ(text(keyed(c, key_at(i), {"SET", key_at(i), "1"})), "OK");
    EXPECT_GT(ups, 0);
  }
}

TEST_F(RedisClusterTest, IsFoundByCallsThatDoNotWaitForConnect) {
  Commander& c = cluster_commander("redis://127.0.0.1:" + port(0));
  std::vector<std::string> answers;
  for (int i = 0; i < 60; ++i)
    c.call(key_at(i % 3, i / 3), command({"SET", key_at(i % 3, i / 3), "1"}), in(10 * kSecond),
           [&](const Result<Reply>& r) { answers.push_back(text(r)); });
  EXPECT_TRUE(connect_all(c).ok());
  EXPECT_TRUE(wait_until([&] { return answers.size() == 60; }));
  EXPECT_EQ(std::count(answers.begin(), answers.end(), "OK"), 60);
  EXPECT_TRUE(c.clustered());
}

TEST_F(RedisClusterTest, TakesTlsAndPasswordToEveryNode) {
  // A cluster of one, which does not know its own address and says so.
  const HeldPort bus;
  RedisServer node({"--cluster-enabled", "yes", "--cluster-port", bus.text(), "--requirepass", "p w",
                    "--tls-cluster", "yes"},
                   true);
  ConnectionOptions with = options(node.port());
  with.password = "p w";
  const auto control = connection(with);
  ASSERT_EQ(text(send(*control, {"CLUSTER", "ADDSLOTSRANGE", "0", "16383"})), "OK");
  ASSERT_TRUE(wait_until([&] {
    return text(send(*control, {"CLUSTER", "INFO"})).find("cluster_state:ok") != std::string::npos;
  }));
  for (const char* scheme : {"rediss+cluster", "rediss"}) {
    Commander& c = cluster_commander(formatted("{}://:p%20w@localhost:{}?ssl_ca_certs={}/ca.pem", scheme,
                                               node.tls_port(), node.directory()));
    const Status status = connect_all(c);
    EXPECT_TRUE(status.ok()) << status.message;
    EXPECT_TRUE(c.clustered());
    EXPECT_EQ(text(keyed(c, "a", {"SET", "a", "1"})), "OK");
    EXPECT_EQ(c.target().find("p%20w"), std::string::npos) << c.target();
  }
  Commander& wrong = cluster_commander(formatted("redis+cluster://:w%20w@127.0.0.1:{}", node.port()));
  const Status status = connect_all(wrong);
  EXPECT_EQ(status.sqlstate, "WRONGPASS") << status.message;
  // Put right while it is in use.
  EXPECT_EQ(text(send(*control, {"CONFIG", "SET", "requirepass", "w w"})), "OK");
  EXPECT_TRUE(wait_until([&] { return text(keyed(wrong, "a", {"GET", "a"})) == "1"; }));
  control->close(Status::make(Code::closed, "end"));
}

TEST_F(RedisClusterTest, LeavesASingleServerASingleServer) {
  RedisServer alone;
  Commander& c = cluster_commander(alone.url());
  EXPECT_TRUE(connect_all(c).ok());
  EXPECT_FALSE(c.clustered());
  EXPECT_EQ(text(keyed(c, "a", {"SET", "a", "1"})), "OK");
  store::Stats stats;
  c.add_stats(stats);
  EXPECT_EQ(stats.connections_open, 1u);
}

TEST_F(RedisClusterTest, SaysThatAServerIsNoCluster) {
  RedisServer alone;
  Commander& c = cluster_commander(formatted("redis+cluster://127.0.0.1:{}", alone.port()));
  const Status status = connect_all(c);
  EXPECT_EQ(status.code, Code::server);
  EXPECT_NE(status.message.find("cluster support disabled"), std::string::npos) << status.message;
}

TEST_F(RedisClusterTest, LoadsAScriptOnEachNodeThatDoesNotKnowIt) {
  Commander& c = cluster_commander();
  Script script = kPut;
  script.sha1 = text(say(0, {"SCRIPT", "LOAD", script.source}));
  for (int i = 0; i < 3; ++i) say(i, {"SCRIPT", "FLUSH"});
  int answered = 0;
  for (int i = 0; i < 90; ++i)
    c.eval(script, key_at(i % 3, i / 3), command({"1", key_at(i % 3, i / 3), "v"}), in(10 * kSecond),
           [&](const Result<Reply>& r) {
             EXPECT_EQ(text(r), "v");
             ++answered;
           });
  EXPECT_TRUE(wait_until([&] { return answered == 90; }));
  for (int i = 0; i < 3; ++i)
    EXPECT_NE(text(say(i, {"INFO", "commandstats"})).find("cmdstat_script|load:calls="), std::string::npos);
}

TEST_F(RedisClusterTest, FollowsMovedAndAsksForTheMap) {
  Commander& c = cluster_commander();
  ASSERT_TRUE(connect_all(c).ok());
  const std::string key = key_at(0);
  keyed(c, key, {"SET", key, "old"});
  const int slot = hash_slot(key);
  migrate(slot, 0, 2);
  say(0, {"MIGRATE", "127.0.0.1", port(2), "", "0", "5000", "KEYS", key});
  own(slot, 2);
  EXPECT_EQ(text(keyed(c, key, {"GET", key})), "old");
  store::Stats before, after;
  c.add_stats(before);
  EXPECT_EQ(text(keyed(c, key, {"GET", key})), "old");
  c.add_stats(after);
  EXPECT_LE(after.statements - before.statements, 2u);  // straight to the new owner (and a map, perhaps)
  migrate(slot, 2, 0);
  say(2, {"MIGRATE", "127.0.0.1", port(0), "", "0", "5000", "KEYS", key});
  own(slot, 0);
  EXPECT_EQ(text(keyed(c, key, {"GET", key})), "old");
}

TEST_F(RedisClusterTest, FollowsAskAlsoForScriptsThatMustBeLoadedThere) {
  Commander& c = cluster_commander();
  ASSERT_TRUE(connect_all(c).ok());
  const std::string key = key_at(1), fresh = formatted("{{{}}}:fresh", key);
  keyed(c, key, {"SET", key, "1"});
  Script script = kPut;
  script.sha1 = text(say(1, {"SCRIPT", "LOAD", script.source}));
  say(2, {"SCRIPT", "FLUSH"});
  const int slot = hash_slot(key);
  migrate(slot, 1, 2);
  EXPECT_EQ(text(keyed(c, key, {"GET", key})), "1");     // still there
  EXPECT_EQ(text(run(c, script, fresh, "new")), "new");  // not there: it is made at the new owner
  say(2, {"ASKING"});
  EXPECT_EQ(text(say(2, {"GET", fresh})), "new");
  say(1, {"MIGRATE", "127.0.0.1", port(2), "", "0", "5000", "KEYS", key});
  EXPECT_EQ(text(keyed(c, key, {"INCR", key})), "");
  own(slot, 2);
  EXPECT_EQ(text(keyed(c, key, {"GET", key})), "2");
  keyed(c, key, {"DEL", key, fresh});
  migrate(slot, 2, 1);
  own(slot, 1);
}

TEST_F(RedisClusterTest, TriesAgainWhileKeysOfOneCommandAreOnTheirWay) {
  Commander& c = cluster_commander();
  ASSERT_TRUE(connect_all(c).ok());
  const std::string a = "{x}a", b = "{x}b";
  const int slot = hash_slot("x");
  int from = 0;
  while (say(from, {"GET", a}).value().kind == Reply::Kind::error) ++from;
  const int to = (from + 1) % 3;
  keyed(c, a, {"MSET", a, "1", b, "2"});
  migrate(slot, from, to);
  say(from, {"MIGRATE", "127.0.0.1", port(to), "", "0", "5000", "KEYS", a});
  // Now a is there and b is here: TRYAGAIN, until the deadline ...
  const Nanos begin = clock_.now();
  const auto late = keyed(c, a, {"MGET", a, b}, 150 * kMilli);
  EXPECT_EQ(late.status().code, Code::unavailable) << text(late);
  EXPECT_EQ(late.status().sqlstate, "TRYAGAIN");
  EXPECT_GE(clock_.now() - begin, 140 * kMilli);
  // ... or until it is over.
  std::optional<Result<Reply>> reply;
  c.call(a, command({"MGET", a, b}), in(10 * kSecond), [&](Result<Reply> r) { reply = std::move(r); });
  say(from, {"MIGRATE", "127.0.0.1", port(to), "", "0", "5000", "KEYS", b});
  own(slot, to);
  ASSERT_TRUE(wait_until([&] { return reply.has_value(); }));
  ASSERT_TRUE(reply->ok()) << text(*reply);
  ASSERT_EQ(reply->value().items.size(), 2u);
  EXPECT_EQ(reply->value().items[1].text, "2");
  keyed(c, a, {"DEL", a, b});
  migrate(slot, to, from);
  own(slot, from);
}

TEST_F(RedisClusterTest, CountsExactlyWhileTheSlotMovesUnderLoad) {
  Commander& c = cluster_commander();
  ASSERT_TRUE(connect_all(c).ok());
  const std::string a = "{y}a", b = "{y}b";
  Script script = {
      "both", "redis.call('INCR', KEYS[1]) return redis.call('INCR', KEYS[2])",
      text(say(0, {"SCRIPT", "LOAD", "redis.call('INCR', KEYS[1]) return redis.call('INCR', KEYS[2])"}))};
  int single = 0, both = 0, under_way = 0, begun = 0;
  std::vector<std::string> failed;
  bool stop = false;
  std::function<void()> next = [&] {
    if (stop) return;
    ++under_way;
    const bool one = ++begun % 2 == 0;
    const ReplyCallback done = [&, one](const Result<Reply>& reply) {
      --under_way;
      if (!reply.ok()) failed.push_back(reply.status().message);
      ++(one ? single : both);
      next();
    };
    if (one)
      c.call(a, command({"INCR", a}), in(20 * kSecond), done);
    else
      c.eval(script, a, command({"2", a, b}), in(20 * kSecond), done);
  };
  for (int i = 0; i < 40; ++i) next();
  const int slot = hash_slot("y");
  int from = 0;
  while (say(from, {"GET", a}).value().kind == Reply::Kind::error) ++from;
  for (int turn = 0; turn < 12; ++turn) {
    const int to = (from + 1) % 3;
    migrate(slot, from, to);
    // One key after the other: in between neither node can run the script.
    for (const std::string& key : {a, b}) {
      say(from, {"MIGRATE", "127.0.0.1", port(to), "", "0", "5000", "KEYS", key});
    }
    own(slot, to);
    const int seen = both;
    EXPECT_TRUE(wait_until([&] { return both > seen + 20; })) << "turn " << turn;
    from = to;
    if (turn % 4 == 3)
      for (int i = 0; i < 3; ++i) say(i, {"SCRIPT", "FLUSH"});
  }
  stop = true;
  ASSERT_TRUE(wait_until([&] { return under_way == 0; }));
  EXPECT_TRUE(failed.empty()) << failed.size() << ": " << failed[0];
  EXPECT_EQ(text(keyed(c, a, {"GET", a})), std::to_string(single + both));
  EXPECT_EQ(text(keyed(c, b, {"GET", b})), std::to_string(both));
}

TEST_F(RedisClusterTest, NeverRepeatsWhatWasSentWhenConnectionsAreCutUnderLoad) {
  Commander& c = cluster_commander();
  ASSERT_TRUE(connect_all(c).ok());
  int counted = 0, in_doubt = 0, under_way = 0;
  std::vector<std::string> failed;
  bool stop = false;
  std::function<void(int)> next = [&](int node) {
    if (stop) return;
    ++under_way;
    const std::string key = key_at(node);
    c.call(key, command({"INCR", key}), in(20 * kSecond), [&, node](const Result<Reply>& reply) {
      --under_way;
      if (reply.ok())
        ++counted;
      else if (reply.status().code == Code::in_doubt)
        ++in_doubt;
      else
        failed.push_back(reply.status().message);
      next(node);
    });
  };
  for (int i = 0; i < 60; ++i) next(i % 3);
  for (int turn = 0; turn < 30; ++turn) {
    const int seen = counted;
    EXPECT_TRUE(wait_until([&] { return counted > seen + 30; })) << "turn " << turn;
    say(turn % 3, {"CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"});
  }
  stop = true;
  ASSERT_TRUE(wait_until([&] { return under_way == 0; }));
  EXPECT_TRUE(failed.empty()) << failed.size() << ": " << failed[0];
  int sum = 0;
  for (int i = 0; i < 3; ++i) sum += std::stoi(text(keyed(c, key_at(i), {"GET", key_at(i)})));
  EXPECT_GE(sum, counted);
  EXPECT_LE(sum, counted + in_doubt);
  EXPECT_FALSE(c.down());
}

TEST_F(RedisClusterTest, RefusesAScriptOverTwoSlotsAndSaysTheCure) {
  Commander& c = cluster_commander();
  const auto reply = keyed(c, "a", {"MGET", "a", "b"});
  EXPECT_EQ(reply.status().code, Code::server);
  EXPECT_EQ(reply.status().sqlstate, "CROSSSLOT");
  EXPECT_NE(reply.status().message.find("hash tag"), std::string::npos);
}

TEST_F(RedisClusterTest, AsksAndScansAllPrimaries) {
  Commander& c = cluster_commander();
  ASSERT_TRUE(connect_all(c).ok());
  for (int i = 0; i < 60; ++i) keyed(c, key_at(i % 3, i / 3), {"SET", key_at(i % 3, i / 3), "1"});
  std::vector<Result<Reply>> sizes;
  c.call_all(command({"DBSIZE"}), kForever, [&](std::vector<Result<Reply>> all) { sizes = std::move(all); });
  ASSERT_TRUE(wait_until([&] { return !sizes.empty(); }));
  ASSERT_EQ(sizes.size(), 3u);
  for (const auto& one : sizes) EXPECT_EQ(one.value().integer, 20);
  const auto scan = [&](std::size_t limit) {
    std::optional<Result<std::vector<std::string>>> keys;
    c.scan("k*", limit, kForever, [&](Result<std::vector<std::string>> found) { keys = std::move(found); });
    EXPECT_TRUE(wait_until([&] { return keys.has_value(); }));
    return keys->value();
  };
  const auto all = scan(1'000);
  EXPECT_EQ(std::set(all.begin(), all.end()).size(), 60u);
  EXPECT_EQ(scan(25).size(), 25u);
}

TEST_F(RedisClusterTest, HearsWhatIsPublishedOnAnyNode) {
  Commander& c = cluster_commander();
  ASSERT_TRUE(connect_all(c).ok());
  std::vector<std::string> heard;
  c.subscribe("news", [&](std::string_view message) { heard.emplace_back(message); });
  ASSERT_TRUE(wait_until([&] { return c.subscribed(); }));
  for (int i = 0; i < 3; ++i) say(i, {"PUBLISH", "news", std::to_string(i)});
  ASSERT_TRUE(wait_until([&] { return heard.size() == 3; }));
  EXPECT_EQ(std::set(heard.begin(), heard.end()), (std::set<std::string>{"0", "1", "2"}));
}

TEST_F(RedisClusterTest, SaysWhenNoSeedIsThere) {
  Commander& c = cluster_commander("redis+cluster://127.0.0.1:1,127.0.0.1:2");
  const auto status = connect_all(c);
  EXPECT_EQ(status.code, Code::unavailable) << status.message;
  EXPECT_TRUE(c.down());
  EXPECT_EQ(keyed(c, "a", {"GET", "a"}).status().code, Code::unavailable);
}

TEST_F(RedisClusterTest, FailsAtOnceWhileAllNodesHangAndComesBack) {
  CommanderOptions with;
  with.socket_connect_timeout = with.socket_timeout = 300 * kMilli;
  Commander& c = cluster_commander({}, with);
  ASSERT_TRUE(connect_all(c).ok());
  keyed(c, "a", {"SET", "a", "1"});
  for (const auto& server : cluster().servers) server->freeze();
  // Sent, and no answer: never sent again.
  EXPECT_EQ(keyed(c, "a", {"INCR", "a"}).status().code, Code::in_doubt);
  EXPECT_TRUE(wait_until([&] { return c.down(); }));
  Nanos quickest = kForever;  // of some, since this machine may stand still meanwhile
  for (int i = 0; i < 5; ++i) {
    const Nanos begin = clock_.now();
    EXPECT_EQ(keyed(c, "a", {"INCR", "a"}).status().code, Code::unavailable);
    quickest = std::min(quickest, clock_.now() - begin);
  }
  EXPECT_LT(quickest, 250 * kMilli);
  for (const auto& server : cluster().servers) server->thaw();
  wait_until_healthy();
  Answer now = keyed(c, "a", {"GET", "a"});
  EXPECT_TRUE(wait_until([&] { return (now = keyed(c, "a", {"GET", "a"})).ok(); }));
  EXPECT_TRUE(text(now) == "1" || text(now) == "2") << text(now);
  EXPECT_FALSE(c.down());
}

TEST_F(RedisClusterTest, AnswersEverythingOnceWhenItIsClosedOrLetGo) {
  for (const bool close : {true, false}) {
    std::unique_ptr<Commander> c = commander("redis+cluster://127.0.0.1:" + port(1));
    int answered = 0;
    for (int i = 0; i < 50; ++i) {
      c->call(key_at(i % 3), command({"GET", key_at(i % 3)}), in(kSecond),
              [&](const Result<Reply>&) { ++answered; });
      io_.restart();
      io_.poll_one();
    }
    bool closed = false;
    if (close) {
      c->close([&] { closed = true; });
      c->call("a", command({"GET", "a"}), in(kSecond), [&](const Result<Reply>& r) {
        ++answered;
        EXPECT_EQ(r.status().code, Code::closed);
      });
      ASSERT_TRUE(wait_until([&] { return closed; }));
    }
    c.reset();
    EXPECT_TRUE(wait_until([&] { return answered == (close ? 51 : 50); })) << answered;
  }
}

// Last: it changes who is who.
TEST_F(RedisClusterTest, ZMovesToThePromotedReplicaAndNothingHangs) {
  Commander& c = cluster_commander({}, [] {
    CommanderOptions with;
    with.socket_timeout = 2 * kSecond;
    return with;
  }());
  ASSERT_TRUE(connect_all(c).ok());
  int ups = 0;
  std::vector<std::string> heard;
  c.subscribe("news", [&](std::string_view message) { heard.emplace_back(message); });
  const std::string key = key_at(0);
  ASSERT_EQ(text(keyed(c, key, {"SET", key, "1"})), "OK");
  ASSERT_TRUE(wait_until([&] { return c.subscribed(); }));
  c.on_reconnect([&] { ++ups; });
  RedisServer& victim = *cluster().servers[0];
  for (const bool frozen : {false, true}) {
    say(0, {"WAIT", "1", "2000"});
    RedisServer& now = frozen ? *cluster().servers[3] : victim;
    ups = 0;
    if (frozen)
      now.freeze();
    else
      now.kill();
    // A short deadline is kept while the slots have no primary ...
    const Nanos begin = clock_.now();
    const auto early = keyed(c, key, {"GET", key}, 100 * kMilli);
    EXPECT_LT(clock_.now() - begin, 8 * kSecond) << text(early);
    // ... and a command that may be repeated ends at the new one.
    ASSERT_TRUE(wait_until([&] { return text(keyed(c, key, {"GET", key}, 5 * kSecond)) == "1"; }));
    EXPECT_GT(ups, 0);
    // The others were never out.
    EXPECT_EQ(text(keyed(c, key_at(1), {"SET", key_at(1), "1"})), "OK");
    ASSERT_TRUE(wait_until([&] { return c.subscribed(); }));
    heard.clear();
    ASSERT_TRUE(wait_until([&] {
      keyed(c, "", {"PUBLISH", "news", "still here"});
      return !heard.empty();
    }));
    if (frozen)
      now.thaw();
    else
      now.start();
    wait_until_healthy();
  }
}

}  // namespace
}  // namespace ratesync::testing
