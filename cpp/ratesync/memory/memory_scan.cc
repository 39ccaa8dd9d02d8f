#include "ratesync/memory/memory_scan.h"

#include <algorithm>
#include <charconv>

#include "ratesync/memory/memory_state.h"

namespace ratesync::memory {

std::optional<Cursor> Cursor::parse(std::string_view text) {
  Cursor out;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), out.list);
  if (error != std::errc() || end == text.data() + text.size() || *end != ':') return std::nullopt;
  out.last = text.substr(static_cast<std::size_t>(end - text.data()) + 1);
  return out;
}

std::shared_ptr<const KeyList> Scans::find(std::uint64_t id, const Family& family, std::string_view prefix) {
  const std::lock_guard lock(mutex_);
  for (auto it = lists_.begin(); it != lists_.end(); ++it) {
    if ((*it)->id != id) continue;
    if ((*it)->family.get() != &family || (*it)->prefix != prefix) return nullptr;
    lists_.splice(lists_.begin(), lists_, it);
    return lists_.front();
  }
  return nullptr;
}

void Scans::keep(std::shared_ptr<KeyList> list) {
  const std::lock_guard lock(mutex_);
  list->id = next_++;
  lists_.push_front(std::move(list));
  if (lists_.size() > kLists) lists_.pop_back();
}

void Scans::drop(std::uint64_t id) {
  const std::lock_guard lock(mutex_);
  lists_.remove_if([id](const auto& list) { return list->id == id; });
}

void LowestKeys::cut() {
  const auto last = list_.keys.begin() + static_cast<std::ptrdiff_t>(most_) - 1;
  std::nth_element(list_.keys.begin(), last, list_.keys.end());
  list_.keys.erase(last + 1, list_.keys.end());
  list_.more = true;
}

void LowestKeys::sort() {
  if (list_.keys.size() > most_) cut();
  std::sort(list_.keys.begin(), list_.keys.end());
}

namespace {

store::StateRow row_of(const Row& row) {
  store::StateRow out;
  out.key = row.key();
  out.value.type = row.type;
  if (row.type == store::Value::Type::integer) {
    out.value.number = row.number();
  } else {
    out.value.data = row.data();
  }
  out.version = row.version;
  out.expires_at = row.expires == kNever ? 0 : row.expires;
  return out;
}

}  // namespace

Result<store::StatePage> MemoryState::page(const store::Space& space, const std::string& kind,
                                           const std::string& prefix, const std::string& cursor,
                                           std::size_t page_size) {
  std::optional<Cursor> from;
  if (!cursor.empty()) {
    from = Cursor::parse(cursor);
    if (!from) return Status::make(Code::invalid, "the cursor is none of a scan of this store");
  }
  store::StatePage out;
  const FamilyRef family = find_family(space, kind);
  if (!family) return out;
  page_size = std::max<std::size_t>(page_size, 1);
  const std::int64_t ms = now();
  auto list = from ? scans_.find(from->list, *family, prefix) : nullptr;
  if (!list) {
    auto fresh = std::make_shared<KeyList>();
    fresh->family = family;
    fresh->prefix = prefix;
    // Of many rows more at a time: eight walks at most, or a long scan would be quadratic.
    LowestKeys lowest(*fresh, std::max({Scans::kKeys, page_size, rows() / 8}));
    for (std::uint32_t i = 0; i < kTables; ++i) {
      const std::lock_guard lock(tables_[i].lock);
      tables_[i].each([&](const Row& row) {
        if (row.family != family->number || !row.living(ms) || !row.key().starts_with(prefix)) return;
        if (!from || row.key() > from->last) lowest.add(row.key());
      });
    }
    lowest.sort();
    if (fresh->keys.size() > page_size) scans_.keep(fresh);
    list = std::move(fresh);
  }
  auto next = from ? std::upper_bound(list->keys.begin(), list->keys.end(), from->last) : list->keys.begin();
  for (; next != list->keys.end() && out.rows.size() < page_size; ++next) {
    const Place place = place_of(*family, *next);
    RowTable& table = table_of(place);
    const std::lock_guard lock(table.lock);
    const Slot* slot = table.find(*family, *next, place.tag);
    if (slot && slot->row->living(ms)) out.rows.push_back(row_of(*slot->row));
  }
  const bool walked = next == list->keys.end();
  if (walked) scans_.drop(list->id);
  if (!walked || list->more) {
    out.cursor = Cursor{list->id, *std::prev(next)}.text();
  }
  return out;
}

}  // namespace ratesync::memory
