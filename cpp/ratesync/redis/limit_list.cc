// What is stored, for people: `ratesync status` and the tests.
#include <algorithm>
#include <map>
#include <utility>

#include "ratesync/redis/limit_store.h"
#include "ratesync/redis/scripts.h"

namespace ratesync::redis {
namespace {

Nanos nanos(std::int64_t micros) {
  return micros > kForever / kMicro ? kForever : std::max(micros, -kForever / kMicro) * kMicro;
}

struct Gathering {
  std::map<std::string, store::GroupInfo> groups;
  std::vector<store::HolderInfo> holders;
  std::size_t limit = 0;
  std::size_t left = 0;
  bool truncated = false;
  Status status;
  store::Callback<store::Listing> done;

  void add(const std::string& id, const Reply& reply) {
    const auto integer = [](const Reply& array, std::size_t i) {
      return i < array.items.size() ? array.items[i].integer : 0;
    };
    store::GroupInfo& info = groups[id];
    info.group = id;
    if (integer(reply, 0) == 0) {
      info.last_ahead = nanos(integer(reply, 1));
      return;
    }
    for (std::size_t i = 1; i < reply.items.size(); ++i) {
      const Reply& lease = reply.items[i];
      if (lease.items.size() < 4) continue;
      const Nanos expires_in = nanos(integer(lease, 3));
      if (expires_in > 0) info.in_use += integer(lease, 1);
      holders.push_back({id, lease.items[0].text, integer(lease, 1), nanos(integer(lease, 2)), expires_in});
    }
  }

  void finish() {
    if (!status.ok()) return done(status);
    store::Listing out;
    out.truncated = truncated || groups.size() > limit || holders.size() > limit;
    for (auto& [id, info] : groups)
      if (out.groups.size() < limit) out.groups.push_back(std::move(info));
    std::sort(holders.begin(), holders.end(), [](const store::HolderInfo& a, const store::HolderInfo& b) {
      return std::tie(a.group, a.holder) < std::tie(b.group, b.holder);
    });
    if (holders.size() > limit) holders.resize(limit);
    out.holders = std::move(holders);
    done(std::move(out));
  }
};

}  // namespace

void RedisLimitStore::list(std::size_t limit, store::Callback<store::Listing> done) {
  limit = std::clamp<std::size_t>(limit, 1, 100'000);
  const auto all = std::make_shared<Gathering>();
  all->limit = limit;
  all->done = std::move(done);
  backend_.when_ready([this, all, alive = alive_](const Status& status) {
    if (!*alive || !status.ok()) {
      all->status = *alive ? status : Status::make(Code::closed, "the store was closed");
      return all->finish();
    }
    const Nanos deadline = saturating_add(clock_.now(), options_.call_timeout);
    // Two keys per limit at most.
    backend_.commander().scan(
        keys_.pattern(), 2 * all->limit + 1, deadline,
        [this, all, deadline, alive](Result<std::vector<std::string>> found) {
          if (!*alive || !found.ok()) {
            all->status = *alive ? found.status() : Status::make(Code::closed, "the store was closed");
            return all->finish();
          }
          all->truncated = found.value().size() > 2 * all->limit;
          ++all->left;
          for (const std::string& key : found.value()) {
            auto named = keys_.parse(key);
            if (!named) continue;
            ++all->left;
            Command arguments("1");
            arguments.add(key).add(std::string(1, named->kind));
            backend_.commander().eval(list_script(), key, std::move(arguments), deadline,
                                      [all, id = std::move(named->id)](Result<Reply> reply) {
                                        if (reply.ok())
                                          all->add(id, reply.value());
                                        else
                                          all->status = reply.status();
                                        if (--all->left == 0) all->finish();
                                      });
          }
          if (--all->left == 0) all->finish();
        });
  });
}

}  // namespace ratesync::redis
