#include "ratesync/postgres/state_store.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "ratesync/base/format.h"
#include "ratesync/postgres/state_stage.h"
#include "ratesync/postgres/state_trip.h"

namespace ratesync::postgres {

using store::StateBatch;
using store::StateOp;

namespace {

constexpr LaneRules kRules{.queue = {1'000, 100'000, 1}, .gathers = true};
constexpr std::size_t kEnough = 16;
constexpr std::size_t kNameBytes = 255;
constexpr std::size_t kKeyBytes = 1'024;

Status check_text(std::string_view what, std::string_view text, std::size_t most) {
  if (!text.empty() && text.size() <= most && utf8_length(text) > 0) return Status::success();
  return Status::make(
      Code::invalid,
      formatted("{}: expected 1 to {} bytes of UTF-8 without NUL, got {} bytes", what, most, text.size()));
}

Status check(const store::Space& space, const std::string& kind) {
  if (Status bad = check_text("namespace", space.name_space, kNameBytes); !bad.ok()) return bad;
  if (Status bad = check_text("tenant", space.tenant, kNameBytes); !bad.ok()) return bad;
  return check_text("kind", kind, kNameBytes);
}

Status check(const StateOp& op) {
  if (Status bad = check(*op.space, op.kind); !bad.ok()) return bad;
  return check_text("key", op.key, kKeyBytes);
}

// The smallest text that is greater than every text with this prefix; nothing: there is none.
Param behind(std::string prefix) {
  while (!prefix.empty()) {
    std::size_t at = prefix.size() - 1;
    while (at > 0 && (static_cast<unsigned char>(prefix[at]) & 0xC0) == 0x80) --at;
    const auto lead = static_cast<unsigned char>(prefix[at]);
    std::uint32_t point = lead < 0x80 ? lead : lead & (0x3F >> (prefix.size() - at - 1));
    for (std::size_t i = at + 1; i < prefix.size(); ++i)
      point = (point << 6) | (static_cast<unsigned char>(prefix[i]) & 0x3F);
    prefix.resize(at);
    if (point == 0x10FFFF) continue;
    point = point == 0xD7FF ? 0xE000 : point + 1;
    const auto put = [&prefix](std::uint32_t byte) { prefix += static_cast<char>(byte); };
    if (point < 0x80) {
      put(point);
    } else if (point < 0x800) {
      put(0xC0 | (point >> 6)), put(0x80 | (point & 0x3F));
    } else if (point < 0x10000) {
      put(0xE0 | (point >> 12)), put(0x80 | ((point >> 6) & 0x3F)), put(0x80 | (point & 0x3F));
    } else {
      put(0xF0 | (point >> 18)), put(0x80 | ((point >> 12) & 0x3F)), put(0x80 | ((point >> 6) & 0x3F)),
          put(0x80 | (point & 0x3F));
    }
    return Param::text(std::move(prefix));
  }
  return Param::null();
}

}  // namespace

PgStateStore::PgStateStore(PrefixBackend& backend)
    : Lanes(backend.io(), backend.clock(), backend.pool(), kRules),
      backend_(backend),
      sql_(make_state_sql(backend.names())),
      ordinary_lanes_(std::clamp<std::size_t>(backend.options().lanes, 1, 200)),
      purge_timer_(std::make_unique<asio::steady_timer>(backend.io())) {
  for (std::size_t i = 0; i < ordinary_lanes_ + 1; ++i) add_lane();
}

PgStateStore::~PgStateStore() { *alive_ = false; }

void PgStateStore::initialize(store::Callback<store::Unit> done) {
  backend_.when_ready(Facet::state, [done = std::move(done)](Status status) {
    status.ok() ? done(store::Unit{}) : done(std::move(status));
  });
}

// --- queueing -----------------------------------------------------------------------------------

void PgStateStore::fail(QueuedState& item, const Status& status) {
  if (item.batch) {
    item.batch->status = status;
    item.batch->applied = false;
    return item.batch->done();
  }
  item.op->reply = {};
  item.op->reply.status = status;
  item.op->done();
}

void PgStateStore::fail_all(const StateItems& items, const Status& status) {
  for (QueuedState* item : items) forget(*item);
  for (QueuedState* item : items) fail(*item, status);
}

void PgStateStore::each_key(const QueuedState& item, const std::function<void(std::size_t)>& visit) const {
  if (item.op) return visit(item.bucket);
  for (const StateOp* op : item.batch->ops) visit(store::bucket_of(*op->space, op->kind, op->key));
}

// Their keys were forgotten before, since a callback may submit again.
void PgStateStore::deliver(const StateItems& items) {
  for (QueuedState* item : items) item->batch ? item->batch->done() : item->op->done();
}

void PgStateStore::push(QueuedState item) {
  if (closing_) return fail(item, closed_status());
  arm_purge();
  const std::size_t place = place_for(item);
  QueuedState copy = item;
  each_slot(copy, [&](std::size_t slot) { ++(copy.wide ? wide_ : ordinary_)[slot]; });
  ++inside_;
  const Status entered = enter(place, item);
  if (!entered.ok()) fail_all({&copy}, entered);
}

std::size_t PgStateStore::place_for(const QueuedState& item) {
  if (item.wide) return ordinary_lanes_;
  const std::size_t slot = item.bucket % kSlots, ordinary = ordinary_lanes_;
  if (ordinary_[slot] > 0) return lane_of_slot_[slot];
  // One that leaves next, until it has its share aboard; then where the fewest wait. Client and server work
  // at the same time on trips of about the same size.
  const std::size_t share = std::max<std::size_t>(kEnough, inside_ / ordinary);
  std::size_t best = 0;
  for (std::size_t i = 0; i < ordinary; ++i) {
    const auto& one = *lanes_[i];
    if (!one.flying && one.queue.queued() < share) {
      best = i;
      break;
    }
    if (one.queue.queued() < lanes_[best]->queue.queued()) best = i;
  }
  for (std::size_t i = 0; i < ordinary && !moves(best); ++i)
    if (moves(i)) best = i;
  lane_of_slot_[slot] = static_cast<std::uint8_t>(best);
  return best;
}

void PgStateStore::forget(const QueuedState& item) {
  --inside_;
  each_slot(item, [&](std::size_t slot) { --(item.wide ? wide_ : ordinary_)[slot]; });
  if (!item.wide && !held_.empty()) poke();
}

void PgStateStore::submit(StateOp* op) {
  op->reply = {};
  QueuedState item;
  item.op = op;
  if (Status bad = check(*op); !bad.ok()) return fail(item, bad);
  item.bucket = store::bucket_of(*op->space, op->kind, op->key);
  item.wide = wide_[item.bucket % kSlots] > 0;
  item.seen = 4 * found_ > created_ + 8;
  push(std::move(item));
}

void PgStateStore::submit(StateBatch* batch) {
  QueuedState item;
  item.batch = batch;
  item.wide = true;
  batch->status = Status::success();
  batch->applied = false;
  for (StateOp* op : batch->ops) {
    op->reply = {};
    if (Status bad = check(*op); !bad.ok()) return fail(item, bad);
  }
  if (batch->ops.empty()) {
    batch->applied = true;
    return batch->done();
  }
  push(std::move(item));
}

bool PgStateStore::abandon(StateOp* op) {
  const std::optional<QueuedState> item = take_back(op);
  if (item) forget(*item);
  return item.has_value();
}

bool PgStateStore::abandon(StateBatch* batch) {
  const std::optional<QueuedState> item = take_back(batch);
  if (item) forget(*item);
  return item.has_value();
}

// --- what is not batched ------------------------------------------------------------------------

void PgStateStore::ask(Call call, std::size_t ops, store::Callback<RowsPtr> done) {
  errand(
      ops, [call = std::move(call)] { return std::vector<Call>{call}; },
      [done = std::move(done)](PipelineResult result) {
        if (!result.status.ok()) return done(std::move(result.status));
        done(std::move(result.results[0]));
      });
}

void PgStateStore::scan(const store::SpaceRef& space, const std::string& kind, const std::string& prefix,
                        const std::string& cursor, std::size_t page_size,
                        store::Callback<store::StatePage> done) {
  if (Status bad = check(*space, kind); !bad.ok()) return done(bad);
  if (utf8_length(prefix) < 0 || utf8_length(cursor) < 0)
    return done(Status::make(Code::invalid, "prefix and cursor: expected UTF-8 without NUL"));
  page_size = std::clamp<std::size_t>(page_size, 1, 100'000);
  Call call{
      &sql_.scan,
      {Param::text(space->name_space), Param::text(space->tenant), Param::text(kind), Param::text(prefix),
       Param::text(cursor), behind(prefix), Param::text(std::to_string(page_size + 1))}};
  ask(std::move(call), 1, [page_size, done = std::move(done)](Result<RowsPtr> answer) {
    if (!answer.ok()) return done(answer.status());
    const Rows& rows = *answer.value();
    store::StatePage page;
    const int size = std::min(rows.rows(), static_cast<int>(page_size));
    for (int r = 0; r < size; ++r)
      page.rows.push_back(
          {std::string(rows.text(r, 0)), read_value(rows, r, 1), rows.number(r, 4), rows.number(r, 5)});
    if (rows.rows() > size) page.cursor = page.rows.back().key;
    done(std::move(page));
  });
}

void PgStateStore::claim_due(const store::SpaceRef& space, const std::string& kind, std::size_t limit,
                             std::int64_t lease, store::Callback<std::vector<store::DueKey>> done) {
  if (Status bad = check(*space, kind.empty() ? "any" : kind); !bad.ok()) return done(bad);
  Call call{&sql_.claim,
            {Param::text(space->name_space), Param::text(space->tenant),
             Param::text(std::to_string(std::clamp<std::size_t>(limit, 1, 100'000))),
             Param::text(std::to_string(std::clamp<std::int64_t>(lease, 1, 300'000'000'000'000))),
             kind.empty() ? Param::null() : Param::text(kind)}};
  ask(std::move(call), 1, [done = std::move(done)](Result<RowsPtr> answer) {
    if (!answer.ok()) return done(answer.status());
    const Rows& rows = *answer.value();
    std::vector<store::DueKey> due;
    for (int r = 0; r < rows.rows(); ++r)
      due.push_back(
          {std::string(rows.text(r, 0)), std::string(rows.text(r, 1)), rows.number(r, 2), rows.number(r, 3)});
    std::sort(due.begin(), due.end(), [](const store::DueKey& a, const store::DueKey& b) {
      return a.due != b.due ? a.due < b.due : a.claim < b.claim;
    });
    done(std::move(due));
  });
}

// --- the end ------------------------------------------------------------------------------------

void PgStateStore::close(Nanos patience, std::function<void()> done) {
  purge_timer_->cancel();
  shut(patience, std::move(done));
}

}  // namespace ratesync::postgres
