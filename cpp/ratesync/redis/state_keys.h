// The names of what one prefix of state keeps.
//
//   <prefix><what>:{<tag>}<:part>...
//
// tag: the shard of a key, bucket_of() % 64, or the option hash_tag. On a Cluster all that one script touches
// shares a slot by it. Every part but the last is escaped, so that no two rows share a name.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "ratesync/base/status.h"
#include "ratesync/store/state_store.h"

namespace ratesync::redis {

class StateKeys {
 public:
  static constexpr std::uint32_t kShards = 64;

  StateKeys(std::string prefix, std::string hash_tag);
  static Status check(const std::string& prefix);

  [[nodiscard]] std::uint32_t shards() const { return tagged_ ? 1 : kShards; }
  [[nodiscard]] std::uint32_t shard_of(std::uint32_t bucket) const { return tagged_ ? 0 : bucket % kShards; }

  // A row: what is "state", its parts kind and key; a lock: "locks", its name.
  [[nodiscard]] std::string row(std::uint32_t shard, const store::Space& space, std::string_view kind,
                                std::string_view key) const;
  [[nodiscard]] std::string lock(std::uint32_t shard, const store::Space& space, std::string_view name) const;
  // What a shard has once: "expiring", "floors", "tokens" ...
  [[nodiscard]] std::string shard(std::string_view what, std::uint32_t shard) const;
  // What a shard has once for each space: "timeouts", "claims".
  [[nodiscard]] std::string of_space(std::string_view what, std::uint32_t shard,
                                     const store::Space& space) const;
  // A member of "timeouts".
  [[nodiscard]] static std::string member(std::string_view kind, std::string_view key);
  struct Member {
    std::string kind;
    std::string key;
  };
  [[nodiscard]] static std::optional<Member> parse_member(std::string_view member);

  // Every row of the kind whose key starts with `begin`, as a glob pattern; others may match, too, which
  // key_of() tells apart.
  [[nodiscard]] std::string rows_pattern(const store::Space& space, std::string_view kind,
                                         std::string_view begin) const;
  [[nodiscard]] std::optional<std::string> key_of(std::string_view row, const store::Space& space,
                                                  std::string_view kind) const;
  [[nodiscard]] std::string locks_pattern(const store::Space* space) const;
  struct LockName {
    store::Space space;
    std::string name;
  };
  [[nodiscard]] std::optional<LockName> parse_lock(std::string_view lock) const;
  // A process hears of freed locks in the channel of this name and its own.
  [[nodiscard]] std::string channels() const { return prefix_ + "locks:wake:"; }

 private:
  [[nodiscard]] std::string tag(std::uint32_t shard) const;
  [[nodiscard]] std::optional<std::string_view> after_tag(std::string_view name, std::string_view what) const;

  const std::string prefix_;
  const std::string hash_tag_;
  const bool tagged_;
};

// A message of the channel.
std::string freed_message(const store::Space& space, std::string_view name);
std::optional<StateKeys::LockName> parse_freed(std::string_view message);

}  // namespace ratesync::redis
