#include "ratesync/engine/engine.h"

#include <unistd.h>

#include <condition_variable>
#include <future>
#include <random>
#include <system_error>
#include <utility>

#include "ratesync/engine/lock_service.h"
#include "ratesync/engine/state_service.h"

namespace ratesync::engine {

namespace {

// How long shutdown waits for stores to say good-bye (pending releases, sockets).
constexpr auto kCloseBudget = std::chrono::milliseconds(1500);

}  // namespace

StoreEntry::StoreEntry() = default;
StoreEntry::~StoreEntry() = default;

void StoreEntry::close(const std::function<void()>& done) const {
  if (limits) limits->shutdown();
  states->shutdown();
  // Releases travel while the store is open, and the store waits for nobody.
  locks->shutdown([this, done] { store->close(done); });
}

Engine::Engine(bool manual_clock)
    : pid_(::getpid()),
      clock_(manual_clock),
      io_(std::make_unique<net::IoThread>()),
      timers_(std::make_unique<Timers>(io_->context(), clock_)),
      multi_(std::make_unique<MultiService>(*timers_)),
      keeper_(std::make_unique<Keeper>(*timers_, std::random_device{}())) {}

Engine::~Engine() {
  if (forked()) {
    // The thread does not exist here and its locks may be held for ever: leak all of it.
    for (auto& entry : stores_) (void)entry.release();
    (void)multi_.release();
    (void)keeper_.release();
    (void)timers_.release();
    (void)io_.release();
    return;
  }
  shutdown();
}

bool Engine::forked() const { return ::getpid() != pid_; }

Result<StoreEntry*> Engine::add_store(const std::string& id, const std::string& kind,
                                      const StoreOptions& options) {
  if (!running()) return Status::make(Code::closed, "the engine was shut down");
  Result<std::unique_ptr<store::Store>> made = make_store(kind, options, io_->context(), clock_);
  if (!made.ok()) return made.status();
  auto entry = std::make_unique<StoreEntry>();
  entry->id = id;
  entry->kind = kind;
  entry->store = std::move(made.value());
  if (entry->store->limits()) {
    entry->limits = std::make_unique<LimitService>(*entry->store, *timers_, std::random_device{}());
    entry->limits->serve(multi_.get());
  }
  entry->states = std::make_unique<StateServices>(*entry->store, *timers_);
  entry->locks =
      std::make_unique<LockServices>(*entry->store, *keeper_, *timers_,
                                     [this](std::function<void()> work) { submit(Run{std::move(work)}); });
  const std::lock_guard lock(submit_mutex_);
  stores_.push_back(std::move(entry));
  return stores_.back().get();
}

bool Engine::ensure_started() {
  if (started_) return true;
  try {
    io_->start();
  } catch (const std::system_error&) {
    return false;
  }
  return started_ = true;
}

bool Engine::submit(Submission submission) {
  if (closed_) return false;  // in a forked child the mutex may be held for ever
  bool was_empty = false;
  {
    const std::lock_guard lock(submit_mutex_);
    if (closed_) return false;
    if (!ensure_started()) return false;
    was_empty = queue_.empty();
    queue_.push_back(std::move(submission));
  }
  // Not under the mutex: the thread that this wakes wants it at once. Who shuts down meanwhile drains anyway.
  if (was_empty) io_->post([this] { drain(); });
  return true;
}

void Engine::drain() {
  std::vector<Submission> batch;
  {
    const std::lock_guard lock(submit_mutex_);
    batch.swap(queue_);
  }
  for (Submission& submission : batch) run(submission);
}

void Engine::run(Submission& submission) {
  struct Visitor {
    void operator()(StartTask& s) const { s.task->start(); }
    void operator()(CancelTask& s) const {
      s.task->cancel();
      s.task->unref();
    }
    void operator()(ReleasePermit& s) const { s.permit->limiter->service->release(s.permit); }
    void operator()(SlotFreed& s) const { s.limiter->service->slot_freed(s.group); }
    void operator()(GiveBack& s) const {
      s.limiter->service->give_back(s.group, s.cost, s.charged, s.slot, s.permit);
    }
    void operator()(Run& s) const { s.work(); }
  };
  std::visit(Visitor{}, submission);
}

void Engine::shutdown() {
  if (forked()) return;
  {
    const std::lock_guard lock(submit_mutex_);
    if (closed_) return;
    closed_ = true;
    if (!started_) return;
  }
  // Shared with the I/O thread: a store that does not close in time must not find a dead promise.
  struct Closing {
    std::promise<void> all_closed;
    std::size_t left = 0;
  };
  auto closing = std::make_shared<Closing>();
  std::future<void> done = closing->all_closed.get_future();
  io_->post([this, closing] {
    drain();  // what was submitted before the end is still answered
    keeper_->shutdown();
    closing->left = stores_.size() + 1;
    const auto one_less = [closing] {
      if (--closing->left == 0) closing->all_closed.set_value();
    };
    for (auto& entry : stores_) entry->close(one_less);
    one_less();
  });
  (void)done.wait_for(kCloseBudget);
  io_->post([this] { timers_->stop(); });
  io_->stop();
}

void Engine::advance(Nanos by) {
  if (!clock_.manual() || forked()) return;
  clock_.advance(by);
  std::promise<void> fired;
  std::future<void> done = fired.get_future();
  if (!submit(Run{[this, &fired] {
        timers_->run_due();
        fired.set_value();
      }}))
    return;
  done.wait();
}

Nanos Engine::step(Nanos to, bool idle) {
  if (!clock_.manual() || forked()) return kForever;
  const Nanos now = clock_.now();
  if (to > now) clock_.advance(to - now);
  if (idle) return kForever;
  std::promise<Nanos> fired;
  std::future<Nanos> next = fired.get_future();
  if (!submit(Run{[this, &fired] {
        timers_->run_due();
        fired.set_value(timers_->next());
      }}))
    return kForever;
  return next.get();
}

void Engine::abandon_after_fork() {
  closed_ = true;
  for (auto& entry : stores_) entry->store->abandon_after_fork();
}

}  // namespace ratesync::engine
