// How long a refusal for a passing reason (`is_transient`) is answered by asking again, and after which
// pauses. I/O thread only.
//
// Not a number of attempts: under REPEATABLE READ or SERIALIZABLE, which a pooler may force on us, whoever
// waits for a row that is written all the time is refused each time, and only luck ends it. Somebody else
// wins each time meanwhile. Callers with less time have their own deadlines.
#pragma once

#include <algorithm>
#include <string_view>

#include "ratesync/base/clock.h"

namespace ratesync::postgres {

class Patience {
 public:
  // Refused once more: false when that has gone on for too long.
  bool lasts(std::string_view sqlstate, Nanos now) {
    if (refusals_++ == 0) since_ = now;
    // Each attempt takes its time: who sets lock_timeout wants to know soon.
    const bool lock_timeout = sqlstate == "55P03";
    return now - since_ < (lock_timeout ? kSecond : 20 * kSecond);
  }
  void renew() { refusals_ = 0; }  // something was answered
  [[nodiscard]] unsigned refusals() const { return refusals_; }

 private:
  unsigned refusals_ = 0;  // in a row
  Nanos since_ = 0;        // the first of them
};

// Before the next attempt: up to 2 ms after the first refusal, then up to twice as long each time, up to 64
// ms; half of it is chance.
template <class Random>
Nanos pause_after(unsigned refusals, Random& random) {
  const Nanos most = kMilli << std::min(refusals, 6U);
  return most / 2 + static_cast<Nanos>(random() % static_cast<unsigned>(most / 2));
}

}  // namespace ratesync::postgres
