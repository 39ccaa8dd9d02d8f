// Rows of state in memory: one block per row, found through 1,024 small hash tables.
//
// A row is one allocation: header, key, value. A table holds a pointer, 32 bits of the hash, and the
// second from which the row may be thrown away, so that neither a miss nor a sweep touches rows that
// it is not about. The tables are small on purpose: growing, sweeping or scanning one of them holds its
// lock for some ten microseconds even with millions of rows.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "ratesync/base/spin_lock.h"
#include "ratesync/store/state_store.h"

namespace ratesync::memory {

inline constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();

// Keys of one space and kind. It may go when it has no row and nobody holds it, and come back under another
// number: the seed follows from its names, so that its keys find the floors of their versions again.
struct Family {
  std::uint32_t number = 0;  // in its rows; of no other family at that time
  std::uint64_t seed = 0;    // of the hashes of its keys
  store::Space space;
  std::string kind;
  mutable std::atomic<std::int64_t> rows{0};  // dead ones included
};
using FamilyRef = std::shared_ptr<const Family>;

// A value that is somebody else's memory.
struct ValueView {
  store::Value::Type type = store::Value::Type::text;
  std::string_view data;    // bytes, text, json
  std::int64_t number = 0;  // integer
};

// Header of a row; key and value bytes follow it. An integer is stored as its 8 bytes.
struct Row {
  std::int64_t version;
  std::int64_t expires;  // ms on the store's clock; kNever
  std::uint32_t family;
  std::uint32_t key_size;
  std::uint32_t value_size;
  std::uint16_t bucket;  // of version floors
  store::Value::Type type;
  bool removed : 1;  // dead because it was deleted
  bool claim : 1;    // its writer may come late and revive it: kept for a while after it expired

  [[nodiscard]] char* bytes() { return reinterpret_cast<char*>(this) + sizeof(Row); }
  [[nodiscard]] const char* bytes() const { return reinterpret_cast<const char*>(this) + sizeof(Row); }
  [[nodiscard]] std::string_view key() const { return {bytes(), key_size}; }
  [[nodiscard]] std::string_view data() const { return {bytes() + key_size, value_size}; }
  [[nodiscard]] std::int64_t number() const {
    std::int64_t out = 0;
    std::memcpy(&out, bytes() + key_size, sizeof out);
    return out;
  }
  [[nodiscard]] bool living(std::int64_t now) const { return expires > now; }
};
static_assert(sizeof(Row) == 32);

// Where a key belongs.
struct Place {
  std::uint32_t tag = 0;  // within the table
  std::uint16_t bucket = 0;
};
std::uint64_t hash_of(std::uint64_t seed, std::string_view text);
Place place_of(const Family& family, std::string_view key);

struct Slot {
  Row* row = nullptr;
  std::uint32_t tag = 0;
  std::uint32_t dead_from = 0;  // seconds; not thrown away before. kKept: never
};

inline constexpr std::uint32_t kKept = std::numeric_limits<std::uint32_t>::max();
// An expired claim is kept this long.
inline constexpr std::int64_t kClaimGraceMs = 60'000;

// One table. Everything in it is guarded by `lock`.
class alignas(64) RowTable {
 public:
  static constexpr std::uint32_t kBucketsHere = 64;  // of version floors

  RowTable() = default;
  RowTable(const RowTable&) = delete;
  RowTable& operator=(const RowTable&) = delete;
  ~RowTable();

  SpinLock lock;
  std::uint8_t writes = 0;  // wraps; the store sweeps now and then

  // Asks for the memory that find() will look at.
  void prefetch(std::uint32_t tag) const { __builtin_prefetch(slots_.get() + (tag & mask_)); }
  // Null: no such row, not even a dead one. Valid until the next insertion or erasure.
  [[nodiscard]] Slot* find(const Family& family, std::string_view key, std::uint32_t tag) const {
    if (!slots_) return nullptr;
    for (std::uint32_t i = tag & mask_;; i = (i + 1) & mask_) {
      Slot& slot = slots_[i];
      if (!slot.row) return nullptr;
      if (slot.tag == tag && slot.row->family == family.number && slot.row->key() == key) return &slot;
    }
  }
  // The key must not be there. The header's family, key and bucket are set, the rest is the caller's.
  Slot* insert(const Family& family, std::string_view key, Place place, std::size_t value_size);
  // Gives the row of the slot room for a value of this size; its bytes are undefined afterwards.
  static void resize(Slot& slot, std::size_t value_size);
  // To be called after every change of the row's expiry.
  void dated(Slot& slot);

  [[nodiscard]] std::int64_t floor(std::uint16_t bucket) const {
    return floors_ ? floors_[bucket % kBucketsHere] : 0;
  }
  [[nodiscard]] std::uint32_t size() const { return size_; }

  // Nothing to be found by a sweep at this time.
  [[nodiscard]] bool fresh(std::int64_t now) const { return soonest_ > now / 1000; }
  // Throws dead rows away and raises the floors of their buckets: looks at up to `slots` places, from where
  // the last sweep ended, and removes up to `limit` rows. Returns how many. Their families are appended to
  // `gone`, which have to be told.
  std::uint32_t sweep(std::int64_t now, std::uint32_t slots, std::uint32_t limit,
                      std::vector<std::uint32_t>* gone);
  std::uint32_t sweep_all(std::int64_t now, std::uint32_t limit, std::vector<std::uint32_t>* gone) {
    hand_ = 0;
    coming_ = kKept;
    return sweep(now, capacity(), limit, gone);
  }

  template <class F>
  void each(F&& f) const {
    for (std::uint32_t i = 0; i < capacity(); ++i) {
      __builtin_prefetch(slots_[(i + 8) & mask_].row);  // most likely cold
      if (slots_[i].row) f(*slots_[i].row);
    }
  }

 private:
  static constexpr std::uint32_t kLeast = 8;
  [[nodiscard]] std::uint32_t capacity() const { return slots_ ? mask_ + 1 : 0; }
  void rehash(std::uint32_t capacity);
  void erase(std::uint32_t index);

  std::uint32_t mask_ = 0;
  std::uint32_t size_ = 0;
  std::uint32_t hand_ = 0;         // where the sweep goes on
  std::uint32_t soonest_ = kKept;  // no row can be thrown away before
  std::uint32_t coming_ = kKept;   // the same of what the sweep under way has seen
  std::unique_ptr<Slot[]> slots_;
  std::unique_ptr<std::int64_t[]> floors_;  // of the buckets here; null: all 0
};

}  // namespace ratesync::memory
