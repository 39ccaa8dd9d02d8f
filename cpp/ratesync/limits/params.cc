#include "ratesync/limits/params.h"

#include <fmt/format.h>

#include <cmath>

namespace ratesync::limits {

namespace {

Status bad(std::string_view field, std::string_view expected, const std::string& received) {
  return Status::make(Code::invalid, fmt::format("{}: expected {}, got {}", field, expected, received));
}

}  // namespace

Status validate(const Params& p) {
  if (!p.has_rate() && !p.has_concurrency() && p.rate_per_second == 0 && p.max_concurrent == 0)
    return bad("rate_per_second or max_concurrent", "at least one of the two", "neither");
  if (p.rate_per_second != 0) {
    if (!std::isfinite(p.rate_per_second) || p.rate_per_second <= 0 || p.rate_per_second > kMaxRate)
      return bad("rate_per_second", "a finite number above 0 and at most 1e9",
                 fmt::format("{}", p.rate_per_second));
    const double horizon = static_cast<double>(p.burst) * p.interval();
    if (horizon > static_cast<double>(kMaxHorizon))
      return bad("rate_per_second", "a rate that refills the burst within 31 years",
                 fmt::format("{} with burst {}", p.rate_per_second, p.burst));
  }
  if (p.burst < 1 || p.burst > kMaxBurst)
    return bad("burst", "a whole number from 1 to 1000000000", fmt::format("{}", p.burst));
  if (p.max_concurrent < 0 || p.max_concurrent > kMaxConcurrent)
    return bad("max_concurrent", "a whole number from 1 to 1000000000", fmt::format("{}", p.max_concurrent));
  if (p.timing_margin < 0) return bad("timing_margin_ms", "0 or more", fmt::format("{} ns", p.timing_margin));
  if (p.lease < kSecond / 10 || p.lease > 86'400 * kSecond)
    return bad("lease_seconds", "a number from 0.1 to 86400", fmt::format("{} ns", p.lease));
  return Status::success();
}

Status validate_cost(const Params& p, std::int64_t cost) {
  if (cost < 1) return bad("cost", "a whole number of at least 1", fmt::format("{}", cost));
  if (p.has_rate() && static_cast<double>(cost) * p.interval() > static_cast<double>(kMaxHorizon))
    return bad("cost", "a cost that the rate can carry within 31 years", fmt::format("{}", cost));
  return Status::success();
}

}  // namespace ratesync::limits
