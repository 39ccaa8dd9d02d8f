// What needs no server: replies in any slices, hostile bytes, and the queue of commands against a model.
#include <gtest/gtest.h>

#include <deque>
#include <random>
#include <string>
#include <vector>

#include "ratesync/redis/outbox.h"
#include "ratesync/redis/reader.h"
#include "ratesync/redis/wire.h"

namespace ratesync::redis {
namespace {

std::string shown(const Reply& r) {
  std::string out = std::to_string(static_cast<int>(r.kind)) + "(" + std::to_string(r.integer) + r.text;
  for (const Reply& item : r.items) out += "," + shown(item);
  return out + ")";
}

std::string random_reply(std::minstd_rand& random, int depth) {
  switch (random() % (depth > 0 ? 6 : 5)) {
    case 0: return ":" + std::to_string(static_cast<int>(random()) - 1'000'000'000) + "\r\n";
    case 1: return "+status " + std::to_string(random() % 100) + "\r\n";
    case 2: return "-ERR " + std::to_string(random() % 100) + "\r\n";
    case 3: return "$-1\r\n";
    case 4: {
      std::string text(random() % 200, 'x');
      for (char& c : text) c = static_cast<char>(random() % 256);
      return "$" + std::to_string(text.size()) + "\r\n" + text + "\r\n";
    }
    default: break;
  }
  const unsigned count = random() % 5;
  std::string out = "*" + std::to_string(count) + "\r\n";
  for (unsigned i = 0; i < count; ++i) out += random_reply(random, depth - 1);
  return out;
}

// All replies of these bytes, fed in slices of up to `slice` bytes; "broken" at the end if it was so.
std::vector<std::string> read_all(std::string_view bytes, std::size_t slice, std::minstd_rand& random) {
  Reader reader;
  std::vector<std::string> out;
  Reply reply;
  while (!bytes.empty()) {
    const std::size_t size = std::min<std::size_t>(bytes.size(), 1 + random() % slice);
    // A copy of its own, so that the sanitizer sees any step beyond it.
    const std::vector<char> piece(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(size));
    bytes.remove_prefix(size);
    if (!reader.feed(piece.data(), piece.size())) return out;
    for (;;) {
      const Reader::Step step = reader.next(reply);
      if (step == Reader::Step::more) break;
      if (step == Reader::Step::broken) {
        out.push_back("broken");
        return out;
      }
      out.push_back(shown(reply));
    }
  }
  return out;
}

TEST(RedisReaderTest, SlicesDoNotMatter) {
  std::minstd_rand random(11);
  for (int round = 0; round < 300; ++round) {
    std::string bytes;
    const std::size_t count = 1 + random() % 30;
    for (std::size_t i = 0; i < count; ++i) bytes += random_reply(random, 4);
    const std::vector<std::string> whole = read_all(bytes, 1'000'000'000, random);
    const std::vector<std::string> bytewise = read_all(bytes, 1, random);
    ASSERT_EQ(bytewise.size(), count);
    EXPECT_EQ(bytewise, read_all(bytes, 37, random));
    EXPECT_EQ(bytewise, whole);
    for (const std::string& one : bytewise) EXPECT_NE(one, "broken");
  }
}

TEST(RedisReaderTest, HostileBytesEndInBrokenOrNothing) {
  std::minstd_rand random(12);
  const std::string alphabet = "*$+-:\r\n0123456789 x";
  for (int round = 0; round < 5'000; ++round) {
    std::string bytes = round % 2 ? random_reply(random, 5) : std::string();
    if (bytes.empty())
      for (unsigned n = random() % 60; n > 0; --n) bytes += alphabet[random() % alphabet.size()];
    else
      for (unsigned n = 1 + random() % 4; n > 0; --n)
        bytes[random() % bytes.size()] = alphabet[random() % alphabet.size()];
    const std::vector<std::string> replies = read_all(bytes, 16, random);
    for (std::size_t i = 0; i + 1 < replies.size(); ++i) EXPECT_NE(replies[i], "broken") << "and goes on";
  }
}

TEST(RedisReaderTest, SizesThatNobodyMeans) {
  std::minstd_rand random(13);
  for (const char* bytes : {"*2147483647\r\n", "*99999999999999999999\r\n", "*-2\r\n", "*262145\r\n",
                            "$-2\r\n", ":99999999999999999999999\r\n", ":\r\n", ":1a\r\n"})
    EXPECT_EQ(read_all(bytes, 100, random), std::vector<std::string>{"broken"}) << bytes;
  // Announced, not sent: waits, without taking the memory.
  EXPECT_TRUE(read_all("$2147483647\r\nx", 100, random).empty());
}

TEST(RedisOutboxTest, AgreesWithAModel) {
  struct Expected {
    int id;
    Nanos deadline;
    std::string bytes;
  };
  std::minstd_rand random(14);
  for (int round = 0; round < 200; ++round) {
    Outbox outbox;
    std::deque<Expected> sent, unsent;
    int next = 0, answered = -1;
    const auto run = [&](std::vector<ReplyCallback> calls, const std::vector<int>& ids) {
      ASSERT_EQ(calls.size(), ids.size());
      for (std::size_t i = 0; i < calls.size(); ++i) {
        calls[i](Reply{});
        EXPECT_EQ(answered, ids[i]);
      }
    };
    for (int step = 0; step < 200; ++step) {
      std::vector<int> ids;
      switch (random() % 12) {
        case 0: {
          std::string expected;
          const std::string_view piece = outbox.take(step);
          while (expected.size() < piece.size()) {
            expected += unsent.front().bytes;
            sent.push_back(std::move(unsent.front()));
            unsent.pop_front();
          }
          EXPECT_EQ(piece, expected);
          EXPECT_LT(piece.size(), 64u * 1024 + 40'000);
          break;
        }
        case 1:
        case 2:
          if (sent.empty()) break;
          outbox.answered()(Reply{});
          EXPECT_EQ(answered, sent.front().id);
          sent.pop_front();
          break;
        case 3: {
          if (random() % 3 != 0) break;
          std::deque<Expected> left;
          for (Expected& one : unsent) {
            if (one.deadline <= step)
              ids.push_back(one.id);
            else
              left.push_back(std::move(one));
          }
          unsent = std::move(left);
          run(outbox.take_expired(step), ids);
          Nanos earliest = kForever;
          for (const Expected& one : unsent) earliest = std::min(earliest, one.deadline);
          EXPECT_EQ(outbox.next_deadline(), earliest);
          break;
        }
        case 4:
          if (random() % 20 != 0) break;
          for (const Expected& one : sent) ids.push_back(one.id);
          sent.clear();
          run(outbox.take_sent(), ids);
          break;
        case 5:
          if (random() % 20 != 0) break;
          for (const Expected& one : unsent) ids.push_back(one.id);
          unsent.clear();
          run(outbox.take_unsent(), ids);
          break;
        default: {
          Command rest("GET");
          rest.add(std::string(random() % 10 ? random() % 50 : random() % 40'000, 'v'));
          const Nanos deadline = step + static_cast<Nanos>(random() % 100);
          std::string bytes;
          append_command(bytes, {"HEAD"}, rest);
          const int id = next++;
          outbox.push({"HEAD"}, rest, deadline, [&answered, id](const Result<Reply>&) { answered = id; });
          unsent.push_back({id, deadline, std::move(bytes)});
        }
      }
      ASSERT_EQ(outbox.sent(), sent.size());
      ASSERT_EQ(outbox.unsent(), unsent.size());
      std::size_t bytes = 0;
      for (const Expected& one : unsent) {
        bytes += one.bytes.size();
        EXPECT_LE(outbox.next_deadline(), one.deadline);
      }
      ASSERT_EQ(outbox.unsent_bytes(), bytes);
    }
  }
}

}  // namespace
}  // namespace ratesync::redis
