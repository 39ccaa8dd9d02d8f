// Promises of the batcher: order per lane, one trip per lane, bounds, cancellation, bisection.
#include "ratesync/batch/batcher.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace ratesync::batch {
namespace {

using Ints = Batcher<int>;
using V = std::vector<int>;

Ticket push(Ints& b, int op, std::uint64_t hash = 0) {
  auto ticket = b.push(std::move(op), hash);
  EXPECT_TRUE(ticket.ok()) << ticket.status().message;
  return ticket.ok() ? ticket.value() : Ticket{};
}

TEST(Batcher, ALoneOperationLeavesAtOnce) {
  Ints b({});
  EXPECT_FALSE(b.take());
  push(b, 1);
  const auto batch = b.take();
  ASSERT_TRUE(batch);
  EXPECT_EQ(batch->ops, V{1});
  EXPECT_EQ(batch->attempt, 1u);
  EXPECT_FALSE(batch->sealed);
}

TEST(Batcher, ArrivalsDuringATripFormTheNextOne) {
  Ints b({});
  push(b, 1);
  const auto first = b.take();
  ASSERT_TRUE(first);
  for (int i = 2; i <= 5; ++i) push(b, i);
  EXPECT_FALSE(b.take()) << "one trip per lane";
  EXPECT_EQ(b.queued(), 4u);
  EXPECT_EQ(b.in_flight(), 1u);
  EXPECT_TRUE(b.finished(first->id));
  EXPECT_EQ(b.take()->ops, (V{2, 3, 4, 5}));
  EXPECT_EQ(b.stats().batches, 2u);
  EXPECT_EQ(b.stats().ops, 5u);
}

TEST(Batcher, ATripCarriesAtMostMaxBatch) {
  Ints b({.max_batch = 3});
  for (int i = 0; i < 7; ++i) push(b, i);
  std::vector<V> trips;
  while (auto batch = b.take()) {
    trips.push_back(batch->ops);
    b.finished(batch->id);
  }
  EXPECT_EQ(trips, (std::vector<V>{{0, 1, 2}, {3, 4, 5}, {6}}));
}

TEST(Batcher, AFullQueueSaysTheNumbersAndLeavesTheOperationWithTheCaller) {
  Batcher<std::unique_ptr<int>> b({.max_queue = 2});
  ASSERT_TRUE(b.push(std::make_unique<int>(1), 0).ok());
  ASSERT_TRUE(b.push(std::make_unique<int>(2), 0).ok());
  auto third = std::make_unique<int>(3);
  const auto refused = b.push(std::move(third), 0);
  EXPECT_EQ(refused.status().code, Code::exhausted);
  EXPECT_NE(refused.status().message.find("2 operations"), std::string::npos) << refused.status().message;
  EXPECT_TRUE(third);
  const auto batch = b.take();
  EXPECT_TRUE(b.push(std::move(third), 0).ok()) << "what is in flight is not queued";
}

TEST(Batcher, KeysOfOneLaneNeverTravelInTwoTripsAtOnce) {
  Ints b({.lanes = 4});
  std::set<std::size_t> lanes;
  for (std::uint64_t key = 0; key < 64; ++key) {
    lanes.insert(b.lane_of(key));
    push(b, static_cast<int>(key), key);
    push(b, static_cast<int>(key), key);
  }
  EXPECT_EQ(lanes.size(), 4u) << "consecutive hashes spread over all lanes";
  std::map<int, std::size_t> lane_of_key;
  for (int trips = 0; trips < 4; ++trips) {
    const auto batch = b.take();
    ASSERT_TRUE(batch);
    for (const int key : batch->ops) {
      const auto [at, fresh] = lane_of_key.emplace(key, batch->lane);
      EXPECT_EQ(at->second, batch->lane) << key;
    }
  }
  EXPECT_FALSE(b.take());
}

TEST(Batcher, LanesTakeTurns) {
  Ints b({.max_batch = 1, .lanes = 2});
  std::uint64_t other = 1;
  while (b.lane_of(other) == b.lane_of(0)) ++other;
  for (int i = 0; i < 3; ++i) {
    push(b, i, 0);
    push(b, 10 + i, other);
  }
  std::vector<std::size_t> order;
  while (auto batch = b.take()) {
    order.push_back(batch->lane);
    b.finished(batch->id);
  }
  ASSERT_EQ(order.size(), 6u);
  for (std::size_t i = 1; i < order.size(); ++i) EXPECT_NE(order[i], order[i - 1]);
}

TEST(Batcher, ACancelledOperationNeverTravels) {
  Ints b({});
  push(b, 1);
  const Ticket second = push(b, 2);
  push(b, 3);
  EXPECT_EQ(b.cancel(second), 2);
  EXPECT_EQ(b.cancel(second), std::nullopt) << "only once";
  EXPECT_EQ(b.queued(), 2u);
  EXPECT_EQ(b.take()->ops, (V{1, 3}));
  EXPECT_EQ(b.stats().cancelled, 1u);
}

TEST(Batcher, AnOperationInFlightCannotBeCancelled) {
  Ints b({});
  const Ticket ticket = push(b, 1);
  const auto batch = b.take();
  EXPECT_EQ(b.cancel(ticket), std::nullopt);
  b.finished(batch->id);
  EXPECT_EQ(b.cancel(ticket), std::nullopt);
}

TEST(Batcher, AnOldTicketNeverCancelsTheNextUserOfItsSlot) {
  Ints b({});
  const Ticket old = push(b, 1);
  b.finished(b.take()->id);
  const Ticket fresh = push(b, 2);
  ASSERT_EQ(old.slot, fresh.slot) << "the slot is used again";
  EXPECT_EQ(b.cancel(old), std::nullopt);
  EXPECT_EQ(b.cancel(Ticket{}), std::nullopt);
  EXPECT_EQ(b.cancel(fresh), 2);
}

TEST(Batcher, ARequeuedBatchTravelsFirstAndWhole) {
  Ints b({.max_batch = 10});
  push(b, 1);
  push(b, 2);
  auto batch = b.take();
  push(b, 3);
  ASSERT_TRUE(b.requeue(*batch));
  EXPECT_EQ(b.in_flight(), 0u);
  EXPECT_EQ(b.queued(), 3u);
  auto again = b.take();
  EXPECT_EQ(again->ops, (V{1, 2}));
  EXPECT_EQ(again->attempt, 2u);
  ASSERT_TRUE(b.requeue(*again));
  again = b.take();
  EXPECT_EQ(again->attempt, 3u);
  b.finished(again->id);
  EXPECT_EQ(b.take()->ops, V{3});
  EXPECT_EQ(b.stats().retries, 2u);
}

TEST(Batcher, ARetryIsNeverRefusedForAFullQueue) {
  Ints b({.max_queue = 2});
  push(b, 1);
  push(b, 2);
  auto batch = b.take();
  push(b, 3);
  push(b, 4);
  ASSERT_TRUE(b.requeue(*batch));
  EXPECT_EQ(b.queued(), 4u);
  EXPECT_EQ(b.push(5, 0).status().code, Code::exhausted);
}

TEST(Batcher, ARequeuedOperationCanBeCancelledAgain) {
  Ints b({});
  const Ticket one = push(b, 1);
  const Ticket two = push(b, 2);
  auto batch = b.take();
  EXPECT_EQ(b.cancel(one), std::nullopt);
  ASSERT_TRUE(b.requeue(*batch));
  EXPECT_EQ(b.cancel(one), 1);
  EXPECT_EQ(b.cancel(two), 2);
  EXPECT_FALSE(b.take()) << "an empty batch makes no trip";
  push(b, 3);
  EXPECT_EQ(b.take()->ops, V{3});
}

TEST(Batcher, OperationsNobodyWantsAnyMoreAreDroppedFromARetry) {
  Ints b({});
  for (int i = 1; i <= 4; ++i) push(b, i);
  auto batch = b.take();
  ASSERT_TRUE(b.requeue(*batch, [](const int& op) { return op % 2 == 0; }));
  EXPECT_EQ(b.queued(), 2u);
  EXPECT_EQ(b.take()->ops, (V{1, 3}));
}

TEST(Batcher, BisectionFailsOnlyTheBadOperation) {
  for (int bad = 0; bad < 100; ++bad) {
    Ints b({.max_batch = 100});
    for (int i = 0; i < 100; ++i) push(b, i);
    V done, failed;
    int trips = 0;
    while (auto batch = b.take()) {
      ++trips;
      if (trips == 1) push(b, 100);  // arrives meanwhile: comes after all of them, alone
      const bool has_bad = std::find(batch->ops.begin(), batch->ops.end(), bad) != batch->ops.end();
      if (has_bad) {
        const auto split = b.split(*batch);
        if (split == Ints::Split::done) continue;
        ASSERT_EQ(split, Ints::Split::single);
        failed.push_back(batch->ops.front());
      } else {
        done.insert(done.end(), batch->ops.begin(), batch->ops.end());
        const bool late = std::find(batch->ops.begin(), batch->ops.end(), 100) != batch->ops.end();
        EXPECT_FALSE(batch->sealed && late) << "a half is never merged with arrivals";
      }
      ASSERT_TRUE(b.finished(batch->id));
    }
    V expected;
    for (int i = 0; i <= 100; ++i) {
      if (i != bad) expected.push_back(i);
    }
    EXPECT_EQ(done, expected) << "in order, nothing lost";
    EXPECT_EQ(failed, V{bad});
    EXPECT_LE(trips, 2 + 2 * 7);
  }
}

TEST(Batcher, AHalfCountsItsAttemptsAnewAndStaysSealed) {
  Ints b({});
  push(b, 1);
  push(b, 2);
  auto batch = b.take();
  ASSERT_TRUE(b.requeue(*batch));
  batch = b.take();
  ASSERT_EQ(b.split(*batch), Ints::Split::done);
  batch = b.take();
  EXPECT_EQ(batch->ops, V{1});
  EXPECT_EQ(batch->attempt, 1u);
  EXPECT_TRUE(batch->sealed);
  ASSERT_TRUE(b.requeue(*batch));
  batch = b.take();
  EXPECT_EQ(batch->attempt, 2u);
  EXPECT_TRUE(batch->sealed);
}

TEST(Batcher, CloseReturnsWhatIsQueuedInOrderAndRefusesMore) {
  Ints b({.max_batch = 2});
  for (int i = 1; i <= 4; ++i) push(b, i);
  auto batch = b.take();
  ASSERT_TRUE(b.requeue(*batch));
  batch = b.take();  // 1, 2 in flight again
  push(b, 5);
  EXPECT_EQ(b.close(), (V{3, 4, 5}));
  EXPECT_EQ(b.queued(), 0u);
  EXPECT_EQ(b.push(6, 0).status().code, Code::closed);
  EXPECT_FALSE(b.take());
  EXPECT_FALSE(b.requeue(*batch)) << "no retry after close";
  EXPECT_EQ(b.split(*batch), Ints::Split::closed);
  EXPECT_EQ(batch->ops, (V{1, 2})) << "the caller still has them, to fail them";
  EXPECT_TRUE(b.finished(batch->id));
  EXPECT_EQ(b.in_flight(), 0u);
  EXPECT_TRUE(b.close().empty());
}

TEST(Batcher, CloseReturnsBatchesThatWaitForARetryToo) {
  Ints b({});
  push(b, 1);
  push(b, 2);
  auto batch = b.take();
  push(b, 3);
  ASSERT_EQ(b.split(*batch), Ints::Split::done);
  EXPECT_EQ(b.close(), (V{1, 2, 3}));
}

TEST(Batcher, ABatchThatIsNotInFlightIsRefused) {
  Ints b({});
  EXPECT_FALSE(b.finished(0));
  push(b, 1);
  auto batch = b.take();
  EXPECT_FALSE(b.finished(batch->id + 1));
  EXPECT_TRUE(b.finished(batch->id));
  EXPECT_FALSE(b.finished(batch->id));
  EXPECT_FALSE(b.requeue(*batch));
}

// Random pushes, cancels, trips and retries against a plain model: every operation ends exactly once,
// and operations of one key end in the order in which they were pushed.
TEST(Batcher, EveryOperationEndsExactlyOnceAndInOrder) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 rng(seed);
  const auto dice = [&](unsigned n) { return static_cast<unsigned>(rng() % n); };

  Ints b({.max_batch = 7, .max_queue = 60, .lanes = 3});
  constexpr unsigned kKeys = 9;
  std::vector<Ticket> tickets;        // by operation
  std::vector<unsigned> key_of;       // by operation
  std::map<int, std::string> ends;    // operation -> how it ended
  std::map<unsigned, int> last_done;  // key -> latest finished operation
  std::map<std::uint64_t, Ints::Batch> flying;
  const auto end = [&](int op, const char* how) {
    const auto [at, fresh] = ends.emplace(op, how);
    ASSERT_TRUE(fresh) << op << " ended as " << at->second << " and as " << how;
  };
  for (int step = 0; step < 30'000; ++step) {
    switch (dice(8)) {
      case 0:
      case 1:
      case 2: {
        const unsigned key = dice(kKeys);
        const auto ticket = b.push(static_cast<int>(tickets.size()), key);
        if (!ticket.ok()) {
          ASSERT_EQ(ticket.status().code, Code::exhausted);
          ASSERT_GE(b.queued(), 60u);
          break;
        }
        tickets.push_back(Result<Ticket>(ticket).value());
        key_of.push_back(key);
        break;
      }
      case 3: {
        if (tickets.empty()) break;
        const std::size_t recent = std::min<std::size_t>(tickets.size(), 100);
        const std::size_t op = tickets.size() - 1 - dice(static_cast<unsigned>(recent));
        if (const auto cancelled = b.cancel(tickets[op])) {
          ASSERT_EQ(*cancelled, static_cast<int>(op)) << "a ticket names its own operation";
          end(*cancelled, "cancelled");
        }
        break;
      }
      case 4:
      case 5: {
        if (auto batch = b.take()) {
          ASSERT_FALSE(batch->ops.empty());
          ASSERT_LE(batch->ops.size(), 7u);
          for (const auto& [id, other] : flying) ASSERT_NE(other.lane, batch->lane);
          const auto id = batch->id;
          flying.emplace(id, std::move(*batch));
        }
        break;
      }
      case 6:
      case 7: {
        if (flying.empty()) break;
        auto at = std::next(flying.begin(), dice(static_cast<unsigned>(flying.size())));
        Ints::Batch batch = std::move(at->second);
        flying.erase(at);
        const unsigned how = dice(4);
        if (how == 0) {
          ASSERT_TRUE(b.requeue(batch, [&](const int& op) {
            if (op % 10 != 0) return false;
            end(op, "dropped");
            return true;
          }));
          break;
        }
        if (how == 1 && b.split(batch) == Ints::Split::done) break;
        for (const int op : batch.ops) {
          end(op, "done");
          const unsigned key = key_of[static_cast<std::size_t>(op)];
          const auto last = last_done.emplace(key, -1).first;
          ASSERT_LT(last->second, op) << "key " << key;
          last->second = op;
        }
        ASSERT_TRUE(b.finished(batch.id));
        break;
      }
    }
    std::size_t aboard = 0;
    for (const auto& [id, batch] : flying) aboard += batch.ops.size();
    ASSERT_EQ(b.in_flight(), aboard);
    ASSERT_EQ(b.queued() + aboard + ends.size(), tickets.size());
  }
  for (const int op : b.close()) end(op, "closed");
  for (auto& [id, batch] : flying) {
    for (const int op : batch.ops) end(op, "failed");
    ASSERT_TRUE(b.finished(id));
  }
  EXPECT_EQ(ends.size(), tickets.size());
  EXPECT_EQ(b.in_flight(), 0u);
}

}  // namespace
}  // namespace ratesync::batch
