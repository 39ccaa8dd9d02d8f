#include "ratesync/postgres/state_stage.h"

#include <algorithm>
#include <utility>

#include "ratesync/postgres/binary_array.h"

namespace ratesync::postgres {

using store::StateOp;
using store::StateReply;
using store::Value;
using Kind = StateStage::Kind;
using Outcome = store::StateReply::Outcome;
using Type = BinaryArray::Type;
using Verb = store::StateOp::Verb;

namespace {

// About 10,000 years: what is later than that never comes, and timestamps reach so far.
constexpr std::int64_t kLongest = 300'000'000'000'000;

std::int64_t bounded(std::int64_t ms) { return std::clamp(ms, -kLongest / 5, kLongest); }

std::vector<const StateOp*> keys_of(const StateStage& stage) {
  std::vector<const StateOp*> keys;
  keys.reserve(stage.lines.size());
  for (const StateLine& line : stage.lines) keys.push_back(line.key);
  return keys;
}

// Columns of one array each, filled line by line.
struct Columns {
  explicit Columns(std::size_t lines) : n(lines) {}
  const std::size_t n;

  template <class Get>
  Param numbers(Type type, Get get) const {
    BinaryArray array(type);
    array.reserve(n, 0);
    for (std::size_t i = 0; i < n; ++i) array.add(static_cast<std::int64_t>(get(i)));
    return array.take();
  }
};

Param buckets(const StateStage& stage) {
  return Columns(stage.lines.size()).numbers(Type::int4, [&](std::size_t i) {
    const StateOp& op = *stage.lines[i].key;
    const QueuedState& item = *stage.lines[i].first;
    return item.batch ? store::bucket_of(*op.space, op.kind, op.key) : item.bucket;
  });
}

// The value that is written by each line, as type, value, number; `op_of` says whose.
template <class OpOf>
void add_values(const StateStage& stage, OpOf op_of, std::vector<Param>& out) {
  BinaryArray type(Type::int2), value(Type::bytea), number(Type::int8);
  std::size_t bytes = 0;
  for (const StateLine& line : stage.lines) bytes += op_of(line).value.data.size();
  value.reserve(stage.lines.size(), bytes);
  for (const StateLine& line : stage.lines) {
    const StateOp& op = op_of(line);
    const bool integer = op.value.type == Value::Type::integer;
    type.add(static_cast<std::int64_t>(op.value.type));
    if (op.verb == Verb::add || op.verb == Verb::schedule) {
      value.add_null();
      number.add(op.verb == Verb::add ? op.delta : bounded(op.due));
    } else if (integer) {
      value.add_null();
      number.add(op.value.number);
    } else {
      value.add(op.value.data);
      number.add_null();
    }
  }
  for (BinaryArray* array : {&type, &value, &number}) out.push_back(array->take());
}

const StateOp& first_op(const StateLine& line) { return *line.first->op; }
const StateOp& last_op(const StateLine& line) { return *line.last->op; }
const StateOp& key_op(const StateLine& line) { return *line.key; }

template <class OpOf>
void add_writers(const StateStage& stage, OpOf op_of, std::vector<Param>& out) {
  const Columns columns(stage.lines.size());
  const auto op = [&](std::size_t i) -> const StateOp& { return op_of(stage.lines[i]); };
  out.push_back(columns.numbers(Type::int8, [&](std::size_t i) { return op(i).id; }));
  out.push_back(columns.numbers(Type::int8, [&](std::size_t i) {
    const std::int64_t ttl = op(i).ttl;
    return ttl > kLongest ? store::kNoTtl : ttl;
  }));
}

Param counts(const StateStage& stage) {
  return Columns(stage.lines.size()).numbers(Type::int8, [&](std::size_t i) { return stage.lines[i].count; });
}

bool wanted(const StateLine& line) {
  for (const QueuedState* item = line.first; item; item = item->next)
    if (item->op->want_actual) return true;
  return false;
}

void add_create(const StateStage& stage, std::vector<Param>& params) {
  params.push_back(buckets(stage));
  add_values(stage, first_op, params);
  add_writers(stage, first_op, params);
  params.push_back(Columns(stage.lines.size()).numbers(Type::boolean, [&](std::size_t i) {
    return wanted(stage.lines[i]) ? 1 : 0;
  }));
}

void add_set(const StateStage& stage, std::vector<Param>& params) {
  params.push_back(buckets(stage));
  add_values(stage, last_op, params);
  add_writers(stage, last_op, params);
  params.push_back(counts(stage));
}

void add_add(const StateStage& stage, std::vector<Param>& params) {
  params.push_back(buckets(stage));
  params.push_back(
      Columns(stage.lines.size()).numbers(Type::int8, [&](std::size_t i) { return stage.lines[i].delta; }));
  add_writers(stage, last_op, params);
  params.push_back(counts(stage));
}

void add_decisions(const StateStage& stage, std::vector<Param>& params) {
  const Columns columns(stage.lines.size());
  const auto op = [&](std::size_t i) -> const StateOp& { return *stage.lines[i].key; };
  params.push_back(columns.numbers(Type::int2, [&](std::size_t i) { return static_cast<int>(op(i).verb); }));
  params.push_back(columns.numbers(Type::int2, [&](std::size_t i) {
    return (op(i).want_actual ? kWantActual : 0) | (op(i).revive ? kRevive : 0) | (op(i).renew ? kRenew : 0) |
           (op(i).due_in ? kDueIn : 0);
  }));
  add_values(stage, key_op, params);
  add_writers(stage, key_op, params);
  params.push_back(columns.numbers(Type::int8, [&](std::size_t i) { return op(i).expected; }));
}

// Of a batch, `lock` must not make rows for what only reads or removes timeouts.
void add_decide(const StateSql& sql, const StateStage& stage, std::vector<Call>& calls) {
  std::vector<const StateOp*> locked;
  BinaryArray bucket(Type::int4);
  bool timeouts = false;
  for (const StateLine& line : stage.lines) {
    const Verb verb = line.key->verb;
    const bool timeout = verb == Verb::schedule || verb == Verb::unschedule;
    timeouts = timeouts || timeout;
    if (timeout || verb == Verb::get) continue;
    locked.push_back(line.key);
    bucket.add(static_cast<std::int64_t>(store::bucket_of(*line.key->space, line.key->kind, line.key->key)));
  }
  if (!locked.empty()) {
    calls.push_back({&sql.lock, key_params(locked)});
    calls.back().params.push_back(bucket.take());
  }
  calls.push_back({timeouts ? &sql.decide_timeouts : &sql.decide, key_params(keys_of(stage))});
  add_decisions(stage, calls.back().params);
  calls.back().params.push_back(
      Columns(stage.lines.size()).numbers(Type::int4, [&](std::size_t i) { return stage.lines[i].group; }));
}

// --- answers ------------------------------------------------------------------------------------

void fill(StateReply& reply, Outcome outcome, std::int64_t version, std::int64_t expires) {
  reply = {};
  reply.outcome = outcome;
  reply.version = version;
  reply.expires_at = expires;
}

void fill_value(StateReply& reply, Value value) {
  reply.has_value = true;
  reply.value = std::move(value);
}

// Rows that name an operation come in the order of the lines, but for those that are left out.
class LineFinder {
 public:
  LineFinder(const StateStage& stage, bool by_first) : stage_(stage), by_first_(by_first) {}
  const StateLine* find(std::int64_t id) {
    for (std::size_t n = 0; n < stage_.lines.size(); ++n, at_ = (at_ + 1) % stage_.lines.size()) {
      const StateLine& line = stage_.lines[at_];
      if ((by_first_ ? line.first : line.last)->op->id == id) return &line;
    }
    return nullptr;
  }

 private:
  const StateStage& stage_;
  const bool by_first_;
  std::size_t at_ = 0;
};

// Which lines got an answer; the others ask again.
class Answered {
 public:
  Answered(const StateStage& stage, StateDealt& dealt)
      : stage_(stage), dealt_(dealt), yes_(stage.lines.size(), false) {}
  void mark(const StateLine& line) {
    yes_[static_cast<std::size_t>(&line - stage_.lines.data())] = true;
    for (QueuedState* item = line.first; item; item = item->next) dealt_.done.push_back(item);
  }
  ~Answered() {
    for (std::size_t i = 0; i < yes_.size(); ++i)
      for (QueuedState* item = yes_[i] ? nullptr : stage_.lines[i].first; item; item = item->next)
        dealt_.again.push_back(item);
  }

 private:
  const StateStage& stage_;
  StateDealt& dealt_;
  std::vector<bool> yes_;
};

void deal_create(const StateStage& stage, const Rows& rows, StateDealt& dealt) {
  Answered answered(stage, dealt);
  LineFinder finder(stage, true);
  for (int row = 0; row < rows.rows(); ++row) {
    const StateLine* const line = finder.find(rows.number(row, 0));
    if (!line) continue;
    const auto outcome = static_cast<Outcome>(rows.number(row, 1));
    const std::int64_t version = rows.number(row, 2), expires = rows.number(row, 3);
    for (QueuedState* item = line->first; item; item = item->next) {
      const bool made = outcome == Outcome::done;
      StateReply& reply = item->op->reply;
      fill(reply, made && item == line->first ? Outcome::done : Outcome::exists, version, expires);
      if (reply.outcome == Outcome::exists && item->op->want_actual)
        fill_value(reply, made ? line->first->op->value : read_value(rows, row, 4));
    }
    answered.mark(*line);
  }
}

// Merged writes: each has its own version, and of sums its own.
void deal_writes(const StateStage& stage, const Rows& rows, bool sums, StateDealt& dealt) {
  Answered answered(stage, dealt);
  LineFinder finder(stage, false);
  for (int row = 0; row < rows.rows(); ++row) {
    const StateLine* const line = finder.find(rows.number(row, 0));
    if (!line) continue;
    std::int64_t version = rows.number(row, 1) - line->count;
    std::int64_t sum = sums ? rows.number(row, 3) - line->delta : 0;
    for (QueuedState* item = line->first; item; item = item->next) {
      fill(item->op->reply, Outcome::done, ++version, rows.number(row, 2));
      if (sums) fill_value(item->op->reply, {Value::Type::integer, {}, sum += item->op->delta});
    }
    answered.mark(*line);
  }
}

const StateLine* line_at(const StateStage& stage, const Rows& rows, int row) {
  const auto at = static_cast<std::size_t>(rows.number(row, 0) - 1);
  return at < stage.lines.size() ? &stage.lines[at] : nullptr;
}

void deal_get(const StateStage& stage, const Rows& rows, StateDealt& dealt) {
  Answered answered(stage, dealt);
  for (int row = 0; row < rows.rows(); ++row) {
    const StateLine* const line = line_at(stage, rows, row);
    if (!line) continue;
    const bool found = !rows.is_null(row, 4);
    for (QueuedState* item = line->first; item; item = item->next) {
      fill(item->op->reply, found ? Outcome::done : Outcome::absent, rows.number(row, 4),
           rows.number(row, 5));
      if (found) fill_value(item->op->reply, read_value(rows, row, 1));
    }
    answered.mark(*line);
  }
}

void deal_modify(const StateStage& stage, const Rows& rows, StateDealt& dealt) {
  Answered answered(stage, dealt);
  for (int row = 0; row < rows.rows(); ++row) {
    const StateLine* const line = line_at(stage, rows, row);
    if (!line || rows.is_null(row, 1)) continue;
    StateReply& reply = line->first->op->reply;
    fill(reply, static_cast<Outcome>(rows.number(row, 1)), rows.number(row, 2), rows.number(row, 3));
    if (!rows.is_null(row, 4)) fill_value(reply, read_value(rows, row, 4));
    answered.mark(*line);
  }
}

void deal_unschedule(const StateStage& stage, const Rows& rows, StateDealt& dealt) {
  Answered answered(stage, dealt);
  for (int row = 0; row < rows.rows(); ++row) {
    const StateLine* const line = line_at(stage, rows, row);
    if (!line || rows.is_null(row, 1)) continue;
    auto outcome = static_cast<Outcome>(rows.number(row, 1));
    // Sent again after a lost answer: the first one removed it.
    if (outcome == Outcome::absent && line->first->doubted) outcome = Outcome::done;
    fill(line->first->op->reply, outcome, rows.number(row, 2), 0);
    answered.mark(*line);
  }
}

void deal_schedule(const StateStage& stage, const Rows& rows, StateDealt& dealt) {
  Answered answered(stage, dealt);
  if (rows.rows() != 1 || rows.number(0, 0) != static_cast<std::int64_t>(stage.lines.size())) return;
  for (const StateLine& line : stage.lines) {
    fill(line.first->op->reply, Outcome::done, 0, 0);
    answered.mark(line);
  }
}

void deal_decide(const StateStage& stage, const Rows& rows, StateDealt& dealt) {
  std::vector<std::size_t> answers(stage.items.size(), 0);
  for (int row = 0; row < rows.rows(); ++row) {
    const StateLine* const line = line_at(stage, rows, row);
    if (!line || rows.is_null(row, 1)) continue;
    StateReply& reply = line->key->reply;
    const bool applied = rows.number(row, 2) != 0;
    fill(reply, static_cast<Outcome>(rows.number(row, 1)), rows.number(row, 3), rows.number(row, 4));
    if (line->key->verb == Verb::add && reply.outcome == Outcome::done)
      fill_value(reply, {Value::Type::integer, {}, rows.number(row, 7)});
    else if (!rows.is_null(row, 5))
      fill_value(reply, read_value(rows, row, 5));
    if (!applied && reply.outcome == Outcome::done) fill(reply, Outcome::rolled_back, 0, 0);
    const auto group = static_cast<std::size_t>(line->group);
    ++answers[group];
    if (stage.items[group]->batch) stage.items[group]->batch->applied = applied;
  }
  for (std::size_t group = 0; group < stage.items.size(); ++group) {
    QueuedState* const item = stage.items[group];
    const std::size_t size = item->batch ? item->batch->ops.size() : 1;
    (answers[group] == size ? dealt.done : dealt.again).push_back(item);
  }
}

}  // namespace

store::Value read_value(const Rows& rows, int row, int column) {
  Value value;
  if (rows.is_null(row, column)) return value;
  value.type = static_cast<Value::Type>(rows.number(row, column));
  if (value.type == Value::Type::integer)
    value.number = rows.number(row, column + 2);
  else
    value.data = rows.text(row, column + 1);
  return value;
}

std::vector<Param> key_params(const std::vector<const StateOp*>& keys) {
  BinaryArray name_space(Type::text), tenant(Type::text), kind(Type::text), family(Type::int2),
      key(Type::text);
  std::size_t bytes = 0;
  for (const StateOp* op : keys) bytes += op->key.size();
  family.reserve(keys.size(), 0);
  key.reserve(keys.size(), bytes);
  const StateOp* previous = nullptr;
  for (const StateOp* op : keys) {
    // Sorted: those of one family lie together.
    const bool same =
        previous && previous->kind == op->kind &&
        (previous->space == op->space || (previous->space->name_space == op->space->name_space &&
                                          previous->space->tenant == op->space->tenant));
    if (!same) {
      name_space.add(op->space->name_space);
      tenant.add(op->space->tenant);
      kind.add(op->kind);
    }
    previous = op;
    family.add(static_cast<std::int64_t>(kind.size()));
    key.add(op->key);
  }
  std::vector<Param> out;
  out.reserve(14);
  for (BinaryArray* array : {&name_space, &tenant, &kind, &family, &key}) out.push_back(array->take());
  return out;
}

StateItems items_of(const StateStage& stage) {
  if (stage.kind == Kind::decide) return stage.items;
  StateItems out;
  for (const StateLine& line : stage.lines)
    for (QueuedState* item = line.first; item; item = item->next) out.push_back(item);
  return out;
}

void add_stage(const StateSql& sql, StateStage& stage, std::vector<Call>& calls) {
  if (stage.kind == Kind::decide) {
    add_decide(sql, stage, calls);
  } else {
    Call call{nullptr, key_params(keys_of(stage))};
    const Columns columns(stage.lines.size());
    const auto op = [&](std::size_t i) -> const StateOp& { return *stage.lines[i].key; };
    switch (stage.kind) {
      case Kind::create:
        call.statement = stage.all_new ? &sql.create_new : &sql.create;
        add_create(stage, call.params);
        break;
      case Kind::create_seen: call.statement = &sql.create_seen, add_create(stage, call.params); break;
      case Kind::set: call.statement = &sql.set, add_set(stage, call.params); break;
      case Kind::add: call.statement = &sql.add, add_add(stage, call.params); break;
      case Kind::add_renew: call.statement = &sql.add_renew, add_add(stage, call.params); break;
      case Kind::get: call.statement = &sql.get; break;
      case Kind::modify: call.statement = &sql.modify, add_decisions(stage, call.params); break;
      case Kind::schedule:
        call.statement = &sql.schedule;
        call.params.push_back(columns.numbers(Type::int8, [&](std::size_t i) { return bounded(op(i).due); }));
        call.params.push_back(columns.numbers(Type::boolean, [&](std::size_t i) { return op(i).due_in; }));
        break;
      case Kind::unschedule:
        call.statement = &sql.unschedule;
        call.params.push_back(columns.numbers(Type::int8, [&](std::size_t i) { return op(i).expected; }));
        break;
      case Kind::decide: break;
    }
    calls.push_back(std::move(call));
  }
  stage.first_call = calls.size() - 1;
  calls.back().sync = true;
}

void deal_stage(const StateStage& stage, const Rows& rows, StateDealt& dealt) {
  switch (stage.kind) {
    case Kind::create:
    case Kind::create_seen: return deal_create(stage, rows, dealt);
    case Kind::set: return deal_writes(stage, rows, false, dealt);
    case Kind::add:
    case Kind::add_renew: return deal_writes(stage, rows, true, dealt);
    case Kind::get: return deal_get(stage, rows, dealt);
    case Kind::modify: return deal_modify(stage, rows, dealt);
    case Kind::schedule: return deal_schedule(stage, rows, dealt);
    case Kind::unschedule: return deal_unschedule(stage, rows, dealt);
    case Kind::decide: return deal_decide(stage, rows, dealt);
  }
}

}  // namespace ratesync::postgres
