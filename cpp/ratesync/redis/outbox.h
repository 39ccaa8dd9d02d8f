// The commands of one Connection that have no answer yet: the sent ones in order, then those that wait,
// as bytes ready to be written. Sans-io.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "ratesync/base/clock.h"
#include "ratesync/redis/commander.h"

namespace ratesync::redis {

class Outbox {
 public:
  void push(std::initializer_list<std::string_view> head, const Command& rest, Nanos deadline,
            ReplyCallback done);
  // The oldest commands that were not sent, as one piece of bounded size; they count as sent. Empty:
  // there are none. The piece stays valid until the next call.
  std::string_view take(Nanos now);
  // The callback of the oldest sent command. There must be one.
  ReplyCallback answered();

  // Takes out what was sent, what was not, or of the latter what is due.
  std::vector<ReplyCallback> take_sent();
  std::vector<ReplyCallback> take_unsent();
  std::vector<ReplyCallback> take_expired(Nanos now);

  [[nodiscard]] std::size_t sent() const { return sent_; }
  [[nodiscard]] std::size_t unsent() const { return entries_.size() - sent_; }
  [[nodiscard]] std::size_t size() const { return entries_.size(); }
  [[nodiscard]] std::size_t unsent_bytes() const { return unsent_bytes_; }
  [[nodiscard]] Nanos oldest_sent_at() const { return sent_ ? entries_.front().sent_at : kForever; }
  // A bound below the deadlines of all unsent; exact after take_expired().
  [[nodiscard]] Nanos next_deadline() const { return unsent() ? next_deadline_ : kForever; }

 private:
  struct Entry {
    ReplyCallback done;
    Nanos deadline;
    Nanos sent_at;
    std::size_t bytes;
  };
  struct Piece {
    std::string bytes;
    std::size_t commands = 0;
  };

  std::deque<Entry> entries_;  // the first sent_ were sent
  std::size_t sent_ = 0;
  std::deque<Piece> pieces_;  // of the unsent
  std::size_t unsent_bytes_ = 0;
  Nanos next_deadline_ = kForever;
  std::string writing_;  // what take() gave out
  std::string spare_;    // capacity for the next piece
};

}  // namespace ratesync::redis
