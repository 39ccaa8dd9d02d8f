// Names of operations: stored with what they wrote, so that after a lost answer a store can tell whose it
// was.
#pragma once

#include <cstdint>

namespace ratesync::engine {

// Above 0 and never given twice: neither by this process, nor by one forked from it, nor (63 bits of the
// system's randomness) by another one. Any thread.
std::int64_t next_op_id();

}  // namespace ratesync::engine
