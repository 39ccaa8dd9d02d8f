// SlowState stands for the *timing* of a remote store of state: it sends and answers when the test says so,
// or never. What it answers is what the test scripts; it decides nothing itself.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "ratesync/engine/state_service.h"

namespace ratesync::engine {

class SlowState final : public store::StateStore {
 public:
  ~SlowState() override { EXPECT_TRUE(ops.empty() && batches.empty()) << "the store still has operations"; }

  void submit(store::StateOp* op) override {
    if (prompt) return answer_now(op, 1);
    ops.push_back(op);
    if (sends) sent.insert(op);
  }
  void submit(store::StateBatch* batch) override {
    batches.push_back(batch);
    if (sends) sent.insert(batch);
  }
  bool abandon(store::StateOp* op) override { return !is_sent(op) && std::erase(ops, op) == 1; }
  bool abandon(store::StateBatch* batch) override {
    return !is_sent(batch) && std::erase(batches, batch) == 1;
  }
  void scan(const store::SpaceRef&, const std::string&, const std::string&, const std::string&, std::size_t,
            store::Callback<store::StatePage> done) override {
    done(store::StatePage{});
  }
  void claim_due(const store::SpaceRef&, const std::string&, std::size_t, std::int64_t,
                 store::Callback<std::vector<store::DueKey>> done) override {
    done(std::vector<store::DueKey>{});
  }
  void purge(std::size_t, store::Callback<std::int64_t> done) override { done(std::int64_t{0}); }
  void initialize(store::Callback<store::Unit> done) override { done(store::Unit{}); }

  void send_all() {
    for (store::StateOp* op : ops)
      if (!is_sent(op)) sent.insert(op);
    for (store::StateBatch* batch : batches)
      if (!is_sent(batch)) sent.insert(batch);
  }
  void answer(store::StateOp* op, std::int64_t version) {
    ASSERT_EQ(std::erase(ops, op), 1u);
    sent.erase(op);
    answer_now(op, version);
  }
  void answer_all() {
    while (!ops.empty()) answer(ops.front(), 1);
    while (!batches.empty()) answer(batches.front());
  }
  void answer(store::StateBatch* batch) {
    std::erase(batches, batch);
    sent.erase(batch);
    batch->applied = true;
    for (store::StateOp* op : batch->ops) op->reply.version = 1;
    batch->done();
  }
  bool is_sent(const void* what) const { return sent.count(what) > 0; }

  std::vector<store::StateOp*> ops;
  std::vector<store::StateBatch*> batches;
  std::set<const void*> sent;
  bool sends = false;   // at once
  bool prompt = false;  // answers inside submit()

 private:
  static void answer_now(store::StateOp* op, std::int64_t version) {
    op->reply.version = version;
    op->done();
  }
};

}  // namespace ratesync::engine
