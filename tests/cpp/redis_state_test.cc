// State in a real Redis: what each operation does, to whom, and for how long.

#include <set>

#include "ratesync/base/format.h"
#include "redis_state_rig.h"

namespace ratesync::testing {
namespace {

class StateTest : public RedisStateTest {};

TEST_F(StateTest, OneOfManyCreatesIt) {
  EXPECT_EQ(get("a").outcome, Outcome::absent);
  std::deque<WaitedOp> all(500);
  for (WaitedOp& op : all) {
    op.verb = StateVerb::create;
    op.space = space_;
    op.kind = "k";
    op.key = "a";
    op.value = text_value("mine");
    op.id = next_id();
    state().submit(&op);
  }
  ASSERT_TRUE(wait_until([&] { return all.back().ended > 0; }));
  int created = 0;
  for (const WaitedOp& op : all) {
    EXPECT_EQ(op.ended, 1);
    created += op.reply.outcome == Outcome::done ? 1 : 0;
    EXPECT_EQ(op.reply.version, 1);
  }
  EXPECT_EQ(created, 1);
  EXPECT_EQ(all.front().reply.outcome, Outcome::done) << "in the order in which they were submitted";
  const StateReply& found = get("a");
  EXPECT_EQ(found.outcome, Outcome::done);
  EXPECT_EQ(found.value, text_value("mine"));
  EXPECT_EQ(found.version, 1);
  EXPECT_EQ(found.expires_at, 0);
}

TEST_F(StateTest, CreateShowsWhatIsThere) {
  write(StateVerb::set, "a", number_value(7));
  WaitedOp& op = make(StateVerb::create, "a");
  op.value = text_value("x");
  EXPECT_FALSE(run(op).has_value);
  WaitedOp& want = make(StateVerb::create, "a");
  want.value = text_value("x");
  want.want_actual = true;
  const StateReply& reply = run(want);
  EXPECT_EQ(reply.outcome, Outcome::exists);
  EXPECT_TRUE(reply.has_value);
  EXPECT_EQ(reply.value, number_value(7));
}

TEST_F(StateTest, ValuesOfEveryType) {
  std::string bytes;
  for (int i = 0; i < 256; ++i) bytes += static_cast<char>(i);
  std::vector<Value> values(3);
  values[0].data = bytes;
  values[1].type = Value::Type::json;
  values[1].data = "{\"a\": [1, null]}";
  values[2].type = Value::Type::text;  // empty
  values.push_back(text_value("\r\n$-1\r\n"));
  values.push_back(number_value(kLeast));
  values.push_back(number_value(kMost));
  std::int64_t version = 0;
  for (const Value& value : values) {
    EXPECT_EQ(write(StateVerb::set, "v", value).version, ++version);
    EXPECT_EQ(get("v").value, value);
  }
  Value large;
  large.data = std::string(5 << 20, 'x') + '\0';
  write(StateVerb::set, "large", large);
  EXPECT_EQ(get("large").value, large);
}

TEST_F(StateTest, VersionsOfWrites) {
  EXPECT_EQ(write(StateVerb::set, "a", text_value("1")).version, 1);
  EXPECT_EQ(write(StateVerb::swap, "a", text_value("2"), store::kKeepTtl, 1).version, 2);
  const StateReply& stale = write(StateVerb::swap, "a", text_value("3"), store::kKeepTtl, 1);
  EXPECT_EQ(stale.outcome, Outcome::stale);
  EXPECT_EQ(stale.version, 2);
  EXPECT_EQ(write(StateVerb::swap, "none", text_value("3"), store::kKeepTtl, 1).outcome, Outcome::absent);
  // Near 2^53 doubles are not told apart.
  EXPECT_EQ(write(StateVerb::swap, "a", text_value("3"), store::kKeepTtl, kMost).outcome, Outcome::stale);
  EXPECT_EQ(remove("a", 1).outcome, Outcome::stale);
  EXPECT_EQ(remove("a", 2).outcome, Outcome::done);
  EXPECT_EQ(remove("a").outcome, Outcome::absent);
  EXPECT_EQ(get("a").outcome, Outcome::absent);
  EXPECT_EQ(get("a").version, 0);
  EXPECT_EQ(write(StateVerb::swap, "a", text_value("3"), store::kKeepTtl, 2).outcome, Outcome::absent);
  EXPECT_EQ(create("a").version, 3) << "no version twice";
  EXPECT_EQ(touch("a", 60'000).version, 3);
  EXPECT_EQ(get("a").value, text_value("1"));
}

TEST_F(StateTest, ExactSums) {
  EXPECT_EQ(add("n", 5).value, number_value(5));
  EXPECT_EQ(add("n", -7).value, number_value(-2));
  EXPECT_EQ(get("n").version, 2);
  write(StateVerb::set, "n", number_value(kMost - 1));
  EXPECT_EQ(add("n", 1).value, number_value(kMost));
  const StateReply& over = add("n", 1);
  EXPECT_EQ(over.outcome, Outcome::overflow);
  EXPECT_EQ(over.version, 4);
  EXPECT_EQ(get("n").value, number_value(kMost));
  EXPECT_EQ(add("n", kLeast).value, number_value(-1));
  EXPECT_EQ(add("n", kLeast).outcome, Outcome::overflow);
  EXPECT_EQ(add("n", kMost).value, number_value(kMost - 1));
  EXPECT_EQ(add("low", kLeast).value, number_value(kLeast));
  EXPECT_EQ(add("low", -1).outcome, Outcome::overflow);
  for (const std::int64_t each : {(1LL << 53) + 1, (1LL << 52) - 1, 1LL << 52, -(1LL << 53) - 1}) {
    write(StateVerb::set, "edge", number_value(each));
    EXPECT_EQ(add("edge", 1).value, number_value(each + 1));
    EXPECT_EQ(add("edge", -each).value, number_value(1));
  }
  for (const char* text : {"5", "", "x"}) {
    write(StateVerb::set, "text", text_value(text));
    EXPECT_EQ(add("text", 1).outcome, Outcome::not_integer);
    EXPECT_EQ(get("text").value, text_value(text));
  }
}

TEST_F(StateTest, TimesToLive) {
  const std::int64_t before = server_ms();
  const StateReply& made = create("a", 300'000);
  EXPECT_GE(made.expires_at, before + 300'000);
  EXPECT_LE(made.expires_at, server_ms() + 300'000);
  const std::int64_t expires = made.expires_at;
  EXPECT_EQ(write(StateVerb::swap, "a", number_value(1), store::kKeepTtl, 1).expires_at, expires);
  EXPECT_EQ(add("a", 1, 1'000).expires_at, expires) << "not renewed";
  EXPECT_LT(add("a", 1, 1'000, true).expires_at, expires);
  EXPECT_EQ(touch("a", store::kNoTtl).expires_at, 0);
  EXPECT_EQ(get("a").expires_at, 0);
  EXPECT_GT(touch("a", 500'000).expires_at, expires);
  EXPECT_EQ(write(StateVerb::set, "a", number_value(1)).expires_at, 0) << "set replaces it";
  EXPECT_EQ(touch("none", 5).outcome, Outcome::absent);
  EXPECT_EQ(touch("a", 5, 77).outcome, Outcome::stale);
  EXPECT_EQ(write(StateVerb::set, "far", number_value(1), kMost).outcome, Outcome::done);
  EXPECT_EQ(get("far").outcome, Outcome::done);

  const StateReply& brief = create("brief", 1);
  EXPECT_EQ(brief.outcome, Outcome::done);
  const std::int64_t over = brief.expires_at;
  ASSERT_TRUE(wait_until([&] { return server_ms() > over; }));
  EXPECT_EQ(get("brief").outcome, Outcome::absent);
  EXPECT_EQ(touch("brief", 1'000).outcome, Outcome::absent);
  EXPECT_EQ(remove("brief").outcome, Outcome::absent);
  EXPECT_EQ(create("brief", 1'000).version, 2) << "it continues";
}

TEST_F(StateTest, WhatExpiredMayBeRevivedButNotWhatWasRemoved) {
  const auto revive = [&](const char* key, std::int64_t expected) -> StateReply& {
    WaitedOp& op = make(StateVerb::swap, key);
    op.value = text_value("late");
    op.expected = expected;
    op.revive = true;
    return run(op);
  };
  create("a", 1);
  create("b", 60'000);
  remove("b");
  create("c", 1);
  let_pass(2);
  create("c", 60'000);
  EXPECT_EQ(revive("a", 7).outcome, Outcome::absent);
  EXPECT_EQ(revive("a", 1).outcome, Outcome::done);
  EXPECT_EQ(get("a").value, text_value("late"));
  EXPECT_EQ(revive("b", 1).outcome, Outcome::absent);
  const StateReply& taken = revive("c", 1);
  EXPECT_EQ(taken.outcome, Outcome::stale);
  EXPECT_EQ(taken.version, 2);
}

TEST_F(StateTest, VersionsOutliveTheirRows) {
  for (int i = 0; i < 4; ++i) write(StateVerb::set, "a", number_value(i), 1);
  create("stays");
  create("removed");
  remove("removed");
  let_pass(2);
  EXPECT_EQ(purge(state()), 2);
  EXPECT_EQ(purge(state()), 0);
  EXPECT_EQ(say({"EXISTS", row_name("a")}).value().integer, 0);
  EXPECT_EQ(get("stays").outcome, Outcome::done);
  EXPECT_EQ(create("a").version, 5);
  EXPECT_EQ(add("removed", 1).version, 2);
  for (int i = 0; i < 300; ++i) create(formatted("many{}", i), 1);
  let_pass(2);
  EXPECT_EQ(purge(state(), 10), 10);
  EXPECT_EQ(purge(state()), 290);
}

TEST_F(StateTest, HostileNames) {
  std::string bytes;
  for (int i = 1; i < 256; ++i) bytes += static_cast<char>(i);
  const std::vector<std::string> parts = {"a",  "a:b",  ":", "::",  "%",  "%3A", "{",  "}",
                                          "{}", "{0}",  "*", "?",   "[a", "]",   "\\", "a*",
                                          "\"", "\r\n", " ", bytes, "-1", "\xff"};
  std::vector<WaitedOp*> all;
  for (const std::string& name_space : {std::string("a"), std::string("a:b"), std::string("%3A")})
    for (const std::string& kind : parts)
      for (const std::string& key : parts) {
        WaitedOp& op = make(StateVerb::create, key);
        op.space = std::make_shared<const Space>(Space{name_space, kind});
        op.kind = kind;
        op.value = text_value(name_space + '/' + kind + '/' + key);
        all.push_back(&op);
        state().submit(&op);
      }
  for (WaitedOp* op : all) {
    ASSERT_TRUE(wait_until([&] { return op->ended > 0; }));
    ASSERT_EQ(op->reply.outcome, Outcome::done) << op->key;
    WaitedOp& again = make(StateVerb::get, op->key);
    again.space = op->space;
    again.kind = op->kind;
    ASSERT_EQ(run(again).value, op->value);
  }
}

TEST_F(StateTest, AllOrNothing) {
  create("a");
  create("b");
  const auto batch = [&](std::int64_t expected_of_b) {
    auto out = std::make_unique<WaitedBatch>();
    WaitedOp& swap_a = make(StateVerb::swap, "a");
    swap_a.expected = 1;
    swap_a.value = text_value("new a");
    WaitedOp& swap_b = make(StateVerb::swap, "b");
    swap_b.expected = expected_of_b;
    swap_b.want_actual = true;
    swap_b.value = text_value("new b");
    WaitedOp& sum = make(StateVerb::add, "n");
    sum.delta = kMost;
    out->ops = {&swap_a, &swap_b, &sum, &make(StateVerb::get, "none"), &make(StateVerb::create, "c")};
    out->deadline = clock_.now() + 20 * kSecond;
    state().submit(out.get());
    EXPECT_TRUE(wait_until([&] { return out->ended > 0; }));
    EXPECT_TRUE(out->status.ok()) << out->status.message;
    return out;
  };
  const auto refused = batch(9);
  EXPECT_FALSE(refused->applied);
  EXPECT_EQ(refused->ops[0]->reply.outcome, Outcome::rolled_back);
  EXPECT_EQ(refused->ops[1]->reply.outcome, Outcome::stale);
  EXPECT_EQ(refused->ops[1]->reply.value, text_value("1"));
  EXPECT_EQ(refused->ops[2]->reply.outcome, Outcome::rolled_back);
  EXPECT_EQ(refused->ops[3]->reply.outcome, Outcome::absent);
  EXPECT_EQ(get("a").version, 1);
  EXPECT_EQ(get("n").outcome, Outcome::absent);
  EXPECT_EQ(get("c").outcome, Outcome::absent);

  const auto applied = batch(1);
  EXPECT_TRUE(applied->applied);
  for (const std::size_t i : {0, 1, 2, 4}) EXPECT_EQ(applied->ops[i]->reply.outcome, Outcome::done) << i;
  EXPECT_EQ(applied->ops[2]->reply.value, number_value(kMost));
  EXPECT_EQ(get("a").version, 2);
  EXPECT_EQ(get("n").version, 1);

  // The sum is tried, and taken back when another one does not work.
  write(StateVerb::set, "n", number_value(kMost - 1));
  WaitedBatch undone;
  WaitedOp& sum = make(StateVerb::add, "n");
  sum.delta = 1;
  undone.ops = {&sum, &make(StateVerb::create, "a")};
  state().submit(&undone);
  ASSERT_TRUE(wait_until([&] { return undone.ended > 0; }));
  EXPECT_FALSE(undone.applied);
  EXPECT_EQ(get("n").value, number_value(kMost - 1));
}

TEST_F(StateTest, ABatchKeepsItsPlaceAmongOthers) {
  // Alternately single writes and batches over keys of all lanes; each sees all that came before it.
  const int rounds = 50;
  std::deque<WaitedBatch> batches(rounds);
  std::vector<WaitedOp*> singles;
  for (int i = 0; i < rounds; ++i) {
    for (const char* key : {"a", "b", "c", "d", "e", "f"}) {
      WaitedOp& op = make(StateVerb::add, key);
      op.delta = 1;
      singles.push_back(&op);
      state().submit(&op);
    }
    for (const char* key : {"a", "b", "c", "d", "e", "f"}) {
      WaitedOp& op = make(StateVerb::add, key);
      op.delta = 100;
      batches[static_cast<std::size_t>(i)].ops.push_back(&op);
    }
    state().submit(&batches[static_cast<std::size_t>(i)]);
  }
  ASSERT_TRUE(wait_until([&] { return batches.back().ended > 0; }));
  ASSERT_TRUE(wait_until([&] { return singles.back()->ended > 0; }));
  for (int i = 0; i < rounds; ++i) {
    const WaitedBatch& batch = batches[static_cast<std::size_t>(i)];
    EXPECT_TRUE(batch.applied);
    for (const StateOp* op : batch.ops) EXPECT_EQ(op->reply.value.number, (i + 1) * 101);
    for (int k = 0; k < 6; ++k)
      EXPECT_EQ(singles[static_cast<std::size_t>(i * 6 + k)]->reply.value.number, i * 101 + 1);
  }
}

TEST_F(StateTest, TakenBackWhatWasNotSent) {
  WaitedOp& op = make(StateVerb::create, "a");
  state().submit(&op);
  EXPECT_TRUE(state().abandon(&op));
  EXPECT_FALSE(state().abandon(&op));
  WaitedBatch batch;
  for (const char* key : {"a", "b", "c", "d"}) batch.ops.push_back(&make(StateVerb::create, key));
  state().submit(&batch);
  EXPECT_TRUE(state().abandon(&batch));
  EXPECT_EQ(get("a").outcome, Outcome::absent);
  state().submit(&batch);
  EXPECT_TRUE(state().abandon(&batch));
  EXPECT_EQ(create("a").version, 1);
  EXPECT_EQ(get("b").outcome, Outcome::absent);
  EXPECT_EQ(op.ended, 0);
  EXPECT_EQ(batch.ended, 0);
  state().submit(&batch);
  ASSERT_TRUE(wait_until([&] { return batch.ended > 0; }));
  EXPECT_FALSE(state().abandon(&batch));
  EXPECT_FALSE(batch.applied);
}

TEST_F(StateTest, ScanDeliversEachRowOnce) {
  std::set<std::string> expected;
  for (int i = 0; i < 1'200; ++i) {
    const std::string key = formatted("a*{}", i);
    expected.insert(key);
    state().submit(&make(StateVerb::create, key));
  }
  for (const char* key : {"ax", "b", "a", "a?1", "}:default:default:k:a*1"}) create(key);
  create("a*dead");
  remove("a*dead");
  WaitedOp& other = make(StateVerb::create, "a*other");
  other.space = std::make_shared<const Space>(Space{"default", "*"});
  run(other);
  WaitedOp& kind = make(StateVerb::create, "a*kind");
  kind.kind = "k:k";
  run(kind);

  std::vector<std::string> found;
  std::string cursor;
  int pages = 0;
  do {
    const auto page =
        wait_for<store::StatePage>([&](auto done) { state().scan(space_, "k", "a*", cursor, 100, done); });
    ASSERT_TRUE(page.ok()) << page.status().message;
    for (const store::StateRow& row : page.value().rows) found.push_back(row.key);
    cursor = page.value().cursor;
    if (++pages == 3) {
      // Another store, which has to begin anew, goes on where this one was.
      const auto elsewhere = wait_for<store::StatePage>([&](auto done) {
        state(open(shared_server().url())).scan(space_, "k", "a*", cursor, 5'000, done);
      });
      ASSERT_TRUE(elsewhere.ok());
      EXPECT_EQ(elsewhere.value().rows.size(), 900u);
      EXPECT_EQ(elsewhere.value().cursor, "");
    }
  } while (!cursor.empty());
  EXPECT_LE(pages, 13);
  EXPECT_EQ(found.size(), expected.size());
  EXPECT_EQ(std::set<std::string>(found.begin(), found.end()), expected);
  EXPECT_TRUE(std::is_sorted(found.begin(), found.end()));
}

TEST_F(StateTest, TimeoutsAreClaimedOnce) {
  const auto schedule = [&](std::string key, std::int64_t due_in, const char* kind = "k") {
    WaitedOp& op = make(StateVerb::schedule, std::move(key));
    op.due = due_in;
    op.due_in = true;
    op.kind = kind;
    EXPECT_EQ(run(op).outcome, Outcome::done);
  };
  for (int i = 0; i < 40; ++i) schedule(formatted("t{}", i), -1'000 + i);
  schedule("later", 60'000);
  schedule("o:ther", -5'000, "kind:2");
  store::StateStore& second = state(open(shared_server().url()));
  std::set<std::string> all;
  std::int64_t claim = 0, due = 0;
  const auto take = [&](store::StateStore& from, const char* kind, std::size_t limit, std::int64_t lease) {
    auto got = wait_for<std::vector<store::DueKey>>(
        [&](auto done) { from.claim_due(space_, kind, limit, lease, done); });
    EXPECT_TRUE(got.ok()) << got.status().message;
    return got.ok() ? std::move(got.value()) : std::vector<store::DueKey>();
  };
  for (int i = 0; i < 4; ++i)
    for (const store::DueKey& key : take(i % 2 ? second : state(), "k", 10, 60'000)) {
      EXPECT_TRUE(all.insert(key.key).second);
      EXPECT_GE(key.due, due) << "oldest first";
      due = key.due;
      claim = key.claim;
    }
  EXPECT_EQ(all.size(), 40u);
  EXPECT_TRUE(take(state(), "k", 10, 60'000).empty());
  const auto other = take(second, "", 10, 1);
  ASSERT_EQ(other.size(), 1u);
  EXPECT_EQ(other[0].key, "o:ther");
  EXPECT_EQ(other[0].kind, "kind:2");
  let_pass(2);
  const auto again = take(state(), "", 10, 60'000);
  ASSERT_EQ(again.size(), 1u) << "its lease is over";
  EXPECT_EQ(again[0].due, other[0].due) << "when it fell due first";
  EXPECT_GT(again[0].claim, other[0].claim);

  const auto unschedule = [&](std::string key, std::int64_t expected, const char* kind = "k") {
    WaitedOp& op = make(StateVerb::unschedule, std::move(key));
    op.expected = expected;
    op.kind = kind;
    return run(op).outcome;
  };
  EXPECT_EQ(unschedule("o:ther", other[0].claim, "kind:2"), Outcome::stale);
  EXPECT_EQ(unschedule("o:ther", again[0].claim, "kind:2"), Outcome::done);
  EXPECT_EQ(unschedule("o:ther", 0, "kind:2"), Outcome::absent);
  schedule("t39", 1);
  EXPECT_EQ(unschedule("t39", claim), Outcome::stale) << "scheduled anew, the claim is void";
  EXPECT_EQ(unschedule("t39", 0), Outcome::done);
}

TEST_F(StateTest, AnotherOnesKeyFailsAlone) {
  create("a");
  EXPECT_TRUE(say({"SET", row_name("bad"), "x"}).ok());
  std::vector<WaitedOp*> all = {&make(StateVerb::create, "b"),  &make(StateVerb::create, "bad"),
                                &make(StateVerb::get, "bad"),   &make(StateVerb::add, "bad"),
                                &make(StateVerb::touch, "bad"), &make(StateVerb::create, "c")};
  for (WaitedOp* op : all) state().submit(op);
  for (WaitedOp* op : all) ASSERT_TRUE(wait_until([&] { return op->ended > 0; }));
  for (WaitedOp* op : all) {
    EXPECT_EQ(op->reply.status.ok(), op->key != "bad") << op->reply.status.message;
    if (op->key == "bad") {
      EXPECT_EQ(op->reply.status.sqlstate, "WRONGTYPE");
    }
  }
}

TEST_F(StateTest, RightsOnItsOwnPrefixAreEnough) {
  const std::string keys = "~" + prefix() + "*", channels = "&" + prefix() + "*";
  for (const bool granted : {true, false}) {
    const std::string name = granted ? "good" : "bad";
    std::vector<std::string> words = {"ACL",         "SETUSER",      name,           "reset", "on",
                                      ">p",          "~rate_limit*", "&rate_limit*", "+@all", "-@admin",
                                      "-@dangerous", "+info",        "+role"};
    if (granted) words.insert(words.end(), {keys, channels});
    Command command(words.front());
    for (std::size_t i = 1; i < words.size(); ++i) command.add(words[i]);
    auto admin = connection(options(shared_server().port()));
    std::optional<Result<Reply>> set;
    admin->send(command, kForever, [&](Result<Reply> reply) { set = std::move(reply); });
    ASSERT_TRUE(wait_until([&] { return set.has_value(); }));
    ASSERT_EQ(text(*set), "OK");

    store::Store& store = open(formatted("redis://{}:p@127.0.0.1:{}", name, shared_server().port()));
    store::StateStore& mine = state(store);
    WaitedOp& op = make(StateVerb::create, "rights");
    op.ttl = 60'000;
    mine.submit(&op);
    ASSERT_TRUE(wait_until([&] { return op.ended > 0; }));
    EXPECT_EQ(op.reply.status.ok(), granted) << op.reply.status.message;
    if (!granted) {
      EXPECT_EQ(op.reply.status.sqlstate, "NOPERM");
    } else {
      WaitedOp& sum = make(StateVerb::add, "n");
      sum.delta = kMost;
      run(mine, sum);
      EXPECT_EQ(run(mine, make(StateVerb::schedule, "rights")).outcome, Outcome::done);
      WaitedOp& gone = make(StateVerb::remove, "rights");
      gone.expected = store::kAnyVersion;
      EXPECT_EQ(run(mine, gone).outcome, Outcome::done);
      EXPECT_GE(purge(mine), 1);
      auto due = wait_for<std::vector<store::DueKey>>(
          [&](auto done) { mine.claim_due(space_, "", 10, 1'000, done); });
      EXPECT_TRUE(due.ok()) << due.status().message;
      auto page = wait_for<store::StatePage>([&](auto done) { mine.scan(space_, "k", "", "", 10, done); });
      EXPECT_TRUE(page.ok()) << page.status().message;
    }
    auto findings = wait_for<std::vector<store::Finding>>([&](auto done) { store.doctor(done); });
    ASSERT_TRUE(findings.ok());
    bool right = true;
    for (const store::Finding& finding : findings.value())
      if (finding.subject == "rights") right = finding.level == store::Finding::Level::ok;
    EXPECT_EQ(right, granted);
  }
}

}  // namespace
}  // namespace ratesync::testing
