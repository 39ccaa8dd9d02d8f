// What state and locks in memory cost per operation, without Python: one thread, fresh keys and hot ones.
//
//     memory_state_benchmark [keys]
//
// Each line is the best and the median of seven runs, ns of CPU per operation. Fresh keys are made by turning
// a number into 12 bytes in place, which is timed, too (a few ns). The store starts empty in every run; the
// trap avoided is timing a table that fits into the cache: a million rows do not.
#include <malloc.h>

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <string>
#include <vector>

#include "ratesync/memory/memory_store.h"

namespace {

using namespace ratesync;  // NOLINT(google-build-using-namespace)
using memory::Ask;
using Verb = store::StateOp::Verb;

// Of this process, so that others on the machine matter less.
double cpu_ns() {
  timespec ts;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &ts);
  return static_cast<double>(ts.tv_sec) * 1e9 + static_cast<double>(ts.tv_nsec);
}

struct Key {
  char bytes[12] = {'o', 'r', 'd', 'e', 'r', '-', '0', '0', '0', '0', '0', '0'};
  std::string_view of(std::uint32_t number) {
    for (int i = 11; i >= 5; --i, number /= 10) bytes[i] = static_cast<char>('0' + number % 10);
    return {bytes, sizeof bytes};
  }
};

template <class Setup, class Run>
void measure(const char* name, std::uint32_t count, Setup&& setup, Run&& run) {
  std::vector<double> times;
  for (int i = 0; i < 7; ++i) {
    Clock clock;
    memory::MemoryState state(clock);
    const memory::FamilyRef held = state.family(store::Space{}, "dedup");
    const memory::Family& family = *held;
    setup(state, family);
    const double start = cpu_ns();
    for (std::uint32_t n = 0; n < count; ++n) run(state, family, n);
    const double took = cpu_ns() - start;
    times.push_back(took / count);
  }
  std::sort(times.begin(), times.end());
  std::printf("%-34s best %6.1f  median %6.1f ns/op\n", name, times[0], times[3]);
}

}  // namespace

int main(int argc, char** argv) {
  const auto keys = static_cast<std::uint32_t>(argc > 1 ? std::atoi(argv[1]) : 1'000'000);
  const memory::ValueView one{store::Value::Type::text, "1", 0};
  Key key;
  const auto nothing = [](auto&, auto&) {};
  const auto fill = [&](memory::MemoryState& state, const memory::Family& family) {
    for (std::uint32_t n = 0; n < keys; ++n) state.create(family, key.of(n), one, 300'000);
  };
  std::int64_t sum = 0;

  measure("clock", keys, nothing, [&](auto&, auto&, std::uint32_t) {
    static const Clock clock;
    sum += clock.now();
  });
  measure("check_and_set, fresh", keys, nothing, [&](auto& state, auto& family, std::uint32_t n) {
    sum += state.create(family, key.of(n), one, 300'000);
  });
  measure("check_and_set, fresh, ttl 50 ms", keys, nothing, [&](auto& state, auto& family, std::uint32_t n) {
    sum += state.create(family, key.of(n), one, 50);
  });
  measure("check_and_set, duplicate", keys, fill, [&](auto& state, auto& family, std::uint32_t n) {
    sum += state.create(family, key.of(n), one, 300'000);
  });
  const auto verb = [&](const char* name, Verb which, bool hot, auto&& setup) {
    measure(name, keys, setup, [&](auto& state, auto& family, std::uint32_t n) {
      Ask ask;
      ask.verb = which;
      ask.key = key.of(hot ? n % 100 : n);
      ask.value = one;
      ask.ttl = 300'000;
      ask.delta = 1;
      ask.expected = store::kAnyVersion;
      sum += state.decide(family, ask).version;
    });
  };
  verb("get, of all keys", Verb::get, false, fill);
  verb("get, of 100 keys", Verb::get, true, fill);
  verb("set, fresh", Verb::set, false, nothing);
  verb("set, over all keys", Verb::set, false, fill);
  verb("increment, fresh", Verb::add, false, nothing);
  verb("increment, of 100 keys", Verb::add, true, nothing);
  verb("remove", Verb::remove, false, fill);
  measure("create by StateOp, fresh", keys, nothing, [&](auto& state, auto&, std::uint32_t n) {
    struct Op final : store::StateOp {
      void done() override {}
    } op;
    static const auto space = std::make_shared<const store::Space>();
    op.verb = Verb::create;
    op.space = space;
    op.kind.append("dedup");
    op.key = key.of(n);
    op.value.data.append("1");
    state.submit(&op);
    sum += op.reply.version;
  });

  {
    Clock clock;
    memory::MemoryLocks locks(clock);
    struct Op final : store::LockOp {
      void done() override {}
    } op;
    op.space = std::make_shared<const store::Space>();
    const double start = cpu_ns();
    for (std::uint32_t n = 0; n < keys; ++n) {
      op.name = key.of(n);
      op.verb = store::LockOp::Verb::acquire;
      op.ttl = 30'000;
      locks.submit(&op);
      op.verb = store::LockOp::Verb::release;
      op.token = op.reply.token;
      locks.submit(&op);
    }
    const double took = cpu_ns() - start;
    std::printf("%-34s %6.1f ns\n", "lock and unlock, fresh name", took / keys);
  }
  {
    Clock clock;
    const auto before = mallinfo2();
    memory::MemoryState state(clock);
    fill(state, state.family(store::Space{}, "dedup"));
    const auto after = mallinfo2();
    std::printf("%-34s %6.1f bytes per key\n", "footprint",
                static_cast<double>(after.uordblks + after.hblkhd - before.uordblks - before.hblkhd) / keys);
    const double start = cpu_ns();
    std::string cursor;
    std::size_t rows = 0;
    do {
      auto page = state.page(store::Space{}, "dedup", "", cursor, 500);
      rows += page.value().rows.size();
      cursor = page.value().cursor;
    } while (!cursor.empty());
    const double took = cpu_ns() - start;
    std::printf("%-34s %6.1f ns per row, %zu rows\n", "scan, pages of 500", took / static_cast<double>(rows),
                rows);
  }
  return sum == 42 ? 1 : 0;
}
