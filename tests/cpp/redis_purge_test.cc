// What a Redis keeps of rows that are over, and what a scan of many holds.

#include <map>

#include "ratesync/base/format.h"
#include "ratesync/redis/state_store.h"
#include "redis_state_rig.h"

namespace ratesync::testing {
namespace {

class PurgeTest : public RedisStateTest {};

TEST_F(PurgeTest, RowsDoNotVanishByThemselves) {
  create("a", 60'000);
  create("b", 60'000);
  touch("b", 1'000);
  create("gone", 60'000);
  remove("gone");
  add("n", 1, 1'000, true);
  for (const char* key : {"a", "b", "gone", "n"})
    EXPECT_EQ(say({"PTTL", row_name(key)}).value().integer, -1) << key;
}

// Makes all rows of the prefix as old as if they had been written that much earlier.
constexpr const char* kAge = R"(
  for shard = 0, 63 do
    local index = ARGV[1] .. 'expiring:{' .. shard .. '}'
    local all = redis.call('ZRANGE', index, 0, -1, 'WITHSCORES')
    for i = 1, #all, 2 do
      local row, expires = all[i], string.format('%.0f', all[i + 1] - ARGV[2])
      local m = redis.call('HGET', row, 'm')
      redis.call('HSET', row, 'm', (string.gsub(m, '^(%d+) %d+', '%1 ' .. expires)))
      redis.call('ZADD', index, expires, row)
    end
  end
  return 1)";

TEST_F(PurgeTest, WhoLivesShortlyClearsAwayWithItsWrites) {
  // Nobody gets a turn in the background.
  const std::string turn = prefix() + "purging:{0}";
  EXPECT_TRUE(say({"SET", turn, "1"}).ok());
  std::map<std::string, std::int64_t> versions;
  const auto rows = [&] {
    const Result<Reply> found = say({"EVAL",
                                     "local n = 0 for s = 0, 63 do n = n + redis.call('ZCARD', ARGV[1] .. "
                                     "'expiring:{' .. s .. '}') end return n",
                                     "0", prefix()});
    return found.value().integer;
  };
  std::int64_t most = 0;
  const int rounds = 400, keys = 5;
  for (int i = 0; i < rounds; ++i) {
    store::Store& brief = open(shared_server().url());
    store::StateStore& on = state(brief);
    std::vector<WaitedOp*> all;
    for (int k = 0; k < keys; ++k) {
      WaitedOp& op = make(StateVerb::create, formatted("dedup{}", (i * keys + k) % 1'500));
      op.ttl = 60'000;
      all.push_back(&op);
      on.submit(&op);
    }
    // One that is always the same, and whose shard must not be the only one that is looked after.
    WaitedOp& beat = make(StateVerb::set, "beat");
    beat.ttl = 3'600'000;
    on.submit(&beat);
    for (WaitedOp* op : all) {
      ASSERT_TRUE(wait_until([&] { return op->ended > 0; }));
      ASSERT_EQ(op->reply.outcome, Outcome::done) << op->reply.status.message;
      std::int64_t& last = versions[op->key];
      EXPECT_GT(op->reply.version, last) << op->key;
      last = op->reply.version;
    }
    ASSERT_TRUE(wait_until([&] { return beat.ended > 0; }));
    close(brief);
    stores_.pop_back();
    EXPECT_TRUE(say({"EVAL", kAge, "0", prefix(), "180000"}).ok());
    most = std::max(most, rows());
  }
  EXPECT_LT(most, 900) << "of " << rounds * keys << " that were written";
  EXPECT_EQ(say({"EXISTS", row_name("beat")}).value().integer, 1);
  std::string cursor = "0";
  do {  // nothing else is left of those processes either
    const Result<Reply> page = say({"SCAN", cursor, "MATCH", prefix() + "*receipt*", "COUNT", "1000"});
    cursor = page.value().items[0].text;
    EXPECT_TRUE(page.value().items[1].items.empty()) << page.value().items[1].items[0].text;
  } while (cursor != "0");
}

TEST_F(PurgeTest, SoonAfterItsStartAProcessClearsAwayByItself) {
  for (int i = 0; i < 300; ++i) state().submit(&make(StateVerb::create, formatted("k{}", i)));
  for (WaitedOp& op : ops_) ASSERT_TRUE(wait_until([&] { return op.ended > 0; }));
  for (int i = 0; i < 300; ++i) touch(formatted("k{}", i), 1'000);
  EXPECT_TRUE(say({"EVAL", kAge, "0", prefix(), "120000"}).ok());
  EXPECT_TRUE(say({"DEL", prefix() + "purging:{0}"}).ok());
  store::StateStore& second = state(open(shared_server().url()));
  EXPECT_EQ(run(second, make(StateVerb::get, "k1")).outcome, Outcome::absent);  // a read brings nothing about
  EXPECT_TRUE(wait_until([&] { return say({"EXISTS", row_name("k1")}).value().integer == 0; }));
  EXPECT_EQ(create("k1").version, 2);
}

TEST_F(PurgeTest, AnIndexThatIsWrongHoldsNobodyUp) {
  const std::string index =
      formatted("{}expiring:{{{}}}", prefix(), store::bucket_of(*space_, "k", "a") % 64);
  create("a", 1);
  let_pass(2);
  const std::string living = [&] {  // in the same shard
    for (int i = 0;; ++i) {
      std::string key = formatted("l{}", i);
      if (store::bucket_of(*space_, "k", key) % 64 == store::bucket_of(*space_, "k", "a") % 64) return key;
    }
  }();
  create(living, 60'000);
  EXPECT_TRUE(say({"RPUSH", row_name("list"), "x"}).ok());
  EXPECT_TRUE(say({"SET", row_name("text"), "x"}).ok());
  for (const std::string& wrong :
       {row_name("list"), row_name("text"), row_name("never was"), row_name(living)})
    EXPECT_TRUE(say({"ZADD", index, "1", wrong}).ok());
  EXPECT_EQ(purge(state()), 1);
  EXPECT_EQ(say({"EXISTS", row_name("a")}).value().integer, 0);
  EXPECT_EQ(say({"LLEN", row_name("list")}).value().integer, 1) << "not ours to remove";
  EXPECT_EQ(get(living).outcome, Outcome::done);
  EXPECT_EQ(say({"ZCARD", index}).value().integer, 1) << "the living one, where it belongs";
  EXPECT_GT(std::stod(say({"ZSCORE", index, row_name(living)}).value().text), 2.0);
}

TEST_F(PurgeTest, AScanOfManyHoldsAPartOfTheNamesAtOnce) {
  const std::size_t count = 200'000;
  RedisOptions one;  // shard, so that the server can make up the rows
  one.hash_tag = "x";
  store::StateStore& all = state(open(shared_server().url(), one));
  const std::string filler(200, 'x');
  const std::string name = prefix() + "state:{x}:default:default:k:";
  for (std::size_t first = 0; first < count; first += 10'000) {
    const Result<Reply> made =
        say({"EVAL",
             "for i = ARGV[1], ARGV[1] + 9999 do redis.call('HSET', ARGV[2] .. string.format('%06d', i) .. "
             "ARGV[3], 'm', '1 0 1 0 5 7', 'v', i) end return 1",
             "0", std::to_string(first), name, filler});
    ASSERT_EQ(made.value().integer, 1);
  }
  const auto& on = static_cast<redis::RedisStateStore&>(all);
  std::size_t seen = 0, pages = 0;
  std::string cursor, last;
  do {
    const auto page =
        wait_for<store::StatePage>([&](auto done) { all.scan(space_, "k", "", cursor, 5'000, done); });
    ASSERT_TRUE(page.ok()) << page.status().message;
    ASSERT_LE(page.value().rows.size(), 5'000u);
    for (const store::StateRow& row : page.value().rows) {
      ASSERT_GT(row.key, last);  // hence each once
      last = row.key;
      ++seen;
    }
    cursor = page.value().cursor;
    ++pages;
  } while (!cursor.empty());
  EXPECT_EQ(seen, count);
  EXPECT_GE(pages, 40u);
  EXPECT_LE(on.most_names(), (16u << 20) + 1'024u) << "of 60 MB of names";
  EXPECT_GT(on.most_names(), 15u << 20);
}

}  // namespace
}  // namespace ratesync::testing
