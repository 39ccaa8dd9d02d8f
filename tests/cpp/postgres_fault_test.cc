// Limits over a connection that hangs, dies or comes back: what callers are told, what is counted
// twice or lost, and that it recovers.
#include "proxy_rig.h"

using namespace ratesync;
using namespace ratesync::testing;
using namespace ratesync::postgres;
using store::Verdict;

TEST(PostgresFault, AnAnswerThatIsLostLeavesTheCallerInDoubtAndTheNextOneIsServed) {
  Schema schema;
  Behind p(schema);
  const auto group = make_group("api", 1000);
  ASSERT_EQ(p.acquire(group).verdict, Verdict::granted);
  p.proxy->stall();
  EXPECT_EQ(p.acquire(group).status.code, Code::in_doubt);
  p.heal();
  EXPECT_TRUE(p.until([&] { return p.acquire(group).status.ok(); })) << "and it recovers";
}

TEST(PostgresFault, SlotsOfALostAnswerAreGivenBackByTheNextStatement) {
  Schema schema;
  Behind p(schema);
  const auto group = make_group("jobs", 0, 1, 4);
  ASSERT_EQ(p.acquire(group).verdict, Verdict::granted);
  p.proxy->stall();
  EXPECT_EQ(p.acquire(group).status.code, Code::in_doubt);
  Witness witness;
  const std::string slots =
      "SELECT coalesce(sum(slots), 0) FROM " + schema.table("rate_limiter_state_leases");
  EXPECT_TRUE(p.until([&] { return witness.value(slots) == "2"; }))
      << "granted at the server, unknown to anybody";
  p.heal();
  EXPECT_TRUE(p.until([&] { return witness.value(slots) == "1"; })) << "nobody had to ask for it";
}

TEST(PostgresFault, SlotsReleasedWhileTheServerIsAwayAreFreedWhenItIsBack) {
  Schema schema;
  Behind p(schema);
  const auto group = make_group("jobs", 0, 1, 4);
  const store::AcquireReply held = p.acquire(group);
  p.proxy->stall();
  p.process->store->limits()->release(group, held.holder);
  EXPECT_NE(p.acquire(make_group("other", 0, 1, 4)).status.code, Code::ok);
  p.heal();
  Witness witness;
  const std::string slots =
      "SELECT count(*) FROM " + schema.table("rate_limiter_state_leases") + " WHERE group_id = 'jobs'";
  EXPECT_TRUE(p.until([&] { return witness.value(slots) == "0"; }));
}

TEST(PostgresFault, AHolderThatCannotRenewKnowsItLostItsSlotWhenTheLeaseIsOver) {
  Schema schema;
  Behind p(schema);
  const auto group = make_group("jobs", 0, 1, 4, 3 * kSecond);
  std::vector<store::HolderId> lost;
  p.process->store->limits()->on_lost([&](const std::string&, store::HolderId id) { lost.push_back(id); });
  const Nanos start = p.process->clock.now();
  const store::AcquireReply held = p.acquire(group);
  p.proxy->stall();
  EXPECT_TRUE(p.until([&] { return !lost.empty(); }));
  EXPECT_EQ(lost, std::vector<store::HolderId>{held.holder});
  EXPECT_GE(p.process->clock.now() - start, 3 * kSecond);
  EXPECT_LE(p.process->clock.now() - start, 20 * kSecond) << "not much later than others may take the slot";
  p.heal();
  EXPECT_TRUE(p.until([&] { return p.acquire(group).verdict == Verdict::granted; })) << "and it recovers";
}

TEST(PostgresFault, OneBadRowFailsAloneAndItsNeighboursAreGranted) {
  Schema schema;
  Process p(schema);
  ASSERT_TRUE(p.initialize().ok());
  // A table that refuses one group: what a trigger or a check of the user's may do.
  Witness().script("ALTER TABLE " + schema.table() + " ADD CHECK (group_id <> 'k13')");
  std::vector<Request> requests(30);
  std::size_t answered = 0;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    requests[i].group = make_group("k" + std::to_string(i), 10);
    requests[i].then = [&](Request&) { ++answered; };
  }
  for (Request& request : requests) p.store->limits()->acquire(&request);
  ASSERT_TRUE(p.until([&] { return answered == requests.size(); }));
  for (std::size_t i = 0; i < requests.size(); ++i) {
    EXPECT_EQ(requests[i].granted(), i != 13) << i << requests[i].reply.status.message;
    EXPECT_EQ(requests[i].reply.wait, 0) << "charged once: the refused trip left nothing";
  }
  EXPECT_EQ(requests[13].reply.status.sqlstate, "23514");
}

TEST(PostgresFault, ALockHeldByAnotherSessionDelaysButTheClockIsReadAfterTheWait) {
  Schema schema;
  Process p(schema);
  const auto group = make_group("api", 10, 1);
  p.acquire(group);
  Witness blocker;
  blocker.script("UPDATE " + schema.table() + " SET last_acquisition_at = now() - interval '1 minute'");
  // A session that locks the row until an advisory lock is free.
  Witness witness;
  witness.ask("SELECT pg_advisory_lock(78)");
  std::optional<PipelineResult> blocked;
  const Statement lock{"", "UPDATE " + schema.table() +
                               " SET last_acquisition_at = clock_timestamp() WHERE group_id = 'api' "
                               "RETURNING pg_advisory_xact_lock(78)"};
  asio::io_context io;
  auto connection = Connection::create(io, parse_conninfo(PostgresServer::instance().url()).value(), {});
  bool connected = false;
  connection->connect([&](Status s) { connected = s.ok(); });
  ASSERT_TRUE(run_until(io, [&] { return connected; }));
  std::vector<Call> calls;
  calls.push_back({&lock, {}});
  connection->run(std::move(calls), [&](PipelineResult r) { blocked = std::move(r); });
  ASSERT_TRUE(run_until(io, [&] {
    return witness.value("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted") == "1";
  }));
  Request request;
  request.group = group;
  p.store->limits()->acquire(&request);
  ASSERT_TRUE(p.until([&] {
    return witness.value(
               "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND wait_event <> "
               "'advisory'") == "t";
  }));
  // By then the limiter is idle.
  witness.ask("SELECT pg_sleep(0.3)");
  witness.ask("SELECT pg_advisory_unlock(78)");
  ASSERT_TRUE(p.until([&] {
    io.restart();
    io.poll();
    return request.answered && blocked.has_value();
  }));
  EXPECT_EQ(request.reply.wait, 0) << "0.3 s after the last grant a tenth of a second has passed";
  connection->close();
}

TEST(PostgresFault, ALockedRowDoesNotStallTheOtherGroupsOfItsLane) {
  Schema schema;
  Process p(schema, [](PostgresOptions& options) { options.lanes = 1; });
  limits::Params window;
  window.algorithm = limits::Algorithm::sliding_window;
  window.limit = 100;
  window.window = kSecond;
  for (const std::string kind : {"rate", "slots", "window"}) {
    const auto make = [&](const std::string& id) {
      return kind == "rate"    ? make_group(id, 1000, 100)
             : kind == "slots" ? make_group(id, 0, 1, 100)
                               : std::make_shared<const store::Group>(store::Group{id, window});
    };
    const auto locked = make("locked " + kind), other = make("other " + kind);
    ASSERT_EQ(p.acquire(locked).verdict, Verdict::granted);
    const std::string name = "locker_" + kind;
    Witness witness;
    // A session that keeps the row until it is told to go: an advisory lock says when.
    witness.ask("SELECT pg_advisory_lock(77)");
    const Statement lock{
        "", "SELECT 1 FROM " + schema.table() + " WHERE group_id = 'locked " + kind + "' FOR UPDATE"},
        wait{"", "SELECT pg_advisory_xact_lock(77)"};
    auto locker = Connection::create(p.io, parse_conninfo(url_of({})).value(), {});
    std::optional<Status> up;
    locker->connect([&](Status s) { up = std::move(s); });
    ASSERT_TRUE(p.until([&] { return up.has_value(); }));
    std::optional<PipelineResult> over;
    locker->run({{&lock, {}}, {&wait, {}}}, [&](PipelineResult r) { over = std::move(r); });
    ASSERT_TRUE(p.until([&] {
      return witness.value("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted") ==
             "1";
    }));
    std::vector<Request> stuck(3);
    for (Request& request : stuck) {
      request.group = locked;
      p.store->limits()->acquire(&request);
    }
    // More of the same while the trip hangs, and one that is taken back.
    ASSERT_TRUE(p.until([&] {
      return witness.value(
                 "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND wait_event <> "
                 "'advisory'") == "t";
    }));
    Request later, gone;
    later.group = gone.group = locked;
    p.store->limits()->acquire(&later);
    p.store->limits()->acquire(&gone);
    EXPECT_EQ(p.acquire(other).verdict, Verdict::granted) << kind;
    EXPECT_FALSE(stuck[0].answered || later.answered) << kind;
    EXPECT_TRUE(p.store->limits()->abandon(&gone)) << kind;
    witness.ask("SELECT pg_advisory_unlock(77)");
    ASSERT_TRUE(p.until([&] { return later.answered && stuck[2].answered && over.has_value(); })) << kind;
    EXPECT_TRUE(later.granted() && stuck[0].granted() && stuck[2].granted()) << kind;
    EXPECT_FALSE(gone.answered);
    if (kind == "slots") {
      EXPECT_EQ(p.peek(locked).in_use, 5);
    }
    locker->close();
  }
}
