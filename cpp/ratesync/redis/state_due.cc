// Timeouts that fell due: first looks at all shards for the oldest, then claims those.
#include <algorithm>
#include <map>
#include <utility>

#include "ratesync/redis/scripts.h"
#include "ratesync/redis/state_store.h"

namespace ratesync::redis {
namespace {

constexpr std::size_t kMostAtOnce = 1'000;
constexpr int kMostRounds = 8;  // in which others were quicker with all that was found

struct Found {
  std::uint32_t shard;
  std::string member;
  std::int64_t due;
};

}  // namespace

struct RedisStateStore::Claiming {
  store::SpaceRef space;
  std::string begin;  // of the members that are wanted
  std::size_t limit = 0;
  std::int64_t lease = 0;
  store::Callback<std::vector<store::DueKey>> done;

  int round = 0;
  std::vector<Found> found;
  std::size_t under_way = 0;
  Status status;
  std::vector<store::DueKey> claimed;

  void finish() {
    if (claimed.empty() && !status.ok()) return done(status);
    std::sort(claimed.begin(), claimed.end(),
              [](const store::DueKey& a, const store::DueKey& b) { return a.due < b.due; });
    done(std::move(claimed));
  }
};

void RedisStateStore::claim_due(const store::SpaceRef& space, const std::string& kind, std::size_t limit,
                                std::int64_t lease, store::Callback<std::vector<store::DueKey>> done) {
  const auto all = std::make_shared<Claiming>();
  all->space = space;
  if (!kind.empty()) all->begin = StateKeys::member(kind, "");
  all->limit = std::min(limit, kMostAtOnce);
  all->lease = lease;
  all->done = std::move(done);
  backend_.when_ready([this, all, alive = alive_](const Status& status) {
    all->status = *alive ? status : Status::make(Code::closed, "the store was closed");
    if (!all->status.ok() || all->limit == 0) return all->finish();
    look_for_due(all);
  });
}

void RedisStateStore::look_for_due(const std::shared_ptr<Claiming>& all) {
  const bool apart = backend_.commander().clustered();
  const Nanos until = saturating_add(clock_.now(), options_.call_timeout);
  all->found.clear();
  ++all->under_way;
  for (std::uint32_t first = 0; first < keys_.shards(); first += apart ? 1 : keys_.shards()) {
    const std::uint32_t end = apart ? first + 1 : keys_.shards();
    Command arguments(std::to_string(end - first));
    for (std::uint32_t shard = first; shard < end; ++shard)
      arguments.add(keys_.of_space("timeouts", shard, *all->space));
    arguments.add("look").add(static_cast<std::int64_t>(all->limit)).add(all->begin);
    ++all->under_way;
    backend_.commander().eval(
        due_script(), keys_.of_space("timeouts", first, *all->space), std::move(arguments), until,
        [this, all, first, alive = alive_](Result<Reply> reply) {
          if (!reply.ok()) {
            all->status = reply.status();
          } else {
            std::vector<Reply>& items = reply.value().items;
            for (std::size_t i = 0; i + 2 < items.size(); i += 3)
              all->found.push_back({first + static_cast<std::uint32_t>(items[i].integer) - 1,
                                    std::move(items[i + 1].text), items[i + 2].integer});
          }
          if (--all->under_way > 0) return;
          if (!*alive) return all->finish();
          claim_found(all);
        });
  }
  --all->under_way;
}

void RedisStateStore::claim_found(const std::shared_ptr<Claiming>& all) {
  std::sort(all->found.begin(), all->found.end(),
            [](const Found& a, const Found& b) { return a.due < b.due; });
  if (all->found.size() > all->limit) all->found.resize(all->limit);
  if (all->found.empty()) return all->finish();
  const bool apart = backend_.commander().clustered();
  const Nanos until = saturating_add(clock_.now(), options_.call_timeout);
  std::map<std::uint32_t, std::vector<Found>> calls;
  for (Found& found : all->found) calls[apart ? found.shard : 0].push_back(std::move(found));
  all->under_way = calls.size();
  for (auto& [first, members] : calls) {
    std::map<std::uint32_t, std::int64_t> places;  // of shards among the keys
    for (const Found& found : members) places.emplace(found.shard, 0);
    Command arguments(std::to_string(3 * places.size()));
    std::int64_t next = 0;
    for (auto& [shard, place] : places) {
      place = next++;
      arguments.add(keys_.of_space("timeouts", shard, *all->space))
          .add(keys_.of_space("claims", shard, *all->space))
          .add(keys_.shard("tokens", shard));
    }
    arguments.add("claim").add(all->lease);
    for (const Found& found : members) arguments.add(places[found.shard]).add(found.member);
    const std::string key = keys_.of_space("timeouts", members.front().shard, *all->space);
    backend_.commander().eval(
        due_script(), key, std::move(arguments), until,
        [this, all, members = std::move(members), alive = alive_](Result<Reply> reply) {
          if (!reply.ok()) {
            // Claimed or not: what was falls due again after its lease.
            all->status = reply.status();
          } else {
            const std::vector<Reply>& items = reply.value().items;
            for (std::size_t i = 0; i + 2 < items.size(); i += 3) {
              auto named =
                  StateKeys::parse_member(members[static_cast<std::size_t>(items[i].integer)].member);
              if (named)
                all->claimed.push_back({std::move(named->kind), std::move(named->key), items[i + 1].integer,
                                        items[i + 2].integer});
            }
          }
          if (--all->under_way > 0) return;
          if (*alive && all->claimed.empty() && all->status.ok() && ++all->round < kMostRounds)
            return look_for_due(all);
          all->finish();
        });
  }
}

}  // namespace ratesync::redis
