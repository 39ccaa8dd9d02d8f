// When to connect again, and when to stop waiting for it: the same rules as the PostgreSQL pool's.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>

#include "ratesync/base/clock.h"
#include "ratesync/base/status.h"

namespace ratesync::redis {

class Backoff {
 public:
  static constexpr Nanos kMin = 50 * kMilli;  // the pause after a failure doubles from here ...
  static constexpr Nanos kMax = 1 * kSecond;  // ... up to here
  static constexpr int kDownAfter = 2;        // failed connects in a row

  // A connect failed. Server, invalid and protocol mean that the other side answered: it refuses, but
  // is not down.
  void failed(Status why, Nanos now) {
    refused_ = why.code == Code::server || why.code == Code::invalid || why.code == Code::protocol;
    failures_ = refused_ ? 0 : failures_ + 1;
    last_error_ = std::move(why);
    pause(now);
  }
  void connected(Nanos now) {
    failures_ = 0;
    refused_ = false;
    last_error_ = Status::success();
    since_ = now;
  }
  // A connection ended. One that lived briefly (accepted, then dropped) counts for the pause.
  void lost(Nanos now) {
    if (now - since_ < kMax)
      pause(now);
    else
      level_ = 0;
  }
  // There is news: the pause ends. The next one is not shorter for it.
  void hurry() { retry_at_ = 0; }
  [[nodiscard]] bool down() const { return failures_ >= kDownAfter; }
  [[nodiscard]] bool refused() const { return refused_; }
  [[nodiscard]] Nanos retry_at() const { return retry_at_; }
  [[nodiscard]] const Status& last_error() const { return last_error_; }

 private:
  // Between half and all of a growing span, so that many processes do not come back in step.
  void pause(Nanos now) {
    const Nanos span = std::min(kMax, kMin << std::min(level_++, 10));
    retry_at_ = now + std::uniform_int_distribution<Nanos>(span / 2, span)(random_);
  }

  std::minstd_rand random_{std::random_device{}()};
  Status last_error_;
  int failures_ = 0;
  int level_ = 0;
  bool refused_ = false;
  Nanos since_ = 0;
  Nanos retry_at_ = 0;
};

}  // namespace ratesync::redis
