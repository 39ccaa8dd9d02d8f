#include "ratesync/limits/gcra.h"

#include <algorithm>
#include <cmath>

namespace ratesync::limits {

namespace {

// Spans are summed in double precision; this much of a unit forgives its rounding noise, so that
// 3 units at 300/s take exactly 10 ms and not one tick more.
constexpr double kNoise = 1e-3;
constexpr double kSpanMax = 4e18;

Nanos margin_of(const Params& p) {
  return std::min<Nanos>(p.timing_margin, static_cast<Nanos>(p.interval()));
}

Nanos slot_wait(const Params& p, Nanos base, Nanos now, std::int64_t units) {
  return std::max<Nanos>(0, base + span(p, units) - span(p, p.burst) - now);
}

}  // namespace

Nanos span(const Params& p, std::int64_t units) {
  const double exact = static_cast<double>(units) * p.interval();
  return static_cast<Nanos>(std::min(std::ceil(exact - kNoise), kSpanMax));
}

Pace pace_of(const Params& p) {
  if (p.is_window() || !p.has_rate()) return {};  // no margin either
  return {span(p, 1), span(p, p.burst), margin_of(p)};
}

Deal deal(const Params& p, Nanos tat, Nanos now, std::int64_t n, std::int64_t cost, Nanos max_wait) {
  const Nanos base = std::max(tat, now);
  const Nanos margin = margin_of(p);
  Deal out;
  out.tat = tat;
  // How far TAT may move: the last granted slot lies at most max_wait + margin ahead.
  const Nanos patience = saturating_add(max_wait, margin);
  if (patience >= kForever / 2) {
    out.granted = n;
  } else {
    const Nanos room = patience + now + span(p, p.burst) - base;
    if (room > 0) {
      const double units = static_cast<double>(room) / p.interval() / static_cast<double>(cost);
      out.granted = std::min<std::int64_t>(n, static_cast<std::int64_t>(units) + 1);
      while (out.granted > 0 && span(p, out.granted * cost) > room) --out.granted;
    }
  }
  if (out.granted > 0) {
    out.tat = base + span(p, out.granted * cost);
    out.first_wait = wait_of(p, tat, now, cost, 0);
  }
  if (out.granted < n) {
    const Nanos wait = slot_wait(p, std::max(out.tat, now), now, cost);
    out.retry_after = wait > margin ? wait - margin : 0;
  }
  return out;
}

Nanos wait_of(const Params& p, Nanos tat_before, Nanos now, std::int64_t cost, std::int64_t i) {
  const Nanos wait = slot_wait(p, std::max(tat_before, now), now, (i + 1) * cost);
  return wait <= margin_of(p) ? 0 : wait;
}

std::int64_t available(const Params& p, Nanos tat, Nanos now) {
  const Nanos room = now + span(p, p.burst) - std::max(tat, now);
  if (room <= 0) return 0;
  const double units = (static_cast<double>(room) + kNoise) / p.interval();
  return std::min<std::int64_t>(p.burst, static_cast<std::int64_t>(units + 1e-9));
}

}  // namespace ratesync::limits
