#include "ratesync/redis/doctor.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <utility>

#include "ratesync/base/format.h"
#include "ratesync/redis/info.h"

namespace ratesync::redis {
namespace {

using store::Finding;
using Level = Finding::Level;

std::int64_t wall_us() {
  return std::chrono::duration_cast<std::chrono::microseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}
std::int64_t steady_us() {
  return std::chrono::duration_cast<std::chrono::microseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// Questions that are asked one after the other; the last one ends the examination.
class Examination : public std::enable_shared_from_this<Examination> {
 public:
  Examination(const Patient& patient, store::Callback<std::vector<Finding>> done)
      : commander_(patient.commander),
        prefix_(patient.keys.of("doctor", 't')),
        channel_(patient.keys.channels() + "doctor"),
        deadline_(patient.deadline),
        pool_max_size_(patient.pool_max_size),
        prefixes_(patient.prefixes),
        done_(std::move(done)) {}

  void begin() {
    commander_.connect([me = shared_from_this()](const Status& status) {
      if (!status.ok()) {
        me->add(Level::error, "connection", status.message);
        return me->finish();
      }
      me->ask_info();
    });
  }

 private:
  void add(Level level, std::string subject, std::string message) {
    findings_.push_back({level, std::move(subject), std::move(message)});
  }
  void finish() { done_(std::move(findings_)); }

  void ask_info() {
    const std::int64_t sent = steady_us();
    commander_.call_all(
        Command("INFO"), deadline_, [me = shared_from_this(), sent](std::vector<Result<Reply>> all) {
          const std::int64_t took = steady_us() - sent;
          for (Result<Reply>& reply : all) {
            if (reply.ok()) {
              me->read_info(reply.value().text);
            } else {
              me->add(Level::warning, "server", reply.status().message);
            }
          }
          me->add(Level::ok, "deployment",
                  formatted("{} primar{}{}", all.size(), all.size() == 1 ? "y" : "ies",
                            me->commander_.clustered()
                                ? ", a Cluster: limits acquired together, and what is all or nothing, "
                                  "need one hash slot (option hash_tag)"
                                : ""));
          me->add(took > 100'000 ? Level::warning : Level::ok, "latency",
                  formatted("INFO took {:.1f} ms", static_cast<double>(took) / 1000));
          me->ask_time();
        });
  }

  void read_info(std::string_view info) {
    const ServerInfo server = ServerInfo::parse(info);
    const bool old = server.major > 0 && (server.major < 6 || (server.major == 6 && server.minor < 2));
    add(old ? Level::error : Level::ok, "server version",
        formatted("{} {} at {}{}", server.product, server.version, commander_.target(),
                  old ? ": 6.2 is the oldest that works" : ""));
    const std::string policy(info_field(info, "maxmemory_policy"));
    const std::string most(info_field(info, "maxmemory_human"));
    const bool bounded = info_field(info, "maxmemory") != "0" && !most.empty();
    if (!bounded)
      add(Level::ok, "memory", formatted("no maxmemory; {} in use", info_field(info, "used_memory_human")));
    else if (policy == "noeviction")
      add(Level::ok, "memory",
          formatted("maxmemory {}, noeviction: when it is full, requests are refused", most));
    else if (policy.starts_with("volatile-"))  // rows of state have no expiry of the server's
      add(Level::warning, "memory",
          formatted(
              "maxmemory {} with {}: when it is full, limits and locks may be evicted and start afresh, and "
              "when none of them is left, requests are refused; use noeviction, or a server of their own",
              most, policy));
    else
      add(Level::warning, "memory",
          formatted(
              "maxmemory {} with {}: when it is full, limits, locks and keys of state may be evicted and "
              "start afresh, their versions and tokens, too; use noeviction, or a server of their own",
              most, policy));
    const bool aof = info_field(info, "aof_enabled") == "1";
    add(Level::ok, "persistence",
        aof ? "append-only file: a restart keeps limits, and state but for the last second (appendfsync)"
            : "no append-only file: after a restart limits start afresh or from the last snapshot, which may "
              "grant one further burst; locks, dedup keys and other state are forgotten");
    if (info_field(info, "role") == "slave")
      add(Level::error, "role", "it is a replica: limits need the primary");
    const std::string_view clients = info_field(info, "maxclients");
    if (!clients.empty())
      add(Level::ok, "connections",
          formatted("two per process at most (pool_max_size is {}), of the server's maxclients {}",
                    pool_max_size_, clients));
  }

  void ask_time() {
    const std::int64_t before = wall_us();
    commander_.call({}, Command("TIME"), deadline_, [me = shared_from_this(), before](Result<Reply> reply) {
      const std::int64_t after = wall_us();
      if (!reply.ok() || reply.value().items.size() != 2) {
        me->missing("TIME", reply);
      } else {
        const std::int64_t server = std::atoll(reply.value().items[0].text.c_str()) * 1'000'000 +
                                    std::atoll(reply.value().items[1].text.c_str());
        const std::int64_t skew = server - (before + after) / 2;
        me->add(
            std::abs(skew) > 1'000'000 ? Level::warning : Level::ok, "clock",
            formatted("the server's clock is {:.3f} s ahead of this host's; limits use the server's alone",
                      static_cast<double>(skew) / 1e6));
      }
      me->ask_rights(0);
    });
  }

  // Each command that is needed, in a way that changes nothing; who may not is told so before anything else.
  [[nodiscard]] std::vector<Command> probes() const {
    std::vector<Command> out;
    const auto probe = [&out](std::initializer_list<std::string_view> words) {
      Command command(*words.begin());
      for (const auto* word = words.begin() + 1; word != words.end(); ++word) command.add(*word);
      out.push_back(std::move(command));
    };
    const std::string& key = prefix_;
    probe({"EVALSHA", "0000000000000000000000000000000000000000", "1", key});
    probe({"SCRIPT", "LOAD", "return 1"});
    probe({"GET", key});
    probe({"SET", key, "0", "XX", "PX", "1"});
    probe({"DEL", key});
    probe({"PEXPIRE", key, "1"});
    probe({"PTTL", key});
    probe({"HGETALL", key});
    probe({"HKEYS", key});
    probe({"HGET", key, "x"});
    probe({"HDEL", key, "x"});
    probe({"HSET", key, "x", "1"});
    probe({"DEL", key});
    probe({"ZRANGE", key, "0", "0"});
    probe({"ZRANGEBYSCORE", key, "0", "0"});
    probe({"ZREVRANGEBYSCORE", key, "0", "0"});
    probe({"ZADD", key, "XX", "0", "x"});
    probe({"ZREM", key, "x"});
    probe({"ZREMRANGEBYSCORE", key, "0", "0"});
    probe({"SCAN", "0", "COUNT", "1"});
    probe({"PUBLISH", channel_, "doctor"});
    if (prefixes_.empty()) return out;  // what follows is for state and locks
    probe({"HINCRBY", key, "x", "1"});
    probe({"DEL", key});
    probe({"HMGET", key, "x"});
    probe({"GETRANGE", key, "0", "0"});
    probe({"PEXPIREAT", key, "1"});
    probe({"UNLINK", key});
    probe({"ZSCORE", key, "x"});
    for (const std::string& prefix : prefixes_) {
      probe({"HGETALL", prefix + "state:{0}:doctor"});
      probe({"PUBLISH", prefix + "locks:wake:doctor", "doctor"});
    }
    return out;
  }

  void missing(std::string_view command, const Result<Reply>& reply) {
    if (!reply.ok() && reply.status().sqlstate == "NOPERM") {
      missing_.emplace_back(command);
    } else if (!reply.ok() && reply.status().sqlstate != "NOSCRIPT") {
      add(Level::warning, std::string(command), reply.status().message);
    }
  }

  void ask_rights(std::size_t next) {
    const std::vector<Command> all = probes();
    if (next == all.size()) {
      report_rights();
      return finish();
    }
    std::string name(all[next][0]);
    // All but SCRIPT, SCAN and PUBLISH name their key first, those of other keys than prefix_ in another
    // slot.
    const std::string key(name == "HGETALL" ? all[next][1] : std::string_view(prefix_));
    commander_.call(key, all[next], deadline_,
                    [me = shared_from_this(), name = std::move(name), next](const Result<Reply>& reply) {
                      me->missing(name, reply);
                      me->ask_rights(next + 1);
                    });
  }

  void report_rights() {
    if (missing_.empty())
      return add(Level::ok, "rights", "this user may use all commands, keys and channels needed");
    std::sort(missing_.begin(), missing_.end());
    missing_.erase(std::unique(missing_.begin(), missing_.end()), missing_.end());
    std::string names, grants;
    for (const std::string& name : missing_) {
      names += (names.empty() ? "" : ", ") + name;
      std::string lower = name;
      std::transform(lower.begin(), lower.end(), lower.begin(),
                     [](unsigned char c) { return std::tolower(c); });
      grants += " +" + lower + (lower == "script" ? "|load" : "");
    }
    add(Level::error, "rights",
        formatted("this user may not use {}: let an administrator say ACL SETUSER <user>{} ~<key_prefix>:* "
                  "&<key_prefix>:*{}",
                  names, grants, prefixes_.empty() ? "" : " ~<prefix>* &<prefix>* (of state and locks)"));
  }

  Commander& commander_;
  const std::string prefix_;
  const std::string channel_;
  const Nanos deadline_;
  const std::size_t pool_max_size_;
  const std::vector<std::string> prefixes_;
  const store::Callback<std::vector<Finding>> done_;
  std::vector<Finding> findings_;
  std::vector<std::string> missing_;
};

}  // namespace

void examine(const Patient& patient, store::Callback<std::vector<Finding>> done) {
  std::make_shared<Examination>(patient, std::move(done))->begin();
}

}  // namespace ratesync::redis
