// Around a trip that does not come back soon: somebody keeps a row locked. Its lane retires with it, and a
// new one takes the rest of the queue over another connection. Operations of the groups aboard wait for the
// trip's return, so that no two statements under way speak of one group.
#include <algorithm>
#include <chrono>

#include "ratesync/postgres/limit_trip.h"

namespace ratesync::postgres {
namespace {

constexpr Nanos kOverdue = kSecond / 4;
constexpr std::size_t kMostRetired = 4;  // each keeps a connection

template <class Visit>
void for_each_group(const QueuedOp& op, Visit visit) {
  if (!op.all) return visit(op.group->id);
  for (const store::Part& part : op.all->parts) visit(part.group->id);
}

}  // namespace

void PgLimitStore::watch_later() {
  if (std::exchange(watching_, true)) return;
  auto timer = std::make_shared<asio::steady_timer>(io_);
  timer->expires_after(std::chrono::nanoseconds(kOverdue / 2));
  timer->async_wait([this, timer, alive = alive_](const asio::error_code&) {
    if (!*alive) return;
    watching_ = false;
    watch();
  });
}

void PgLimitStore::watch() {
  if (closing_) return;
  bool waiting = false;
  for (std::size_t place = 0; place < lanes_.size(); ++place) {
    const Lane& lane = *lanes_[place];
    if (!lane.busy || lane.batcher.queued() == 0) continue;
    waiting = true;
    const TripPtr trip = lane.trip.lock();
    if (trip && trip->sent > 0 && clock_.now() - trip->sent >= kOverdue && retired_.size() < kMostRetired)
      retire(place);
  }
  if (waiting) watch_later();
}

void PgLimitStore::retire(std::size_t place) {
  const Kind kind = lanes_[place]->kind;
  retired_.push_back(std::exchange(
      lanes_[place],
      std::make_unique<Lane>(batch::BatcherOptions{options_.max_batch, options_.max_queue, 1}, kind)));
  Lane& old = *retired_.back();
  old.place = place;
  for (const QueuedOp& op : old.trip.lock()->batch.ops)
    for_each_group(op, [&old](const std::string& id) { old.aboard.insert(id); });
  // Pushed anew: into the new lane, or held.
  for (QueuedOp& op : old.batcher.close()) {
    tickets_.erase(op.all ? static_cast<const void*>(op.all) : op.acquire);
    push(std::move(op));
  }
}

bool PgLimitStore::held_back(QueuedOp& op) {
  const Lane* const lane = &lane_of(op);
  for (const auto& old : retired_) {
    if (lanes_[old->place].get() != lane || old->held.size() >= options_.max_queue) continue;
    bool aboard = false;
    for_each_group(op, [&](const std::string& id) { aboard = aboard || old->aboard.contains(id); });
    if (!aboard) continue;
    // Those behind it that share one of its other groups must not overtake it.
    for_each_group(op, [&](const std::string& id) { old->aboard.insert(id); });
    old->held.push_back(std::move(op));
    return true;
  }
  return false;
}

bool PgLimitStore::take_back(const void* op) {
  for (const auto& old : retired_) {
    const auto found = std::find_if(old->held.begin(), old->held.end(), [op](const QueuedOp& held) {
      return op == (held.all ? static_cast<const void*>(held.all) : held.acquire);
    });
    if (found == old->held.end()) continue;
    old->held.erase(found);
    return true;
  }
  return false;
}

void PgLimitStore::back_from(Lane& lane) {
  const auto found =
      std::find_if(retired_.begin(), retired_.end(), [&lane](const auto& old) { return old.get() == &lane; });
  if (found == retired_.end()) return;
  const std::unique_ptr<Lane> old = std::move(*found);
  retired_.erase(found);
  for (QueuedOp& op : old->held) push(std::move(op));
}

}  // namespace ratesync::postgres
