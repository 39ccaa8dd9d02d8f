// A PostgreSQL store of its own per "process" for tests, and a witness: a plain connection that sees
// what is really stored.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <asio/io_context.hpp>
#include <asio/post.hpp>
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "postgres_server.h"
#include "ratesync/postgres/postgres_store.h"

namespace ratesync::testing {

using Table = std::vector<std::vector<std::string>>;

// Runs the loop until `ready`; false after a minute.
inline bool run_until(asio::io_context& io, const std::function<bool()>& ready) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (!ready()) {
    if (std::chrono::steady_clock::now() > end) return false;
    io.restart();
    io.run_one_for(std::chrono::milliseconds(20));
  }
  return true;
}

inline std::string url_of(const std::string& role) {
  std::string url = PostgresServer::instance().url();
  if (role.empty()) return url;
  const std::size_t from = url.find("//") + 2;
  return url.replace(from, url.find('@') - from, role);
}

class Witness {
 public:
  explicit Witness(const std::string& role = {}) {
    auto info = postgres::parse_conninfo(url_of(role));
    connection_ = postgres::Connection::create(io_, info.value(), {});
    std::optional<Status> status;
    connection_->connect([&](Status s) { status = std::move(s); });
    EXPECT_TRUE(run_until(io_, [&] { return status.has_value(); }));
    EXPECT_TRUE(status->ok()) << status->message;
  }
  ~Witness() { connection_->close(); }

  postgres::PipelineResult run(std::vector<postgres::Call> calls) {
    std::optional<postgres::PipelineResult> out;
    connection_->run(std::move(calls), [&](postgres::PipelineResult r) { out = std::move(r); });
    EXPECT_TRUE(run_until(io_, [&] { return out.has_value(); }));
    return std::move(*out);
  }
  Table ask(const std::string& sql) {
    const postgres::Statement statement{"", sql};
    std::vector<postgres::Call> calls;
    calls.push_back({&statement, {}});
    const postgres::PipelineResult result = run(std::move(calls));
    EXPECT_TRUE(result.status.ok()) << sql << ": " << result.status.message;
    Table out;
    if (!result.status.ok()) return out;
    const postgres::Rows& rows = *result.results[0];
    for (int r = 0; r < rows.rows(); ++r) {
      out.emplace_back();
      for (int c = 0; c < rows.columns(); ++c) out.back().emplace_back(rows.text(r, c));
    }
    return out;
  }
  std::string value(const std::string& sql) {
    const Table table = ask(sql);
    return table.empty() ? "" : table[0][0];
  }
  void script(const std::string& sql) {
    std::optional<Status> status;
    connection_->run_script(sql, [&](Status s) { status = std::move(s); });
    EXPECT_TRUE(run_until(io_, [&] { return status.has_value(); }));
    EXPECT_TRUE(status->ok()) << sql << ": " << status->message;
  }

 private:
  asio::io_context io_;
  std::shared_ptr<postgres::Connection> connection_;
};

// A schema of its own for one test, dropped with all its tables.
class Schema {
 public:
  explicit Schema(std::string wanted = {}) : name(wanted.empty() ? unique() : std::move(wanted)) {
    Witness().script("DROP SCHEMA IF EXISTS " + quoted() + " CASCADE; CREATE SCHEMA " + quoted());
  }
  ~Schema() { Witness().script("DROP SCHEMA IF EXISTS " + quoted() + " CASCADE"); }
  [[nodiscard]] std::string quoted() const { return postgres::quote_identifier(name); }
  [[nodiscard]] std::string table(const std::string& of = "rate_limiter_state") const {
    return quoted() + '.' + postgres::quote_identifier(of);
  }
  // Exactly what the documentation tells people to run.
  void create_seed_table(const std::string& of = "rate_limiter_state") const {
    Witness().script(
        "CREATE TABLE " + table(of) +
        " (group_id VARCHAR(255) PRIMARY KEY, last_acquisition_at TIMESTAMPTZ NOT NULL,"
        " version INTEGER NOT NULL DEFAULT 1, current_concurrent INTEGER NOT NULL DEFAULT 0,"
        " created_at TIMESTAMPTZ NOT NULL DEFAULT NOW(), updated_at TIMESTAMPTZ NOT NULL DEFAULT NOW());"
        "CREATE INDEX idx_rate_limiter_state_updated ON " +
        table(of) + " (updated_at)");
  }

  const std::string name;

 private:
  static std::string unique() {
    static std::atomic<int> count{0};
    return "limits_" + std::to_string(getpid()) + "_" + std::to_string(++count);
  }
};

// One acquisition. `answered` is set by done(); `then` runs after it.
struct Request final : store::AcquireOp {
  void done() override {
    answered = true;
    if (then) then(*this);
  }
  [[nodiscard]] bool granted() const {
    return answered && reply.status.ok() && reply.verdict == store::Verdict::granted;
  }
  bool answered = false;
  std::function<void(Request&)> then;
};

inline store::GroupRef make_group(const std::string& id, double rate, std::int64_t burst = 1,
                                  std::int64_t max_concurrent = 0, Nanos lease = 30 * kSecond) {
  limits::Params params;
  params.rate_per_second = rate;
  params.burst = burst;
  params.max_concurrent = max_concurrent;
  params.timing_margin = 0;
  params.lease = lease;
  return std::make_shared<const store::Group>(store::Group{id, params});
}

// One store with its loop, driven by the thread that uses it.
class Process {
 public:
  explicit Process(const Schema& schema, const std::function<void(postgres::PostgresOptions&)>& change = {},
                   const std::string& role = {}) {
    postgres::PostgresOptions options;
    options.url = url_of(role);
    options.schema_name = schema.name;
    options.auto_create = true;
    options.pool_min_size = 0;
    options.pool_max_size = 3;
    if (change) change(options);
    auto made = postgres::PostgresStore::create(io, clock, std::move(options));
    EXPECT_TRUE(made.ok()) << made.status().message;
    store = std::move(made.value());
  }
  ~Process() {
    if (!store) return;
    bool closed = false;
    store->close([&] { closed = true; });
    EXPECT_TRUE(until([&] { return closed; }));
  }

  bool until(const std::function<bool()>& ready) { return run_until(io, ready); }
  Status initialize() {
    std::optional<Status> out;
    store->initialize([&](Result<store::Unit> r) { out = r.status(); });
    EXPECT_TRUE(until([&] { return out.has_value(); }));
    return *out;
  }
  // Blocks for one answer. kForever: wait for any slot; 0: try once.
  store::AcquireReply acquire(const store::GroupRef& group, Nanos patience = kForever,
                              std::int64_t cost = 1) {
    Request request;
    request.group = group;
    request.cost = cost;
    request.deadline = patience == kForever ? kForever : clock.now() + patience;
    store->limits()->acquire(&request);
    EXPECT_TRUE(until([&] { return request.answered; }));
    return request.reply;
  }
  // All at once, answered in any order.
  std::vector<Request> acquire_many(const store::GroupRef& group, std::size_t n, Nanos patience = kForever) {
    std::vector<Request> requests(n);
    std::size_t answered = 0;
    for (Request& request : requests) {
      request.group = group;
      request.deadline = patience == kForever ? kForever : clock.now() + patience;
      request.then = [&](Request&) { ++answered; };
    }
    for (Request& request : requests) store->limits()->acquire(&request);
    EXPECT_TRUE(until([&] { return answered == n; }));
    for (Request& request : requests) request.then = nullptr;
    return requests;
  }
  store::Peek peek(const store::GroupRef& group) {
    std::optional<Result<store::Peek>> out;
    store->limits()->peek(group, [&](Result<store::Peek> r) { out = std::move(r); });
    EXPECT_TRUE(until([&] { return out.has_value(); }));
    EXPECT_TRUE(out->ok()) << out->status().message;
    return out->ok() ? out->value() : store::Peek{};
  }
  Status finish(const std::function<void(store::Callback<store::Unit>)>& start) {
    std::optional<Status> out;
    start([&](Result<store::Unit> r) { out = r.status(); });
    EXPECT_TRUE(until([&] { return out.has_value(); }));
    return *out;
  }
  std::vector<store::Finding> doctor() {
    std::optional<std::vector<store::Finding>> out;
    store->doctor([&](Result<std::vector<store::Finding>> r) { out = r.value(); });
    EXPECT_TRUE(until([&] { return out.has_value(); }));
    return *out;
  }

  asio::io_context io;
  Clock clock;
  std::unique_ptr<store::Store> store;
};

}  // namespace ratesync::testing
