// Generic Cell Rate Algorithm (ITU-T I.371), the token bucket that needs one number of state.
//
// The state is TAT, the theoretical arrival time of the next unit. A request of cost c at `now`
// becomes possible at  slot = max(now, max(tat, now) + c*T - burst*T)  and moves TAT to
// max(tat, now) + c*T, where T is the interval between two units. Over any span L at most
// rate*(L + margin) + burst units pass. Pure arithmetic: `now` is a parameter. Times are integers
// in units of 1/units_per_second seconds (ns for memory, us for PostgreSQL) so that SQL can do the
// same sums; tests/vectors/gcra.json pins both.
#pragma once

#include <cstdint>

#include "ratesync/limits/params.h"

namespace ratesync::limits {

// What the hot path needs of Params, computed once per limiter: three spans instead of divisions.
// All zero where there is no token bucket.
struct Pace {
  Nanos unit = 0;    // of one unit
  Nanos burst = 0;   // of the burst
  Nanos margin = 0;  // in force: never more than one interval
};
Pace pace_of(const Params& params);

struct Deal {
  std::int64_t granted = 0;  // requests granted, from the front
  Nanos tat = 0;             // new state; equal to the old one when granted == 0
  Nanos first_wait = 0;      // how long the first granted request has to sleep
  Nanos retry_after = 0;     // how long until the first refused request could have its slot
};

// The span that `units` occupy at the params' rate, rounded up to whole nanoseconds.
Nanos span(const Params& params, std::int64_t units);

// Deals up to n requests of cost c each, in order, whose slots lie at most max_wait ahead.
// Request i (0-based) of the granted ones sleeps wait_of(params, deal, cost, i).
Deal deal(const Params& params, Nanos tat, Nanos now, std::int64_t n, std::int64_t cost, Nanos max_wait);

// The sleep of the i-th granted request (0-based), counted from `now`, given the TAT that was in
// force before the deal.
Nanos wait_of(const Params& params, Nanos tat_before, Nanos now, std::int64_t cost, std::int64_t i);

// Units that could be taken at `now` without waiting.
std::int64_t available(const Params& params, Nanos tat, Nanos now);

// deal() for one request that is not willing to wait, in a form the compiler can inline. Returns
// how long it would have to wait (0: granted, *tat moved).
inline Nanos take_now(const Params& params, const Pace& pace, Nanos* tat, Nanos now, std::int64_t cost) {
  const Nanos base = *tat > now ? *tat : now;
  const Nanos moved = base + (cost == 1 ? pace.unit : span(params, cost));
  const Nanos wait = moved - pace.burst - now;
  if (wait > pace.margin) return wait - pace.margin;
  *tat = moved;
  return 0;
}

}  // namespace ratesync::limits
