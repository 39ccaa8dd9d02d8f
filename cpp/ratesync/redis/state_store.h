// Rows of state and timeouts in Redis, for one prefix. I/O thread only. state_store.cc: single operations
// and batches; state_scan.cc: whole kinds; state_due.cc: timeouts that fell due; state_purge.cc.
// How they travel: lanes.h. What they do: lua/state.lua.
#pragma once

#include <asio/io_context.hpp>
#include <asio/steady_timer.hpp>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ratesync/redis/lanes.h"
#include "ratesync/redis/state_keys.h"
#include "ratesync/store/state_store.h"

namespace ratesync::redis {

struct StateStoreOptions {
  std::string prefix;
  std::string hash_tag;
  Nanos call_timeout = 5 * kSecond;
  Nanos purge_every = 10 * kSecond;
  Nanos purge_first = kSecond;  // after the first operation, at most
  // Rows are cleared away no earlier after their end: who has held one still finds its version.
  Nanos purge_after = 60 * kSecond;
};

class RedisStateStore final : public store::StateStore, private LaneHost {
 public:
  RedisStateStore(asio::io_context& io, const Clock& clock, LimitBackend& backend, StateStoreOptions options);
  ~RedisStateStore() override;

  void submit(store::StateOp* op) override;
  void submit(store::StateBatch* batch) override;
  bool abandon(store::StateOp* op) override { return lanes_.cancel(op); }
  bool abandon(store::StateBatch* batch) override { return lanes_.cancel(batch); }
  void scan(const store::SpaceRef& space, const std::string& kind, const std::string& prefix,
            const std::string& cursor, std::size_t page_size,
            store::Callback<store::StatePage> done) override;
  void claim_due(const store::SpaceRef& space, const std::string& kind, std::size_t limit, std::int64_t lease,
                 store::Callback<std::vector<store::DueKey>> done) override;
  void purge(std::size_t limit, store::Callback<std::int64_t> done) override;
  void initialize(store::Callback<store::Unit> done) override;

  void close(Nanos patience, std::function<void()> done);
  void fill(store::Stats& stats) const { lanes_.fill(stats); }
  void abandon_after_fork();
  // Bytes of names that one scan held at once so far, at most.
  [[nodiscard]] std::size_t most_names() const { return most_names_; }

 private:
  // Names of keys that a scan found and has not delivered, in order.
  struct Listing {
    std::string name;
    std::vector<std::string> keys;
    std::size_t next = 0;
    std::size_t bytes = 0;
    bool complete = true;  // no name follows them
  };
  struct FirstNames;
  struct Scan;
  struct Claiming;
  struct Purge;

  // LaneHost
  [[nodiscard]] const Script& script() const override;
  void begin(CallWriter& to) override;
  bool write(const LaneItem& item, bool looking, CallWriter& to) override;
  Heard read(const LaneItem& item, bool looking, Answers& from) override;
  [[nodiscard]] Nanos deadline(const LaneItem& item) const override;
  [[nodiscard]] std::size_t bytes(const LaneItem& item) const override;
  void tell(const LaneItem& item, const Status& status) override;
  std::pair<LaneItem, std::shared_ptr<void>> ghost(const LaneItem& item) override;

  bool write_op(const store::StateOp& op, bool looking, CallWriter& to) const;
  Heard read_op(store::StateOp& op, bool looking, Answers& from) const;
  std::int64_t read_row(store::StateReply& reply, Answers& from, std::string* id) const;
  Heard look_at(store::StateOp& op, const std::string& id, bool living) const;
  Heard look_at_batch(store::StateBatch& batch, Answers& from) const;
  void take_shard(std::uint32_t bucket, CallWriter& to) const;

  // state_scan.cc
  void list_keys(const std::shared_ptr<Scan>& scan);
  void next_page(const std::shared_ptr<Scan>& scan);
  void page_read(const std::shared_ptr<Scan>& scan);
  void keep(Listing listing);

  // state_due.cc
  void look_for_due(const std::shared_ptr<Claiming>& all);
  void claim_found(const std::shared_ptr<Claiming>& all);

  // state_purge.cc
  void arm_purge();
  void purge_in_background();
  void purge_shard(const std::shared_ptr<Purge>& all);

  asio::io_context& io_;
  const Clock& clock_;
  LimitBackend& backend_;
  const StateStoreOptions options_;
  const StateKeys keys_;
  Lanes lanes_;
  std::list<Listing> listings_;
  std::size_t most_names_ = 0;
  std::unique_ptr<asio::steady_timer> purge_timer_;
  bool used_ = false;
  bool purged_ = false;
  bool closing_ = false;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace ratesync::redis
