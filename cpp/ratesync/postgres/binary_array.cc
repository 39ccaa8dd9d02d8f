#include "ratesync/postgres/binary_array.h"

namespace ratesync::postgres {
namespace {

int width_of(BinaryArray::Type type) {
  using Type = BinaryArray::Type;
  switch (type) {
    case Type::boolean: return 1;
    case Type::int2: return 2;
    case Type::int4: return 4;
    case Type::int8: return 8;
    case Type::bytea:
    case Type::text: break;
  }
  return 0;
}

// Dimensions, whether NULLs are among them, type; then size and lower bound of the dimension.
constexpr std::size_t kNullsAt = 4, kSizeAt = 12;

void store_at(std::string& bytes, std::size_t at, std::uint32_t value) {
  for (int shift = 24; shift >= 0; shift -= 8) bytes[at++] = static_cast<char>(value >> shift);
}

}  // namespace

BinaryArray::BinaryArray(Type type) : width_(width_of(type)) {
  put(1, 4);
  put(0, 4);
  put(static_cast<std::uint32_t>(type), 4);
  put(0, 4);
  put(1, 4);
}

void BinaryArray::reserve(std::size_t elements, std::size_t bytes) {
  bytes_.reserve(bytes_.size() + bytes + elements * static_cast<std::size_t>(4 + width_));
}

void BinaryArray::put(std::uint64_t value, int bytes) {
  for (int shift = 8 * (bytes - 1); shift >= 0; shift -= 8) bytes_ += static_cast<char>(value >> shift);
}

void BinaryArray::add(std::int64_t value) {
  put(static_cast<std::uint32_t>(width_), 4);
  put(static_cast<std::uint64_t>(value), width_);
  ++size_;
}

void BinaryArray::add(std::string_view bytes) {
  put(bytes.size(), 4);
  bytes_ += bytes;
  ++size_;
}

void BinaryArray::add_null() {
  put(0xFFFFFFFFu, 4);
  nulls_ = true;
  ++size_;
}

Param BinaryArray::take() {
  store_at(bytes_, kNullsAt, nulls_ ? 1 : 0);
  store_at(bytes_, kSizeAt, size_);
  return Param::bytes(std::move(bytes_));
}

}  // namespace ratesync::postgres
