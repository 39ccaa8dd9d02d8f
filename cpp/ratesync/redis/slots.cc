#include "ratesync/redis/slots.h"

#include <algorithm>
#include <charconv>

#include "ratesync/base/format.h"

namespace ratesync::redis {
namespace {

// CRC16 with the polynomial 0x1021, most significant bit first, from 0: XMODEM's.
constexpr std::array<std::uint16_t, 256> make_table() {
  std::array<std::uint16_t, 256> table{};
  for (unsigned byte = 0; byte < 256; ++byte) {
    unsigned crc = byte << 8;
    for (int bit = 0; bit < 8; ++bit) crc = (crc & 0x8000) != 0 ? (crc << 1) ^ 0x1021 : crc << 1;
    table[byte] = static_cast<std::uint16_t>(crc);
  }
  return table;
}
constexpr auto kTable = make_table();

std::optional<std::uint32_t> number(std::string_view text, std::uint32_t below) {
  std::uint32_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value >= below) return std::nullopt;
  return value;
}

Status odd(std::string_view what) {
  return Status::make(Code::protocol, formatted("CLUSTER SLOTS was answered with {}", what));
}

// [host, port, id, ...] of a node; no port: not to be reached, which is no error.
std::optional<HostPort> node_of(const Reply& reply, std::string_view answered_by) {
  if (reply.kind != Reply::Kind::array || reply.items.size() < 2) return std::nullopt;
  const Reply& host = reply.items[0];
  const Reply& port = reply.items[1];
  if (port.kind != Reply::Kind::integer || port.integer < 1 || port.integer > 0xFFFF) return std::nullopt;
  if (host.text == "?") return std::nullopt;  // cluster-preferred-endpoint-type hostname, and it has none
  return HostPort{host.text.empty() ? std::string(answered_by) : host.text,
                  static_cast<std::uint16_t>(port.integer)};
}

}  // namespace

std::uint16_t crc16(std::string_view bytes) {
  unsigned crc = 0;
  for (const char c : bytes)
    crc = (crc << 8 & 0xFFFF) ^ kTable[(crc >> 8 ^ static_cast<unsigned char>(c)) & 0xFF];
  return static_cast<std::uint16_t>(crc);
}

std::uint16_t hash_slot(std::string_view key) {
  if (const std::size_t open = key.find('{'); open != std::string_view::npos) {
    const std::size_t close = key.find('}', open + 1);
    if (close != std::string_view::npos && close > open + 1) key = key.substr(open + 1, close - open - 1);
  }
  return static_cast<std::uint16_t>(crc16(key) % kSlots);
}

std::optional<Redirect> parse_redirect(std::string_view error, std::string_view answered_by) {
  Redirect out;
  if (error.starts_with("MOVED ")) {
    error.remove_prefix(6);
  } else if (error.starts_with("ASK ")) {
    out.ask = true;
    error.remove_prefix(4);
  } else {
    return std::nullopt;
  }
  const std::size_t space = error.find(' ');
  if (space == std::string_view::npos) return std::nullopt;
  const auto slot = number(error.substr(0, space), kSlots);
  const std::string_view address =
      error.substr(space + 1, error.find_first_of(" \r\n", space + 1) - space - 1);
  const std::size_t colon = address.rfind(':');  // IPv6 addresses stand there without brackets
  if (!slot || colon == std::string_view::npos) return std::nullopt;
  const auto port = number(address.substr(colon + 1), 0x10000);
  const std::string_view host = address.substr(0, colon);
  if (!port || *port == 0 || host == "?") return std::nullopt;
  out.slot = static_cast<std::uint16_t>(*slot);
  out.node = {std::string(host.empty() ? answered_by : host), static_cast<std::uint16_t>(*port)};
  return out;
}

Result<SlotMap> SlotMap::parse(const Reply& reply, std::string_view answered_by) {
  if (reply.kind != Reply::Kind::array) return odd("no list");
  SlotMap map;
  for (const Reply& range : reply.items) {
    if (range.kind != Reply::Kind::array || range.items.size() < 2) return odd("a range without bounds");
    const std::int64_t first = range.items[0].integer;
    const std::int64_t last = range.items[1].integer;
    if (first < 0 || last < first || last >= static_cast<std::int64_t>(kSlots))
      return odd(formatted("the slots {} to {}", first, last));
    for (std::size_t i = 2; i < range.items.size(); ++i) {
      const auto node = node_of(range.items[i], answered_by);
      if (!node) continue;
      if (i > 2) {
        map.replicas_.push_back(*node);
        continue;
      }
      for (std::int64_t slot = first; slot <= last; ++slot)
        if (!map.assign(static_cast<std::uint16_t>(slot), *node)) return odd("more than 65,534 nodes");
    }
  }
  if (map.primaries_.empty())
    return Status::make(Code::unavailable, formatted("the node at {} knows no owner of any slot: it is not "
                                                     "(or not yet) part of a cluster",
                                                     answered_by));
  return map;
}

std::size_t SlotMap::index_of(const HostPort& node) {
  const auto found = std::find(primaries_.begin(), primaries_.end(), node);
  if (found != primaries_.end()) return static_cast<std::size_t>(found - primaries_.begin());
  if (primaries_.size() >= kNobody) return kNobody;
  primaries_.push_back(node);
  return primaries_.size() - 1;
}

bool SlotMap::assign(std::uint16_t slot, const HostPort& node) {
  const std::size_t index = index_of(node);
  if (index == kNobody) return false;
  owners_[slot] = static_cast<std::uint16_t>(index);
  return true;
}

bool SlotMap::owns_any(const HostPort& node) const {
  const auto found = std::find(primaries_.begin(), primaries_.end(), node);
  if (found == primaries_.end()) return false;
  const auto index = static_cast<std::uint16_t>(found - primaries_.begin());
  return std::find(owners_.begin(), owners_.end(), index) != owners_.end();
}

}  // namespace ratesync::redis
