// Clearing away rows that are over: soon after the first operation, then now and then, one process at a time,
// and when asked. Who lives too shortly for that clears away with its writes (lua/state.lua).
#include <algorithm>
#include <chrono>
#include <random>
#include <utility>

#include "ratesync/redis/scripts.h"
#include "ratesync/redis/state_store.h"

namespace ratesync::redis {
namespace {

constexpr std::size_t kAtOnce = 128;            // rows per call: the server serves nobody else meanwhile
constexpr std::size_t kMostOfOneTurn = 50'000;  // then other processes may

}  // namespace

// One shard after the other, each until nothing is left or `limit` is reached.
struct RedisStateStore::Purge {
  std::size_t limit = 0;
  std::int64_t after = 0;  // ms that rows have been over for
  std::int64_t gone = 0;
  std::uint32_t shard = 0;
  Status status;  // of shards that could not be reached
  store::Callback<std::int64_t> done;
};

void RedisStateStore::purge(std::size_t limit, store::Callback<std::int64_t> done) {
  const auto all = std::make_shared<Purge>();
  all->limit = limit;
  all->done = std::move(done);
  backend_.when_ready([this, all, alive = alive_](const Status& status) {
    if (!*alive) return all->done(Status::make(Code::closed, "the store was closed"));
    if (!status.ok()) return all->done(status);
    purge_shard(all);
  });
}

void RedisStateStore::purge_shard(const std::shared_ptr<Purge>& all) {
  const std::size_t most = std::min(kAtOnce, all->limit - static_cast<std::size_t>(all->gone));
  if (most == 0 || closing_ || all->shard == keys_.shards()) {
    if (all->gone == 0 && !all->status.ok()) return all->done(all->status);
    return all->done(all->gone);
  }
  const std::string key = keys_.shard("expiring", all->shard);
  Command arguments("2");
  arguments.add(key).add(keys_.shard("floors", all->shard));
  arguments.add(all->after).add(static_cast<std::int64_t>(most));
  backend_.commander().eval(
      purge_script(), key, std::move(arguments), saturating_add(clock_.now(), options_.call_timeout),
      [this, all, most, alive = alive_](Result<Reply> reply) {
        if (!*alive) return all->done(Status::make(Code::closed, "the store was closed"));
        std::size_t looked_at = 0;
        if (!reply.ok()) {
          all->status = reply.status();
        } else if (const std::vector<Reply>& items = reply.value().items; items.size() == 2) {
          looked_at = static_cast<std::size_t>(items[0].integer);
          all->gone += items[1].integer;
        }
        if (looked_at < most) ++all->shard;
        purge_shard(all);
      });
}

// --- in the background --------------------------------------------------------------------------------

// From the first operation on.
void RedisStateStore::arm_purge() {
  if (used_ || closing_) return;
  used_ = true;
  static thread_local std::minstd_rand random{std::random_device{}()};
  const auto any = [](Nanos most) { return std::uniform_int_distribution<Nanos>(0, most)(random); };
  const Nanos pause = std::exchange(purged_, true) ? options_.purge_every / 2 + any(options_.purge_every)
                                                   : any(options_.purge_first);
  purge_timer_->expires_after(std::chrono::nanoseconds(pause));
  purge_timer_->async_wait([this, alive = alive_](const asio::error_code& error) {
    if (*alive && !error && !closing_) purge_in_background();
  });
}

void RedisStateStore::purge_in_background() {
  const auto again = [this, alive = alive_] {
    if (!*alive) return;
    used_ = false;
    arm_purge();
  };
  if (!backend_.ready() || backend_.commander().down()) return again();
  const std::string key = keys_.shard("purging", 0);
  const Nanos until = saturating_add(clock_.now(), options_.call_timeout);
  Command turn("SET");
  turn.add(key).add("1").add("NX").add("PX").add(options_.purge_every / kMilli);
  backend_.commander().call(key, std::move(turn), until,
                            [this, again, alive = alive_](const Result<Reply>& reply) {
                              if (!*alive) return;
                              if (!reply.ok() || Result<Reply>(reply).value().kind != Reply::Kind::status)
                                return again();
                              const auto all = std::make_shared<Purge>();
                              all->limit = kMostOfOneTurn;
                              all->after = options_.purge_after / kMilli;
                              all->done = [again](const Result<std::int64_t>&) { again(); };
                              purge_shard(all);
                            });
}

}  // namespace ratesync::redis
