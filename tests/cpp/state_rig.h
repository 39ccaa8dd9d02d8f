// Operations on state for tests: one call is one operation, answered by the loop of its process.
#pragma once

#include "limit_rig.h"
#include "ratesync/store/state_store.h"

namespace ratesync::testing {

using Verb = store::StateOp::Verb;
using Outcome = store::StateReply::Outcome;

inline store::SpaceRef space(const std::string& tenant = "default",
                             const std::string& name_space = "default") {
  return std::make_shared<const store::Space>(store::Space{name_space, tenant});
}

inline store::Value text(std::string data) { return {store::Value::Type::text, std::move(data), 0}; }
inline store::Value bytes(std::string data) { return {store::Value::Type::bytes, std::move(data), 0}; }
inline store::Value integer(std::int64_t number) { return {store::Value::Type::integer, {}, number}; }

struct Operation final : store::StateOp {
  Operation(Verb what, std::string of) {
    static std::atomic<std::int64_t> ids{1};
    verb = what;
    space = testing::space();
    kind = "test";
    key = std::move(of);
    id = ids++;
  }
  void done() override {
    answered = true;
    if (then) then(*this);
  }
  Operation& in(store::SpaceRef where, const std::string& what = "test") {
    space = std::move(where);
    kind = what;
    return *this;
  }
  Operation& with(store::Value what) {
    value = std::move(what);
    return *this;
  }
  Operation& plus(std::int64_t what) {
    delta = what;
    return *this;
  }
  Operation& expires(std::int64_t ms) {
    ttl = ms;
    return *this;
  }
  Operation& at(std::int64_t version) {
    expected = version;
    return *this;
  }
  Operation& wants() {
    want_actual = true;
    return *this;
  }
  bool answered = false;
  std::function<void(Operation&)> then;
};

struct AtomicBatch final : store::StateBatch {
  void done() override { answered = true; }
  bool answered = false;
};

class StateProcess : public Process {
 public:
  explicit StateProcess(const Schema& schema,
                        const std::function<void(postgres::PostgresOptions&)>& change = {},
                        const std::string& role = {}, const std::string& prefix = "acteon_")
      : Process(schema, change, role), state(store->state(prefix).value()) {}

  store::StateReply ask(Operation op) {
    state->submit(&op);
    EXPECT_TRUE(until([&] { return op.answered; }));
    EXPECT_TRUE(op.reply.status.ok()) << op.key << ": " << op.reply.status.message;
    return op.reply;
  }
  Status refusal(Operation op) {
    state->submit(&op);
    EXPECT_TRUE(until([&] { return op.answered; }));
    return op.reply.status;
  }
  // All at once, in this order.
  void ask_all(std::vector<std::unique_ptr<Operation>>& ops) {
    for (auto& op : ops) state->submit(op.get());
    EXPECT_TRUE(until(
        [&] { return std::all_of(ops.begin(), ops.end(), [](const auto& op) { return op->answered; }); }));
  }
  // Whether it was applied; replies are in the operations.
  bool atomic(std::vector<Operation*> ops) {
    AtomicBatch batch;
    batch.ops.assign(ops.begin(), ops.end());
    state->submit(&batch);
    EXPECT_TRUE(until([&] { return batch.answered; }));
    EXPECT_TRUE(batch.status.ok()) << batch.status.message;
    return batch.applied;
  }
  store::StateReply get(const std::string& key) { return ask(Operation(Verb::get, key)); }
  std::int64_t purge(std::size_t limit = 1'000'000) {
    std::optional<Result<std::int64_t>> out;
    state->purge(limit, [&](Result<std::int64_t> r) { out = std::move(r); });
    EXPECT_TRUE(until([&] { return out.has_value(); }));
    EXPECT_TRUE(out->ok()) << out->status().message;
    return out->ok() ? out->value() : -1;
  }
  store::StatePage scan(const store::SpaceRef& of, const std::string& kind, const std::string& prefix,
                        const std::string& cursor = {}, std::size_t page = 100) {
    std::optional<Result<store::StatePage>> out;
    state->scan(of, kind, prefix, cursor, page, [&](Result<store::StatePage> r) { out = std::move(r); });
    EXPECT_TRUE(until([&] { return out.has_value(); }));
    EXPECT_TRUE(out->ok()) << out->status().message;
    return out->ok() ? out->value() : store::StatePage{};
  }
  std::vector<store::DueKey> claim(std::size_t limit = 100, std::int64_t lease = 60'000,
                                   const std::string& kind = {}) {
    std::optional<Result<std::vector<store::DueKey>>> out;
    state->claim_due(space(), kind, limit, lease, [&](auto r) { out = std::move(r); });
    EXPECT_TRUE(until([&] { return out.has_value(); }));
    EXPECT_TRUE(out->ok()) << out->status().message;
    return out->ok() ? out->value() : std::vector<store::DueKey>{};
  }

  store::StateStore* const state;
};

}  // namespace ratesync::testing
