// A Redis Cluster of three primaries, one of them with a replica, all real: what its tests share.
#pragma once

#include <algorithm>
#include <array>
#include <iterator>
#include <map>
#include <set>
#include <sstream>

#include "ratesync/base/format.h"
#include "ratesync/redis/slots.h"
#include "redis_state_rig.h"

namespace ratesync::testing {

// Many answers are of no interest.
struct Answer : Result<Reply> {
  Answer(Result<Reply> result) : Result<Reply>(std::move(result)) {}  // NOLINT(google-explicit-constructor)
};

class RedisClusterTest : public RedisStateTest {
 protected:
  // Four nodes: three primaries, then a replica of the first.
  struct Cluster {
    std::array<HeldPort, 4> buses;
    std::vector<std::unique_ptr<RedisServer>> servers;
    Cluster() {
      for (const HeldPort& bus : buses)
        servers.push_back(std::make_unique<RedisServer>(std::vector<std::string>{
            "--cluster-enabled", "yes", "--cluster-node-timeout", "2000", "--cluster-port", bus.text(),
            "--cluster-replica-validity-factor", "0", "--repl-diskless-sync-delay", "0"}));
    }
  };
  static Cluster& cluster() {
    static Cluster one;
    return one;
  }

  void SetUp() override {
    for (const auto& server : cluster().servers) control_.push_back(connection(options(server->port())));
    static bool formed = false;
    if (!std::exchange(formed, true)) form();
    for (int i = 0; i < 4; ++i) say(i, {"FLUSHALL"});  // a replica refuses
  }
  void TearDown() override {
    RedisStateTest::TearDown();
    for (auto& commander : commanders_) {
      bool closed = false;
      commander->close([&] { closed = true; });
      EXPECT_FALSE(closed) << "answered inside the call";
      EXPECT_TRUE(wait_until([&] { return closed; }));
    }
    commanders_.clear();
    for (auto& c : control_) c->close(Status::make(Code::closed, "end"));
    control_.clear();
    io_.restart();
    io_.poll();
  }

  Answer say(int node, std::initializer_list<std::string_view> words) {
    return send(*control_[static_cast<std::size_t>(node)], words);
  }
  std::string id(int node) { return text(say(node, {"CLUSTER", "MYID"})); }
  static std::string port(int node) {
    return std::to_string(cluster().servers[static_cast<std::size_t>(node)]->port());
  }

  void form() {
    for (int i = 0; i < 4; ++i) {
      say(i, {"CLUSTER", "SET-CONFIG-EPOCH", std::to_string(i + 1)});
      say(0, {"CLUSTER", "MEET", "127.0.0.1", port(i), cluster().buses[static_cast<std::size_t>(i)].text()});
    }
    const std::array<int, 4> bounds = {0, 5461, 10'922, 16'384};
    for (std::size_t i = 0; i < 3; ++i)
      say(static_cast<int>(i),
          {"CLUSTER", "ADDSLOTSRANGE", std::to_string(bounds[i]), std::to_string(bounds[i + 1] - 1)});
    const std::string first = id(0);
    ASSERT_TRUE(wait_until([&] { return text(say(3, {"CLUSTER", "REPLICATE", first})) == "OK"; }));
    wait_until_healthy();
  }
  void wait_until_healthy() {
    const auto healthy = [&](int node) {
      const std::string info = text(say(node, {"CLUSTER", "INFO"}));
      const std::string nodes = text(say(node, {"CLUSTER", "NODES"}));
      return info.find("cluster_state:ok") != std::string::npos &&
             info.find("cluster_slots_ok:16384") != std::string::npos &&
             info.find("cluster_known_nodes:4") != std::string::npos &&
             nodes.find("fail") == std::string::npos && nodes.find("handshake") == std::string::npos &&
             nodes.find("slave") != std::string::npos;
    };
    for (int i = 0; i < 4; ++i) ASSERT_TRUE(wait_until([&] { return healthy(i); })) << i;
    const auto linked = [&] {
      for (int i : {0, 3})
        if (text(say(i, {"INFO", "replication"})).find("master_link_status:up") != std::string::npos)
          return true;
      return false;
    };
    ASSERT_TRUE(wait_until(linked));
  }

  // A commander that was not connected by hand.
  Commander& cluster_commander(const std::string& url = {}, CommanderOptions with = {}) {
    commanders_.push_back(
        commander(url.empty() ? "redis+cluster://127.0.0.1:" + port(1) : url, std::move(with)));
    return *commanders_.back();
  }
  Status connect_all(Commander& c) {
    std::optional<Status> status;
    c.connect([&](Status s) { status = std::move(s); });
    EXPECT_FALSE(status) << "answered inside the call";
    EXPECT_TRUE(wait_until([&] { return status.has_value(); }));
    return status.value_or(Status::make(Code::internal, "no answer"));
  }
  Nanos in(Nanos time) { return clock_.now() + time; }
  Answer keyed(Commander& c, std::string_view key, std::initializer_list<std::string_view> words,
               Nanos patience = 10 * kSecond) {
    std::optional<Result<Reply>> reply;
    c.call(key, command(words), in(patience), [&](Result<Reply> r) { reply = std::move(r); });
    EXPECT_FALSE(reply) << "answered inside the call";
    EXPECT_TRUE(wait_until([&] { return reply.has_value(); }));
    return reply ? std::move(*reply) : Result<Reply>(Status::make(Code::internal, "no answer"));
  }
  Answer run(Commander& c, const Script& script, std::string_view key, std::string_view value) {
    std::optional<Result<Reply>> reply;
    c.eval(script, key, command({"1", key, value}), in(10 * kSecond),
           [&](Result<Reply> r) { reply = std::move(r); });
    EXPECT_TRUE(wait_until([&] { return reply.has_value(); }));
    return reply ? std::move(*reply) : Result<Reply>(Status::make(Code::internal, "no answer"));
  }
  // A key of this node's share of the slots.
  static std::string key_at(int node, int number = 0) {
    for (int i = 0;; ++i) {
      std::string key = formatted("k{}", i);
      if (hash_slot(key) / 5462 == node && number-- == 0) return key;
    }
  }
  void migrate(int slot, int from, int to) {
    const std::string number = std::to_string(slot);
    say(to, {"CLUSTER", "SETSLOT", number, "IMPORTING", id(from)});
    say(from, {"CLUSTER", "SETSLOT", number, "MIGRATING", id(to)});
  }
  // Only after migrate(): taking in a slot is what raises the epoch by which nodes settle who has it.
  void own(int slot, int node) {
    const std::string owner = id(node);
    for (int i : {node, 0, 1, 2}) say(i, {"CLUSTER", "SETSLOT", std::to_string(slot), "NODE", owner});
    // The next move has to start from an epoch that is known to all: two nodes that take one each
    // without having heard of each other settle it by dropping a slot, and its keys with it.
    ASSERT_TRUE(wait_until([&] {
      const auto first = epochs(0);
      return first.size() >= 3 && first == epochs(1) && first == epochs(2);
    }));
  }
  // Of the primaries, as one node knows them; empty while two are the same.
  std::map<std::string, std::string> epochs(int node) {
    std::map<std::string, std::string> of;
    std::set<std::string> distinct;
    std::istringstream lines(text(say(node, {"CLUSTER", "NODES"})));
    for (std::string line; std::getline(lines, line);) {
      std::istringstream words(line);
      std::vector<std::string> word{std::istream_iterator<std::string>(words), {}};
      if (word.size() < 8 || word[2].find("master") == std::string::npos) continue;
      of[word[0]] = word[6];
      distinct.insert(word[6]);
    }
    return distinct.size() == of.size() ? of : decltype(of){};
  }

  std::vector<std::shared_ptr<Connection>> control_;
  std::vector<std::unique_ptr<Commander>> commanders_;
};

}  // namespace ratesync::testing
