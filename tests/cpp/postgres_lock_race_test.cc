// Locks between processes: races, waiters, lost answers and killed backends.
#include <map>
#include <set>
#include <thread>

#include "lock_rig.h"
#include "proxy_rig.h"

using namespace ratesync;
using namespace ratesync::testing;
using namespace ratesync::postgres;
using Verb = store::LockOp::Verb;

namespace {

std::string locks_of(const Schema& schema) { return schema.table("acteon_locks"); }
std::string waiters_of(const Schema& schema) { return schema.table("acteon_lock_waiters"); }

void make_tables(const Schema& schema) {
  LockProcess p(schema);
  ASSERT_TRUE(p.finish([&](auto done) { p.locks.store->initialize(done); }).ok());
}

// Those at work on locks: two connects that fail in a row mean a server that is down.
void kill_backends(const Schema& schema) {
  Witness().ask(
      "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'ratesync' "
      "AND pid <> pg_backend_pid() AND strpos(query, '" +
      locks_of(schema) + "') > 0");
}

// What all callers together saw of one name. Tokens are noted while the lock is held.
struct Seen {
  std::atomic<int> inside{0};
  std::atomic<int> broken{0};  // two inside, or a token that did not grow
  std::atomic<std::int64_t> last{0};
  std::atomic<int> cycles{0};
  void enter(std::int64_t token) {
    if (inside.fetch_add(1) != 0 || last.exchange(token) >= token) ++broken;
  }
  void leave() {
    inside.fetch_sub(1);
    ++cycles;
  }
};

// One caller that takes and releases, again and again.
struct Caller {
  Caller(store::LockStore* its_store, std::vector<Seen>& all, std::size_t place, std::atomic<bool>& end)
      : store(its_store), seen(all), at(place), stop(end) {
    take.then = [this](LockCall&) { got(); };
    give.then = [this](LockCall&) { gave(); };
  }
  void start() {
    running = !stop;
    if (!running) return;
    Locks::set(take, Verb::acquire, "n" + std::to_string(at), 60'000);
    take.answered = false;
    store->submit(&take);
  }
  void got() {
    note(take);
    if (!take.reply.status.ok() || take.reply.outcome != Got::held) {
      at = (at + 1) % seen.size();
      return start();
    }
    seen[at].enter(take.reply.token);
    seen[at].leave();
    Locks::set(give, Verb::release, take.name, 0, take.reply.token);
    store->submit(&give);
  }
  void gave() {
    note(give);
    if (give.reply.status.ok() && give.reply.outcome != Got::held) ++failed;
    at = (at + 3) % seen.size();
    start();
  }
  void note(const LockCall& call) {
    if (call.reply.status.ok()) return;
    // Nothing was sent: the connection was killed while it was made.
    if (call.verb == Verb::acquire && call.reply.status.code == Code::unavailable) return;
    ++failed;
    ADD_FAILURE() << call.reply.status.message;
  }
  store::LockStore* store;
  std::vector<Seen>& seen;
  std::size_t at;
  std::atomic<bool>& stop;
  LockCall take, give;
  bool running = false;
  int failed = 0;
};

// How often something has to have happened meanwhile.
constexpr int kTurns = 4;

// `processes` with `callers` each, until `enough` cycles were made. Returns failures.
int race(const Schema& schema, std::vector<Seen>& seen, std::size_t processes, std::size_t callers,
         int enough, const std::function<void()>& meanwhile = {}) {
  std::atomic<bool> stop{false};
  std::atomic<int> failures{0}, made{0}, turns{meanwhile ? 0 : kTurns};
  std::vector<std::thread> threads;
  for (std::size_t n = 0; n < processes; ++n)
    threads.emplace_back([&, n] {
      LockProcess p(schema);
      std::vector<std::unique_ptr<Caller>> all;
      for (std::size_t i = 0; i < callers; ++i)
        all.push_back(std::make_unique<Caller>(p.locks.store, seen, (n + i) % seen.size(), stop));
      for (auto& caller : all) caller->start();
      EXPECT_TRUE(p.until([&] {
        int cycles = 0;
        for (const Seen& s : seen) cycles += s.cycles;
        if (cycles >= enough && turns >= kTurns) stop = true;
        made = cycles;
        return std::none_of(all.begin(), all.end(), [](const auto& c) { return c->running; });
      })) << made
          << " cycles";
      for (auto& caller : all) failures += caller->failed;
    });
  while (meanwhile && !stop) {
    meanwhile();
    ++turns;
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  for (std::thread& thread : threads) thread.join();
  return failures;
}

// Sends without waiting for the answer.
std::unique_ptr<LockCall> send(store::LockStore* store, Verb verb, const std::string& name, std::int64_t ttl,
                               std::int64_t token = 0, Nanos deadline = kForever, std::int64_t id = 0) {
  auto call = std::make_unique<LockCall>();
  Locks::set(*call, verb, name, ttl, token);
  if (id != 0) call->id = id;
  call->deadline = deadline;
  store->submit(call.get());
  return call;
}

}  // namespace

TEST(PostgresLockRace, OneHolderAtATimeAndTokensOfANameGrow) {
  Schema schema;
  make_tables(schema);
  std::vector<Seen> seen(5);
  EXPECT_EQ(race(schema, seen, 3, 16, 3'000), 0);
  for (const Seen& s : seen) {
    EXPECT_EQ(s.broken, 0);
    EXPECT_GT(s.cycles, 0);
  }
}

TEST(PostgresLockRace, TokensOfALockThatWasNeverThereAreUniqueToo) {
  Schema schema;
  make_tables(schema);
  // Each name is fought over once, from nothing, by four processes.
  std::vector<std::map<std::string, std::int64_t>> got(4);
  std::vector<std::thread> threads;
  for (auto& mine : got)
    threads.emplace_back([&schema, &mine] {
      LockProcess p(schema);
      std::vector<std::unique_ptr<LockCall>> calls;
      for (int i = 0; i < 500; ++i) {
        calls.push_back(std::make_unique<LockCall>());
        Locks::set(*calls.back(), Verb::acquire, "n" + std::to_string(i), 60'000);
      }
      for (const auto& call : p.locks.all(std::move(calls))) {
        EXPECT_TRUE(call->reply.status.ok()) << call->reply.status.message;
        if (call->reply.outcome == Got::held) mine[call->name] = call->reply.token;
      }
    });
  for (std::thread& thread : threads) thread.join();
  std::map<std::string, std::int64_t> winners;
  std::set<std::int64_t> tokens;
  for (const auto& mine : got)
    for (const auto& [name, token] : mine) {
      EXPECT_TRUE(winners.emplace(name, token).second) << "two winners of " << name;
      tokens.insert(token);
    }
  EXPECT_EQ(winners.size(), 500u);
  EXPECT_EQ(tokens.size(), 500u);
}

TEST(PostgresLockRace, KilledBackendsCostNobodyALockAndGiveNobodyASecondOne) {
  Schema schema;
  make_tables(schema);
  std::vector<Seen> seen(6);
  int kills = 0;
  const int failures = race(schema, seen, 2, 8, 2'000, [&] {
    if (++kills <= 8) kill_backends(schema);
  });
  EXPECT_GT(kills, 3);
  for (const Seen& s : seen) EXPECT_EQ(s.broken, 0);
  EXPECT_EQ(failures, 0) << "whatever was in doubt was asked for again";
  EXPECT_EQ(Witness().value("SELECT count(*) FROM " + locks_of(schema) + " WHERE holder_id > 0"), "0");
}

// Each process takes over what the other one still renews or releases, in both directions at once.
TEST(PostgresLockRace, CrossedTakeoversAndReleasesEnd) {
  Schema schema;
  make_tables(schema);
  LockProcess a(schema), b(schema);
  for (int round = 0; round < 10; ++round) {
    std::vector<std::unique_ptr<LockCall>> calls;
    for (LockProcess* p : {&a, &b})
      for (int i = 0; i < 50; ++i)
        ASSERT_EQ(p->locks.acquire((p == &a ? "a" : "b") + std::to_string(i)).outcome, Got::held);
    const Table rows = Witness().ask("UPDATE " + locks_of(schema) +
                                     " SET expires_at = clock_timestamp() RETURNING name, token");
    for (const auto& row : rows) {
      LockProcess& owner = row[0][0] == 'a' ? a : b;
      LockProcess& other = row[0][0] == 'a' ? b : a;
      calls.push_back(send(owner.locks.store, Verb::release, row[0], 0, std::stoll(row[1])));
      calls.push_back(send(other.locks.store, Verb::acquire, row[0], 60'000));
    }
    ASSERT_TRUE(a.until([&] {
      b.io.restart();
      b.io.poll();
      return std::all_of(calls.begin(), calls.end(), [](const auto& call) { return call->answered; });
    }));
    for (const auto& call : calls) ASSERT_TRUE(call->reply.status.ok()) << call->reply.status.message;
    Witness().script("DELETE FROM " + locks_of(schema));
  }
}

// --- waiters --------------------------------------------------------------------------------------

TEST(PostgresLockWaiters, AReleaseTellsTheFirstInLineAndNobodyElse) {
  Schema schema;
  const std::string name = std::string("a'\"{}\\ \n") + std::string(900, 'x') + "\xF0\x9F\x92\xA9";
  LockProcess holder(schema), first(schema), second(schema), third(schema), passer(schema);
  const store::LockReply held = holder.locks.acquire(name);
  for (LockProcess* p : {&first, &second, &third}) p->locks.stand_in_line(name);
  const std::uint64_t statements = first.store->stats().statements;
  EXPECT_EQ(holder.locks.release(name, held.token), Got::held);
  ASSERT_TRUE(first.until([&] { return !first.locks.told.empty(); }));
  EXPECT_EQ(first.locks.told, std::vector<std::string>{name});
  EXPECT_LE(first.store->stats().statements, statements + 2) << "no polling";
  // It is for the first: nobody overtakes, also not those behind it.
  const store::LockReply refused = passer.locks.acquire(name);
  EXPECT_EQ(refused.outcome, Got::taken);
  EXPECT_GT(refused.remaining, 0);
  EXPECT_LE(refused.remaining, 3'000) << "a place that nobody keeps alive ends soon";
  EXPECT_EQ(second.locks.queue(name).outcome, Got::taken);
  const store::LockReply next = first.locks.queue(name);
  ASSERT_EQ(next.outcome, Got::held);
  EXPECT_EQ(Witness().value("SELECT count(*) FROM " + waiters_of(schema)), "2") << "served, and forgotten";
  EXPECT_TRUE(second.locks.told.empty());
  EXPECT_TRUE(third.locks.told.empty());

  EXPECT_EQ(first.locks.release(name, next.token), Got::held);
  ASSERT_TRUE(second.until([&] { return !second.locks.told.empty(); }));
  EXPECT_EQ(first.locks.queue(name).outcome, Got::taken) << "behind those that waited";
  EXPECT_EQ(second.locks.queue(name).outcome, Got::held);
  EXPECT_TRUE(third.locks.told.empty());
}

TEST(PostgresLockWaiters, WhereNobodyElseWaitsNoNoticeIsSent) {
  Schema schema;
  LockProcess p(schema);
  const store::LockReply held = p.locks.acquire("invoice");
  p.locks.stand_in_line("invoice");
  EXPECT_EQ(p.locks.release("invoice", held.token), Got::held);
  EXPECT_EQ(p.locks.told, std::vector<std::string>{"invoice"}) << "told without the server";
  EXPECT_EQ(p.locks.queue("invoice").outcome, Got::held);
}

TEST(PostgresLockWaiters, ARefusalOfSomebodyWhoDoesNotWaitIsNotRemembered) {
  Schema schema;
  LockProcess a(schema), b(schema);
  a.locks.acquire("invoice");
  EXPECT_EQ(b.locks.acquire("invoice").outcome, Got::taken);
  EXPECT_EQ(Witness().value("SELECT count(*) FROM " + waiters_of(schema)), "0");
  EXPECT_FALSE(b.locks.store->pushes());
}

TEST(PostgresLockWaiters, WhoLeavesTheLinePassesTheNewsOn) {
  Schema schema;
  LockProcess holder(schema), first(schema), second(schema);
  const store::LockReply held = holder.locks.acquire("invoice");
  first.locks.stand_in_line("invoice");
  second.locks.stand_in_line("invoice");
  // Released, and told, but the first one left before it heard.
  EXPECT_EQ(holder.locks.release("invoice", held.token), Got::held);
  first.locks.store->stop_waiting(space(), "invoice");
  ASSERT_TRUE(first.until([&] {
    second.io.restart();
    second.io.poll();
    return !second.locks.told.empty();
  }));
  EXPECT_EQ(second.locks.queue("invoice").outcome, Got::held);
}

TEST(PostgresLockWaiters, BreakingALockTellsTheFirstInLine) {
  Schema schema;
  LockProcess holder(schema), waiter(schema);
  holder.locks.acquire("invoice");
  waiter.locks.stand_in_line("invoice");
  EXPECT_EQ(holder.locks.break_lock("invoice"), Got::held);
  ASSERT_TRUE(waiter.until([&] { return !waiter.locks.told.empty(); }));
  EXPECT_EQ(waiter.locks.queue("invoice").outcome, Got::held);
}

TEST(PostgresLockWaiters, ADeadWaiterHoldsUpNobodyForLong) {
  Schema schema;
  LockProcess holder(schema), waiter(schema);
  const store::LockReply held = holder.locks.acquire("invoice");
  // It died without a word; its place is a little older than ours.
  Witness().script(
      "INSERT INTO " + waiters_of(schema) +
      " VALUES ('default', 'default', 'invoice', 7, now() - interval '1 s', now() + interval '1 s')");
  waiter.locks.queue("invoice");
  EXPECT_EQ(holder.locks.release("invoice", held.token), Got::held);
  ASSERT_TRUE(waiter.until([&] { return waiter.locks.queue("invoice").outcome == Got::held; }));
}

TEST(PostgresLockWaiters, APlaceIsKeptWhileItsProcessLivesAndMadeAnewWhenTheServerForgotIt) {
  Schema schema;
  LockProcess holder(schema), waiter(schema);
  const store::LockReply held = holder.locks.acquire("invoice");
  waiter.locks.stand_in_line("invoice");
  Witness witness;
  const std::string ends = "SELECT expires_at FROM " + waiters_of(schema);
  const std::string before = witness.value(ends);
  ASSERT_TRUE(waiter.until([&] { return witness.value(ends) > before; })) << "refreshed";
  // A crash of the server empties the table.
  witness.script("TRUNCATE " + waiters_of(schema));
  ASSERT_TRUE(waiter.until([&] { return !waiter.locks.told.empty(); })) << "so it asks again";
  EXPECT_EQ(waiter.locks.queue("invoice").outcome, Got::taken);
  waiter.locks.told.clear();
  EXPECT_EQ(holder.locks.release("invoice", held.token), Got::held);
  ASSERT_TRUE(waiter.until([&] { return !waiter.locks.told.empty(); }));
}

TEST(PostgresLockWaiters, WithoutTheirTableLocksWorkAndNobodyIsTold) {
  Schema schema;
  make_tables(schema);
  Witness().script("DROP TABLE " + waiters_of(schema));
  const auto by_hand = [](PostgresOptions& options) { options.auto_create = false; };
  LockProcess a(schema, by_hand), b(schema, by_hand);
  const store::LockReply held = a.locks.acquire("invoice");
  ASSERT_EQ(held.outcome, Got::held);
  EXPECT_EQ(b.locks.queue("invoice").outcome, Got::taken);
  EXPECT_FALSE(b.locks.store->pushes());
  b.locks.store->stop_waiting(space(), "invoice");
  EXPECT_EQ(b.locks.list().size(), 1u);
  EXPECT_EQ(a.locks.release("invoice", held.token), Got::held);
  EXPECT_EQ(b.locks.queue("invoice").outcome, Got::held);
}

TEST(PostgresLockWaiters, AClosedStoreLeavesItsLines) {
  Schema schema;
  LockProcess holder(schema), second(schema);
  const store::LockReply held = holder.locks.acquire("invoice");
  {
    LockProcess first(schema);
    first.locks.stand_in_line("invoice");
    second.locks.queue("invoice");
  }
  EXPECT_EQ(Witness().value("SELECT count(*) FROM " + waiters_of(schema)), "1");
  EXPECT_EQ(holder.locks.release("invoice", held.token), Got::held);
  EXPECT_EQ(second.locks.queue("invoice").outcome, Got::held);
}

// --- faults ---------------------------------------------------------------------------------------

struct LockFault : ::testing::Test {
  Schema schema;
  Behind p{schema};
  store::LockStore* locks = p.process->store->locks("acteon_").value();
  bool answered(const LockCall& call) {
    return p.until([&] { return call.answered; });
  }
  // All of the pool is connected and nothing under way: what is sent next leaves at once, on both lanes.
  void warm_up() {
    run(Verb::acquire, "warm", 60'000);
    ASSERT_TRUE(p.until([&] {
      const store::Stats stats = p.process->store->stats();
      return stats.connections_open >= 2 && stats.connections_in_use == 0;
    }));
  }
  // Carried out by the server, which cannot say so.
  bool carried_out(const std::string& name) {
    Witness witness;
    return p.until([&] {
      return witness.value("SELECT count(*) FROM " + locks_of(schema) + " WHERE name = '" + name + "'") ==
             "1";
    });
  }
  store::LockReply run(Verb verb, const std::string& name, std::int64_t ttl, std::int64_t token = 0) {
    const auto call = send(locks, verb, name, ttl, token);
    EXPECT_TRUE(answered(*call));
    EXPECT_TRUE(call->reply.status.ok()) << call->reply.status.message;
    return call->reply;
  }
};

TEST_F(LockFault, AnswersThatWereLostAreAskedForAgainAndAreTheSame) {
  const store::LockReply first = run(Verb::acquire, "first", 60'000);
  const store::LockReply kept = run(Verb::acquire, "kept", 60'000);
  const store::LockReply broken = run(Verb::acquire, "broken", 60'000);
  const store::LockReply stale = run(Verb::acquire, "stale", 60'000);
  run(Verb::release, "stale", 0, stale.token);
  const store::LockReply retaken = run(Verb::acquire, "retaken", 60'000);
  warm_up();
  p.proxy->stall();
  const auto take = send(locks, Verb::acquire, "taken", 60'000);
  const auto release = send(locks, Verb::release, "first", 0, first.token);
  const auto renew = send(locks, Verb::renew, "kept", 60'000, kept.token);
  const auto by_hand = send(locks, Verb::break_, "broken", 0);
  const auto twice = send(locks, Verb::release, "stale", 0, stale.token);
  const auto overtaken = send(locks, Verb::release, "retaken", 0, retaken.token);
  Witness witness;
  const std::string done = "SELECT count(*) FROM " + locks_of(schema) +
                           " WHERE (name = 'taken' AND holder_id > 0) OR (name IN ('first', 'broken', "
                           "'retaken') AND holder_id <= 0)";
  ASSERT_TRUE(p.until([&] { return witness.value(done) == "4"; }))
      << "carried out, and the answers held back";
  EXPECT_FALSE(take->answered || release->answered || renew->answered || by_hand->answered);
  // Somebody else gets it before the release is sent again.
  witness.ask("UPDATE " + locks_of(schema) +
              " SET token = token + 1000, holder_id = 77, expires_at = now() + interval '1 minute' "
              "WHERE name = 'retaken'");
  const std::string token = witness.value("SELECT token FROM " + locks_of(schema) + " WHERE name = 'taken'");
  p.heal();
  for (const auto* call : {&take, &release, &renew, &by_hand}) {
    ASSERT_TRUE(answered(**call));
    ASSERT_TRUE((*call)->reply.status.ok()) << (*call)->reply.status.message;
  }
  for (const auto* call : {&twice, &overtaken}) {
    ASSERT_TRUE(answered(**call));
    EXPECT_EQ((*call)->reply.status.code, Code::in_doubt) << "by this release, or another one";
  }
  EXPECT_EQ(take->reply.outcome, Got::held);
  EXPECT_EQ(std::to_string(take->reply.token), token);
  EXPECT_EQ(release->reply.outcome, Got::held);
  EXPECT_EQ(renew->reply.outcome, Got::held);
  EXPECT_EQ(by_hand->reply.outcome, Got::held);
  EXPECT_EQ(run(Verb::release, "first", 0, first.token).outcome, Got::lost);
}

TEST_F(LockFault, WhatStaysInDoubtSaysSoAtItsDeadlineAndWhatWasNotSentSaysThat) {
  warm_up();
  p.proxy->stall();
  const Nanos deadline = p.process->clock.now() + kSecond;
  const auto sent = send(locks, Verb::acquire, "invoice", 60'000, 0, deadline);
  ASSERT_TRUE(carried_out("invoice"));
  const auto behind = send(locks, Verb::renew, "invoice", 60'000, 1, deadline);
  ASSERT_TRUE(answered(*sent));
  ASSERT_TRUE(answered(*behind));
  EXPECT_EQ(sent->reply.status.code, Code::in_doubt) << sent->reply.status.message;
  EXPECT_TRUE(behind->reply.status.code == Code::timeout || behind->reply.status.code == Code::unavailable)
      << behind->reply.status.message;
  p.heal();
  // The same acquisition later on finds what it did.
  ASSERT_TRUE(p.until([&] {
    const auto again = send(locks, Verb::acquire, "invoice", 60'000, 0, kForever, sent->id);
    return answered(*again) && again->reply.status.ok() && again->reply.outcome == Got::held;
  })) << "and it recovers";
}

TEST_F(LockFault, AnOperationThatWasNotSentIsTakenBackAndOneThatWasSentIsNot) {
  warm_up();
  p.proxy->stall();
  const auto sent = send(locks, Verb::acquire, "invoice", 60'000);
  ASSERT_TRUE(carried_out("invoice"));
  const auto behind = send(locks, Verb::acquire, "invoice", 60'000);
  EXPECT_TRUE(locks->abandon(behind.get()));
  EXPECT_FALSE(locks->abandon(behind.get()));
  EXPECT_FALSE(locks->abandon(sent.get()));
  p.heal();
  EXPECT_TRUE(answered(*sent));
  EXPECT_EQ(sent->reply.outcome, Got::held);
  EXPECT_FALSE(behind->answered);
}

TEST_F(LockFault, AStoreThatIsClosedAnswersEverything) {
  warm_up();
  p.proxy->stall();
  const auto sent = send(locks, Verb::acquire, "invoice", 60'000);
  ASSERT_TRUE(carried_out("invoice"));
  const auto behind = send(locks, Verb::acquire, "invoice", 60'000);
  bool closed = false;
  p.process->store->close([&] { closed = true; });
  ASSERT_TRUE(p.until([&] { return closed && sent->answered && behind->answered; }));
  EXPECT_EQ(behind->reply.status.code, Code::closed);
  EXPECT_FALSE(sent->reply.status.ok());
  const auto late = send(locks, Verb::acquire, "late", 60'000);
  EXPECT_EQ(late->reply.status.code, Code::closed);
}

TEST(PostgresLockFault, AMissingTableIsNamedAndFoundOnceItIsThere) {
  Schema schema;
  LockProcess p(schema, [](PostgresOptions& options) { options.auto_create = false; });
  LockCall call;
  Locks::set(call, Verb::acquire, "invoice", 60'000);
  EXPECT_FALSE(p.locks.run(call).status.ok());
  EXPECT_NE(call.reply.status.message.find("acteon_locks"), std::string::npos) << call.reply.status.message;
  make_tables(schema);
  const store::LockReply held = p.locks.acquire("invoice");
  EXPECT_EQ(held.outcome, Got::held);
  Witness().script("DROP TABLE " + locks_of(schema));
  LockCall again;
  Locks::set(again, Verb::renew, "invoice", 60'000, held.token);
  EXPECT_EQ(p.locks.run(again).status.code, Code::server);
  make_tables(schema);
  EXPECT_EQ(p.locks.acquire("invoice").outcome, Got::held) << "and it recovers";
}
