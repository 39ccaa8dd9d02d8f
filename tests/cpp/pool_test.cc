// Promises of the pool, told through the actions it asks for; time is a number that the tests move.
// The last test leaves the order of events to chance and the checks to pool_model.h.
#include "ratesync/pool/pool.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <string>
#include <vector>

#include "pool_model.h"
#include "pool_rig.h"

namespace ratesync::pool {
namespace {

// --- connections_to_open

TEST(ConnectionsToOpen, NothingBeforeTheFirstUse) {
  EXPECT_EQ(connections_to_open({.min_size = 2, .max_size = 10}), 0u);
  EXPECT_EQ(connections_to_open({.min_size = 2, .max_size = 10, .started = true}), 2u);
}

TEST(ConnectionsToOpen, OnlyWaitersThatNothingElseWillServeCount) {
  Sizing s{.min_size = 0, .max_size = 10, .started = true};
  s.waiting = 3;
  EXPECT_EQ(connections_to_open(s), 3u);
  s.pending = 2;
  EXPECT_EQ(connections_to_open(s), 1u);
  s.idle = 1;
  EXPECT_EQ(connections_to_open(s), 0u);
}

TEST(ConnectionsToOpen, NeverMoreThanMaxSizeWithThoseBeingClosed) {
  Sizing s{.min_size = 0, .max_size = 5, .busy = 2, .closing = 1, .waiting = 9, .started = true};
  EXPECT_EQ(connections_to_open(s), 2u);
  s.pending = 2;
  EXPECT_EQ(connections_to_open(s), 0u);
  s.closing = 7;
  EXPECT_EQ(connections_to_open(s), 0u);
}

TEST(ConnectionsToOpen, OneAttemptAtATimeWhileConnectingFails) {
  Sizing s{.min_size = 2, .max_size = 10, .waiting = 5, .started = true, .health = Health::probing};
  EXPECT_EQ(connections_to_open(s), 1u);
  s.pending = 1;
  EXPECT_EQ(connections_to_open(s), 0u);
}

TEST(ConnectionsToOpen, AfterARefusalOnlyWhileSomebodyWaits) {
  Sizing s{.min_size = 2, .max_size = 10, .started = true, .health = Health::refused};
  EXPECT_EQ(connections_to_open(s), 0u);
  s.waiting = 1;
  EXPECT_EQ(connections_to_open(s), 1u);
}

TEST(ConnectionsToOpen, WhileDownAlsoWhenNobodyWaits) {
  EXPECT_EQ(connections_to_open({.max_size = 1, .started = true, .health = Health::down}), 1u);
}

// --- the pool, step by step

Status refused_connection() { return Status::make(Code::unavailable, "db.example:5432: connection refused"); }
Status wrong_password() { return Status::make(Code::server, "password authentication failed", "28P01"); }

// A pool with `n` open connections, all lent to waiters 1..n.
Rig lent(std::size_t n, PoolOptions options) {
  Rig rig(options);
  for (WaiterId w = 1; w <= n; ++w) rig.get(w);
  for (NodeId node = 1; node <= n; ++node) rig.open(node);
  EXPECT_EQ(rig.pool.gauges().in_use, n);
  return rig;
}

TEST(Pool, OpensNothingBeforeTheFirstGetThenKeepsMinSize) {
  Rig rig({.min_size = 3});
  EXPECT_TRUE(rig.tick(10 * kSecond).out.empty());
  EXPECT_EQ(rig.get(1).nodes(Kind::connect).size(), 3u);
}

TEST(Pool, AWaiterIsGrantedTheFirstConnectionThatIsSetUp) {
  Rig rig({.min_size = 2});
  rig.get(7);
  rig.out.clear();
  rig.pool.connected(2, rig.now, rig.out);
  EXPECT_EQ(rig.nodes(Kind::setup), Ids{2});
  EXPECT_TRUE(rig.grants().empty()) << "not before its set-up";
  rig.out.clear();
  rig.pool.setup_done(2, rig.now, rig.out);
  EXPECT_EQ(rig.grants().at(7), 2u);
}

TEST(Pool, WaitersAreServedFirstComeFirstServed) {
  Rig rig = lent(1, {.min_size = 0, .max_size = 1});
  for (WaiterId w = 10; w < 15; ++w) rig.get(w);
  for (WaiterId w = 10; w < 15; ++w) {
    EXPECT_EQ(rig.put(1).grants(), (std::map<WaiterId, NodeId>{{w, 1}}));
  }
}

TEST(Pool, AWaiterThatGivesUpIsNeverGranted) {
  Rig rig = lent(1, {.min_size = 0, .max_size = 1});
  rig.get(10).get(11);
  EXPECT_TRUE(rig.pool.cancel(10));
  EXPECT_FALSE(rig.pool.cancel(10));
  EXPECT_EQ(rig.put(1).grants(), (std::map<WaiterId, NodeId>{{11, 1}}));
  EXPECT_FALSE(rig.pool.cancel(11)) << "granted already: the caller has to put it back";
  EXPECT_EQ(rig.pool.gauges().waiting, 0u);
}

TEST(Pool, GrowsToMaxSizeAndNoFurther) {
  Rig rig({.min_size = 0, .max_size = 3});
  std::size_t connects = 0;
  for (WaiterId w = 1; w <= 10; ++w) connects += rig.get(w).nodes(Kind::connect).size();
  EXPECT_EQ(connects, 3u);
  EXPECT_EQ(rig.pool.gauges().pending, 3u);
}

TEST(Pool, AConnectionBeingClosedStillCounts) {
  Rig rig = lent(1, {.min_size = 0, .max_size = 1});
  rig.now += 10 * kSecond;
  rig.get(2);
  EXPECT_EQ(rig.put(1, false).nodes(Kind::close), Ids{1});
  EXPECT_TRUE(rig.nodes(Kind::connect).empty());
  EXPECT_EQ(rig.gone(1).nodes(Kind::connect), Ids{2});
}

TEST(Pool, TheQueueBoundAnswersAtOnceWithNumbers) {
  Rig rig = lent(1, {.min_size = 0, .max_size = 1, .max_waiting = 2});
  rig.get(10).get(11);
  const Status status = rig.get(12).fails().at(12);
  EXPECT_EQ(status.code, Code::exhausted);
  EXPECT_NE(status.message.find("at most 2"), std::string::npos) << status.message;
  EXPECT_NE(status.message.find("1 of 1 connections in use"), std::string::npos) << status.message;
}

TEST(Pool, AWaiterPastItsTimeoutLearnsThatAllConnectionsAreInUse) {
  Rig rig = lent(2, {.min_size = 0, .max_size = 2, .acquire_timeout = 5 * kSecond});
  rig.tick(60 * kSecond);
  EXPECT_EQ(rig.get(10).timer(), rig.now + 5 * kSecond);
  EXPECT_TRUE(rig.tick(5 * kSecond - 1).fails().empty());
  const Status status = rig.tick(1).fails().at(10);
  EXPECT_EQ(status.code, Code::exhausted);
  EXPECT_NE(status.message.find("within 5 s"), std::string::npos) << status.message;
  EXPECT_NE(status.message.find("2 of 2 connections in use"), std::string::npos) << status.message;
  EXPECT_NE(status.message.find("1 callers waiting"), std::string::npos) << status.message;
  EXPECT_NE(status.message.find("raise pool_max_size"), std::string::npos) << status.message;
  EXPECT_TRUE(rig.put(1).grants().empty());
}

TEST(Pool, AWaiterPastItsTimeoutLearnsThatConnectingHangs) {
  Rig rig({.min_size = 1});
  rig.get(1);
  EXPECT_EQ(rig.tick(5 * kSecond).fails().at(1).code, Code::timeout);
}

TEST(Pool, AWaiterPastItsTimeoutLearnsTheLastConnectError) {
  Rig rig({.min_size = 1, .fail_after = 9});
  rig.get(1).fail(1, refused_connection()).gone(1);
  const Status status = rig.tick(5 * kSecond).fails().at(1);
  EXPECT_EQ(status.code, Code::unavailable);
  EXPECT_NE(status.message.find("connection refused"), std::string::npos) << status.message;
}

TEST(Pool, RepeatedConnectErrorsFailTheWaitersAndThenEveryGetAtOnce) {
  Rig rig({.min_size = 1});
  rig.get(1).get(2);
  rig.pool.cancel(2);
  EXPECT_TRUE(rig.fail(1, refused_connection()).fails().empty()) << "once is no pattern";
  rig.gone(1);
  EXPECT_TRUE(rig.fail(2, refused_connection()).fails().empty()) << "nor is the same moment twice";
  EXPECT_FALSE(rig.pool.down());
  rig.gone(2);
  const NodeId next = rig.tick(PoolOptions{}.connect_backoff_max).nodes(Kind::connect).at(0);
  rig.fail(next, refused_connection());
  ASSERT_TRUE(rig.pool.down());
  EXPECT_EQ(rig.fails().at(1).code, Code::unavailable);
  EXPECT_NE(rig.fails().at(1).message.find("connection refused"), std::string::npos);
  EXPECT_EQ(rig.get(3).fails().at(3).code, Code::unavailable);
}

TEST(Pool, WhileDownOneProbeAtATimeRunsInTheBackgroundAndThePoolRecovers) {
  Rig rig({.min_size = 0, .max_size = 5, .fail_after = 1});
  NodeId node = rig.get(1).nodes(Kind::connect).at(0);
  for (int i = 0; i < 8; ++i) {
    rig.fail(node, refused_connection());
    ASSERT_TRUE(rig.pool.down());
    const Nanos at = rig.timer();
    ASSERT_GE(at, rig.now + 50 * kMilli);
    ASSERT_LE(at, rig.now + kSecond);
    ASSERT_TRUE(rig.gone(node).nodes(Kind::connect).empty());
    ASSERT_TRUE(rig.get(100).nodes(Kind::connect).empty()) << "no attempt before the pause is over";
    rig.now = at;
    const Ids probes = rig.tick().nodes(Kind::connect);
    ASSERT_EQ(probes.size(), 1u);
    node = probes[0];
    EXPECT_EQ(rig.get(101).fails().size(), 1u);
  }
  rig.open(node);
  EXPECT_FALSE(rig.pool.down());
  EXPECT_EQ(rig.get(9).grants().at(9), node);
}

TEST(Pool, BackOffGrowsFromTheFloorToTheCeilingWithJitter) {
  for (const double luck : {0.0, 0.999999}) {
    Rig rig({.min_size = 0, .fail_after = 1}, luck);
    NodeId node = rig.get(1).nodes(Kind::connect).at(0);
    std::vector<Nanos> pauses;
    for (int i = 0; i < 6; ++i) {
      const Nanos pause = rig.fail(node, refused_connection()).timer() - rig.now;
      pauses.push_back((pause + kMilli / 2) / kMilli);
      rig.gone(node);
      node = rig.tick(pause).nodes(Kind::connect).at(0);
    }
    const std::vector<Nanos> expected = luck == 0.0 ? std::vector<Nanos>{50, 50, 50, 50, 50, 50}
                                                    : std::vector<Nanos>{100, 200, 400, 800, 1000, 1000};
    EXPECT_EQ(pauses, expected);
  }
}

TEST(Pool, AWorkingConnectionKeepsWaitersHopefulWhileConnectsFail) {
  Rig rig = lent(1, {.min_size = 0, .max_size = 3});
  const NodeId extra = rig.get(2).nodes(Kind::connect).at(0);
  rig.fail(extra, refused_connection()).gone(extra);
  const NodeId probe = rig.tick(kSecond).nodes(Kind::connect).at(0);
  rig.fail(probe, refused_connection());
  EXPECT_FALSE(rig.pool.down());
  EXPECT_TRUE(rig.fails().empty());
  EXPECT_EQ(rig.put(1).grants().at(2), 1u);
}

TEST(Pool, TheLastConnectionLostWhileConnectsFailFailsTheWaiters) {
  Rig rig = lent(1, {.min_size = 0, .max_size = 2, .fail_after = 1});
  const NodeId extra = rig.get(2).nodes(Kind::connect).at(0);
  rig.fail(extra, refused_connection());
  EXPECT_TRUE(rig.fails().empty());
  EXPECT_EQ(rig.broken(1).fails().at(2).code, Code::unavailable) << "it will not come back sound";
}

TEST(Pool, AServerShortOfSlotsLeavesASmallerPoolThatWorks) {
  Rig rig = lent(1, {.min_size = 0, .max_size = 2});
  const NodeId extra = rig.get(2).nodes(Kind::connect).at(0);
  rig.fail(extra, Status::make(Code::server, "too many clients already", "53300"));
  EXPECT_TRUE(rig.fails().empty());
  EXPECT_EQ(rig.put(1).grants().at(2), 1u);
}

TEST(Pool, AReturnedConnectionProvesThatTheServerIsThere) {
  Rig rig = lent(1, {.min_size = 0, .max_size = 2, .fail_after = 1});
  const NodeId extra = rig.get(2).nodes(Kind::connect).at(0);
  rig.fail(extra, refused_connection()).gone(extra);
  rig.put(1).put(1);  // serves waiter 2, who gives it back
  rig.tick(10 * kSecond);
  rig.broken(1).gone(1);
  EXPECT_FALSE(rig.pool.down()) << "that failed connect is old news";
  EXPECT_TRUE(rig.get(3).fails().empty());
}

TEST(Pool, AttemptsThatFailSideBySideLengthenThePauseOnce) {
  Rig rig({.min_size = 3, .fail_after = 9}, 0.999999);
  rig.get(1);
  for (NodeId node = 1; node <= 3; ++node) rig.fail(node, refused_connection()).gone(node);
  EXPECT_TRUE(rig.tick(99 * kMilli).nodes(Kind::connect).empty());
  EXPECT_EQ(rig.tick(kMilli).nodes(Kind::connect).size(), 1u);
}

TEST(Pool, ARefusalOfTheServerFailsTheWaitersWithItsOwnWords) {
  Rig rig({.min_size = 1});
  rig.get(1).get(2);
  rig.fail(1, wrong_password());
  EXPECT_TRUE(rig.fails().empty()) << "the second attempt may do better";
  const auto fails = rig.fail(2, wrong_password()).fails();
  EXPECT_EQ(fails.size(), 2u);
  EXPECT_EQ(fails.at(1).code, Code::server);
  EXPECT_EQ(fails.at(2).sqlstate, "28P01");
  EXPECT_FALSE(rig.pool.down()) << "the server is there";
}

TEST(Pool, AfterARefusalTheNextGetTriesAgainAndNobodyElse) {
  Rig rig({.min_size = 1});
  rig.get(1).fail(1, wrong_password());
  rig.gone(1);
  EXPECT_EQ(rig.get(2).fails().at(2).code, Code::server) << "asked a moment ago";
  EXPECT_TRUE(rig.tick(60 * kSecond).out.empty()) << "a wrong password is not tried in a loop";
  const Ids probe = rig.get(3).nodes(Kind::connect);
  ASSERT_EQ(probe.size(), 1u);
  EXPECT_TRUE(rig.fails().empty());
  EXPECT_EQ(rig.open(probe[0]).grants().at(3), probe[0]) << "the operator has mended it";
}

TEST(Pool, ASetupThatFailsClosesTheConnection) {
  Rig rig({.min_size = 1});
  rig.get(1);
  rig.pool.connected(1, rig.now, rig.out);
  rig.fail(1, Status::make(Code::server, "permission denied for table", "42501"));
  EXPECT_EQ(rig.nodes(Kind::close), Ids{1});
  EXPECT_EQ(rig.fails().at(1).sqlstate, "42501");
}

TEST(Pool, ABrokenIdleConnectionIsReplacedAndCounted) {
  Rig rig({.min_size = 1});
  rig.get(1).open(1).put(1);
  rig.now += 60 * kSecond;
  EXPECT_EQ(rig.broken(1).nodes(Kind::close), Ids{1});
  EXPECT_EQ(rig.nodes(Kind::connect), Ids{2});
  EXPECT_EQ(rig.pool.gauges().reconnects, 0u);
  rig.gone(1).open(2);
  EXPECT_EQ(rig.pool.gauges().reconnects, 1u);
  EXPECT_EQ(rig.get(2).grants().at(2), 2u) << "the dead one is never lent";
}

TEST(Pool, AConnectionThatBreaksWhileLentIsCountedOnceAndNotLentAgain) {
  Rig rig = lent(1, {.min_size = 0, .max_size = 1});
  rig.now += 60 * kSecond;
  rig.get(2).broken(1);
  EXPECT_TRUE(rig.nodes(Kind::close).empty()) << "the borrower still holds it";
  EXPECT_EQ(rig.put(1, true).nodes(Kind::close), Ids{1});
  rig.gone(1);
  EXPECT_EQ(rig.open(2).grants().at(2), 2u);
  EXPECT_EQ(rig.pool.gauges().reconnects, 1u);
}

TEST(Pool, ConnectionsThatBreakRightAfterConnectingAreNotReplacedInALoop) {
  Rig rig({.min_size = 1}, 0.999999);
  NodeId node = rig.get(1).nodes(Kind::connect).at(0);
  rig.pool.cancel(1);
  for (const Nanos pause : {100, 200, 400, 800, 1000, 1000}) {
    rig.open(node).broken(node);
    EXPECT_TRUE(rig.nodes(Kind::connect).empty());
    EXPECT_TRUE(rig.gone(node).nodes(Kind::connect).empty());
    const Ids next = rig.tick(pause * kMilli).nodes(Kind::connect);
    ASSERT_EQ(next.size(), 1u) << pause;
    node = next[0];
  }
  rig.open(node).get(2).put(node).broken(node);
  rig.gone(node);
  EXPECT_EQ(rig.tick(100 * kMilli).nodes(Kind::connect).size(), 1u) << "one that worked ends the series";
}

TEST(Pool, TheLatestReturnedConnectionIsLentFirstSoThatTheOthersAge) {
  Rig rig = lent(3, {.min_size = 1, .max_size = 3, .max_idle = 600 * kSecond});
  for (NodeId node = 1; node <= 3; ++node) rig.put(node);
  for (int i = 0; i < 10; ++i) {
    rig.now += 60 * kSecond;
    EXPECT_EQ(rig.get(10).grants().at(10), 3u);
    rig.put(3);
  }
  EXPECT_EQ(rig.tick().nodes(Kind::close), (Ids{1, 2}));
  rig.gone(1).gone(2);
  EXPECT_TRUE(rig.tick(1'200 * kSecond).nodes(Kind::close).empty()) << "min_size stays";
}

TEST(Pool, ShedsOnlyWhatIsBeyondMinSize) {
  Rig rig = lent(3, {.min_size = 2, .max_size = 3, .max_idle = 600 * kSecond});
  rig.put(3).put(1).put(2);
  EXPECT_EQ(rig.tick(600 * kSecond).nodes(Kind::close), Ids{3}) << "the one idle longest";
}

TEST(Pool, LifetimesAreSpreadByTenPercentEitherWay) {
  for (const double luck : {0.0, 0.5, 1.0}) {
    Rig rig({.min_size = 1, .max_lifetime = 1'000 * kSecond, .max_idle = kForever}, luck);
    rig.get(1).open(1).put(1);
    const Nanos life = static_cast<Nanos>((900 + 200 * luck) * kSecond);
    const Nanos end = rig.now + life;
    EXPECT_EQ(rig.tick(60 * kSecond).timer(), end);
    EXPECT_TRUE(rig.tick(life - 60 * kSecond - 1).nodes(Kind::close).empty());
    EXPECT_EQ(rig.tick(1).nodes(Kind::close), Ids{1});
    EXPECT_EQ(rig.nodes(Kind::connect), Ids{2}) << "replaced, though not counted as a reconnect";
    rig.gone(1).open(2);
    EXPECT_EQ(rig.pool.gauges().reconnects, 0u);
  }
}

TEST(Pool, AConnectionThatOutlivedItsTimeWhileLentIsClosedOnReturn) {
  Rig rig = lent(1, {.min_size = 0, .max_size = 1, .max_lifetime = 100 * kSecond});
  rig.now += 200 * kSecond;
  EXPECT_EQ(rig.put(1).nodes(Kind::close), Ids{1});
}

TEST(Pool, CloseFailsWaitersClosesIdleOnesAtOnceAndLentOnesOnReturn) {
  Rig rig = lent(2, {.min_size = 0, .max_size = 3});
  rig.put(1).get(3).get(4);  // 1 and 2 lent, 3 connecting for waiter 4
  rig.get(5);
  rig.put(1);  // serves 4; nothing idle
  EXPECT_EQ(rig.close().fails().at(5).code, Code::closed);
  EXPECT_EQ(rig.nodes(Kind::close), Ids{3});
  EXPECT_FALSE(rig.gone(3).said_closed());
  EXPECT_EQ(rig.put(1).nodes(Kind::close), Ids{1});
  EXPECT_EQ(rig.put(2, false).nodes(Kind::close), Ids{2});
  EXPECT_FALSE(rig.gone(2).said_closed());
  EXPECT_TRUE(rig.gone(1).said_closed());
  EXPECT_FALSE(rig.close().said_closed()) << "once";
  EXPECT_EQ(rig.get(6).fails().at(6).code, Code::closed);
  EXPECT_EQ(rig.pool.misuses(), 0u);
}

TEST(Pool, CloseOfAnUnusedPoolIsDoneAtOnce) {
  Rig rig;
  EXPECT_TRUE(rig.close().said_closed());
}

TEST(Pool, MisuseChangesNothingAndIsCounted) {
  Rig rig = lent(1, {.min_size = 0, .max_size = 1});
  rig.put(1);
  EXPECT_TRUE(rig.put(1).out.empty()) << "given back twice";
  EXPECT_TRUE(rig.gone(1).out.empty()) << "was not told to close";
  EXPECT_TRUE(rig.put(99).out.empty());
  EXPECT_EQ(rig.pool.misuses(), 3u);
  EXPECT_EQ(rig.pool.gauges().open, 1u);
  rig.get(2).get(3).get(3);
  EXPECT_EQ(rig.pool.misuses(), 4u) << "one waiter id twice";
  EXPECT_EQ(rig.pool.gauges().waiting, 1u);
}

TEST(Pool, LateReportsOfAConnectionThatIsGoneAreIgnored) {
  Rig rig({.min_size = 1});
  rig.get(1).fail(1, refused_connection());
  rig.out.clear();
  rig.pool.connected(1, rig.now, rig.out);
  rig.pool.broken(1, rig.now, rig.out);
  rig.gone(1);
  rig.pool.setup_done(1, rig.now, rig.out);
  rig.pool.connect_failed(1, refused_connection(), rig.now, rig.out);
  EXPECT_FALSE(rig.pool.down()) << "one failure, reported twice, is one";
  EXPECT_EQ(rig.pool.misuses(), 0u);
}

TEST(Pool, ASaturatedPoolDoesNotTouchTheTimerPerCall) {
  Rig rig = lent(1, {.min_size = 0, .max_size = 1});
  rig.get(2);
  for (WaiterId w = 3; w < 100; ++w) {
    rig.now += kMilli;
    EXPECT_EQ(rig.get(w).timer(), kForever);
    EXPECT_EQ(rig.put(1).timer(), kForever);
  }
}

// --- chance

TEST(Pool, KeepsItsBooksUnderEveryInterleaving) {
  const unsigned first = std::random_device{}();
  std::size_t grants = 0;
  for (unsigned round = 0; round < 60 && !HasFailure(); ++round) {
    const unsigned seed = first + round;
    SCOPED_TRACE("Model model(" + std::to_string(seed) + "u)");
    Model model(seed);
    for (int i = 0; i < 1'000 && !HasFailure(); ++i) model.random_event();
    if (!HasFailure()) model.recover();
    if (!HasFailure()) model.close();
    grants += model.grants();
  }
  RecordProperty("first_seed", std::to_string(first));
  EXPECT_GT(grants, 1'000u) << "the test no longer exercises the pool";
}

}  // namespace
}  // namespace ratesync::pool
