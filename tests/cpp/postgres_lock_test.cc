// Locks in PostgreSQL: who has one, under which token, and what everybody else is told.
#include <map>
#include <set>

#include "lock_rig.h"
#include "ratesync/postgres/lock_plan.h"

using namespace ratesync;
using namespace ratesync::testing;
using namespace ratesync::postgres;
using Verb = store::LockOp::Verb;

namespace {

std::string locks_of(const Schema& schema) { return schema.table("acteon_locks"); }
std::string waiters_of(const Schema& schema) { return schema.table("acteon_lock_waiters"); }

// As if the lease had ended long ago.
void expire(const Schema& schema, const std::string& name, const std::string& ago = "1 second") {
  Witness().script("UPDATE " + locks_of(schema) + " SET expires_at = clock_timestamp() - interval '" + ago +
                   "' WHERE name = '" + name + "'");
}

const std::string kHostile = std::string("a'\"{},\\ \n%_*[\x01") + std::string(900, 'x') + "\xF0\x9F\x92\xA9";

}  // namespace

TEST(PostgresLock, TheFirstGetsItAndTheOthersLearnWhoHasItAndForHowLong) {
  Schema schema;
  LockProcess a(schema), b(schema);
  const store::LockReply held = a.locks.acquire("invoice", 50'000);
  ASSERT_EQ(held.outcome, Got::held);
  EXPECT_GT(held.token, 0);
  EXPECT_EQ(held.remaining, 50'000);
  for (LockProcess* p : {&a, &b}) {
    const store::LockReply refused = p->locks.acquire("invoice");
    EXPECT_EQ(refused.outcome, Got::taken);
    EXPECT_EQ(refused.token, held.token);
    EXPECT_GT(refused.remaining, 10'000);
    EXPECT_LE(refused.remaining, 50'000);
    EXPECT_NE(refused.holder.find(std::to_string(getpid())), std::string::npos) << refused.holder;
  }
  EXPECT_EQ(a.locks.release("invoice", held.token), Got::held);
  const store::LockReply next = b.locks.acquire("invoice");
  EXPECT_EQ(next.outcome, Got::held);
  EXPECT_GT(next.token, held.token);
}

TEST(PostgresLock, TheSameAcquisitionSentAgainGetsTheSameTokenAndAFreshLease) {
  Schema schema;
  LockProcess p(schema);
  const store::LockReply held = p.locks.acquire("invoice", 60'000, 42);
  Witness().script("UPDATE " + locks_of(schema) +
                   " SET expires_at = clock_timestamp() + interval '1 second'");
  const store::LockReply again = p.locks.acquire("invoice", 60'000, 42);
  EXPECT_EQ(again.outcome, Got::held);
  EXPECT_EQ(again.token, held.token);
  EXPECT_EQ(
      Witness().value("SELECT expires_at > clock_timestamp() + interval '20 s' FROM " + locks_of(schema)),
      "t");
  // Also when its lease ended, as long as nobody took it.
  expire(schema, "invoice");
  EXPECT_EQ(p.locks.acquire("invoice", 60'000, 42).token, held.token);
  expire(schema, "invoice");
  const store::LockReply other = p.locks.acquire("invoice", 60'000, 43);
  EXPECT_GT(other.token, held.token);
  EXPECT_EQ(p.locks.acquire("invoice", 60'000, 42).outcome, Got::taken);
}

TEST(PostgresLock, AnExpiredLockIsTakenOverAndItsFormerHolderLearnsThat) {
  Schema schema;
  LockProcess a(schema), b(schema);
  const store::LockReply held = a.locks.acquire("invoice");
  expire(schema, "invoice");
  const store::LockReply over = b.locks.acquire("invoice");
  EXPECT_EQ(over.outcome, Got::held);
  EXPECT_GT(over.token, held.token);
  EXPECT_EQ(a.locks.renew("invoice", held.token).outcome, Got::lost);
  EXPECT_EQ(a.locks.release("invoice", held.token), Got::lost);
  EXPECT_EQ(b.locks.renew("invoice", over.token).outcome, Got::held) << "the stale release changed nothing";
}

TEST(PostgresLock, AnExpiredLockThatNobodyTookIsRenewedButItsReleaseSaysThatItWasFree) {
  Schema schema;
  LockProcess p(schema);
  const store::LockReply held = p.locks.acquire("invoice");
  expire(schema, "invoice");
  EXPECT_EQ(p.locks.renew("invoice", held.token, 40'000).outcome, Got::held);
  EXPECT_EQ(p.locks.acquire("invoice").outcome, Got::taken);
  expire(schema, "invoice");
  EXPECT_EQ(p.locks.release("invoice", held.token), Got::lost);
  EXPECT_EQ(p.locks.acquire("invoice").outcome, Got::held);
}

TEST(PostgresLock, AReleaseSaysOnceThatItWasHeld) {
  Schema schema;
  LockProcess p(schema);
  EXPECT_EQ(p.locks.release("never", 7), Got::lost);
  EXPECT_EQ(p.locks.renew("never", 7).outcome, Got::lost);
  const store::LockReply held = p.locks.acquire("invoice");
  EXPECT_EQ(p.locks.release("invoice", held.token + 1), Got::lost);
  EXPECT_EQ(p.locks.release("invoice", 0), Got::lost) << "no token is any token only where a lock is broken";
  EXPECT_EQ(p.locks.release("invoice", held.token), Got::held);
  EXPECT_EQ(p.locks.release("invoice", held.token), Got::lost);
  EXPECT_EQ(p.locks.renew("invoice", held.token).outcome, Got::lost);
  EXPECT_EQ(p.locks.break_lock("invoice", held.token), Got::lost);
  EXPECT_EQ(p.locks.break_lock("invoice"), Got::lost);
}

TEST(PostgresLock, ALockIsBrokenByHandForOneTokenOrWhoeverHasIt) {
  Schema schema;
  LockProcess a(schema), b(schema);
  const store::LockReply held = a.locks.acquire("invoice");
  EXPECT_EQ(b.locks.break_lock("invoice", held.token + 1), Got::lost);
  EXPECT_EQ(b.locks.break_lock("invoice", held.token), Got::held);
  EXPECT_EQ(a.locks.release("invoice", held.token), Got::lost) << "it was broken";
  EXPECT_EQ(a.locks.acquire("invoice").outcome, Got::held);
  EXPECT_EQ(b.locks.break_lock("invoice"), Got::held);
  EXPECT_EQ(b.locks.acquire("invoice").outcome, Got::held);
}

TEST(PostgresLock, TokensOfANameGrowOverReleasesTakeoversAndPurges) {
  Schema schema;
  LockProcess a(schema), b(schema);
  std::int64_t last = 0;
  for (int i = 0; i < 12; ++i) {
    LockProcess& p = i % 2 ? a : b;
    const store::LockReply held = p.locks.acquire("invoice");
    ASSERT_EQ(held.outcome, Got::held);
    ASSERT_GT(held.token, last);
    last = held.token;
    if (i % 3 == 0) expire(schema, "invoice");
    if (i % 3 == 1) {
      EXPECT_EQ(p.locks.release("invoice", held.token), Got::held);
    }
    if (i % 3 == 2) Witness().script("DELETE FROM " + locks_of(schema));
  }
}

TEST(PostgresLock, NamesMayHoldAnythingAndNeverMeetOtherNames) {
  Schema schema;
  LockProcess p(schema);
  std::set<std::int64_t> tokens;
  const std::vector<std::string> names = {kHostile, kHostile + "x", "a:b",  "a",  "%",
                                          "_",      "{}",           "NULL", "\"", "\\"};
  for (const std::string& name : names) {
    const store::LockReply held = p.locks.acquire(name);
    EXPECT_EQ(held.outcome, Got::held) << name;
    tokens.insert(held.token);
  }
  EXPECT_EQ(tokens.size(), names.size());
  for (const auto& [name_space, tenant, name] : std::vector<std::array<std::string, 3>>{
           {"a:b", "c", "x"}, {"a", "b:c", "x"}, {"a", "b", "c:x"}, {"a", "bc", ":x"}}) {
    LockCall call;
    Locks::set(call, Verb::acquire, name, 60'000);
    call.space = space(name_space, tenant);
    EXPECT_EQ(p.locks.run(call).outcome, Got::held) << name_space << '|' << tenant;
  }
  EXPECT_EQ(p.locks.list(space("a", "b:c")).size(), 1u);
  EXPECT_EQ(p.locks.list(nullptr).size(), names.size() + 4);
  EXPECT_EQ(p.locks.list(nullptr, 3).size(), 3u);
}

TEST(PostgresLock, WhatCannotBeANameIsRefusedBeforeAnythingIsSent) {
  Schema schema;
  LockProcess p(schema);
  const auto refused = [&](auto change) {
    LockCall call;
    Locks::set(call, Verb::acquire, "x", 1'000);
    change(call);
    p.locks.store->submit(&call);
    EXPECT_TRUE(call.answered);
    return call.reply.status.code == Code::invalid;
  };
  EXPECT_TRUE(refused([](LockCall& c) { c.name = ""; }));
  EXPECT_TRUE(refused([](LockCall& c) { c.name = std::string("a\0b", 3); }));
  EXPECT_TRUE(refused([](LockCall& c) { c.name = "\xFF"; }));
  EXPECT_TRUE(refused([](LockCall& c) { c.name = std::string(1025, 'x'); }));
  EXPECT_TRUE(refused([](LockCall& c) { c.space = space(""); }));
  EXPECT_TRUE(refused([](LockCall& c) { c.space = space("a", std::string(256, 'x')); }));
  EXPECT_TRUE(refused([](LockCall& c) { c.ttl = 0; }));
  EXPECT_TRUE(refused([](LockCall& c) { c.id = 0; }));
}

TEST(PostgresLock, ALeaseBeyondTheEndOfTimeFailsAlone) {
  Schema schema;
  LockProcess p(schema);
  std::vector<std::unique_ptr<LockCall>> calls;
  for (int i = 0; i < 20; ++i) {
    calls.push_back(std::make_unique<LockCall>());
    Locks::set(*calls.back(), Verb::acquire, "n" + std::to_string(i),
               i == 13 ? std::numeric_limits<std::int64_t>::max() : 60'000);
  }
  calls = p.locks.all(std::move(calls));
  EXPECT_EQ(calls[13]->reply.status.code, Code::server);
  for (int i = 0; i < 20; ++i) {
    if (i == 13) continue;
    EXPECT_EQ(calls[static_cast<std::size_t>(i)]->reply.outcome, Got::held) << i;
  }
}

TEST(PostgresLock, OperationsOfOneNameAreCarriedOutInTheirOrder) {
  Schema schema;
  LockProcess p(schema);
  const store::LockReply first = p.locks.acquire("invoice");
  // Queued at once: refused, released, taken, refused, and a stale release.
  std::vector<std::unique_ptr<LockCall>> calls;
  const auto add = [&](Verb verb, std::int64_t token) {
    calls.push_back(std::make_unique<LockCall>());
    Locks::set(*calls.back(), verb, "invoice", 60'000, token);
  };
  add(Verb::acquire, 0);
  add(Verb::renew, first.token);
  add(Verb::release, first.token);
  add(Verb::acquire, 0);
  add(Verb::acquire, 0);
  add(Verb::release, first.token);
  add(Verb::acquire, 0);
  calls = p.locks.all(std::move(calls));
  EXPECT_EQ(calls[0]->reply.outcome, Got::taken);
  EXPECT_EQ(calls[0]->reply.token, first.token);
  EXPECT_EQ(calls[1]->reply.outcome, Got::held);
  EXPECT_EQ(calls[2]->reply.outcome, Got::held);
  EXPECT_EQ(calls[3]->reply.outcome, Got::held);
  EXPECT_GT(calls[3]->reply.token, first.token);
  EXPECT_EQ(calls[4]->reply.outcome, Got::taken);
  EXPECT_EQ(calls[4]->reply.token, calls[3]->reply.token);
  EXPECT_EQ(calls[5]->reply.outcome, Got::lost);
  EXPECT_EQ(calls[6]->reply.outcome, Got::taken);
}

TEST(PostgresLock, TenThousandNamesInOneGo) {
  Schema schema;
  LockProcess p(schema);
  ASSERT_TRUE(p.initialize().ok());
  const auto go = [&](Verb verb, const std::vector<std::int64_t>& tokens) {
    std::vector<std::unique_ptr<LockCall>> calls;
    for (int i = 0; i < 10'000; ++i) {
      calls.push_back(std::make_unique<LockCall>());
      Locks::set(*calls.back(), verb, "order-" + std::to_string(i * 7919 % 10'000), 60'000,
                 tokens.empty() ? 0 : tokens[static_cast<std::size_t>(i)]);
    }
    const store::Stats before = p.store->stats();
    calls = p.locks.all(std::move(calls));
    EXPECT_LE(p.store->stats().round_trips - before.round_trips, 20u) << "batched";
    std::vector<std::int64_t> out;
    for (const auto& call : calls) {
      EXPECT_EQ(call->reply.outcome, Got::held);
      out.push_back(call->reply.token);
    }
    return out;
  };
  const std::vector<std::int64_t> tokens = go(Verb::acquire, {});
  EXPECT_EQ(std::set<std::int64_t>(tokens.begin(), tokens.end()).size(), 10'000u);
  go(Verb::renew, tokens);
  go(Verb::release, tokens);
  EXPECT_EQ(Witness().value("SELECT count(*) FROM " + locks_of(schema) + " WHERE holder_id > 0"), "0");
}

TEST(PostgresLock, ARefusalWritesNothing) {
  Schema schema;
  LockProcess a(schema), b(schema);
  a.locks.acquire("invoice");
  Witness witness;
  const std::string row =
      "SELECT xmin::text || ' ' || xmax::text || ' ' || ctid::text FROM " + locks_of(schema);
  const std::string before = witness.value(row);
  EXPECT_EQ(b.locks.acquire("invoice").outcome, Got::taken);
  EXPECT_EQ(witness.value(row), before);
}

TEST(PostgresLock, WhoHoldsWhatSinceWhenIsListed) {
  Schema schema;
  LockProcess a(schema), b(schema);
  const store::LockReply held = a.locks.acquire("b", 50'000);
  a.locks.acquire("a", 50'000);
  const store::LockReply released = a.locks.acquire("c");
  a.locks.release("c", released.token);
  b.locks.queue("b");
  expire(schema, "a");
  const std::vector<store::LockInfo> list = b.locks.list(space());
  ASSERT_EQ(list.size(), 2u);
  EXPECT_EQ(list[0].name, "a");
  EXPECT_LE(list[0].expires_in, 0);
  EXPECT_EQ(list[1].name, "b");
  EXPECT_EQ(list[1].token, held.token);
  EXPECT_EQ(list[1].waiters, 1);
  EXPECT_GE(list[1].held_for, 0);
  EXPECT_GT(list[1].expires_in, 0);
  EXPECT_NE(list[1].holder.find("ratesync"), std::string::npos);
}

TEST(PostgresLock, LongDeadLocksAndPlacesInLineArePurgedAndOthersStay) {
  Schema schema;
  LockProcess p(schema);
  ASSERT_TRUE(p.finish([&](auto done) { p.locks.store->initialize(done); }).ok());
  const std::string insert = "INSERT INTO " + locks_of(schema) + " SELECT 'default', 'default', ";
  Witness().script(insert +
                   "'dead' || i, i, CASE WHEN i % 2 = 0 THEN 0 ELSE 5 END, '', now(), now() - "
                   "interval '1 hour' FROM generate_series(1, 7000) AS i;" +
                   insert + "'young', 1, 0, '', now(), now() - interval '1 minute';" + insert +
                   "'held', 2, 3, '', now(), now() + interval '1 minute';"
                   "INSERT INTO " +
                   waiters_of(schema) +
                   " VALUES ('default', 'default', 'x', 1, now(), now() - interval '1 hour')");
  ASSERT_EQ(p.locks.acquire("mine").outcome, Got::held);
  Witness witness;
  ASSERT_TRUE(p.until([&] {
    p.locks.acquire("mine");
    return witness.value("SELECT count(*) FROM " + locks_of(schema)) == "3";
  }));
  EXPECT_EQ(witness.value("SELECT count(*) FROM " + waiters_of(schema)), "0");
}

TEST(PostgresLock, ARoleThatOwnsNothingTakesLocksWithTheDocumentedGrants) {
  Schema schema;
  LockProcess owner(schema);
  ASSERT_TRUE(owner.finish([&](auto done) { owner.locks.store->initialize(done); }).ok());
  const std::string role = "lock_role_" + std::to_string(getpid());
  Witness().script("DO $$ BEGIN CREATE ROLE " + role +
                   " LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$");
  {
    LockProcess p(
        schema, [](PostgresOptions& options) { options.auto_create = false; }, role);
    LockCall call;
    Locks::set(call, store::LockOp::Verb::acquire, "invoice", 1'000);
    const Status refused = p.locks.run(call).status;
    EXPECT_EQ(refused.sqlstate, "42501");
    EXPECT_NE(refused.message.find(", " + waiters_of(schema) + " TO"), std::string::npos) << refused.message;
  }
  Witness().script("GRANT USAGE ON SCHEMA " + schema.quoted() + " TO " + role +
                   "; GRANT SELECT, INSERT, UPDATE, DELETE ON " + locks_of(schema) + ", " +
                   waiters_of(schema) + " TO " + role + "; GRANT USAGE ON SEQUENCE " +
                   schema.table("acteon_lock_tokens") + " TO " + role);
  {
    LockProcess p(
        schema, [](PostgresOptions& options) { options.auto_create = false; }, role);
    const store::LockReply held = p.locks.acquire("invoice");
    EXPECT_EQ(held.outcome, Got::held);
    EXPECT_EQ(owner.locks.queue("invoice").outcome, Got::taken);
    EXPECT_EQ(p.locks.renew("invoice", held.token).outcome, Got::held);
    EXPECT_EQ(p.locks.release("invoice", held.token), Got::held);
    EXPECT_EQ(owner.locks.queue("invoice").outcome, Got::held);
    EXPECT_EQ(p.locks.queue("invoice").outcome, Got::taken);
    EXPECT_EQ(p.locks.list().size(), 1u);
    p.locks.store->stop_waiting(space(), "invoice");
    EXPECT_EQ(p.locks.break_lock("invoice"), Got::held);
  }
  Witness().script("DROP OWNED BY " + role + "; DROP ROLE " + role);
}

TEST(PostgresLock, ABellTellsAllWhoWaitThereOnceAndNoLockIsMade) {
  Schema schema;
  LockProcess ringer(schema), one(schema), two(schema), other(schema);
  const std::vector<LockProcess*> waiters{&one, &two};
  for (LockProcess* p : waiters) {
    p->locks.stand(kHostile);
    ASSERT_TRUE(p->until([&] { return p->locks.store->pushes(); }));
    ASSERT_TRUE(p->until([&] { return !p->locks.told.empty(); })) << "asked once, for what was missed";
    p->locks.stand(kHostile);
    p->locks.told.clear();
  }
  other.locks.stand("other");
  ringer.locks.stand(kHostile);
  ringer.locks.ring(kHostile);
  for (LockProcess* p : waiters) {
    ASSERT_TRUE(p->until([&] { return !p->locks.told.empty(); }));
    EXPECT_EQ(p->locks.told.front(), kHostile);
  }
  EXPECT_EQ(Witness().value("SELECT string_agg(name, ',') FROM " + waiters_of(schema)), "other");
  EXPECT_EQ(Witness().value("SELECT count(*) FROM " + locks_of(schema)), "0");
  ringer.locks.ring("never stood at");
  // Who leaves tells nobody.
  one.locks.stand("a");
  two.locks.stand("a");
  one.locks.store->stop_waiting(space(), "a");
  ASSERT_TRUE(one.until([&] {
    return Witness().value("SELECT count(*) FROM " + waiters_of(schema) + " WHERE name = 'a'") == "1";
  }));
  two.locks.ring("two is through with it");
  for (LockProcess* p : waiters)
    for (const std::string& name : p->locks.told) EXPECT_EQ(name, kHostile);
}

TEST(PostgresLock, WithoutATableOfWaitersABellIsRefusedAndARingDoesNothing) {
  Schema schema;
  {
    LockProcess owner(schema);
    ASSERT_TRUE(owner.finish([&](auto done) { owner.locks.store->initialize(done); }).ok());
  }
  Witness().script("DROP TABLE " + waiters_of(schema));
  LockProcess p(schema, [](PostgresOptions& options) { options.auto_create = false; });
  LockCall call;
  Locks::set(call, store::LockOp::Verb::stand, "bell", 0);
  EXPECT_EQ(p.locks.run(call).status.code, Code::unavailable);
  p.locks.ring("bell");
  EXPECT_EQ(p.locks.acquire("lock").outcome, Got::held);
}

TEST(PostgresLock, NoticesSurviveNamesOfAnyKindAndNonsenseIsIgnored) {
  store::Space from;
  std::string name;
  ASSERT_TRUE(read_freed("2 3 nstenthe name", from, name));
  EXPECT_EQ(from.name_space, "ns");
  EXPECT_EQ(from.tenant, "ten");
  EXPECT_EQ(name, "the name");
  for (const char* bad :
       {"", "2", "2 ", "2 3", "x 3 abc", "-1 2 abc", "9 9 abc", "18446744073709551615 2 abc",
        "3 18446744073709551615 abc", "99999999999999999999 1 a"})
    EXPECT_FALSE(read_freed(bad, from, name)) << bad;
}
