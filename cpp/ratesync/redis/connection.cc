#include "ratesync/redis/connection.h"

#include <algorithm>
#include <asio/post.hpp>
#include <asio/steady_timer.hpp>
#include <utility>
#include <vector>

#include "ratesync/base/format.h"
#include "ratesync/redis/backoff.h"
#include "ratesync/redis/outbox.h"
#include "ratesync/redis/session.h"

namespace ratesync::redis {
namespace {

// Expired commands are looked for in a scan of all that wait: no more often than this.
constexpr Nanos kScanPause = 5 * kMilli;
// How long a connection that is to be replaced may take to answer what was sent.
constexpr Nanos kRetireGrace = 500 * kMilli;

class Multiplexed final : public Connection {
 public:
  Multiplexed(asio::io_context& io, const Clock& clock, ConnectionOptions options)
      : io_(io),
        clock_(clock),
        options_(std::make_shared<const ConnectionOptions>(std::move(options))),
        target_(options_->target),
        timer_(std::make_unique<asio::steady_timer>(io)),
        finish_timer_(std::make_unique<asio::steady_timer>(io)) {}
  ~Multiplexed() override { shut(Status::make(Code::closed, "the connection was let go")); }

  void connect(Done done) override;
  void send(const Command& command, Nanos deadline, ReplyCallback done) override {
    send({}, command, deadline, std::move(done));
  }
  void send(std::initializer_list<std::string_view> head, const Command& rest, Nanos deadline,
            ReplyCallback done) override;
  void on_up(std::function<void()> listener) override { up_.push_back(std::move(listener)); }
  void on_lost(std::function<void(const Status&)> listener) override { lost_.push_back(std::move(listener)); }
  void keep_open(bool keep) override;
  void drop(Status why) override;
  void retarget(net::StreamTarget target) override;
  void close(Status why) override { shut(std::move(why)); }
  void finish(Nanos grace, std::function<void()> done) override;
  void abandon_after_fork() override;

  [[nodiscard]] bool open() const override { return state_ == State::open; }
  [[nodiscard]] bool down() const override { return state_ != State::open && backoff_.down(); }
  [[nodiscard]] std::size_t pending() const override { return outbox_.size(); }
  [[nodiscard]] std::uint64_t reconnects() const override { return connects_ > 0 ? connects_ - 1 : 0; }
  [[nodiscard]] std::uint64_t commands() const override { return commands_; }
  [[nodiscard]] std::uint64_t writes() const override { return writes_; }
  [[nodiscard]] std::string peer() const override { return target_.describe(); }

 private:
  enum class State : std::uint8_t { idle, connecting, open, closed };

  std::shared_ptr<Multiplexed> self() { return std::static_pointer_cast<Multiplexed>(shared_from_this()); }
  std::weak_ptr<Multiplexed> weak() { return self(); }

  [[nodiscard]] Status refusal() const;
  void kick();
  void begin_connect();
  void open_session(net::StreamTarget target);
  void connected();
  void connect_failed(Status why);
  void flush();
  void post_flush();
  void on_reply(Reply reply);
  void on_drained();
  void lose(Status why);
  void retire(Status why);
  void shut(Status why);
  void end_finish();
  void expire();
  void tick();
  void schedule();
  void answer_later(std::vector<ReplyCallback> calls, Status status);
  static void answer(std::vector<ReplyCallback>& calls, const Status& status);
  // Waiting commands, a caller of connect(), or the probing of a server that is down.
  [[nodiscard]] bool wanted() const {
    return outbox_.size() > 0 || !connecting_.empty() || keep_open_ || backoff_.down();
  }
  [[nodiscard]] bool can_write() const { return state_ == State::open && !write_busy_ && !retiring_; }

  asio::io_context& io_;
  const Clock& clock_;  // the engine's: of deadlines
  const Clock real_;    // of everything else
  const std::shared_ptr<const ConnectionOptions> options_;
  net::StreamTarget target_;
  State state_ = State::idle;
  Backoff backoff_;
  Outbox outbox_;
  std::shared_ptr<Session> session_;
  std::uint64_t attempt_ = 0;  // of connecting: answers to an earlier one are stale
  bool write_busy_ = false;
  bool flush_posted_ = false;
  bool in_replies_ = false;  // what callbacks send leaves after the last of them
  bool retiring_ = false;    // answers are still read, nothing more is sent
  bool keep_open_ = false;
  Status retire_why_;
  Nanos retire_at_ = kForever;
  std::unique_ptr<asio::steady_timer> timer_;  // behind pointers: leaked after fork
  Nanos armed_ = kForever;
  std::unique_ptr<asio::steady_timer> finish_timer_;
  bool finishing_ = false;
  std::function<void()> finished_;
  std::vector<Done> connecting_;  // callers of connect()
  std::vector<std::function<void()>> up_;
  std::vector<std::function<void(const Status&)>> lost_;
  std::uint64_t connects_ = 0;
  std::uint64_t commands_ = 0;
  std::uint64_t writes_ = 0;
};

// --- sending ------------------------------------------------------------------------------------------

Status Multiplexed::refusal() const {
  if (state_ == State::closed || finishing_)
    return Status::make(Code::closed, formatted("the connection to Redis at {} was closed", peer()));
  if (down())
    return Status::make(
        Code::unavailable,
        formatted("Redis is down, calls fail at once until it is back: {}", backoff_.last_error().message),
        backoff_.last_error().sqlstate);
  if (outbox_.size() >= options_->max_pending || outbox_.unsent_bytes() >= options_->max_pending_bytes)
    return Status::make(
        Code::exhausted,
        formatted("too many commands wait for Redis at {}: {} ({} not sent, {} bytes; the bounds are {} "
                  "commands, {} bytes). The server is slower than this process asks.",
                  peer(), outbox_.size(), outbox_.unsent(), outbox_.unsent_bytes(), options_->max_pending,
                  options_->max_pending_bytes));
  return Status::success();
}

void Multiplexed::send(std::initializer_list<std::string_view> head, const Command& rest, Nanos deadline,
                       ReplyCallback done) {
  if (Status refused = refusal(); !refused.ok()) {
    std::vector<ReplyCallback> one;
    one.push_back(std::move(done));
    return answer_later(std::move(one), std::move(refused));
  }
  outbox_.push(head, rest, deadline, std::move(done));
  if (in_replies_) return;
  if (!can_write()) return kick();
  if (outbox_.size() == 1) return flush();  // alone: now
  post_flush();
}

void Multiplexed::post_flush() {
  if (std::exchange(flush_posted_, true)) return;
  asio::post(io_, [weak = weak()] {
    const auto me = weak.lock();
    if (!me) return;
    me->flush_posted_ = false;
    me->flush();
  });
}

void Multiplexed::flush() {
  if (!can_write() || outbox_.unsent() == 0) return;
  const Nanos now = real_.now();
  while (outbox_.unsent() > 0 && !write_busy_) {
    const std::size_t before = outbox_.sent();
    const std::string_view bytes = outbox_.take(now);
    commands_ += outbox_.sent() - before;
    ++writes_;
    write_busy_ = !session_->write(bytes, [weak = weak(), attempt = attempt_] {
      const auto me = weak.lock();
      if (!me || me->attempt_ != attempt) return;
      me->write_busy_ = false;
      me->flush();
    });
  }
  schedule();
}

// Nothing of `this` may be touched after the callback: it may have let go of us.
void Multiplexed::on_reply(Reply reply) {
  if (outbox_.sent() == 0)
    return lose(Status::make(Code::protocol, formatted("{} answered what was not asked", peer())));
  in_replies_ = true;
  const ReplyCallback done = outbox_.answered();
  done(std::move(reply));
}

void Multiplexed::on_drained() {
  in_replies_ = false;
  if (finishing_ && outbox_.size() == 0) return end_finish();
  if (retiring_ && outbox_.sent() == 0) return lose(retire_why_);
  flush();
}

// --- connecting ---------------------------------------------------------------------------------------

void Multiplexed::connect(Done done) {
  if (state_ == State::open || state_ == State::closed) {
    Status status = state_ == State::open ? Status::success() : refusal();
    asio::post(io_, [done = std::move(done), status = std::move(status)] { done(status); });
    return;
  }
  connecting_.push_back(std::move(done));
  kick();
}

void Multiplexed::keep_open(bool keep) {
  keep_open_ = keep;
  if (keep) kick();
}

// Connects when it is time to, or arms the timer for it.
void Multiplexed::kick() {
  if (state_ == State::idle && wanted() && real_.now() >= backoff_.retry_at()) begin_connect();
  schedule();
}

void Multiplexed::begin_connect() {
  state_ = State::connecting;
  const std::uint64_t attempt = ++attempt_;
  if (!options_->locate) return open_session(target_);
  options_->locate([weak = weak(), attempt](Result<net::StreamTarget> found) {
    const auto me = weak.lock();
    if (!me || me->attempt_ != attempt || me->state_ != State::connecting) return;
    if (!found.ok()) return me->connect_failed(found.status());
    me->target_ = found.value();
    me->open_session(std::move(found.value()));
  });
}

void Multiplexed::open_session(net::StreamTarget target) {
  session_ = std::make_shared<Session>(io_, options_, std::move(target));
  Session::Handlers handlers;
  // The session is closed before we go, and calls nothing once closed.
  handlers.reply = [this](Reply reply) { on_reply(std::move(reply)); };
  handlers.drained = [this] { on_drained(); };
  handlers.lost = [this](Status why) { lose(std::move(why)); };
  session_->open(std::move(handlers), [this](Status status) {
    if (status.ok())
      connected();
    else
      connect_failed(std::move(status));
  });
}

void Multiplexed::connected() {
  const auto held = self();
  state_ = State::open;
  ++connects_;
  backoff_.connected(real_.now());
  const auto waiters = std::exchange(connecting_, {});
  for (std::size_t i = 0; i < up_.size(); ++i) up_[i]();
  for (const Done& done : waiters) done(Status::success());
  flush();
}

void Multiplexed::connect_failed(Status why) {
  const auto held = self();
  state_ = State::idle;
  ++attempt_;
  session_.reset();
  backoff_.failed(why, real_.now());
  // A refusal will not go away while we wait, a server that is down may take its time.
  std::vector<ReplyCallback> hopeless;
  if (backoff_.refused() || backoff_.down() || finishing_) hopeless = outbox_.take_unsent();
  const auto waiters = std::exchange(connecting_, {});
  for (std::size_t i = 0; i < lost_.size(); ++i) lost_[i](why);
  for (const Done& done : waiters) done(why);
  answer(hopeless, why);
  if (finishing_ && state_ != State::closed) return end_finish();
  kick();
}

// --- losing -------------------------------------------------------------------------------------------

void Multiplexed::lose(Status why) {
  if (state_ != State::open) return;
  const auto held = self();
  state_ = State::idle;
  ++attempt_;
  session_->close();
  session_.reset();
  write_busy_ = in_replies_ = retiring_ = false;
  retire_at_ = kForever;
  backoff_.lost(real_.now());
  std::vector<ReplyCallback> sent = outbox_.take_sent();
  answer(sent, Status::make(Code::in_doubt, formatted("the connection to Redis at {} was lost before the "
                                                      "answer came, the command may have been executed: {}",
                                                      peer(), why.message)));
  for (std::size_t i = 0; i < lost_.size(); ++i) lost_[i](why);
  if (finishing_ && state_ != State::closed) return end_finish();
  kick();
}

void Multiplexed::drop(Status why) {
  if (state_ == State::open) retire(std::move(why));
}

void Multiplexed::retire(Status why) {
  if (std::exchange(retiring_, true)) return;
  retire_why_ = std::move(why);
  retire_at_ = real_.now() + (outbox_.sent() > 0 ? kRetireGrace : 0);
  schedule();
}

void Multiplexed::retarget(net::StreamTarget target) {
  if (target == target_) return;
  target_ = std::move(target);
  if (state_ == State::open) {
    retire(Status::make(Code::unavailable, "the primary is now at " + peer()));
  } else if (state_ == State::connecting && session_) {
    ++attempt_;
    session_->close();
    open_session(target_);
  } else if (state_ == State::idle) {
    backoff_.hurry();
    kick();
  }
}

void Multiplexed::shut(Status why) {
  if (state_ == State::closed) return;
  state_ = State::closed;
  ++attempt_;
  timer_->cancel();
  finish_timer_->cancel();
  if (session_) session_->close();
  answer_later(
      outbox_.take_sent(),
      Status::make(Code::in_doubt,
                   formatted("the connection to Redis at {} was closed before the answer came", peer())));
  answer_later(outbox_.take_unsent(), why);
  for (Done& done : connecting_) asio::post(io_, [done = std::move(done), why] { done(why); });
  connecting_.clear();
}

void Multiplexed::finish(Nanos grace, std::function<void()> done) {
  finishing_ = true;
  finished_ = std::move(done);
  keep_open_ = false;
  if (state_ != State::open || outbox_.size() == 0) {
    asio::post(io_, [held = self()] { held->end_finish(); });
    return;
  }
  finish_timer_->expires_after(std::chrono::nanoseconds(grace));
  finish_timer_->async_wait([weak = weak()](const asio::error_code& ec) {
    if (const auto me = weak.lock(); me && !ec) me->end_finish();
  });
}

void Multiplexed::end_finish() {
  const auto held = self();
  shut(Status::make(Code::closed, formatted("the connection to Redis at {} was closed", peer())));
  // Behind the answers that shut() posted.
  if (finished_) asio::post(io_, std::exchange(finished_, nullptr));
}

void Multiplexed::abandon_after_fork() {
  state_ = State::closed;
  if (session_) {
    session_->abandon_after_fork();
    (void)new std::shared_ptr<Session>(session_);
  }
  (void)timer_.release();
  (void)finish_timer_.release();
}

// --- time ---------------------------------------------------------------------------------------------

void Multiplexed::tick() {
  armed_ = kForever;
  const auto held = self();
  const Nanos now = real_.now();
  if (state_ == State::open) {
    const Nanos sent_at = outbox_.oldest_sent_at();
    if (retire_at_ <= now)
      lose(retire_why_);
    else if (sent_at != kForever && saturating_add(sent_at, options_->command_timeout) <= now)
      lose(Status::make(Code::unavailable,
                        formatted("no answer within {} ms (socket_timeout), {} commands waited for one",
                                  options_->command_timeout / kMilli, outbox_.sent())));
  }
  expire();
  kick();
}

void Multiplexed::expire() {
  if (outbox_.next_deadline() > clock_.now()) return;
  std::vector<ReplyCallback> late = outbox_.take_expired(clock_.now());
  if (late.empty()) return;
  std::string why = state_ == State::open ? "the server does not read" : "no connection";
  if (!backoff_.last_error().ok()) why = backoff_.last_error().message;
  answer(late,
         Status::make(Code::timeout, formatted("could not send to Redis at {} in time ({} commands): {}",
                                               peer(), late.size(), why)));
}

// One timer for all: it stays armed for the earliest moment that was ever asked for, and looks again
// when it goes off. So a command costs no timer operation.
void Multiplexed::schedule() {
  if (state_ == State::closed) return;
  const Nanos now = real_.now();
  Nanos at = retire_at_;
  if (outbox_.sent() > 0)
    at = std::min(at, saturating_add(outbox_.oldest_sent_at(), options_->command_timeout));
  if (outbox_.unsent() > 0 && !can_write()) {
    const Nanos left = outbox_.next_deadline() - clock_.now();
    at = std::min(at, saturating_add(now, std::max(left, kScanPause)));
  }
  if (state_ == State::idle && wanted()) at = std::min(at, backoff_.retry_at());
  if (at >= armed_) return;
  armed_ = at;
  timer_->expires_after(std::chrono::nanoseconds(std::max<Nanos>(at - now, 0)));
  timer_->async_wait([weak = weak()](const asio::error_code& ec) {
    if (ec) return;
    if (const auto me = weak.lock(); me && me->state_ != State::closed) me->tick();
  });
}

void Multiplexed::answer(std::vector<ReplyCallback>& calls, const Status& status) {
  for (const ReplyCallback& done : calls) done(status);
}

void Multiplexed::answer_later(std::vector<ReplyCallback> calls, Status status) {
  if (calls.empty()) return;
  asio::post(io_, [calls = std::make_shared<std::vector<ReplyCallback>>(std::move(calls)),
                   status = std::move(status)] { answer(*calls, status); });
}

}  // namespace

std::shared_ptr<Connection> Connection::create(asio::io_context& io, const Clock& clock,
                                               ConnectionOptions options) {
  return std::make_shared<Multiplexed>(io, clock, std::move(options));
}

}  // namespace ratesync::redis
