// Every verb on a real server, alone, merged with others, and all or nothing.

#include "ratesync/base/format.h"
#include "state_rig.h"

using namespace ratesync;
using namespace ratesync::testing;
using store::StateReply;
using store::Value;

namespace {

// The clock of the server, moved in the table.
void expire(const Schema& schema, const std::string& key) {
  Witness().script("UPDATE " + schema.table("acteon_state") +
                   " SET expires_at = clock_timestamp() - interval '1 ms' WHERE key = '" + key + "'");
}

std::vector<std::unique_ptr<Operation>> operations(std::initializer_list<Operation> list) {
  std::vector<std::unique_ptr<Operation>> out;
  for (const Operation& op : list) out.push_back(std::make_unique<Operation>(op));
  return out;
}

}  // namespace

TEST(PostgresState, CreateHasOneWinnerAndTheOthersSeeWhatItMade) {
  Schema schema;
  StateProcess a(schema), b(schema);
  const StateReply made = a.ask(Operation(Verb::create, "k").with(text("first")).expires(60'000));
  EXPECT_EQ(made.outcome, Outcome::done);
  EXPECT_EQ(made.version, 1);
  EXPECT_GT(made.expires_at, 1'600'000'000'000);
  const StateReply refused = b.ask(Operation(Verb::create, "k").with(text("second")));
  EXPECT_EQ(refused.outcome, Outcome::exists);
  EXPECT_EQ(refused.version, 1);
  EXPECT_FALSE(refused.has_value);
  const StateReply shown = b.ask(Operation(Verb::create, "k").with(text("third")).wants());
  EXPECT_EQ(shown.value, text("first"));
  EXPECT_EQ(shown.expires_at, made.expires_at);
  expire(schema, "k");
  EXPECT_EQ(b.get("k").outcome, Outcome::absent);
  const StateReply again = b.ask(Operation(Verb::create, "k").with(text("fourth")));
  EXPECT_EQ(again.outcome, Outcome::done);
  EXPECT_EQ(again.version, 2) << "a dead row's version goes on";
  EXPECT_EQ(again.expires_at, 0);
}

TEST(PostgresState, ManyCreationsOfFewKeysInOneTrip) {
  Schema schema;
  StateProcess p(schema);
  std::vector<std::unique_ptr<Operation>> ops;
  for (int i = 0; i < 1'000; ++i)
    ops.push_back(std::make_unique<Operation>(
        Operation(Verb::create, "k" + std::to_string(i % 10)).with(integer(i)).wants()));
  p.ask_all(ops);
  for (int i = 0; i < 1'000; ++i) {
    const StateReply& reply = ops[static_cast<std::size_t>(i)]->reply;
    EXPECT_EQ(reply.outcome, i < 10 ? Outcome::done : Outcome::exists) << i;
    if (i >= 10) {
      EXPECT_EQ(reply.value, integer(i % 10));
    }
  }
  EXPECT_LE(p.store->stats().round_trips, 6u);
}

TEST(PostgresState, ValuesOfEveryKindComeBackAsTheyWere) {
  Schema schema;
  StateProcess p(schema);
  std::string all;
  for (int i = 0; i < 256; ++i) all += static_cast<char>(i);
  const std::vector<Value> values = {bytes(all),
                                     bytes(""),
                                     text("h\xC3\xA9 \"'\\{},NULL"),
                                     {Value::Type::json, R"({"a": null})", 0},
                                     integer(std::numeric_limits<std::int64_t>::min()),
                                     integer(0),
                                     bytes(std::string(3'000'000, 'x'))};
  for (const Value& value : values) {
    EXPECT_EQ(p.ask(Operation(Verb::set, "k").with(value)).outcome, Outcome::done);
    const StateReply got = p.get("k");
    ASSERT_TRUE(got.has_value);
    EXPECT_TRUE(got.value == value);
  }
  EXPECT_EQ(p.get("k").version, static_cast<std::int64_t>(values.size()));
}

TEST(PostgresState, SetReplacesValueAndExpiryOrKeepsIt) {
  Schema schema;
  StateProcess p(schema);
  EXPECT_EQ(p.ask(Operation(Verb::set, "k").with(text("a")).expires(60'000)).version, 1);
  const std::int64_t until = p.get("k").expires_at;
  const StateReply kept = p.ask(Operation(Verb::set, "k").with(text("b")).expires(store::kKeepTtl));
  EXPECT_EQ(kept.version, 2);
  EXPECT_EQ(kept.expires_at, until);
  EXPECT_EQ(p.get("k").value, text("b"));
  EXPECT_EQ(p.ask(Operation(Verb::set, "k").with(text("c"))).expires_at, 0);
  EXPECT_EQ(p.ask(Operation(Verb::set, "new").with(text("c")).expires(store::kKeepTtl)).expires_at, 0);
}

TEST(PostgresState, WritesOfOneKeyThatTravelTogetherHaveVersionsOfTheirOwn) {
  Schema schema;
  StateProcess p(schema);
  p.ask(Operation(Verb::set, "s").with(text("before")));
  std::vector<std::unique_ptr<Operation>> ops;
  for (int i = 0; i < 50; ++i) {
    ops.push_back(std::make_unique<Operation>(Operation(Verb::set, "s").with(integer(i))));
    ops.push_back(std::make_unique<Operation>(Operation(Verb::add, "n").plus(i)));
    ops.push_back(std::make_unique<Operation>(Operation(Verb::set, "fresh").with(integer(i))));
  }
  p.ask_all(ops);
  std::int64_t sum = 0;
  for (std::size_t i = 0; i < 50; ++i) {
    EXPECT_EQ(ops[3 * i]->reply.version, static_cast<std::int64_t>(i) + 2);
    sum += static_cast<std::int64_t>(i);
    EXPECT_EQ(ops[3 * i + 1]->reply.value, integer(sum));
    EXPECT_EQ(ops[3 * i + 1]->reply.version, static_cast<std::int64_t>(i) + 1);
    EXPECT_EQ(ops[3 * i + 2]->reply.version, static_cast<std::int64_t>(i) + 1);
  }
  EXPECT_EQ(p.get("s").value, integer(49));
  EXPECT_EQ(p.get("n").value, integer(sum));
  EXPECT_EQ(p.get("fresh").version, 50);
}

TEST(PostgresState, AddRefusesOverflowAndWhatIsNoIntegerAndChangesNothing) {
  Schema schema;
  StateProcess p(schema);
  constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max();
  constexpr std::int64_t least = std::numeric_limits<std::int64_t>::min();
  p.ask(Operation(Verb::set, "text").with(text("5")));
  EXPECT_EQ(p.ask(Operation(Verb::add, "text").plus(1)).outcome, Outcome::not_integer);
  EXPECT_EQ(p.get("text").version, 1);
  EXPECT_EQ(p.ask(Operation(Verb::add, "n").plus(most)).value, integer(most));
  const StateReply over = p.ask(Operation(Verb::add, "n").plus(1));
  EXPECT_EQ(over.outcome, Outcome::overflow);
  EXPECT_EQ(over.version, 1);
  EXPECT_EQ(p.get("n").value, integer(most));
  EXPECT_EQ(p.ask(Operation(Verb::add, "m").plus(least)).value, integer(least));
  EXPECT_EQ(p.ask(Operation(Verb::add, "m").plus(-1)).outcome, Outcome::overflow);
  EXPECT_EQ(p.ask(Operation(Verb::add, "m").plus(most)).value, integer(-1));
  // Together: the one that does not fit is refused, those before and behind it count.
  auto ops = operations({Operation(Verb::add, "x").plus(most - 5), Operation(Verb::add, "x").plus(4),
                         Operation(Verb::add, "x").plus(4), Operation(Verb::add, "x").plus(1),
                         Operation(Verb::add, "x").plus(-10)});
  p.ask_all(ops);
  EXPECT_EQ(ops[1]->reply.value, integer(most - 1));
  EXPECT_EQ(ops[2]->reply.outcome, Outcome::overflow);
  EXPECT_EQ(ops[3]->reply.value, integer(most));
  EXPECT_EQ(ops[4]->reply.value, integer(most - 10));
  EXPECT_EQ(p.get("x").version, 4);
}

TEST(PostgresState, AddSetsTheExpiryWhenItCreatesOrWhenAsked) {
  Schema schema;
  StateProcess p(schema);
  const std::int64_t first = p.ask(Operation(Verb::add, "n").plus(1).expires(60'000)).expires_at;
  EXPECT_EQ(p.ask(Operation(Verb::add, "n").plus(1).expires(600'000)).expires_at, first);
  Operation renewed = Operation(Verb::add, "n").plus(1).expires(600'000);
  renewed.renew = true;
  EXPECT_GT(p.ask(renewed).expires_at, first + 500'000);
  expire(schema, "n");
  const StateReply anew = p.ask(Operation(Verb::add, "n").plus(7).expires(60'000));
  EXPECT_EQ(anew.value, integer(7));
  EXPECT_EQ(anew.version, 4);
}

TEST(PostgresState, SwapRemoveAndTouchGoByTheVersion) {
  Schema schema;
  StateProcess p(schema);
  p.ask(Operation(Verb::set, "k").with(text("a")).expires(60'000));
  const std::int64_t until = p.get("k").expires_at;
  const StateReply stale = p.ask(Operation(Verb::swap, "k").with(text("b")).at(7).wants());
  EXPECT_EQ(stale.outcome, Outcome::stale);
  EXPECT_EQ(stale.version, 1);
  EXPECT_EQ(stale.value, text("a"));
  EXPECT_FALSE(p.ask(Operation(Verb::swap, "k").with(text("b")).at(7)).has_value);
  const StateReply done = p.ask(Operation(Verb::swap, "k").with(text("b")).at(1).expires(store::kKeepTtl));
  EXPECT_EQ(done.version, 2);
  EXPECT_EQ(done.expires_at, until);
  EXPECT_EQ(p.ask(Operation(Verb::touch, "k").at(1).expires(1)).outcome, Outcome::stale);
  const StateReply touched = p.ask(Operation(Verb::touch, "k").at(2).expires(900'000));
  EXPECT_EQ(touched.version, 2) << "no write";
  EXPECT_GT(touched.expires_at, until + 500'000);
  EXPECT_EQ(p.ask(Operation(Verb::remove, "k").at(1)).outcome, Outcome::stale);
  EXPECT_EQ(p.ask(Operation(Verb::remove, "k").at(2)).outcome, Outcome::done);
  for (const Verb verb : {Verb::get, Verb::swap, Verb::remove, Verb::touch})
    EXPECT_EQ(p.ask(Operation(verb, "k").at(2)).outcome, Outcome::absent);
  EXPECT_EQ(p.ask(Operation(Verb::create, "k")).version, 3);
  EXPECT_EQ(p.ask(Operation(Verb::remove, "k").at(store::kAnyVersion)).outcome, Outcome::done);
  EXPECT_EQ(p.ask(Operation(Verb::set, "k")).version, 4);
}

TEST(PostgresState, ReviveSwapsWhatExpiredButNotWhatWasDeleted) {
  Schema schema;
  StateProcess p(schema);
  p.ask(Operation(Verb::create, "k").with(text("a")).expires(60'000));
  expire(schema, "k");
  EXPECT_EQ(p.ask(Operation(Verb::swap, "k").at(1)).outcome, Outcome::absent);
  Operation revive = Operation(Verb::swap, "k").with(text("b")).at(1).expires(60'000);
  revive.revive = true;
  EXPECT_EQ(p.ask(revive).version, 2);
  EXPECT_EQ(p.get("k").value, text("b"));
  p.ask(Operation(Verb::remove, "k").at(store::kAnyVersion));
  revive.expected = 2;
  EXPECT_EQ(p.ask(revive).outcome, Outcome::absent);
}

TEST(PostgresState, OneKeyInOneTripIsWorkedOnInOrder) {
  Schema schema;
  StateProcess p(schema);
  auto ops = operations({Operation(Verb::get, "k"), Operation(Verb::create, "k").with(integer(1)),
                         Operation(Verb::get, "k"), Operation(Verb::add, "k").plus(4),
                         Operation(Verb::add, "k").plus(-2), Operation(Verb::swap, "k").with(text("t")).at(3),
                         Operation(Verb::add, "k").plus(1), Operation(Verb::remove, "k").at(4),
                         Operation(Verb::get, "k"), Operation(Verb::set, "k").with(integer(9)),
                         Operation(Verb::touch, "k").at(5).expires(60'000), Operation(Verb::get, "k")});
  p.ask_all(ops);
  const Outcome outcomes[] = {Outcome::absent, Outcome::done, Outcome::done,        Outcome::done,
                              Outcome::done,   Outcome::done, Outcome::not_integer, Outcome::done,
                              Outcome::absent, Outcome::done, Outcome::done,        Outcome::done};
  for (std::size_t i = 0; i < ops.size(); ++i) EXPECT_EQ(ops[i]->reply.outcome, outcomes[i]) << i;
  EXPECT_EQ(ops[4]->reply.value, integer(3));
  EXPECT_EQ(ops.back()->reply.value, integer(9));
  EXPECT_EQ(ops.back()->reply.version, 5);
  EXPECT_GT(ops.back()->reply.expires_at, 0);
}

TEST(PostgresState, DifferentVerbsOfDifferentKeysAreOneRoundTrip) {
  Schema schema;
  StateProcess p(schema, [](auto& o) { o.lanes = 1; });
  p.ask(Operation(Verb::set, "swap"));
  p.ask(Operation(Verb::set, "text").with(text("x")));
  const std::uint64_t before = p.store->stats().round_trips;
  auto ops = operations({Operation(Verb::create, "create"), Operation(Verb::set, "set"),
                         Operation(Verb::swap, "swap").at(1), Operation(Verb::get, "text"),
                         Operation(Verb::add, "n").plus(3), Operation(Verb::remove, "nothing").at(1),
                         Operation(Verb::schedule, "later"), Operation(Verb::touch, "nothing2").at(1)});
  p.ask_all(ops);
  EXPECT_EQ(p.store->stats().round_trips, before + 1);
  EXPECT_EQ(ops[2]->reply.version, 2);
  EXPECT_EQ(ops[3]->reply.value, text("x"));
  EXPECT_EQ(ops[5]->reply.outcome, Outcome::absent);
}

TEST(PostgresState, WhereNobodyWasRefusedOfLateCreationsDoNotLookAndStillFindWhatIsThere) {
  Schema schema;
  StateProcess p(schema, [](auto& o) { o.lanes = 1; });
  const auto trips = [&](std::vector<std::unique_ptr<Operation>>& ops) {
    const std::uint64_t before = p.store->stats().round_trips;
    p.ask_all(ops);
    return p.store->stats().round_trips - before;
  };
  std::vector<std::unique_ptr<Operation>> fresh;
  for (int i = 0; i < 100; ++i)
    fresh.push_back(std::make_unique<Operation>(Verb::create, formatted("key-{}", i)));
  fresh[7]->with(text("seven"));
  trips(fresh);
  p.ask(Operation(Verb::create, "short").expires(1));
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  auto dead = operations({Operation(Verb::create, "short"), Operation(Verb::create, "new")});
  EXPECT_EQ(trips(dead), 1u);
  EXPECT_EQ(dead[0]->reply.outcome, Outcome::done);
  EXPECT_EQ(dead[0]->reply.version, 2) << "takes over the dead row";
  EXPECT_EQ(dead[1]->reply.outcome, Outcome::done);

  auto alone = operations({Operation(Verb::create, "key-7").wants()});
  EXPECT_EQ(trips(alone), 1u) << "a lone one looks at once";
  EXPECT_EQ(alone[0]->reply.outcome, Outcome::exists);
  for (int i = 100; i < 700; ++i)
    fresh.push_back(std::make_unique<Operation>(Verb::create, formatted("key-{}", i)));
  fresh.erase(fresh.begin(), fresh.begin() + 100);
  trips(fresh);  // the refusal is forgotten
  for (const std::uint64_t expected : {2u, 1u}) {
    auto mixed = operations(
        {Operation(Verb::create, "key-7").wants(), Operation(Verb::create, expected == 2 ? "one" : "two")});
    EXPECT_EQ(trips(mixed), expected) << "from the first refusal on they look again";
    EXPECT_EQ(mixed[0]->reply.outcome, Outcome::exists);
    EXPECT_EQ(mixed[0]->reply.version, 1);
    EXPECT_EQ(mixed[0]->reply.value, text("seven"));
    EXPECT_EQ(mixed[1]->reply.outcome, Outcome::done);
  }
}

TEST(PostgresState, NamesMeanThemselvesAndNeverEachOther) {
  Schema schema;
  StateProcess p(schema, {}, {}, "we\"ird'{state} $1 @same@;--");
  const std::vector<std::pair<std::string, std::string>> pairs = {{"a:b", "c"},
                                                                  {"a", "b:c"},
                                                                  {"a", "b"},
                                                                  {"%", "_"},
                                                                  {"a%", "b_"},
                                                                  {"{1,2}", "NULL"},
                                                                  {"\"", "\\"},
                                                                  {"\xC3\xA4", std::string(1'024, 'k')},
                                                                  {std::string(255, 't'), "\x01\n"}};
  for (std::size_t i = 0; i < pairs.size(); ++i)
    EXPECT_EQ(p.ask(Operation(Verb::create, pairs[i].second)
                        .in(space(pairs[i].first))
                        .with(integer(static_cast<std::int64_t>(i))))
                  .outcome,
              Outcome::done);
  for (std::size_t i = 0; i < pairs.size(); ++i)
    EXPECT_EQ(p.ask(Operation(Verb::get, pairs[i].second).in(space(pairs[i].first))).value,
              integer(static_cast<std::int64_t>(i)));
  for (const std::string& bad : {std::string(), std::string(1'025, 'k'), std::string("a\0b", 3),
                                 std::string("\xED\xA0\x80"), std::string("\xff")})
    EXPECT_EQ(p.refusal(Operation(Verb::get, bad)).code, Code::invalid);
  EXPECT_EQ(p.refusal(Operation(Verb::get, "k").in(space(""))).code, Code::invalid);
}

TEST(PostgresState, AtomicAppliesAllOrNothingAndSaysWhy) {
  Schema schema;
  StateProcess p(schema);
  p.ask(Operation(Verb::set, "a").with(text("a")));
  p.ask(Operation(Verb::set, "t").with(text("t")));
  Operation swap = Operation(Verb::swap, "a").with(text("b")).at(1),
            make = Operation(Verb::create, "n").with(integer(1)), sum = Operation(Verb::add, "sum").plus(5),
            get = Operation(Verb::get, "t"), gone = Operation(Verb::remove, "not there").at(1),
            none = Operation(Verb::get, "none");
  ASSERT_TRUE(p.atomic({&swap, &make, &sum, &get, &gone, &none}));
  EXPECT_EQ(swap.reply.version, 2);
  EXPECT_EQ(make.reply.version, 1);
  EXPECT_EQ(sum.reply.value, integer(5));
  EXPECT_EQ(get.reply.value, text("t"));
  EXPECT_EQ(gone.reply.outcome, Outcome::absent);
  EXPECT_EQ(none.reply.outcome, Outcome::absent);

  Operation set = Operation(Verb::set, "a").with(text("never")),
            exists = Operation(Verb::create, "n").wants(), stale = Operation(Verb::swap, "t").at(9),
            over = Operation(Verb::add, "t").plus(1), fresh = Operation(Verb::create, "fresh");
  over.key = "n";
  exists.key = "sum";
  ASSERT_FALSE(p.atomic({&set, &exists, &stale, &fresh}));
  EXPECT_EQ(set.reply.outcome, Outcome::rolled_back);
  EXPECT_EQ(fresh.reply.outcome, Outcome::rolled_back);
  EXPECT_EQ(exists.reply.outcome, Outcome::exists);
  EXPECT_EQ(exists.reply.value, integer(5));
  EXPECT_EQ(stale.reply.outcome, Outcome::stale);
  EXPECT_EQ(stale.reply.version, 1);
  EXPECT_EQ(p.get("a").value, text("b"));
  EXPECT_EQ(p.get("fresh").outcome, Outcome::absent);
  EXPECT_EQ(p.ask(Operation(Verb::create, "fresh")).version, 1);
}

TEST(PostgresState, BatchesAndOperationsOfTheSameKeysKeepTheirOrder) {
  Schema schema;
  StateProcess p(schema);
  std::vector<std::unique_ptr<Operation>> singles;
  std::vector<std::unique_ptr<Operation>> parts;
  std::vector<std::unique_ptr<AtomicBatch>> batches;
  // Each takes what the one before it left.
  std::int64_t version[4] = {0, 0, 0, 0};
  std::minstd_rand random(7);
  for (int round = 0; round < 200; ++round) {
    const auto next = [&](std::size_t k) {
      auto op =
          std::make_unique<Operation>(version[k] == 0 ? Verb::create : Verb::swap, "k" + std::to_string(k));
      op->expected = version[k]++;
      return op;
    };
    if (random() % 3 == 0) {
      auto batch = std::make_unique<AtomicBatch>();
      const std::size_t a = random() % 4, b = (a + 1 + random() % 3) % 4;
      for (const std::size_t k : {a, b}) {
        parts.push_back(next(k));
        batch->ops.push_back(parts.back().get());
      }
      p.state->submit(batch.get());
      batches.push_back(std::move(batch));
    } else {
      singles.push_back(next(random() % 4));
      p.state->submit(singles.back().get());
    }
  }
  ASSERT_TRUE(p.until([&] {
    return std::all_of(singles.begin(), singles.end(), [](const auto& op) { return op->answered; }) &&
           std::all_of(batches.begin(), batches.end(), [](const auto& b) { return b->answered; });
  }));
  for (const auto& op : singles) EXPECT_EQ(op->reply.outcome, Outcome::done) << op->key << op->expected;
  for (const auto& batch : batches) EXPECT_TRUE(batch->applied) << batch->status.message;
  for (std::size_t k = 0; k < 4; ++k) EXPECT_EQ(p.get("k" + std::to_string(k)).version, version[k]);
}

TEST(PostgresState, TimeoutsAreClaimedOnceOldestFirstAndFallDueAgain) {
  Schema schema;
  StateProcess a(schema), b(schema);
  for (int i = 0; i < 5; ++i) {
    Operation op(Verb::schedule, "k" + std::to_string(i));
    op.due = 1'000 * (5 - i);
    a.ask(op);
  }
  Operation later(Verb::schedule, "later");
  later.due = 600'000;
  later.due_in = true;
  a.ask(later);
  Operation other(Verb::schedule, "k0");
  other.in(space(), "other kind").due = 500;
  a.ask(other);
  const auto first = a.claim(3);
  ASSERT_EQ(first.size(), 3u);
  EXPECT_EQ(first[0].kind, "other kind");
  EXPECT_EQ(first[1].key, "k4");
  EXPECT_EQ(first[1].due, 1'000);
  const auto second = b.claim(100, 60'000, "test");
  EXPECT_EQ(second.size(), 3u);
  EXPECT_TRUE(a.claim().empty());
  EXPECT_EQ(a.ask(Operation(Verb::unschedule, "k4").at(first[1].claim + 1'000)).outcome, Outcome::stale);
  EXPECT_EQ(a.ask(Operation(Verb::unschedule, "k4").at(first[1].claim)).outcome, Outcome::done);
  EXPECT_EQ(a.ask(Operation(Verb::unschedule, "k4")).outcome, Outcome::absent);
  Witness().script("UPDATE " + schema.table("acteon_timeouts") + " SET next_at = now() WHERE key = 'k3'");
  const auto again = b.claim();
  ASSERT_EQ(again.size(), 1u);
  EXPECT_GT(again[0].claim, second.back().claim);
  EXPECT_EQ(again[0].due, 2'000) << "when it fell due at first";
  Operation anew(Verb::schedule, "k3");
  a.ask(anew);
  EXPECT_EQ(a.ask(Operation(Verb::unschedule, "k3").at(again[0].claim)).outcome, Outcome::stale);
}

TEST(PostgresState, TimeoutsTakePartInBatches) {
  Schema schema;
  StateProcess p(schema);
  Operation plan(Verb::schedule, "k"), set = Operation(Verb::set, "k").with(text("v"));
  ASSERT_TRUE(p.atomic({&set, &plan}));
  const auto due = p.claim();
  ASSERT_EQ(due.size(), 1u);
  Operation stale = Operation(Verb::unschedule, "k").at(due[0].claim + 1), move = Operation(Verb::set, "j");
  EXPECT_FALSE(p.atomic({&move, &stale}));
  EXPECT_EQ(stale.reply.outcome, Outcome::stale);
  EXPECT_EQ(p.get("j").outcome, Outcome::absent);
  Operation over = Operation(Verb::unschedule, "k").at(due[0].claim);
  EXPECT_TRUE(p.atomic({&move, &over}));
  EXPECT_EQ(p.get("j").version, 1);
  EXPECT_EQ(p.ask(Operation(Verb::unschedule, "k")).outcome, Outcome::absent);
}

TEST(PostgresState, ScanGivesEachLivingRowOfItsKindOnceInTheOrderOfBytes) {
  Schema schema;
  StateProcess p(schema);
  std::vector<std::unique_ptr<Operation>> ops;
  std::vector<std::string> wanted;
  for (const char* key :
       {"a", "a%", "a_b", "ab", "abc", "b", "\xC3\xA4", "a\xF4\x8F\xBF\xBF", "a\xED\x9F\xBFz"})
    ops.push_back(std::make_unique<Operation>(Operation(Verb::set, key).with(text(key))));
  for (const auto& op : ops)
    if (op->key[0] == 'a') wanted.push_back(op->key);
  std::sort(wanted.begin(), wanted.end());
  ops.push_back(std::make_unique<Operation>(Operation(Verb::set, "a-other").in(space("other"))));
  ops.push_back(std::make_unique<Operation>(Operation(Verb::set, "a-kind").in(space(), "other")));
  ops.push_back(std::make_unique<Operation>(Operation(Verb::set, "a-dead").expires(60'000)));
  p.ask_all(ops);
  expire(schema, "a-dead");
  std::vector<std::string> keys;
  std::string cursor;
  do {
    const store::StatePage page = p.scan(space(), "test", "a", cursor, 2);
    for (const store::StateRow& row : page.rows) {
      keys.push_back(row.key);
      EXPECT_EQ(row.value, text(row.key));
      EXPECT_EQ(row.version, 1);
    }
    cursor = page.cursor;
  } while (!cursor.empty());
  EXPECT_EQ(keys, wanted);
  EXPECT_EQ(p.scan(space(), "test", "a_").rows.size(), 1u);
  EXPECT_EQ(p.scan(space(), "test", "a\xED\x9F\xBF").rows.size(), 1u);
  EXPECT_EQ(p.scan(space(), "test", "a\xF4\x8F\xBF\xBF").rows.size(), 1u);
  EXPECT_EQ(p.scan(space(), "test", "").rows.size(), 9u);
  EXPECT_TRUE(p.scan(space(), "test", "zz").rows.empty());
}

TEST(PostgresState, PurgedKeysNeverUseAVersionAgain) {
  Schema schema;
  StateProcess p(schema);
  for (int i = 0; i < 4; ++i) p.ask(Operation(Verb::set, "k").with(integer(i)));
  p.ask(Operation(Verb::set, "living"));
  p.ask(Operation(Verb::remove, "k").at(4));
  p.ask(Operation(Verb::create, "short").expires(60'000));
  expire(schema, "short");
  EXPECT_EQ(p.purge(), 2);
  EXPECT_EQ(Witness().value("SELECT count(*) FROM " + schema.table("acteon_state")), "1");
  EXPECT_EQ(p.ask(Operation(Verb::create, "k")).version, 5);
  EXPECT_EQ(p.ask(Operation(Verb::add, "short").plus(1)).version, 2);
  EXPECT_EQ(p.purge(), 0);
}

TEST(PostgresState, ARowThatTheServerRefusesDoesNotFailItsNeighbours) {
  Schema schema;
  StateProcess p(schema);
  ASSERT_TRUE(p.finish([&](auto done) { p.state->initialize(done); }).ok());
  Witness().script("ALTER TABLE " + schema.table("acteon_state") + " ADD CHECK (key <> 'bad')");
  std::vector<std::unique_ptr<Operation>> ops;
  for (int i = 0; i < 300; ++i) {
    const std::string key = i == 77 ? "bad" : "k" + std::to_string(i);
    ops.push_back(std::make_unique<Operation>(Operation(i % 2 ? Verb::create : Verb::set, key)));
  }
  p.ask_all(ops);
  for (const auto& op : ops) {
    EXPECT_EQ(op->reply.status.ok(), op->key != "bad") << op->key << op->reply.status.message;
    if (op->key == "bad") {
      EXPECT_EQ(op->reply.status.sqlstate, "23514");
    }
  }
}

TEST(PostgresState, WhatWasNotSentCanBeTakenBack) {
  Schema schema;
  StateProcess p(schema);
  Operation op(Verb::set, "k"), part(Verb::set, "j");
  AtomicBatch batch;
  batch.ops.push_back(&part);
  p.state->submit(&op);
  p.state->submit(&batch);
  EXPECT_TRUE(p.state->abandon(&op));
  EXPECT_TRUE(p.state->abandon(&batch));
  EXPECT_FALSE(p.state->abandon(&op));
  EXPECT_EQ(p.get("k").outcome, Outcome::absent);
  EXPECT_EQ(p.get("j").outcome, Outcome::absent);
  EXPECT_FALSE(op.answered || batch.answered);
}

TEST(PostgresState, ClosingAnswersEverybody) {
  Schema schema;
  std::vector<std::unique_ptr<Operation>> ops;
  {
    StateProcess p(schema);
    p.ask(Operation(Verb::set, "k"));
    for (int i = 0; i < 500; ++i) {
      ops.push_back(std::make_unique<Operation>(Operation(Verb::set, "k" + std::to_string(i))));
      p.state->submit(ops.back().get());
    }
  }
  for (const auto& op : ops) EXPECT_TRUE(op->answered);
}
