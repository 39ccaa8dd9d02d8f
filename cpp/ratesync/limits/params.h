// What one limiter promises: parsed, validated, immutable. Shared by every store.
#pragma once

#include <cstdint>
#include <string>

#include "ratesync/base/clock.h"
#include "ratesync/base/status.h"

namespace ratesync::limits {

inline constexpr double kMaxRate = 1e9;                          // one per nanosecond
inline constexpr Nanos kMaxHorizon = 1'000'000'000LL * kSecond;  // about 31 years
inline constexpr std::int64_t kMaxBurst = 1'000'000'000;
inline constexpr std::int64_t kMaxConcurrent = 1'000'000'000;

struct Params {
  double rate_per_second = 0;         // 0: no rate limit
  std::int64_t burst = 1;             // units that may be taken at once after idling; >= 1
  std::int64_t max_concurrent = 0;    // 0: no concurrency limit
  Nanos timing_margin = 10 * kMilli;  // forgiven earliness; never more than one interval is used
  Nanos lease = 30 * kSecond;         // a holder that does not renew for this long lost its slots

  [[nodiscard]] bool has_rate() const { return rate_per_second > 0; }
  [[nodiscard]] bool has_concurrency() const { return max_concurrent > 0; }
  // Nanoseconds between two units at the configured rate.
  [[nodiscard]] double interval() const { return 1e9 / rate_per_second; }
};

// Checks ranges. The message names the field, what was expected and what came.
Status validate(const Params& params);

// Checks a cost against the params: at least 1, and not further ahead than kMaxHorizon.
Status validate_cost(const Params& params, std::int64_t cost);

}  // namespace ratesync::limits
