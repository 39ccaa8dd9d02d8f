// What a call to the limit script carries, and how its answer is dealt: no server involved.
#include <gtest/gtest.h>

#include <set>

#include "ratesync/redis/info.h"
#include "ratesync/redis/keys.h"
#include "ratesync/redis/limit_plan.h"
#include "ratesync/redis/scripts.h"

namespace ratesync::redis {
namespace {

using store::AcquireOp;
using store::Group;
using store::GroupRef;
using store::Verdict;
using Kind = QueuedOp::Kind;

struct Op final : AcquireOp {
  void done() override {}
};

GroupRef bucket(const std::string& id, double rate = 1, std::int64_t burst = 1, std::int64_t slots = 0) {
  limits::Params params;
  params.rate_per_second = rate;
  params.burst = burst;
  params.max_concurrent = slots;
  params.timing_margin = 0;
  return std::make_shared<Group>(id, params);
}

GroupRef window(const std::string& id, std::int64_t limit) {
  limits::Params params;
  params.algorithm = limits::Algorithm::fixed_window;
  params.limit = limit;
  params.window = kSecond;
  return std::make_shared<Group>(id, params);
}

class RedisLimitPlan : public ::testing::Test {
 protected:
  QueuedOp acquire(const GroupRef& group, std::int64_t cost = 1, Nanos deadline = kForever) {
    ops_.push_back(std::make_unique<Op>());
    ops_.back()->group = group;
    ops_.back()->cost = cost;
    ops_.back()->deadline = deadline;
    ops_.back()->order = ++arrivals_;
    return {Kind::acquire, false, group, ops_.back().get(), nullptr};
  }
  static QueuedOp side(Kind kind, const GroupRef& group, std::int64_t units = 0, std::int64_t stamp = 0) {
    auto more = std::make_unique<QueuedOp::Side>();
    more->units = units;
    more->stamp = stamp;
    return {kind, false, group, nullptr, std::move(more)};
  }
  struct Wish {
    std::int64_t cost = 1;
    Nanos deadline = kForever;
  };
  OpList acquires(const GroupRef& group, std::initializer_list<Wish> wishes) {
    OpList out;
    for (const Wish& wish : wishes) out.push_back(acquire(group, wish.cost, wish.deadline));
    return out;
  }
  // In no order: arguments are evaluated in any.
  template <class... Ops>
  static OpList list(Ops... ops) {
    OpList out;
    (out.push_back(std::move(ops)), ...);
    return out;
  }

  std::vector<std::unique_ptr<Op>> ops_;
  std::uint64_t arrivals_ = 0;
  const Keys keys_{"p"};
};

TEST_F(RedisLimitPlan, RequestsOfOneCostAndPatienceAreOneRun) {
  const GroupRef group = bucket("a");
  LimitCall call;
  OpList pending = acquires(group, {{}, {2}, {}, {1, 10 * kSecond}, {1, 10 * kSecond + 1}});
  plan_limit(call, kNew, pending, 0);
  EXPECT_TRUE(pending.empty());
  ASSERT_EQ(call.runs.size(), 3u);
  EXPECT_EQ(call.runs[0].ops.size(), 2u);
  EXPECT_EQ(call.runs[1].cost, 2);
  EXPECT_EQ(call.runs[2].ops.size(), 2u);
  EXPECT_EQ(call.runs[2].patience, 10 * kSecond);
  EXPECT_TRUE(call.quick());
}

TEST_F(RedisLimitPlan, WhoAsksAgainGoesBeforeThoseWhoCameLater) {
  const GroupRef group = bucket("a");
  QueuedOp first = acquire(group), second = acquire(group), third = acquire(group);
  AcquireOp* const oldest = first.acquire;
  LimitCall call;
  OpList pending = list(std::move(second), std::move(third), std::move(first));
  plan_limit(call, kNew, pending, 0);
  EXPECT_EQ(call.runs[0].ops[0].acquire, oldest);
}

TEST_F(RedisLimitPlan, OtherParametersOfTheSameLimitWaitForTheNextCall) {
  LimitCall call;
  OpList pending = list(acquire(bucket("a", 1)), acquire(bucket("a", 2)), acquire(bucket("a", 1)));
  plan_limit(call, kNew, pending, 0);
  EXPECT_EQ(call.groups.size(), 1u);
  EXPECT_EQ(call.runs[0].ops.size(), 2u);
  ASSERT_EQ(pending.size(), 1u);
  EXPECT_EQ(pending[0].group->params.rate_per_second, 2);
}

TEST_F(RedisLimitPlan, OneCallTakesABoundedNumberOfRequests) {
  const GroupRef group = bucket("a");
  OpList pending;
  for (std::size_t i = 0; i < kMaxRequests + 7; ++i) pending.push_back(acquire(group));
  LimitCall call;
  plan_limit(call, kNew, pending, 0);
  EXPECT_EQ(call.runs[0].ops.size(), kMaxRequests);
  EXPECT_EQ(pending.size(), 7u);
  OpList costs;
  for (std::int64_t cost = 1; cost <= 20; ++cost) costs.push_back(acquire(group, cost));
  LimitCall other;
  plan_limit(other, kNew, costs, 0);
  EXPECT_EQ(other.runs.size(), kMaxRuns);
  EXPECT_EQ(costs.size(), 20 - kMaxRuns);
}

TEST_F(RedisLimitPlan, AResetTravelsWithoutOtherOperationsOfItsLimit) {
  const GroupRef group = bucket("a", 1, 1, 3);
  LimitCall call;
  OpList pending = list(acquire(group), side(Kind::reset, group), acquire(group));
  plan_limit(call, kNew, pending, 0);
  EXPECT_EQ(call.resets.size(), 1u);
  EXPECT_TRUE(call.runs.empty());
  EXPECT_EQ(pending.size(), 2u);
  // And waits where the limit is declared for a call of several.
  LimitCall declared;
  const std::size_t place = declare(declared, group);
  OpList more = list(side(Kind::reset, group), acquire(group));
  plan_limit(declared, place, more, 0);
  EXPECT_TRUE(declared.resets.empty());
  EXPECT_EQ(more.size(), 2u);
}

TEST_F(RedisLimitPlan, RefundsThatFollowEachOtherAreOne) {
  const GroupRef group = window("a", 10);
  LimitCall call;
  OpList pending = list(side(Kind::refund, group, 2, 100), side(Kind::refund, group, 3, 98),
                        side(Kind::refund, group, 1, 50), side(Kind::settle, group, 4),
                        side(Kind::settle, group, 1), side(Kind::settle, group, -2));
  plan_limit(call, kNew, pending, 0);
  ASSERT_EQ(call.adjustments.size(), 4u);
  EXPECT_EQ(call.adjustments[0].units, 5);
  EXPECT_EQ(call.adjustments[0].stamp, 100);
  EXPECT_EQ(call.adjustments[2].units, 5);
  EXPECT_EQ(call.adjustments[3].units, -2);
}

TEST_F(RedisLimitPlan, AbsurdSettlementsStayInRange) {
  const GroupRef group = bucket("a", 0.001);
  LimitCall call;
  OpList pending = list(side(Kind::settle, group, std::numeric_limits<std::int64_t>::max()),
                        side(Kind::settle, group, std::numeric_limits<std::int64_t>::min() + 1));
  plan_limit(call, kNew, pending, 0);
  ASSERT_EQ(call.adjustments.size(), 2u);
  for (const Adjustment& adjustment : call.adjustments)
    EXPECT_LE(std::abs(adjustment.units), 2'000'000'000'000'000);
}

TEST_F(RedisLimitPlan, ARunIsDealtFirstComeFirstServed) {
  const GroupRef group = bucket("a", 1, 2);
  LimitCall call;
  OpList pending = list(acquire(group, 1, kSecond), acquire(group, 1, kSecond), acquire(group, 1, kSecond),
                        acquire(group, 1, kSecond));
  plan_limit(call, kNew, pending, 0);
  RunAnswer answer;
  answer.granted = 3;
  OpList done, again;
  deal_run(call.runs[0], *group, answer, 0, 0, done, again);
  ASSERT_EQ(done.size(), 4u);
  EXPECT_EQ(ops_[0]->reply.wait, 0);
  EXPECT_EQ(ops_[1]->reply.wait, 0);
  EXPECT_EQ(ops_[2]->reply.wait, kSecond);
  EXPECT_EQ(ops_[3]->reply.verdict, Verdict::rate_limited);
  EXPECT_EQ(ops_[3]->reply.retry_after, 2 * kSecond);
}

TEST_F(RedisLimitPlan, WaitsOfAWindowGoToTheirRequests) {
  const GroupRef group = window("a", 2);
  LimitCall call;
  OpList pending = list(acquire(group), acquire(group), acquire(group), acquire(group));
  plan_limit(call, kNew, pending, 0);
  EXPECT_FALSE(call.quick());
  RunAnswer answer;
  answer.granted = 3;
  answer.waits = {{2, 0}, {1, 7}};
  answer.wait = 9;
  OpList done, again;
  deal_run(call.runs[0], *group, answer, 0, 0, done, again);
  EXPECT_EQ(ops_[1]->reply.wait, 0);
  EXPECT_EQ(ops_[2]->reply.wait, 7 * kMicro);
  EXPECT_EQ(ops_[3]->reply.retry_after, 9 * kMicro);
}

TEST_F(RedisLimitPlan, WhoWasRefusedForTheImpatienceOfAnotherIsAskedAgainAlone) {
  const GroupRef group = bucket("a", 0.001);
  LimitCall call;
  OpList pending = acquires(group, {{1, 1'000 * kSecond}, {1, 1'001 * kSecond}});
  plan_limit(call, kNew, pending, 0);
  ASSERT_EQ(call.runs.size(), 1u);
  RunAnswer answer;
  answer.ahead = 1'000'500'000;  // the next slot lies 1000.5 s ahead
  OpList done, again;
  deal_run(call.runs[0], *group, answer, 0, 0, done, again);
  ASSERT_EQ(done.size(), 1u);
  ASSERT_EQ(again.size(), 1u);
  EXPECT_TRUE(again[0].exact);
  EXPECT_EQ(again[0].acquire, ops_[1].get());
}

TEST_F(RedisLimitPlan, AnAnswerOfAnotherShapeIsAProtocolError) {
  const GroupRef group = bucket("a", 1, 1, 2);
  LimitCall call;
  OpList pending = list(acquire(group));
  plan_limit(call, kNew, pending, 0);
  Reply reply;
  EXPECT_EQ(read_answer(call, reply).status().code, Code::protocol);
  reply.kind = Reply::Kind::array;
  EXPECT_EQ(read_answer(call, reply).status().code, Code::protocol);
  for (int i = 0; i < 3; ++i) reply.items.push_back(Reply{Reply::Kind::integer, 1, {}, {}});
  EXPECT_EQ(read_answer(call, reply).status().code, Code::protocol);
}

TEST(RedisKeys, NoTwoNamesShareAKeyAndEachComesBack) {
  const std::vector<std::string> ids = {"a",  "a:t", "{a}", "}",    "%7D",  "%", "%257D", "a}:t",
                                        "{}", "{",   "x y", "\n\r", "a:b:", ":", "日本"};
  for (const Keys& keys : {Keys("rate_limit"), Keys("rate_limit", "tag"), Keys("p:*?[x]", "t t")}) {
    std::set<std::string> seen;
    for (const std::string& id : ids)
      for (const char kind : std::string("tfcws")) {
        const std::string key = keys.of(id, kind);
        EXPECT_TRUE(seen.insert(key).second) << key;
        const auto named = keys.parse(key);
        ASSERT_TRUE(named) << key;
        EXPECT_EQ(named->id, id);
        EXPECT_EQ(named->kind, kind);
      }
    EXPECT_FALSE(keys.parse("rate_limit"));
    EXPECT_FALSE(keys.parse("rate_limit:wake:0123"));
    EXPECT_FALSE(keys.parse(""));
  }
  // A store with a hash tag and one without, on the same prefix, stay apart.
  const Keys plain("p"), tagged("p", "a");
  for (const std::string& id : ids)
    for (const char kind : std::string("tfcws"))
      for (const std::string& other : ids) EXPECT_NE(plain.of(id, kind), tagged.of(other, kind));
}

TEST(RedisKeys, ThePatternIsQuoted) { EXPECT_EQ(Keys("a*[").pattern(), "a\\*\\[:{*}:[tfcws]"); }

TEST(RedisInfo, SaysProductAndVersion) {
  const auto redis = ServerInfo::parse("# Server\r\nredis_version:6.2.14\r\nredis_mode:standalone\r\n");
  EXPECT_EQ(redis.product + redis.version, "Redis6.2.14");
  EXPECT_EQ(redis.major, 6);
  EXPECT_EQ(redis.minor, 2);
  const auto valkey = ServerInfo::parse("redis_version:7.2.4\nvalkey_version:8.0.1\n");
  EXPECT_EQ(valkey.product + valkey.version, "Valkey8.0.1");
  EXPECT_EQ(valkey.major, 7);
  EXPECT_EQ(ServerInfo::parse("what?").major, 0);
}

TEST(RedisScripts, HaveTheirSha1) {
  for (const Script* script : {&limit_script(), &renew_script(), &list_script()}) {
    EXPECT_EQ(script->sha1.size(), 40u) << script->name;
    EXPECT_NE(script->source.find("redis.call('TIME')"), std::string::npos) << script->name;
  }
}

}  // namespace
}  // namespace ratesync::redis
