#include "ratesync/redis/session.h"

#include <algorithm>
#include <utility>

#include "ratesync/base/format.h"
#include "ratesync/redis/errors.h"
#include "ratesync/redis/wire.h"

namespace ratesync::redis {
namespace {

// The server refuses blanks and control characters in names.
std::string client_name(std::string_view wanted) {
  std::string name(wanted.substr(0, 128));
  for (char& c : name)
    if (c < '!' || c > '~') c = '_';
  return name;
}

}  // namespace

Session::Session(asio::io_context& io, std::shared_ptr<const ConnectionOptions> options,
                 net::StreamTarget target)
    : options_(std::move(options)),
      target_(std::move(target)),
      stream_(net::Stream::create(io, target_)),
      timer_(std::make_unique<asio::steady_timer>(io)) {}

void Session::open(Handlers handlers, Done done) {
  handlers_ = std::move(handlers);
  opened_ = std::move(done);
  started_ = clock_.now();
  stream_->connect(options_->connect_timeout, [self = shared_from_this()](Status status) {
    if (!status.ok()) return self->finish_open(std::move(status));
    self->greet();
  });
}

void Session::greet() {
  const auto say = [this](Greeting greeting, const Command& command) {
    append_command(greeting_, {}, command);
    greetings_.push_back(greeting);
  };
  if (!options_->password.empty() || !options_->user.empty()) {
    Command auth("AUTH");
    if (!options_->user.empty()) auth.add(options_->user);
    say(Greeting::auth, auth.add(options_->password));
  }
  if (options_->db != 0) say(Greeting::select, Command("SELECT").add(std::int64_t{options_->db}));
  if (!options_->client_name.empty())
    say(Greeting::name, Command("CLIENT").add("SETNAME").add(client_name(options_->client_name)));
  if (options_->primary_only) say(Greeting::role, Command("ROLE"));
  // Last: its answer says that the server serves (not LOADING, not waiting for a password).
  say(Greeting::ping, Command("PING"));

  const Nanos left = saturating_add(started_, options_->connect_timeout) - clock_.now();
  timer_->expires_after(std::chrono::nanoseconds(std::max<Nanos>(left, 0)));
  timer_->async_wait([weak = weak_from_this()](const asio::error_code& ec) {
    const auto self = weak.lock();
    if (ec || !self || self->closed_ || !self->opened_) return;
    self->finish_open(Status::make(
        Code::unavailable,
        formatted("Redis at {} accepts connections and does not answer: gave up after {:.0f} ms",
                  self->peer(), static_cast<double>(self->clock_.now() - self->started_) / kMilli)));
  });
  read();
  greeting_written_ = write(greeting_, [this] {
    greeting_written_ = true;
    if (opened_ && answered_ == greetings_.size()) finish_open(Status::success());
  });
}

void Session::read() {
  stream_->read(input_.data(), input_.size(), [self = shared_from_this()](Status status, std::size_t n) {
    if (self->closed_) return;
    if (!status.ok()) return self->fail(std::move(status));
    self->received(n);
  });
}

void Session::received(std::size_t size) {
  bool sound = reader_.feed(input_.data(), size);
  Reply reply;
  while (sound) {
    const Reader::Step step = reader_.next(reply);
    if (step == Reader::Step::more) break;
    sound = step == Reader::Step::reply;
    if (!sound) break;
    if (opened_)
      greeted(std::move(reply));
    else
      handlers_.reply(std::move(reply));
    if (closed_) return;
  }
  if (!sound)
    return fail(Status::make(
        Code::protocol,
        formatted("{} does not speak the Redis protocol: {}. Check host and port, and whether it wants "
                  "TLS (rediss://).",
                  peer(), reader_.error())));
  if (!opened_ && handlers_.drained) handlers_.drained();
  if (!closed_) read();
}

void Session::greeted(Reply reply) {
  const Greeting greeting = greetings_[std::min(answered_++, greetings_.size() - 1)];
  if (reply.kind == Reply::Kind::error) {
    // Without the right to say its name, ask for the role or ping, or where a proxy does not know
    // these, work is possible all the same.
    const bool courtesy =
        greeting == Greeting::name || greeting == Greeting::role || greeting == Greeting::ping;
    const std::string_view kind = kind_of(reply.text);
    const bool forgivable = courtesy && (kind == "NOPERM" || (kind == "ERR" && greeting != Greeting::ping));
    if (!forgivable) return finish_open(from_server(reply.text, {peer(), options_->user, {}}));
  } else if (greeting == Greeting::role) {
    if (Status status = check_role(reply); !status.ok()) return finish_open(std::move(status));
  }
  if (greeting_written_ && answered_ == greetings_.size()) finish_open(Status::success());
}

Status Session::check_role(const Reply& role) const {
  if (role.kind != Reply::Kind::array || role.items.empty() || role.items[0].text == "master")
    return Status::success();
  return Status::make(Code::unavailable,
                      formatted("Redis at {} is a {}, not a primary: name the primary in the url, or use "
                                "redis+sentinel:// to have it found.",
                                peer(), role.items[0].text == "slave" ? "replica" : role.items[0].text));
}

bool Session::write(std::string_view bytes, std::function<void()> done) {
  return stream_->write(bytes, [self = shared_from_this(), done = std::move(done)](Status status) {
    if (!self->closed_ && status.ok()) done();
  });
}

void Session::finish_open(Status status) {
  const auto held = shared_from_this();
  timer_->cancel();
  const Done done = std::exchange(opened_, nullptr);
  if (!status.ok()) close();
  if (done) done(std::move(status));
}

void Session::fail(Status status) {
  if (opened_) return finish_open(std::move(status));
  const auto held = shared_from_this();
  const auto lost = std::move(handlers_.lost);
  close();
  if (lost) lost(std::move(status));
}

void Session::close() {
  if (closed_) return;
  closed_ = true;
  timer_->cancel();
  stream_->close();
}

void Session::abandon_after_fork() {
  closed_ = true;
  stream_->abandon_after_fork();
  (void)timer_.release();
}

}  // namespace ratesync::redis
