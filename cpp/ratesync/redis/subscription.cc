#include "ratesync/redis/subscription.h"

#include <algorithm>
#include <utility>

#include "ratesync/redis/errors.h"
#include "ratesync/redis/wire.h"

namespace ratesync::redis {
namespace {

// A silent connection is asked whether it is alive after this long.
constexpr Nanos kQuiet = 10 * kSecond;

}  // namespace

Subscription::Subscription(asio::io_context& io, ConnectionOptions options)
    : io_(io),
      options_(std::make_shared<const ConnectionOptions>(std::move(options))),
      target_(options_->target),
      timer_(std::make_unique<asio::steady_timer>(io)) {}

Subscription::~Subscription() { close(); }

void Subscription::subscribe(const std::string& channel, Listener listener) {
  if (state_ == State::closed) return;
  const auto [at, is_new] = channels_.try_emplace(channel);
  at->second.listener = std::move(listener);
  if (state_ == State::idle) return connect();
  if (is_new && state_ == State::open) say(Command("SUBSCRIBE").add(channel));
}

bool Subscription::subscribed() const {
  return state_ == State::open && !channels_.empty() && confirmed_ == channels_.size();
}

void Subscription::retarget(net::StreamTarget target) {
  if (state_ == State::closed || target == target_) return;
  target_ = std::move(target);
  if (state_ == State::idle) return;
  ++attempt_;
  if (session_) session_->close();
  state_ = State::idle;
  if (!channels_.empty()) connect();
}

void Subscription::connect() {
  if (const Nanos now = clock_.now(); now < backoff_.retry_at()) return wait(backoff_.retry_at() - now);
  state_ = State::connecting;
  const std::uint64_t attempt = ++attempt_;
  if (!options_->locate) return open_session(target_);
  options_->locate([weak = weak_from_this(), attempt](Result<net::StreamTarget> found) {
    const auto self = weak.lock();
    if (!self || self->attempt_ != attempt || self->state_ != State::connecting) return;
    if (!found.ok()) return self->lose(found.status(), true);
    self->target_ = found.value();
    self->open_session(std::move(found.value()));
  });
}

void Subscription::open_session(net::StreamTarget target) {
  session_ = std::make_shared<Session>(io_, options_, std::move(target));
  Session::Handlers handlers;
  // The session is closed before we go, and calls nothing once closed.
  handlers.reply = [this](Reply reply) { received(std::move(reply)); };
  handlers.lost = [this](Status why) { lose(std::move(why)); };
  session_->open(std::move(handlers), [this](Status status) {
    if (!status.ok()) return lose(std::move(status), true);
    connected();
  });
}

void Subscription::connected() {
  state_ = State::open;
  ++connects_;
  confirmed_ = 0;
  unsent_.clear();
  write_busy_ = pinged_ = false;
  heard_at_ = clock_.now();
  Command command("SUBSCRIBE");
  for (auto& [name, channel] : channels_) {
    channel.confirmed = false;
    command.add(name);
  }
  say(command);
  wait(kQuiet);
}

void Subscription::say(const Command& command) {
  append_command(unsent_, {}, command);
  flush();
}

void Subscription::flush() {
  while (state_ == State::open && !write_busy_ && !unsent_.empty()) {
    writing_ = std::exchange(unsent_, {});
    write_busy_ = !session_->write(writing_, [weak = weak_from_this(), attempt = attempt_] {
      const auto self = weak.lock();
      if (!self || self->attempt_ != attempt) return;
      self->write_busy_ = false;
      self->flush();
    });
  }
}

void Subscription::received(Reply reply) {
  const auto held = shared_from_this();
  heard_at_ = clock_.now();
  pinged_ = false;
  if (reply.kind == Reply::Kind::error)
    return lose(from_server(reply.text, {target_.describe(), options_->user, "SUBSCRIBE"}), true);
  if (reply.kind != Reply::Kind::array || reply.items.size() < 2) return;
  const auto found = channels_.find(reply.items[1].text);
  if (found == channels_.end()) return;  // the answer to PING
  if (reply.items[0].text == "message" && reply.items.size() == 3) {
    const Listener listener = found->second.listener;  // it may change the channels
    listener(reply.items[2].text);
  } else if (reply.items[0].text == "subscribe" && !std::exchange(found->second.confirmed, true)) {
    if (++confirmed_ < channels_.size()) return;
    backoff_.connected(clock_.now());
    if (up_) up_();
  }
}

void Subscription::lose(Status why, bool refused) {
  if (state_ == State::closed) return;
  const auto held = shared_from_this();
  ++attempt_;
  if (session_) session_->close();
  session_.reset();
  state_ = State::idle;
  confirmed_ = 0;
  if (refused)
    backoff_.failed(std::move(why), clock_.now());
  else
    backoff_.lost(clock_.now());
  connect();
}

void Subscription::wait(Nanos time) {
  timer_->expires_after(std::chrono::nanoseconds(std::max<Nanos>(time, 0)));
  timer_->async_wait([weak = weak_from_this()](const asio::error_code& ec) {
    if (ec) return;
    if (const auto self = weak.lock()) self->tick();
  });
}

void Subscription::tick() {
  if (state_ == State::idle) return connect();
  if (state_ != State::open) return;
  const Nanos quiet = clock_.now() - heard_at_;
  if (quiet < kQuiet) return wait(kQuiet - quiet);
  if (std::exchange(pinged_, true))
    return lose(Status::make(Code::unavailable, "no answer from " + target_.describe() + " to PING"));
  say(Command("PING"));
  wait(options_->command_timeout);
}

void Subscription::close() {
  if (state_ == State::closed) return;
  state_ = State::closed;
  ++attempt_;
  timer_->cancel();
  if (session_) session_->close();
}

void Subscription::abandon_after_fork() {
  state_ = State::closed;
  if (session_) {
    session_->abandon_after_fork();
    (void)new std::shared_ptr<Session>(session_);
  }
  (void)timer_.release();
}

}  // namespace ratesync::redis
