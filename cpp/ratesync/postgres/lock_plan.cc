#include "ratesync/postgres/lock_plan.h"

#include <algorithm>
#include <charconv>
#include <unordered_map>

#include "ratesync/postgres/binary_array.h"

namespace ratesync::postgres {
namespace {

bool by_key(const LockItem* a, const LockItem* b) { return a->key < b->key; }

// Rows are numbered as lock_names() writes them.
void settle(LockItems& items) {
  std::stable_sort(items.begin(), items.end(), by_key);
  std::size_t row = 0;
  for (std::size_t i = 0; i < items.size(); ++i) {
    if (i > 0 && items[i]->key != items[i - 1]->key) ++row;
    items[i]->row = row;
  }
}

// What a round already does with a name.
struct Name {
  bool kept = false, taken = false, blocked = false;
};

void plan_asking(const LockItems& pending, bool waiters, LockRound& round) {
  for (LockItem* item : pending) {
    LockItems& list = !item->refused ? round.later : item->op->queued && waiters ? round.queues : round.looks;
    list.push_back(item);
  }
}

LockItems& list_of(LockItem::Kind kind, LockRound& round) {
  switch (kind) {
    case LockItem::Kind::keep: return round.keeps;
    case LockItem::Kind::unwait: return round.unwaits;
    case LockItem::Kind::stand: return round.stands;
    case LockItem::Kind::ring: return round.rings;
    case LockItem::Kind::take: break;
  }
  return round.takes;
}

void plan_deciding(const LockItems& pending, LockRound& round) {
  std::unordered_map<std::string_view, Name> names;
  names.reserve(pending.size());
  for (LockItem* item : pending) {
    Name& name = names[item->key];
    if (item->kind == LockItem::Kind::take && name.taken && !name.blocked) {
      // Either the first one has it, or nobody of us can: the next round tells who.
      item->refused = true;
      round.later.push_back(item);
    } else if (name.blocked || name.taken || (name.kept && item->kind != LockItem::Kind::take)) {
      name.blocked = true;
      round.later.push_back(item);
    } else if (item->kind == LockItem::Kind::take) {
      name.taken = true;
      round.takes.push_back(item);
    } else {
      name.kept = true;
      list_of(item->kind, round).push_back(item);
    }
  }
}

}  // namespace

std::string lock_key(const store::Space& space, std::string_view name) {
  std::string key;
  key.reserve(space.name_space.size() + space.tenant.size() + name.size() + 2);
  key.append(space.name_space).push_back('\0');
  key.append(space.tenant).push_back('\0');
  return key.append(name);
}

LockName split_key(std::string_view key) {
  const std::size_t first = key.find('\0');
  const std::size_t second = key.find('\0', first + 1);
  return {key.substr(0, first), key.substr(first + 1, second - first - 1), key.substr(second + 1)};
}

LockItems LockRound::asked() const {
  LockItems out;
  for (const LockItems* list : {&keeps, &unwaits, &stands, &rings, &takes, &looks, &queues})
    out.insert(out.end(), list->begin(), list->end());
  return out;
}

LockRound plan_locks(const LockItems& pending, bool waiters) {
  LockRound round;
  const bool asking =
      std::any_of(pending.begin(), pending.end(), [](const LockItem* item) { return item->refused; });
  if (asking)
    plan_asking(pending, waiters, round);
  else
    plan_deciding(pending, round);
  for (LockItems* list :
       {&round.keeps, &round.unwaits, &round.stands, &round.rings, &round.takes, &round.looks, &round.queues})
    settle(*list);
  return round;
}

std::vector<Param> lock_names(const LockItems& items) {
  BinaryArray spaces(BinaryArray::Type::text), tenants(BinaryArray::Type::text),
      names(BinaryArray::Type::text);
  for (std::size_t i = 0; i < items.size(); ++i) {
    if (i > 0 && items[i]->row == items[i - 1]->row) continue;
    const LockName name = split_key(items[i]->key);
    spaces.add(name.name_space);
    tenants.add(name.tenant);
    names.add(name.name);
  }
  std::vector<Param> params;
  params.push_back(spaces.take());
  params.push_back(tenants.take());
  params.push_back(names.take());
  return params;
}

bool read_freed(std::string_view payload, store::Space& space, std::string& name) {
  std::size_t lengths[2];
  for (std::size_t& length : lengths) {
    const auto [end, error] = std::from_chars(payload.data(), payload.data() + payload.size(), length);
    if (error != std::errc{} || end == payload.data() + payload.size() || *end != ' ') return false;
    payload.remove_prefix(static_cast<std::size_t>(end - payload.data()) + 1);
  }
  if (lengths[0] > payload.size() || lengths[1] > payload.size() - lengths[0]) return false;
  space.name_space = payload.substr(0, lengths[0]);
  space.tenant = payload.substr(lengths[0], lengths[1]);
  name = payload.substr(lengths[0] + lengths[1]);
  return true;
}

}  // namespace ratesync::postgres
