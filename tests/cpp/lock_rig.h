// Processes that take locks, for tests: what one does and is told.
#pragma once

#include "limit_rig.h"

namespace ratesync::testing {

using Got = store::LockReply::Outcome;

// One operation. `answered` is set by done(); `then` runs after it.
struct LockCall final : store::LockOp {
  void done() override {
    answered = true;
    if (then) then(*this);
  }
  bool answered = false;
  std::function<void(LockCall&)> then;
};

inline std::int64_t next_id() {
  static std::atomic<std::int64_t> id{1'000};
  return ++id;
}

inline store::SpaceRef space(std::string name_space = "default", std::string tenant = "default") {
  return std::make_shared<const store::Space>(store::Space{std::move(name_space), std::move(tenant)});
}

// The locks of one process.
struct Locks {
  using Verb = store::LockOp::Verb;
  Locks(Process& process, const std::string& prefix = "acteon_")
      : p(process), store(process.store->locks(prefix).value()) {
    store->on_freed([this](const store::Space&, const std::string& name) { told.push_back(name); });
  }
  static void set(LockCall& call, store::LockOp::Verb verb, const std::string& name, std::int64_t ttl,
                  std::int64_t token = 0) {
    call.verb = verb;
    call.space = space();
    call.name = name;
    call.ttl = ttl;
    call.token = token;
    if (verb == store::LockOp::Verb::acquire) call.id = next_id();
  }
  store::LockReply run(LockCall& call) {
    store->submit(&call);
    EXPECT_TRUE(p.until([&] { return call.answered; }));
    return call.reply;
  }
  store::LockReply ask(store::LockOp::Verb verb, const std::string& name, std::int64_t ttl,
                       std::int64_t token = 0, std::int64_t id = 0, bool queued = false) {
    LockCall call;
    set(call, verb, name, ttl, token);
    if (id != 0) call.id = id;
    call.queued = queued;
    const store::LockReply reply = run(call);
    EXPECT_TRUE(reply.status.ok()) << reply.status.message;
    return reply;
  }
  store::LockReply acquire(const std::string& name, std::int64_t ttl = 60'000, std::int64_t id = 0) {
    return ask(store::LockOp::Verb::acquire, name, ttl, 0, id);
  }
  store::LockReply queue(const std::string& name, std::int64_t ttl = 60'000) {
    return ask(store::LockOp::Verb::acquire, name, ttl, 0, 0, true);
  }
  store::LockReply renew(const std::string& name, std::int64_t token, std::int64_t ttl = 60'000) {
    return ask(store::LockOp::Verb::renew, name, ttl, token);
  }
  Got release(const std::string& name, std::int64_t token) {
    return ask(store::LockOp::Verb::release, name, 0, token).outcome;
  }
  Got break_lock(const std::string& name, std::int64_t token = 0) {
    return ask(store::LockOp::Verb::break_, name, 0, token).outcome;
  }
  std::vector<store::LockInfo> list(const store::SpaceRef& of = nullptr, std::size_t limit = 100) {
    std::optional<Result<std::vector<store::LockInfo>>> out;
    store->list(of, limit, [&](auto r) { out = std::move(r); });
    EXPECT_TRUE(p.until([&] { return out.has_value(); }));
    EXPECT_TRUE(out->ok()) << out->status().message;
    return out->ok() ? out->value() : std::vector<store::LockInfo>{};
  }
  // All at once; every one is answered.
  std::vector<std::unique_ptr<LockCall>> all(std::vector<std::unique_ptr<LockCall>> calls) {
    std::size_t answered = 0;
    for (auto& call : calls) call->then = [&](LockCall&) { ++answered; };
    for (auto& call : calls) store->submit(call.get());
    EXPECT_TRUE(p.until([&] { return answered == calls.size(); }));
    for (auto& call : calls) call->then = nullptr;
    return calls;
  }
  void stand(const std::string& bell) { EXPECT_EQ(ask(Verb::stand, bell, 0).outcome, Got::taken); }
  void ring(const std::string& bell) { EXPECT_EQ(ask(Verb::ring, bell, 0).outcome, Got::held); }
  // In line, and hearing.
  void stand_in_line(const std::string& name) {
    ASSERT_EQ(queue(name).outcome, Got::taken);
    ASSERT_TRUE(p.until([&] { return store->pushes(); }));
    ASSERT_TRUE(p.until([&] { return !told.empty(); })) << "asked once, for what was missed";
    ASSERT_EQ(queue(name).outcome, Got::taken);
    told.clear();
  }

  Process& p;
  store::LockStore* store;
  std::vector<std::string> told;
};

struct LockProcess : Process {
  explicit LockProcess(const Schema& schema,
                       const std::function<void(postgres::PostgresOptions&)>& change = {},
                       const std::string& role = {})
      : Process(schema, change, role), locks(*this) {}
  Locks locks;
};

}  // namespace ratesync::testing
