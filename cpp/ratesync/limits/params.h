// What one limiter promises: parsed, validated, immutable. Shared by every store.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "ratesync/base/clock.h"
#include "ratesync/base/status.h"

namespace ratesync::limits {

inline constexpr double kMaxRate = 1e9;                          // one per nanosecond
inline constexpr Nanos kMaxHorizon = 1'000'000'000LL * kSecond;  // about 31 years
inline constexpr std::int64_t kMaxBurst = 1'000'000'000;
inline constexpr std::int64_t kMaxConcurrent = 1'000'000'000;
inline constexpr std::int64_t kMaxLimit = 1'000'000'000;
inline constexpr Nanos kMinWindow = kMilli;
inline constexpr Nanos kMaxWindow = 366LL * 86'400 * kSecond;

// How units are spaced. The windows are described in limits/window.h; they ignore rate and burst.
enum class Algorithm {
  token_bucket,     // GCRA: rate_per_second and burst; limit and window are ignored
  sliding_window,   // at most `limit` units in any `window`: exact log
  sliding_counter,  // the same, estimated from two counters
  fixed_window,     // at most `limit` units per calendar window
};

struct Params {
  Algorithm algorithm = Algorithm::token_bucket;
  double rate_per_second = 0;         // token_bucket: units per second; 0: no rate limit
  std::int64_t burst = 1;             // token_bucket: units that may be taken at once after idling; >= 1
  std::int64_t limit = 0;             // windows: units per window
  Nanos window = 0;                   // windows: their length, whole microseconds
  std::int64_t max_concurrent = 0;    // 0: no concurrency limit
  Nanos timing_margin = 10 * kMilli;  // forgiven earliness; never more than one interval is used
  Nanos lease = 30 * kSecond;         // a holder that does not renew for this long lost its slots

  [[nodiscard]] bool is_window() const { return algorithm != Algorithm::token_bucket; }
  // Whether an acquisition consumes units, in whatever way.
  [[nodiscard]] bool has_rate() const { return is_window() || rate_per_second > 0; }
  [[nodiscard]] bool has_concurrency() const { return max_concurrent > 0; }
  // token_bucket: nanoseconds between two units at the configured rate.
  [[nodiscard]] double interval() const { return 1e9 / rate_per_second; }
};

// Checks ranges. The message names the field, what was expected and what came.
Status validate(const Params& params);

// The algorithm's name in configuration, and back; nullptr / false where there is none.
const char* to_string(Algorithm algorithm);
bool parse_algorithm(std::string_view name, Algorithm* algorithm);

// Checks a cost against the params: at least 1, and not further ahead than kMaxHorizon; for a window,
// at most its limit, since a larger one could never be granted.
Status validate_cost(const Params& params, std::int64_t cost);
// The same for what settle() says was used in truth: a window may then have carried more than its limit.
Status validate_actual(const Params& params, std::int64_t cost);

}  // namespace ratesync::limits
