#include "ratesync/engine/op_ids.h"

#include <pthread.h>

#include <atomic>
#include <random>

namespace ratesync::engine {

namespace {

constexpr std::uint64_t k63 = (std::uint64_t{1} << 63) - 1;

// Where this process begins; 0: not drawn yet. Lock-free throughout: a forked child may find a lock in the
// hands of a thread that it does not have.
std::atomic<std::uint64_t> g_base{0};
std::atomic<std::uint64_t> g_count{0};

std::uint64_t draw() {
  std::random_device system;
  std::uint64_t drawn = 0;
  while (drawn == 0) drawn = (static_cast<std::uint64_t>(system()) << 32 | system()) & k63;
  std::uint64_t nobody = 0;
  return g_base.compare_exchange_strong(nobody, drawn, std::memory_order_relaxed) ? drawn : nobody;
}

// One to one on 63 bits: odd factors and a shift to the right are invertible there. Ids that follow each
// other have nothing in common, so those of two processes do not meet in runs.
std::uint64_t mix(std::uint64_t x) {
  x = (x * 0x9e3779b97f4a7c15ull) & k63;
  x ^= x >> 32;
  return (x * 0xd6e8feb86659fd93ull) & k63;
}

[[maybe_unused]] const int g_at_fork =
    pthread_atfork(nullptr, nullptr, [] { g_base.store(0, std::memory_order_relaxed); });

}  // namespace

std::int64_t next_op_id() {
  for (;;) {
    std::uint64_t base = g_base.load(std::memory_order_relaxed);
    if (base == 0) base = draw();
    const std::uint64_t id = mix((base + g_count.fetch_add(1, std::memory_order_relaxed)) & k63);
    if (id != 0) return static_cast<std::int64_t>(id);
  }
}

}  // namespace ratesync::engine
