#include "ratesync/limits/micro_rate.h"

#include <algorithm>
#include <cmath>

namespace ratesync::limits {
namespace {

// As in gcra.cc: this much of a unit forgives the rounding of sums in double precision. SQL and Lua use
// the same number.
constexpr double kNoise = 1e-3;
constexpr double kSpanMax = 4e18;

}  // namespace

MicroRate::MicroRate(const Params& params) {
  if (params.is_window() || params.rate_per_second <= 0) return;
  interval = 1e6 / params.rate_per_second;
  step = span(1);
  burst = params.burst;
  burst_span = span(params.burst);
  margin = std::min<std::int64_t>(params.timing_margin / kMicro, static_cast<std::int64_t>(interval));
}

std::int64_t MicroRate::span(std::int64_t units) const {
  return static_cast<std::int64_t>(
      std::min(std::max(0.0, std::ceil(static_cast<double>(units) * interval - kNoise)), kSpanMax));
}

std::int64_t MicroRate::available(std::int64_t ahead) const {
  const std::int64_t room = burst_span - ahead;
  if (room <= 0 || interval <= 0) return 0;
  const double units = (static_cast<double>(room) + kNoise) / interval;
  return units >= static_cast<double>(burst) ? burst : static_cast<std::int64_t>(units + 1e-9);
}

}  // namespace ratesync::limits
