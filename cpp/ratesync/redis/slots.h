// Who owns which hash slot of a Redis Cluster, and what MOVED and ASK say. Pure: no I/O, no clock.
//
// The rules are those of the Redis Cluster specification: a key's slot is the CRC16 (XMODEM) of the key,
// or of its first {tag} that is not empty, modulo 16384.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "ratesync/base/status.h"
#include "ratesync/redis/reply.h"
#include "ratesync/redis/url.h"

namespace ratesync::redis {

inline constexpr std::size_t kSlots = 16'384;

std::uint16_t crc16(std::string_view bytes);
std::uint16_t hash_slot(std::string_view key);

// An error reply that sends the client to another node.
struct Redirect {
  bool ask = false;  // for this command only, after ASKING; else the slot has moved for good
  std::uint16_t slot = 0;
  HostPort node;
};
// Nothing when the error is none, or one that we cannot follow. `answered_by`: a node that does not know
// its own address leaves the host out and means the one that was asked.
std::optional<Redirect> parse_redirect(std::string_view error, std::string_view answered_by);

class SlotMap {
 public:
  static constexpr std::size_t kNobody = 0xFFFF;

  SlotMap() { owners_.fill(kNobody); }
  // The answer to CLUSTER SLOTS. A map without a single owned slot is refused: the node is alone.
  static Result<SlotMap> parse(const Reply& reply, std::string_view answered_by);

  // Index into primaries(), or kNobody.
  [[nodiscard]] std::size_t owner(std::uint16_t slot) const { return owners_[slot]; }
  // Every node that owns a slot, and possibly some that did; the index of one never changes.
  [[nodiscard]] const std::vector<HostPort>& primaries() const { return primaries_; }
  // Nodes that own nothing but could answer for the cluster.
  [[nodiscard]] const std::vector<HostPort>& replicas() const { return replicas_; }
  [[nodiscard]] bool owns_any(const HostPort& node) const;
  // Learned from MOVED. False: there is no room for another node (65,535).
  bool assign(std::uint16_t slot, const HostPort& node);

 private:
  std::size_t index_of(const HostPort& node);

  std::array<std::uint16_t, kSlots> owners_;
  std::vector<HostPort> primaries_;
  std::vector<HostPort> replicas_;
};

}  // namespace ratesync::redis
