// What the tests of waiting share: LimitService on one thread with a hand-moved clock, a place where
// results arrive, and SlowStore.
//
// SlowStore stands for the *timing* of a remote store: it answers when the test says so, or never.
// What it answers is what the test scripts; it decides nothing itself.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <asio/io_context.hpp>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "inbox.h"
#include "ratesync/engine/limit_service.h"
#include "ratesync/engine/multi_service.h"

namespace ratesync::engine {

class SlowStore final : public store::Store, public store::LimitStore {
 public:
  explicit SlowStore(const Clock&) {}
  store::Capabilities capabilities() const override {
    store::Capabilities caps;
    caps.limits = caps.shared = true;
    return caps;
  }
  void initialize(store::Callback<store::Unit> done) override { done(store::Unit{}); }
  void migrate(bool, store::Callback<std::vector<store::MigrationStep>> done) override {
    done(std::vector<store::MigrationStep>{});
  }
  void doctor(store::Callback<std::vector<store::Finding>> done) override {
    done(std::vector<store::Finding>{});
  }
  store::Stats stats() const override { return {}; }
  void close(std::function<void()> done) override { done(); }
  void abandon_after_fork() override {}
  bool down() const override { return false; }
  store::LimitStore* limits() override { return this; }

  void acquire(store::AcquireOp* op) override {
    ++questions;
    asked.push_back(op);
  }
  bool abandon(store::AcquireOp* op) override { return can_abandon && std::erase(asked, op) == 1; }
  void acquire_all(store::AcquireAllOp* op) override {
    ++questions;
    asked_all.push_back(op);
  }
  bool abandon(store::AcquireAllOp* op) override { return can_abandon && std::erase(asked_all, op) == 1; }
  void release(const store::GroupRef&, store::HolderId) override { ++released; }
  void stop_waiting(const store::GroupRef& group) override { stopped.push_back(group->id); }
  void on_freed(std::function<void(const std::string&)> listener) override { freed = std::move(listener); }
  bool pushes() const override { return tells; }
  std::int64_t refund(const store::GroupRef&, std::int64_t cost, std::int64_t stamp) override {
    refunds.push_back(stamp);
    return stamp - cost;
  }
  void settle(const store::GroupRef&, std::int64_t, store::Callback<store::Unit> done) override {
    done(store::Unit{});
  }
  void peek(const store::GroupRef&, store::Callback<store::Peek> done) override { done(store::Peek{}); }
  void reset(const store::GroupRef&, store::Callback<store::Unit> done) override { done(store::Unit{}); }
  void list(std::size_t, store::Callback<store::Listing> done) override { done(store::Listing{}); }
  void on_lost(std::function<void(const std::string&, store::HolderId)> listener) override {
    lost = std::move(listener);
  }

  // The oldest question is answered.
  void answer(store::AcquireReply reply) {
    ASSERT_FALSE(asked.empty());
    store::AcquireOp* op = asked.front();
    asked.pop_front();
    op->reply = std::move(reply);
    op->done();
  }
  void grant(Nanos wait = 0, std::int64_t stamp = 0, store::HolderId holder = 7) {
    store::AcquireReply reply;
    reply.wait = wait;
    reply.stamp = stamp;
    reply.holder = holder;
    answer(std::move(reply));
  }
  void refuse(store::Verdict why) {
    store::AcquireReply reply;
    reply.verdict = why;
    answer(std::move(reply));
  }
  void fail(Code code, std::string sqlstate = {}) {
    store::AcquireReply reply;
    reply.status = Status::make(code, "scripted", std::move(sqlstate));
    answer(std::move(reply));
  }

  // The oldest question about several limits is answered. Granted: each part says what is left; refused:
  // the parts named in `why` say so, with their times, and the others that they would have been granted.
  void grant_all(std::int64_t stamp = 0, std::int64_t remaining = 1000, store::HolderId holder = 7) {
    answer_all([&](store::AcquireAllOp& op) {
      op.granted = true;
      for (std::size_t i = 0; i < op.parts.size(); ++i) {
        op.replies[i].stamp = stamp;
        op.replies[i].remaining = remaining;
        if (op.parts[i].group->params.has_concurrency()) op.replies[i].holder = holder;
      }
    });
  }
  void refuse_all(const std::map<std::string, Nanos>& late, const std::set<std::string>& full = {}) {
    answer_all([&](store::AcquireAllOp& op) {
      for (std::size_t i = 0; i < op.parts.size(); ++i) {
        const std::string& id = op.parts[i].group->id;
        if (late.contains(id)) {
          op.replies[i].verdict = store::Verdict::rate_limited;
          op.replies[i].retry_after = late.at(id);
        } else if (full.contains(id)) {
          op.replies[i].verdict = store::Verdict::concurrency_full;
        }
      }
    });
  }
  void fail_all(Code code, std::string sqlstate = {}) {
    answer_all(
        [&](store::AcquireAllOp& op) { op.status = Status::make(code, "scripted", std::move(sqlstate)); });
  }
  void answer_all(const std::function<void(store::AcquireAllOp&)>& fill) {
    ASSERT_FALSE(asked_all.empty());
    store::AcquireAllOp* op = asked_all.front();
    asked_all.pop_front();
    op->replies.assign(op->parts.size(), {});
    fill(*op);
    op->done();
  }

  std::deque<store::AcquireOp*> asked;
  std::deque<store::AcquireAllOp*> asked_all;
  std::function<void(const std::string&)> freed;
  std::vector<std::string> stopped;  // groups nobody waits for any more
  bool tells = false;                // of slots freed elsewhere
  int questions = 0;                 // asked so far
  std::vector<std::int64_t> refunds;
  std::function<void(const std::string&, store::HolderId)> lost;
  int released = 0;
  bool can_abandon = false;
};

template <class StoreType>
class Rig : public HandMoved {
 public:
  explicit Rig(limits::Params params, Policy policy = {}) : store(clock), service(store, timers, 1) {
    limiter->group = std::make_shared<const store::Group>("g", params);
    limiter->policy = policy;
    limiter->service = &service;
  }
  ~Rig() {
    service.shutdown();
    inbox->forget();
  }
  AcquireTask* start(Nanos timeout = kForever, std::int64_t cost = 1) {
    auto* task = new AcquireTask(limiter);
    task->group = limiter->group;
    task->cost = cost;
    task->submitted = clock.now();
    task->deadline = saturating_add(clock.now(), timeout);
    task->target = inbox;
    service.start(task);
    return task;
  }
  bool done(const AcquireTask* task) const { return inbox->has(task); }

  StoreType store;
  std::shared_ptr<Inbox> inbox = std::make_shared<Inbox>();
  LimiterRef limiter = std::make_shared<LimiterCore>();
  LimitService service;
};

inline limits::Params params(double rate, std::int64_t concurrent, std::int64_t burst = 1) {
  limits::Params p;
  p.rate_per_second = rate;
  p.max_concurrent = concurrent;
  p.burst = burst;
  p.timing_margin = 0;
  return p;
}

struct Slow : Rig<SlowStore> {
  explicit Slow(limits::Params p = params(0, 2), Policy policy = {}) : Rig(p, policy) {}
  ~Slow() {
    // What the store still has is answered at the latest when it closes.
    service.shutdown();
    while (!store.asked.empty()) store.fail(Code::closed);
  }
};

}  // namespace ratesync::engine
