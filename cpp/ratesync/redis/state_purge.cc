// Clearing away rows that are over: by itself now and then, one process at a time, and when asked.
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
  call_purge(all, {}, most, [this, all, most](Result<Reply> found) {
    std::vector<std::string> rows;
    if (found.ok())
      for (Reply& item : found.value().items) rows.push_back(std::move(item.text));
    else
      all->status = found.status();
    if (rows.empty()) {
      ++all->shard;
      return purge_shard(all);
    }
    call_purge(all, rows, most, [this, all, more = rows.size() == most](const Result<Reply>& reply) {
      if (reply.ok())
        all->gone += Result<Reply>(reply).value().integer;
      else
        all->status = reply.status();
      if (!reply.ok() || !more) ++all->shard;
      purge_shard(all);
    });
  });
}

void RedisStateStore::call_purge(const std::shared_ptr<Purge>& all, const std::vector<std::string>& rows,
                                 std::size_t most, std::function<void(Result<Reply>)> then) {
  const std::string key = keys_.shard("expiring", all->shard);
  Command arguments(std::to_string(2 + rows.size()));
  arguments.add(key).add(keys_.shard("floors", all->shard));
  for (const std::string& row : rows) arguments.add(row);
  arguments.add(all->after).add(static_cast<std::int64_t>(most));
  backend_.commander().eval(purge_script(), key, std::move(arguments),
                            saturating_add(clock_.now(), options_.call_timeout),
                            [all, then = std::move(then), alive = alive_](Result<Reply> reply) {
                              if (*alive) return then(std::move(reply));
                              all->done(Status::make(Code::closed, "the store was closed"));
                            });
}

// --- in the background --------------------------------------------------------------------------------

// From the first operation on.
void RedisStateStore::arm_purge() {
  if (used_ || closing_) return;
  used_ = true;
  static thread_local std::minstd_rand random{std::random_device{}()};
  const Nanos pause =
      options_.purge_every / 2 + std::uniform_int_distribution<Nanos>(0, options_.purge_every)(random);
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
