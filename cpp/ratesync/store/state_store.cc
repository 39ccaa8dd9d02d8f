#include "ratesync/store/state_store.h"

namespace ratesync::store {

// FNV-1a over the parts, each with its length before it. Stored with the rows: never change it.
std::uint32_t bucket_of(const Space& space, const std::string& kind, const std::string& key) {
  std::uint64_t hash = 0xcbf29ce484222325ull;
  const auto mix = [&hash](unsigned char byte) { hash = (hash ^ byte) * 0x100000001b3ull; };
  for (const std::string* part : {&space.name_space, &space.tenant, &kind, &key}) {
    for (int shift = 0; shift < 32; shift += 8) mix(static_cast<unsigned char>(part->size() >> shift));
    for (const char ch : *part) mix(static_cast<unsigned char>(ch));
  }
  return static_cast<std::uint32_t>((hash ^ (hash >> 32)) % kBuckets);
}

}  // namespace ratesync::store
