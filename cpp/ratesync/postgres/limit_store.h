// Rate and concurrency limits in PostgreSQL: batches what arrives while a trip is under way, lets the
// server decide, deals the answers, and keeps leases alive. I/O thread only.
//
// Groups with max_concurrent travel in lanes of their own: their commits have to reach the disk,
// those of pure rates need not, and one must not wait for the other. So do windows: they are locked
// first, token buckets are one statement. A trip takes its operations only when it has a connection,
// so whoever gives up before that is simply taken out of the queue.
#pragma once

#include <asio/io_context.hpp>
#include <asio/steady_timer.hpp>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "ratesync/base/clock.h"
#include "ratesync/postgres/lanes.h"
#include "ratesync/postgres/limit_plan.h"
#include "ratesync/postgres/limit_sql.h"
#include "ratesync/postgres/listener.h"
#include "ratesync/postgres/pg_pool.h"
#include "ratesync/store/holders.h"
#include "ratesync/store/store.h"

namespace ratesync::postgres {

using store::Holders;
using store::Holding;

// What the limit store needs of the store around it.
class LimitBackend {
 public:
  virtual ~LimitBackend() = default;
  // Once the schema is known to be in order; at once when it is.
  virtual void when_ready(Connection::Done done) = 0;
  virtual PgPool& pool() = 0;
  virtual const LimitSql& limit_sql() const = 0;  // after when_ready
  [[nodiscard]] virtual bool ready() const = 0;
  // Why there are no windows, with the cure. The schema is looked at anew before the next trip.
  virtual Status no_windows() = 0;
  // The server's refusal in words, with table and schema. May look at the schema anew next time.
  virtual Status explain(const PipelineResult& result) = 0;
};

struct Dealt;
struct LimitTrip;

struct LimitStoreOptions {
  enum class Durability {
    automatic,  // pure rates commit without waiting for the disk, slots do not
    on,         // as the server is configured
    off,        // nothing waits for the disk
  } durability = Durability::automatic;
  std::size_t lanes = 2;  // trips at the same time, for rates, slots and windows each
  std::size_t max_batch = 1'000;
  std::size_t max_queue = 100'000;  // per lane
  std::string holder;               // who we are, for people: host:pid application
  ConnInfo listen;                  // where LISTEN works
  ConnectionOptions connection;     // for it
  std::string channel;              // prefix of the channels of this table's processes
};

class PgLimitStore final : public store::LimitStore, private Lanes<QueuedOp, LimitTrip> {
 public:
  PgLimitStore(asio::io_context& io, const Clock& clock, LimitBackend& backend, LimitStoreOptions options);
  ~PgLimitStore() override;

  void acquire(store::AcquireOp* op) override;
  bool abandon(store::AcquireOp* op) override;
  void acquire_all(store::AcquireAllOp* op) override;
  bool abandon(store::AcquireAllOp* op) override;
  void release(const store::GroupRef& group, store::HolderId holder) override;
  std::int64_t refund(const store::GroupRef& group, std::int64_t cost, std::int64_t stamp) override;
  void settle(const store::GroupRef& group, std::int64_t delta, store::Callback<store::Unit> done) override;
  void peek(const store::GroupRef& group, store::Callback<store::Peek> done) override;
  void reset(const store::GroupRef& group, store::Callback<store::Unit> done) override;
  void list(std::size_t limit, store::Callback<store::Listing> done) override;
  void on_lost(std::function<void(const std::string& group, store::HolderId)> listener) override;
  void stop_waiting(const store::GroupRef& group) override;
  void on_freed(std::function<void(const std::string& group)> listener) override {
    freed_ = std::move(listener);
  }
  [[nodiscard]] bool pushes() const override { return waiters() && listener_.active(); }
  [[nodiscard]] bool deaf() const { return listener_.deaf(); }
  void abandon_after_fork() { listener_.abandon_after_fork(); }

  // Fails what is queued with Code::closed, lets trips under way end, then tells the server about
  // slots given back, as far as that takes no longer than `patience`.
  void close(Nanos patience, std::function<void()> done);
  void fill(store::Stats& stats) const { add_to(stats); }

 private:
  using OpLane = Lane<QueuedOp>;
  // Kinds of lanes. Several limits at once have lanes of their own too, and hold their slots under ids of
  // their own: two statements under way never speak of the same lease.
  enum class Kind : std::uint8_t { rates, slots, windows, together, together_slots };
  static Kind kind_of(const OpLane& lane) { return static_cast<Kind>(lane.kind); }
  static bool has_slots(const OpLane& lane) {
    return kind_of(lane) == Kind::slots || kind_of(lane) == Kind::together_slots;
  }
  static bool is_together(const OpLane& lane) { return kind_of(lane) >= Kind::together; }

  std::size_t place_of(const QueuedOp& op) const;
  Holders& holders_of(const OpLane& lane) { return is_together(lane) ? holders_together_ : holders_; }
  Holders& holders_of(const Holding& holding);
  void push(QueuedOp op);
  void fail(QueuedOp& op, const Status& status);

  // Of Lanes
  const void* handle(const QueuedOp& op) const override {
    return op.all ? static_cast<const void*>(op.all) : op.acquire;
  }
  void each_key(const QueuedOp& op, const std::function<void(std::size_t)>& visit) const override;
  void fail_all(const OpList& ops, const Status& status) override;
  void lend(PgPool::OnLease use) override;
  Status explain(const PipelineResult& result) override { return backend_.explain(result); }
  void start_round(const TripPtr& trip) override;
  void answered(const TripPtr& trip, PipelineResult result) override;
  void farewell(std::function<void()> done) override;

  // A trip goes in rounds: what was refused for the patience of another, lost the race for a first
  // insert, or did not fit, is asked again before the lane takes new operations.
  void drop_needless_restatements(const OpLane& lane, OpList& pending);
  void refuse_windows(OpList& pending);
  std::vector<Call> build_calls(LimitTrip& trip);
  void add_unwaits(const OpList& unwaits, std::vector<Call>& calls);
  void add_adjustments(const TripPlan& plan, std::vector<Call>& calls);
  Call decide_call(LimitTrip& trip, const Layer& layer);
  void deal_layer(LimitTrip& trip, const Layer& layer, const Rows& rows, Dealt& dealt);
  RunAnswer read_answer(LimitTrip& trip, const Run& run, Holding* holding, const Rows& rows, int row,
                        Dealt& dealt);
  void deal_together(LimitTrip& trip, std::size_t layer, const Rows& rows, Dealt& dealt);
  void deal_peeks(LimitTrip& trip, const PipelineResult& result, Dealt& dealt);
  void deal_sides(LimitTrip& trip, Dealt& dealt);
  void failed(const TripPtr& trip, const PipelineResult& result);
  void put_back(LimitTrip& trip, bool in_doubt);

  void in_step(Holding& holding);  // queues a restatement where one is needed
  void report_lost(const std::string& group, store::HolderId holder, std::int64_t slots);
  void arm(Nanos at);
  void tick();
  void tick(Holders& holders, Nanos now);
  void renew(Holders& holders, std::vector<Holding*> due);
  void purge();
  void remember(const store::GroupRef& group, bool waits);
  void ask_everybody();
  void probe(const std::string& channel, const std::string& payload);
  void flush_slots(std::size_t place, std::function<void()> done);
  [[nodiscard]] bool leases() const { return !backend_.limit_sql().renew.sql.empty(); }
  [[nodiscard]] bool waiters() const;
  [[nodiscard]] bool windows() const { return !backend_.limit_sql().windows.sql.empty(); }

  LimitBackend& backend_;
  const LimitStoreOptions options_;
  const std::size_t lanes_per_kind_;  // of rates, slots and windows; then one of each of the others
  Holders holders_;
  Holders holders_together_;
  std::function<void(const std::string&, store::HolderId)> lost_;
  std::function<void(const std::string&)> freed_;
  std::int64_t me_ = 0;                                       // as a waiter
  std::unordered_map<std::string, store::GroupRef> waiting_;  // the server remembers us there
  std::unique_ptr<asio::steady_timer> timer_;
  Nanos armed_ = kForever;
  Nanos purge_at_ = 0;
  Listener listener_;
};

}  // namespace ratesync::postgres
