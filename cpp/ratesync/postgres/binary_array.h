// Arrays in PostgreSQL's binary format, as parameters: no quoting, no digits. One dimension from 1.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "ratesync/postgres/connection.h"

namespace ratesync::postgres {

class BinaryArray {
 public:
  // Numbers of the built-in types; fixed for ever.
  enum class Type : std::uint32_t { boolean = 16, bytea = 17, int8 = 20, int2 = 21, int4 = 23, text = 25 };

  explicit BinaryArray(Type type);
  void reserve(std::size_t elements, std::size_t bytes);
  void add(std::int64_t value);  // of the width of the type
  void add(std::string_view bytes);
  void add_null();
  [[nodiscard]] std::size_t size() const { return size_; }
  Param take();

 private:
  void put(std::uint64_t value, int bytes);

  const int width_;
  bool nulls_ = false;
  std::uint32_t size_ = 0;
  std::string bytes_;
};

}  // namespace ratesync::postgres
