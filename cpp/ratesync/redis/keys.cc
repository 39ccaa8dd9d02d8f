#include "ratesync/redis/keys.h"

#include <utility>

namespace ratesync::redis {
namespace {

constexpr std::string_view kKinds = "tfcws";

bool is_special(char c) { return c == '{' || c == '}' || c == '%'; }

std::string escaped(std::string_view id) {
  static constexpr char kHex[] = "0123456789ABCDEF";
  std::string out;
  out.reserve(id.size());
  for (const char c : id) {
    if (!is_special(c)) {
      out += c;
      continue;
    }
    out += '%';
    out += kHex[static_cast<unsigned char>(c) >> 4];
    out += kHex[static_cast<unsigned char>(c) & 15];
  }
  return out;
}

std::optional<std::string> unescaped(std::string_view text) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '%') {
      if (is_special(text[i])) return std::nullopt;
      out += text[i];
      continue;
    }
    const std::string_view code = text.substr(i + 1, 2);
    i += 2;
    if (code == "7B")
      out += '{';
    else if (code == "7D")
      out += '}';
    else if (code == "25")
      out += '%';
    else
      return std::nullopt;
  }
  return out;
}

// For a glob pattern.
std::string quoted(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (c == '*' || c == '?' || c == '[' || c == ']' || c == '\\') out += '\\';
    out += c;
  }
  return out;
}

}  // namespace

char kind_of(limits::Algorithm algorithm) {
  switch (algorithm) {
    case limits::Algorithm::token_bucket: return 't';
    case limits::Algorithm::fixed_window: return 'f';
    case limits::Algorithm::sliding_counter: return 'c';
    case limits::Algorithm::sliding_window: return 'w';
  }
  return 't';
}

Keys::Keys(std::string prefix, std::string hash_tag)
    : prefix_(std::move(prefix)),
      tagged_(!hash_tag.empty()),
      head_(tagged_ ? prefix_ + ":{" + hash_tag + "}:" : prefix_ + ":{"),
      tail_(tagged_ ? ":" : "}:") {}

std::string Keys::of(std::string_view id, char kind) const {
  std::string out = head_;
  out += escaped(id);
  out += tail_;
  out += kind;
  return out;
}

std::string Keys::rate(std::string_view id, limits::Algorithm algorithm) const {
  return of(id, kind_of(algorithm));
}

std::string Keys::pattern() const { return quoted(head_) + '*' + quoted(tail_) + "[tfcws]"; }

std::optional<Keys::Named> Keys::parse(std::string_view key) const {
  if (key.size() < head_.size() + tail_.size() + 2 || !key.starts_with(head_)) return std::nullopt;
  const char kind = key.back();
  key.remove_suffix(1);
  if (kKinds.find(kind) == std::string_view::npos || !key.ends_with(tail_)) return std::nullopt;
  key.remove_suffix(tail_.size());
  auto id = unescaped(key.substr(head_.size()));
  if (!id) return std::nullopt;
  return Named{std::move(*id), kind};
}

}  // namespace ratesync::redis
