#include "ratesync/memory/memory_state.h"

#include <algorithm>
#include <limits>
#include <random>
#include <tuple>
#include <utility>

namespace ratesync::memory {

using Verb = store::StateOp::Verb;
using Outcome = store::StateReply::Outcome;
using Type = store::Value::Type;

namespace {

std::int64_t later(std::int64_t now, std::int64_t by) { return by >= kNever - now ? kNever : now + by; }

bool is_timeout(Verb verb) { return verb == Verb::schedule || verb == Verb::unschedule; }

// --- what an operation comes to -------------------------------------------------------------------

struct Deal {
  Outcome outcome = Outcome::absent;
  bool writes = false;  // a new version with the value, or the sum, of the operation
  std::int64_t version = 0;
  std::int64_t expires = 0;
  std::int64_t sum = 0;
};

std::int64_t expiry(const Ask& ask, const Row* kept, std::int64_t now) {
  if (kept && (ask.ttl == store::kKeepTtl || (ask.verb == Verb::add && !ask.renew))) return kept->expires;
  return ask.ttl < 0 ? kNever : later(now, ask.ttl);
}

// `kept`: the row whose expiry may go on; null: it begins anew.
Deal written(const Ask& ask, const Row* row, const Row* kept, std::int64_t floor, std::int64_t now) {
  return {Outcome::done, true, (row ? row->version : floor) + 1, expiry(ask, kept, now), 0};
}

Deal found(Outcome outcome, const Row& row) { return {outcome, false, row.version, row.expires, 0}; }

Deal judge_add(const Ask& ask, const Row* row, bool living, std::int64_t floor, std::int64_t now) {
  std::int64_t sum = ask.delta;
  if (living) {
    if (row->type != Type::integer) return found(Outcome::not_integer, *row);
    if (__builtin_add_overflow(row->number(), ask.delta, &sum)) return found(Outcome::overflow, *row);
  }
  Deal deal = written(ask, row, living ? row : nullptr, floor, now);
  deal.sum = sum;
  return deal;
}

// Changes nothing. `row` may be dead or null.
Deal judge(const Ask& ask, const Row* row, std::int64_t floor, std::int64_t now) {
  const bool living = row && row->living(now);
  const bool meant = row && (ask.expected == row->version || ask.expected == store::kAnyVersion);
  switch (ask.verb) {
    case Verb::get: return living ? found(Outcome::done, *row) : Deal{};
    case Verb::create: return living ? found(Outcome::exists, *row) : written(ask, row, nullptr, floor, now);
    case Verb::set: return written(ask, row, living ? row : nullptr, floor, now);
    case Verb::swap:
      if (living || (row && ask.revive && !row->removed && meant))
        return meant ? written(ask, row, row, floor, now) : found(Outcome::stale, *row);
      return Deal{};
    case Verb::remove:
      if (!living) return Deal{};
      return meant ? Deal{Outcome::done, false, row->version, now, 0} : found(Outcome::stale, *row);
    case Verb::add: return judge_add(ask, row, living, floor, now);
    case Verb::touch:
      if (!living) return Deal{};
      return meant ? Deal{Outcome::done, false, row->version, expiry(ask, row, now), 0}
                   : found(Outcome::stale, *row);
    case Verb::schedule:
    case Verb::unschedule: break;  // no rows
  }
  return Deal{};
}

// --- doing it -------------------------------------------------------------------------------------

// `slot`: of the row, null where there is none.
void write(RowTable& table, Slot* slot, const Family& family, const Ask& ask, Place place, const Deal& deal) {
  const bool integer = ask.verb == Verb::add || ask.value.type == Type::integer;
  const std::int64_t number = ask.verb == Verb::add ? deal.sum : ask.value.number;
  const std::string_view data =
      integer ? std::string_view(reinterpret_cast<const char*>(&number), sizeof number) : ask.value.data;
  if (slot) {
    RowTable::resize(*slot, data.size());
  } else {
    slot = table.insert(family, ask.key, place, data.size());
  }
  Row& row = *slot->row;
  if (!data.empty()) std::memcpy(row.bytes() + row.key_size, data.data(), data.size());
  row.type = integer ? Type::integer : ask.value.type;
  row.version = deal.version;
  row.expires = deal.expires;
  row.removed = false;
  // Who wants to see the row found claims something for a while, and may come late to say that it is done.
  row.claim = ask.verb == Verb::create && ask.want_actual;
  table.dated(*slot);
}

void apply(RowTable& table, Slot* slot, const Family& family, const Ask& ask, Place place, const Deal& deal) {
  if (deal.writes) return write(table, slot, family, ask, place, deal);
  if (ask.verb == Verb::remove) {
    RowTable::resize(*slot, 0);
    slot->row->removed = true;
  } else if (ask.verb != Verb::touch) {
    return;
  }
  slot->row->expires = deal.expires;
  table.dated(*slot);
}

void copy_value(const Row& row, store::Value* value) {
  value->type = row.type;
  if (row.type == Type::integer) {
    value->number = row.number();
  } else {
    value->data.assign(row.data());
  }
}

void tell(const Ask& ask, const Deal& deal, const Row* row, Answer* answer) {
  answer->outcome = deal.outcome;
  answer->version = deal.version;
  answer->expires_at = deal.expires == kNever ? 0 : deal.expires;
  if (ask.verb == Verb::add && deal.outcome == Outcome::done) {
    answer->has_value = true;
    answer->value.type = Type::integer;
    answer->value.number = deal.sum;
  } else if (ask.verb == Verb::get ? deal.outcome == Outcome::done
                                   : ask.want_actual && deal.version > 0 && deal.outcome != Outcome::done) {
    answer->has_value = true;
    copy_value(*row, &answer->value);
  }
}

Ask ask_of(const store::StateOp& op) {
  return {op.verb,
          op.want_actual,
          op.renew,
          op.revive,
          op.due_in,
          op.key,
          {op.value.type, op.value.data, op.value.number},
          op.delta,
          op.ttl,
          op.expected,
          op.due};
}

void deliver(Answer&& answer, store::StateReply* reply) {
  reply->status = Status::success();
  reply->outcome = answer.outcome;
  reply->version = answer.version;
  reply->expires_at = answer.expires_at;
  reply->has_value = answer.has_value;
  reply->value = std::move(answer.value);
}

std::uint64_t random_seed() {
  std::random_device device;
  return (static_cast<std::uint64_t>(device()) << 32) | device();
}

std::string family_name(const store::Space& space, std::string_view kind) {
  std::string name;
  for (const std::string_view part : {std::string_view(space.name_space), std::string_view(space.tenant)})
    name.append(std::to_string(part.size())).append(":").append(part);
  return name.append(kind);
}

}  // namespace

MemoryState::MemoryState(const Clock& clock)
    : clock_(clock), seed_(random_seed()), tables_(std::make_unique<RowTable[]>(kTables)) {}

// --- families -------------------------------------------------------------------------------------

FamilyRef MemoryState::find_family(const store::Space& space, std::string_view kind) {
  const std::lock_guard lock(families_mutex_);
  const auto it = families_.find(family_name(space, kind));
  return it == families_.end() ? nullptr : it->second;
}

FamilyRef MemoryState::family(const store::Space& space, std::string_view kind) {
  std::string name = family_name(space, kind);
  const std::lock_guard lock(families_mutex_);
  if (const auto it = families_.find(name); it != families_.end()) return it->second;
  if (families_.size() >= forget_at_) forget_families();
  auto made = std::make_shared<Family>();
  made->seed = hash_of(seed_, name);
  made->space = space;
  made->kind = kind;
  if (free_numbers_.empty()) {
    made->number = static_cast<std::uint32_t>(numbered_.size());
    numbered_.push_back(made.get());
  } else {
    made->number = free_numbers_.back();
    free_numbers_.pop_back();
    numbered_[made->number] = made.get();
  }
  return families_.emplace(std::move(name), std::move(made)).first->second;
}

// Rows are made by who holds their family, and another holder comes only through family(): what nobody else
// holds here has no more rows than it says.
void MemoryState::forget_families() {
  std::erase_if(families_, [this](const auto& entry) {
    const FamilyRef& family = entry.second;
    if (family.use_count() > 1) return false;
    std::atomic_thread_fence(std::memory_order_acquire);  // after what the last holder did
    if (family->rows.load(std::memory_order_relaxed) > 0) return false;
    numbered_[family->number] = nullptr;
    free_numbers_.push_back(family->number);
    return true;
  });
  // Looking again only after the rest has doubled keeps this O(1) per family made.
  forget_at_ = std::max(kLeastFamilies, 2 * families_.size());
}

void MemoryState::tell_families(const std::vector<std::uint32_t>& gone) {
  const std::lock_guard lock(families_mutex_);
  for (const std::uint32_t number : gone) numbered_[number]->rows.fetch_sub(1, std::memory_order_relaxed);
}

std::size_t MemoryState::families() {
  const std::lock_guard lock(families_mutex_);
  return families_.size();
}

// --- operations -----------------------------------------------------------------------------------

bool MemoryState::create(const Family& family, std::string_view key, const ValueView& value,
                         std::int64_t ttl) {
  Ask ask;
  ask.verb = Verb::create;
  ask.key = key;
  ask.value = value;
  ask.ttl = ttl;
  const Place place = place_of(family, key);
  RowTable& table = table_of(place);
  std::int64_t ms = 0;
  bool sweep = false;
  {
    const std::lock_guard lock(table.lock);
    table.prefetch(place.tag);
    ms = now();  // under the lock: of two on one key, the second never sees an earlier time
    Slot* slot = table.find(family, key, place.tag);
    const Deal deal = judge(ask, slot ? slot->row : nullptr, table.floor(place.bucket), ms);
    if (!deal.writes) return false;
    write(table, slot, family, ask, place, deal);
    sweep = ++table.writes % kWritesPerSweep == 0;
  }
  if (sweep) sweep_some(ms);
  return true;
}

Answer MemoryState::decide(const Family& family, const Ask& ask) {
  if (is_timeout(ask.verb)) return decide_timeout(family, ask);
  Answer answer;
  const Place place = place_of(family, ask.key);
  RowTable& table = table_of(place);
  std::int64_t ms = 0;
  bool sweep = false;
  {
    const std::lock_guard lock(table.lock);
    table.prefetch(place.tag);
    ms = now();  // as in create()
    Slot* slot = table.find(family, ask.key, place.tag);
    const Row* row = slot ? slot->row : nullptr;
    const Deal deal = judge(ask, row, table.floor(place.bucket), ms);
    tell(ask, deal, row, &answer);
    if (deal.outcome == Outcome::done && ask.verb != Verb::get) {
      apply(table, slot, family, ask, place, deal);
      sweep = ++table.writes % kWritesPerSweep == 0;
    }
  }
  if (sweep) sweep_some(ms);
  return answer;
}

Answer MemoryState::decide_timeout(const Family& family, const Ask& ask) {
  Answer answer;
  const std::int64_t due = ask.due_in ? later(now(), ask.due) : ask.due;
  const std::lock_guard lock(timeouts_.mutex);
  if (ask.verb == Verb::schedule) {
    timeouts_.schedule(family.space, family.kind, ask.key, due);
    return answer;
  }
  std::tie(answer.outcome, answer.version) =
      timeouts_.judge(family.space, family.kind, ask.key, ask.expected);
  if (answer.outcome == Outcome::done) timeouts_.unschedule(family.space, family.kind, ask.key);
  return answer;
}

void MemoryState::decide(store::StateOp& op) {
  deliver(decide(*family(*op.space, op.kind), ask_of(op)), &op.reply);
}

void MemoryState::decide(store::StateBatch& batch) {
  struct Part {
    FamilyRef family;
    Ask ask;
    Place place;
    Deal deal;
  };
  std::vector<Part> parts;
  std::vector<RowTable*> tables;
  bool any_timeout = false;
  for (const store::StateOp* op : batch.ops) {
    FamilyRef own = family(*op->space, op->kind);
    const Place place = place_of(*own, op->key);
    parts.push_back({std::move(own), ask_of(*op), place, {}});
    any_timeout |= is_timeout(op->verb);
    if (!is_timeout(op->verb)) tables.push_back(&table_of(parts.back().place));
  }
  // Tables in the order of their addresses, timeouts last: no two batches wait for each other.
  std::sort(tables.begin(), tables.end());
  tables.erase(std::unique(tables.begin(), tables.end()), tables.end());
  std::vector<std::unique_lock<SpinLock>> locks;
  locks.reserve(tables.size());
  for (RowTable* table : tables) locks.emplace_back(table->lock);
  std::unique_lock timeouts_lock(timeouts_.mutex, std::defer_lock);
  if (any_timeout) timeouts_lock.lock();

  const std::int64_t ms = now();
  batch.status = Status::success();
  batch.applied = true;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    Part& part = parts[i];
    Answer answer;
    if (part.ask.verb == Verb::schedule) {
      if (part.ask.due_in) part.ask.due = later(ms, part.ask.due);
    } else if (part.ask.verb == Verb::unschedule) {
      std::tie(answer.outcome, answer.version) =
          timeouts_.judge(part.family->space, part.family->kind, part.ask.key, part.ask.expected);
    } else {
      RowTable& table = table_of(part.place);
      const Slot* slot = table.find(*part.family, part.ask.key, part.place.tag);
      const Row* row = slot ? slot->row : nullptr;
      part.deal = judge(part.ask, row, table.floor(part.place.bucket), ms);
      tell(part.ask, part.deal, row, &answer);
    }
    const bool harmless = part.ask.verb == Verb::get || part.ask.verb == Verb::remove;
    batch.applied &= answer.outcome == Outcome::done || (harmless && answer.outcome == Outcome::absent);
    deliver(std::move(answer), &batch.ops[i]->reply);
  }
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const Part& part = parts[i];
    store::StateReply& reply = batch.ops[i]->reply;
    if (!batch.applied) {
      if (reply.outcome == Outcome::done) reply = {Status::success(), Outcome::rolled_back, 0, 0, false, {}};
    } else if (part.ask.verb == Verb::schedule) {
      timeouts_.schedule(part.family->space, part.family->kind, part.ask.key, part.ask.due);
    } else if (part.ask.verb == Verb::unschedule) {
      timeouts_.unschedule(part.family->space, part.family->kind, part.ask.key);
    } else if (reply.outcome == Outcome::done) {
      RowTable& table = table_of(part.place);
      apply(table, table.find(*part.family, part.ask.key, part.place.tag), *part.family, part.ask, part.place,
            part.deal);
    }
  }
  locks.clear();
  for (std::size_t i = 0; batch.applied && i < parts.size(); i += kWritesPerSweep) sweep_some(ms);
}

std::vector<store::DueKey> MemoryState::claim(const store::Space& space, const std::string& kind,
                                              std::size_t limit, std::int64_t lease) {
  const std::lock_guard lock(timeouts_.mutex);
  return timeouts_.claim_due(space, kind, limit, lease, now());
}

// --- dead rows ------------------------------------------------------------------------------------

void MemoryState::sweep_some(std::int64_t ms) {
  constexpr std::uint32_t kTablesAsked = 8;
  constexpr std::uint32_t kLook = 64;
  constexpr std::uint32_t kMost = 256;
  std::vector<std::uint32_t> gone;
  for (std::uint32_t i = 0; i < kTablesAsked; ++i) {
    RowTable& table = tables_[hand_.fetch_add(1, std::memory_order_relaxed) % kTables];
    const std::lock_guard lock(table.lock);
    if (table.fresh(ms)) continue;
    // Where half of what is looked at is dead, looking on pays.
    for (std::uint32_t total = 0, removed = kLook; total < kMost && removed >= kLook / 4; total += removed)
      removed = table.sweep(ms, kLook, kLook, &gone);
    break;
  }
  if (!gone.empty()) tell_families(gone);
}

std::int64_t MemoryState::purge_now(std::size_t limit) {
  const std::int64_t ms = now();
  std::size_t removed = 0;
  for (std::uint32_t i = 0; i < kTables && removed < limit; ++i) {
    std::vector<std::uint32_t> gone;
    {
      const std::lock_guard lock(tables_[i].lock);
      const auto left = std::min<std::size_t>(limit - removed, std::numeric_limits<std::uint32_t>::max());
      removed += tables_[i].sweep_all(ms, static_cast<std::uint32_t>(left), &gone);
    }
    if (!gone.empty()) tell_families(gone);
  }
  return static_cast<std::int64_t>(removed);
}

std::size_t MemoryState::rows() {
  std::size_t total = 0;
  for (std::uint32_t i = 0; i < kTables; ++i) {
    const std::lock_guard lock(tables_[i].lock);
    total += tables_[i].size();
  }
  return total;
}

}  // namespace ratesync::memory
