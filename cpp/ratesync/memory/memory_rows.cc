#include "ratesync/memory/memory_rows.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <utility>

namespace ratesync::memory {

namespace {

__extension__ using Wide = unsigned __int128;

// Every bit of the product depends on every bit of both: folding it mixes.
std::uint64_t fold(std::uint64_t a, std::uint64_t b) {
  const Wide product = static_cast<Wide>(a) * b;
  return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
}

std::uint64_t load(const char* at, std::size_t size) {
  std::uint64_t word = 0;
  std::memcpy(&word, at, size);
  return word;
}

Row* allocate(Row* old, std::size_t key_size, std::size_t value_size) {
  void* block = std::realloc(old, sizeof(Row) + key_size + value_size);
  if (!block) throw std::bad_alloc();
  return static_cast<Row*>(block);
}

}  // namespace

std::uint64_t hash_of(std::uint64_t seed, std::string_view key) {
  constexpr std::uint64_t kMix = 0x9fb21c651e98df25ull;
  constexpr std::uint64_t kEnd = 0xd6e8feb86659fd93ull;
  std::uint64_t hash = seed ^ (key.size() * kMix);
  const char* at = key.data();
  std::size_t left = key.size();
  for (; left >= 8; at += 8, left -= 8) hash = fold(hash ^ load(at, 8), kMix);
  if (left >= 4) {
    hash = fold(hash ^ (load(at, 4) | load(at + left - 4, 4) << 32), kMix);
  } else if (left > 0) {
    hash = fold(hash ^ (load(at, 1) | load(at + left / 2, 1) << 8 | load(at + left - 1, 1) << 16), kMix);
  }
  return fold(hash ^ kEnd, kEnd);
}

Place place_of(const Family& family, std::string_view key) {
  const std::uint64_t hash = hash_of(family.seed, key);
  return {static_cast<std::uint32_t>(hash), static_cast<std::uint16_t>(hash >> 48)};
}

RowTable::~RowTable() {
  for (std::uint32_t i = 0; i < capacity(); ++i) std::free(slots_[i].row);
}

Slot* RowTable::insert(const Family& family, std::string_view key, Place place, std::size_t value_size) {
  if ((size_ + 1) * 4 > capacity() * 3) rehash(std::max(kLeast, capacity() * 2));
  Row* row = allocate(nullptr, key.size(), value_size);
  row->family = family.number;
  family.rows.fetch_add(1, std::memory_order_relaxed);
  row->key_size = static_cast<std::uint32_t>(key.size());
  row->value_size = static_cast<std::uint32_t>(value_size);
  row->bucket = place.bucket;
  row->removed = false;
  row->claim = false;
  std::memcpy(row->bytes(), key.data(), key.size());
  std::uint32_t i = place.tag & mask_;
  while (slots_[i].row) i = (i + 1) & mask_;
  slots_[i] = {row, place.tag, kKept};
  ++size_;
  return &slots_[i];
}

void RowTable::resize(Slot& slot, std::size_t value_size) {
  constexpr std::size_t kSmall = 64;
  const Row& row = *slot.row;
  if (value_size == row.value_size) return;
  if (value_size > row.value_size || row.value_size > kSmall)  // else the block stays, a little too large
    slot.row = allocate(slot.row, row.key_size, value_size);
  slot.row->value_size = static_cast<std::uint32_t>(value_size);
}

void RowTable::dated(Slot& slot) {
  const Row& row = *slot.row;
  slot.dead_from = kKept;
  if (row.expires == kNever) return;
  const bool waits = row.claim && !row.removed && row.expires < kNever - kClaimGraceMs;
  const std::int64_t at = (row.expires + (waits ? kClaimGraceMs : 0)) / 1000;
  slot.dead_from = static_cast<std::uint32_t>(std::clamp<std::int64_t>(at, 0, kKept));
  soonest_ = std::min(soonest_, slot.dead_from);
  coming_ = std::min(coming_, slot.dead_from);
}

void RowTable::rehash(std::uint32_t wanted) {
  auto bigger = std::make_unique<Slot[]>(wanted);
  const std::uint32_t mask = wanted - 1;
  for (std::uint32_t i = 0; i < capacity(); ++i) {
    if (!slots_[i].row) continue;
    std::uint32_t to = slots_[i].tag & mask;
    while (bigger[to].row) to = (to + 1) & mask;
    bigger[to] = slots_[i];
  }
  slots_ = std::move(bigger);
  mask_ = mask;
  hand_ = 0;  // a sweep starts over; what it saw so far still holds
}

// Linear probing without tombstones: those behind the gap move up, unless they would leave the run that
// begins at their own place.
void RowTable::erase(std::uint32_t index) {
  std::free(slots_[index].row);
  --size_;
  std::uint32_t gap = index;
  for (std::uint32_t i = (gap + 1) & mask_; slots_[i].row; i = (i + 1) & mask_) {
    const std::uint32_t home = slots_[i].tag & mask_;
    if (((i - home) & mask_) < ((i - gap) & mask_)) continue;
    slots_[gap] = slots_[i];
    gap = i;
  }
  slots_[gap] = Slot{};
}

std::uint32_t RowTable::sweep(std::int64_t now, std::uint32_t slots, std::uint32_t limit,
                              std::vector<std::uint32_t>* gone) {
  if (!slots_) return 0;
  const std::int64_t second = now / 1000;
  std::uint32_t removed = 0;
  slots = std::min(slots, capacity());
  while (slots > 0 && removed < limit) {
    const Slot& slot = slots_[hand_];
    __builtin_prefetch(slots_[(hand_ + 8) & mask_].row);  // most likely cold
    if (slot.row && slot.dead_from <= second) {
      const Row& row = *slot.row;
      const bool waits = row.claim && !row.removed;
      if (!row.living(waits ? now - kClaimGraceMs : now)) {
        if (!floors_) floors_ = std::make_unique<std::int64_t[]>(kBucketsHere);
        std::int64_t& lowest = floors_[row.bucket % kBucketsHere];
        lowest = std::max(lowest, row.version);
        gone->push_back(row.family);
        erase(hand_);
        ++removed;
        continue;  // the place may have been filled from behind
      }
    }
    if (slot.row) coming_ = std::min(coming_, slot.dead_from);
    --slots;
    if (++hand_ > mask_) {  // once around: what was seen is all there is
      hand_ = 0;
      soonest_ = std::exchange(coming_, kKept);
      if (capacity() > kLeast && size_ * 8 < capacity()) rehash(capacity() / 2);
    }
  }
  return removed;
}

}  // namespace ratesync::memory
