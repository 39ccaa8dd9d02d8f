#include "ratesync/redis/limit_store.h"

#include <algorithm>
#include <random>
#include <utility>

#include "ratesync/base/format.h"
#include "ratesync/limits/micro_rate.h"

namespace ratesync::redis {

using store::AcquireOp;
using store::GroupRef;
using Kind = QueuedOp::Kind;

namespace {

constexpr std::size_t kLongestId = 4'096;  // bytes

std::uint64_t random_seed() {
  std::random_device device;
  return (static_cast<std::uint64_t>(device()) << 32) ^ device();
}

Status check_id(const std::string& id) {
  if (!id.empty() && id.size() <= kLongestId) return Status::success();
  return Status::make(Code::invalid,
                      formatted("group_id: expected 1 to {} bytes, got {}", kLongestId, id.size()));
}

}  // namespace

RedisLimitStore::RedisLimitStore(asio::io_context& io, const Clock& clock, LimitBackend& backend,
                                 LimitStoreOptions options)
    : io_(io),
      clock_(clock),
      backend_(backend),
      options_(std::move(options)),
      keys_(options_.key_prefix, options_.hash_tag),
      holders_(random_seed()),
      timer_(std::make_unique<asio::steady_timer>(io)) {
  speaker_.who = options_.holder;
  speaker_.process = formatted("{:016x}", random_seed());
}

RedisLimitStore::~RedisLimitStore() { *alive_ = false; }

// --- lines --------------------------------------------------------------------------------------------

RedisLimitStore::Line& RedisLimitStore::line_of(const std::string& id) { return lines_[id]; }

void RedisLimitStore::tidy(const std::string& id) {
  const auto it = lines_.find(id);
  if (it == lines_.end()) return;
  const Line& line = it->second;
  if (line.pending.empty() && !line.flight && !line.ready && line.claims == 0 && line.blocked.empty())
    lines_.erase(it);
}

void RedisLimitStore::set_ready(const std::string& id, Line& line) {
  if (line.ready || line.flight || line.pending.empty()) return;
  line.ready = true;
  ready_.emplace_back(id, &line);
}

void RedisLimitStore::fail(QueuedOp& op, const Status& status) {
  switch (op.kind) {
    case Kind::none:
    case Kind::leave: return;
    case Kind::acquire:
      op.acquire->reply = {};
      op.acquire->reply.status = status;
      op.acquire->done();
      return;
    case Kind::restate:
      if (Holding* holding = holders_.find(op.group->id)) {
        holding->queued = false;
        holders_.failed(*holding, false, clock_.now());
        in_step(*holding);
      }
      return;
    case Kind::peek: return op.side->peeked(status);
    case Kind::refund:
    case Kind::settle:
    case Kind::reset:
      if (op.side->done) op.side->done(status);
      return;
  }
}

void RedisLimitStore::fail_all(store::AcquireAllOp* op, const Status& status) {
  op->status = status;
  op->granted = false;
  op->done();
}

void RedisLimitStore::push(QueuedOp op) {
  if (closing_) return fail(op, Status::make(Code::closed, "the store was closed"));
  if (Status bad = check_id(op.group->id); !bad.ok()) return fail(op, bad);
  if (queued_ >= options_.max_queue)
    return fail(op, Status::make(Code::exhausted,
                                 formatted("the queue is full: {} operations wait (at most {}) for {}",
                                           queued_, options_.max_queue, backend_.commander().target())));
  const std::string& id = op.group->id;
  Line& line = line_of(id);
  const GroupRef keep = op.group;
  line.pending.push_back(std::move(op));
  ++queued_;
  set_ready(id, line);
  pump();
}

// --- what may be asked --------------------------------------------------------------------------------

void RedisLimitStore::acquire(AcquireOp* op) { push(QueuedOp{Kind::acquire, false, op->group, op, nullptr}); }

bool RedisLimitStore::abandon(AcquireOp* op) {
  const auto it = lines_.find(op->group->id);
  if (it == lines_.end()) return false;
  Line& line = it->second;
  OpList& pending = line.pending;
  while (line.first < pending.size() && pending[line.first].kind == Kind::none) ++line.first;
  // From both ends: many are mostly taken back in the order in which they came, or the other way round.
  for (std::size_t i = line.first, j = pending.size(); i < j; ++i) {
    --j;
    for (const std::size_t at : {i, j}) {
      if (pending[at].acquire != op || pending[at].kind != Kind::acquire) continue;
      pending[at].kind = Kind::none;
      --queued_;
      while (!pending.empty() && pending.back().kind == Kind::none) pending.pop_back();
      line.first = std::min(line.first, pending.size());
      return true;
    }
  }
  return false;
}

void RedisLimitStore::acquire_all(store::AcquireAllOp* op) {
  if (closing_) return fail_all(op, Status::make(Code::closed, "the store was closed"));
  for (const store::Part& part : op->parts)
    if (Status bad = check_id(part.group->id); !bad.ok()) return fail_all(op, bad);
  if (queued_ >= options_.max_queue)
    return fail_all(
        op, Status::make(Code::exhausted, formatted("the queue is full: {} operations wait", queued_)));
  auto all = std::make_shared<All>();
  all->op = op;
  for (const store::Part& part : op->parts) {
    Line& line = line_of(part.group->id);
    ++line.claims;
    all->lines.push_back(&line);
  }
  ++queued_;
  alls_[op] = all;
  ready_alls_.push_back(all);
  pump();
}

// Whether the server can decide it in one step. What kind of deployment it is, is known by now.
Status RedisLimitStore::check_slots(All& all) const {
  const Commander& commander = backend_.commander();
  if (!commander.clustered()) return Status::success();
  const auto slot_of = [&](const store::Part& part) {
    return commander.slot_of(keys_.of(part.group->id, 't'));
  };
  const std::vector<store::Part>& parts = all.op->parts;
  all.slot = slot_of(parts.front());
  if (std::all_of(parts.begin(), parts.end(),
                  [&](const store::Part& part) { return slot_of(part) == all.slot; }))
    return Status::success();
  std::string names;
  for (const store::Part& part : parts)
    names += formatted("{}'{}' (slot {})", names.empty() ? "" : ", ", part.group->id, slot_of(part));
  return Status::make(
      Code::invalid,
      formatted("a Redis Cluster cannot decide limits of different hash slots in one step: {}. "
                "Give the store the option hash_tag, which keeps all its limits in one slot, or "
                "acquire them one after the other",
                names));
}

// It no longer waits for its lines: sent, or given up.
void RedisLimitStore::leave_lines(All& all) {
  for (Line* line : all.lines) --line->claims;
  all.lines.clear();
  alls_.erase(all.op);
  --queued_;
}

bool RedisLimitStore::abandon(store::AcquireAllOp* op) {
  const auto it = alls_.find(op);
  if (it == alls_.end()) return false;
  const AllPtr all = it->second;
  leave_lines(*all);
  all->op = nullptr;  // wherever it still stands, it is passed over
  for (const store::Part& part : op->parts)
    if (const auto line = lines_.find(part.group->id); line != lines_.end())
      set_ready(line->first, line->second);
  for (const store::Part& part : op->parts) tidy(part.group->id);
  pump();
  return true;
}

std::int64_t RedisLimitStore::refund(const GroupRef& group, std::int64_t cost, std::int64_t stamp) {
  const limits::Params& params = group->params;
  if (!params.has_rate()) return stamp;
  auto side = std::make_unique<QueuedOp::Side>();
  side->units = cost;
  side->stamp = stamp;
  push(QueuedOp{Kind::refund, false, group, nullptr, std::move(side)});
  return stamp - (params.is_window() ? cost : limits::MicroRate(params).span(cost));
}

void RedisLimitStore::settle(const GroupRef& group, std::int64_t delta, store::Callback<store::Unit> done) {
  if (!group->params.has_rate() || delta == 0) return done(store::Unit{});
  auto side = std::make_unique<QueuedOp::Side>();
  side->units = delta;
  side->done = std::move(done);
  push(QueuedOp{Kind::settle, false, group, nullptr, std::move(side)});
}

void RedisLimitStore::peek(const GroupRef& group, store::Callback<store::Peek> done) {
  auto side = std::make_unique<QueuedOp::Side>();
  side->peeked = std::move(done);
  push(QueuedOp{Kind::peek, false, group, nullptr, std::move(side)});
}

void RedisLimitStore::reset(const GroupRef& group, store::Callback<store::Unit> done) {
  auto side = std::make_unique<QueuedOp::Side>();
  side->done = std::move(done);
  push(QueuedOp{Kind::reset, false, group, nullptr, std::move(side)});
}

void RedisLimitStore::stop_waiting(const GroupRef& group) {
  if (listening_) push(QueuedOp{Kind::leave, false, group, nullptr, nullptr});
}

void RedisLimitStore::fail_queued(const Status& status) {
  // Only what is queued now: a caller that asks again from inside done() starts a new attempt.
  OpList ops;
  for (auto& [id, line] : lines_) {
    for (QueuedOp& op : line.pending)
      if (op.kind != Kind::none) ops.push_back(std::move(op));
    line.pending.clear();
    line.first = 0;
  }
  queued_ -= ops.size();
  std::vector<AllPtr> alls;
  for (const auto& [op, all] : alls_) alls.push_back(all);
  ready_alls_.clear();
  for (auto& [id, line] : lines_) {
    line.blocked.clear();
    line.ready = false;
  }
  ready_.clear();
  for (const AllPtr& all : alls) leave_lines(*all);
  std::erase_if(lines_, [](const auto& entry) { return !entry.second.flight; });
  for (QueuedOp& op : ops) fail(op, status);
  for (const AllPtr& all : alls) fail_all(all->op, status);
}

void RedisLimitStore::fill(store::Stats& stats) const {
  stats.batched_ops += stats_.batched_ops;
  stats.leases_lost += stats_.leases_lost;
}

}  // namespace ratesync::redis
