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

#include "ratesync/batch/batcher.h"
#include "ratesync/postgres/gather.h"
#include "ratesync/postgres/listener.h"
#include "ratesync/postgres/lock_plan.h"
#include "ratesync/postgres/lock_sql.h"
#include "ratesync/postgres/prefix_backend.h"
#include "ratesync/store/lock_store.h"

namespace ratesync::postgres {

class PgLockStore final : public store::LockStore {
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
  void fill(store::Stats& stats) const;

 private:
  using ItemBatcher = batch::Batcher<LockItem>;
  struct Lane {
    Lane(const batch::BatcherOptions& options, asio::io_context& io) : batcher(options), gather(io) {}
    ItemBatcher batcher;
    bool busy = false;  // a trip is under way or waits for its connection
    Gather gather;
  };
  struct Trip;
  using TripPtr = std::shared_ptr<Trip>;
  struct Queued {
    Lane* lane;
    batch::Ticket ticket;
  };
  // A place in line is kept for a while after the process was told how long the lease still runs.
  struct Place {
    Nanos until = 0;
  };

  // lock_store.cc: queueing
  Lane& lane_of(const std::string& key);
  void push(LockItem item);
  void fail(LockItem& item, const Status& status);
  void pump(Lane& lane);
  void take_off(Lane& lane, Result<PgPool::Lease> connection);
  void fail_queued(Lane& lane, const Status& status);
  void watch(Nanos deadline);
  void fail_overdue();
  void land(const TripPtr& trip);
  void maybe_closed();
  void purge();
  const LockSql& sql();
  void count(const std::vector<Call>& calls, std::size_t ops);

  // lock_deal.cc: rounds of a trip
  struct Dealt;
  void begin_trip(Lane& lane, ItemBatcher::Batch batch, PgPool::Lease connection, unsigned in_a_row);
  void start_round(const TripPtr& trip);
  std::vector<Call> build_calls(Trip& trip);
  void answered(const TripPtr& trip, PipelineResult result);
  void deal_keeps(Trip& trip, const Rows& rows, Dealt& dealt);
  void deal_takes(Trip& trip, const Rows& rows, Dealt& dealt);
  void deal_asked(const LockItems& items, const Rows& rows, bool queue, Dealt& dealt);
  void failed(const TripPtr& trip, const PipelineResult& result);
  void fail_items(const LockItems& items, const Status& status);
  void doubt(const LockItems& items);
  void reconnect(const TripPtr& trip);
  void retry_later(const TripPtr& trip, Nanos pause, void (PgLockStore::*what)(const TripPtr&));

  // lock_waiters.cc
  void remember(const std::string& key, Nanos lease);
  void forget(const std::string& key);
  void tell(const std::string& key);
  void heard(const std::string& payload);
  void ask_everybody();
  void refresh_later();
  void refresh();
  void leave_lines(std::function<void()> done);

  PrefixBackend& backend_;
  const Clock& clock_;
  std::vector<std::unique_ptr<Lane>> lanes_;
  std::unordered_map<const store::LockOp*, Queued> tickets_;  // of what was not sent yet
  // Pipelines under way point into the statements, so older sets are kept.
  std::vector<std::unique_ptr<LockSql>> all_sql_;
  bool sql_waiters_ = false;
  std::function<void(const store::Space&, const std::string&)> freed_;
  std::unordered_map<std::string, Place> waiting_;  // by key: the server remembers us there
  std::mt19937_64 random_;
  const std::int64_t me_;  // as a waiter
  const std::string channel_;
  std::unique_ptr<asio::steady_timer> timer_, refresh_timer_, close_timer_;
  Nanos watched_ = kForever;
  bool refreshing_ = false;
  Nanos purge_at_ = 0;
  std::string purge_from_;  // key
  store::Stats stats_;
  std::size_t trips_ = 0;
  bool closing_ = false;
  std::function<void()> closed_;
  Listener listener_;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace ratesync::postgres
