#include "ratesync/limits/params.h"

#include <array>
#include <cmath>

#include "ratesync/base/format.h"

namespace ratesync::limits {

namespace {

Status bad(std::string_view field, std::string_view expected, const std::string& received) {
  return Status::make(Code::invalid, formatted("{}: expected {}, got {}", field, expected, received));
}

Status validate_bucket(const Params& p) {
  if (p.rate_per_second == 0 && p.max_concurrent == 0)
    return bad("rate_per_second or max_concurrent", "at least one of the two", "neither");
  if (p.rate_per_second != 0) {
    if (!std::isfinite(p.rate_per_second) || p.rate_per_second <= 0 || p.rate_per_second > kMaxRate)
      return bad("rate_per_second", "a finite number above 0 and at most 1e9",
                 formatted("{}", p.rate_per_second));
    const double horizon = static_cast<double>(p.burst) * p.interval();
    if (horizon > static_cast<double>(kMaxHorizon))
      return bad("rate_per_second", "a rate that refills the burst within 31 years",
                 formatted("{} with burst {}", p.rate_per_second, p.burst));
  }
  if (p.burst < 1 || p.burst > kMaxBurst)
    return bad("burst", "a whole number from 1 to 1000000000", formatted("{}", p.burst));
  return Status::success();
}

Status validate_window(const Params& p) {
  if (p.limit == 0 || p.window == 0)
    return bad(p.limit == 0 ? "limit" : "window_seconds",
               formatted("both limit and window_seconds, which {} needs", to_string(p.algorithm)),
               p.limit != 0 || p.window != 0 ? "only one of them" : "neither");
  if (p.limit < 1 || p.limit > kMaxLimit)
    return bad("limit", "a whole number from 1 to 1000000000", formatted("{}", p.limit));
  if (p.window < kMinWindow || p.window > kMaxWindow || p.window % kMicro != 0)
    return bad("window_seconds", "0.001 to 31622400 seconds, in whole microseconds",
               formatted("{} ns", p.window));
  return Status::success();
}

constexpr std::array<const char*, 4> kAlgorithms = {"token_bucket", "sliding_window", "sliding_counter",
                                                    "fixed_window"};

}  // namespace

const char* to_string(Algorithm algorithm) { return kAlgorithms[static_cast<std::size_t>(algorithm)]; }

bool parse_algorithm(std::string_view name, Algorithm* algorithm) {
  for (std::size_t i = 0; i < kAlgorithms.size(); ++i) {
    if (name != kAlgorithms[i]) continue;
    *algorithm = static_cast<Algorithm>(i);
    return true;
  }
  return false;
}

Status validate(const Params& p) {
  Status status = p.is_window() ? validate_window(p) : validate_bucket(p);
  if (!status.ok()) return status;
  if (p.max_concurrent < 0 || p.max_concurrent > kMaxConcurrent)
    return bad("max_concurrent", "a whole number from 1 to 1000000000", formatted("{}", p.max_concurrent));
  if (p.timing_margin < 0) return bad("timing_margin_ms", "0 or more", formatted("{} ns", p.timing_margin));
  if (p.lease < kSecond / 10 || p.lease > 86'400 * kSecond)
    return bad("lease_seconds", "a number from 0.1 to 86400", formatted("{} ns", p.lease));
  return Status::success();
}

Status validate_cost(const Params& p, std::int64_t cost) {
  if (p.is_window() && cost > p.limit)
    return bad("cost",
               formatted("at most the limit of {} per window, beyond which it can never be granted", p.limit),
               formatted("{}", cost));
  return validate_actual(p, cost);
}

Status validate_actual(const Params& p, std::int64_t cost) {
  if (cost < 1) return bad("cost", "a whole number of at least 1", formatted("{}", cost));
  if (p.is_window()) {
    if (cost > kMaxLimit) return bad("cost", "at most 1000000000", formatted("{}", cost));
  } else if (p.has_rate() && static_cast<double>(cost) * p.interval() > static_cast<double>(kMaxHorizon)) {
    return bad("cost", "a cost that the rate can carry within 31 years", formatted("{}", cost));
  }
  return Status::success();
}

}  // namespace ratesync::limits
