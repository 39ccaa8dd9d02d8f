// The sums of limits/gcra.h in whole microseconds, as servers do them in SQL and Lua: what a process
// needs to ask them and to deal their answers.
#pragma once

#include <cstdint>

#include "ratesync/limits/params.h"

namespace ratesync::limits {

struct MicroRate {
  explicit MicroRate(const Params& params);  // of a token bucket; else: no rate
  // That many units at this rate, rounded up.
  [[nodiscard]] std::int64_t span(std::int64_t units) const;
  // Units to be had at once when TAT lies `ahead` of now.
  [[nodiscard]] std::int64_t available(std::int64_t ahead) const;

  double interval = 0;  // us per unit; 0: no rate
  std::int64_t step = 0;
  std::int64_t burst = 0;       // units
  std::int64_t burst_span = 0;  // us
  std::int64_t margin = 0;      // us
};

}  // namespace ratesync::limits
