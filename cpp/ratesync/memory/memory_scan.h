// Scans under way: the keys that a scan saw when it began, in order.
//
// Tables have no order, so the first page of a scan collects the lowest keys of its kind and sorts them;
// later pages walk that list and look each key up. The list is only a short cut: a cursor holds the last key,
// too, and where the list was walked to its end, or dropped meanwhile, the next page makes a new one from
// there. A list holds at most 65,536 keys or an eighth of the rows, and few are kept: that bounds what
// abandoned scans leave, and the time that one page takes.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "ratesync/memory/memory_rows.h"

namespace ratesync::memory {

struct KeyList {
  std::uint64_t id = 0;
  FamilyRef family;
  std::string prefix;
  std::vector<std::string> keys;  // ascending by bytes
  bool more = false;              // there were higher ones
};

// Takes keys in any order and keeps the `most` lowest.
class LowestKeys {
 public:
  LowestKeys(KeyList& list, std::size_t most) : list_(list), most_(most) {}
  void add(std::string_view key) {
    if (list_.more && key > list_.keys[most_ - 1]) return;
    list_.keys.emplace_back(key);
    if (list_.keys.size() == 2 * most_) cut();
  }
  void sort();

 private:
  // Leaves the lowest, the last of them at its place.
  void cut();

  KeyList& list_;
  const std::size_t most_;
};

struct Cursor {
  std::uint64_t list = 0;
  std::string last;

  [[nodiscard]] std::string text() const { return std::to_string(list) + ":" + last; }
  static std::optional<Cursor> parse(std::string_view text);
};

class Scans {
 public:
  static constexpr std::size_t kKeys = 65'536;  // of one list, at least
  // Null: dropped, or not of this scan.
  std::shared_ptr<const KeyList> find(std::uint64_t id, const Family& family, std::string_view prefix);
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
