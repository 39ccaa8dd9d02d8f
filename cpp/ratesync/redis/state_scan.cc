// Whole kinds, a page at a time. SCAN may name a key twice and in any order, so the first page collects the
// first names in their order, as many as fit into kMostNames, and pages are delivered from there. The cursor
// is the last key delivered: where the listing ends, was dropped meanwhile, or belongs to another process,
// SCAN walks over the keys again, for the names that follow.
#include <algorithm>
#include <numeric>
#include <set>
#include <utility>

#include "ratesync/redis/state_store.h"

namespace ratesync::redis {
namespace {

constexpr std::size_t kMostListings = 16;  // kept for later pages
constexpr std::size_t kMostPage = 10'000;
constexpr std::size_t kMostNames = 16u << 20;  // bytes: of one listing, and of those that are kept together
constexpr std::size_t kOfName = 96;            // what one costs beyond its length
constexpr Nanos kPatience = 60 * kSecond;      // for all of SCAN

}  // namespace

// The first names, each once and in order.
struct RedisStateStore::FirstNames {
  std::set<std::string> names;
  std::size_t bytes = 0;
  bool complete = true;

  void add(std::string name) {
    if (!complete && name > *names.rbegin()) return;
    const std::size_t cost = name.size() + kOfName;
    if (names.insert(std::move(name)).second) bytes += cost;
    while (bytes > kMostNames && names.size() > 1) {
      const auto last = std::prev(names.end());
      bytes -= last->size() + kOfName;
      names.erase(last);
      complete = false;
    }
  }
};

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
  const auto found = std::make_shared<FirstNames>();
  backend_.commander().walk(
      keys_.rows_pattern(*all->space, all->kind, all->prefix),
      [this, all, found, alive = alive_](const std::string& row) {
        if (!*alive) return false;
        auto key = keys_.key_of(row, *all->space, all->kind);
        if (key && key->starts_with(all->prefix) && (!all->begun || *key > all->after))
          found->add(std::move(*key));
        most_names_ = std::max(most_names_, found->bytes);
        return true;
      },
      saturating_add(clock_.now(), kPatience),
      [this, all, found, alive = alive_](const Status& status) {
        if (!*alive) return all->done(Status::make(Code::closed, "the store was closed"));
        if (!status.ok()) return all->done(status);
        Listing& listing = all->listing;
        listing = {};
        listing.bytes = found->bytes;
        listing.complete = found->complete;
        listing.keys.reserve(found->names.size());
        while (!found->names.empty())
          listing.keys.push_back(std::move(found->names.extract(found->names.begin()).value()));
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
  const bool ended = listing.next == listing.keys.size();
  if (ended && listing.complete) return all->done(std::move(page));
  const std::string last = listing.keys[listing.next - 1];
  if (page.rows.empty()) {  // all of them had died: a page has rows, or it is the last one
    all->begun = true;
    all->after = last;
    return ended ? list_keys(all) : next_page(all);
  }
  page.cursor = '>' + last;
  if (!ended) {
    listing.name = keys_.rows_pattern(*all->space, all->kind, all->prefix) + '\n' + last;
    keep(std::move(listing));
  }
  all->done(std::move(page));
}

void RedisStateStore::keep(Listing listing) {
  listings_.push_front(std::move(listing));
  const auto names = [this] {
    return std::accumulate(listings_.begin(), listings_.end(), std::size_t{0},
                           [](std::size_t sum, const Listing& each) { return sum + each.bytes; });
  };
  while (listings_.size() > 1 && (listings_.size() > kMostListings || names() > kMostNames))
    listings_.pop_back();
}

}  // namespace ratesync::redis
