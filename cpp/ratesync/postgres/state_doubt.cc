// What became of operations that were sent and whose answer was lost.
//
// The old session may still be at work, so it is ended first and seen to be gone; then the rows tell: each
// carries the id of the operation that wrote it last. Behind a pooler nobody knows which session it was:
// there only a row with our id is an answer.

#include <algorithm>
#include <chrono>
#include <unordered_set>

#include "ratesync/postgres/state_stage.h"
#include "ratesync/postgres/state_trip.h"

namespace ratesync::postgres {

using store::StateOp;
using store::StateReply;
using Outcome = store::StateReply::Outcome;
using Verb = store::StateOp::Verb;

namespace {

constexpr Nanos kPatience = 60 * kSecond;  // for operations without a deadline
constexpr Nanos kFirstPause = 10 * kMilli;
constexpr Nanos kLongestPause = kSecond / 4;
constexpr std::int64_t kMarginUs = 100'000;  // between two clocks that count the same second

bool is_timeout(const StateOp& op) { return op.verb == Verb::schedule || op.verb == Verb::unschedule; }
bool is_write(const StateOp& op) { return !is_timeout(op) && op.verb != Verb::get && op.verb != Verb::touch; }

// What a row says now.
struct Trace {
  std::int64_t writer = 0;  // id of the operation that wrote it; 0: no row
  std::int64_t version = 0;
  bool removed = false, living = false;
  bool older = false;  // written before we sent anything, by the same clock
  store::Value value;
  std::int64_t expires_at = 0;
};

enum class Verdict : std::uint8_t { done, again, unknown };

// Ours, if it was carried out, cannot have left the row like this: version numbers only grow, a removal
// leaves the version and its mark.
bool never_ran(const StateOp& op, const Trace& trace) {
  if (trace.older) return true;
  switch (op.verb) {
    case Verb::create:
    case Verb::set:
    case Verb::add: return trace.writer == 0;
    case Verb::swap:
      return trace.writer == 0 || (op.expected >= 0 && trace.version <= op.expected) ||
             (op.expected >= 0 && trace.version == op.expected + 1 && !trace.removed);
    case Verb::remove: return trace.writer == 0;
    case Verb::get:
    case Verb::touch:
    case Verb::schedule:
    case Verb::unschedule: break;
  }
  return false;
}

void fill_done(StateOp& op, const Trace& trace) {
  op.reply = {};
  op.reply.version = trace.version;
  op.reply.expires_at = trace.expires_at;
  if (op.verb != Verb::add) return;
  op.reply.has_value = true;
  op.reply.value = trace.value;
}

Verdict judge(const QueuedState& item, const Trace& trace, bool gone) {
  StateOp& op = *item.op;
  if (op.verb == Verb::get) return Verdict::again;
  // The same effect once more, when the first cannot come later any more.
  if (!is_write(op)) return gone ? Verdict::again : Verdict::unknown;
  if (trace.writer == op.id) {
    fill_done(op, trace);
    return Verdict::done;
  }
  if (!gone) return Verdict::unknown;
  if (never_ran(op, trace)) return Verdict::again;
  if (op.verb == Verb::create && trace.version == 1 && !trace.removed && trace.living) {
    // The first version of the key, and somebody else's.
    op.reply = {};
    op.reply.outcome = Outcome::exists;
    op.reply.version = trace.version;
    op.reply.expires_at = trace.expires_at;
    op.reply.has_value = op.want_actual;
    if (op.want_actual) op.reply.value = trace.value;
    return Verdict::done;
  }
  return Verdict::unknown;
}

// All or nothing: what is known of one write is known of all.
Verdict judge(store::StateBatch& batch, const std::vector<Trace>& traces, bool gone) {
  bool ours = true, any = false, never = false, complete = true;
  for (std::size_t i = 0; i < batch.ops.size(); ++i) {
    StateOp& op = *batch.ops[i];
    if (!is_write(op)) {
      complete = false;
      continue;
    }
    const bool matches = traces[i].writer == op.id;
    any = any || matches;
    ours = ours && matches;
    // A removal of what was not there leaves no trace either way.
    never = never || (op.verb != Verb::remove && never_ran(op, traces[i]));
    if (matches) fill_done(op, traces[i]);
  }
  if (any && ours && complete) {
    batch.applied = true;
    return Verdict::done;
  }
  const bool reads_only = std::all_of(batch.ops.begin(), batch.ops.end(),
                                      [](const StateOp* op) { return op->verb == Verb::get; });
  return reads_only || (!any && gone && never) ? Verdict::again : Verdict::unknown;
}

Nanos deadline_of(const QueuedState& item) { return item.batch ? item.batch->deadline : item.op->deadline; }

}  // namespace

struct PgStateStore::Doubt {
  TripPtr trip;
  StateRound round;  // as it was sent: lines tell which operations were written as one
  StateItems items;
  Status status;
  Backend backend;  // of the lost session
  Nanos sent = 0;
  Nanos since = 0;
  Nanos pause = kFirstPause;
  bool gone = false;
  PgPool::Lease connection;
  std::vector<StateOp*> keys;  // sorted
};

void PgStateStore::doubt(const TripPtr& trip, StateItems items, const Status& status) {
  auto doubt = std::make_shared<Doubt>();
  doubt->trip = trip;
  doubt->round = std::move(trip->round);
  trip->round = {};
  doubt->items = std::move(items);
  doubt->status = status;
  doubt->backend = trip->connection->backend();
  doubt->sent = trip->sent;
  doubt->since = clock_.now();
  give_back(*trip);
  ++stats_.conflicts;
  investigate(doubt);
}

void PgStateStore::investigate(const DoubtPtr& doubt) {
  // Who has no time left is told what is known: nothing.
  StateItems unknown;
  const Nanos now = clock_.now();
  std::erase_if(doubt->items, [&](QueuedState* item) {
    const bool late =
        closing_ || now >= std::min(deadline_of(*item), saturating_add(doubt->since, kPatience));
    if (late) unknown.push_back(item);
    return late;
  });
  if (doubt->items.empty()) return end_doubt(doubt, {}, {}, std::move(unknown));
  fail_all(unknown, doubt->status);
  pool_.get([this, doubt, alive = alive_](Result<PgPool::Lease> got) {
    if (!*alive) return;
    if (!got.ok()) {
      if (got.status().code == Code::closed) return end_doubt(doubt, {}, {}, std::exchange(doubt->items, {}));
      return doubt_later(doubt);
    }
    doubt->connection = std::move(got.value());
    doubt->gone || doubt->backend.pid == 0 ? look(doubt) : end_backend(doubt);
  });
}

void PgStateStore::doubt_later(const DoubtPtr& doubt) {
  if (doubt->connection) pool_.put(std::exchange(doubt->connection, nullptr));
  after(doubt->pause, [this, doubt] { investigate(doubt); });
  doubt->pause = std::min(2 * doubt->pause, kLongestPause);
}

void PgStateStore::end_backend(const DoubtPtr& doubt) {
  std::vector<Call> calls;
  calls.push_back({&sql_.end_backend,
                   {Param::text(std::to_string(doubt->backend.pid)),
                    Param::text(std::to_string(doubt->backend.started))}});
  count(calls, 0);
  doubt->connection->run(std::move(calls), [this, doubt, alive = alive_](PipelineResult result) {
    if (!*alive) return;
    if (!result.status.ok() || result.results[0]->rows() > 0) return doubt_later(doubt);
    doubt->gone = true;
    look(doubt);
  });
}

void PgStateStore::look(const DoubtPtr& doubt) {
  doubt->keys.clear();
  for (QueuedState* item : doubt->items) {
    if (item->op)
      doubt->keys.push_back(item->op);
    else
      doubt->keys.insert(doubt->keys.end(), item->batch->ops.begin(), item->batch->ops.end());
  }
  std::sort(doubt->keys.begin(), doubt->keys.end(),
            [](const StateOp* a, const StateOp* b) { return compare_keys(*a, *b) < 0; });
  std::vector<Call> calls;
  calls.push_back({&sql_.resolve, key_params({doubt->keys.begin(), doubt->keys.end()})});
  count(calls, 0);
  doubt->connection->run(std::move(calls), [this, doubt, alive = alive_](PipelineResult result) {
    if (!*alive) return;
    if (!result.status.ok()) return doubt_later(doubt);
    resolve(doubt, *result.results[0]);
  });
}

void PgStateStore::resolve(const DoubtPtr& doubt, const Rows& rows) {
  // Ages compare with our own clock only while the server is the same.
  const Backend& now = doubt->connection->backend();
  const bool same_server = !now.timeline.empty() && now.timeline == doubt->backend.timeline;
  const std::int64_t elapsed_us = (clock_.now() - doubt->sent) / kMicro + kMarginUs;
  std::unordered_map<const StateOp*, Trace> traces;
  for (int row = 0; row < rows.rows(); ++row) {
    const auto at = static_cast<std::size_t>(rows.number(row, 0) - 1);
    if (at >= doubt->keys.size()) continue;
    Trace& trace = traces[doubt->keys[at]];
    trace.writer = rows.number(row, 1);
    trace.version = rows.number(row, 2);
    trace.removed = rows.number(row, 3) != 0;
    trace.living = rows.number(row, 4) != 0;
    trace.older = same_server && !rows.is_null(row, 5) && rows.number(row, 5) > elapsed_us;
    if (!rows.is_null(row, 6)) trace.value = read_value(rows, row, 6);
    trace.expires_at = rows.number(row, 9);
  }
  StateItems done, again, unknown;
  std::unordered_set<const QueuedState*> left(doubt->items.begin(), doubt->items.end());
  // Operations that were written as one carry the id of the last, of creations that of the first.
  for (StateStage& stage : doubt->round.stages) {
    for (StateLine& line : stage.lines) {
      if (line.count < 2 || stage.kind == StateStage::Kind::get) continue;
      bool whole = true;  // nobody of them was told that it is unknown
      for (QueuedState* item = line.first; item; item = item->next) whole = whole && left.contains(item);
      if (!whole) continue;
      const bool creation =
          stage.kind == StateStage::Kind::create || stage.kind == StateStage::Kind::create_seen;
      const StateOp* const writer = (creation ? line.first : line.last)->op;
      const auto found = traces.find(writer);
      if (found == traces.end() || found->second.writer != writer->id) continue;
      std::int64_t version = found->second.version - (creation ? 0 : line.count);
      std::int64_t sum = found->second.value.number - line.delta;
      for (QueuedState* item = line.first; item; item = item->next) {
        Trace own = found->second;
        own.version = creation ? version : ++version;
        if (item->op->verb == Verb::add) own.value.number = sum += item->op->delta;
        fill_done(*item->op, own);
        if (creation && item != line.first) {
          item->op->reply.outcome = Outcome::exists;
          item->op->reply.has_value = item->op->want_actual;
          if (item->op->want_actual) item->op->reply.value = own.value;
        }
        done.push_back(item);
        left.erase(item);
      }
    }
  }
  for (QueuedState* item : doubt->items) {
    if (!left.contains(item)) continue;
    Verdict verdict;
    if (item->op) {
      verdict = judge(*item, traces[item->op], doubt->gone);
      item->doubted = true;
    } else {
      std::vector<Trace> own;
      for (const StateOp* op : item->batch->ops) own.push_back(traces[op]);
      verdict = judge(*item->batch, own, doubt->gone);
    }
    (verdict == Verdict::done ? done : verdict == Verdict::again ? again : unknown).push_back(item);
  }
  doubt->items.clear();
  end_doubt(doubt, std::move(done), std::move(again), std::move(unknown));
}

// The lane goes on.
void PgStateStore::end_doubt(const DoubtPtr& doubt, StateItems done, StateItems again, StateItems unknown) {
  const TripPtr trip = doubt->trip;
  trip->connection = std::exchange(doubt->connection, nullptr);
  trip->pending.insert(trip->pending.end(), again.begin(), again.end());
  std::sort(trip->pending.begin(), trip->pending.end());
  for (const QueuedState* item : done) forget(*item);
  for (const QueuedState* item : unknown) forget(*item);
  Status status = doubt->status;
  if (status.message.find("written over") == std::string::npos)
    status.message +=
        "; whether it was executed cannot be told: its row was written over or is gone meanwhile";
  start_round(trip);
  deliver(done);
  for (QueuedState* item : unknown) fail(*item, status);
}

}  // namespace ratesync::postgres
