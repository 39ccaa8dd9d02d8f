#include "ratesync/redis/state_store.h"

#include <algorithm>
#include <utility>

#include "ratesync/base/format.h"
#include "ratesync/redis/errors.h"
#include "ratesync/redis/scripts.h"

namespace ratesync::redis {
namespace {

using store::StateBatch;
using store::StateOp;
using store::StateReply;
using store::Value;
using Outcome = StateReply::Outcome;
using Verb = StateOp::Verb;

constexpr std::uint8_t kOp = 0, kBatch = 1;
// Sums of times stay exact in Lua's doubles (200,000 years).
constexpr std::int64_t kFarthest = 7'000'000'000'000'000;

std::uint32_t bucket_of(const StateOp& op) { return store::bucket_of(*op.space, op.kind, op.key); }

bool writes(const StateOp& op) { return op.verb != Verb::get; }

// Leaves its id with the row.
bool writes_row(const StateOp& op) {
  return op.verb == Verb::create || op.verb == Verb::set || op.verb == Verb::swap ||
         op.verb == Verb::remove || op.verb == Verb::add;
}

// Get and remove may find nothing.
bool may_be_absent(const StateOp& op) { return op.verb == Verb::get || op.verb == Verb::remove; }

void add_value(CallWriter& to, const Value& value) {
  if (value.type == Value::Type::integer)
    to.add(value.number);
  else
    to.add(value.data);
}

bool parse_value(Value& value, std::int64_t type, std::string data) {
  if (type < 0 || type > 3) return false;
  value = {};
  value.type = static_cast<Value::Type>(type);
  if (value.type != Value::Type::integer) {
    value.data = std::move(data);
    return true;
  }
  value.number = std::strtoll(data.c_str(), nullptr, 10);
  return std::to_string(value.number) == data;
}

// One whose end nobody hears of: it keeps a place in a call whose caller had no time left.
struct GhostOp final : StateOp {
  explicit GhostOp(const StateOp& op) {
    verb = op.verb, want_actual = op.want_actual, renew = op.renew, revive = op.revive;
    space = op.space, kind = op.kind, key = op.key, value = op.value, delta = op.delta, ttl = op.ttl;
    expected = op.expected, due = op.due, due_in = op.due_in, id = op.id;
  }
  void done() override {}
};
struct GhostBatch final : StateBatch {
  explicit GhostBatch(const StateBatch& batch) {
    for (const StateOp* op : batch.ops) {
      owned.push_back(std::make_unique<GhostOp>(*op));
      ops.push_back(owned.back().get());
    }
  }
  void done() override {}
  std::vector<std::unique_ptr<GhostOp>> owned;
};

}  // namespace

RedisStateStore::RedisStateStore(asio::io_context& io, const Clock& clock, LimitBackend& backend,
                                 StateStoreOptions options)
    : io_(io),
      clock_(clock),
      backend_(backend),
      options_(std::move(options)),
      keys_(options_.prefix, options_.hash_tag),
      lanes_(io, clock, backend, *this, keys_, LaneOptions{"state", options_.call_timeout}),
      purge_timer_(std::make_unique<asio::steady_timer>(io)) {}

RedisStateStore::~RedisStateStore() { *alive_ = false; }

void RedisStateStore::submit(StateOp* op) {
  arm_purge();
  if (const Status refused = lanes_.push({op, kOp, bucket_of(*op)}); !refused.ok()) {
    op->reply = {};
    op->reply.status = refused;
    op->done();
  }
}

void RedisStateStore::submit(StateBatch* batch) {
  arm_purge();
  batch->applied = false;
  batch->status = Status::success();
  if (batch->ops.empty()) {
    batch->applied = true;
    return batch->done();
  }
  std::vector<std::uint32_t> buckets;
  for (const StateOp* op : batch->ops) buckets.push_back(bucket_of(*op));
  if (Status refused = lanes_.push({batch, kBatch, buckets.front()}, buckets); !refused.ok()) {
    batch->status = std::move(refused);
    batch->done();
  }
}

void RedisStateStore::initialize(store::Callback<store::Unit> done) {
  backend_.when_ready([done = std::move(done)](const Status& status) {
    if (status.ok()) return done(store::Unit{});
    done(status);
  });
}

void RedisStateStore::close(Nanos patience, std::function<void()> done) {
  closing_ = true;
  purge_timer_->cancel();
  lanes_.close(patience, std::move(done));
}

void RedisStateStore::abandon_after_fork() {
  (void)purge_timer_.release();
  lanes_.abandon_after_fork();
}

// --- writing a call -----------------------------------------------------------------------------------

const Script& RedisStateStore::script() const { return state_script(); }

void RedisStateStore::begin(CallWriter& to) {
  to.add(options_.purge_after / kMilli).add(std::int64_t{keys_.shards()});
}

void RedisStateStore::take_shard(std::uint32_t bucket, CallWriter& to) const {
  const std::uint32_t shard = keys_.shard_of(bucket);
  to.add(std::int64_t{bucket});
  if (!to.is_new(shard)) return;
  to.key(keys_.shard("expiring", shard));
  to.key(keys_.shard("floors", shard));
}

bool RedisStateStore::write(const LaneItem& item, bool looking, CallWriter& to) {
  if (item.kind == kOp) return write_op(*static_cast<StateOp*>(item.op), looking, to);
  const auto& batch = *static_cast<StateBatch*>(item.op);
  // Nobody knows whether it was executed: each row is looked at.
  if (looking) {
    for (const StateOp* op : batch.ops) {
      to.add(op->verb == Verb::get ? "g" : "l");
      to.key(keys_.row(keys_.shard_of(bucket_of(*op)), *op->space, op->kind, op->key));
    }
    return false;
  }
  to.add("b").add(static_cast<std::int64_t>(batch.ops.size()));
  for (const StateOp* op : batch.ops) to.add(may_be_absent(*op) ? "1" : "0");
  bool any = false;
  for (const StateOp* op : batch.ops) any |= write_op(*op, false, to);
  return any;
}

bool RedisStateStore::write_op(const StateOp& op, bool looking, CallWriter& to) const {
  const std::uint32_t bucket = bucket_of(op);
  const std::uint32_t shard = keys_.shard_of(bucket);
  const auto row = [&] { to.key(keys_.row(shard, *op.space, op.kind, op.key)); };
  const auto flag = [&to](bool yes) { to.add(yes ? "1" : "0"); };
  const auto head = [&](const char* letter) -> CallWriter& {
    to.add(letter);
    take_shard(bucket, to);
    row();
    return to;
  };
  const std::int64_t ttl = std::min(op.ttl, kFarthest);
  switch (op.verb) {
    case Verb::get:
      to.add("g");
      row();
      return false;
    case Verb::touch: head("t").add(ttl).add(op.expected); return true;
    case Verb::schedule:
    case Verb::unschedule:
      to.add(op.verb == Verb::schedule ? "d" : "u");
      to.key(keys_.of_space("timeouts", shard, *op.space));
      to.key(keys_.of_space("claims", shard, *op.space));
      to.add(StateKeys::member(op.kind, op.key));
      if (op.verb == Verb::unschedule) {
        to.add(std::max<std::int64_t>(op.expected, 0));
        return true;
      }
      to.add(std::clamp(op.due, -kFarthest, kFarthest));
      flag(op.due_in);
      return true;
    default: break;
  }
  if (looking) {
    to.add("l");
    row();
    return false;
  }
  // What is kept of a row besides version and expiry: type, whether it was removed, id, bucket.
  const auto rest = [&](Value::Type type) {
    to.add(formatted("{} 0 {} {}", static_cast<int>(type), op.id, bucket));
  };
  switch (op.verb) {
    case Verb::create:
      head(op.want_actual ? "C" : "c");
      rest(op.value.type);
      add_value(to, op.value);
      to.add(ttl);
      break;
    case Verb::set:
      head("s");
      rest(op.value.type);
      add_value(to, op.value);
      to.add(ttl);
      break;
    case Verb::swap:
      head("w");
      rest(op.value.type);
      add_value(to, op.value);
      to.add(ttl).add(op.expected);
      flag(op.want_actual);
      flag(op.revive);
      break;
    case Verb::remove: head("r").add(op.id).add(op.expected); break;
    case Verb::add:
      head("i");
      rest(Value::Type::integer);
      to.add(op.delta).add(ttl);
      flag(op.renew);
      break;
    default: break;
  }
  return true;
}

// --- reading an answer --------------------------------------------------------------------------------

Heard RedisStateStore::read(const LaneItem& item, bool looking, Answers& from) {
  if (item.kind == kOp) return read_op(*static_cast<StateOp*>(item.op), looking, from);
  auto& batch = *static_cast<StateBatch*>(item.op);
  if (looking) return look_at_batch(batch, from);
  const std::int64_t verdict = from.number();
  if (verdict == 2) {
    batch.status = from_server(from.text(), {backend_.commander().target(), {}, "state"});
    return Heard::answered;
  }
  batch.applied = verdict == 1;
  for (StateOp* op : batch.ops) {
    (void)read_op(*op, false, from);
    StateReply& reply = op->reply;
    if (!reply.status.ok() && batch.status.ok()) batch.status = reply.status;
    if (!batch.applied && reply.outcome == Outcome::done && writes(*op)) {
      reply = {};
      reply.outcome = Outcome::rolled_back;
    }
  }
  return Heard::answered;
}

// Who wrote one of its rows wrote all of them. Where none is to be written, nothing tells.
Heard RedisStateStore::look_at_batch(StateBatch& batch, Answers& from) const {
  std::size_t ours = 0, others = 0;
  for (StateOp* op : batch.ops) {
    const bool row = writes_row(*op);
    std::string id;
    read_row(op->reply, from, op->verb == Verb::get ? nullptr : &id);
    if (op->verb == Verb::get) continue;
    if (row)
      ++(look_at(*op, id, true) == Heard::answered && op->reply.outcome == Outcome::done ? ours : others);
    op->reply.outcome = Outcome::done;
  }
  batch.applied = ours > 0 && others == 0;
  return batch.applied ? Heard::answered : Heard::doubtful;
}

// `id`: where the answer is of a look, who wrote the row; empty: there is none. The answer's code.
std::int64_t RedisStateStore::read_row(StateReply& reply, Answers& from, std::string* id) const {
  reply = {};
  const std::int64_t code = from.number();
  if (code == 98) {
    reply.status = from_server(from.text(), {backend_.commander().target(), {}, "state"});
    return code;
  }
  reply.outcome = static_cast<Outcome>(code % 10);
  reply.version = from.number();
  reply.expires_at = from.number();
  if (code < 10) return code;
  const std::string type = from.text();
  reply.has_value = parse_value(reply.value, type.empty() ? -1 : type[0] - '0', from.text());
  if (!reply.has_value)
    reply.status =
        Status::make(Code::protocol, "a row of state was changed by hand: its value is not of its type");
  if (id) *id = from.text();
  return code;
}

Heard RedisStateStore::read_op(StateOp& op, bool looking, Answers& from) const {
  const bool row = looking && writes_row(op);
  std::string id;
  const std::int64_t code = read_row(op.reply, from, row ? &id : nullptr);
  if (code == 98) return Heard::answered;
  if (row) return look_at(op, id, code == 10);
  // Sent again, it found what it may have left itself.
  if (looking && writes(op) && op.reply.outcome != Outcome::done) return Heard::doubtful;
  return Heard::answered;
}

// The receipt is gone: what the row says of who wrote it last.
Heard RedisStateStore::look_at(StateOp& op, const std::string& id, bool living) const {
  StateReply& reply = op.reply;
  if (id.empty()) return Heard::doubtful;
  const bool ours = id == std::to_string(op.id);
  if (!ours && !(op.verb == Verb::create && living && reply.version == 1)) return Heard::doubtful;
  reply.outcome = ours ? Outcome::done : Outcome::exists;
  if (ours && op.verb == Verb::add) return living && reply.has_value ? Heard::answered : Heard::doubtful;
  if (!ours && op.want_actual) return Heard::answered;
  reply.has_value = false;
  reply.value = {};
  return Heard::answered;
}

// --- the operations -----------------------------------------------------------------------------------

Nanos RedisStateStore::deadline(const LaneItem& item) const {
  return item.kind == kOp ? static_cast<StateOp*>(item.op)->deadline
                          : static_cast<StateBatch*>(item.op)->deadline;
}

std::size_t RedisStateStore::bytes(const LaneItem& item) const {
  const auto of = [](const StateOp& op) { return op.value.data.size() + op.key.size() + 128; };
  if (item.kind == kOp) return of(*static_cast<StateOp*>(item.op));
  std::size_t out = 0;
  for (const StateOp* op : static_cast<StateBatch*>(item.op)->ops) out += of(*op);
  return out;
}

void RedisStateStore::tell(const LaneItem& item, const Status& status) {
  if (item.kind == kOp) {
    auto* op = static_cast<StateOp*>(item.op);
    if (!status.ok()) {
      op->reply = {};
      op->reply.status = status;
    }
    return op->done();
  }
  auto* batch = static_cast<StateBatch*>(item.op);
  if (!status.ok()) {
    batch->status = status;
    batch->applied = false;
  }
  batch->done();
}

std::pair<LaneItem, std::shared_ptr<void>> RedisStateStore::ghost(const LaneItem& item) {
  LaneItem out = item;
  if (item.kind == kOp) {
    auto op = std::make_shared<GhostOp>(*static_cast<StateOp*>(item.op));
    out.op = op.get();
    return {out, std::move(op)};
  }
  auto batch = std::make_shared<GhostBatch>(*static_cast<StateBatch*>(item.op));
  out.op = batch.get();
  return {out, std::move(batch)};
}

}  // namespace ratesync::redis
