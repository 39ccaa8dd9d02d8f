// What the tests of locks share: a LockStore that answers when the test says so, a place where results
// arrive, and LockService on one thread with a hand-moved clock.
//
// SlowLocks stands for the *timing* of a remote store: what it answers is what the test scripts.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <asio/io_context.hpp>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "inbox.h"
#include "ratesync/engine/lock_service.h"

namespace ratesync::engine {

class SlowLocks final : public store::LockStore {
 public:
  using Verb = store::LockOp::Verb;
  using Outcome = store::LockReply::Outcome;

  void submit(store::LockOp* op) override {
    asked.push_back(op);
    ++questions;
  }
  bool abandon(store::LockOp* op) override { return can_abandon && std::erase(asked, op) == 1; }
  void list(const store::SpaceRef&, std::size_t,
            store::Callback<std::vector<store::LockInfo>> done) override {
    done(std::vector<store::LockInfo>{});
  }
  void stop_waiting(const store::SpaceRef&, const std::string& name) override { stopped.push_back(name); }
  void on_freed(std::function<void(const store::Space&, const std::string&)> listener) override {
    listener_ = std::move(listener);
  }
  bool pushes() const override { return tells; }
  void initialize(store::Callback<store::Unit> done) override { done(store::Unit{}); }

  void freed(const std::string& name) { listener_(store::Space{}, name); }
  // What is asked, oldest first, as "acquire a, release a".
  [[nodiscard]] std::string pending() const {
    std::string out;
    for (const store::LockOp* op : asked) {
      const char* verb = op->verb == Verb::acquire   ? "acquire "
                         : op->verb == Verb::renew   ? "renew "
                         : op->verb == Verb::release ? "release "
                         : op->verb == Verb::stand   ? "stand "
                         : op->verb == Verb::ring    ? "ring "
                                                     : "break ";
      out += (out.empty() ? "" : ", ") + std::string(verb) + op->name;
    }
    return out;
  }
  // The oldest question is answered.
  void answer(store::LockReply reply) {
    ASSERT_FALSE(asked.empty());
    store::LockOp* op = asked.front();
    asked.pop_front();
    op->reply = std::move(reply);
    op->done();
  }
  void hold(std::int64_t remaining = 0) {
    store::LockReply reply;
    reply.token = ++tokens;
    reply.remaining = remaining;
    answer(std::move(reply));
  }
  void done() { answer({}); }  // renewed, or released
  void taken(std::int64_t remaining = 10'000) {
    store::LockReply reply;
    reply.outcome = Outcome::taken;
    reply.remaining = remaining;
    reply.holder = "elsewhere";
    answer(std::move(reply));
  }
  void lost() {
    store::LockReply reply;
    reply.outcome = Outcome::lost;
    answer(std::move(reply));
  }
  void fail(Code code) {
    store::LockReply reply;
    reply.status = Status::make(code, "scripted");
    answer(std::move(reply));
  }

  std::deque<store::LockOp*> asked;
  std::vector<std::string> stopped;
  int questions = 0;
  std::int64_t tokens = 0;
  bool tells = true;  // of locks freed elsewhere
  bool can_abandon = false;

 private:
  std::function<void(const store::Space&, const std::string&)> listener_;
};

// A Keeper on one thread with a hand-moved clock.
struct KeeperRig : HandMoved {
  LossSignal* signal(const KeptRef& kept) {
    auto* task = new LossSignal(kept);
    task->target = arrivals;
    task->start();
    return task;
  }
  Extension* extend(const KeptRef& kept, std::int64_t ttl_ms) {
    auto* task = new Extension(kept, ttl_ms);
    task->target = arrivals;
    task->start();
    return task;
  }
  Kept::Fate fate(const KeptRef& kept) const { return kept->fate(clock.now()); }

  Keeper keeper{timers, 1};
  std::shared_ptr<Inbox> arrivals = std::make_shared<Inbox>();
};

struct LockRig : KeeperRig {
  LockRig() = default;
  ~LockRig() {
    // What the store still has is answered at the latest when it closes.
    keeper.shutdown();
    bool said_goodbye = false;
    service.shutdown([&] { said_goodbye = true; });
    while (!locks.asked.empty()) locks.fail(Code::closed);
    EXPECT_TRUE(said_goodbye);
    arrivals->forget();
  }
  LockAcquire* start(Nanos timeout = kForever, const std::string& name = "a", std::int64_t ttl_ms = 30'000,
                     bool auto_renew = true) {
    auto* task = new LockAcquire(service);
    task->space = space;
    task->name = name;
    task->lease_ms = ttl_ms;
    task->auto_renew = auto_renew;
    task->submitted = clock.now();
    task->until = saturating_add(clock.now(), timeout);
    task->target = arrivals;
    task->start();
    return task;
  }
  HeldLockRef held(const std::string& name = "a", std::int64_t ttl_ms = 30'000, bool auto_renew = true) {
    LockAcquire* task = start(kForever, name, ttl_ms, auto_renew);
    locks.hold();
    EXPECT_TRUE(done(task));
    return task->lease;
  }
  LockRelease* release(const HeldLockRef& lease, bool leaving = false) {
    auto* task = new LockRelease(lease, leaving);
    task->target = arrivals;
    task->start();
    return task;
  }
  [[nodiscard]] bool done(const Completion* task) const { return arrivals->has(task); }
  [[nodiscard]] bool got(const LockAcquire* task) const { return done(task) && task->lease != nullptr; }
  [[nodiscard]] bool late(const LockAcquire* task) const {
    return done(task) && task->outcome == LockAcquire::Outcome::not_in_time && !task->lease;
  }
  [[nodiscard]] Code failed(const LockAcquire* task) const {
    return done(task) && task->outcome == LockAcquire::Outcome::failed ? task->status.code : Code::ok;
  }

  SlowLocks locks;
  store::SpaceRef space = std::make_shared<const store::Space>();
  LockService service{locks, keeper, timers, true, [](const std::function<void()>& work) { work(); }, 1};
};

}  // namespace ratesync::engine
