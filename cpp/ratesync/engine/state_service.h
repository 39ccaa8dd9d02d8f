// Operations on state on their way through a store: deadlines, cancelling, and the end - what a StateStore
// does not do. One service per prefix of a store; all methods run on the I/O thread unless said otherwise.
//
// The life of an operation:
//
//   start ─► in the store ─► answered ──────────────────────────────────────────► finished
//                         ├─► deadline ─┬─ not sent: taken back, Code::timeout ──► finished
//                         │             └─ sent: a little patience, the store knows more; then Code::in_doubt
//                         │                (a read: Code::timeout) ──────────────► finished
//                         └─► cancelled, closed: taken back, or the answer will be read and dropped
//
// An operation that is finished while the store still has it is kept alive until the store is through with
// it; whoever reads the result does not look at the reply then, but at `failure`.
#pragma once

#include <atomic>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "ratesync/engine/completion.h"
#include "ratesync/engine/timers.h"
#include "ratesync/store/store.h"

namespace ratesync::engine {

class StateService;

// Something that the store has, among others that it has. A ring; alone when linked to itself.
class InStore {
 public:
  InStore() = default;
  InStore(const InStore&) = delete;
  InStore& operator=(const InStore&) = delete;

 protected:
  virtual ~InStore() = default;
  static const Status& no_answer();  // of what changes nothing
  void unlink() {
    previous_->next_ = next_;
    next_->previous_ = previous_;
    previous_ = next_ = this;
  }

 private:
  friend class StateService;
  // No answer by the deadline, or none is waited for any more: fails what can be taken back with `unsent`
  // and, if `all`, the rest with `sent`. True: finished.
  virtual bool give_up(const Status& unsent, const Status& sent, bool all) = 0;
  void link_before(InStore& other) {
    previous_ = other.previous_;
    next_ = &other;
    previous_->next_ = next_->previous_ = this;
  }
  InStore* previous_ = this;
  InStore* next_ = this;
  Nanos until_ = kForever;  // when it is looked after
  bool overdue_ = false;    // what had not been sent was taken back; the patience runs
};

// One operation.
class StateTask final : public Acquisition, public store::StateOp, public InStore {
 public:
  explicit StateTask(StateService& service) : service_(service) {}
  void start() override;
  void cancel() override;
  void done() override;        // from the store
  void orphaned() override {}  // what was written stays written
  // After delivery. Not ok: `reply` must not be looked at.
  [[nodiscard]] const Status& status() const { return failure_.ok() ? reply.status : failure_; }

 private:
  friend class StateService;
  ~StateTask() override = default;
  bool give_up(const Status& unsent, const Status& sent, bool all) override;
  void finish();

  StateService& service_;
  enum class State : std::uint8_t { created, in_store, finished } state_ = State::created;
  Status failure_;
};

// Several operations in one call. Atomic: one StateBatch. Otherwise each for itself, submitted in order.
class StateManyTask final : public Acquisition, public store::StateBatch, public InStore {
 public:
  class Part final : public store::StateOp {
   public:
    explicit Part(StateManyTask& whole) : whole_(whole) {}
    void done() override { whole_.part_done(*this); }
    [[nodiscard]] const Status& status() const { return failure_.ok() ? reply.status : failure_; }

   private:
    friend class StateManyTask;
    StateManyTask& whole_;
    bool in_store_ = false;
    Status failure_;
  };

  StateManyTask(StateService& service, bool is_atomic) : atomic(is_atomic), service_(service) {}
  Part& add();
  void start() override;
  void cancel() override;
  void done() override;  // from the store: the batch
  void orphaned() override {}
  // After delivery. Of the whole call; not ok: the parts do not count.
  [[nodiscard]] const Status& failure() const { return failure_.ok() ? status : failure_; }

  const bool atomic;
  std::deque<Part> parts;

 private:
  friend class StateService;
  ~StateManyTask() override = default;
  void part_done(Part& part);
  bool give_up(const Status& unsent, const Status& sent, bool all) override;
  void finish();

  StateService& service_;
  enum class State : std::uint8_t { created, in_store, finished } state_ = State::created;
  std::size_t left_ = 0;  // parts that the store has
  Status failure_;
};

// What a store was asked that cannot be taken back: pages of a scan, due timeouts. Keeps itself alive until
// it is finished; an answer that comes later is dropped.
template <class T>
class StateQuestion final : public InStore {
 public:
  explicit StateQuestion(bool changes, store::Callback<T> done) : changes_(changes), done_(std::move(done)) {}
  void answer(Result<T> result) {
    if (!done_) return;
    unlink();
    const std::shared_ptr<StateQuestion> last = std::move(self);
    std::exchange(done_, nullptr)(std::move(result));
  }
  std::shared_ptr<StateQuestion> self;

 private:
  bool give_up(const Status&, const Status& sent, bool all) override {
    if (!all) return false;
    answer(changes_ || sent.code != Code::in_doubt ? sent : no_answer());
    return true;
  }
  const bool changes_;
  store::Callback<T> done_;
};

class StateService final : public TimerNode {
 public:
  StateService(store::StateStore& store, Timers& timers) : store_(store), timers_(timers) {}
  ~StateService() override { timers_.cancel(*this); }

  // Lets `work` ask the store, and answers by `done` exactly once, within the timeout.
  template <class T>
  void ask(Nanos timeout, bool changes, const std::function<void(store::Callback<T>)>& work,
           store::Callback<T> done) {
    if (closing()) return done(gone());
    auto question = std::make_shared<StateQuestion<T>>(changes, std::move(done));
    question->self = question;
    watch(*question, saturating_add(timers_.now(), timeout));
    work([question](Result<T> result) { question->answer(std::move(result)); });
  }
  void shutdown();  // everything under way is answered with Code::closed
  void fire() override;

  [[nodiscard]] store::StateStore& store() { return store_; }
  [[nodiscard]] bool closing() const { return closing_.load(std::memory_order_relaxed); }  // any thread
  [[nodiscard]] std::size_t in_store() const;                                              // for tests

 private:
  friend class StateTask;
  friend class StateManyTask;
  friend class StateServices;

  static Status gone();
  void watch(InStore& what, Nanos deadline);
  void look_after(InStore& what, Nanos now);
  void arm(Nanos at);

  store::StateStore& store_;
  Timers& timers_;
  struct Ring final : InStore {
    bool give_up(const Status&, const Status&, bool) override { return false; }
  };
  Ring ring_;  // in order of submission
  Nanos armed_for_ = kForever;
  std::atomic<bool> closing_{false};
};

// The services of a store, by prefix.
class StateServices {
 public:
  StateServices(store::Store& store, Timers& timers) : store_(store), timers_(timers) {}

  // Any thread, no I/O. It lives as long as the store.
  Result<StateService*> get(const std::string& prefix);
  void shutdown();

 private:
  store::Store& store_;
  Timers& timers_;
  std::mutex mutex_;  // guards services_ and closing_
  std::map<std::string, std::unique_ptr<StateService>> services_;
  bool closing_ = false;
};

}  // namespace ratesync::engine
