// Waiters for a slot across processes: told by a release, served in the order in which they came, and nobody
// is held up for long by one that died.
#include "limit_rig.h"

using namespace ratesync;
using namespace ratesync::testing;
using namespace ratesync::postgres;
using store::Verdict;

namespace {

std::string waiters(const Schema& schema) { return schema.table("rate_limiter_state_waiters"); }

// A process that counts what it is told.
struct Waiter : Process {
  explicit Waiter(const Schema& schema, const std::function<void(PostgresOptions&)>& change = {},
                  bool for_long = true)
      : Process(schema, change), place(for_long ? waiters(schema) : std::string()) {
    store->limits()->on_freed([this](const std::string& group) { told.push_back(group); });
  }
  store::AcquireReply ask(const store::GroupRef& group) {
    Request request;
    request.group = group;
    request.queued = true;
    store->limits()->acquire(&request);
    EXPECT_TRUE(until([&] { return request.answered; }));
    EXPECT_TRUE(request.reply.status.ok()) << request.reply.status.message;
    // Its place in line does not depend on how fast this test runs.
    if (!place.empty() && store->limits()->pushes())
      Witness().script("UPDATE " + place + " SET expires_at = now() + interval '1 hour'");
    return request.reply;
  }
  // In line, and hearing.
  void stand_in_line(const store::GroupRef& group) {
    ASSERT_EQ(ask(group).verdict, Verdict::concurrency_full);
    ASSERT_TRUE(until([&] { return store->limits()->pushes(); }));
    ASSERT_TRUE(until([&] { return !told.empty(); })) << "asked once, for what was missed";
    ASSERT_EQ(ask(group).verdict, Verdict::concurrency_full);
    told.clear();
  }
  bool hears() {
    return until([&] { return !told.empty(); });
  }
  std::vector<std::string> told;
  const std::string place;
};

// Lets `p` send what it has to, without waiting for anything in particular.
bool turn(Process& p, const std::function<bool()>& ready) { return p.until(ready); }

}  // namespace

TEST(PostgresWaiter, AReleaseElsewhereTellsTheWaiterWhoSentNothingMeanwhile) {
  Schema schema;
  Process holder(schema);
  Waiter waiter(schema);
  const std::string id = std::string("jobs '\"{}\\ ") + std::string(200, 'x') + "\xF0\x9F\x92\xA9";
  const auto group = make_group(id, 0, 1, 1);
  const store::AcquireReply held = holder.acquire(group);
  waiter.stand_in_line(group);
  const store::Stats before = waiter.store->stats();
  holder.store->limits()->release(group, held.holder);
  ASSERT_TRUE(turn(holder, [&] { return holder.peek(group).in_use == 0; }));
  ASSERT_TRUE(waiter.hears());
  EXPECT_EQ(waiter.told, std::vector<std::string>{id});
  EXPECT_EQ(waiter.store->stats().statements, before.statements) << "no polling";
  EXPECT_EQ(waiter.ask(group).verdict, Verdict::granted);
  EXPECT_EQ(Witness().value("SELECT count(*) FROM " + waiters(schema)), "0") << "served, and forgotten";
}

TEST(PostgresWaiter, ARefusalOfSomebodyWhoDoesNotWaitIsNotRemembered) {
  Schema schema;
  Process holder(schema);
  Waiter other(schema);
  const auto group = make_group("jobs", 0, 1, 1);
  holder.acquire(group);
  EXPECT_EQ(other.acquire(group).verdict, Verdict::concurrency_full);
  EXPECT_EQ(Witness().value("SELECT count(*) FROM " + waiters(schema)), "0");
  Witness witness;  // sessions of tests before this one may still be on their way out
  EXPECT_TRUE(other.until([&] {
    return witness.value("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%freed%'") == "0";
  }));
}

TEST(PostgresWaiter, ASlotGoesToWhoWaitsLongestAndNobodyOvertakes) {
  Schema schema;
  Process holder(schema), passer(schema);
  Waiter first(schema), second(schema);
  const auto group = make_group("jobs", 0, 1, 1);
  store::AcquireReply held = holder.acquire(group);
  first.stand_in_line(group);
  second.stand_in_line(group);
  ASSERT_EQ(first.ask(group).verdict, Verdict::concurrency_full);  // refreshes its place
  holder.store->limits()->release(group, held.holder);
  ASSERT_TRUE(turn(holder, [&] { return holder.peek(group).in_use == 0; }));
  EXPECT_EQ(passer.acquire(group).verdict, Verdict::concurrency_full);
  EXPECT_EQ(second.ask(group).verdict, Verdict::concurrency_full);
  ASSERT_TRUE(first.hears());
  EXPECT_TRUE(second.told.empty());
  held = first.ask(group);
  EXPECT_EQ(held.verdict, Verdict::granted);
  // It has one more that waits: behind the second.
  EXPECT_EQ(first.ask(group).verdict, Verdict::concurrency_full);
  EXPECT_EQ(second.ask(group).verdict, Verdict::concurrency_full);
  first.store->limits()->release(group, held.holder);
  ASSERT_TRUE(turn(first, [&] { return first.peek(group).in_use == 0; }));
  EXPECT_EQ(first.ask(group).verdict, Verdict::concurrency_full);
  ASSERT_TRUE(second.hears());
  EXPECT_EQ(second.ask(group).verdict, Verdict::granted);
}

TEST(PostgresWaiter, AsManyAreToldAsSlotsAreFree) {
  Schema schema;
  Process holder(schema);
  const auto group = make_group("jobs", 0, 1, 3);
  const std::vector<Request> held = holder.acquire_many(group, 3);
  Waiter a(schema), b(schema), c(schema);
  a.stand_in_line(group);
  b.stand_in_line(group);
  c.stand_in_line(group);
  a.ask(group);
  b.ask(group);
  holder.store->limits()->release(group, held[0].reply.holder);
  holder.store->limits()->release(group, held[0].reply.holder);
  ASSERT_TRUE(turn(holder, [&] { return holder.peek(group).in_use == 1; }));
  ASSERT_TRUE(a.hears());
  ASSERT_TRUE(b.hears());
  EXPECT_EQ(c.ask(group).verdict, Verdict::concurrency_full);
  EXPECT_TRUE(c.told.empty());
  EXPECT_EQ(b.ask(group).verdict, Verdict::granted) << "two are free, one is ahead";
  EXPECT_EQ(a.ask(group).verdict, Verdict::granted);
}

TEST(PostgresWaiter, WhoGivesUpPassesTheSlotOn) {
  Schema schema;
  Process holder(schema);
  Waiter first(schema), second(schema);
  const auto group = make_group("jobs", 0, 1, 1);
  const store::AcquireReply held = holder.acquire(group);
  first.stand_in_line(group);
  second.stand_in_line(group);
  first.ask(group);
  holder.store->limits()->release(group, held.holder);
  ASSERT_TRUE(turn(holder, [&] { return holder.peek(group).in_use == 0; }));
  ASSERT_TRUE(first.hears());
  second.ask(group);
  first.store->limits()->stop_waiting(group);
  const std::string left = "SELECT count(*) FROM " + waiters(schema);
  Witness witness;
  ASSERT_TRUE(first.until([&] { return witness.value(left) == "1"; }));
  ASSERT_TRUE(second.hears());
  EXPECT_EQ(second.ask(group).verdict, Verdict::granted);
  const store::Stats before = first.store->stats();
  first.store->limits()->stop_waiting(group);  // not remembered: nothing to say
  first.peek(group);
  EXPECT_EQ(first.store->stats().statements - before.statements, 1u);
}

TEST(PostgresWaiter, ADeadWaiterHoldsASlotBackNoLongerThanItsRegistration) {
  Schema schema;
  Process holder(schema), passer(schema);
  const auto group = make_group("jobs", 0, 1, 1);
  const store::AcquireReply held = holder.acquire(group);
  Waiter dead(schema, {}, false);
  ASSERT_TRUE(passer.initialize().ok());
  dead.stand_in_line(group);  // its loop does not run from here on
  Witness witness;
  EXPECT_EQ(witness.value("SELECT expires_at < clock_timestamp() + interval '3 s' FROM " + waiters(schema)),
            "t");
  // It lasts longer while we look, however fast that is.
  const auto shift = [&](const std::string& by) {
    witness.script("UPDATE " + waiters(schema) + " SET expires_at = expires_at + interval '" + by + "'");
  };
  shift("1 hour");
  holder.store->limits()->release(group, held.holder);
  ASSERT_TRUE(turn(holder, [&] { return holder.peek(group).in_use == 0; }));
  EXPECT_EQ(passer.acquire(group).verdict, Verdict::concurrency_full);
  shift("-1 hour");
  EXPECT_TRUE(passer.until([&] { return passer.acquire(group).verdict == Verdict::granted; }));
  EXPECT_EQ(witness.value("SELECT bool_and(expires_at < clock_timestamp()) FROM " + waiters(schema)), "t");
}

TEST(PostgresWaiter, ALostConnectionIsMadeAnewAndEverybodyAsksOnce) {
  Schema schema;
  Process holder(schema);
  const auto a = make_group("a", 0, 1, 1), b = make_group("b", 0, 1, 1);
  holder.acquire(a);
  holder.acquire(b);
  Waiter waiter(schema);
  waiter.stand_in_line(a);
  ASSERT_EQ(waiter.ask(b).verdict, Verdict::concurrency_full);
  Witness witness;
  witness.ask("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%freed%'");
  ASSERT_TRUE(waiter.until([&] { return !waiter.store->limits()->pushes(); }));
  ASSERT_TRUE(waiter.until([&] { return waiter.store->limits()->pushes(); }));
  std::sort(waiter.told.begin(), waiter.told.end());
  EXPECT_EQ(waiter.told, (std::vector<std::string>{"a", "b"}));
}

TEST(PostgresWaiter, SeveralLimitsAtOnceStandInLineToo) {
  Schema schema;
  Process holder(schema);
  Waiter waiter(schema);
  const auto full = make_group("full", 0, 1, 1), rate = make_group("rate", 100, 5);
  const store::AcquireReply held = holder.acquire(full);
  struct All final : store::AcquireAllOp {
    void done() override { answered = true; }
    bool answered = false;
  };
  const auto ask = [&] {
    All op;
    op.queued = true;
    op.parts = {{full, 1}, {rate, 1}};
    waiter.store->limits()->acquire_all(&op);
    EXPECT_TRUE(waiter.until([&] { return op.answered; }));
    return op;
  };
  EXPECT_FALSE(ask().granted);
  EXPECT_EQ(Witness().value("SELECT string_agg(group_id, ',') FROM " + waiters(schema)), "full");
  ASSERT_TRUE(waiter.until([&] { return waiter.store->limits()->pushes(); }));
  EXPECT_FALSE(ask().granted);
  waiter.told.clear();
  holder.store->limits()->release(full, held.holder);
  ASSERT_TRUE(turn(holder, [&] { return holder.peek(full).in_use == 0; }));
  ASSERT_TRUE(waiter.hears());
  EXPECT_TRUE(ask().granted);
}

TEST(PostgresWaiter, AListenUrlThatDoesNotAnswerLeavesPolling) {
  Schema schema;
  Process holder(schema);
  const auto group = make_group("jobs", 0, 1, 1);
  const store::AcquireReply held = holder.acquire(group);
  Waiter waiter(schema,
                [](PostgresOptions& options) { options.listen_url = "postgresql://nobody@127.0.0.1:1/x"; });
  EXPECT_EQ(waiter.ask(group).verdict, Verdict::concurrency_full);
  EXPECT_FALSE(waiter.store->limits()->pushes());
  holder.store->limits()->release(group, held.holder);
  ASSERT_TRUE(turn(holder, [&] { return holder.peek(group).in_use == 0; }));
  EXPECT_EQ(waiter.ask(group).verdict, Verdict::granted);
}

TEST(PostgresWaiter, WithoutTheTableNobodyIsToldAndAllElseWorks) {
  Schema schema;
  ASSERT_TRUE(Process(schema).initialize().ok());
  Witness().script("DROP TABLE " + waiters(schema));
  const auto no_create = [](PostgresOptions& options) { options.auto_create = false; };
  Process holder(schema, no_create);
  Waiter waiter(schema, no_create);
  const auto group = make_group("jobs", 0, 1, 1);
  const store::AcquireReply held = holder.acquire(group);
  EXPECT_EQ(waiter.ask(group).verdict, Verdict::concurrency_full);
  EXPECT_FALSE(waiter.store->limits()->pushes());
  holder.store->limits()->release(group, held.holder);
  ASSERT_TRUE(turn(holder, [&] { return holder.peek(group).in_use == 0; }));
  EXPECT_EQ(waiter.ask(group).verdict, Verdict::granted);
  bool told = false;
  for (const store::Finding& finding : waiter.doctor())
    told = told ||
           (finding.subject == "waiters" && finding.message.find("ratesync migrate") != std::string::npos);
  EXPECT_TRUE(told);
}
