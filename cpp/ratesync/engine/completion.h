// How results leave the I/O thread: plain C++ values in a queue per (engine, event loop).
//
// The I/O thread never takes the GIL. It appends to a queue and writes one eventfd, only when the
// queue was empty; whoever reads it takes everything at once. A blocked thread uses SyncTarget.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>

#include "ratesync/base/clock.h"

namespace ratesync::engine {

class CompletionTarget;

// A unit of work whose result is delivered exactly once. Reference counted, because a cancel may
// be on its way to the I/O thread while the result is being consumed, and because an operation
// that was given up (outage) outlives its result.
class Completion {
 public:
  Completion() = default;
  Completion(const Completion&) = delete;
  Completion& operator=(const Completion&) = delete;

  void ref() { refs_.fetch_add(1, std::memory_order_relaxed); }
  void unref() {
    if (refs_.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
  }
  // I/O thread: nobody will read the result any more. Gives back what was granted.
  virtual void orphaned() = 0;

  Completion* next = nullptr;  // intrusive queue link
  std::shared_ptr<CompletionTarget> target;
  void* cookie = nullptr;  // the reader's

 protected:
  virtual ~Completion() = default;

 private:
  std::atomic<int> refs_{1};
};

// A call that may be given up by its caller. Both on the I/O thread.
class Acquisition : public Completion {
 public:
  virtual void start() = 0;   // takes over one reference
  virtual void cancel() = 0;  // borrowed; nothing once it is finished
};

class CompletionTarget {
 public:
  virtual ~CompletionTarget() = default;
  // I/O thread. Takes over one reference.
  virtual void deliver(Completion* completion) = 0;
};

// For an event loop: `fd()` becomes readable when something is there.
class LoopTarget final : public CompletionTarget {
 public:
  LoopTarget();
  ~LoopTarget() override;
  LoopTarget(const LoopTarget&) = delete;
  LoopTarget& operator=(const LoopTarget&) = delete;

  void deliver(Completion* completion) override;
  [[nodiscard]] int fd() const { return read_fd_; }
  // Reader: clears the signal and takes the whole queue, oldest first, linked by `next`.
  Completion* take();
  // Reader: put back what was not handled in this turn, in front, and signal again.
  void put_back(Completion* first);
  // The loop is gone: what is delivered later is orphaned at once, and kept for take() without a
  // signal. Returns what was left.
  Completion* close();
  // In a forked child: closes the descriptors and touches nothing else.
  void abandon_after_fork();

 private:
  void signal();
  bool append(Completion* completion);  // mutex_ held; true: it was empty

  std::mutex mutex_;  // guards the list and closed_
  Completion* head_ = nullptr;
  Completion* tail_ = nullptr;
  bool closed_ = false;
  int read_fd_ = -1;
  int write_fd_ = -1;
};

// For one blocked thread.
class SyncTarget final : public CompletionTarget {
 public:
  void deliver(Completion* completion) override {
    {
      const std::lock_guard lock(mutex_);
      if (!given_up_) {
        delivered_ = completion;
        ready_.notify_one();
        return;
      }
    }
    completion->orphaned();
    completion->unref();
  }
  // The completion when it came within the slice, else nullptr.
  Completion* wait(Nanos slice) {
    std::unique_lock lock(mutex_);
    ready_.wait_for(lock, std::chrono::nanoseconds(slice), [this] { return delivered_ != nullptr; });
    return delivered_;
  }
  // Nobody waits any more. The completion when it came all the same, else it is orphaned later.
  Completion* give_up() {
    const std::lock_guard lock(mutex_);
    given_up_ = true;
    return delivered_;
  }

 private:
  std::mutex mutex_;  // guards delivered_ and given_up_
  std::condition_variable ready_;
  bool given_up_ = false;
  Completion* delivered_ = nullptr;
};

}  // namespace ratesync::engine
