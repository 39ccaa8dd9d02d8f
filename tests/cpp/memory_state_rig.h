// State of the memory store on a manual clock, asked without an engine.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ratesync/memory/memory_store.h"

namespace ratesync::memory {

using store::StateReply;
using Verb = store::StateOp::Verb;
using Outcome = StateReply::Outcome;

struct StateCall final : store::StateOp {
  void done() override { ++answers; }
  int answers = 0;
};

struct BatchCall final : store::StateBatch {
  void done() override { ++answers; }
  int answers = 0;
};

inline store::Value text(std::string data) { return {store::Value::Type::text, std::move(data), 0}; }
inline store::Value integer(std::int64_t number) { return {store::Value::Type::integer, {}, number}; }

struct StateRig {
  Clock clock{true};
  MemoryStore store{clock};
  store::StateStore& state = *store.state("t_").value();
  MemoryState& memory = static_cast<MemoryState&>(state);
  store::SpaceRef space = std::make_shared<const store::Space>();

  void pass(std::int64_t ms) { clock.advance(ms * kMilli); }
  [[nodiscard]] std::int64_t now() const { return clock.wall(clock.now()) / kMilli; }

  StateCall op(Verb verb, const std::string& key) {
    StateCall call;
    call.verb = verb;
    call.space = space;
    call.kind = own_kind;
    call.key = key;
    call.id = ++ids;
    call.value = text("v");
    return call;
  }
  StateReply run(StateCall call) {
    state.submit(&call);
    EXPECT_EQ(call.answers, 1);
    EXPECT_TRUE(call.reply.status.ok());
    return call.reply;
  }
  StateReply get(const std::string& key) { return run(op(Verb::get, key)); }
  StateReply create(const std::string& key, std::int64_t ttl = store::kNoTtl) {
    StateCall call = op(Verb::create, key);
    call.ttl = ttl;
    return run(std::move(call));
  }
  StateReply set(const std::string& key, store::Value value, std::int64_t ttl = store::kNoTtl) {
    StateCall call = op(Verb::set, key);
    call.value = std::move(value);
    call.ttl = ttl;
    return run(std::move(call));
  }
  StateReply swap(const std::string& key, std::int64_t expected, std::int64_t ttl = store::kKeepTtl,
                  bool revive = false) {
    StateCall call = op(Verb::swap, key);
    call.value = text("swapped");
    call.expected = expected;
    call.ttl = ttl;
    call.revive = revive;
    return run(std::move(call));
  }
  StateReply remove(const std::string& key, std::int64_t expected = store::kAnyVersion) {
    StateCall call = op(Verb::remove, key);
    call.expected = expected;
    return run(std::move(call));
  }
  StateReply add(const std::string& key, std::int64_t delta, std::int64_t ttl = store::kNoTtl,
                 bool renew = false) {
    StateCall call = op(Verb::add, key);
    call.delta = delta;
    call.ttl = ttl;
    call.renew = renew;
    return run(std::move(call));
  }
  StateReply touch(const std::string& key, std::int64_t ttl, std::int64_t expected = store::kAnyVersion) {
    StateCall call = op(Verb::touch, key);
    call.ttl = ttl;
    call.expected = expected;
    return run(std::move(call));
  }
  StateReply schedule(const std::string& key, std::int64_t due, bool due_in = false,
                      const std::string& kind = "k") {
    StateCall call = op(Verb::schedule, key);
    call.kind = kind;
    call.due = due;
    call.due_in = due_in;
    return run(std::move(call));
  }
  StateReply unschedule(const std::string& key, std::int64_t claim = 0) {
    StateCall call = op(Verb::unschedule, key);
    call.expected = claim;
    return run(std::move(call));
  }
  std::vector<store::DueKey> claim_due(std::size_t limit, std::int64_t lease, const std::string& kind = "") {
    std::vector<store::DueKey> out;
    state.claim_due(space, kind, limit, lease, [&](auto due) { out = std::move(due.value()); });
    return out;
  }
  std::int64_t purge(std::size_t limit = 1'000'000'000) {
    std::int64_t out = -1;
    state.purge(limit, [&](auto count) { out = count.value(); });
    return out;
  }
  Result<store::StatePage> page(const std::string& prefix, const std::string& cursor, std::size_t size,
                                const std::string& kind = "k") {
    Result<store::StatePage> out = Status::make(Code::internal, "no answer");
    state.scan(space, kind, prefix, cursor, size, [&](auto page) { out = std::move(page); });
    return out;
  }
  // The keys of a whole scan.
  std::vector<std::string> keys(const std::string& prefix = "", std::size_t size = 3,
                                const std::string& kind = "k") {
    std::vector<std::string> out;
    std::string cursor;
    do {
      auto seen = page(prefix, cursor, size, kind);
      EXPECT_TRUE(seen.ok());
      for (const store::StateRow& row : seen.value().rows) out.push_back(row.key);
      EXPECT_LE(seen.value().rows.size(), size);
      cursor = seen.value().cursor;
    } while (!cursor.empty());
    return out;
  }
  // True: applied.
  bool batch(const std::vector<StateCall*>& calls) {
    BatchCall all;
    all.ops.assign(calls.begin(), calls.end());
    state.submit(&all);
    EXPECT_EQ(all.answers, 1);
    EXPECT_TRUE(all.status.ok());
    for (const StateCall* call : calls) EXPECT_EQ(call->answers, 0);
    return all.applied;
  }

  std::int64_t ids = 0;
  const std::string own_kind = "k";
};

}  // namespace ratesync::memory
