#include "ratesync/redis/lock_store.h"

#include <algorithm>
#include <random>
#include <tuple>

#include "ratesync/base/format.h"
#include "ratesync/redis/errors.h"
#include "ratesync/redis/scripts.h"

namespace ratesync::redis {
namespace {

using store::LockOp;
using store::LockReply;
using Outcome = LockReply::Outcome;
using Verb = LockOp::Verb;

constexpr std::uint8_t kOp = 0, kLeave = 1;
// Sums of times, in microseconds, stay exact in Lua's doubles (150 years).
constexpr std::int64_t kLongest = 5'000'000'000'000;  // ms

std::string random_name() {
  std::random_device device;
  return formatted("{:08x}{:08x}", device(), device());
}

std::uint32_t bucket_of(const store::Space& space, const std::string& name) {
  return store::bucket_of(space, "lock", name);
}

struct GhostOp final : LockOp {
  explicit GhostOp(const LockOp& op) {
    verb = op.verb, space = op.space, name = op.name, ttl = op.ttl, token = op.token;
    queued = op.queued, id = op.id;
  }
  void done() override {}
};

}  // namespace

// Nobody here waits any more.
struct RedisLockStore::Leave {
  store::SpaceRef space;
  std::string name;
};

RedisLockStore::RedisLockStore(asio::io_context& io, const Clock& clock, LimitBackend& backend,
                               LockStoreOptions options)
    : clock_(clock),
      backend_(backend),
      options_(std::move(options)),
      process_(random_name()),
      keys_(options_.prefix, options_.hash_tag),
      lanes_(io, clock, backend, *this, keys_, LaneOptions{"locks", options_.call_timeout}) {}

RedisLockStore::~RedisLockStore() { *alive_ = false; }

void RedisLockStore::submit(LockOp* op) {
  if (op->queued) listen();
  if (const Status refused = lanes_.push({op, kOp, bucket_of(*op->space, op->name)}); !refused.ok()) {
    op->reply = {};
    op->reply.status = refused;
    op->done();
  }
}

void RedisLockStore::stop_waiting(const store::SpaceRef& space, const std::string& name) {
  if (!listening_) return;
  auto leave = std::make_unique<Leave>(Leave{space, name});
  if (lanes_.push({leave.get(), kLeave, bucket_of(*space, name)}).ok())
    (void)leave.release();  // tell() deletes it
}

void RedisLockStore::on_freed(std::function<void(const store::Space&, const std::string& name)> listener) {
  freed_ = std::move(listener);
}

bool RedisLockStore::pushes() const { return listening_ && backend_.commander().subscribed(); }

// From the first time that somebody here stands in line.
void RedisLockStore::listen() {
  if (std::exchange(listening_, true)) return;
  backend_.commander().subscribe(keys_.channels() + process_,
                                 [this, alive = alive_](std::string_view message) {
                                   if (!*alive || !freed_) return;
                                   if (const auto lock = parse_freed(message))
                                     freed_(lock->space, lock->name);
                                 });
}

void RedisLockStore::initialize(store::Callback<store::Unit> done) {
  backend_.when_ready([done = std::move(done)](const Status& status) {
    if (status.ok()) return done(store::Unit{});
    done(status);
  });
}

// --- a call -------------------------------------------------------------------------------------------

const Script& RedisLockStore::script() const { return locks_script(); }

void RedisLockStore::begin(CallWriter& to) {
  to.add(process_).add(keys_.channels());
  to.add(backend_.commander().clustered() ? "0" : "1").add(pushes() ? "1" : "0");
}

bool RedisLockStore::write(const LaneItem& item, bool, CallWriter& to) {
  const std::uint32_t shard = keys_.shard_of(item.bucket);
  if (item.kind == kLeave) {
    const auto& leave = *static_cast<Leave*>(item.op);
    to.add("v").add(freed_message(*leave.space, leave.name));
    to.key(keys_.lock(shard, *leave.space, leave.name));
    return true;
  }
  const auto& op = *static_cast<LockOp*>(item.op);
  const std::int64_t ttl = std::clamp<std::int64_t>(op.ttl, 1, kLongest);
  to.key(keys_.lock(shard, *op.space, op.name));
  switch (op.verb) {
    case Verb::acquire:
      to.key(keys_.shard("tokens", shard));
      to.add("a").add(ttl).add(op.id).add(options_.holder).add(op.queued ? "1" : "0");
      break;
    case Verb::renew: to.add("n").add(ttl).add(op.token); break;
    case Verb::release:
    case Verb::break_:
      to.add("r").add(op.verb == Verb::release ? std::max<std::int64_t>(op.token, 1) : op.token);
      to.add(freed_message(*op.space, op.name));
      break;
    case Verb::stand: to.add("s"); break;
    case Verb::ring: to.add("b").add(freed_message(*op.space, op.name)); break;
  }
  return true;
}

Heard RedisLockStore::read(const LaneItem& item, bool looking, Answers& from) {
  LockReply none;
  const bool leave = item.kind == kLeave;
  LockReply& reply = leave ? none : static_cast<LockOp*>(item.op)->reply;
  reply = {};
  const std::int64_t code = from.number();
  if (code == 98) {
    reply.status = from_server(from.text(), {backend_.commander().target(), {}, "locks"});
    return Heard::answered;
  }
  reply.outcome = static_cast<Outcome>(code % 10);
  reply.token = from.number();
  reply.remaining = from.number();
  if (code >= 10) {
    (void)from.number();
    reply.holder = from.text();
  }
  if (leave) return Heard::answered;
  const Verb verb = static_cast<LockOp*>(item.op)->verb;
  // It may have been this release that gave it back.
  if (looking && (verb == Verb::release || verb == Verb::break_) && reply.outcome == Outcome::lost)
    return Heard::doubtful;
  return Heard::answered;
}

Nanos RedisLockStore::deadline(const LaneItem& item) const {
  return item.kind == kOp ? static_cast<LockOp*>(item.op)->deadline
                          : saturating_add(clock_.now(), options_.call_timeout);
}

std::size_t RedisLockStore::bytes(const LaneItem&) const { return 256; }

void RedisLockStore::tell(const LaneItem& item, const Status& status) {
  if (item.kind == kLeave) {
    const std::unique_ptr<Leave> ended(static_cast<Leave*>(item.op));
    return;
  }
  auto* op = static_cast<LockOp*>(item.op);
  if (!status.ok()) {
    op->reply = {};
    op->reply.status = status;
  }
  op->done();
}

std::pair<LaneItem, std::shared_ptr<void>> RedisLockStore::ghost(const LaneItem& item) {
  LaneItem out = item;
  auto op = std::make_shared<GhostOp>(*static_cast<LockOp*>(item.op));
  out.op = op.get();
  return {out, std::move(op)};
}

// --- for people ---------------------------------------------------------------------------------------

struct RedisLockStore::Gathering {
  store::SpaceRef space;
  std::size_t limit = 0;
  store::Callback<std::vector<store::LockInfo>> done;
  std::size_t under_way = 0;
  std::int64_t now = 0;  // microseconds, the server's
  Status status;
  std::vector<store::LockInfo> found;

  void add(StateKeys::LockName lock, const std::vector<Reply>& fields) {
    store::LockInfo info;
    std::int64_t acquired = 0, expires = 0;
    for (std::size_t i = 0; i + 1 < fields.size(); i += 2) {
      const std::string &field = fields[i].text, &value = fields[i + 1].text;
      const std::int64_t number = std::strtoll(value.c_str(), nullptr, 10);
      if (field == "t") info.token = number;
      if (field == "h") info.holder = value;
      if (field == "a") acquired = number;
      if (field == "e") expires = number;
      if (!field.starts_with('w')) continue;
      const std::size_t till = value.find(' ');
      if (till != std::string::npos && std::strtoll(value.c_str() + till, nullptr, 10) > now) ++info.waiters;
    }
    if (info.token == 0) return;
    info.name_space = std::move(lock.space.name_space);
    info.tenant = std::move(lock.space.tenant);
    info.name = std::move(lock.name);
    info.held_for = (now - acquired) / 1'000;
    info.expires_in = (expires - now) / 1'000;
    found.push_back(std::move(info));
  }
  void finish() {
    if (!status.ok()) return done(status);
    std::sort(found.begin(), found.end(), [](const store::LockInfo& a, const store::LockInfo& b) {
      return std::tie(a.name_space, a.tenant, a.name) < std::tie(b.name_space, b.tenant, b.name);
    });
    if (found.size() > limit) found.resize(limit);
    done(std::move(found));
  }
};

void RedisLockStore::list(const store::SpaceRef& space, std::size_t limit,
                          store::Callback<std::vector<store::LockInfo>> done) {
  const auto all = std::make_shared<Gathering>();
  all->space = space;
  all->limit = std::clamp<std::size_t>(limit, 1, 100'000);
  all->done = std::move(done);
  backend_.when_ready([this, all, alive = alive_](const Status& status) {
    all->status = *alive ? status : Status::make(Code::closed, "the store was closed");
    if (!all->status.ok()) return all->finish();
    backend_.commander().call(
        {}, Command("TIME"), saturating_add(clock_.now(), options_.call_timeout),
        [this, all, alive](Result<Reply> time) {
          if (!*alive || !time.ok() || time.value().items.size() != 2) {
            all->status = *alive ? time.status() : Status::make(Code::closed, "the store was closed");
            return all->finish();
          }
          const std::vector<Reply>& parts = time.value().items;
          all->now = std::strtoll(parts[0].text.c_str(), nullptr, 10) * 1'000'000 +
                     std::strtoll(parts[1].text.c_str(), nullptr, 10);
          backend_.commander().scan(keys_.locks_pattern(all->space.get()), 1'000'000,
                                    saturating_add(clock_.now(), options_.call_timeout),
                                    [this, all, alive](Result<std::vector<std::string>> found) {
                                      if (*alive && found.ok()) return read_locks(all, found.value());
                                      all->status =
                                          *alive ? found.status() : Status::make(Code::closed, "closed");
                                      all->finish();
                                    });
        });
  });
}

void RedisLockStore::read_locks(const std::shared_ptr<Gathering>& all,
                                const std::vector<std::string>& locks) {
  ++all->under_way;
  for (const std::string& key : locks) {
    auto lock = keys_.parse_lock(key);
    if (!lock || (all->space && (lock->space.name_space != all->space->name_space ||
                                 lock->space.tenant != all->space->tenant)))
      continue;
    ++all->under_way;
    Command read("HGETALL");
    read.add(key);
    backend_.commander().call(key, std::move(read), saturating_add(clock_.now(), options_.call_timeout),
                              [all, lock = std::move(*lock)](Result<Reply> reply) {
                                if (reply.ok())
                                  all->add(lock, reply.value().items);
                                else
                                  all->status = reply.status();
                                if (--all->under_way == 0) all->finish();
                              });
  }
  if (--all->under_way == 0) all->finish();
}

}  // namespace ratesync::redis
