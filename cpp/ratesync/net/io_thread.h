// The engine's one I/O thread: an Asio loop in a thread of its own.
//
// It owns sockets, timers and resolver. It never takes the GIL and never calls Python. Other
// threads only post(). Nothing else in the tree creates threads.
#pragma once

#include <asio/io_context.hpp>
#include <functional>
#include <thread>

namespace ratesync::net {

class IoThread {
 public:
  IoThread();
  ~IoThread();  // stop() must have been called; asserts otherwise
  IoThread(const IoThread&) = delete;
  IoThread& operator=(const IoThread&) = delete;

  void start();                              // blocks all signals in the new thread; names it "ratesync-io"
  void post(std::function<void()> work);     // any thread
  void stop();                               // any thread but the I/O thread: runs what is posted, then joins
  [[nodiscard]] bool on_io_thread() const;
  [[nodiscard]] asio::io_context& context() { return context_; }

 private:
  asio::io_context context_{1};
  asio::executor_work_guard<asio::io_context::executor_type> guard_;
  std::thread thread_;
};

}  // namespace ratesync::net
