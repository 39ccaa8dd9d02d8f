// Where this process stands in line: places at the server, kept fresh while somebody waits.
#include <algorithm>
#include <chrono>
#include <utility>

#include "ratesync/postgres/lock_trip.h"

namespace ratesync::postgres {

namespace {

store::Space space_of(const LockName& name) {
  return {std::string(name.name_space), std::string(name.tenant)};
}

// A statement about places in line: of items without an operation.
Call place_call(const Statement& statement, const std::vector<std::string>& keys, std::int64_t me,
                std::string more = {}) {
  std::vector<LockItem> items(keys.size());
  LockItems rows;
  for (std::size_t i = 0; i < keys.size(); ++i) {
    items[i].key = keys[i];
    items[i].row = i;
    rows.push_back(&items[i]);
  }
  Call call{&statement, lock_names(rows)};
  call.params.push_back(Param::text(std::to_string(me)));
  if (!more.empty()) call.params.push_back(Param::text(std::move(more)));
  return call;
}

}  // namespace

// The server remembers us there, as long as we say so. Whoever waits asks again when the lease that it was
// told of is over, at the latest; a place that nobody asks for any more is not kept alive beyond that.
void PgLockStore::remember(const std::string& key, Nanos lease, bool bell) {
  waiting_[key] = {saturating_add(saturating_add(clock_.now(), kLockPlace), lease), bell};
  listener_.want(true);
  refresh_later();
}

void PgLockStore::forget(const std::string& key) {
  if (waiting_.erase(key) > 0) listener_.want(!waiting_.empty());
}

void PgLockStore::stop_waiting(const store::SpaceRef& space, const std::string& name) {
  std::string key = lock_key(*space, name);
  const auto place = waiting_.find(key);
  if (place == waiting_.end()) return;
  LockItem item;
  item.kind = LockItem::Kind::unwait;
  item.bell = place->second.bell;
  forget(key);
  if (closing_) return;
  item.key = std::move(key);
  push(std::move(item));
}

void PgLockStore::tell(const std::string& key) {
  const LockName name = split_key(key);
  if (freed_) freed_(space_of(name), std::string(name.name));
}

void PgLockStore::heard(const std::string& payload) {
  store::Space space;
  std::string name;
  if (closing_ || !read_freed(payload, space, name)) return;
  const std::string key = lock_key(space, name);
  if (const auto place = waiting_.find(key); place != waiting_.end()) {
    if (place->second.bell) forget(key);  // as who rang did
    if (freed_) freed_(space, name);
    return;
  }
  // We left meanwhile: it is for the next one.
  LockItem item;
  item.kind = LockItem::Kind::unwait;
  item.key = key;
  push(std::move(item));
}

// Whatever was told while nobody listened was missed.
void PgLockStore::ask_everybody() {
  std::vector<std::string> keys;
  for (const auto& [key, place] : waiting_) keys.push_back(key);
  for (const std::string& key : keys) tell(key);
}

void PgLockStore::refresh_later() {
  if (refreshing_ || closing_ || waiting_.empty()) return;
  refreshing_ = true;
  refresh_timer_->expires_after(std::chrono::nanoseconds(kLockPlace / 3));
  refresh_timer_->async_wait([this, alive = alive_](const asio::error_code& error) {
    if (*alive && !error) refresh();
  });
}

void PgLockStore::refresh() {
  const Nanos now = clock_.now();
  auto keys = std::make_shared<std::vector<std::string>>();
  for (const auto& [key, place] : waiting_)
    if (place.until > now) keys->push_back(key);
  std::sort(keys->begin(), keys->end());
  errand(
      0,
      [this, keys]() -> std::vector<Call> {
        if (closing_ || keys->empty() || sql().refresh.sql.empty()) return {};
        return {place_call(sql().refresh, *keys, me_, std::to_string(kLockPlace / kMilli))};
      },
      [this, keys, alive = alive_](const PipelineResult& result) {
        if (!*alive) return;
        refreshing_ = false;
        refresh_later();
        if (!result.status.ok()) return;
        std::vector<bool> there(keys->size(), false);
        for (int row = 0; row < result.results[0]->rows(); ++row)
          there[static_cast<std::size_t>(result.results[0]->integer(row, 0) - 1)] = true;
        // A place that is gone (the server crashed, another one was promoted): asking makes a new one.
        for (std::size_t i = 0; i < keys->size(); ++i)
          if (!there[i] && waiting_.contains((*keys)[i])) tell((*keys)[i]);
      });
}

// Leaves all lines.
void PgLockStore::farewell(std::function<void()> done) {
  if (waiting_.empty() || pool_.down()) return done();
  auto keys = std::make_shared<std::vector<std::string>>();
  for (const auto& [key, place] : waiting_) keys->push_back(key);
  std::sort(keys->begin(), keys->end());
  errand(
      keys->size(),
      [this, keys]() -> std::vector<Call> {
        return {place_call(sql().unwait, *keys, me_), place_call(sql().notify, *keys, me_, channel_)};
      },
      [done = std::move(done)](const PipelineResult&) { done(); });
}

}  // namespace ratesync::postgres
