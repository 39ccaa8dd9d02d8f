// The engine's one I/O thread: an Asio loop in a thread of its own.
//
// It owns sockets, timers and resolver. It never takes the GIL and never calls Python. Other
// threads only post(). Nothing else in the tree creates threads.
#pragma once

#include <asio/executor_work_guard.hpp>
#include <asio/io_context.hpp>
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>

namespace ratesync::net {

class IoThread {
 public:
  IoThread();
  ~IoThread();  // stop() must have been called; asserts otherwise
  IoThread(const IoThread&) = delete;
  IoThread& operator=(const IoThread&) = delete;

  // Blocks all signals in the new thread and names it "ratesync-io". Throws std::system_error, with
  // nothing changed, when the system gives no thread. A second call does nothing.
  void start();
  void post(std::function<void()> work);  // any thread, also before start()
  void stop();                            // any thread but the I/O thread: runs what is posted, then joins
  [[nodiscard]] bool on_io_thread() const;
  [[nodiscard]] asio::io_context& context() { return context_; }
  // Handlers that threw. A bug of ours each; the loop reports it on stderr and goes on.
  [[nodiscard]] std::uint64_t escaped_exceptions() const { return escaped_; }

 private:
  void loop();
  void drain();

  asio::io_context context_{1};
  asio::executor_work_guard<asio::io_context::executor_type> guard_;
  std::thread thread_;
  std::atomic<std::thread::id> id_{};
  std::atomic<std::uint64_t> escaped_{0};
};

}  // namespace ratesync::net
