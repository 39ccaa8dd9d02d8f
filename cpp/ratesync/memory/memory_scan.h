// Scans under way: the keys that a scan saw when it began, in order.
//
// Tables have no order, so the first page of a scan collects the keys of its kind and sorts them; later pages
// walk that list and look each key up. The list is only a short cut: a cursor holds the last key, too, and
// where the list was dropped meanwhile (few are kept) the next page makes a new one from there.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace ratesync::memory {

struct KeyList {
  std::uint64_t id = 0;
  std::uint32_t family = 0;
  std::string prefix;
  std::vector<std::string> keys;  // ascending by bytes
};

struct Cursor {
  std::uint64_t list = 0;
  std::string last;

  [[nodiscard]] std::string text() const { return std::to_string(list) + ":" + last; }
  static std::optional<Cursor> parse(std::string_view text);
};

class Scans {
 public:
  // Null: dropped, or not of this scan.
  std::shared_ptr<const KeyList> find(std::uint64_t id, std::uint32_t family, std::string_view prefix);
  // Gives the list its id.
  void keep(std::shared_ptr<KeyList> list);
  void drop(std::uint64_t id);

 private:
  static constexpr std::size_t kLists = 8;  // kept; the least recently used goes first
  std::mutex mutex_;                        // guards the rest
  std::list<std::shared_ptr<const KeyList>> lists_;
  std::uint64_t next_ = 1;
};

}  // namespace ratesync::memory
