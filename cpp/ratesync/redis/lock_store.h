// Locks in Redis, for one prefix. I/O thread only. How operations travel: lanes.h. What they do:
// lua/locks.lua. Who waits is told by the server, in a channel of this process.
#pragma once

#include <asio/io_context.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "ratesync/redis/lanes.h"
#include "ratesync/redis/state_keys.h"
#include "ratesync/store/lock_store.h"

namespace ratesync::redis {

struct LockStoreOptions {
  std::string prefix;
  std::string hash_tag;
  std::string holder;  // who we are, for people
  Nanos call_timeout = 5 * kSecond;
};

class RedisLockStore final : public store::LockStore, private LaneHost {
 public:
  RedisLockStore(asio::io_context& io, const Clock& clock, LimitBackend& backend, LockStoreOptions options);
  ~RedisLockStore() override;

  void submit(store::LockOp* op) override;
  bool abandon(store::LockOp* op) override { return lanes_.cancel(op); }
  void list(const store::SpaceRef& space, std::size_t limit,
            store::Callback<std::vector<store::LockInfo>> done) override;
  void stop_waiting(const store::SpaceRef& space, const std::string& name) override;
  void on_freed(std::function<void(const store::Space&, const std::string& name)> listener) override;
  [[nodiscard]] bool pushes() const override;
  void initialize(store::Callback<store::Unit> done) override;

  void close(Nanos patience, std::function<void()> done) { lanes_.close(patience, std::move(done)); }
  void fill(store::Stats& stats) const { lanes_.fill(stats); }
  void abandon_after_fork() { lanes_.abandon_after_fork(); }

 private:
  struct Leave;
  struct Gathering;

  // LaneHost
  [[nodiscard]] const Script& script() const override;
  void begin(CallWriter& to) override;
  bool write(const LaneItem& item, bool looking, CallWriter& to) override;
  Heard read(const LaneItem& item, bool looking, Answers& from) override;
  [[nodiscard]] Nanos deadline(const LaneItem& item) const override;
  [[nodiscard]] std::size_t bytes(const LaneItem& item) const override;
  void tell(const LaneItem& item, const Status& status) override;
  std::pair<LaneItem, std::shared_ptr<void>> ghost(const LaneItem& item) override;

  void listen();
  void read_locks(const std::shared_ptr<Gathering>& all, const std::vector<std::string>& locks);

  const Clock& clock_;
  LimitBackend& backend_;
  const LockStoreOptions options_;
  const std::string process_;
  const StateKeys keys_;
  Lanes lanes_;
  std::function<void(const store::Space&, const std::string&)> freed_;
  bool listening_ = false;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace ratesync::redis
