// State and locks in a real Redis whose answers are lost: each operation is executed once and its result
// known, or said to be in doubt.
#include <set>

#include "redis_state_rig.h"
#include "tcp_proxy.h"

namespace ratesync::testing {
namespace {

class DoubtTest : public RedisStateTest {
 protected:
  DoubtTest() { prefix_ = "d_"; }

  std::string url() const { return "redis://127.0.0.1:" + std::to_string(proxy_.port()); }
  store::StateStore& far(Nanos socket_timeout = 20 * kSecond) {
    if (!far_) {
      RedisOptions with;
      with.socket_timeout = socket_timeout;
      store_ = &open(url(), with);
      far_ = &state(*store_);
    }
    return *far_;
  }
  // Both lanes have a receipt from here on.
  void settle() {
    for (int i = 0; i < 16; ++i) run(far(), make(StateVerb::get, "settle" + std::to_string(i)));
  }
  // Not waited for.
  WaitedOp& start(WaitedOp& op) {
    far().submit(&op);
    return op;
  }
  WaitedOp& start(StateVerb verb, std::string key, std::int64_t expected = 0) {
    WaitedOp& op = make(verb, std::move(key));
    op.value = text_value("far");
    op.delta = 1;
    op.expected = expected;
    return start(op);
  }
  void wait_for_answers() {
    // Both lanes: what is to be sent is on its way in a moment, and is read before what comes later.
    ASSERT_TRUE(wait_until([&] { return proxy_.held_back() > 0; }));
    let_pass(100);
    auto later = connection(options(server_.port()));
    for (int i = 0; i < 3; ++i) EXPECT_EQ(text(send(*later, {"PING"})), "PONG");
    later->close(Status::make(Code::closed, "end"));
    let_pass(100);
  }
  void hang_up() {
    proxy_.flow();
    proxy_.cut();
  }
  const StateReply& end(WaitedOp& op) {
    EXPECT_TRUE(wait_until([&] { return op.ended > 0; }));
    EXPECT_EQ(op.ended, 1);
    return op.reply;
  }
  const StateReply& good(WaitedOp& op) {
    EXPECT_TRUE(end(op).status.ok()) << op.reply.status.message;
    return op.reply;
  }
  // Looks without the proxy.
  const StateReply& near(WaitedOp& op) {
    if (!near_) near_ = &state(open(server_.url()));
    return run(*near_, op);
  }
  std::int64_t let_pass_port() const { return server_.port(); }
  void let_pass(int ms) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(ms);
    EXPECT_TRUE(wait_until([&] { return std::chrono::steady_clock::now() > until; }));
  }

  RedisServer server_;
  TcpProxy proxy_{io_, static_cast<std::uint16_t>(server_.port())};
  store::Store* store_ = nullptr;
  store::StateStore* far_ = nullptr;
  store::StateStore* near_ = nullptr;
};

TEST_F(DoubtTest, AnAnswerThatWasLostIsReadAgain) {
  settle();
  for (const char* key : {"swapped", "removed", "counted"}) {
    WaitedOp& op = make(StateVerb::set, key);
    op.value = number_value(10);
    run(far(), op);
  }
  proxy_.stall();
  WaitedOp& created = start(StateVerb::create, "created");
  WaitedOp& again = start(StateVerb::create, "created");
  WaitedOp& swapped = start(StateVerb::swap, "swapped", 1);
  WaitedOp& stale = start(StateVerb::swap, "swapped", 1);
  WaitedOp& removed = start(StateVerb::remove, "removed", store::kAnyVersion);
  WaitedOp& counted = start(StateVerb::add, "counted");
  WaitedOp& touched = start(StateVerb::touch, "counted", 2);
  WaitedOp& found = start(StateVerb::get, "counted");
  wait_for_answers();
  // Others write over it meanwhile, which changes nothing of what was answered.
  WaitedOp& over = make(StateVerb::set, "created");
  over.value = text_value("over");
  EXPECT_EQ(near(over).version, 2);
  WaitedOp& plus = make(StateVerb::add, "counted");
  plus.delta = 100;
  EXPECT_EQ(near(plus).value, number_value(111));
  hang_up();
  EXPECT_EQ(good(created).outcome, Outcome::done);
  EXPECT_EQ(good(created).version, 1);
  EXPECT_EQ(good(again).outcome, Outcome::exists);
  EXPECT_EQ(good(swapped).outcome, Outcome::done);
  EXPECT_EQ(good(swapped).version, 2);
  EXPECT_EQ(good(stale).outcome, Outcome::stale);
  EXPECT_EQ(good(removed).outcome, Outcome::done);
  EXPECT_EQ(good(counted).value, number_value(11));
  EXPECT_EQ(good(touched).outcome, Outcome::done);
  EXPECT_EQ(good(found).value, number_value(11));
  EXPECT_EQ(near(make(StateVerb::get, "counted")).value, number_value(111)) << "once";
}

TEST_F(DoubtTest, WhatDidNotArriveIsSentAgainAndRefusedWhenItComesLate) {
  settle();
  proxy_.withhold();
  std::vector<WaitedOp*> all;
  for (int i = 0; i < 20; ++i) all.push_back(&start(StateVerb::add, "n" + std::to_string(i)));
  WaitedBatch batch;
  for (int i = 0; i < 20; ++i) {
    WaitedOp& op = make(StateVerb::add, "n" + std::to_string(i));
    op.delta = 10;
    batch.ops.push_back(&op);
  }
  far().submit(&batch);
  ASSERT_TRUE(wait_until([&] { return proxy_.kept() > 0; }));
  let_pass(50);
  hang_up();
  for (WaitedOp* op : all) {
    EXPECT_EQ(good(*op).value, number_value(1));
    EXPECT_EQ(op->reply.version, 1);
  }
  ASSERT_TRUE(wait_until([&] { return batch.ended > 0; }));
  EXPECT_TRUE(batch.applied) << batch.status.message;
  proxy_.deliver();
  let_pass(50);
  for (int i = 0; i < 20; ++i) {
    const StateReply& found = near(make(StateVerb::get, "n" + std::to_string(i)));
    EXPECT_EQ(found.value, number_value(11));
    EXPECT_EQ(found.version, 2);
  }
}

TEST_F(DoubtTest, ABatchWhoseAnswerWasLost) {
  settle();
  proxy_.stall();
  WaitedBatch batch, refused;
  for (const char* key : {"a", "b", "c", "d", "e"}) {
    batch.ops.push_back(&make(StateVerb::create, key));
    refused.ops.push_back(&make(StateVerb::create, key));
  }
  far().submit(&batch);
  far().submit(&refused);
  wait_for_answers();
  hang_up();
  ASSERT_TRUE(wait_until([&] { return refused.ended > 0 && batch.ended > 0; }));
  EXPECT_TRUE(batch.applied) << batch.status.message;
  EXPECT_TRUE(refused.status.ok()) << refused.status.message;
  EXPECT_FALSE(refused.applied);
  EXPECT_EQ(near(make(StateVerb::get, "e")).version, 1);
}

TEST_F(DoubtTest, TooLargeForAReceipt) {
  WaitedOp& before = make(StateVerb::set, "large");
  before.value.data = std::string(100'000, 'x');
  const Value large = before.value;
  near(before);
  settle();
  proxy_.stall();
  std::vector<WaitedOp*> all;
  for (int i = 0; i < 16; ++i) {
    WaitedOp& op = make(StateVerb::create, "large");
    op.want_actual = true;
    all.push_back(&start(op));
    all.push_back(&start(StateVerb::create, "small" + std::to_string(i)));
  }
  wait_for_answers();
  WaitedOp& over = make(StateVerb::set, "small0");
  near(over);
  hang_up();
  for (WaitedOp* op : all) {
    const StateReply& reply = end(*op);
    if (op->key == "small0") {
      // Executed, and written over: who created it cannot be told.
      EXPECT_TRUE(reply.status.code == Code::in_doubt || reply.outcome == Outcome::done);
      continue;
    }
    EXPECT_TRUE(reply.status.ok()) << reply.status.message;
    EXPECT_EQ(reply.outcome, op->key == "large" ? Outcome::exists : Outcome::done) << op->key;
    if (op->key == "large") {
      EXPECT_EQ(reply.value, large);
    }
  }
}

TEST_F(DoubtTest, AServerThatLostItsMemoryLeavesDoubt) {
  settle();
  proxy_.stall();
  WaitedOp& created = start(StateVerb::create, "created");
  WaitedOp& taken = start(StateVerb::create, "taken");
  WaitedOp& counted = start(StateVerb::add, "counted");
  WaitedOp& found = start(StateVerb::get, "found");
  WaitedBatch batch;
  for (const char* key : {"a", "b", "c", "d", "e"}) batch.ops.push_back(&make(StateVerb::create, key));
  far().submit(&batch);
  wait_for_answers();
  server_.kill();
  server_.start();
  EXPECT_EQ(near(make(StateVerb::create, "taken")).version, 1);
  hang_up();
  EXPECT_EQ(end(created).status.code, Code::in_doubt);
  EXPECT_EQ(good(taken).outcome, Outcome::exists) << "whatever was before, it was not this one";
  EXPECT_EQ(end(counted).status.code, Code::in_doubt);
  EXPECT_EQ(good(found).outcome, Outcome::absent);
  ASSERT_TRUE(wait_until([&] { return batch.ended > 0; }));
  EXPECT_TRUE(batch.status.code == Code::in_doubt || batch.applied)
      << "a second call, behind the others, was certainly not executed";
  EXPECT_EQ(good(start(StateVerb::create, "afresh")).version, 1);
}

TEST_F(DoubtTest, AServerThatForgotScriptsAndReceiptsIsToldAgain) {
  settle();
  auto control = connection(options(server_.port()));
  for (const char* what : {"FLUSHALL", "SCRIPT"}) {
    EXPECT_TRUE(
        (std::string(what) == "SCRIPT" ? send(*control, {"SCRIPT", "FLUSH"}) : send(*control, {what})).ok());
    for (int i = 0; i < 8; ++i)
      EXPECT_EQ(run(far(), make(StateVerb::create, what + std::to_string(i))).version, 1);
  }
}

TEST_F(DoubtTest, TheDeadlineEndsTheDoubt) {
  settle();
  proxy_.stall();
  WaitedOp& brief = make(StateVerb::create, "brief");
  brief.deadline = clock_.now() + kSecond / 2;
  start(brief);
  WaitedOp& patient = start(StateVerb::create, "patient");
  wait_for_answers();
  proxy_.cut();  // and the next connection hangs, too
  EXPECT_EQ(end(brief).status.code, Code::in_doubt);
  EXPECT_LT(proxy_.accepted(), 4) << "the deadline, not the end of a connect, told it";
  EXPECT_EQ(patient.ended, 0);
  hang_up();
  EXPECT_EQ(good(patient).outcome, Outcome::done);
  EXPECT_EQ(near(make(StateVerb::get, "patient")).version, 1);
}

TEST_F(DoubtTest, ClosedWithAnAnswerMissing) {
  settle();
  proxy_.stall();
  WaitedOp& op = start(StateVerb::create, "a");
  WaitedOp& queued = start(StateVerb::create, "a");
  wait_for_answers();
  WaitedOp& later = start(StateVerb::create, "a");
  bool closed = false;
  close_quietly(*store_, closed);
  ASSERT_TRUE(wait_until([&] { return closed; }));
  EXPECT_EQ(end(op).status.code, Code::in_doubt);
  EXPECT_TRUE(end(queued).status.code == Code::in_doubt || queued.reply.status.code == Code::closed);
  EXPECT_EQ(end(later).status.code, Code::closed);
  WaitedOp& after = make(StateVerb::get, "a");
  far().submit(&after);
  EXPECT_EQ(end(after).status.code, Code::closed);
}

TEST_F(DoubtTest, AServerThatIsFullRefusesWritesAndNothingElse) {
  auto control = connection(options(server_.port()));
  near(make(StateVerb::create, "a"));
  WaitedOp& number = make(StateVerb::set, "n");
  number.value = number_value(kMost - 5);
  near(number);
  settle();
  EXPECT_TRUE(send(*control, {"CONFIG", "SET", "maxmemory", "1"}).ok());
  WaitedOp& write = start(StateVerb::set, "a");
  WaitedOp& read = start(StateVerb::get, "a");
  WaitedOp& sum = start(StateVerb::add, "n");
  WaitedBatch batch;
  WaitedOp& drop = make(StateVerb::unschedule, "a");
  batch.ops = {&make(StateVerb::create, "x"), &make(StateVerb::create, "y"), &drop};
  drop.expected = 0;
  far().submit(&batch);
  EXPECT_EQ(end(write).status.sqlstate, "OOM");
  EXPECT_EQ(good(read).value, Value{});
  EXPECT_EQ(end(sum).status.sqlstate, "OOM");
  ASSERT_TRUE(wait_until([&] { return batch.ended > 0; }));
  EXPECT_FALSE(batch.applied);
  EXPECT_TRUE(send(*control, {"CONFIG", "SET", "maxmemory", "0"}).ok());
  EXPECT_EQ(good(start(StateVerb::add, "n")).value, number_value(kMost - 4));
  EXPECT_EQ(good(start(StateVerb::set, "a")).version, 2);
  EXPECT_EQ(near(make(StateVerb::get, "x")).outcome, Outcome::absent);
}

TEST_F(DoubtTest, AServerThatIsFullIsClearedAllTheSame) {
  auto control = connection(options(server_.port()));
  WaitedOp& brief = make(StateVerb::create, "brief");
  brief.ttl = 1;
  near(brief);
  near(make(StateVerb::create, "stays"));
  settle();
  EXPECT_TRUE(send(*control, {"CONFIG", "SET", "maxmemory", "1"}).ok());
  EXPECT_EQ(purge(far()), 1);
  EXPECT_TRUE(send(*control, {"CONFIG", "SET", "maxmemory", "0"}).ok());
  EXPECT_EQ(good(start(StateVerb::create, "brief")).version, 2);
}

TEST_F(DoubtTest, AServerThatIsDownIsNotWaitedForLong) {
  settle();
  server_.kill();
  WaitedOp& op = make(StateVerb::create, "a");
  op.deadline = clock_.now() + kSecond / 2;
  EXPECT_FALSE(end(start(op)).status.ok());
  EXPECT_EQ(end(start(StateVerb::create, "a")).status.code, Code::unavailable);
  server_.start();
  ASSERT_TRUE(wait_until([&] {
    WaitedOp& again = start(StateVerb::create, "a");
    return end(again).status.ok() && again.reply.version == 1;
  }));
}

TEST_F(DoubtTest, LocksWhoseAnswersWereLost) {
  auto made = open(url()).locks(prefix());
  ASSERT_TRUE(made.ok());
  store::LockStore& locks = *made.value();
  std::deque<WaitedLock> all;
  const auto submit = [&](LockOp::Verb verb, std::string name, std::int64_t token = 0) -> WaitedLock& {
    WaitedLock& op = all.emplace_back();
    op.verb = verb;
    op.space = space_;
    op.name = std::move(name);
    op.token = token;
    op.ttl = 60'000;
    op.id = next_id();
    op.deadline = clock_.now() + 20 * kSecond;
    locks.submit(&op);
    return op;
  };
  const auto ended = [&](WaitedLock& op) -> const LockReply& {
    EXPECT_TRUE(wait_until([&] { return op.ended > 0; }));
    return op.reply;
  };
  for (int i = 0; i < 16; ++i) ended(submit(LockOp::Verb::acquire, "settle" + std::to_string(i)));
  const std::int64_t held = ended(submit(LockOp::Verb::acquire, "held")).token;
  proxy_.stall();
  WaitedLock& acquired = submit(LockOp::Verb::acquire, "a");
  WaitedLock& refused = submit(LockOp::Verb::acquire, "a");
  WaitedLock& released = submit(LockOp::Verb::release, "held", held);
  wait_for_answers();
  hang_up();
  EXPECT_EQ(ended(acquired).outcome, LockOutcome::held) << acquired.reply.status.message;
  EXPECT_EQ(ended(refused).outcome, LockOutcome::taken);
  EXPECT_EQ(refused.reply.token, acquired.reply.token);
  EXPECT_EQ(ended(released).outcome, LockOutcome::held) << "it was, until this release";

  proxy_.stall();
  const std::int64_t token = acquired.reply.token;
  WaitedLock& lost = submit(LockOp::Verb::release, "a", token);
  WaitedLock& fresh = submit(LockOp::Verb::acquire, "b");
  wait_for_answers();
  server_.kill();
  server_.start();
  hang_up();
  EXPECT_EQ(ended(lost).status.code, Code::in_doubt);
  EXPECT_EQ(ended(fresh).outcome, LockOutcome::held) << "acquired anew";
  EXPECT_GT(ended(submit(LockOp::Verb::acquire, "a")).token, token) << "no token twice";
}

TEST_F(DoubtTest, TwoStoresRaceWhileConnectionsAreCut) {
  RedisOptions with;
  std::vector<store::StateStore*> stores = {&state(open(url(), with)), &state(open(url(), with)),
                                            &state(open(server_.url()))};
  const int rounds = 300;
  std::deque<WaitedOp> adds, creates;
  int ended = 0;
  for (int i = 0; i < rounds; ++i) {
    for (store::StateStore* each : stores) {
      WaitedOp& add = adds.emplace_back();
      add.verb = StateVerb::add;
      add.key = "n" + std::to_string(i % 7);
      WaitedOp& create = creates.emplace_back();
      create.verb = StateVerb::create;
      create.key = "c" + std::to_string(i);
      for (WaitedOp* op : {&add, &create}) {
        op->space = space_;
        op->kind = "k";
        op->delta = 1;
        op->id = next_id();
        op->deadline = clock_.now() + 25 * kSecond;
        each->submit(op);
      }
    }
    if (i % 20 == 0) let_pass(1);
    if (i % 60 == 30) proxy_.cut();
  }
  ASSERT_TRUE(wait_until([&] {
    ended = 0;
    for (const WaitedOp& op : adds) ended += op.ended;
    for (const WaitedOp& op : creates) ended += op.ended;
    return ended == 6 * rounds;
  }));
  std::int64_t sum = 0, added = 0;
  std::set<std::string> created;
  for (const WaitedOp& op : adds)
    if (op.reply.status.ok())
      ++added;
    else
      EXPECT_NE(op.reply.status.code, Code::in_doubt) << op.reply.status.message;
  for (const WaitedOp& op : creates)
    if (op.reply.status.ok() && op.reply.outcome == Outcome::done) {
      EXPECT_TRUE(created.insert(op.key).second) << op.key;
    }
  EXPECT_EQ(created.size(), static_cast<std::size_t>(rounds));
  for (int i = 0; i < 7; ++i) sum += near(make(StateVerb::get, "n" + std::to_string(i))).value.number;
  EXPECT_EQ(sum, added);
}

}  // namespace
}  // namespace ratesync::testing
