// Concurrency slots and their leases: who holds what, who lost it, and what several processes see.
#include "limit_rig.h"

using namespace ratesync;
using namespace ratesync::testing;
using store::Verdict;

namespace {

std::string leases(const Schema& schema) { return schema.table("rate_limiter_state_leases"); }

struct Losses {
  explicit Losses(Process& p) {
    p.store->limits()->on_lost([this](const std::string& group, store::HolderId holder) {
      all.push_back({group, holder});
    });
  }
  std::vector<std::pair<std::string, store::HolderId>> all;
};

}  // namespace

TEST(PostgresSlots, ASlotIsFreeAgainForOthersOnceReleased) {
  Schema schema;
  Process a(schema), b(schema);
  const auto group = make_group("jobs", 0, 1, 1);
  const store::AcquireReply held = a.acquire(group);
  ASSERT_EQ(held.verdict, Verdict::granted);
  EXPECT_EQ(b.acquire(group).verdict, Verdict::concurrency_full);
  EXPECT_EQ(b.peek(group).in_use, 1);
  a.store->limits()->release(group, held.holder);
  EXPECT_EQ(a.peek(group).in_use, 0) << "the release travels before";
  EXPECT_EQ(b.acquire(group).verdict, Verdict::granted);
  EXPECT_EQ(Witness().value("SELECT current_concurrent FROM " + schema.table()), "1");
}

TEST(PostgresSlots, RateAndSlotsAreDecidedTogetherAndAFullLimiterChargesNoRate) {
  Schema schema;
  Process p(schema);
  const auto group = make_group("jobs", 0.01, 3, 2);
  const std::vector<Request> requests = p.acquire_many(group, 4, 0);
  EXPECT_TRUE(requests[0].granted() && requests[1].granted());
  EXPECT_EQ(requests[2].reply.verdict, Verdict::concurrency_full);
  EXPECT_EQ(requests[3].reply.verdict, Verdict::concurrency_full);
  p.store->limits()->release(group, requests[0].reply.holder);
  EXPECT_EQ(p.acquire(group, 0).verdict, Verdict::granted) << "the third unit of the burst is still there";
  p.store->limits()->release(group, requests[0].reply.holder);
  EXPECT_EQ(p.acquire(group, 0).verdict, Verdict::rate_limited);
}

// Closed at every step of the first release's way to the server and back.
TEST(PostgresSlots, ClosingGivesBackWhatWasReleasedWhileAStatementTravelled) {
  Schema schema;
  const auto group = make_group("jobs", 0, 1, 4);
  for (int steps = 0; steps < 12; ++steps) {
    Process p(schema);
    const std::vector<Request> held = p.acquire_many(group, 3);
    store::LimitStore& limits = *p.store->limits();
    limits.release(group, held[0].reply.holder);
    for (int i = 0; i < steps; ++i) p.io.poll_one();
    limits.release(group, held[1].reply.holder);
    limits.release(group, held[2].reply.holder);
    bool closed = false;
    p.store->close([&] { closed = true; });
    ASSERT_TRUE(p.until([&] { return closed; }));
    p.store = nullptr;
    EXPECT_EQ(Witness().value("SELECT count(*) FROM " + leases(schema)), "0") << "after " << steps;
    EXPECT_EQ(Witness().value("SELECT current_concurrent FROM " + schema.table()), "0") << "after " << steps;
  }
}

TEST(PostgresSlots, IdleGroupsLeaveNoLeaseRows) {
  Schema schema;
  Process p(schema);
  for (int i = 0; i < 20; ++i) {
    const auto group = make_group("k" + std::to_string(i), 0, 1, 1);
    p.store->limits()->release(group, p.acquire(group).holder);
    EXPECT_EQ(p.peek(group).in_use, 0);
  }
  EXPECT_EQ(Witness().value("SELECT count(*) FROM " + leases(schema)), "0");
}

TEST(PostgresSlots, AHolderThatDiesLosesItsSlotsAfterItsLease) {
  Schema schema;
  const auto group = make_group("jobs", 0, 1, 1, 6 * kSecond);
  Process dead(schema), alive(schema);
  ASSERT_TRUE(alive.initialize().ok());
  ASSERT_EQ(dead.acquire(group).verdict, Verdict::granted);  // its loop does not run from here on
  EXPECT_EQ(alive.acquire(group).verdict, Verdict::concurrency_full);
  store::AcquireReply reply;
  EXPECT_TRUE(alive.until([&] {
    reply = alive.acquire(group);
    return reply.verdict == Verdict::granted;
  }));
  // The dead one comes back to life and learns it.
  Losses losses(dead);
  EXPECT_TRUE(dead.until([&] { return !losses.all.empty(); }));
  EXPECT_EQ(dead.acquire(group).verdict, Verdict::concurrency_full);
  alive.store->limits()->release(group, reply.holder);
  EXPECT_EQ(alive.peek(group).in_use, 0);
}

TEST(PostgresSlots, ALivingHolderKeepsItsSlotLongerThanItsLease) {
  Schema schema;
  // Renewed after a third of it, so that a machine may stand still for the rest.
  const auto group = make_group("jobs", 0, 1, 1, 6 * kSecond);
  Process holder(schema);
  Losses losses(holder);
  ASSERT_EQ(holder.acquire(group).verdict, Verdict::granted);
  Witness witness;
  const std::string expires = "SELECT expires_at FROM " + leases(schema);
  const std::string first = witness.value(expires);
  // Renewed again and again: more than a lease has passed.
  const std::string passed =
      "SELECT (expires_at > '" + first + "'::timestamptz + interval '7 s')::text FROM " + leases(schema);
  EXPECT_TRUE(holder.until([&] { return witness.value(passed) == "true"; }));
  EXPECT_TRUE(losses.all.empty());
  Process other(schema);
  EXPECT_EQ(other.acquire(group).verdict, Verdict::concurrency_full);
}

TEST(PostgresSlots, ALostLeaseIsReportedByTheNextAcquireAndANewHolderBegins) {
  Schema schema;
  Process p(schema);
  Losses losses(p);
  const auto group = make_group("jobs", 0, 1, 3);
  const store::AcquireReply before = p.acquire(group);
  Witness().script("DELETE FROM " + leases(schema));
  const store::AcquireReply after = p.acquire(group);
  ASSERT_EQ(losses.all.size(), 1u);
  EXPECT_EQ(losses.all[0].second, before.holder);
  EXPECT_EQ(after.verdict, Verdict::granted);
  EXPECT_NE(after.holder, before.holder);
  EXPECT_EQ(Witness().value("SELECT sum(slots) FROM " + leases(schema)), "1");
  p.store->limits()->release(group, before.holder);  // too late: not ours any more
  EXPECT_EQ(p.peek(group).in_use, 1);
  EXPECT_EQ(p.store->stats().leases_lost, 1u);
}

TEST(PostgresSlots, ALostLeaseIsReportedByTheRenewal) {
  Schema schema;
  Process p(schema);
  Losses losses(p);
  const auto group = make_group("jobs", 0, 1, 3, kSecond / 5);
  p.acquire(group);
  Witness().script("DELETE FROM " + leases(schema));
  EXPECT_TRUE(p.until([&] { return losses.all.size() == 1; }));
}

TEST(PostgresSlots, AStateRowThatCleanUpDeletedDoesNotFreeSlots) {
  Schema schema;
  Process a(schema), b(schema);
  const auto group = make_group("jobs", 0, 1, 2);
  a.acquire(group);
  Witness().script("DELETE FROM " + schema.table());
  const std::vector<Request> requests = b.acquire_many(group, 2);
  EXPECT_TRUE(requests[0].granted());
  EXPECT_EQ(requests[1].reply.verdict, Verdict::concurrency_full);
}

TEST(PostgresSlots, ALoweredLimitWaitsForTheSlotsAboveIt) {
  Schema schema;
  Process p(schema);
  const auto wide = make_group("jobs", 0, 1, 3), narrow = make_group("jobs", 0, 1, 1);
  const std::vector<Request> held = p.acquire_many(wide, 3);
  EXPECT_EQ(p.acquire(narrow).verdict, Verdict::concurrency_full);
  p.store->limits()->release(wide, held[0].reply.holder);
  p.store->limits()->release(wide, held[0].reply.holder);
  EXPECT_EQ(p.acquire(narrow).verdict, Verdict::concurrency_full);
  p.store->limits()->release(wide, held[0].reply.holder);
  EXPECT_EQ(p.acquire(narrow).verdict, Verdict::granted);
}

TEST(PostgresSlots, TheListShowsGroupsAndWhoHoldsThem) {
  Schema schema;
  Process p(schema);
  p.acquire(make_group("a", 10));
  p.acquire_many(make_group("b", 0, 1, 5), 2);
  std::optional<Result<store::Listing>> out;
  p.store->limits()->list(10, [&](Result<store::Listing> r) { out = std::move(r); });
  ASSERT_TRUE(p.until([&] { return out.has_value(); }));
  ASSERT_TRUE(out->ok()) << out->status().message;
  const store::Listing& list = out->value();
  ASSERT_EQ(list.groups.size(), 2u);
  EXPECT_EQ(list.groups[1].in_use, 2);
  ASSERT_EQ(list.holders.size(), 1u);
  EXPECT_EQ(list.holders[0].slots, 2);
  EXPECT_NE(list.holders[0].holder.find(std::to_string(getpid())), std::string::npos);
  EXPECT_FALSE(list.truncated);
}
