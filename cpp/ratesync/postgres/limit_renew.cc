// Slots over time: saying counts again, renewing leases, noticing their loss, and the end.
#include <algorithm>
#include <chrono>

#include "ratesync/postgres/limit_params.h"
#include "ratesync/postgres/limit_trip.h"

namespace ratesync::postgres {

using store::GroupRef;

namespace {

constexpr std::size_t kRenewAtOnce = 1'000;
constexpr std::int64_t kPurgeAtOnce = 5'000;
constexpr Nanos kPurgePause = 60 * kSecond;

}  // namespace

void PgLimitStore::release(const GroupRef& group, store::HolderId holder) {
  Holding* holding = holders_.release(group->id, holder);
  if (!holding) holding = holders_together_.release(group->id, holder);
  if (holding) in_step(*holding);
}

void PgLimitStore::in_step(Holding& holding) {
  if (holding.held > 0 && leases()) arm(holding.renewed + holding.group->params.lease / 3);
  if (holding.flying || holding.queued) return;
  Holders& holders = holders_of(holding);
  if (holding.in_step()) return holders.tidy(holding);
  if (closing_) return;  // flush_slots() tells the rest, once no trip is under way
  if (holding.unstated_since != kForever)
    return arm(clock_.now() + kRestatePause);  // the last attempt failed
  holding.queued = true;
  push(QueuedOp{QueuedOp::Kind::restate, false, holding.group, nullptr, nullptr, nullptr,
                &holders == &holders_together_});
}

void PgLimitStore::report_lost(const std::string& group, store::HolderId holder, std::int64_t slots) {
  stats_.leases_lost += static_cast<std::uint64_t>(slots);
  if (lost_) lost_(group, holder);
}

void PgLimitStore::arm(Nanos at) {
  if (at >= armed_ || closing_) return;
  armed_ = at;
  timer_->expires_after(std::chrono::nanoseconds(std::max<Nanos>(at - clock_.now(), kMilli)));
  timer_->async_wait([this, alive = alive_](const asio::error_code& error) {
    if (*alive && !error) tick();
  });
}

void PgLimitStore::tick() {
  armed_ = kForever;
  if (closing_) return;
  const Nanos now = clock_.now();
  tick(holders_, now);
  tick(holders_together_, now);
}

void PgLimitStore::tick(Holders& holders, Nanos now) {
  Holders::Due due = holders.due(now, kRestatePause, leases());
  for (Holding* holding : due.lost) {
    const std::string group = holding->group->id;
    const store::HolderId before = holding->id;
    const std::int64_t slots = holders.forget(*holding);
    holding->stated = Holding::kUnknown;
    holding->unstated_since = now;
    report_lost(group, before, slots);
  }
  for (Holding* holding : due.restate) {
    holding->queued = true;
    push(QueuedOp{QueuedOp::Kind::restate, false, holding->group, nullptr, nullptr, nullptr,
                  &holders == &holders_together_});
  }
  for (std::size_t from = 0; from < due.renew.size(); from += kRenewAtOnce) {
    const std::size_t to = std::min(due.renew.size(), from + kRenewAtOnce);
    renew(holders, {due.renew.begin() + static_cast<std::ptrdiff_t>(from),
                    due.renew.begin() + static_cast<std::ptrdiff_t>(to)});
  }
  if (due.next != kForever) arm(due.next);
}

namespace {

// A renewal remembers what it was sent for: the slots may be given back and taken anew meanwhile.
struct Asked {
  std::string group;
  store::HolderId holder;
  std::uint64_t changes;
  bool flying;
  Nanos lease;
};

}  // namespace

void PgLimitStore::renew(Holders& holders, std::vector<Holding*> due) {
  auto asked = std::make_shared<std::vector<Asked>>();
  for (const Holding* holding : due)
    asked->push_back(
        {holding->group->id, holding->id, holding->changes, holding->flying, holding->group->params.lease});
  std::sort(asked->begin(), asked->end(), [](const Asked& a, const Asked& b) { return a.group < b.group; });

  const auto sent = std::make_shared<Nanos>(0);
  errand(
      asked->size(),
      [this, asked, sent]() -> std::vector<Call> {
        if (!leases()) return {};
        std::vector<std::string_view> groups;
        ArrayWriter holder, lease;
        for (const Asked& item : *asked) {
          groups.push_back(item.group);
          holder.add(static_cast<std::int64_t>(item.holder));
          lease.add(item.lease / kMicro);
        }
        const std::string names = array_of_text(groups);
        const LimitSql& sql = backend_.limit_sql();
        *sent = clock_.now();
        return {{&sql.lock, {Param::text(names)}},
                {&sql.renew, {Param::text(names), holder.take(), lease.take()}}};
      },
      [this, &holders, asked, sent](const PipelineResult& result) {
        if (!result.status.ok()) return;  // tick() comes back, until the lease is over
        std::vector<std::string> kept;
        const Rows& rows = *result.results[1];
        for (int row = 0; row < rows.rows(); ++row) kept.emplace_back(rows.text(row, 0));
        std::sort(kept.begin(), kept.end());
        for (const Asked& item : *asked) {
          Holding* holding = holders.find(item.group);
          if (!holding || holding->id != item.holder || holding->held == 0) continue;
          if (std::binary_search(kept.begin(), kept.end(), item.group)) {
            holding->renewed = std::max(holding->renewed, *sent);
            continue;
          }
          // Not there. If a statement about the group crossed the renewal, that one knows better.
          if (item.flying || holding->changes != item.changes) continue;
          const std::int64_t slots = holders.forget(*holding);
          holding->stated = 0;
          report_lost(item.group, item.holder, slots);
          if (Holding* still = holders.find(item.group)) holders.tidy(*still);
        }
      });
}

// --- what groups that went quiet left behind ---------------------------------------------------

// Whoever writes cleans up, now and then and in bounded pieces; the first time soon after the start.
void PgLimitStore::purge() {
  if (closing_ || clock_.now() < purge_at_) return;
  purge_at_ = clock_.now() + kPurgePause / 2 + static_cast<Nanos>(random_() % 1'000) * (kPurgePause / 1'000);
  errand(
      0,
      [this] {
        const LimitSql& sql = backend_.limit_sql();
        std::vector<Call> calls;
        for (const Statement* statement : {&sql.purge_log, &sql.purge_windows, &sql.purge_waiters})
          if (!statement->sql.empty())
            calls.push_back({statement, {Param::text(std::to_string(kPurgeAtOnce))}});
        return calls;
      },
      [this](const PipelineResult& result) {
        if (!result.status.ok()) return;  // the next one tries again
        for (const RowsPtr& rows : result.results)
          if (rows->integer(0, 0) >= kPurgeAtOnce) purge_at_ = clock_.now();  // there is more
      });
}

// --- the end ------------------------------------------------------------------------------------

void PgLimitStore::close(Nanos patience, std::function<void()> done) {
  listener_.close();
  timer_->cancel();
  shut(patience, std::move(done));
}

void PgLimitStore::farewell(std::function<void()> done) {
  flush_slots(lanes_per_kind_, [this, done = std::move(done)] { flush_slots(lanes_.size() - 1, done); });
}

// Slots that were given back too late for a trip of their own.
void PgLimitStore::flush_slots(std::size_t place, std::function<void()> done) {
  Layer layer;
  for (auto& [id, holding] : holders_of(*lanes_[place]))
    if (!holding.in_step() && layer.size() < kRenewAtOnce)
      layer.push_back(Run{holding.group, 1, kForever, false, {}, -1, layer.size()});
  if (layer.empty() || pool_.down()) return done();
  std::sort(layer.begin(), layer.end(), [](const Run& a, const Run& b) { return a.id() < b.id(); });
  errand(
      layer.size(),
      [this, place, layer]() -> std::vector<Call> {
        LimitTrip trip(lanes_[place], {}, nullptr);
        std::vector<std::string_view> groups;
        for (const Run& run : layer) groups.push_back(run.id());
        return {{&backend_.limit_sql().lock, {Param::text(array_of_text(groups))}}, decide_call(trip, layer)};
      },
      [alive = alive_, done = std::move(done)](const PipelineResult&) {
        if (*alive) done();
      });
}

}  // namespace ratesync::postgres
