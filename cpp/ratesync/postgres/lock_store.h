// Locks with fencing tokens in PostgreSQL: batches what arrives while a trip is under way, lets the server
// decide, deals the answers; remembers where this process stands in line. I/O thread only, but for the
// construction.
//
// Every operation may be sent twice: an acquisition knows itself by its id, a release by its mark, and a
// renewal is the same a second time. So an answer that was lost is asked for again, until the operation's
// deadline; only then it fails as in doubt.
#pragma once

#include <asio/steady_timer.hpp>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "ratesync/postgres/lanes.h"
#include "ratesync/postgres/listener.h"
#include "ratesync/postgres/lock_plan.h"
#include "ratesync/postgres/lock_sql.h"
#include "ratesync/postgres/prefix_backend.h"
#include "ratesync/store/lock_store.h"

namespace ratesync::postgres {

struct LockTrip;

class PgLockStore final : public store::LockStore, private Lanes<LockItem, LockTrip> {
 public:
  explicit PgLockStore(PrefixBackend& backend);
  ~PgLockStore() override;

  void submit(store::LockOp* op) override;
  bool abandon(store::LockOp* op) override;
  void list(const store::SpaceRef& space, std::size_t limit,
            store::Callback<std::vector<store::LockInfo>> done) override;
  void stop_waiting(const store::SpaceRef& space, const std::string& name) override;
  void on_freed(std::function<void(const store::Space&, const std::string& name)> listener) override {
    freed_ = std::move(listener);
  }
  [[nodiscard]] bool pushes() const override { return listener_.active(); }
  void initialize(store::Callback<store::Unit> done) override;

  // Fails what is queued with Code::closed and lets trips under way end, for `patience` at most.
  void close(Nanos patience, std::function<void()> done);
  void abandon_after_fork() { listener_.abandon_after_fork(); }
  void fill(store::Stats& stats) const { add_to(stats); }

 private:
  // A place in line is kept for a while after the process was told how long the lease still runs.
  struct Place {
    Nanos until = 0;
    bool bell = false;
  };

  // lock_store.cc: queueing
  void push(LockItem item);
  void fail(LockItem& item, const Status& status);
  void watch_deadline(Nanos deadline);
  void fail_overdue();
  void purge();
  const LockSql& sql();

  // Of Lanes
  const void* handle(const LockItem& item) const override { return item.op; }
  void each_key(const LockItem& item, const std::function<void(std::size_t)>& visit) const override;
  void fail_all(const LockItems& items, const Status& status) override;
  void lend(PgPool::OnLease use) override { backend_.lend(Facet::locks, alive_, std::move(use)); }
  Status explain(const PipelineResult& result) override { return backend_.explain(Facet::locks, result); }
  void start_round(const TripPtr& trip) override;
  void answered(const TripPtr& trip, PipelineResult result) override;
  void reached(const TripPtr& trip, const Status& status) override;
  void farewell(std::function<void()> done) override;

  // lock_deal.cc: rounds of a trip
  struct Dealt;
  std::vector<Call> build_calls(LockTrip& trip);
  void deal_keeps(LockTrip& trip, const Rows& rows, Dealt& dealt);
  void deal_takes(LockTrip& trip, const Rows& rows, Dealt& dealt);
  void deal_bells(const LockRound& round, Dealt& dealt);
  void deal_asked(const LockItems& items, const Rows& rows, bool queue, Dealt& dealt);
  void failed(const TripPtr& trip, const PipelineResult& result);
  void doubt(const LockItems& items);

  // lock_waiters.cc
  void remember(const std::string& key, Nanos lease, bool bell = false);
  void forget(const std::string& key);
  void tell(const std::string& key);
  void heard(const std::string& payload);
  void ask_everybody();
  void refresh_later();
  void refresh();

  PrefixBackend& backend_;
  // Pipelines under way point into the statements, so older sets are kept.
  std::vector<std::unique_ptr<LockSql>> all_sql_;
  bool sql_waiters_ = false;
  std::function<void(const store::Space&, const std::string&)> freed_;
  std::unordered_map<std::string, Place> waiting_;  // by key: the server remembers us there
  std::mt19937_64 marks_;
  const std::int64_t me_;  // as a waiter
  const std::string channel_;
  std::unique_ptr<asio::steady_timer> timer_, refresh_timer_;
  Nanos watched_ = kForever;
  bool refreshing_ = false;
  Nanos purge_at_ = 0;
  std::string purge_from_;  // key
  Listener listener_;
};

}  // namespace ratesync::postgres
