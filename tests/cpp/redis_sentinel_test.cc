// The Commander over a primary that Sentinels name: two servers and three Sentinels, all real.

#include "ratesync/base/format.h"
#include "ratesync/redis/sentinel.h"
#include "redis_fixture.h"

namespace ratesync::testing {
namespace {

// Many answers below are of no interest.
struct Answer : Result<Reply> {
  Answer(Result<Reply> result) : Result<Reply>(std::move(result)) {}  // NOLINT(google-explicit-constructor)
};

class RedisSentinelTest : public RedisTest {
 protected:
  struct Group {
    std::vector<std::unique_ptr<RedisServer>> nodes, sentinels;
  };
  // A group for each test: a failover leaves traces for longer than a test lasts.
  void SetUp() override {
    const auto begin = [&](RedisServer& server, const char* password) {
      ConnectionOptions with = options(server.port());
      with.password = password;
      with.command_timeout = 20 * kSecond;
      return connection(std::move(with));
    };
    group_ = std::make_unique<Group>();
    std::vector<std::string> arguments = {
        "--requirepass", "pw", "--masterauth", "pw", "--repl-diskless-sync-delay", "0"};
    group_->nodes.push_back(std::make_unique<RedisServer>(arguments));
    arguments.insert(arguments.end(), {"--replicaof", "127.0.0.1 " + port(0)});
    group_->nodes.push_back(std::make_unique<RedisServer>(arguments));
    for (auto& node : group_->nodes) nodes_.push_back(begin(*node, "pw"));
    ASSERT_TRUE(wait_until([&] {
      return text(send_to(*nodes_[1], {"INFO", "replication"})).find("master_link_status:up") !=
             std::string::npos;
    }));
    // After the replica: Sentinels look for new ones only every 10 s.
    for (int i = 0; i < 3; ++i)
      group_->sentinels.push_back(std::make_unique<RedisServer>(
          std::vector<std::string>{"--sentinel"}, false,
          formatted("requirepass watch\nsentinel monitor main 127.0.0.1 {} 2\nsentinel auth-pass main pw\n"
                    "sentinel down-after-milliseconds main 5000\nsentinel failover-timeout main 3000\n",
                    port(0))));
    for (auto& sentinel : group_->sentinels) sentinels_.push_back(begin(*sentinel, "watch"));
    for (auto& sentinel : sentinels_)
      ASSERT_TRUE(wait_until([&] {
        const Answer known = send_to(*sentinel, {"SENTINEL", "REPLICAS", "main"});
        return known.ok() && known.value().items.size() == 1 &&
               text(send_to(*sentinel, {"SENTINEL", "CKQUORUM", "main"})).starts_with("OK 3");
      }));
  }
  void TearDown() override {
    for (auto& commander : commanders_) {
      bool closed = false;
      commander->close([&] { closed = true; });
      EXPECT_TRUE(wait_until([&] { return closed; }));
    }
    commanders_.clear();
    for (auto* all : {&nodes_, &sentinels_})
      for (auto& c : *all) c->close(Status::make(Code::closed, "end"));
    io_.restart();
    io_.poll();
  }

  Answer send_to(Connection& c, std::initializer_list<std::string_view> words) { return send(c, words); }
  std::string url(const std::string& name = "main", const std::string& watch = "watch") {
    std::string hosts;
    for (auto& sentinel : group_->sentinels) hosts += formatted("127.0.0.1:{},", sentinel->port());
    hosts.pop_back();
    return formatted("redis+sentinel://:pw@{}/{}?sentinel_password={}", hosts, name, watch);
  }
  Commander& named(const std::string& at, Nanos timeout = 5 * kSecond) {
    CommanderOptions with;
    with.socket_timeout = with.socket_connect_timeout = timeout;
    commanders_.push_back(commander(at, with));
    return *commanders_.back();
  }
  Status connected(Commander& c) {
    std::optional<Status> status;
    c.connect([&](Status s) { status = std::move(s); });
    EXPECT_FALSE(status) << "answered inside the call";
    EXPECT_TRUE(wait_until([&] { return status.has_value(); }));
    return status.value_or(Status::make(Code::internal, "no answer"));
  }
  Answer ask(Commander& c, std::initializer_list<std::string_view> words, Nanos patience = 10 * kSecond) {
    return call(c, words, clock_.now() + patience);
  }
  std::string port_of(Commander& c) {
    const std::string info = text(ask(c, {"INFO", "server"}));
    const std::size_t at = info.find("tcp_port:");
    return at == std::string::npos ? "" : info.substr(at + 9, info.find('\r', at) - at - 9);
  }
  // The replica has what the primary has. WAIT looks at what its own connection wrote last.
  void replicated(std::string_view key, std::string_view value) {
    ASSERT_TRUE(wait_until([&] {
      send_to(*nodes_[0], {"SET", key, value});
      const Answer replicas = send_to(*nodes_[0], {"WAIT", "1", "1000"});
      return replicas.ok() && replicas.value().integer == 1;
    }));
  }
  std::string port(int node) { return std::to_string(group_->nodes[static_cast<std::size_t>(node)]->port()); }

  std::unique_ptr<Group> group_;
  std::vector<std::shared_ptr<Connection>> nodes_, sentinels_;
  std::vector<std::unique_ptr<Commander>> commanders_;
};

TEST_F(RedisSentinelTest, FindsThePrimaryAlsoWithSentinelsDeadOrHanging) {
  Commander& c = named(url());
  EXPECT_TRUE(connected(c).ok());
  EXPECT_FALSE(c.clustered());
  EXPECT_EQ(text(ask(c, {"SET", "a", "1"})), "OK");
  EXPECT_EQ(port_of(c), port(0));
  group_->sentinels[0]->kill();
  group_->sentinels[1]->freeze();
  const Nanos begin = clock_.now();
  Commander& late = named(url(), 50 * kSecond);
  EXPECT_TRUE(connected(late).ok());
  EXPECT_EQ(port_of(late), port(0));
  EXPECT_LT(clock_.now() - begin, 30 * kSecond) << "not as long as the one that hangs is waited for";
  group_->sentinels[1]->thaw();
}

TEST_F(RedisSentinelTest, SaysWhatIsWrong) {
  const Status name = connected(named(url("other")));
  EXPECT_NE(name.message.find("no group named other"), std::string::npos) << name.message;
  const Status password = connected(named(url("main", "wrong")));
  EXPECT_NE(password.message.find("sentinel_password"), std::string::npos) << password.message;
  EXPECT_EQ(password.message.find("wrong"), std::string::npos) << password.message;
  for (auto& sentinel : group_->sentinels) sentinel->kill();
  const Status dead = connected(named(url()));
  EXPECT_EQ(dead.code, Code::unavailable);
  EXPECT_NE(dead.message.find("no Sentinel"), std::string::npos) << dead.message;
}

TEST_F(RedisSentinelTest, FollowsAFailoverAfterAKill) {
  Commander& c = named(url());
  ASSERT_TRUE(connected(c).ok());
  ASSERT_EQ(text(ask(c, {"SET", "a", "1"})), "OK");
  std::vector<std::string> heard;
  c.subscribe("news", [&](std::string_view message) { heard.emplace_back(message); });
  ASSERT_TRUE(wait_until([&] { return c.subscribed(); }));
  replicated("a", "1");
  int ups = 0;
  c.on_reconnect([&] { ++ups; });
  group_->nodes[0]->kill();
  const Nanos begin = clock_.now();
  EXPECT_FALSE(ask(c, {"GET", "a"}, 100 * kMilli).ok());
  EXPECT_LT(clock_.now() - begin, 10 * kSecond);
  EXPECT_TRUE(wait_until([&] { return text(ask(c, {"GET", "a"})) == "1"; }));
  EXPECT_EQ(port_of(c), port(1));
  EXPECT_EQ(text(ask(c, {"SET", "a", "2"})), "OK");
  EXPECT_GE(ups, 1);
  ASSERT_TRUE(wait_until([&] {
    ask(c, {"PUBLISH", "news", "still here"});
    return !heard.empty();
  }));
}

TEST_F(RedisSentinelTest, LeavesAPrimaryThatHangsWhenTheSentinelsReplaceIt) {
  Commander& c = named(url());
  ASSERT_TRUE(connected(c).ok());
  ASSERT_EQ(text(ask(c, {"SET", "a", "1"})), "OK");
  replicated("a", "1");
  group_->nodes[0]->freeze();
  EXPECT_TRUE(wait_until([&] { return text(ask(c, {"GET", "a"})) == "1"; }));
  EXPECT_EQ(port_of(c), port(1));
  group_->nodes[0]->thaw();
  // It wakes up as a primary until a Sentinel tells it otherwise: nothing goes there.
  for (int i = 0; i < 20; ++i) EXPECT_EQ(port_of(c), port(1));
}

TEST_F(RedisSentinelTest, LeavesAPrimaryThatIsDemotedAlive) {
  Commander& c = named(url());
  ASSERT_TRUE(connected(c).ok());
  ASSERT_EQ(text(ask(c, {"SET", "a", "1"})), "OK");
  ASSERT_TRUE(wait_until([&] {
    return text(send_to(*sentinels_[1], {"SENTINEL", "FAILOVER", "main"})) == "OK";
  }));
  EXPECT_TRUE(wait_until([&] { return text(ask(c, {"SET", "a", "2"})) == "OK" && port_of(c) == port(1); }));
}

TEST_F(RedisSentinelTest, LeavesAReplicaThatSaysReadonlyAndDoesNotTakeItsWord) {
  Commander& c = named(url());
  ASSERT_TRUE(connected(c).ok());
  for (auto& sentinel : group_->sentinels) sentinel->freeze();
  // Demoted by hand, behind the Sentinels' back: what they name is no primary, and is not used.
  send_to(*nodes_[0], {"REPLICAOF", "127.0.0.1", port(1)});
  send_to(*nodes_[1], {"REPLICAOF", "NO", "ONE"});
  for (auto& sentinel : group_->sentinels) sentinel->thaw();
  Status status = ask(c, {"SET", "a", "1"}, 200 * kMilli).status();
  EXPECT_FALSE(status.ok());
  // Put right again: found again.
  send_to(*nodes_[0], {"REPLICAOF", "NO", "ONE"});
  send_to(*nodes_[1], {"REPLICAOF", "127.0.0.1", port(0)});
  EXPECT_TRUE(wait_until([&] { return text(ask(c, {"SET", "a", "1"})) == "OK"; }));
}

}  // namespace
}  // namespace ratesync::testing
