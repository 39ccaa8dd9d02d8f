// Lost answers, killed sessions, other processes at the same keys: nothing is done twice, nothing is guessed.
#include <thread>

#include "state_rig.h"
#include "tcp_proxy.h"

using namespace ratesync;
using namespace ratesync::testing;
using store::StateReply;

namespace {

// A process whose answers can be held back. Its loop must run for the proxy to forward anything.
class Cut {
 public:
  explicit Cut(const Schema& schema, const std::string& statement_cache = "auto")
      : proxy_(loop_, static_cast<std::uint16_t>(PostgresServer::instance().port())),
        thread_([this] { loop_.run(); }) {
    process = std::make_unique<StateProcess>(schema, [&](postgres::PostgresOptions& o) {
      o.url = "postgresql://postgres@127.0.0.1:" + std::to_string(proxy_.port()) + "/postgres";
      o.command_timeout = 3 * kSecond;
      o.connect_timeout = 5 * kSecond;
      o.statement_cache = statement_cache;
      o.pool_max_size = 2;
    });
    EXPECT_TRUE(process->finish([&](auto done) { process->state->initialize(done); }).ok());
  }
  ~Cut() {
    process.reset();
    loop_.stop();
    thread_.join();
  }
  // Submits, lets the server work until `seen` in the database, and loses the answer.
  void lose(const std::function<void()>& submit, const std::string& seen,
            const std::function<void()>& meanwhile = {}) {
    on_loop([this] { proxy_.stall(); });
    submit();
    Witness witness;
    EXPECT_TRUE(process->until([&] { return witness.value(seen) == "t"; })) << seen;
    if (meanwhile) meanwhile();
    on_loop([this] {
      proxy_.cut();
      proxy_.flow();
    });
  }
  std::unique_ptr<StateProcess> process;

 private:
  void on_loop(std::function<void()> what) {
    std::atomic<bool> done = false;
    asio::post(loop_, [&] {
      what();
      done = true;
    });
    while (!done) std::this_thread::yield();
  }
  asio::io_context loop_;
  TcpProxy proxy_;
  std::thread thread_;
};

std::string row(const Schema& schema, const std::string& key, const std::string& condition) {
  return "SELECT EXISTS (SELECT 1 FROM " + schema.table("acteon_state") + " WHERE key = '" + key + "' AND " +
         condition + ")";
}

// Keeps a row locked until it is released, by a statement that sleeps.
class RowLock {
 public:
  RowLock(const Schema& schema, const std::string& key)
      : statement_{"", "SELECT pg_sleep(600) FROM (SELECT 1 FROM " + schema.table("acteon_state") +
                           " WHERE key = '" + key + "' FOR UPDATE) AS t"},
        sleeping_(" FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND query LIKE '%''" + key + "''%'") {
    connection_ = postgres::Connection::create(
        io_, postgres::parse_conninfo(PostgresServer::instance().url()).value(), {});
    bool connected = false;
    connection_->connect([&](const Status& s) { connected = s.ok(); });
    EXPECT_TRUE(run_until(io_, [&] { return connected; }));
    std::vector<postgres::Call> calls;
    calls.push_back({&statement_, {}});
    connection_->run(std::move(calls), [this](const postgres::PipelineResult&) { over_ = true; });
    io_.poll();
    Witness witness;
    EXPECT_TRUE(run_until(io_, [&] { return witness.value("SELECT count(*)" + sleeping_) == "1"; }));
  }
  ~RowLock() { connection_->close(); }
  void release() {
    Witness().ask("SELECT pg_cancel_backend(pid)" + sleeping_);
    EXPECT_TRUE(run_until(io_, [this] { return over_; }));
  }

 private:
  const postgres::Statement statement_;
  const std::string sleeping_;
  asio::io_context io_;
  std::shared_ptr<postgres::Connection> connection_;
  bool over_ = false;
};

// Ends sessions that wait for a row.
void kill_waiting(StateProcess& p) {
  Witness witness;
  EXPECT_TRUE(p.until([&] {
    return witness.value(
               "SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) > 0 FROM pg_stat_activity WHERE "
               "wait_event_type = 'Lock' AND query LIKE '%acteon_state%'") == "t";
  }));
}

}  // namespace

TEST(PostgresStateFault, WhatWasCarriedOutBeforeTheAnswerWasLostIsFoundByItsId) {
  Schema schema;
  Cut cut(schema);
  StateProcess& p = *cut.process;
  p.ask(Operation(Verb::set, "swap").with(text("old")));
  p.ask(Operation(Verb::set, "remove"));
  std::vector<std::unique_ptr<Operation>> ops;
  ops.push_back(
      std::make_unique<Operation>(Operation(Verb::create, "create").with(text("v")).expires(60'000)));
  ops.push_back(std::make_unique<Operation>(Operation(Verb::set, "set").with(integer(1))));
  ops.push_back(std::make_unique<Operation>(Operation(Verb::set, "set").with(integer(2))));
  ops.push_back(std::make_unique<Operation>(Operation(Verb::add, "add").plus(5)));
  ops.push_back(std::make_unique<Operation>(Operation(Verb::add, "add").plus(7)));
  ops.push_back(std::make_unique<Operation>(Operation(Verb::swap, "swap").with(text("new")).at(1)));
  ops.push_back(std::make_unique<Operation>(Operation(Verb::remove, "remove").at(1)));
  ops.push_back(std::make_unique<Operation>(Operation(Verb::get, "swap")));
  ops.push_back(std::make_unique<Operation>(Operation(Verb::create, "create").wants()));
  cut.lose(
      [&] {
        for (auto& op : ops) p.state->submit(op.get());
      },
      "SELECT count(*) = 5 FROM " + schema.table("acteon_state") +
          " WHERE (key, version) IN (('create', 1), ('set', 2), ('add', 2), ('swap', 2), ('remove', 1)) AND "
          "(removed OR key <> 'remove')");
  ASSERT_TRUE(p.until(
      [&] { return std::all_of(ops.begin(), ops.end(), [](const auto& op) { return op->answered; }); }));
  for (const auto& op : ops) EXPECT_TRUE(op->reply.status.ok()) << op->key << op->reply.status.message;
  EXPECT_EQ(ops[0]->reply.outcome, Outcome::done);
  EXPECT_GT(ops[0]->reply.expires_at, 0);
  EXPECT_EQ(ops[1]->reply.version, 1);
  EXPECT_EQ(ops[2]->reply.version, 2);
  EXPECT_EQ(ops[3]->reply.value, integer(5));
  EXPECT_EQ(ops[4]->reply.value, integer(12));
  EXPECT_EQ(ops[5]->reply.version, 2);
  EXPECT_EQ(ops[6]->reply.outcome, Outcome::done);
  EXPECT_EQ(ops[7]->reply.value, text("new"));
  EXPECT_EQ(ops[8]->reply.outcome, Outcome::exists);
  EXPECT_EQ(ops[8]->reply.value, text("v"));
  EXPECT_EQ(p.get("add").value, integer(12)) << "and not added twice";
}

TEST(PostgresStateFault, WhatWasWrittenOverMeanwhileIsInDoubt) {
  Schema schema;
  Cut cut(schema);
  StateProcess other(schema);
  Operation add = Operation(Verb::add, "n").plus(5), make(Verb::create, "k");
  cut.lose(
      [&] {
        cut.process->state->submit(&add);
        cut.process->state->submit(&make);
      },
      "SELECT count(*) = 2 FROM " + schema.table("acteon_state"),
      [&] {
        other.ask(Operation(Verb::add, "n").plus(1));
        other.ask(Operation(Verb::set, "k"));
      });
  ASSERT_TRUE(cut.process->until([&] { return add.answered && make.answered; }));
  EXPECT_EQ(add.reply.status.code, Code::in_doubt);
  EXPECT_NE(add.reply.status.message.find("written over"), std::string::npos) << add.reply.status.message;
  EXPECT_EQ(make.reply.status.code, Code::in_doubt);
  EXPECT_EQ(cut.process->get("n").value, integer(6)) << "and it recovers";
}

TEST(PostgresStateFault, AStaleSwapIsKnownToBeStaleAlsoWithoutItsAnswer) {
  Schema schema;
  Cut cut(schema);
  StateProcess other(schema);
  other.ask(Operation(Verb::set, "k"));
  other.ask(Operation(Verb::set, "k"));
  Operation swap = Operation(Verb::swap, "k").at(1), witness = Operation(Verb::set, "w");
  cut.lose(
      [&] {
        cut.process->state->submit(&swap);
        cut.process->state->submit(&witness);
      },
      row(schema, "w", "true"));
  ASSERT_TRUE(cut.process->until([&] { return swap.answered && witness.answered; }));
  EXPECT_TRUE(swap.reply.status.ok()) << swap.reply.status.message;
  EXPECT_EQ(swap.reply.outcome, Outcome::stale);
  EXPECT_EQ(swap.reply.version, 2);
}

TEST(PostgresStateFault, AKilledSessionThatHadDoneNothingIsReplacedAndTheWorkDoneOnce) {
  Schema schema;
  StateProcess p(schema);
  p.ask(Operation(Verb::set, "k").with(integer(1)));
  p.ask(Operation(Verb::set, "j").with(integer(1)));
  std::this_thread::sleep_for(std::chrono::milliseconds(150));  // older than the margin of two clocks
  Operation add = Operation(Verb::add, "k").plus(1);
  Operation set = Operation(Verb::set, "j").with(text("new")), make(Verb::create, "new");
  AtomicBatch batch;
  batch.ops = {&set, &make};
  {
    RowLock lock(schema, "k"), also(schema, "j");
    p.state->submit(&add);
    p.state->submit(&batch);
    Witness witness;
    EXPECT_TRUE(p.until([&] {
      return witness.value(
                 "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE "
                 "'%acteon_state%'") == "2";
    }));
    kill_waiting(p);
    lock.release();
    also.release();
    ASSERT_TRUE(p.until([&] { return add.answered && batch.answered; }));
  }
  EXPECT_TRUE(add.reply.status.ok()) << add.reply.status.message;
  EXPECT_EQ(add.reply.value, integer(2));
  EXPECT_EQ(add.reply.version, 2);
  EXPECT_TRUE(batch.status.ok()) << batch.status.message;
  EXPECT_TRUE(batch.applied);
  EXPECT_EQ(set.reply.version, 2);
  EXPECT_EQ(p.get("new").version, 1);
}

TEST(PostgresStateFault, BehindAPoolerOnlyARowWithOurIdIsAnAnswer) {
  Schema schema;
  Cut cut(schema, "off");  // as if the session were not known
  StateProcess& p = *cut.process;
  Operation add = Operation(Verb::add, "n").plus(5);
  cut.lose([&] { p.state->submit(&add); }, row(schema, "n", "number = 5"));
  ASSERT_TRUE(p.until([&] { return add.answered; }));
  EXPECT_TRUE(add.reply.status.ok()) << add.reply.status.message;
  EXPECT_EQ(add.reply.value, integer(5));
  Operation never = Operation(Verb::add, "n").plus(1);
  {
    RowLock lock(schema, "n");
    p.state->submit(&never);
    kill_waiting(p);
    lock.release();
    ASSERT_TRUE(p.until([&] { return never.answered; }));
  }
  EXPECT_EQ(never.reply.status.code, Code::in_doubt);
  EXPECT_EQ(p.get("n").value, integer(5));
}

TEST(PostgresStateFault, ABatchWhoseAnswerWasLostWasAppliedOrNot) {
  Schema schema;
  Cut cut(schema);
  Operation a = Operation(Verb::add, "a").plus(3), b = Operation(Verb::create, "b").with(text("b"));
  AtomicBatch batch;
  batch.ops = {&a, &b};
  cut.lose([&] { cut.process->state->submit(&batch); }, row(schema, "b", "version = 1 AND NOT removed"));
  ASSERT_TRUE(cut.process->until([&] { return batch.answered; }));
  EXPECT_TRUE(batch.status.ok()) << batch.status.message;
  EXPECT_TRUE(batch.applied);
  EXPECT_EQ(a.reply.value, integer(3));
  EXPECT_EQ(b.reply.version, 1);
}

TEST(PostgresStateFault, TwoProcessesAtTheSameKeysNeverDeadlockAndLoseNothing) {
  Schema schema;
  { StateProcess(schema).ask(Operation(Verb::add, "k0").plus(0)); }
  constexpr const char* deadlocks =
      "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
  const std::string before = Witness().value(deadlocks);
  std::atomic<std::int64_t> added{0}, applied{0}, swapped{0};
  const auto work = [&](unsigned seed) {
    StateProcess p(schema);
    std::minstd_rand random(seed);
    for (int round = 0; round < 40; ++round) {
      std::vector<std::unique_ptr<Operation>> ops;
      std::vector<std::unique_ptr<AtomicBatch>> batches;
      for (int i = 0; i < 60; ++i) {
        const std::string key = "k" + std::to_string(random() % 30);
        switch (random() % 4) {
          case 0:
            ops.push_back(std::make_unique<Operation>(Operation(Verb::swap, key).at(1 + random() % 4)));
            break;
          case 1: ops.push_back(std::make_unique<Operation>(Operation(Verb::get, key))); break;
          default: ops.push_back(std::make_unique<Operation>(Operation(Verb::add, key).plus(1)));
        }
        if (ops.back()->verb == Verb::swap) ops.back()->key += "-swap", ops.back()->verb = Verb::create;
      }
      std::vector<std::unique_ptr<Operation>> parts;
      for (int i = 0; i < 8; ++i) {
        batches.push_back(std::make_unique<AtomicBatch>());
        const auto first = random() % 30;
        for (const auto k : {first, (first + 7) % 30, (first + 3) % 30}) {
          parts.push_back(std::make_unique<Operation>(Operation(Verb::add, "k" + std::to_string(k)).plus(1)));
          batches.back()->ops.push_back(parts.back().get());
        }
      }
      for (auto& batch : batches) p.state->submit(batch.get());
      p.ask_all(ops);
      ASSERT_TRUE(p.until([&] {
        return std::all_of(batches.begin(), batches.end(), [](const auto& b) { return b->answered; });
      }));
      for (const auto& op : ops) {
        EXPECT_TRUE(op->reply.status.ok()) << op->reply.status.message;
        if (op->verb == Verb::add) ++added;
        if (op->verb == Verb::create && op->reply.outcome == Outcome::done) ++swapped;
      }
      for (const auto& batch : batches) {
        EXPECT_TRUE(batch->applied) << batch->status.message;
        applied += 3;
      }
    }
  };
  std::thread one(work, 1), two(work, 2);
  one.join();
  two.join();
  Witness witness;
  EXPECT_EQ(witness.value("SELECT sum(number) FROM " + schema.table("acteon_state") + " WHERE type = 3"),
            std::to_string(added + applied));
  EXPECT_EQ(witness.value("SELECT sum(version) FROM " + schema.table("acteon_state") + " WHERE type = 3"),
            std::to_string(added + applied + 1));
  EXPECT_EQ(witness.value("SELECT count(*) FROM " + schema.table("acteon_state") + " WHERE type <> 3"),
            std::to_string(swapped));
  EXPECT_EQ(witness.value(deadlocks), before);
}

TEST(PostgresStateFault, VersionsGrowWhileRowsArePurgedUnderTheWriters) {
  Schema schema;
  { StateProcess(schema).ask(Operation(Verb::set, "other")); }
  std::atomic<bool> over = false;
  std::atomic<std::int64_t> purged = 0;
  std::thread purger([&] {
    StateProcess p(schema);
    while (!over) purged += p.purge();
  });
  const auto work = [&] {
    StateProcess p(schema);
    std::int64_t last = 0;
    // A purge finds the row written anew meanwhile, as a rule: on until one did not.
    for (int round = 0; round < 300 || (purged == 0 && round < 10'000); ++round) {
      const StateReply made = p.ask(Operation(Verb::add, "k").plus(1));
      EXPECT_GT(made.version, last);
      last = made.version;
      p.ask(Operation(Verb::remove, "k").at(store::kAnyVersion));
      if (round % 5 == 0) purged += p.purge();  // the other purger mostly comes too late
    }
  };
  std::thread writer(work);
  work();
  writer.join();
  over = true;
  purger.join();
  EXPECT_GT(purged, 0);
}

TEST(PostgresStateFault, ARoleWithTheDocumentedGrantsDoesEverything) {
  const std::string role = "state_worker_" + std::to_string(getpid());
  Witness().script("CREATE ROLE " + role + " LOGIN");
  {
    Schema schema;
    { StateProcess(schema).ask(Operation(Verb::set, "k")); }
    Witness().script("GRANT USAGE ON SCHEMA " + schema.quoted() + " TO " + role +
                     "; GRANT SELECT, INSERT, UPDATE, DELETE ON " + schema.table("acteon_state") + ", " +
                     schema.table("acteon_floors") + ", " + schema.table("acteon_timeouts") + " TO " + role +
                     "; GRANT USAGE ON SEQUENCE " + schema.table("acteon_lock_tokens") + " TO " + role);
    StateProcess p(
        schema, [](auto& o) { o.auto_create = false; }, role);
    EXPECT_EQ(p.ask(Operation(Verb::swap, "k").at(1)).version, 2);
    EXPECT_EQ(p.ask(Operation(Verb::add, "n").plus(2)).value, integer(2));
    p.ask(Operation(Verb::schedule, "k"));
    EXPECT_EQ(p.claim().size(), 1u);
    p.ask(Operation(Verb::remove, "k").at(2));
    EXPECT_EQ(p.purge(), 1);
    EXPECT_EQ(p.scan(space(), "test", "").rows.size(), 1u);
  }
  Witness().script("DROP OWNED BY " + role + "; DROP ROLE " + role);
}

TEST(PostgresStateFault, ATableThatGoesAwayAndComesBack) {
  Schema schema;
  StateProcess p(schema);
  p.ask(Operation(Verb::set, "k"));
  Witness().script("DROP TABLE " + schema.table("acteon_state"));
  Operation lost(Verb::set, "k");
  const Status status = p.refusal(lost);
  EXPECT_EQ(status.sqlstate, "42P01");
  EXPECT_NE(status.message.find("ratesync migrate -c FILE"), std::string::npos) << status.message;
  EXPECT_EQ(p.ask(Operation(Verb::set, "k")).version, 1) << "auto_create makes it anew";
}
