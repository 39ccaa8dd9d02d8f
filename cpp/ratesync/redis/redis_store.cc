#include "ratesync/redis/redis_store.h"

#include <unistd.h>

#include <algorithm>
#include <utility>

#include "ratesync/base/format.h"
#include "ratesync/redis/commander_factory.h"
#include "ratesync/redis/doctor.h"
#include "ratesync/redis/info.h"

namespace ratesync::redis {
namespace {

// How long close() lets calls end and slots be given back before it closes the sockets.
constexpr Nanos kClosePatience = 2 * kSecond;

std::string holder_text() {
  char host[256] = "?";
  (void)gethostname(host, sizeof host - 1);
  return formatted("{}:{} ratesync", host, getpid());
}

Status bad_option(std::string_view option, std::string_view expected, const std::string& received) {
  return Status::make(Code::invalid, formatted("{}: expected {}, got {}", option, expected, received));
}

Status check(const RedisOptions& options) {
  const auto braces = [](const std::string& text) { return text.find_first_of("{}") != std::string::npos; };
  if (options.url.empty())
    return bad_option("url", "redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://", "none");
  if (options.key_prefix.empty() || options.key_prefix.size() > 255 || braces(options.key_prefix))
    return bad_option("key_prefix", "1 to 255 bytes without { and } (the option hash_tag sets a hash tag)",
                      '"' + options.key_prefix + '"');
  if (options.hash_tag.size() > 255 || braces(options.hash_tag))
    return bad_option("hash_tag", "at most 255 bytes without { and }, which are added",
                      '"' + options.hash_tag + '"');
  if (options.pool_max_size < 1 || options.pool_max_size > 10'000)
    return bad_option("pool_max_size", "a whole number from 1 to 10000",
                      std::to_string(options.pool_max_size));
  return Status::success();
}

}  // namespace

Result<std::unique_ptr<store::Store>> RedisStore::create(asio::io_context& io, const Clock& clock,
                                                         RedisOptions options) {
  if (Status bad = check(options); !bad.ok()) return bad;
  CommanderOptions with;
  with.url = options.url;
  with.db = options.db;
  with.password = options.password;
  with.pool_max_size = options.pool_max_size;
  with.socket_timeout = options.socket_timeout;
  with.socket_connect_timeout = options.socket_connect_timeout;
  Result<std::unique_ptr<Commander>> commander = make_commander(io, clock, std::move(with));
  if (!commander.ok()) return commander.status();
  return std::unique_ptr<store::Store>(
      new RedisStore(io, clock, std::move(options), std::move(commander.value())));
}

RedisStore::RedisStore(asio::io_context& io, const Clock& clock, RedisOptions options,
                       std::unique_ptr<Commander> commander)
    : io_(io), clock_(clock), options_(std::move(options)), commander_(std::move(commander)) {
  LimitStoreOptions limits;
  limits.key_prefix = options_.key_prefix;
  limits.hash_tag = options_.hash_tag;
  limits.holder = holder_text();
  limits.call_timeout = options_.socket_timeout;
  limits_ =
      std::make_unique<RedisLimitStore>(io, clock_, static_cast<LimitBackend&>(*this), std::move(limits));
}

RedisStore::~RedisStore() { *alive_ = false; }

store::Capabilities RedisStore::capabilities() const {
  store::Capabilities caps;
  caps.limits = true;
  caps.locks = true;
  caps.state = true;
  caps.shared = true;
  return caps;
}

void RedisStore::migrate(bool, store::Callback<std::vector<store::MigrationStep>> done) {
  done(std::vector<store::MigrationStep>{});
}

// --- capabilities of a prefix --------------------------------------------------------------------------

Result<store::StateStore*> RedisStore::state(const std::string& prefix) {
  if (Status bad = StateKeys::check(prefix); !bad.ok()) return bad;
  const std::scoped_lock guard(lock_);
  std::unique_ptr<RedisStateStore>& made = states_[prefix];
  if (!made) {
    StateStoreOptions options;
    options.prefix = prefix;
    options.hash_tag = options_.hash_tag;
    options.call_timeout = options_.socket_timeout;
    made =
        std::make_unique<RedisStateStore>(io_, clock_, static_cast<LimitBackend&>(*this), std::move(options));
  }
  return static_cast<store::StateStore*>(made.get());
}

Result<store::LockStore*> RedisStore::locks(const std::string& prefix) {
  if (Status bad = StateKeys::check(prefix); !bad.ok()) return bad;
  const std::scoped_lock guard(lock_);
  std::unique_ptr<RedisLockStore>& made = locks_[prefix];
  if (!made) {
    LockStoreOptions options;
    options.prefix = prefix;
    options.hash_tag = options_.hash_tag;
    options.holder = holder_text();
    options.call_timeout = options_.socket_timeout;
    made =
        std::make_unique<RedisLockStore>(io_, clock_, static_cast<LimitBackend&>(*this), std::move(options));
  }
  return static_cast<store::LockStore*>(made.get());
}

template <class Each>
void RedisStore::each_capability(Each&& each) const {
  std::vector<RedisStateStore*> states;
  std::vector<RedisLockStore*> locks;
  {
    const std::scoped_lock guard(lock_);
    for (const auto& [prefix, made] : states_) states.push_back(made.get());
    for (const auto& [prefix, made] : locks_) locks.push_back(made.get());
  }
  for (RedisStateStore* made : states) each(*made);
  for (RedisLockStore* made : locks) each(*made);
}

store::Stats RedisStore::stats() const {
  store::Stats out;
  commander_->add_stats(out);
  limits_->fill(out);
  each_capability([&out](const auto& made) { made.fill(out); });
  return out;
}

void RedisStore::close(std::function<void()> done) {
  const auto left = std::make_shared<std::size_t>(1);
  const auto one = [this, left, done = std::move(done)]() mutable {
    if (--*left == 0) commander_->close(std::move(done));
  };
  each_capability([&](auto& made) {
    ++*left;
    made.close(kClosePatience, one);
  });
  limits_->close(kClosePatience, one);
}

void RedisStore::abandon_after_fork() {
  commander_->abandon_after_fork();
  limits_->abandon_after_fork();
  each_capability([](auto& made) { made.abandon_after_fork(); });
}

// --- the server ---------------------------------------------------------------------------------------

void RedisStore::when_ready(std::function<void(Status)> done) {
  if (ready_) return done(Status::success());
  waiting_.push_back(std::move(done));
  if (std::exchange(checking_, true)) return;
  commander_->connect([this, alive = alive_](const Status& status) {
    if (!*alive) return;
    if (!status.ok() || known_) return checked(status);
    look_at_version();
  });
}

// A Cluster finds a node that is down by itself, and the others must not wait for it.
void RedisStore::not_answered() {
  if (!commander_->clustered()) ready_ = false;
}

void RedisStore::look_at_version() {
  Command info("INFO");
  info.add("server");
  commander_->call({}, std::move(info), deadline(), [this, alive = alive_](const Result<Reply>& reply) {
    if (!*alive) return;
    if (!reply.ok()) {
      // Who may not ask for it may still have all that is needed; doctor() names what is missing.
      if (reply.status().sqlstate == "NOPERM") return checked(Status::success());
      return checked(reply.status());
    }
    const Result<Reply> kept = reply;
    const ServerInfo found = ServerInfo::parse(Result<Reply>(kept).value().text);
    if (found.major > 0 && (found.major < 6 || (found.major == 6 && found.minor < 2)))
      return checked(Status::make(
          Code::invalid, formatted("{} {} at {} is too old: Redis 6.2 or later, or Valkey, is needed",
                                   found.product, found.version, commander_->target())));
    known_ = true;
    checked(Status::success());
  });
}

void RedisStore::checked(const Status& status) {
  checking_ = false;
  ready_ = status.ok();
  for (const auto& done : std::exchange(waiting_, {})) done(status);
}

void RedisStore::initialize(store::Callback<store::Unit> done) {
  when_ready([done = std::move(done)](const Status& status) {
    if (status.ok()) return done(store::Unit{});
    done(status);
  });
}

void RedisStore::doctor(store::Callback<std::vector<store::Finding>> done) {
  std::vector<std::string> prefixes;
  {
    const std::scoped_lock guard(lock_);
    for (const auto& [prefix, made] : states_) prefixes.push_back(prefix);
    for (const auto& [prefix, made] : locks_)
      if (!states_.contains(prefix)) prefixes.push_back(prefix);
  }
  examine({*commander_, limits_->keys(), deadline(), options_.pool_max_size, std::move(prefixes)},
          std::move(done));
}

}  // namespace ratesync::redis
