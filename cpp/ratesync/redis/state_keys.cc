#include "ratesync/redis/state_keys.h"

#include <utility>
#include <vector>

#include "ratesync/base/format.h"

namespace ratesync::redis {
namespace {

using store::Space;

constexpr std::size_t kLongestPrefix = 40;

// ':' ends a part, '%' begins an escape.
void append_escaped(std::string& out, std::string_view part) {
  for (const char c : part) {
    if (c == ':')
      out += "%3A";
    else if (c == '%')
      out += "%25";
    else
      out += c;
  }
}

std::optional<std::string> unescaped(std::string_view text) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '%') {
      out += text[i];
      continue;
    }
    const std::string_view code = text.substr(i + 1, 2);
    i += 2;
    if (code == "3A")
      out += ':';
    else if (code == "25")
      out += '%';
    else
      return std::nullopt;
  }
  return out;
}

std::string space_part(const Space& space) {
  std::string out = ":";
  append_escaped(out, space.name_space);
  out += ':';
  append_escaped(out, space.tenant);
  return out;
}

std::string glob_quoted(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (c == '*' || c == '?' || c == '[' || c == ']' || c == '\\') out += '\\';
    out += c;
  }
  return out;
}

// The escaped parts before `name`, which is the rest: two of a space, and that of a kind.
std::optional<StateKeys::LockName> split_space(std::string_view text) {
  const std::size_t first = text.find(':');
  if (first == std::string_view::npos) return std::nullopt;
  const std::size_t second = text.find(':', first + 1);
  if (second == std::string_view::npos) return std::nullopt;
  auto name_space = unescaped(text.substr(0, first));
  auto tenant = unescaped(text.substr(first + 1, second - first - 1));
  if (!name_space || !tenant) return std::nullopt;
  return StateKeys::LockName{{std::move(*name_space), std::move(*tenant)},
                             std::string(text.substr(second + 1))};
}

}  // namespace

StateKeys::StateKeys(std::string prefix, std::string hash_tag)
    : prefix_(std::move(prefix)), hash_tag_(std::move(hash_tag)), tagged_(!hash_tag_.empty()) {}

Status StateKeys::check(const std::string& prefix) {
  if (prefix.size() <= kLongestPrefix &&
      prefix.find_first_of(std::string_view("{}\0", 3)) == std::string::npos)
    return Status::success();
  return Status::make(Code::invalid,
                      formatted("prefix: expected at most {} bytes without {{, }} and NUL, got \"{}\"",
                                kLongestPrefix, prefix));
}

std::string StateKeys::tag(std::uint32_t shard) const {
  return ":{" + (tagged_ ? hash_tag_ : std::to_string(shard)) + "}";
}

std::string StateKeys::shard(std::string_view what, std::uint32_t shard) const {
  std::string out = prefix_;
  out += what;
  return out += tag(shard);
}

std::string StateKeys::of_space(std::string_view what, std::uint32_t number, const Space& space) const {
  return shard(what, number) + space_part(space);
}

std::string StateKeys::row(std::uint32_t number, const Space& space, std::string_view kind,
                           std::string_view key) const {
  std::string out;
  out.reserve(prefix_.size() + space.name_space.size() + space.tenant.size() + kind.size() + key.size() + 32);
  out += prefix_;
  out += "state:{";
  if (tagged_)
    out += hash_tag_;
  else
    out += std::to_string(number);
  out += "}:";
  append_escaped(out, space.name_space);
  out += ':';
  append_escaped(out, space.tenant);
  out += ':';
  append_escaped(out, kind);
  out += ':';
  return out += key;
}

std::string StateKeys::lock(std::uint32_t number, const Space& space, std::string_view name) const {
  std::string out = of_space("locks", number, space);
  out += ':';
  return out += name;
}

std::string StateKeys::member(std::string_view kind, std::string_view key) {
  std::string out;
  append_escaped(out, kind);
  out += ':';
  return out += key;
}

std::optional<StateKeys::Member> StateKeys::parse_member(std::string_view member) {
  const std::size_t colon = member.find(':');
  if (colon == std::string_view::npos) return std::nullopt;
  auto kind = unescaped(member.substr(0, colon));
  if (!kind) return std::nullopt;
  return Member{std::move(*kind), std::string(member.substr(colon + 1))};
}

std::string StateKeys::rows_pattern(const Space& space, std::string_view kind, std::string_view begin) const {
  std::string parts = space_part(space) + ':';
  append_escaped(parts, kind);
  parts += ':';
  parts += begin;
  return glob_quoted(prefix_ + "state:{") + (tagged_ ? glob_quoted(hash_tag_) : "*") + '}' +
         glob_quoted(parts) + '*';
}

std::optional<std::string_view> StateKeys::after_tag(std::string_view name, std::string_view what) const {
  const std::string head = prefix_ + std::string(what) + ":{";
  if (!name.starts_with(head)) return std::nullopt;
  name.remove_prefix(head.size());
  const std::size_t end = name.find('}');
  if (end == std::string_view::npos || end + 1 >= name.size() || name[end + 1] != ':') return std::nullopt;
  if (tagged_ ? name.substr(0, end) != hash_tag_
              : name.substr(0, end).find_first_not_of("0123456789") != std::string_view::npos)
    return std::nullopt;
  return name.substr(end + 2);
}

std::optional<std::string> StateKeys::key_of(std::string_view row, const Space& space,
                                             std::string_view kind) const {
  const auto parts = after_tag(row, "state");
  if (!parts) return std::nullopt;
  std::string head = space_part(space).substr(1) + ':';
  append_escaped(head, kind);
  head += ':';
  if (!parts->starts_with(head)) return std::nullopt;
  return std::string(parts->substr(head.size()));
}

std::string StateKeys::locks_pattern(const Space* space) const {
  return glob_quoted(prefix_ + "locks:{") + (tagged_ ? glob_quoted(hash_tag_) : "*") + "}" +
         (space ? glob_quoted(space_part(*space)) : "") + ":*";
}

std::optional<StateKeys::LockName> StateKeys::parse_lock(std::string_view lock) const {
  const auto parts = after_tag(lock, "locks");
  if (!parts) return std::nullopt;
  return split_space(*parts);
}

std::string freed_message(const Space& space, std::string_view name) {
  std::string out = space_part(space).substr(1) + ':';
  return out += name;
}

std::optional<StateKeys::LockName> parse_freed(std::string_view message) { return split_space(message); }

}  // namespace ratesync::redis
