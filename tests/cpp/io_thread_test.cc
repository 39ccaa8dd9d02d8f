// The I/O thread: what is posted runs, signals stay out, stopping never hangs and loses nothing.
#include "ratesync/net/io_thread.h"

#include <gtest/gtest.h>
#include <pthread.h>
#include <signal.h>

#include <asio/post.hpp>
#include <asio/steady_timer.hpp>
#include <future>
#include <stdexcept>

#include "ratesync/net/resolver.h"

using namespace ratesync;
using net::IoThread;

TEST(IoThread, RunsWhatIsPostedInOrderAlsoFromBeforeTheStart) {
  IoThread io;
  std::vector<int> seen;
  for (int i = 0; i < 3; ++i) io.post([&seen, i] { seen.push_back(i); });
  io.start();
  for (int i = 3; i < 6; ++i) io.post([&seen, i] { seen.push_back(i); });
  io.stop();
  EXPECT_EQ(seen, (std::vector<int>{0, 1, 2, 3, 4, 5}));
}

TEST(IoThread, WorkThatIsPostedByTheLastWorkStillRunsBeforeTheStop) {
  IoThread io;
  io.start();
  int depth = 0;
  std::function<void()> again = [&] {
    if (++depth < 100) io.post(again);
  };
  io.post(again);
  io.stop();
  EXPECT_EQ(depth, 100);
}

TEST(IoThread, StopsWhileATimerIsPendingFarInTheFuture) {
  IoThread io;
  asio::steady_timer timer(io.context(), std::chrono::hours(1));
  timer.async_wait([](const asio::error_code&) {});
  io.start();
  io.stop();
}

TEST(IoThread, BlocksAllSignalsAndLeavesTheCallersMaskAlone) {
  sigset_t before, after;
  pthread_sigmask(SIG_SETMASK, nullptr, &before);
  IoThread io;
  io.start();
  pthread_sigmask(SIG_SETMASK, nullptr, &after);
  EXPECT_EQ(sigismember(&before, SIGINT), sigismember(&after, SIGINT));
  std::promise<bool> blocked;
  std::promise<std::string> name;
  io.post([&] {
    sigset_t mine;
    pthread_sigmask(SIG_SETMASK, nullptr, &mine);
    bool all = true;
    for (const int s : {SIGINT, SIGTERM, SIGUSR1, SIGCHLD, SIGALRM, SIGPIPE})
      all = all && sigismember(&mine, s) == 1;
    blocked.set_value(all);
    char text[32] = "";
    pthread_getname_np(pthread_self(), text, sizeof text);
    name.set_value(text);
  });
  EXPECT_TRUE(blocked.get_future().get());
  EXPECT_EQ(name.get_future().get(), "ratesync-io");
  io.stop();
}

TEST(IoThread, KnowsItself) {
  IoThread io;
  EXPECT_FALSE(io.on_io_thread());
  io.start();
  std::promise<bool> inside;
  io.post([&] { inside.set_value(io.on_io_thread()); });
  EXPECT_TRUE(inside.get_future().get());
  EXPECT_FALSE(io.on_io_thread());
  io.stop();
  io.stop();  // harmless
}

TEST(IoThread, SurvivesAHandlerThatThrows) {
  ::testing::internal::CaptureStderr();
  IoThread io;
  io.start();
  io.post([] { throw std::runtime_error("boom"); });
  io.post([] { throw 1; });
  std::promise<void> alive;
  io.post([&] { alive.set_value(); });
  alive.get_future().get();
  io.stop();
  EXPECT_EQ(io.escaped_exceptions(), 2u);
  EXPECT_NE(::testing::internal::GetCapturedStderr().find("boom"), std::string::npos);
}

TEST(Resolver, ANumericAddressIsItsOwnAnswerButNotInsideTheCall) {
  asio::io_context io;
  net::Resolver resolver(io);
  std::vector<std::string> found;
  resolver.resolve("::1", [&](auto r) { found = r.value(); });
  EXPECT_TRUE(found.empty());
  io.run();
  EXPECT_EQ(found, std::vector<std::string>{"::1"});
}

TEST(Resolver, AnswersLocalhostAndNamesWhatItCannotResolve) {
  asio::io_context io;
  net::Resolver resolver(io);
  std::vector<std::string> found;
  resolver.resolve("localhost", [&](auto r) {
    ASSERT_TRUE(r.ok()) << r.status().message;
    found = r.value();
  });
  io.run();
  EXPECT_FALSE(found.empty());
  Status failed;
  // A label of more than 63 characters is refused without asking DNS.
  const std::string impossible(70, 'x');
  resolver.resolve(impossible + ".invalid", [&](auto r) { failed = r.status(); });
  io.restart();
  io.run();
  EXPECT_EQ(failed.code, Code::unavailable);
  EXPECT_NE(failed.message.find(impossible), std::string::npos);
}

TEST(Resolver, IsSilentAfterCancelAndAfterItsEnd) {
  asio::io_context io;
  bool called = false;
  {
    net::Resolver resolver(io);
    resolver.resolve("127.0.0.1", [&](auto) { called = true; });
    resolver.cancel();
    resolver.resolve("localhost", [&](auto) { called = true; });
  }
  io.run();
  EXPECT_FALSE(called);
}
