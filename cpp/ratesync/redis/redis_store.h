// One configured Redis store: its connections, and the capabilities on top of them.
//
// The server is looked at once, before the first call, and again after a call was not answered.
#pragma once

#include <asio/io_context.hpp>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "ratesync/base/clock.h"
#include "ratesync/redis/commander.h"
#include "ratesync/redis/limit_store.h"
#include "ratesync/redis/lock_store.h"
#include "ratesync/redis/state_store.h"
#include "ratesync/store/store.h"

namespace ratesync::redis {

struct RedisOptions {
  std::string url;
  int db = 0;            // the url's wins
  std::string password;  // the url's wins
  std::string key_prefix = "rate_limit";
  std::string hash_tag;  // one slot of a Cluster for all keys of the store
  std::size_t pool_max_size = 10;
  Nanos socket_timeout = 5 * kSecond;
  Nanos socket_connect_timeout = 5 * kSecond;
};

class RedisStore final : public store::Store, private LimitBackend {
 public:
  // Checks the options; connects nothing.
  static Result<std::unique_ptr<store::Store>> create(asio::io_context& io, const Clock& clock,
                                                      RedisOptions options);
  ~RedisStore() override;

  [[nodiscard]] store::Capabilities capabilities() const override;
  void initialize(store::Callback<store::Unit> done) override;
  void migrate(bool dry_run, store::Callback<std::vector<store::MigrationStep>> done) override;
  void doctor(store::Callback<std::vector<store::Finding>> done) override;
  [[nodiscard]] store::Stats stats() const override;
  void close(std::function<void()> done) override;
  void abandon_after_fork() override;
  [[nodiscard]] bool down() const override { return commander_->down(); }
  [[nodiscard]] store::LimitStore* limits() override { return limits_.get(); }
  Result<store::StateStore*> state(const std::string& prefix) override;
  Result<store::LockStore*> locks(const std::string& prefix) override;

 private:
  RedisStore(asio::io_context& io, const Clock& clock, RedisOptions options,
             std::unique_ptr<Commander> commander);
  template <class Each>
  void each_capability(Each&& each) const;

  // LimitBackend
  [[nodiscard]] bool ready() const override { return ready_; }
  void when_ready(std::function<void(Status)> done) override;
  void not_answered() override;
  Commander& commander() override { return *commander_; }

  void look_at_version();
  void checked(const Status& status);
  [[nodiscard]] Nanos deadline() const { return saturating_add(clock_.now(), options_.socket_timeout); }

  asio::io_context& io_;
  const Clock& clock_;
  const RedisOptions options_;
  std::unique_ptr<Commander> commander_;
  bool ready_ = false;
  bool known_ = false;  // the version was found good
  bool checking_ = false;
  std::vector<std::function<void(Status)>> waiting_;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
  std::unique_ptr<RedisLimitStore> limits_;
  mutable std::mutex lock_;  // of the maps: any thread may ask for a prefix
  std::map<std::string, std::unique_ptr<RedisStateStore>> states_;
  std::map<std::string, std::unique_ptr<RedisLockStore>> locks_;
};

}  // namespace ratesync::redis
