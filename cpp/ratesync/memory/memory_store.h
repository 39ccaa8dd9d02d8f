// The embedded store: limits of this process, decided on the calling thread.
//
// It is the default, the reference model of the property tests, and the hot path: `try_now` is
// what `async with acquire("x")` costs. One cell per group; an idle cell is the same as none, so
// cells of a million keys are swept away once they are idle again.
#pragma once

#include <array>
#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>

#include "ratesync/base/spin_lock.h"
#include "ratesync/limits/gcra.h"
#include "ratesync/limits/window.h"
#include "ratesync/memory/memory_locks.h"
#include "ratesync/memory/memory_state.h"
#include "ratesync/store/store.h"

namespace ratesync::memory {

// Of a group with a window, beside the cell so that token buckets stay small.
struct CellWindow {
  limits::WindowState state;  // on the wall clock
  Nanos busy_until = 0;       // on the engine's clock: nothing of it counts from then on
};

struct Cell {
  Nanos tat = 0;
  std::int32_t active = 0;   // slots held
  std::int32_t waiters = 0;  // queued in engine/ for a slot: nobody may overtake them
  std::int32_t pins = 0;     // bound limiters that keep a pointer
  std::int32_t version = 0;
  // Slots are held under this number; a reset changes it, so that a slot from before, released
  // after, does not free one that somebody else holds by then.
  store::HolderId epoch = 1;
  std::unique_ptr<CellWindow> window;  // null: never used

  [[nodiscard]] bool idle(Nanos now) const {
    return tat <= now && active == 0 && waiters == 0 && pins == 0 && (!window || window->busy_until <= now);
  }
};

struct Shard {
  SpinLock mutex;  // guards all cells of the shard
  struct Hash {
    using is_transparent = void;
    std::size_t operator()(std::string_view s) const { return std::hash<std::string_view>{}(s); }
  };
  std::unordered_map<std::string, Cell, Hash, std::equal_to<>> cells;
  std::size_t sweep_at = 1024;  // size at which idle cells are looked for
};

// A cell that stays where it is, for a limiter that is used again and again.
class Pin {
 public:
  Pin() = default;
  Pin(Shard* shard, Cell* cell) : shard_(shard), cell_(cell) {}
  Pin(Pin&& other) noexcept : shard_(other.shard_), cell_(other.cell_) { other.cell_ = nullptr; }
  Pin& operator=(Pin&&) = delete;
  ~Pin() {
    if (!cell_) return;
    const std::lock_guard lock(shard_->mutex);
    --cell_->pins;
  }
  [[nodiscard]] Shard* shard() const { return shard_; }
  [[nodiscard]] Cell* cell() const { return cell_; }

 private:
  Shard* shard_ = nullptr;
  Cell* cell_ = nullptr;
};

enum class Quick {
  granted,  // charged, go
  refused,  // it would have to wait (nothing charged)
};

struct QuickReply {
  Quick verdict = Quick::granted;
  store::Verdict why = store::Verdict::granted;
  Nanos retry_after = 0;
  Nanos now = 0;
  store::HolderId holder = 0;  // to be named in release_slot()
};

class MemoryStore final : public store::Store, public store::LimitStore {
 public:
  explicit MemoryStore(const Clock& clock) : clock_(clock) {}

  // Any thread. Grants only what needs no waiting and overtakes nobody.
  QuickReply try_now(Shard& shard, Cell& cell, const store::Group& group, std::int64_t cost) {
    const Nanos now = clock_.now();
    const std::lock_guard lock(shard.mutex);
    return decide_now(cell, group, cost, now);
  }
  QuickReply try_now(const store::Group& group, std::int64_t cost);
  // Any thread. Several limits at once, all or nothing, at this very moment; nobody who waits in engine/ is
  // overtaken. `replies`: one per part.
  bool try_all_now(const std::vector<store::Part>& parts, std::vector<store::AcquireReply>* replies) {
    return decide_all(parts, false, replies);
  }
  // Any thread. True: somebody waits in engine/ and has to be told.
  bool release_slot(Shard& shard, Cell& cell, store::HolderId holder);
  bool release_slot(std::string_view group, store::HolderId holder);
  Pin pin(const std::string& group);
  // I/O thread: how many wait for a slot of this group.
  void set_waiters(const std::string& group, std::int32_t waiters);
  // Any thread: groups kept, for tests and the footprint benchmark.
  std::size_t cells();

  // Store
  [[nodiscard]] store::Capabilities capabilities() const override;
  void initialize(store::Callback<store::Unit> done) override { done(store::Unit{}); }
  void migrate(bool, store::Callback<std::vector<store::MigrationStep>> done) override {
    done(std::vector<store::MigrationStep>{});
  }
  void doctor(store::Callback<std::vector<store::Finding>> done) override;
  [[nodiscard]] store::Stats stats() const override { return {}; }
  void close(std::function<void()> done) override { done(); }
  void abandon_after_fork() override {}
  [[nodiscard]] bool down() const override { return false; }
  [[nodiscard]] store::LimitStore* limits() override { return this; }
  Result<store::StateStore*> state(const std::string& prefix) override;
  Result<store::LockStore*> locks(const std::string& prefix) override;

  // LimitStore; all of these may be called on any thread.
  void acquire(store::AcquireOp* op) override;
  bool abandon(store::AcquireOp*) override { return false; }
  void acquire_all(store::AcquireAllOp* op) override;
  bool abandon(store::AcquireAllOp*) override { return false; }
  void release(const store::GroupRef& group, store::HolderId holder) override {
    release_slot(group->id, holder);
  }
  std::int64_t refund(const store::GroupRef& group, std::int64_t cost, std::int64_t stamp) override;
  void settle(const store::GroupRef& group, std::int64_t delta, store::Callback<store::Unit> done) override;
  void peek(const store::GroupRef& group, store::Callback<store::Peek> done) override;
  void reset(const store::GroupRef& group, store::Callback<store::Unit> done) override;
  void list(std::size_t limit, store::Callback<store::Listing> done) override;
  void on_lost(std::function<void(const std::string&, store::HolderId)>) override {}

 private:
  static constexpr std::size_t kShards = 16;

  // All of these with shard.mutex held.
  QuickReply decide_now(Cell& cell, const store::Group& group, std::int64_t cost, Nanos now);
  QuickReply decide_window(Cell& cell, const store::Group& group, std::int64_t cost);
  store::AcquireReply decide(Cell& cell, const store::Group& group, std::int64_t cost, Nanos now,
                             Nanos max_wait) const;
  void take_units(Cell& cell, const store::Group& group, std::int64_t cost, Nanos now, Nanos max_wait,
                  store::AcquireReply* reply) const;
  void take_window(Cell& cell, const store::Group& group, std::int64_t cost, Nanos now, Nanos max_wait,
                   store::AcquireReply* reply) const;
  [[nodiscard]] store::AcquireReply refusal(const Cell& cell, const store::Group& group, std::int64_t cost,
                                            Nanos now, bool overtakes) const;
  [[nodiscard]] store::Peek peek_cell(const Cell& cell, const store::Group& group, Nanos now) const;
  CellWindow& window_of(Cell& cell, const limits::Params& params, Nanos now) const;
  void touch(CellWindow& window, const limits::Params& params, Nanos now) const;
  Cell& cell_of(Shard& shard, std::string_view group);

  bool decide_all(const std::vector<store::Part>& parts, bool overtakes,
                  std::vector<store::AcquireReply>* replies);
  Shard& shard_of(std::string_view group) { return shards_[std::hash<std::string_view>{}(group) % kShards]; }

  const Clock& clock_;
  std::array<Shard, kShards> shards_;
  std::atomic<store::HolderId> epoch_{1};  // of the newest reset
  std::mutex prefixes_mutex_;              // guards the next two
  std::map<std::string, MemoryState> states_;
  std::map<std::string, MemoryLocks> locks_;
};

inline QuickReply MemoryStore::decide_now(Cell& cell, const store::Group& group, std::int64_t cost,
                                          Nanos now) {
  const limits::Params& params = group.params;
  if (params.has_concurrency() && (cell.active >= params.max_concurrent || cell.waiters > 0))
    return {Quick::refused, store::Verdict::concurrency_full, 0, now, 0};
  if (group.pace.unit > 0) {  // a token bucket, told by an integer
    const Nanos wait = limits::take_now(params, group.pace, &cell.tat, now, cost);
    if (wait > 0) return {Quick::refused, store::Verdict::rate_limited, wait, now, 0};
  } else if (params.is_window()) {
    return decide_window(cell, group, cost);
  }
  if (params.has_concurrency()) ++cell.active;
  ++cell.version;
  return {Quick::granted, store::Verdict::granted, 0, now, cell.epoch};
}

}  // namespace ratesync::memory
