// The arithmetic of the windows: against the vector file that SQL and Lua are held against too, and
// against what windows promise.
#include "ratesync/limits/window.h"

#include <gtest/gtest.h>

#include <deque>
#include <random>

#include "json.h"

namespace ratesync::limits {
namespace {

constexpr std::int64_t kStart = 1'763'700'000LL * kSecond;
constexpr Algorithm kWindows[] = {Algorithm::fixed_window, Algorithm::sliding_counter,
                                  Algorithm::sliding_window};

Params window(Algorithm algorithm, std::int64_t limit, Nanos length) {
  Params p;
  p.algorithm = algorithm;
  p.limit = limit;
  p.window = length;
  return p;
}

void play(const testing::Json& step, WindowState* state) {
  const std::int64_t now = step["now"].number;
  const Quota quota{step["limit"].number, step["window"].number};
  const testing::Json& expect = step["expect"];
  const std::string& op = step["op"].text;
  if (op == "acquire") {
    const WindowDeal deal = state->take(quota, now, step["cost"].number, step["max_wait"].number);
    EXPECT_EQ(deal.granted, expect["granted"].number != 0);
    EXPECT_EQ(deal.wait, expect["wait"].number + expect["retry_after"].number);
  } else if (op == "peek") {
    EXPECT_EQ(state->wait_of(quota, now, 1), expect["retry_after"].number);
  } else if (op == "settle") {
    state->settle(quota, now, step["delta"].number);
  } else if (op == "refund") {
    state->refund(quota, step["cost"].number, step["stamp"].number);
  } else {
    FAIL() << "unknown op " << op;
  }
  if (expect.has("stamp")) {
    EXPECT_EQ(state->total(), expect["stamp"].number);
  }
  if (!expect.has("remaining")) return;
  EXPECT_EQ(state->available(quota, now), expect["remaining"].number);
  EXPECT_EQ(state->full_after(quota, now), expect["full_after"].number);
}

TEST(Window, DoesTheSumsOfTheVectorFile) {
  const testing::Json file = testing::read_json(RATESYNC_VECTORS "/windows.json");
  ASSERT_GT(file["cases"].items.size(), 60U);
  for (const testing::Json& story : file["cases"].items) {
    Algorithm algorithm = Algorithm::token_bucket;
    ASSERT_TRUE(parse_algorithm(story["algorithm"].text, &algorithm));
    WindowState state(algorithm, 0);
    ASSERT_EQ(state.algorithm(), algorithm);
    int number = 0;
    for (const testing::Json& step : story["steps"].items) {
      SCOPED_TRACE(story["name"].text + ", " + story["algorithm"].text + ", step " +
                   std::to_string(number++) + ": " + step["op"].text);
      play(step, &state);
      if (HasFailure()) return;
    }
  }
}

// What was granted, by the moment it may be used.
struct Grant {
  std::int64_t at;
  std::int64_t units;
};

std::vector<Grant> random_history(Algorithm algorithm, Quota quota, std::mt19937_64& random) {
  WindowState state(algorithm, 7);
  std::vector<Grant> grants;
  std::int64_t now = kStart + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(quota.window));
  for (int i = 0; i < 300; ++i) {
    now += static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(quota.window)) / (1 + i % 7);
    const std::int64_t cost =
        1 + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(quota.limit));
    const std::int64_t patience =
        random() % 2 ? 0 : static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(5 * quota.window));
    const std::int64_t left = state.available(quota, now), stamp = state.total();
    const std::int64_t foretold = state.wait_of(quota, now, cost);
    const WindowDeal deal = state.take(quota, now, cost, patience);
    EXPECT_EQ(deal.wait, foretold);
    EXPECT_EQ(deal.granted, deal.wait <= patience);
    EXPECT_EQ(deal.wait == 0, left >= cost) << "available() must not promise more or less";
    EXPECT_EQ(state.total(), stamp + (deal.granted ? cost : 0));
    if (deal.granted) {
      EXPECT_TRUE(grants.empty() || grants.back().at <= now + deal.wait) << "overtaken";
      grants.push_back({now + deal.wait, cost});
    } else {
      // It may well be had then, and not a moment earlier.
      WindowState later = state, early = state;
      EXPECT_TRUE(later.take(quota, now + deal.wait, cost, 0).granted);
      EXPECT_FALSE(early.take(quota, now + deal.wait - 1, cost, 0).granted);
    }
  }
  return grants;
}

std::int64_t units_in(const std::vector<Grant>& grants, std::int64_t from, std::int64_t to) {
  std::int64_t units = 0;
  for (const Grant& grant : grants)
    if (grant.at > from && grant.at <= to) units += grant.units;
  return units;
}

TEST(Window, NoWindowEverCarriesMoreThanItsLimit) {
  std::mt19937_64 random(20261121);
  for (int round = 0; round < 60; ++round) {
    const Quota quota{1 + static_cast<std::int64_t>(random() % 12),
                      kMilli + static_cast<std::int64_t>(random() % (3 * kSecond))};
    for (const Algorithm algorithm : kWindows) {
      SCOPED_TRACE(std::string(to_string(algorithm)) + ", round " + std::to_string(round));
      const std::vector<Grant> grants = random_history(algorithm, quota, random);
      ASSERT_GT(grants.size(), 20U);
      for (const Grant& grant : grants) {
        const std::int64_t calendar = grant.at / quota.window * quota.window;
        if (algorithm == Algorithm::sliding_window) {
          ASSERT_LE(units_in(grants, grant.at - quota.window, grant.at), quota.limit);
          continue;
        }
        // Both keep the limit in every calendar window. In others the estimate, which assumes even
        // spreading, lets at worst twice the limit through, as a fixed window may.
        ASSERT_LE(units_in(grants, calendar - 1, calendar + quota.window - 1), quota.limit);
        ASSERT_LE(units_in(grants, grant.at - quota.window, grant.at), 2 * quota.limit);
      }
      if (HasFailure()) return;
    }
  }
}

TEST(Window, TheLogHoldsNoMoreThanTheLimitAndThoseWhoWait) {
  SlidingWindow log;
  const Quota quota{100, kSecond};
  std::size_t most = 0;
  for (std::int64_t i = 0; i < 100'000; ++i) {
    (void)log.take(quota, kStart + i * kMilli, 1, 0);
    most = std::max(most, log.entries());
  }
  EXPECT_LE(most, 100U);
  for (int i = 0; i < 500; ++i) EXPECT_TRUE(log.take(quota, kStart + 200 * kSecond, 1, kForever / 4).granted);
  EXPECT_LE(log.entries(), 600U);
  EXPECT_EQ(log.available(quota, kStart + 300 * kSecond), 100);
}

TEST(Window, NothingOverflowsFarAheadOrWithHugeCharges) {
  const Quota widest{kMaxLimit, kMaxWindow};
  for (const Algorithm algorithm : kWindows) {
    WindowState state(algorithm, 0);
    const std::int64_t far = 60LL * 365 * 86'400 * kSecond;
    int granted = 0;
    while (state.take(widest, kStart, kMaxLimit, far).granted) ++granted;
    EXPECT_GE(granted, 29) << to_string(algorithm);  // two years each for the counter, which halves at worst
    EXPECT_LE(granted, 61);
    for (int i = 0; i < 100; ++i) state.settle(widest, kStart, kMaxLimit);
    EXPECT_EQ(state.available(widest, kStart), 0);
    EXPECT_GT(state.wait_of(widest, kStart, 1), 0);
    for (int i = 0; i < 300; ++i) state.settle(widest, kStart, -kMaxLimit);
    EXPECT_GE(state.full_after(widest, kStart), 0);
  }
}

TEST(Params, AWindowNeedsBothOfItsNumbersAndSaysSo) {
  for (const Algorithm algorithm : kWindows) {
    EXPECT_TRUE(validate(window(algorithm, 1, kMinWindow)).ok());
    EXPECT_TRUE(validate(window(algorithm, kMaxLimit, kMaxWindow)).ok());
    for (const auto& [limit, length] :
         std::vector<std::pair<std::int64_t, Nanos>>{{0, kSecond}, {5, 0}, {0, 0}}) {
      const Status status = validate(window(algorithm, limit, length));
      EXPECT_EQ(status.code, Code::invalid);
      EXPECT_NE(status.message.find("limit"), std::string::npos);
      EXPECT_NE(status.message.find("window_seconds"), std::string::npos);
      EXPECT_NE(status.message.find(to_string(algorithm)), std::string::npos);
    }
  }
  const auto sliding = Algorithm::sliding_window;
  EXPECT_FALSE(validate(window(sliding, kMaxLimit + 1, kSecond)).ok());
  EXPECT_FALSE(validate(window(sliding, -1, kSecond)).ok());
  EXPECT_FALSE(validate(window(sliding, 1, kMilli - kMicro)).ok());
  EXPECT_FALSE(validate(window(sliding, 1, kMaxWindow + kMicro)).ok());
  EXPECT_FALSE(validate(window(sliding, 1, kSecond + 1)).ok()) << "not whole microseconds";
  Params ignoring = window(sliding, 1, kSecond);
  ignoring.rate_per_second = -5;
  ignoring.burst = 0;
  EXPECT_TRUE(validate(ignoring).ok());
  ignoring.max_concurrent = -1;
  EXPECT_FALSE(validate(ignoring).ok());
  Params bucket;
  bucket.rate_per_second = 1;
  bucket.limit = -1;
  EXPECT_TRUE(validate(bucket).ok());
}

TEST(Params, ACostThatNoWindowHoldsIsRefusedUpFront) {
  const Params p = window(Algorithm::fixed_window, 10, kSecond);
  EXPECT_TRUE(validate_cost(p, 10).ok());
  const Status status = validate_cost(p, 11);
  EXPECT_EQ(status.code, Code::invalid);
  EXPECT_NE(status.message.find("limit of 10"), std::string::npos) << status.message;
  EXPECT_TRUE(validate_actual(p, 11).ok()) << "used is used";
  EXPECT_FALSE(validate_actual(p, kMaxLimit + 1).ok());
  EXPECT_FALSE(validate_cost(p, 0).ok());
}

TEST(Params, AlgorithmsHaveNames) {
  Algorithm parsed = Algorithm::token_bucket;
  for (const Algorithm algorithm : kWindows) {
    EXPECT_TRUE(parse_algorithm(to_string(algorithm), &parsed));
    EXPECT_EQ(parsed, algorithm);
  }
  EXPECT_FALSE(parse_algorithm("sliding", &parsed));
}

}  // namespace
}  // namespace ratesync::limits
