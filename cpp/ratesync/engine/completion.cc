#include "ratesync/engine/completion.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#ifdef __linux__
#include <sys/eventfd.h>
#endif

namespace ratesync::engine {

LoopTarget::LoopTarget() {
#ifdef __linux__
  read_fd_ = write_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
#else
  int pair[2];
  if (pipe(pair) == 0) {
    for (const int fd : pair) {
      fcntl(fd, F_SETFD, FD_CLOEXEC);
      fcntl(fd, F_SETFL, O_NONBLOCK);
    }
    read_fd_ = pair[0];
    write_fd_ = pair[1];
  }
#endif
}

LoopTarget::~LoopTarget() {
  if (read_fd_ >= 0) ::close(read_fd_);
  if (write_fd_ >= 0 && write_fd_ != read_fd_) ::close(write_fd_);
}

void LoopTarget::signal() {
  const std::uint64_t one = 1;
  // EAGAIN means the signal is already set; EINTR does not happen on a non-blocking eventfd.
  [[maybe_unused]] const auto written = ::write(write_fd_, &one, sizeof one);
}

void LoopTarget::deliver(Completion* completion) {
  completion->next = nullptr;
  // Once it is in the list, its reader may let go of it, and with it of us.
  const std::shared_ptr<CompletionTarget> self = completion->target;
  bool closed = false, first = false;
  {
    const std::lock_guard lock(mutex_);
    closed = closed_;
    if (!closed) first = append(completion);
  }
  // Not under the mutex: the thread that this wakes wants it at once.
  if (first) signal();
  if (!closed) return;
  completion->orphaned();  // may deliver others here
  const std::lock_guard lock(mutex_);
  append(completion);
}

bool LoopTarget::append(Completion* completion) {
  const bool was_empty = head_ == nullptr;
  (was_empty ? head_ : tail_->next) = completion;
  tail_ = completion;
  return was_empty;
}

Completion* LoopTarget::take() {
  std::uint64_t sink[8];
  while (::read(read_fd_, sink, sizeof sink) > 0 && read_fd_ != write_fd_) {
  }
  const std::lock_guard lock(mutex_);
  Completion* first = head_;
  head_ = tail_ = nullptr;
  return first;
}

void LoopTarget::put_back(Completion* first) {
  if (!first) return;
  Completion* last = first;
  while (last->next) last = last->next;
  const std::lock_guard lock(mutex_);
  last->next = head_;
  if (!head_) tail_ = last;
  head_ = first;
  signal();
}

void LoopTarget::abandon_after_fork() {
  if (read_fd_ >= 0) ::close(read_fd_);
  if (write_fd_ >= 0 && write_fd_ != read_fd_) ::close(write_fd_);
  read_fd_ = write_fd_ = -1;
}

Completion* LoopTarget::close() {
  const std::lock_guard lock(mutex_);
  closed_ = true;
  Completion* first = head_;
  head_ = tail_ = nullptr;
  return first;
}

}  // namespace ratesync::engine
