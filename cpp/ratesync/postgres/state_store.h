// State in PostgreSQL: batches what arrives while a trip is under way, lets the server decide, and finds out
// what became of a trip whose answer was lost. I/O thread only, but for the construction.
//
// While operations of a key are in the store they share a lane, which carries them in their order; a key that
// is not about goes where it leaves soonest. Batches touch keys of several lanes and travel in a lane of
// their own: from then on operations of their keys follow them there, and a batch leaves when the ordinary
// lanes are through with its keys. Keys are counted, not listed: a collision of two only costs time.
#pragma once

#include <array>
#include <asio/steady_timer.hpp>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "ratesync/postgres/lanes.h"
#include "ratesync/postgres/prefix_backend.h"
#include "ratesync/postgres/state_plan.h"
#include "ratesync/postgres/state_sql.h"
#include "ratesync/store/state_store.h"

namespace ratesync::postgres {

struct StateDealt;
struct StateTrip;

class PgStateStore final : public store::StateStore, private Lanes<QueuedState, StateTrip> {
 public:
  explicit PgStateStore(PrefixBackend& backend);
  ~PgStateStore() override;

  void submit(store::StateOp* op) override;
  void submit(store::StateBatch* batch) override;
  bool abandon(store::StateOp* op) override;
  bool abandon(store::StateBatch* batch) override;
  void scan(const store::SpaceRef& space, const std::string& kind, const std::string& prefix,
            const std::string& cursor, std::size_t page_size,
            store::Callback<store::StatePage> done) override;
  void claim_due(const store::SpaceRef& space, const std::string& kind, std::size_t limit, std::int64_t lease,
                 store::Callback<std::vector<store::DueKey>> done) override;
  void purge(std::size_t limit, store::Callback<std::int64_t> done) override;
  void initialize(store::Callback<store::Unit> done) override;

  // Fails what is queued with Code::closed and lets trips under way end, for `patience` at most.
  void close(Nanos patience, std::function<void()> done);
  void abandon_after_fork() {}  // nothing but timers, which are leaked with the rest
  void fill(store::Stats& stats) const { add_to(stats); }

 private:
  static constexpr std::size_t kSlots = 4'096;
  struct Purge;
  using PurgePtr = std::shared_ptr<Purge>;

  // state_store.cc
  void push(QueuedState item);
  std::size_t place_for(const QueuedState& item);
  void forget(const QueuedState& item);  // it is answered, or given back: its keys are free
  static void fail(QueuedState& item, const Status& status);
  void deliver(const StateItems& items);
  // One statement outside of all trips, counted as carrying so many operations.
  void ask(Call call, std::size_t ops, store::Callback<RowsPtr> done);

  // Of Lanes
  const void* handle(const QueuedState& item) const override {
    return item.batch ? static_cast<const void*>(item.batch) : item.op;
  }
  void each_key(const QueuedState& item, const std::function<void(std::size_t)>& visit) const override;
  void fail_all(const StateItems& items, const Status& status) override;
  void lend(PgPool::OnLease use) override { backend_.lend(Facet::state, alive_, std::move(use)); }
  Status explain(const PipelineResult& result) override { return backend_.explain(Facet::state, result); }
  void start_round(const TripPtr& trip) override;
  void answered(const TripPtr& trip, PipelineResult result) override;

  // state_trip.cc
  template <class Visit>
  static void each_slot(const QueuedState& item, Visit visit) {
    if (item.op) return visit(item.bucket % kSlots);
    for (const store::StateOp* op : item.batch->ops)
      visit(store::bucket_of(*op->space, op->kind, op->key) % kSlots);
  }
  void hold_back(StateTrip& trip);
  void poke();
  void refused(StateTrip& trip, const StateStage& stage, const PipelineResult::Part& part, StateDealt& dealt,
               std::vector<std::pair<StateItems, Status>>& failed);
  void not_sent(const TripPtr& trip, const Status& status);

  // state_doubt.cc
  struct Doubt;
  using DoubtPtr = std::shared_ptr<Doubt>;
  void doubt(const TripPtr& trip, StateItems items, const Status& status);
  void investigate(const DoubtPtr& doubt);
  void end_backend(const DoubtPtr& doubt);
  void look(const DoubtPtr& doubt);
  void resolve(const DoubtPtr& doubt, const Rows& rows);
  void doubt_later(const DoubtPtr& doubt);
  void end_doubt(const DoubtPtr& doubt, StateItems done, StateItems again, StateItems unknown);

  // state_purge.cc
  void arm_purge();
  void raise_floors(const PurgePtr& purge);
  void await_writers(const PurgePtr& purge);
  void remove_dead(const PurgePtr& purge);
  void ask_for(const PurgePtr& purge, Call call, std::function<void(const Rows&)> then);
  void end_purge(const PurgePtr& purge, const Status& status);

  PrefixBackend& backend_;
  const StateSql sql_;
  const std::size_t ordinary_lanes_;  // behind them comes that of batches
  // Operations that are in the store, by keys that share a slot: in the ordinary lanes and in the wide one.
  std::array<std::uint32_t, kSlots> ordinary_{}, wide_{};
  std::array<std::uint8_t, kSlots> lane_of_slot_{};  // where there are ordinary ones
  std::size_t inside_ = 0;                           // all of them
  std::vector<TripPtr> held_;              // of the wide lane: wait for keys that ordinary lanes still carry
  std::uint64_t created_ = 0, found_ = 0;  // of the latest creations, decaying: which statement suits them
  std::unique_ptr<asio::steady_timer> purge_timer_;  // behind a pointer: leaked after fork
  bool purge_armed_ = false;
};

}  // namespace ratesync::postgres
