// The arithmetic of the token bucket, against a slow and obvious model.
#include "ratesync/limits/gcra.h"

#include <gtest/gtest.h>

#include <random>

using namespace ratesync;
using namespace ratesync::limits;

namespace {

Params params(double rate, std::int64_t burst = 1, Nanos margin = 0) {
  Params p;
  p.rate_per_second = rate;
  p.burst = burst;
  p.timing_margin = margin;
  return p;
}

}  // namespace

TEST(Gcra, AnIdleLimiterGrantsItsBurstAtOnceAndThenSpacesEvenly) {
  const Params p = params(10, 3);
  const Nanos now = 5 * kSecond;
  const Deal d = deal(p, 0, now, 6, 1, kForever);
  EXPECT_EQ(d.granted, 6);
  EXPECT_EQ(d.tat, now + 600 * kMilli);
  const std::vector<Nanos> waits{0, 0, 0, 100 * kMilli, 200 * kMilli, 300 * kMilli};
  for (std::int64_t i = 0; i < 6; ++i) EXPECT_EQ(wait_of(p, 0, now, 1, i), waits[i]);
}

TEST(Gcra, ASlotBeyondTheDeadlineIsRefusedAndChargesNothing) {
  const Params p = params(10);
  const Deal d = deal(p, 100 * kMilli, 0, 1, 1, 99 * kMilli);
  EXPECT_EQ(d.granted, 0);
  EXPECT_EQ(d.tat, 100 * kMilli);
  EXPECT_EQ(d.retry_after, 100 * kMilli);
}

TEST(Gcra, PartOfARunIsGrantedUpToTheDeadline) {
  const Deal d = deal(params(100), 0, 0, 1000, 1, 95 * kMilli);
  EXPECT_EQ(d.granted, 10);  // slots at 0, 10, ... 90 ms
  EXPECT_EQ(d.retry_after, 100 * kMilli);
}

TEST(Gcra, ACostAboveTheBurstWaitsForTheMissingUnits) {
  const Params p = params(1, 1);
  const Deal d = deal(p, 0, 10 * kSecond, 1, 3, kForever);
  EXPECT_EQ(d.granted, 1);
  EXPECT_EQ(d.first_wait, 2 * kSecond);
  EXPECT_EQ(deal(p, 0, 10 * kSecond, 1, 3, 0).granted, 0);
}

TEST(Gcra, TheMarginForgivesEarlinessButNeverRaisesTheLongRunRate) {
  // The default margin of 10 ms is the whole interval at 100/s: a limiter that compared
  // "elapsed >= interval - margin" would not limit at all.
  const Params p = params(100, 1, 10 * kMilli);
  Nanos tat = 0;
  std::int64_t granted = 0;
  for (Nanos now = kSecond; now < 2 * kSecond; now += kMilli / 10) {
    const Deal d = deal(p, tat, now, 1, 1, 0);
    tat = d.tat;
    granted += d.granted;
  }
  EXPECT_GE(granted, 100);
  EXPECT_LE(granted, 102);
}

TEST(Gcra, AvailableCountsWholeUnitsWithoutCharging) {
  const Params p = params(10, 5);
  EXPECT_EQ(available(p, 0, kSecond), 5);
  const Deal d = deal(p, 0, kSecond, 3, 1, 0);
  EXPECT_EQ(available(p, d.tat, kSecond), 2);
  EXPECT_EQ(available(p, d.tat, kSecond + 100 * kMilli), 3);
}

TEST(Gcra, NoIntervalEverCarriesMoreThanRateTimesSpanPlusBurst) {
  std::mt19937_64 random(20261121);
  for (int round = 0; round < 200; ++round) {
    const double rate = std::exp(std::uniform_real_distribution<>(-3, 12)(random));
    const std::int64_t burst = 1 + static_cast<std::int64_t>(random() % 20);
    const Nanos margin = static_cast<Nanos>(random() % (20 * kMilli));
    const Params p = params(rate, burst, margin);
    const double interval = p.interval();
    const double forgiven = std::min<double>(margin, interval);
    Nanos tat = 0;
    Nanos now = kSecond;
    std::vector<std::pair<Nanos, std::int64_t>> grants;  // slot, units
    for (int i = 0; i < 200; ++i) {
      now += static_cast<Nanos>(std::uniform_real_distribution<>(0, 3 * interval)(random));
      const std::int64_t cost = 1 + static_cast<std::int64_t>(random() % burst);
      const std::int64_t n = 1 + static_cast<std::int64_t>(random() % 4);
      const Nanos patience =
          random() % 2 ? 0 : static_cast<Nanos>(random() % static_cast<Nanos>(5 * interval + 1));
      const Deal d = deal(p, tat, now, n, cost, patience);
      for (std::int64_t k = 0; k < d.granted; ++k)
        grants.emplace_back(now + wait_of(p, tat, now, cost, k), cost);
      if (d.granted < n) {
        EXPECT_EQ(deal(p, d.tat, now, 1, cost, patience).granted, 0);
      }
      tat = d.tat;
    }
    for (std::size_t from = 0; from < grants.size(); ++from) {
      double units = 0;
      for (std::size_t to = from; to < grants.size(); ++to) {
        units += static_cast<double>(grants[to].second);
        const double span_ns = static_cast<double>(grants[to].first - grants[from].first);
        ASSERT_LE(units, (span_ns + forgiven) / interval + static_cast<double>(burst) + 1e-3)
            << "rate " << rate << " burst " << burst;
      }
    }
  }
}

TEST(Gcra, HugeCountsSaturateInsteadOfOverflowing) {
  const Deal d = deal(params(1e-8), 0, kSecond, 1'000'000, 1'000, kForever);
  EXPECT_GT(d.tat, 0);
}

TEST(Params, RangesAreCheckedInWords) {
  EXPECT_TRUE(validate(params(1e9)).ok());
  for (const double rate : {-1.0, 1.1e9, std::numeric_limits<double>::infinity(), std::nan("")})
    EXPECT_EQ(validate(params(rate)).code, Code::invalid) << rate;
  EXPECT_EQ(validate(params(1, 0)).code, Code::invalid);
  EXPECT_EQ(validate(Params{}).code, Code::invalid);
  EXPECT_EQ(validate_cost(params(1), 0).code, Code::invalid);
}
