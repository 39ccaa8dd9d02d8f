#include "ratesync/net/io_thread.h"

#include <pthread.h>
#include <signal.h>

#include <asio/post.hpp>
#include <cassert>
#include <cstdio>
#include <exception>

namespace ratesync::net {
namespace {

// Handlers may post further ones while the loop ends; one that posts itself for ever must not keep
// the process from exiting.
constexpr int kMaxDrained = 1'000'000;

// A new thread inherits the mask of its creator. Signals belong to the application's threads:
// delivered here, a Python handler would be marked by a thread that never runs Python.
class AllSignalsBlocked {
 public:
  AllSignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~AllSignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  AllSignalsBlocked(const AllSignalsBlocked&) = delete;
  AllSignalsBlocked& operator=(const AllSignalsBlocked&) = delete;

 private:
  sigset_t before_;
};

void name_this_thread() {
#if defined(__APPLE__)
  pthread_setname_np("ratesync-io");
#else
  pthread_setname_np(pthread_self(), "ratesync-io");
#endif
}

}  // namespace

IoThread::IoThread() : guard_(context_.get_executor()) {}

IoThread::~IoThread() { assert(!thread_.joinable() && "IoThread destroyed before stop()"); }

void IoThread::start() {
  if (thread_.joinable()) return;
  const AllSignalsBlocked blocked;
  thread_ = std::thread([this] { loop(); });
}

void IoThread::post(std::function<void()> work) { asio::post(context_, std::move(work)); }

void IoThread::stop() {
  if (!thread_.joinable()) return;
  assert(!on_io_thread());
  // Idle connections keep waits pending, so run() would not return by itself. The queue is first
  // in, first out: what was posted before this runs before this.
  asio::post(context_, [this] { context_.stop(); });
  thread_.join();
  guard_.reset();
}

bool IoThread::on_io_thread() const {
  return id_.load(std::memory_order_acquire) == std::this_thread::get_id();
}

void IoThread::loop() {
  name_this_thread();
  id_.store(std::this_thread::get_id(), std::memory_order_release);
  while (!context_.stopped()) {
    try {
      context_.run();
    } catch (const std::exception& e) {
      ++escaped_;
      std::fprintf(stderr, "ratesync: exception on the I/O thread (please report): %s\n", e.what());
    } catch (...) {
      ++escaped_;
      std::fputs("ratesync: unknown exception on the I/O thread (please report)\n", stderr);
    }
  }
  drain();
  id_.store({}, std::memory_order_release);
}

void IoThread::drain() {
  context_.restart();
  for (int i = 0; i < kMaxDrained; ++i) {
    try {
      if (context_.poll_one() == 0) return;
    } catch (...) {
      ++escaped_;
    }
  }
}

}  // namespace ratesync::net
