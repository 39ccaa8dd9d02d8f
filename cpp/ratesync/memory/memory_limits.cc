// What the memory store decides about one limit, what is given back, and what is only looked at.
#include <algorithm>

#include "ratesync/memory/memory_store.h"

namespace ratesync::memory {

using store::Verdict;

namespace {

// No deal and no charge reaches further ahead than this (63 years), whatever is asked for: the sums
// stay far from overflow, where a limit would turn into none.
constexpr Nanos kMaxAhead = 2 * limits::kMaxHorizon;

limits::Quota quota_of(const limits::Params& params) { return {params.limit, params.window}; }

}  // namespace

// --- windows --------------------------------------------------------------------------------------

CellWindow& MemoryStore::window_of(Cell& cell, const limits::Params& params, Nanos now) const {
  if (!cell.window || cell.window->state.algorithm() != params.algorithm) {
    // Counted from here on: the stamp of a state that was forgotten must not be one of this state.
    cell.window = std::make_unique<CellWindow>(CellWindow{limits::WindowState(params.algorithm, now)});
  }
  return *cell.window;
}

void MemoryStore::touch(CellWindow& window, const limits::Params& params, Nanos now) const {
  window.busy_until = now + window.state.full_after(quota_of(params), clock_.wall(now));
}

// Reads the clock under the lock: with a time from before, one that came second would find a slot a
// moment ahead, and be refused although there is room. Slots were looked at before.
QuickReply MemoryStore::decide_window(Cell& cell, const store::Group& group, std::int64_t cost) {
  const limits::Params& params = group.params;
  const Nanos now = clock_.now();
  CellWindow& window = window_of(cell, params, now);
  const limits::WindowDeal deal = window.state.take(quota_of(params), clock_.wall(now), cost, 0);
  if (!deal.granted) return {Quick::refused, Verdict::rate_limited, deal.wait, now, 0};
  touch(window, params, now);
  if (params.has_concurrency()) ++cell.active;
  ++cell.version;
  return {Quick::granted, Verdict::granted, 0, now, cell.epoch};
}

void MemoryStore::take_window(Cell& cell, const store::Group& group, std::int64_t cost, Nanos now,
                              Nanos max_wait, store::AcquireReply* reply) const {
  const limits::Quota quota = quota_of(group.params);
  const Nanos wall = clock_.wall(now);
  CellWindow& window = window_of(cell, group.params, now);
  const limits::WindowDeal deal = window.state.take(quota, wall, cost, max_wait);
  if (!deal.granted) {
    reply->verdict = Verdict::rate_limited;
    reply->retry_after = deal.wait;
    return;
  }
  touch(window, group.params, now);
  reply->wait = deal.wait;
  reply->stamp = window.state.total();
  reply->remaining = window.state.available(quota, wall);
  reply->full_after = window.busy_until - now;
}

// --- one limit ------------------------------------------------------------------------------------

void MemoryStore::take_units(Cell& cell, const store::Group& group, std::int64_t cost, Nanos now,
                             Nanos max_wait, store::AcquireReply* reply) const {
  if (group.params.is_window()) return take_window(cell, group, cost, now, max_wait, reply);
  const limits::Deal dealt = limits::deal(group.params, cell.tat, now, 1, cost, max_wait);
  if (dealt.granted == 0) {
    reply->verdict = Verdict::rate_limited;
    reply->retry_after = dealt.retry_after;
    return;
  }
  cell.tat = dealt.tat;
  reply->wait = dealt.first_wait;
  reply->stamp = dealt.tat;
  reply->remaining = limits::available(group.params, cell.tat, now);
  reply->full_after = std::max<Nanos>(0, cell.tat - now);
}

store::AcquireReply MemoryStore::decide(Cell& cell, const store::Group& group, std::int64_t cost, Nanos now,
                                        Nanos max_wait) const {
  const limits::Params& params = group.params;
  store::AcquireReply reply;
  if (params.has_concurrency() && cell.active >= params.max_concurrent) {
    reply.verdict = Verdict::concurrency_full;
    return reply;
  }
  if (params.has_rate()) take_units(cell, group, cost, now, max_wait, &reply);
  if (reply.verdict != Verdict::granted) return reply;
  if (params.has_concurrency()) {
    ++cell.active;
    reply.holder = cell.epoch;
    if (!params.has_rate()) reply.remaining = params.max_concurrent - cell.active;
  }
  ++cell.version;
  return reply;
}

void MemoryStore::acquire(store::AcquireOp* op) {
  store::AcquireReply reply;
  {
    Shard& shard = shard_of(op->group->id);
    const std::lock_guard lock(shard.mutex);
    const Nanos now = clock_.now();
    const Nanos max_wait = std::clamp<Nanos>(op->deadline - now, 0, kMaxAhead);
    reply = decide(cell_of(shard, op->group->id), *op->group, op->cost, now, max_wait);
  }
  op->reply = std::move(reply);
  op->done();
}

// What one that does not wait would be told; charges nothing.
store::AcquireReply MemoryStore::refusal(const Cell& cell, const store::Group& group, std::int64_t cost,
                                         Nanos now, bool overtakes) const {
  const limits::Params& params = group.params;
  store::AcquireReply reply;
  if (params.has_concurrency() &&
      (cell.active >= params.max_concurrent || (!overtakes && cell.waiters > 0))) {
    reply.verdict = Verdict::concurrency_full;
  } else if (params.is_window()) {
    if (cell.window && cell.window->state.algorithm() == params.algorithm)
      reply.retry_after = cell.window->state.wait_of(quota_of(params), clock_.wall(now), cost);
    if (reply.retry_after > 0) reply.verdict = Verdict::rate_limited;
  } else if (params.has_rate()) {
    const limits::Deal deal = limits::deal(params, cell.tat, now, 1, cost, 0);
    if (deal.granted == 0) {
      reply.verdict = Verdict::rate_limited;
      reply.retry_after = deal.retry_after;
    }
  }
  return reply;
}

// --- giving back, correcting, looking -------------------------------------------------------------

std::int64_t MemoryStore::refund(const store::GroupRef& group, std::int64_t cost, std::int64_t stamp) {
  const limits::Params& params = group->params;
  if (!params.has_rate()) return stamp;
  Shard& shard = shard_of(group->id);
  const std::lock_guard lock(shard.mutex);
  auto it = shard.cells.find(group->id);
  if (it == shard.cells.end()) return stamp;
  Cell& cell = it->second;
  if (params.is_window()) {
    if (!cell.window || cell.window->state.algorithm() != params.algorithm) return stamp;
    const std::int64_t total = cell.window->state.total();
    if (total != stamp) return stamp;
    ++cell.version;
    const std::int64_t left = cell.window->state.refund(quota_of(params), cost, stamp);
    touch(*cell.window, params, clock_.now());
    return left;
  }
  if (cell.tat != stamp) return stamp;
  cell.tat -= limits::span(params, cost);
  ++cell.version;
  return cell.tat;
}

void MemoryStore::settle(const store::GroupRef& group, std::int64_t delta,
                         store::Callback<store::Unit> done) {
  const limits::Params& params = group->params;
  if (params.has_rate() && delta != 0) {
    Shard& shard = shard_of(group->id);
    const std::lock_guard lock(shard.mutex);
    const Nanos now = clock_.now();
    Cell& cell = cell_of(shard, group->id);
    ++cell.version;
    if (params.is_window()) {
      CellWindow& window = window_of(cell, params, now);
      window.state.settle(quota_of(params), clock_.wall(now), delta);
      touch(window, params, now);
    } else {
      const Nanos shift = limits::span(params, std::abs(delta));
      // Down to the past at most: units that were never charged cannot be saved up.
      cell.tat = delta > 0 ? std::min(std::max(cell.tat, now) + shift, now + kMaxAhead)
                           : std::max<Nanos>(cell.tat - shift, 0);
    }
  }
  done(store::Unit{});
}

store::Peek MemoryStore::peek_cell(const Cell& cell, const store::Group& group, Nanos now) const {
  const limits::Params& params = group.params;
  store::Peek out;
  out.in_use = cell.active;
  if (params.is_window()) {
    const limits::Quota quota = quota_of(params);
    const Nanos wall = clock_.wall(now);
    const limits::WindowState fresh(params.algorithm, 0);
    const bool used = cell.window && cell.window->state.algorithm() == params.algorithm;
    const limits::WindowState& state = used ? cell.window->state : fresh;
    out.available = state.available(quota, wall);
    out.full_after = state.full_after(quota, wall);
    out.retry_after = state.wait_of(quota, wall, 1);
    out.used = params.limit - out.available;
  } else if (params.has_rate()) {
    out.available = limits::available(params, cell.tat, now);
    out.full_after = std::max<Nanos>(0, cell.tat - now);
    out.retry_after = limits::deal(params, cell.tat, now, 1, 1, 0).retry_after;
  }
  if (!params.has_rate()) out.available = std::max<std::int64_t>(0, params.max_concurrent - cell.active);
  return out;
}

void MemoryStore::peek(const store::GroupRef& group, store::Callback<store::Peek> done) {
  store::Peek out;
  {
    Shard& shard = shard_of(group->id);
    const std::lock_guard lock(shard.mutex);
    const Nanos now = clock_.now();
    const Cell nothing;
    const auto it = shard.cells.find(group->id);
    out = peek_cell(it == shard.cells.end() ? nothing : it->second, *group, now);
  }
  done(out);
}

}  // namespace ratesync::memory
