// State in memory by its promises: versions are never used twice, dead is absent, counters are exact, a batch
// is all or nothing, timeouts go to one claimer, and what expired does not stay.
#include "ratesync/memory/memory_state.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <set>

#include "memory_state_rig.h"

namespace ratesync::memory {
namespace {

constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();
constexpr std::int64_t kMin = std::numeric_limits<std::int64_t>::min();

TEST(MemoryState, TheFirstOfManyCreatesWins) {
  StateRig rig;
  EXPECT_EQ(rig.create("a").version, 1);
  StateCall again = rig.op(Verb::create, "a");
  again.value = text("other");
  again.want_actual = true;
  const StateReply reply = rig.run(again);
  EXPECT_EQ(reply.outcome, Outcome::exists);
  EXPECT_EQ(reply.version, 1);
  ASSERT_TRUE(reply.has_value);
  EXPECT_EQ(reply.value, text("v"));
  EXPECT_EQ(rig.get("a").value, text("v"));
}

TEST(MemoryState, EveryWriteAddsOneToTheVersion) {
  StateRig rig;
  EXPECT_EQ(rig.set("a", integer(5)).version, 1);
  const StateReply sum = rig.add("a", 37);
  EXPECT_EQ(sum.version, 2);
  EXPECT_EQ(sum.value, integer(42));
  EXPECT_EQ(rig.swap("a", 2).version, 3);
  EXPECT_EQ(rig.set("a", text("x")).version, 4);
  EXPECT_EQ(rig.touch("a", 1000).version, 4) << "touch is no write";
  EXPECT_EQ(rig.get("a").version, 4);
}

TEST(MemoryState, DeadIsAbsentToEveryOperation) {
  for (const bool by_time : {false, true}) {
    StateRig rig;
    rig.set("a", integer(1), by_time ? 10 : store::kNoTtl);
    if (by_time) {
      rig.pass(9);
      EXPECT_EQ(rig.get("a").outcome, Outcome::done) << "one millisecond is left";
      rig.pass(1);
    } else {
      EXPECT_EQ(rig.remove("a").outcome, Outcome::done);
    }
    for (const StateReply& reply :
         {rig.get("a"), rig.touch("a", 100), rig.swap("a", 1), rig.remove("a"), rig.remove("a", 1)}) {
      EXPECT_EQ(reply.outcome, Outcome::absent);
      EXPECT_EQ(reply.version, 0);
      EXPECT_FALSE(reply.has_value);
    }
    EXPECT_TRUE(rig.keys().empty());
    EXPECT_EQ(rig.add("a", 7).value, integer(7)) << "the old sum is gone";
    EXPECT_EQ(rig.get("a").version, 2);
  }
}

TEST(MemoryState, AVersionIsNeverUsedTwice) {
  StateRig rig;
  rig.set("a", text("x"));
  rig.set("a", text("y"));
  rig.remove("a");
  EXPECT_EQ(rig.create("a").version, 3) << "over its own remains";
  rig.remove("a");
  EXPECT_EQ(rig.purge(), 1);
  EXPECT_EQ(rig.memory.rows(), 0u);
  EXPECT_EQ(rig.create("a").version, 4) << "and where they were thrown away";
  EXPECT_EQ(rig.swap("a", 3).outcome, Outcome::stale);
}

TEST(MemoryState, AFreshKeyBeginsAtOneWhereNothingWasThrownAway) {
  StateRig rig;
  for (int i = 0; i < 1000; ++i) EXPECT_EQ(rig.create("key" + std::to_string(i)).version, 1);
}

TEST(MemoryState, AStaleSwapSaysWhatIsThereAndChangesNothing) {
  StateRig rig;
  rig.set("a", text("one"));
  StateCall call = rig.op(Verb::swap, "a");
  call.expected = 7;
  call.want_actual = true;
  const StateReply reply = rig.run(call);
  EXPECT_EQ(reply.outcome, Outcome::stale);
  EXPECT_EQ(reply.version, 1);
  EXPECT_EQ(reply.value, text("one"));
  EXPECT_EQ(rig.remove("a", 2).outcome, Outcome::stale);
  EXPECT_EQ(rig.touch("a", 5, 2).outcome, Outcome::stale);
  EXPECT_EQ(rig.get("a").expires_at, 0);
  EXPECT_EQ(rig.remove("a", 1).outcome, Outcome::done);
}

TEST(MemoryState, ExpiryIsSetKeptOrRenewedAsAsked) {
  StateRig rig;
  const std::int64_t t0 = rig.now();
  EXPECT_EQ(rig.set("a", text("x"), 1000).expires_at, t0 + 1000);
  rig.pass(100);
  EXPECT_EQ(rig.swap("a", 1).expires_at, t0 + 1000) << "kept";
  EXPECT_EQ(rig.swap("a", 2, 500).expires_at, t0 + 600);
  EXPECT_EQ(rig.set("a", text("x")).expires_at, 0) << "set replaces it";
  EXPECT_EQ(rig.touch("a", 50).expires_at, t0 + 150);
  EXPECT_EQ(rig.set("a", text("x"), store::kKeepTtl).expires_at, t0 + 150);
  EXPECT_EQ(rig.add("n", 1, 200).expires_at, t0 + 300);
  rig.pass(50);
  EXPECT_EQ(rig.add("n", 1, 200).expires_at, t0 + 300) << "the window of a counter is that of its start";
  EXPECT_EQ(rig.add("n", 1, 200, true).expires_at, t0 + 350);
  EXPECT_EQ(rig.add("n", 1, store::kNoTtl, true).expires_at, 0);
  EXPECT_EQ(rig.set("b", text("x"), kMax).expires_at, 0) << "as good as never";
  EXPECT_EQ(rig.set("c", text("x"), store::kKeepTtl).expires_at, 0) << "nothing to keep";
  EXPECT_EQ(rig.get("b").outcome, Outcome::done);
}

TEST(MemoryState, ACounterRefusesWhatDoesNotFit) {
  StateRig rig;
  rig.set("n", integer(kMax - 1));
  EXPECT_EQ(rig.add("n", 1).value, integer(kMax));
  EXPECT_EQ(rig.add("n", 1).outcome, Outcome::overflow);
  EXPECT_EQ(rig.get("n").value, integer(kMax));
  EXPECT_EQ(rig.get("n").version, 2);
  rig.set("n", integer(kMin));
  EXPECT_EQ(rig.add("n", -1).outcome, Outcome::overflow);
  EXPECT_EQ(rig.add("n", kMax).value, integer(-1));
  rig.set("t", text("5"));
  EXPECT_EQ(rig.add("t", 1).outcome, Outcome::not_integer);
  EXPECT_EQ(rig.get("t").value, text("5"));
  rig.remove("t");
  EXPECT_EQ(rig.add("t", kMin).value, integer(kMin)) << "a dead text is no text";
}

TEST(MemoryState, ARowThatExpiredMayBeRevivedByTheOneWhoWroteIt) {
  StateRig rig;
  rig.create("a", 10);
  rig.pass(20);
  EXPECT_EQ(rig.swap("a", 1, 1000).outcome, Outcome::absent) << "not unless asked for";
  EXPECT_EQ(rig.swap("a", 2, 1000, true).outcome, Outcome::absent);
  const StateReply revived = rig.swap("a", 1, 1000, true);
  EXPECT_EQ(revived.outcome, Outcome::done);
  EXPECT_EQ(revived.version, 2);
  EXPECT_EQ(rig.get("a").value, text("swapped"));
  rig.remove("a");
  EXPECT_EQ(rig.swap("a", 2, 1000, true).outcome, Outcome::absent) << "deleted is deleted";
  rig.create("a", 10);
  rig.pass(20);
  rig.create("a", 10);
  EXPECT_EQ(rig.swap("a", 3, 1000, true).outcome, Outcome::stale) << "somebody else has it now";
}

TEST(MemoryState, AClaimThatExpiredIsNotThrownAwayAtOnce) {
  StateRig rig;
  StateCall claim = rig.op(Verb::create, "claim");
  claim.ttl = 10;
  claim.want_actual = true;
  rig.run(claim);
  rig.create("mark", 10);
  rig.pass(1000);
  EXPECT_EQ(rig.purge(), 1) << "the mark only";
  StateCall late = rig.op(Verb::swap, "claim");
  late.expected = 1;
  late.ttl = 10;
  late.revive = late.want_actual = true;
  EXPECT_EQ(rig.run(late).outcome, Outcome::done);
  rig.pass(10);
  EXPECT_EQ(rig.purge(), 1) << "swapped, it is a row like others";
  rig.run(claim);
  rig.pass(10 + kClaimGraceMs - 1);
  EXPECT_EQ(rig.purge(), 0);
  rig.pass(1);
  EXPECT_EQ(rig.purge(), 1);
}

TEST(MemoryState, PartsOfAKeyDoNotRunTogether) {
  StateRig rig;
  const auto put = [&](const char* name_space, const char* tenant, const char* kind, const std::string& key) {
    StateCall call = rig.op(Verb::create, key);
    call.space = std::make_shared<const store::Space>(store::Space{name_space, tenant});
    call.kind = kind;
    return rig.run(call).outcome;
  };
  EXPECT_EQ(put("a:b", "c", "k", "x"), Outcome::done);
  EXPECT_EQ(put("a", "b:c", "k", "x"), Outcome::done);
  EXPECT_EQ(put("a", "b", "c:k", "x"), Outcome::done);
  EXPECT_EQ(put("a", "b", "c", "k:x"), Outcome::done);
  EXPECT_EQ(put("1:a", "1:b", "c", "x"), Outcome::done);
  EXPECT_EQ(put("1:a1", ":b", "c", "x"), Outcome::done);
  EXPECT_EQ(put("a", "b", "c", "k:x"), Outcome::exists);
  EXPECT_EQ(rig.store.state("other_").value() == &rig.state, false);
  EXPECT_EQ(rig.store.state("t_").value(), &rig.state);
  EXPECT_EQ(rig.store.state(std::string(41, 'x')).status().code, Code::invalid);
}

TEST(MemoryState, ValuesComeBackAsTheyWere) {
  StateRig rig;
  const std::string zeros(3, '\0');
  for (const store::Value& value :
       {store::Value{store::Value::Type::bytes, zeros + "\xff", 0}, text(""), text("ünïcode"),
        store::Value{store::Value::Type::json, R"({"a":1})", 0}, integer(0), integer(kMin),
        text(std::string(100'000, 'y')), store::Value{store::Value::Type::bytes, "", 0}}) {
    rig.set("a", value);
    const StateReply reply = rig.get("a");
    EXPECT_TRUE(reply.has_value);
    EXPECT_EQ(reply.value, value);
  }
}

TEST(MemoryState, KeysOfEveryLengthAreToldApart) {
  StateRig rig;
  std::set<std::string> keys;
  for (std::size_t size = 1; size <= 40; ++size)
    for (std::size_t place = 0; place < size; ++place) {
      std::string key(size, 'a');
      key[place] = 'b';
      keys.insert(key);
    }
  keys.insert(std::string(1024, 'z'));
  for (const std::string& key : keys) EXPECT_EQ(rig.create(key).outcome, Outcome::done) << key;
  for (const std::string& key : keys) EXPECT_EQ(rig.create(key).outcome, Outcome::exists) << key;
  EXPECT_EQ(rig.memory.rows(), keys.size());
}

// --- batches --------------------------------------------------------------------------------------

TEST(MemoryStateBatch, AllOrNothing) {
  StateRig rig;
  rig.set("there", text("old"));
  StateCall create = rig.op(Verb::create, "fresh");
  StateCall swap = rig.op(Verb::swap, "there");
  swap.expected = 9;
  StateCall due = rig.op(Verb::schedule, "due");
  StateCall get = rig.op(Verb::get, "there");
  EXPECT_FALSE(rig.batch({&create, &swap, &due, &get}));
  EXPECT_EQ(create.reply.outcome, Outcome::rolled_back);
  EXPECT_EQ(swap.reply.outcome, Outcome::stale);
  EXPECT_EQ(swap.reply.version, 1);
  EXPECT_EQ(due.reply.outcome, Outcome::rolled_back);
  EXPECT_EQ(get.reply.outcome, Outcome::rolled_back);
  EXPECT_FALSE(get.reply.has_value);
  EXPECT_EQ(rig.get("fresh").outcome, Outcome::absent);
  EXPECT_TRUE(rig.claim_due(10, 1).empty());

  swap.expected = 1;
  EXPECT_TRUE(rig.batch({&create, &swap, &due, &get}));
  EXPECT_EQ(create.reply.version, 1);
  EXPECT_EQ(swap.reply.version, 2);
  EXPECT_EQ(get.reply.outcome, Outcome::done);
  EXPECT_EQ(rig.get("fresh").outcome, Outcome::done);
  EXPECT_EQ(rig.get("there").value, text("v"));
  EXPECT_EQ(rig.claim_due(10, 1).size(), 1u);
}

TEST(MemoryStateBatch, GetAndRemoveMayFindNothing) {
  StateRig rig;
  StateCall get = rig.op(Verb::get, "no");
  StateCall remove = rig.op(Verb::remove, "nor this");
  remove.expected = store::kAnyVersion;
  StateCall add = rig.op(Verb::add, "n");
  add.delta = 2;
  EXPECT_TRUE(rig.batch({&get, &remove, &add}));
  EXPECT_EQ(get.reply.outcome, Outcome::absent);
  EXPECT_EQ(remove.reply.outcome, Outcome::absent);
  EXPECT_EQ(add.reply.value, integer(2));
  StateCall touch = rig.op(Verb::touch, "no");
  touch.expected = store::kAnyVersion;
  touch.ttl = 5;
  EXPECT_FALSE(rig.batch({&add, &touch})) << "touch may not";
  EXPECT_EQ(rig.get("n").value, integer(2));
}

TEST(MemoryStateBatch, ManyFreshKeysSurviveTheGrowthOfTheirTables) {
  StateRig rig;
  std::vector<StateCall> calls;
  for (int i = 0; i < 20'000; ++i) calls.push_back(rig.op(Verb::create, "key" + std::to_string(i)));
  std::vector<StateCall*> all;
  for (StateCall& call : calls) all.push_back(&call);
  EXPECT_TRUE(rig.batch(all));
  EXPECT_EQ(rig.keys("", 1000).size(), calls.size());
  EXPECT_FALSE(rig.batch(all));
  StateCall more = rig.op(Verb::create, "one more");
  EXPECT_FALSE(rig.batch({&more, &calls[77]}));
  EXPECT_EQ(rig.get("one more").outcome, Outcome::absent);
  BatchCall empty;
  rig.state.submit(&empty);
  EXPECT_TRUE(empty.applied);
}

// --- scans ----------------------------------------------------------------------------------------

TEST(MemoryStateScan, ComesInTheOrderOfBytesPageByPage) {
  StateRig rig;
  const std::vector<std::string> names = {
      "a", "a%", "a*", "a_", "ab", "abc", "b", "\xc3\xa9", "\xf0\x9f\x98\x80"};
  for (const std::string& name : names) rig.create(name);
  for (const std::size_t size : {1u, 2u, 3u, 8u, 9u, 10u, 1000u}) EXPECT_EQ(rig.keys("", size), names);
  EXPECT_EQ(rig.keys("a"), std::vector<std::string>(names.begin(), names.begin() + 6));
  EXPECT_EQ(rig.keys("a%"), std::vector<std::string>{"a%"}) << "no pattern";
  EXPECT_TRUE(rig.keys("c").empty());
  EXPECT_TRUE(rig.keys("", 3, "other kind").empty());
}

TEST(MemoryStateScan, WhatIsThereAllTheTimeComesExactlyOnce) {
  StateRig rig;
  std::set<std::string> steady;
  for (int i = 0; i < 3000; ++i) {
    const std::string name = "key" + std::to_string(i);
    rig.create(name);
    if (i % 3 != 0) steady.insert(name);
  }
  std::multiset<std::string> seen;
  std::string cursor;
  int turn = 0;
  do {
    auto page = rig.page("", cursor, 100);
    for (const store::StateRow& row : page.value().rows) seen.insert(row.key);
    cursor = page.value().cursor;
    // Meanwhile others come and go, tables grow, and the list of this scan is pushed out.
    for (int i = 0; i < 300; ++i) rig.create("new" + std::to_string(++turn));
    for (int i = turn % 900; i < 3000; i += 3) rig.remove("key" + std::to_string(i - i % 3));
    for (int i = 0; i < 9 && turn % 600 == 0; ++i) (void)rig.page("", "", 1);
    if (turn > 20'000) break;
  } while (!cursor.empty());
  for (const std::string& name : steady) EXPECT_EQ(seen.count(name), 1u) << name;
  for (const std::string& name : seen) EXPECT_EQ(seen.count(name), 1u) << name;
}

TEST(MemoryStateScan, MoreKeysThanOneListHolds) {
  StateRig rig;
  std::vector<std::string> names;
  std::uint32_t random = 1;
  for (std::size_t i = 0; i < 3 * Scans::kKeys + 5; ++i) {
    random = random * 1664525u + 1013904223u;
    names.push_back("key" + std::to_string(random));  // a full cycle: no number comes twice
    rig.create(names.back());
  }
  std::sort(names.begin(), names.end());
  EXPECT_EQ(rig.keys("", 10'000), names);
  EXPECT_EQ(rig.keys("", Scans::kKeys), names) << "a page as long as a list";
  EXPECT_EQ(rig.keys("", 150'000), names);
  EXPECT_EQ(rig.keys("", names.size()), names);
}

TEST(MemoryStateScan, ACursorOfSomethingElseDoesNoHarm) {
  StateRig rig;
  for (int i = 0; i < 10; ++i) rig.create("key" + std::to_string(i));
  for (const char* bad : {"x", "1", ":", "99999999999999999999:a", "-1:a"})
    EXPECT_EQ(rig.page("", bad, 2).status().code, Code::invalid) << bad;
  const std::string cursor = rig.page("", "", 2).value().cursor;
  ASSERT_FALSE(cursor.empty());
  EXPECT_TRUE(rig.page("zzz", cursor, 2).value().rows.empty()) << "of another prefix";
  EXPECT_EQ(rig.page("", "77:key4", 2).value().rows[0].key, "key5") << "its list was dropped";
  EXPECT_EQ(rig.page("", cursor, 2).value().rows[0].key, "key2");
}

TEST(MemoryStateScan, RowsThatDiedOnTheWayAreLeftOut) {
  StateRig rig;
  for (int i = 0; i < 6; ++i) rig.create("key" + std::to_string(i), i % 2 == 0 ? 10 : store::kNoTtl);
  auto first = rig.page("", "", 2);
  EXPECT_EQ(first.value().rows.size(), 2u);
  rig.pass(10);
  auto second = rig.page("", first.value().cursor, 2);
  ASSERT_EQ(second.value().rows.size(), 2u);
  EXPECT_EQ(second.value().rows[0].key, "key3");
  EXPECT_EQ(second.value().rows[1].key, "key5");
  EXPECT_EQ(second.value().cursor, "");
}

// --- timeouts -------------------------------------------------------------------------------------

TEST(MemoryStateTimeouts, FallDueOldestFirstAndToOneClaimer) {
  StateRig rig;
  const std::int64_t t0 = rig.now();
  rig.schedule("late", t0 + 300);
  rig.schedule("early", t0 + 100);
  rig.schedule("between", 200, true, "other");
  EXPECT_TRUE(rig.claim_due(10, 1000).empty());
  rig.pass(300);
  EXPECT_TRUE(rig.claim_due(0, 1000).empty());
  const auto first = rig.claim_due(2, 1000);
  ASSERT_EQ(first.size(), 2u);
  EXPECT_EQ(first[0].key, "early");
  EXPECT_EQ(first[0].due, t0 + 100);
  EXPECT_EQ(first[1].key, "between");
  EXPECT_EQ(first[1].kind, "other");
  EXPECT_LT(first[0].claim, first[1].claim);
  EXPECT_EQ(rig.claim_due(10, 1000).size(), 1u);
  EXPECT_TRUE(rig.claim_due(10, 1000).empty()) << "all of them are somebody's";
  rig.pass(1000);
  const auto again = rig.claim_due(10, 1000, "k");
  ASSERT_EQ(again.size(), 2u);
  EXPECT_EQ(again[0].due, t0 + 100) << "when it fell due at first";
  EXPECT_EQ(rig.unschedule("early", first[0].claim).outcome, Outcome::stale) << "claimed again since";
  EXPECT_EQ(rig.unschedule("early", again[0].claim).outcome, Outcome::done);
  EXPECT_EQ(rig.unschedule("early").outcome, Outcome::absent);
}

TEST(MemoryStateTimeouts, RescheduledTheOldClaimIsVoid) {
  StateRig rig;
  rig.schedule("a", 0, true);
  const auto claimed = rig.claim_due(1, 50);
  ASSERT_EQ(claimed.size(), 1u);
  rig.schedule("a", 100, true);
  EXPECT_EQ(rig.unschedule("a", claimed[0].claim).outcome, Outcome::stale);
  rig.pass(99);
  EXPECT_TRUE(rig.claim_due(1, 50).empty());
  rig.pass(1);
  EXPECT_EQ(rig.claim_due(1, 50).size(), 1u);
  EXPECT_EQ(rig.unschedule("a").outcome, Outcome::done) << "without a claim: whoever has it";
  EXPECT_EQ(rig.get("a").outcome, Outcome::absent) << "a timeout is no row";
}

TEST(MemoryStateTimeouts, ExtremeTimesDoNotOverflow) {
  StateRig rig;
  rig.schedule("never", kMax, true);
  rig.schedule("long ago", kMin, true);
  rig.schedule("longer ago", kMin);
  EXPECT_EQ(rig.claim_due(10, kMax).size(), 2u);
  rig.pass(1'000'000);
  EXPECT_TRUE(rig.claim_due(10, kMax).empty());
}

TEST(MemoryStateTimeouts, BelongToTheirSpace) {
  StateRig rig;
  rig.schedule("a", 0, true);
  rig.space = std::make_shared<const store::Space>(store::Space{"default", "other"});
  EXPECT_TRUE(rig.claim_due(10, 1).empty());
  EXPECT_EQ(rig.unschedule("a").outcome, Outcome::absent);
}

// --- what expired does not stay -------------------------------------------------------------------

TEST(MemoryStatePurge, ExpiredKeysGoAwayWhileOthersAreWritten) {
  StateRig rig;
  constexpr int kKeys = 200'000;
  for (int i = 0; i < kKeys; ++i) rig.create("old" + std::to_string(i), 1000);
  EXPECT_EQ(rig.memory.rows(), static_cast<std::size_t>(kKeys));
  rig.pass(1000);
  for (int i = 0; i < kKeys / 2; ++i) rig.create("new" + std::to_string(i), 1000);
  EXPECT_LT(rig.memory.rows(), static_cast<std::size_t>(kKeys / 2 + 1000));
  // Writes of one single key do it, too.
  rig.pass(1000);
  for (int i = 0; i < kKeys; ++i) rig.add("one counter", 1);
  EXPECT_LT(rig.memory.rows(), 1000u);
  EXPECT_EQ(rig.get("one counter").value, integer(kKeys));
}

TEST(MemoryStatePurge, WhatIsWrittenDuringASweepIsFoundByTheNext) {
  StateRig rig;
  constexpr int kKeys = 100'000;
  constexpr int kShort = kKeys / 10;
  constexpr int kRenewed = kKeys / 200;  // few, so that no other row of a table hides that one was missed
  for (int i = 0; i < kKeys; ++i) rig.create("key" + std::to_string(i), i % 10 == 0 ? 10 : store::kNoTtl);
  rig.pass(1000);
  for (int i = 0; i < kKeys; ++i) rig.touch("key" + std::to_string(i), i % 200 == 1 ? 5000 : store::kNoTtl);
  rig.pass(5000);
  for (int i = 0; i < 2 * kKeys; ++i) rig.add("one counter", 1);
  EXPECT_EQ(rig.memory.rows(), static_cast<std::size_t>(kKeys - kShort - kRenewed + 1));
}

TEST(MemoryStatePurge, NoVersionComesBackWhateverIsThrownAwayBetween) {
  StateRig rig;
  std::vector<std::int64_t> newest(500, 0);
  std::uint32_t random = 12345;
  for (int i = 0; i < 200'000; ++i) {
    random = random * 1664525u + 1013904223u;
    const std::size_t which = (random >> 8) % newest.size();
    const std::string name = "key" + std::to_string(which);
    switch ((random >> 24) % 5) {
      case 0: rig.remove(name); break;
      case 1: rig.pass(1); break;
      case 2:
        if ((random >> 27) == 0) rig.purge(50);
        break;
      default: {
        const StateReply reply = rig.create(name, 1 + random % 20);
        if (reply.outcome != Outcome::done) break;
        ASSERT_GT(reply.version, newest[which]) << name;
        newest[which] = reply.version;
      }
    }
  }
  EXPECT_LE(rig.memory.rows(), newest.size());
}

TEST(MemoryStatePurge, TakesNoMoreThanItsLimit) {
  StateRig rig;
  for (int i = 0; i < 100; ++i) rig.create("key" + std::to_string(i), 5);
  EXPECT_EQ(rig.purge(), 0) << "they live";
  rig.pass(5);
  EXPECT_EQ(rig.purge(30), 30);
  EXPECT_EQ(rig.purge(0), 0);
  EXPECT_EQ(rig.purge(), 70);
  EXPECT_EQ(rig.purge(), 0);
}

TEST(MemoryStateFamilies, OnesWithoutUseAreForgottenAndTheirVersionsAreNot) {
  StateRig rig;
  const auto write = [&](const std::string& tenant, std::int64_t ttl) {
    StateCall call = rig.op(Verb::set, "k");
    call.space = std::make_shared<const store::Space>(store::Space{"n", tenant});
    call.ttl = ttl;
    return rig.run(std::move(call)).version;
  };
  std::vector<std::int64_t> last;
  for (int i = 0; i < 200; ++i) last.push_back(write("early" + std::to_string(i), 1'000));
  for (std::int64_t& version : last) version = write("early" + std::to_string(&version - last.data()), 1'000);
  EXPECT_EQ(write("stays", store::kNoTtl), 1);
  const FamilyRef held = rig.memory.family(*rig.space, "held, without a row");
  rig.pass(10'000);
  for (int day = 0; day < 20'000; ++day) {
    write("day" + std::to_string(day), 1'000);
    rig.pass(10);
    if (day % 500 == 0) rig.purge();
  }
  EXPECT_LE(rig.memory.families(), 2'500u);
  EXPECT_EQ(rig.memory.family(*rig.space, "held, without a row"), held);
  EXPECT_EQ(write("stays", store::kNoTtl), 2);
  for (std::size_t i = 0; i < last.size(); ++i)
    EXPECT_GT(write("early" + std::to_string(i), 1'000), last[i]) << "no version twice";
}

TEST(MemoryStateFamilies, OneThatIsOnlyLookedAtCostsNothingForLong) {
  StateRig rig;
  for (int i = 0; i < 20'000; ++i) {
    StateCall call = rig.op(Verb::get, "k");
    call.kind = std::to_string(i);
    EXPECT_EQ(rig.run(std::move(call)).outcome, Outcome::absent);
  }
  EXPECT_LE(rig.memory.families(), 2'048u);
}

TEST(MemoryStateFamilies, ACursorOfOneThatWasForgottenFindsWhatIsThereNow) {
  StateRig rig;
  for (const char* key : {"a", "b", "c", "d"}) rig.create(key, 1'000);
  const std::string cursor = rig.page("", "", 2).value().cursor;
  ASSERT_NE(cursor, "");
  rig.pass(2'000);
  rig.purge();
  for (int i = 0; i < 5'000; ++i) (void)rig.memory.family(*rig.space, std::to_string(i));
  rig.create("c");
  rig.create("e");
  std::vector<std::string> rest;
  auto page = rig.page("", cursor, 10);
  for (const store::StateRow& row : page.value().rows) rest.push_back(row.key);
  ASSERT_FALSE(rest.empty());
  EXPECT_EQ(rest.front(), "c");
}

}  // namespace
}  // namespace ratesync::memory
