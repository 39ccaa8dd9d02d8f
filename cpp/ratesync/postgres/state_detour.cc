// Around a trip that does not come back soon: somebody keeps a row locked, such as a transaction that an
// idempotent operation is committed in. What has no key in common with it travels in another lane, at worst
// in a spare one; the rest waits for its return, so that no two statements under way speak of one key.
#include <algorithm>
#include <utility>
#include <vector>

#include "ratesync/postgres/state_trip.h"

namespace ratesync::postgres {

using store::StateOp;

namespace {

constexpr Nanos kOverdue = kSecond / 4;
constexpr std::size_t kSpareLanes = 4;  // each keeps a connection while it is in use

}  // namespace

bool PgStateStore::overdue(const Lane& lane) const {
  return lane.flying && clock_.now() - lane.sent >= kOverdue;
}

// An ordinary lane, else a spare one. Nothing: all of them are overdue.
std::optional<std::size_t> PgStateStore::lane_that_moves() {
  const std::size_t count = lanes_.size() - 1;
  for (std::size_t i = 0; i < count; ++i)
    if (!overdue(*lanes_[i])) return i;
  if (count >= ordinary_lanes_ + kSpareLanes) return std::nullopt;
  lanes_.insert(lanes_.end() - 1, std::make_unique<Lane>(lanes_.back()->batcher.options(), backend_.io()));
  return count;
}

void PgStateStore::watch_later() {
  if (std::exchange(watching_, true)) return;
  after(kOverdue / 2, [this] {
    watching_ = false;
    if (!closing_) watch();
  });
}

void PgStateStore::watch() {
  bool waiting = false;
  for (std::size_t i = 0; i + 1 < lanes_.size(); ++i) {
    if (!lanes_[i]->busy || lanes_[i]->batcher.queued() == 0) continue;
    waiting = true;
    if (overdue(*lanes_[i])) rescue(*lanes_[i]);
  }
  if (waiting) watch_later();
}

void PgStateStore::rescue(Lane& lane) {
  const TripPtr trip = lane.trip.lock();
  if (!trip) return;
  std::vector<bool> aboard(kSlots, false);
  for (const QueuedState& item : trip->batch.ops) aboard[item.bucket % kSlots] = true;
  std::vector<std::pair<std::uint64_t, const void*>> queued;  // in the order of their arrival
  for (const auto& [op, place] : tickets_) {
    if (place.lane != &lane) continue;
    const auto* const asked = static_cast<const StateOp*>(op);  // batches have a lane of their own
    if (!aboard[store::bucket_of(*asked->space, asked->kind, asked->key) % kSlots])
      queued.emplace_back(place.ticket.serial, op);
  }
  const std::optional<std::size_t> index = queued.empty() ? std::nullopt : lane_that_moves();
  if (!index) return;
  Lane& other = *lanes_[*index];
  std::sort(queued.begin(), queued.end());
  std::vector<std::pair<QueuedState, Status>> refused;
  for (const auto& [serial, op] : queued) {
    const auto found = tickets_.find(op);
    std::optional<QueuedState> item = lane.batcher.cancel(found->second.ticket);
    tickets_.erase(found);
    if (!item) continue;
    lane_of_slot_[item->bucket % kSlots] = static_cast<std::uint8_t>(*index);
    const Result<batch::Ticket> ticket = other.batcher.push(std::move(*item), 0);
    if (ticket.ok()) {
      tickets_[op] = {&other, ticket.value()};
    } else {
      refused.emplace_back(*item, ticket.status());
    }
  }
  pump(other);
  for (auto& [item, status] : refused) fail_all({&item}, status);
}

}  // namespace ratesync::postgres
