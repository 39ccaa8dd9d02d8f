#include "ratesync/postgres/listener.h"

#include <algorithm>
#include <chrono>
#include <utility>

namespace ratesync::postgres {
namespace {

constexpr Nanos kIdle = 30 * kSecond;         // kept open this long after the last waiter
constexpr Nanos kProbeTimeout = 2 * kSecond;  // a notice to ourselves comes back sooner
constexpr Nanos kHeartbeat = 20 * kSecond;    // a connection that died silently is noticed
constexpr Nanos kFirstPause = kSecond / 4;
constexpr Nanos kLongestPause = 15 * kSecond;
constexpr Nanos kDeafPause = 300 * kSecond;       // behind a pooler nothing gets better by itself
constexpr const char* kProbePrefix = "\nprobe ";  // no group: those are told with a '=' before them

const Statement kAlive{"", "SELECT 1"};

}  // namespace

Listener::Listener(asio::io_context& io, const Clock& clock, ConnInfo info, ConnectionOptions options,
                   std::string channel, Hooks hooks)
    : io_(io),
      clock_(clock),
      info_(std::move(info)),
      options_(std::move(options)),
      channel_(std::move(channel)),
      listen_{"", "LISTEN " + quote_identifier(channel_)},
      hooks_(std::move(hooks)),
      timer_(std::make_unique<asio::steady_timer>(io)) {}

Listener::~Listener() { *alive_ = false; }

void Listener::want(bool somebody_waits) {
  if (closed_ || wanted_ == somebody_waits) return;
  wanted_ = somebody_waits;
  if (!wanted_) {
    idle_since_ = clock_.now();
    if (state_ == State::active) arm(kIdle);
    return;
  }
  if (state_ != State::off) return;
  // Between attempts the timer goes off by itself.
  if (pause_ == 0) connect();
}

void Listener::connect() {
  state_ = State::connecting;
  connection_ = Connection::create(io_, info_, options_);
  connection_->connect([this, alive = alive_, attempt = ++attempt_](const Status& status) {
    if (!*alive || attempt != attempt_) return;
    if (!status.ok()) return lost();
    listen();
  });
}

void Listener::listen() {
  const std::uint64_t attempt = attempt_;
  connection_->on_broken([this, alive = alive_, attempt](const Status&) {
    if (*alive && attempt == attempt_) lost();
  });
  connection_->on_notice([this, alive = alive_, attempt](const std::string&, const std::string& payload) {
    if (*alive && attempt == attempt_) heard(payload);
  });
  std::vector<Call> calls;
  calls.push_back({&listen_, {}});
  connection_->run(std::move(calls), [this, alive = alive_, attempt](const PipelineResult& result) {
    if (!*alive || attempt != attempt_) return;
    if (!result.status.ok()) return lost();
    state_ = State::probing;
    probe_ = kProbePrefix + std::to_string(attempt_);
    arm(kProbeTimeout);
    hooks_.probe(channel_, probe_);
  });
}

void Listener::heard(const std::string& payload) {
  if (state_ == State::probing && payload == probe_) {
    state_ = State::active;
    deaf_ = false;
    pause_ = 0;
    arm(kHeartbeat);
    return hooks_.back();
  }
  if (payload.starts_with('=')) hooks_.freed(payload.substr(1));
}

void Listener::lost() {
  drop();
  if (closed_) return;
  pause_ = deaf_ ? kDeafPause : std::clamp(2 * pause_, kFirstPause, kLongestPause);
  arm(pause_);
}

void Listener::drop() {
  ++attempt_;
  state_ = State::off;
  if (connection_) std::exchange(connection_, nullptr)->close();
}

void Listener::arm(Nanos in) {
  timer_->expires_after(std::chrono::nanoseconds(in));
  timer_->async_wait([this, alive = alive_](const asio::error_code& error) {
    if (*alive && !error) on_timer();
  });
}

void Listener::on_timer() {
  switch (state_) {
    case State::off:
      pause_ = std::max<Nanos>(pause_, 1);
      if (wanted_) return connect();
      pause_ = 0;
      return;
    case State::connecting: return;
    case State::probing: deaf_ = true; return lost();
    case State::active: break;
  }
  if (!wanted_ && clock_.now() - idle_since_ >= kIdle) return drop();
  std::vector<Call> calls;
  calls.push_back({&kAlive, {}});
  connection_->run(std::move(calls),
                   [this, alive = alive_, attempt = attempt_](const PipelineResult& result) {
                     if (!*alive || attempt != attempt_) return;
                     if (!result.status.ok()) return lost();
                     arm(kHeartbeat);
                   });
}

void Listener::close() {
  closed_ = true;
  timer_->cancel();
  drop();
}

void Listener::abandon_after_fork() {
  if (connection_) {
    connection_->abandon_after_fork();
    new std::shared_ptr<Connection>(connection_);
  }
  (void)timer_.release();
}

void notify(PgPool& pool, const std::shared_ptr<bool>& alive, const std::string& channel,
            const std::string& payload) {
  static const Statement statement{"ratesync_notify", "SELECT pg_notify($1, $2)"};
  pool.get([&pool, alive, channel, payload](Result<PgPool::Lease> got) {
    if (!*alive || !got.ok()) return;
    const PgPool::Lease connection = got.value();
    std::vector<Call> calls;
    calls.push_back({&statement, {Param::text(channel), Param::text(payload)}});
    connection->run(std::move(calls), [&pool, alive, connection](const PipelineResult&) {
      if (*alive) pool.put(connection);
    });
  });
}

}  // namespace ratesync::postgres
