// What one call carries, and how its answer is dealt out.
#include <algorithm>
#include <array>
#include <string_view>
#include <utility>

#include "ratesync/redis/limit_store.h"
#include "ratesync/redis/scripts.h"

namespace ratesync::redis {

using Kind = QueuedOp::Kind;

namespace {

// Of a Cluster every slot has calls of its own, which wait for nobody else's node.
constexpr std::size_t kMaxCallsOfCluster = 4'096;

// What one limit alone can have caused: it must not fail those that travel with it.
bool may_be_one_limits(const Status& status) {
  static constexpr std::array<std::string_view, 3> kinds = {"WRONGTYPE", "ERR", "NOPERM"};
  return status.code == Code::server && std::find(kinds.begin(), kinds.end(), status.sqlstate) != kinds.end();
}

bool is_quick(const OpList& pending) {
  return std::all_of(pending.begin(), pending.end(), [](const QueuedOp& op) {
    return op.kind == Kind::none ||
           (op.kind == Kind::acquire && !op.group->params.is_window() && !op.group->params.has_concurrency());
  });
}

}  // namespace

// What a call decided, before anybody is told.
struct RedisLimitStore::Dealt {
  struct Lost {
    std::string group;
    store::HolderId holder;
    std::int64_t slots;
  };
  OpList acquires;  // replies are filled in
  OpList again;     // ask once more
  OpList sides;     // refund, settle, reset
  std::vector<std::pair<QueuedOp, store::Peek>> peeks;
  std::vector<store::AcquireAllOp*> alls;
  std::vector<Lost> lost;
  std::vector<Holding*> touched;
  bool waits = false;  // somebody stands in line for a slot
};

// --- boarding -----------------------------------------------------------------------------------------

void RedisLimitStore::pump() {
  if (pumping_ || queued_ == 0) return;
  if (!backend_.ready()) {
    if (std::exchange(asking_, true)) return;
    return backend_.when_ready([this, alive = alive_](const Status& status) {
      if (!*alive) return;
      asking_ = false;
      if (!status.ok()) return fail_queued(status);
      pump();
    });
  }
  pumping_ = true;
  Flights open;
  Refused refused;
  board_alls(open, refused);
  board_lines(open);
  for (const FlightPtr& flight : open) send(flight);
  pumping_ = false;
  for (auto& [all, status] : refused) {
    for (const store::Part& part : all->op->parts) tidy(part.group->id);
    fail_all(all->op, status);
  }
}

RedisLimitStore::Flight* RedisLimitStore::flight_for(Flights& open, std::uint16_t slot, std::size_t limits,
                                                     bool quick, bool alone) {
  if (!alone)
    for (const FlightPtr& flight : open)
      if (!flight->alone && flight->slot == slot && flight->quick == quick &&
          flight->lines.size() + limits <= options_.max_limits)
        return flight.get();
  const bool clustered = backend_.commander().clustered();
  if (flights_ >= (clustered ? kMaxCallsOfCluster : options_.max_calls)) return nullptr;
  ++flights_;
  open.push_back(std::make_shared<Flight>());
  Flight& flight = *open.back();
  flight.slot = slot;
  flight.quick = quick;
  flight.alone = alone;
  return &flight;
}

void RedisLimitStore::enter(Flight& flight, const std::string& id, Line& line, std::size_t group) {
  line.flight = &flight;
  line.group = group;
  flight.lines.push_back(&line);
  flight.ids.push_back(id);
}

void RedisLimitStore::take_along(Flight& flight, Line& line, std::size_t group) {
  const auto live = [&line] {
    return static_cast<std::size_t>(std::count_if(line.pending.begin(), line.pending.end(),
                                                  [](const QueuedOp& op) { return op.kind != Kind::none; }));
  };
  const std::size_t before = live();
  plan_limit(flight.call, group, line.pending, clock_.now());
  queued_ -= before - line.pending.size();
  line.first = 0;
}

void RedisLimitStore::board_lines(Flights& open) {
  if (open.empty() && flights_ >= options_.max_calls && !backend_.commander().clustered()) return;
  while (!ready_.empty()) {
    const auto [id, line] = ready_.front();
    const bool empty = std::all_of(line->pending.begin(), line->pending.end(),
                                   [](const QueuedOp& op) { return op.kind == Kind::none; });
    if (empty || line->flight || line->claims > 0) {
      if (empty) line->pending.clear();
      line->ready = false;
      ready_.pop_front();
      tidy(id);
      continue;
    }
    const Commander& commander = backend_.commander();
    const std::uint16_t slot = commander.clustered() ? commander.slot_of(keys_.of(id, 't')) : 0;
    Flight* flight = flight_for(open, slot, 1, is_quick(line->pending), line->alone);
    if (!flight) return;
    line->ready = line->alone = false;
    ready_.pop_front();
    const std::size_t place = flight->call.groups.size();
    take_along(*flight, *line, kNew);
    enter(*flight, id, *line, place);
  }
}

// The line that keeps a call for several limits from boarding, if any.
RedisLimitStore::Line* RedisLimitStore::obstacle(const Flights& open, const All& all) const {
  const Flight* common = nullptr;
  for (std::size_t i = 0; i < all.lines.size(); ++i) {
    Line* line = all.lines[i];
    if (!line->flight) continue;
    const bool boarding = std::any_of(
        open.begin(), open.end(), [line](const FlightPtr& flight) { return flight.get() == line->flight; });
    if (!boarding || (common && common != line->flight) || line->flight->alone || all.alone ||
        line->flight->lines.size() + all.lines.size() > options_.max_limits ||
        !same_limit(all.op->parts[i].group, line->flight->call.groups[line->group].group))
      return line;
    common = line->flight;
  }
  return nullptr;
}

void RedisLimitStore::board_alls(Flights& open, Refused& refused) {
  while (!ready_alls_.empty()) {
    const AllPtr all = ready_alls_.front();
    if (!all->op) {
      ready_alls_.pop_front();
      continue;
    }
    if (Status bad = check_slots(*all); !bad.ok()) {
      for (std::size_t i = 0; i < all->lines.size(); ++i)
        set_ready(all->op->parts[i].group->id, *all->lines[i]);
      leave_lines(*all);
      ready_alls_.pop_front();
      refused.emplace_back(all, std::move(bad));
      continue;
    }
    if (Line* line = obstacle(open, *all)) {
      line->blocked.push_back(all);
      ready_alls_.pop_front();
      continue;
    }
    Flight* flight = nullptr;
    for (const Line* line : all->lines)
      if (line->flight) flight = line->flight;
    if (!flight) flight = flight_for(open, all->slot, all->lines.size(), false, all->alone);
    if (!flight) return;
    ready_alls_.pop_front();
    board(*flight, all);
  }
}

void RedisLimitStore::board(Flight& flight, const AllPtr& all) {
  AllParts parts{all->op, {}};
  for (std::size_t i = 0; i < all->lines.size(); ++i) {
    const store::GroupRef& group = all->op->parts[i].group;
    Line& line = *all->lines[i];
    if (!line.flight) {
      const std::size_t place = declare(flight.call, group);
      if (!flight.alone) take_along(flight, line, place);
      enter(flight, group->id, line, place);
    }
    flight.call.groups[line.group].rate |= group->params.has_rate();
    parts.groups.push_back(line.group);
  }
  flight.call.now = clock_.now();
  flight.call.alls.push_back(std::move(parts));
  flight.alls.push_back(all);
  leave_lines(*all);
}

// --- sending ------------------------------------------------------------------------------------------

void RedisLimitStore::send(const FlightPtr& flight) {
  state_slots(*flight);
  speaker_.hears = pushes();
  speaker_.counted = !backend_.commander().clustered();
  flight->sent = clock_.now();
  stats_.batched_ops += flight->call.alls.size();
  for (const Run& run : flight->call.runs) stats_.batched_ops += run.ops.size();
  backend_.commander().eval(limit_script(), key_of(flight->call, keys_),
                            call_arguments(flight->call, keys_, speaker_),
                            saturating_add(flight->sent, options_.call_timeout),
                            [this, flight, alive = alive_](Result<Reply> reply) {
                              if (*alive) answered(flight, std::move(reply));
                            });
}

void RedisLimitStore::answered(const FlightPtr& flight, Result<Reply> reply) {
  if (!reply.ok()) return failed(flight, reply.status());
  const Result<CallAnswer> answer = read_answer(flight->call, reply.value());
  if (!answer.ok()) return failed(flight, answer.status());
  Dealt dealt;
  deal(*flight, answer.value(), dealt);
  if (dealt.waits) listen();
  put_back(std::move(dealt.again));
  land(*flight);
  for (Holding* holding : dealt.touched) in_step(*holding);
  // The next call leaves before the callers of this one are told: server and client overlap.
  pump();
  tell(dealt);
  maybe_closed();
}

void RedisLimitStore::tell(Dealt& dealt) {
  for (const Dealt::Lost& lost : dealt.lost) report_lost(lost.group, lost.holder, lost.slots);
  for (QueuedOp& op : dealt.acquires) op.acquire->done();
  for (store::AcquireAllOp* op : dealt.alls) op->done();
  for (QueuedOp& op : dealt.sides)
    if (op.side && op.side->done) op.side->done(store::Unit{});
  for (auto& [op, peek] : dealt.peeks) op.side->peeked(peek);
}

// What was granted and lost, limit by limit.
void RedisLimitStore::deal_groups(Flight& flight, const CallAnswer& answer, Dealt& dealt) {
  const LimitCall& call = flight.call;
  std::vector<std::int64_t> granted(call.groups.size(), 0);
  for (std::size_t i = 0; i < call.runs.size(); ++i) granted[call.runs[i].group] += answer.runs[i].granted;
  for (std::size_t i = 0; i < call.alls.size(); ++i)
    for (const std::size_t group : call.alls[i].groups) granted[group] += answer.alls[i].granted ? 1 : 0;
  for (std::size_t i = 0; i < call.groups.size(); ++i) {
    Holding* holding = call.groups[i].holding;
    if (!holding) continue;
    const store::HolderId before = holding->id;
    const std::int64_t gone =
        holders_.answered(*holding, granted[i], answer.groups[i].lost, answer.groups[i].wrote, flight.sent);
    if (gone > 0) dealt.lost.push_back({call.groups[i].group->id, before, gone});
    dealt.touched.push_back(holding);
  }
}

void RedisLimitStore::deal(Flight& flight, const CallAnswer& answer, Dealt& dealt) {
  LimitCall& call = flight.call;
  deal_groups(flight, answer, dealt);
  const auto holder_of = [&call](std::size_t group) {
    const Holding* holding = call.groups[group].holding;
    return holding ? holding->id : store::HolderId{0};
  };
  for (std::size_t i = 0; i < call.runs.size(); ++i) {
    Run& run = call.runs[i];
    dealt.waits |= run.queued && answer.runs[i].full;
    deal_run(run, *call.groups[run.group].group, answer.runs[i], holder_of(run.group), call.now,
             dealt.acquires, dealt.again);
  }
  for (std::size_t i = 0; i < call.alls.size(); ++i) {
    store::AcquireAllOp* op = call.alls[i].op;
    const AllAnswer& decided = answer.alls[i];
    op->status = Status::success();
    op->granted = decided.granted;
    op->replies.clear();
    dealt.waits |= op->queued && !decided.granted;
    for (std::size_t part = 0; part < decided.parts.size(); ++part)
      op->replies.push_back(
          deal_part(op->parts[part], decided, decided.parts[part], holder_of(call.alls[i].groups[part])));
    dealt.alls.push_back(op);
  }
  for (std::size_t i = 0; i < call.peeks.size(); ++i) {
    auto& [group, op] = call.peeks[i];
    const store::Peek peek = deal_peek(call.groups[group].group->params, answer.peeks[i]);
    dealt.peeks.emplace_back(std::move(op), peek);
  }
  call.peeks.clear();
  for (QueuedOp& op : call.resets) {
    // Our own lease went with the others.
    Holding* holding = holders_.find(op.group->id);
    if (!holding || holding->flying) continue;
    const store::HolderId before = holding->id;
    const std::int64_t slots = holders_.forget(*holding);
    holding->stated = 0;
    if (slots > 0) dealt.lost.push_back({op.group->id, before, slots});
    dealt.touched.push_back(holding);
  }
  for (QueuedOp& op : call.restatements)
    if (Holding* holding = holders_.find(op.group->id)) holding->queued = false;
  call.restatements.clear();
  for (QueuedOp& op : call.take_ops()) dealt.sides.push_back(std::move(op));
}

// The line is free for its next call; what was blocked by it goes first.
void RedisLimitStore::land(Flight& flight) {
  --flights_;
  for (std::size_t i = 0; i < flight.lines.size(); ++i) {
    Line& line = *flight.lines[i];
    line.flight = nullptr;
    for (AllPtr& all : std::exchange(line.blocked, {})) ready_alls_.push_back(std::move(all));
    set_ready(flight.ids[i], line);
  }
  for (const std::string& id : std::exchange(flight.ids, {})) tidy(id);
  flight.lines.clear();
}

// --- failures -----------------------------------------------------------------------------------------

void RedisLimitStore::put_back(OpList ops) {
  queued_ += ops.size();
  std::unordered_map<std::string_view, std::vector<std::size_t>> by_line;
  for (std::size_t i = 0; i < ops.size(); ++i) by_line[ops[i].group->id].push_back(i);
  for (const auto& [id, places] : by_line) {
    OpList& pending = line_of(std::string(id)).pending;
    OpList front;
    for (const std::size_t place : places) front.push_back(std::move(ops[place]));
    for (QueuedOp& op : pending) front.push_back(std::move(op));
    pending = std::move(front);
  }
}

void RedisLimitStore::failed(const FlightPtr& flight, const Status& status) {
  const bool certain = status.code == Code::unavailable || status.code == Code::timeout ||
                       status.code == Code::exhausted || status.code == Code::closed;
  std::vector<Holding*> touched;
  for (CallGroup& group : flight->call.groups) {
    if (!group.holding) continue;
    holders_.failed(*group.holding, !certain, clock_.now());
    touched.push_back(std::exchange(group.holding, nullptr));
  }
  if (certain || status.code == Code::in_doubt) backend_.not_answered();
  if (status.code == Code::unavailable && ++flight->attempt <= 2 && !closing_) return send_again(flight);

  const bool several = flight->lines.size() > 1 || flight->call.alls.size() > 1;
  if (may_be_one_limits(status) && several && !flight->alone && !closing_) {
    send_apart(*flight);
    land(*flight);
    for (Holding* holding : touched) in_step(*holding);
    return pump();
  }
  OpList ops = flight->call.take_ops();
  const std::vector<AllParts> alls = std::exchange(flight->call.alls, {});
  land(*flight);
  for (QueuedOp& op : ops)
    if (op.kind == Kind::restate)
      if (Holding* holding = holders_.find(op.group->id)) holding->queued = false;
  for (Holding* holding : touched) in_step(*holding);
  pump();
  for (QueuedOp& op : ops)
    if (op.kind != Kind::restate) fail(op, status);
  for (const AllParts& all : alls) fail_all(all.op, status);
  maybe_closed();
}

// It was certainly not executed: a connection had died while idle.
void RedisLimitStore::send_again(const FlightPtr& flight) {
  backend_.when_ready([this, flight, alive = alive_](const Status& status) {
    if (!*alive) return;
    if (status.ok()) return send(flight);
    flight->attempt = 2;
    failed(flight, status);
  });
}

// Every limit travels alone now, so that the bad one fails alone.
void RedisLimitStore::send_apart(Flight& flight) {
  for (Line* line : flight.lines) line->alone = true;
  put_back(flight.call.take_ops());
  flight.call.alls.clear();
  for (const AllPtr& all : std::exchange(flight.alls, {})) {
    for (const store::Part& part : all->op->parts) {
      Line& line = line_of(part.group->id);
      ++line.claims;
      all->lines.push_back(&line);
    }
    all->alone = true;
    ++queued_;
    alls_[all->op] = all;
    ready_alls_.push_back(all);
  }
}

}  // namespace ratesync::redis
