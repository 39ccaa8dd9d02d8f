// Removing dead rows without ever using a version twice.
//
// A version has to outlive its row, so the floor of the row's bucket is raised above it first. A statement
// that makes the row anew may be at work with a snapshot from before; it holds its lock on the table since
// before that snapshot (PostgreSQL locks first), so the purge waits until all transactions have ended that
// had such a lock when the floors were committed. Nobody is kept waiting for the purge itself.
#include <algorithm>
#include <chrono>
#include <utility>

#include "ratesync/postgres/binary_array.h"
#include "ratesync/postgres/state_store.h"

namespace ratesync::postgres {
namespace {

constexpr std::size_t kAtOnce = 10'000;
constexpr std::size_t kPerTurn = 1'000'000;
constexpr Nanos kTurn = 60 * kSecond;  // jittered by a half either way
// Under another isolation level than read committed, which a pooler may force on us, the snapshot comes a
// moment before the lock. In the background nobody waits, so that moment may pass.
constexpr Nanos kMoment = kSecond;
// While a dead row lies there it tells whether an operation was carried out whose answer was lost; those are
// looked into for a minute at most.
constexpr Nanos kDeadFor = 120 * kSecond;
constexpr Nanos kWriterPause = 5 * kMilli;
constexpr Nanos kWriterPatience = 10 * kSecond;

}  // namespace

struct PgStateStore::Purge {
  bool background = false;
  std::size_t left = 0;
  std::int64_t removed = 0;
  store::Callback<std::int64_t> done;
  // Of one piece:
  std::size_t limit = 0;
  std::vector<std::pair<std::int64_t, std::int64_t>> floors;  // bucket, version
  std::int64_t newest = 0;                                    // expiry, us
  std::vector<std::string> writers;
  bool looked = false;
  Nanos waiting_since = 0;
};

void PgStateStore::arm_purge() {
  if (purge_armed_ || closing_) return;
  purge_armed_ = true;
  const Nanos in = kTurn / 2 + static_cast<Nanos>(random_() % 1'000) * (kTurn / 1'000);
  purge_timer_->expires_after(std::chrono::nanoseconds(in));
  purge_timer_->async_wait([this, alive = alive_](const asio::error_code& error) {
    if (!*alive || error || closing_) return;
    purge_armed_ = false;  // the next write arms it again
    auto turn = std::make_shared<Purge>();
    turn->background = true;
    turn->left = kPerTurn;
    turn->done = [](const Result<std::int64_t>&) {};  // a failure: the next turn tries again
    raise_floors(turn);
  });
}

void PgStateStore::purge(std::size_t limit, store::Callback<std::int64_t> done) {
  if (limit == 0) return done(std::int64_t{0});
  auto turn = std::make_shared<Purge>();
  turn->left = limit;
  turn->done = std::move(done);
  raise_floors(turn);
}

void PgStateStore::ask_for(const PurgePtr& purge, Call call, std::function<void(const Rows&)> then) {
  ask(std::move(call), 0, [purge, then = std::move(then)](Result<RowsPtr> rows) {
    if (!rows.ok()) return purge->done(rows.status());
    then(*rows.value());
  });
}

void PgStateStore::raise_floors(const PurgePtr& purge) {
  if (closing_) return end_purge(purge, Status::make(Code::closed, "the store was closed"));
  purge->limit = std::min(purge->left, kAtOnce);
  purge->looked = false;
  purge->writers.clear();
  Call call{&sql_.raise_floors,
            {Param::text(std::to_string(purge->limit)), Param::text(purge->background ? "t" : "f"),
             Param::text(std::to_string(purge->background ? kDeadFor / kMilli : 0))}};
  ask_for(purge, std::move(call), [this, purge](const Rows& rows) {
    purge->floors.clear();
    for (int r = 0; r < rows.rows(); ++r) purge->floors.emplace_back(rows.number(r, 0), rows.number(r, 1));
    if (purge->floors.empty()) return end_purge(purge, Status::success());
    purge->newest = rows.number(0, 2);
    purge->waiting_since = clock_.now();
    if (!purge->background) return await_writers(purge);
    after(kMoment, [this, purge] { await_writers(purge); });
  });
}

void PgStateStore::await_writers(const PurgePtr& purge) {
  std::vector<std::string_view> names(purge->writers.begin(), purge->writers.end());
  Call call{&sql_.writers, {purge->looked ? Param::text(array_of_text(names)) : Param::null()}};
  ask_for(purge, std::move(call), [this, purge](const Rows& rows) {
    purge->looked = true;
    purge->writers.clear();
    for (int r = 0; r < rows.rows(); ++r) purge->writers.emplace_back(rows.text(r, 0));
    if (purge->writers.empty()) return remove_dead(purge);
    if (clock_.now() - purge->waiting_since > kWriterPatience)
      return end_purge(purge, Status::make(Code::timeout,
                                           "a transaction keeps writing to the state table and does not end; "
                                           "nothing more was purged"));
    after(kWriterPause, [this, purge] { await_writers(purge); });
  });
}

void PgStateStore::remove_dead(const PurgePtr& purge) {
  BinaryArray buckets(BinaryArray::Type::int4), versions(BinaryArray::Type::int8);
  for (const auto& [bucket, version] : purge->floors) {
    buckets.add(bucket);
    versions.add(version);
  }
  Call call{&sql_.purge,
            {buckets.take(), versions.take(), Param::text(std::to_string(purge->newest)),
             Param::text(std::to_string(purge->limit))}};
  ask_for(purge, std::move(call), [this, purge](const Rows& rows) {
    const std::int64_t removed = rows.rows() == 1 ? rows.number(0, 0) : 0;
    purge->removed += removed;
    purge->left -= std::min(purge->left, static_cast<std::size_t>(removed));
    if (removed == 0 || static_cast<std::size_t>(removed) < purge->limit || purge->left == 0)
      return end_purge(purge, Status::success());
    raise_floors(purge);
  });
}

void PgStateStore::end_purge(const PurgePtr& purge, const Status& status) {
  if (!status.ok()) return purge->done(status);
  purge->done(purge->removed);
}

}  // namespace ratesync::postgres
