// Whole kinds, a page at a time. SCAN may name a key twice and in any order, so the first page collects the
// names of all of them and sorts them; later pages deliver from there. The cursor is the last key delivered,
// so that a listing that was dropped meanwhile, or belongs to another process, is made again from there.
#include <algorithm>
#include <limits>
#include <utility>

#include "ratesync/redis/state_store.h"

namespace ratesync::redis {
namespace {

constexpr std::size_t kMostListings = 16;  // kept for later pages
constexpr std::size_t kMostPage = 10'000;
constexpr Nanos kPatience = 60 * kSecond;  // for all of SCAN

}  // namespace

struct RedisStateStore::Scan {
  // One row of a page.
  struct PageOp final : store::StateOp {
    void done() override {
      if (--scan->under_way == 0) scan->owner->page_read(std::exchange(scan->self, nullptr));
    }
    Scan* scan = nullptr;
  };

  RedisStateStore* owner = nullptr;
  store::SpaceRef space;
  std::string kind;
  std::string prefix;
  bool begun = false;
  std::string after;  // the last key delivered, where begun
  std::size_t page_size = 0;
  store::Callback<store::StatePage> done;
  Listing listing;
  std::vector<PageOp> ops;
  std::size_t under_way = 0;
  std::shared_ptr<Scan> self;  // while rows are read
};

void RedisStateStore::scan(const store::SpaceRef& space, const std::string& kind, const std::string& prefix,
                           const std::string& cursor, std::size_t page_size,
                           store::Callback<store::StatePage> done) {
  const auto all = std::make_shared<Scan>();
  all->owner = this;
  all->space = space;
  all->kind = kind;
  all->prefix = prefix;
  all->begun = !cursor.empty();
  all->after = cursor.empty() ? cursor : cursor.substr(1);
  all->page_size = std::clamp<std::size_t>(page_size, 1, kMostPage);
  all->done = std::move(done);
  arm_purge();
  backend_.when_ready([this, all, alive = alive_](const Status& status) {
    if (!*alive) return all->done(Status::make(Code::closed, "the store was closed"));
    if (!status.ok()) return all->done(status);
    const std::string name = keys_.rows_pattern(*all->space, all->kind, all->prefix) + '\n' + all->after;
    for (auto it = listings_.begin(); all->begun && it != listings_.end(); ++it)
      if (it->name == name) {
        all->listing = std::move(*it);
        listings_.erase(it);
        return next_page(all);
      }
    list_keys(all);
  });
}

void RedisStateStore::list_keys(const std::shared_ptr<Scan>& all) {
  backend_.commander().scan(
      keys_.rows_pattern(*all->space, all->kind, all->prefix), std::numeric_limits<std::size_t>::max(),
      saturating_add(clock_.now(), kPatience),
      [this, all, alive = alive_](Result<std::vector<std::string>> found) {
        if (!*alive) return all->done(Status::make(Code::closed, "the store was closed"));
        if (!found.ok()) return all->done(found.status());
        std::vector<std::string>& keys = all->listing.keys;
        for (const std::string& row : found.value()) {
          auto key = keys_.key_of(row, *all->space, all->kind);
          if (key && key->starts_with(all->prefix) && (!all->begun || *key > all->after))
            keys.push_back(std::move(*key));
        }
        std::sort(keys.begin(), keys.end());
        keys.erase(std::unique(keys.begin(), keys.end()), keys.end());
        next_page(all);
      });
}

void RedisStateStore::next_page(const std::shared_ptr<Scan>& all) {
  const Listing& listing = all->listing;
  const std::size_t count = std::min(all->page_size, listing.keys.size() - listing.next);
  if (count == 0) return all->done(store::StatePage{});
  all->ops = std::vector<Scan::PageOp>(count);
  all->under_way = count;
  all->self = all;
  for (std::size_t i = 0; i < count; ++i) {
    Scan::PageOp& op = all->ops[i];
    op.scan = all.get();
    op.space = all->space;
    op.kind = all->kind;
    op.key = listing.keys[listing.next + i];
    op.deadline = saturating_add(clock_.now(), kPatience);
  }
  for (Scan::PageOp& op : all->ops) submit(&op);
}

void RedisStateStore::page_read(const std::shared_ptr<Scan>& all) {
  store::StatePage page;
  for (Scan::PageOp& op : all->ops) {
    if (!op.reply.status.ok()) return all->done(op.reply.status);
    if (op.reply.has_value)
      page.rows.push_back(
          {std::move(op.key), std::move(op.reply.value), op.reply.version, op.reply.expires_at});
  }
  Listing& listing = all->listing;
  listing.next += all->ops.size();
  if (listing.next == listing.keys.size()) return all->done(std::move(page));
  // All of them had died: a page has rows, or it is the last one.
  if (page.rows.empty()) return next_page(all);
  const std::string& last = listing.keys[listing.next - 1];
  page.cursor = '>' + last;
  listing.name = keys_.rows_pattern(*all->space, all->kind, all->prefix) + '\n' + last;
  listings_.push_front(std::move(listing));
  if (listings_.size() > kMostListings) listings_.pop_back();
  all->done(std::move(page));
}

}  // namespace ratesync::redis
