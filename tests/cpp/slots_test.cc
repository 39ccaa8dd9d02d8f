// Hash slots, redirections and slot maps of a Redis Cluster, against vectors of its specification.
#include "ratesync/redis/slots.h"

#include <gtest/gtest.h>

namespace ratesync::redis {
namespace {

Reply integer(std::int64_t value) { return Reply{Reply::Kind::integer, value, {}, {}}; }
Reply text(std::string value) { return Reply{Reply::Kind::text, 0, std::move(value), {}}; }
Reply array(std::vector<Reply> items) { return Reply{Reply::Kind::array, 0, {}, std::move(items)}; }
Reply node(std::string host, int port) { return array({text(std::move(host)), integer(port), text("id")}); }

TEST(HashSlot, IsTheCrcOfTheSpecification) {
  EXPECT_EQ(crc16("123456789"), 0x31C3);
  EXPECT_EQ(crc16(""), 0);
  EXPECT_EQ(crc16("A"), 0x58E5);
  EXPECT_EQ(hash_slot("foo"), 12182);
  EXPECT_EQ(hash_slot("123456789"), 0x31C3 % 16384);
  // Bytes above 127 are not sign-extended: checked with CLUSTER KEYSLOT of a server in cluster_test.
  EXPECT_NE(hash_slot("\xff\xfe"), hash_slot("\x7f\x7e"));
}

TEST(HashSlot, HashesOnlyTheFirstTagThatIsNotEmpty) {
  EXPECT_EQ(hash_slot("{user1000}.following"), hash_slot("{user1000}.followers"));
  EXPECT_EQ(hash_slot("{user1000}.following"), hash_slot("user1000"));
  EXPECT_NE(hash_slot("foo{}{bar}"), hash_slot("bar"));      // empty: the whole key
  EXPECT_EQ(hash_slot("foo{{bar}}zap"), hash_slot("{bar"));  // up to the first }
  EXPECT_EQ(hash_slot("foo{bar}{zap}"), hash_slot("bar"));   // the first tag
  EXPECT_NE(hash_slot("foo}{bar"), hash_slot("bar"));        // never closed
  EXPECT_EQ(hash_slot("}{bar}"), hash_slot("bar"));
}

TEST(ParseRedirect, ReadsMovedAndAsk) {
  const auto moved = parse_redirect("MOVED 3999 127.0.0.1:6381", "seed");
  ASSERT_TRUE(moved);
  EXPECT_FALSE(moved->ask);
  EXPECT_EQ(moved->slot, 3999);
  EXPECT_EQ(moved->node, (HostPort{"127.0.0.1", 6381}));
  const auto ask = parse_redirect("ASK 16383 node-2.example:7000", "seed");
  ASSERT_TRUE(ask);
  EXPECT_TRUE(ask->ask);
  EXPECT_EQ(ask->node, (HostPort{"node-2.example", 7000}));
  EXPECT_EQ(parse_redirect("MOVED 1 ::1:6381", "seed")->node, (HostPort{"::1", 6381}));
  EXPECT_EQ(parse_redirect("MOVED 1 :6381", "seed")->node, (HostPort{"seed", 6381}));
}

TEST(ParseRedirect, FollowsNothingElse) {
  for (const char* error :
       {"", "MOVED", "MOVED ", "MOVED 1", "MOVED 16384 a:1", "MOVED -1 a:1", "MOVED x a:1", "MOVED 1 a",
        "MOVED 1 a:", "MOVED 1 a:0", "MOVED 1 a:65536", "MOVED 1 a:6x", "MOVED 1 ?:6379",
        "MOVED 99999999999 a:1", "MOVEDX 1 a:1", "ERR MOVED 1 a:1", "ASKING 1 a:1", "TRYAGAIN 1 a:1"})
    EXPECT_FALSE(parse_redirect(error, "seed")) << error;
}

TEST(SlotMap, IsReadFromClusterSlots) {
  const auto map = SlotMap::parse(array({array({integer(0), integer(5460), node("a", 1), node("b", 2)}),
                                         array({integer(5461), integer(16382), node("c", 3)}),
                                         array({integer(16383), integer(16383), node("a", 1)})}),
                                  "seed");
  ASSERT_TRUE(map.ok()) << map.status().message;
  const SlotMap& m = map.value();
  EXPECT_EQ(m.primaries(), (std::vector<HostPort>{{"a", 1}, {"c", 3}}));
  EXPECT_EQ(m.replicas(), (std::vector<HostPort>{{"b", 2}}));
  EXPECT_EQ(m.owner(0), 0u);
  EXPECT_EQ(m.owner(5460), 0u);
  EXPECT_EQ(m.owner(5461), 1u);
  EXPECT_EQ(m.owner(16383), 0u);
  EXPECT_TRUE(m.owns_any({"c", 3}));
  EXPECT_FALSE(m.owns_any({"b", 2}));
}

TEST(SlotMap, LeavesOutWhatNobodyOwnsAndNodesWithoutAnAddress) {
  Reply nil;
  const auto map =
      SlotMap::parse(array({array({integer(1), integer(1), array({nil, integer(7), text("id")})}),
                            array({integer(2), integer(2), node("?", 7)}),
                            array({integer(3), integer(3), node("x", 0)}), array({integer(4), integer(4)})}),
                     "seed");
  ASSERT_TRUE(map.ok());
  EXPECT_EQ(map.value().primaries(), (std::vector<HostPort>{{"seed", 7}}));
  EXPECT_EQ(map.value().owner(1), 0u);
  for (const std::uint16_t slot : {0, 2, 3, 4}) EXPECT_EQ(map.value().owner(slot), SlotMap::kNobody);
}

TEST(SlotMap, RefusesNonsense) {
  EXPECT_EQ(SlotMap::parse(text("OK"), "s").status().code, Code::protocol);
  EXPECT_EQ(SlotMap::parse(array({text("x")}), "s").status().code, Code::protocol);
  EXPECT_EQ(SlotMap::parse(array({array({integer(0), integer(16384), node("a", 1)})}), "s").status().code,
            Code::protocol);
  EXPECT_EQ(SlotMap::parse(array({array({integer(5), integer(4), node("a", 1)})}), "s").status().code,
            Code::protocol);
  EXPECT_EQ(SlotMap::parse(array({array({integer(-1), integer(4), node("a", 1)})}), "s").status().code,
            Code::protocol);
  // A node that has met nobody.
  EXPECT_EQ(SlotMap::parse(array({}), "s").status().code, Code::unavailable);
}

TEST(SlotMap, LearnsFromMoved) {
  auto map = SlotMap::parse(array({array({integer(0), integer(1), node("a", 1)})}), "s");
  ASSERT_TRUE(map.ok());
  SlotMap& m = map.value();
  EXPECT_TRUE(m.assign(1, {"b", 2}));
  EXPECT_EQ(m.owner(0), 0u);
  EXPECT_EQ(m.primaries()[m.owner(1)], (HostPort{"b", 2}));
  EXPECT_TRUE(m.assign(0, {"b", 2}));
  EXPECT_FALSE(m.owns_any({"a", 1}));  // but its index stays
  EXPECT_EQ(m.primaries()[0], (HostPort{"a", 1}));
}

}  // namespace
}  // namespace ratesync::redis
