// The names of a store's keys.
//
//   <prefix>:{<id>}:<kind>         one hash tag per limit: all its keys share a slot of a Cluster
//   <prefix>:{<tag>}:<id>:<kind>   with the option hash_tag: all keys of the store do
//
// kind: t, f, c, w for the state of token_bucket, fixed_window, sliding_counter, sliding_window; s for the
// slots. An id may hold anything: what would end a hash tag is escaped, so no two ids share a key.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "ratesync/limits/params.h"

namespace ratesync::redis {

class Keys {
 public:
  explicit Keys(std::string prefix, std::string hash_tag = {});

  [[nodiscard]] std::string of(std::string_view id, char kind) const;
  [[nodiscard]] std::string rate(std::string_view id, limits::Algorithm algorithm) const;
  [[nodiscard]] std::string slots(std::string_view id) const { return of(id, 's'); }
  // All of them, as a glob pattern.
  [[nodiscard]] std::string pattern() const;
  struct Named {
    std::string id;
    char kind;
  };
  [[nodiscard]] std::optional<Named> parse(std::string_view key) const;
  // A process hears of free slots in the channel of this name and its own.
  [[nodiscard]] std::string channels() const { return prefix_ + ":wake:"; }

 private:
  const std::string prefix_;
  const bool tagged_;
  const std::string head_;  // up to the id
  const std::string tail_;  // between the id and the kind
};

// The letter of the state of that algorithm.
char kind_of(limits::Algorithm algorithm);

}  // namespace ratesync::redis
