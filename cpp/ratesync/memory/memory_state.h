// State in memory: every operation is decided on the calling thread, whichever that is.
//
// The hot path is create() and decide() on a Family that the caller looked up once: no allocation but
// the row, one lock of one small table. The store has no thread of its own: writes throw dead rows away,
// a bounded number each, so that what expires is gone after about as many writes as it took.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "ratesync/memory/memory_rows.h"
#include "ratesync/memory/memory_scan.h"
#include "ratesync/memory/memory_timeouts.h"
#include "ratesync/store/state_store.h"

namespace ratesync::memory {

// A StateOp without its own copies: everything is as there.
struct Ask {
  store::StateOp::Verb verb = store::StateOp::Verb::get;
  bool want_actual = false;
  bool renew = false;
  bool revive = false;
  bool due_in = false;
  std::string_view key;
  ValueView value;
  std::int64_t delta = 0;
  std::int64_t ttl = store::kNoTtl;
  std::int64_t expected = 0;
  std::int64_t due = 0;
};

// A StateReply that cannot fail.
struct Answer {
  store::StateReply::Outcome outcome = store::StateReply::Outcome::done;
  bool has_value = false;
  std::int64_t version = 0;
  std::int64_t expires_at = 0;
  store::Value value;
};

class MemoryState final : public store::StateStore {
 public:
  explicit MemoryState(const Clock& clock);

  // The direct way; any thread. The caller checks sizes: key 1 to 1024 bytes, value at most 64 MiB.
  // The family stays as long as somebody holds it: look it up once.
  FamilyRef family(const store::Space& space, std::string_view kind);
  // check_and_set. True: created now.
  bool create(const Family& family, std::string_view key, const ValueView& value, std::int64_t ttl);
  Answer decide(const Family& family, const Ask& ask);
  // The same for an operation that is at hand; done() is not called.
  void decide(store::StateOp& op);
  // All or nothing; done() is not called.
  void decide(store::StateBatch& batch);
  // The direct ways of the calls below.
  Result<store::StatePage> page(const store::Space& space, const std::string& kind, const std::string& prefix,
                                const std::string& cursor, std::size_t page_size);
  std::vector<store::DueKey> claim(const store::Space& space, const std::string& kind, std::size_t limit,
                                   std::int64_t lease);
  std::int64_t purge_now(std::size_t limit);
  // Rows kept, dead ones included: for tests and the footprint benchmark.
  [[nodiscard]] std::size_t rows();
  [[nodiscard]] std::size_t families();  // for tests

  // StateStore; all of these may be called on any thread, and call done() before they return.
  void submit(store::StateOp* op) override {
    decide(*op);
    op->done();
  }
  void submit(store::StateBatch* batch) override {
    decide(*batch);
    batch->done();
  }
  bool abandon(store::StateOp*) override { return false; }
  bool abandon(store::StateBatch*) override { return false; }
  void scan(const store::SpaceRef& space, const std::string& kind, const std::string& prefix,
            const std::string& cursor, std::size_t page_size,
            store::Callback<store::StatePage> done) override {
    done(page(*space, kind, prefix, cursor, page_size));
  }
  void claim_due(const store::SpaceRef& space, const std::string& kind, std::size_t limit, std::int64_t lease,
                 store::Callback<std::vector<store::DueKey>> done) override {
    done(claim(*space, kind, limit, lease));
  }
  void purge(std::size_t limit, store::Callback<std::int64_t> done) override { done(purge_now(limit)); }
  void initialize(store::Callback<store::Unit> done) override { done(store::Unit{}); }

 private:
  static constexpr std::uint8_t kWritesPerSweep = 16;
  static constexpr std::size_t kLeastFamilies = 1'024;
  static constexpr std::uint32_t kTables = store::kBuckets / RowTable::kBucketsHere;
  // Milliseconds on the store's clock.
  [[nodiscard]] std::int64_t now() const { return clock_.wall(clock_.now()) / kMilli; }
  RowTable& table_of(Place place) { return tables_[place.bucket / RowTable::kBucketsHere]; }
  FamilyRef find_family(const store::Space& space, std::string_view kind);
  Answer decide_timeout(const Family& family, const Ask& ask);
  void sweep_some(std::int64_t now);
  void tell_families(const std::vector<std::uint32_t>& gone);
  void forget_families();  // families_mutex_ held

  const Clock& clock_;
  const std::uint64_t seed_;  // of hashes: nobody outside can choose keys that collide
  std::unique_ptr<RowTable[]> tables_;
  std::atomic<std::uint32_t> hand_{0};  // the table that is swept next
  std::mutex families_mutex_;           // guards the next four
  std::unordered_map<std::string, FamilyRef> families_;
  std::vector<const Family*> numbered_;  // null: the number is free
  std::vector<std::uint32_t> free_numbers_;
  std::size_t forget_at_ = kLeastFamilies;  // size at which families without use are looked for
  Timeouts timeouts_;
  Scans scans_;
};

}  // namespace ratesync::memory
