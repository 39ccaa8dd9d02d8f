// A memory store on a manual clock, asked without an engine.
#pragma once

#include <gtest/gtest.h>

#include <memory>

#include "ratesync/memory/memory_store.h"

namespace ratesync::memory {

struct Op final : store::AcquireOp {
  void done() override { ++answers; }
  int answers = 0;
};

struct Rig {
  Clock clock{true};
  MemoryStore store{clock};

  store::AcquireReply ask(const store::GroupRef& group, Nanos deadline = kForever, std::int64_t cost = 1) {
    Op op;
    op.group = group;
    op.cost = cost;
    op.deadline = deadline;
    store.acquire(&op);
    EXPECT_EQ(op.answers, 1);
    return op.reply;
  }
  store::Peek peek(const store::GroupRef& group) {
    store::Peek seen;
    store.peek(group, [&](Result<store::Peek> peek) { seen = peek.value(); });
    return seen;
  }
  void reset(const store::GroupRef& group) {
    store.reset(group, [](Result<store::Unit> done) { EXPECT_TRUE(done.ok()); });
  }
};

}  // namespace ratesync::memory
