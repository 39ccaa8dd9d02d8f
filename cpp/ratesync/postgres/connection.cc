#include "ratesync/postgres/connection.h"

#include <algorithm>
#include <asio/post.hpp>
#include <asio/steady_timer.hpp>

#include "ratesync/base/format.h"
#include "ratesync/postgres/connector.h"
#include "ratesync/postgres/errors.h"
#include "ratesync/postgres/libpq.h"
#include "ratesync/postgres/pipeline.h"

namespace ratesync::postgres {
namespace {

// The timeline changes with every failover.
const Statement kBackend{"", R"(
SELECT a.pid, (date_part('epoch', a.backend_start) * 1000000)::int8,
       CASE WHEN pg_is_in_recovery() THEN '' ELSE left(pg_walfile_name(pg_current_wal_lsn()), 8) END
FROM pg_stat_get_activity(pg_backend_pid()) AS a)"};

class PgConnection final : public Connection {
 public:
  PgConnection(asio::io_context& io, ConnInfo info, ConnectionOptions options)
      : io_(io),
        info_(std::move(info)),
        options_(std::move(options)),
        timer_(std::make_unique<asio::steady_timer>(io)) {}
  ~PgConnection() override = default;  // link_ lets go of the descriptor before PQfinish

  void connect(Done done) override;
  void run(std::vector<Call> calls, PipelineDone done) override;
  void run_script(std::string sql, Done done) override;
  void close() override;
  void abandon_after_fork() override;

  [[nodiscard]] bool open() const override { return state_ == State::idle || state_ == State::working; }
  [[nodiscard]] int server_version() const override { return server_version_; }
  [[nodiscard]] bool named_statements() const override { return names_.allowed; }
  [[nodiscard]] const Backend& backend() const override { return backend_; }
  [[nodiscard]] std::string peer() const override;
  void on_broken(std::function<void(Status)> listener) override { broken_ = std::move(listener); }
  void on_notice(std::function<void(const std::string&, const std::string&)> listener) override {
    noticed_ = std::move(listener);
  }

 private:
  enum class State : std::uint8_t { fresh, connecting, idle, working, closed };
  // What occupies the connection. `keep` holds the connection alive until the answer is given.
  struct Work {
    std::unique_ptr<Pipeline> pipeline;  // or a script:
    std::string script;
    Status script_error;
    bool rolling_back = false;
    bool committing = false;  // the Sync, or the script, may have left: a loss is in doubt
    Nanos timeout = 0;
    Nanos started = 0;
    PipelineDone done;
    std::shared_ptr<Connection> keep;
  };

  std::shared_ptr<PgConnection> self() { return std::static_pointer_cast<PgConnection>(shared_from_this()); }
  void established(Established session);
  void learn_pooler();
  void finish_connect(Status status);

  void refuse_nul(std::size_t call, PipelineDone done);
  void begin(std::unique_ptr<Work> work);
  bool send();
  void flush();
  void watch();
  void on_readable();
  void take_results(bool readable);
  void take_script_results(bool readable);
  void idle_input(bool readable);
  void take_notices();
  void arm(Nanos deadline);
  void on_timer();
  void finish_work(PipelineResult result, bool readable);
  void lose(std::string reason, std::string sqlstate = {});
  void drop(bool doomed);
  [[nodiscard]] std::string reason_of_libpq() const;

  asio::io_context& io_;
  const ConnInfo info_;
  const ConnectionOptions options_;
  State state_ = State::fresh;
  std::shared_ptr<Connector> connector_;
  std::unique_ptr<Link> link_;
  ErrorContext context_;
  StatementNames names_;
  int server_version_ = 0;
  Backend backend_;
  std::unique_ptr<Work> work_;
  bool write_wait_ = false;
  std::unique_ptr<asio::steady_timer> timer_;  // behind a pointer: leaked after fork
  Nanos timer_at_ = kForever;                  // when it goes off; kForever: not armed
  bool closed_by_us_ = false;
  Done connected_;
  std::shared_ptr<Connection> keep_connecting_;
  std::function<void(Status)> broken_;
  std::function<void(const std::string&, const std::string&)> noticed_;
};

std::string PgConnection::peer() const {
  if (context_.host.empty() && context_.port.empty()) return info_.describe();
  return formatted("{}:{}/{}", context_.host.empty() ? "local socket" : context_.host, context_.port,
                   context_.database);
}

void PgConnection::connect(Done done) {
  if (state_ != State::fresh) {
    asio::post(io_, [done = std::move(done)] {
      done(Status::make(Code::internal, "connect() was called twice on one connection"));
    });
    return;
  }
  state_ = State::connecting;
  connected_ = std::move(done);
  keep_connecting_ = shared_from_this();
  connector_ = std::make_shared<Connector>(io_, info_, options_);
  connector_->start([this](Result<Established> result) {
    const auto held = self();
    connector_.reset();
    if (!result.ok()) {
      state_ = State::closed;
      return finish_connect(result.status());
    }
    established(std::move(result.value()));
  });
}

void PgConnection::established(Established session) {
  link_ = std::move(session.link);
  context_ = std::move(session.context);
  PGconn* pg = link_->pg();
  server_version_ = PQserverVersion(pg);
  const char* encoding = PQparameterStatus(pg, "client_encoding");
  const auto refuse = [this](Status status) {
    drop(false);
    finish_connect(std::move(status));
  };
  if (encoding && std::string_view(encoding) != "UTF8")
    return refuse(
        Status::make(Code::protocol, formatted("{} insists on client_encoding {}; UTF8 is needed: a pooler "
                                               "in between must let client_encoding through",
                                               peer(), encoding)));
  // Only now: libpq's manual wants a connected PGconn for both.
  if (PQsetnonblocking(pg, 1) != 0 || !PQenterPipelineMode(pg) || !link_->attach())
    return refuse(Status::make(Code::unavailable, "cannot set up the connection to " + peer()));
  state_ = State::idle;
  watch();
  names_.allowed = options_.statement_cache == ConnectionOptions::StatementCache::on;
  if (options_.statement_cache == ConnectionOptions::StatementCache::automatic) return learn_pooler();
  finish_connect(Status::success());
}

void PgConnection::learn_pooler() {
  std::vector<Call> calls(1);
  calls[0].statement = &kBackend;
  run(std::move(calls), [this](PipelineResult r) {
    if (r.status.ok() && r.results[0]->rows() == 1) {
      // A pooler hands out a key of its own at start-up; the statement runs in the real backend.
      names_.allowed = link_ && r.results[0]->integer(0, 0) == PQbackendPID(link_->pg());
      if (names_.allowed)
        backend_ = {static_cast<int>(r.results[0]->integer(0, 0)), r.results[0]->integer(0, 1),
                    std::string(r.results[0]->text(0, 2))};
    } else if (!r.status.ok()) {
      // Nothing of the caller's was sent yet.
      if (r.status.code == Code::in_doubt) r.status.code = closed_by_us_ ? Code::closed : Code::unavailable;
      drop(false);
    }
    finish_connect(std::move(r.status));
  });
}

void PgConnection::finish_connect(Status status) {
  const auto keep = std::exchange(keep_connecting_, nullptr);
  if (const Done done = std::exchange(connected_, nullptr)) done(std::move(status));
}

void PgConnection::run(std::vector<Call> calls, PipelineDone done) {
  for (std::size_t i = 0; i < calls.size(); ++i)
    for (const Param& p : calls[i].params)
      // In text format a NUL ends the value: libpq would send half of it.
      if (p.value && !p.binary && p.value->find('\0') != std::string::npos)
        return refuse_nul(i, std::move(done));
  auto work = std::make_unique<Work>();
  work->pipeline = std::make_unique<Pipeline>(std::move(calls), names_);
  work->timeout = options_.command_timeout;
  work->done = std::move(done);
  begin(std::move(work));
}

void PgConnection::refuse_nul(std::size_t call, PipelineDone done) {
  asio::post(io_, [call, done = std::move(done)] {
    PipelineResult result;
    result.status =
        Status::make(Code::invalid, "a text contains a NUL character, which PostgreSQL cannot store");
    result.failed_call = call;
    done(std::move(result));
  });
}

void PgConnection::run_script(std::string sql, Done done) {
  auto work = std::make_unique<Work>();
  work->script = std::move(sql);
  work->timeout = kScriptTimeout;
  work->done = [done = std::move(done)](PipelineResult r) { done(std::move(r.status)); };
  begin(std::move(work));
}

void PgConnection::begin(std::unique_ptr<Work> work) {
  if (state_ == State::idle) {
    work->keep = shared_from_this();
    work->started = Clock().now();
    work_ = std::move(work);
    state_ = State::working;
    arm(saturating_add(work_->started, work_->timeout));
    // Learns of a FATAL or an end of stream that arrived but was not looked at yet: better
    // "certainly not executed" than "in doubt".
    if (!PQconsumeInput(link_->pg()))
      lose(reason_of_libpq());
    else if (PQisBusy(link_->pg()), link_->last_notice().fatal())
      lose(link_->last_notice().message, link_->last_notice().sqlstate);
    else if (!send())
      lose(reason_of_libpq());
    return;
  }
  Status status = state_ == State::working
                      ? Status::make(Code::internal, "a connection runs one pipeline at a time")
                      : Status::make(Code::unavailable, "not connected to " + peer());
  asio::post(io_, [work = std::shared_ptr<Work>(std::move(work)), status = std::move(status)]() mutable {
    PipelineResult result;
    result.status = std::move(status);
    work->done(std::move(result));
  });
}

bool PgConnection::send() {
  PGconn* pg = link_->pg();
  if (work_->pipeline) {
    if (!work_->pipeline->send(pg)) return false;
  } else {
    // The simple protocol is not allowed in pipeline mode.
    if (!PQexitPipelineMode(pg)) return false;
    if (!PQsendQuery(pg, work_->script.c_str())) return false;
  }
  work_->committing = true;
  flush();
  return true;
}

void PgConnection::flush() {
  if (!work_ || write_wait_) return;
  // Also a failed write goes on to reading: the server may have said why it hung up, and libpq
  // reports the failure there.
  if (PQflush(link_->pg()) != 1) return;
  write_wait_ = true;
  // The read wait of watch() stays armed meanwhile: a server that stops reading because we do not
  // read its answers would otherwise wait for us while we wait for it.
  link_->wait(Link::Wait::wait_write, [weak = weak_from_this()](const asio::error_code& ec) {
    const auto held = std::static_pointer_cast<PgConnection>(weak.lock());
    if (!held || ec == asio::error::operation_aborted) return;
    held->write_wait_ = false;
    held->flush();
  });
}

// One read wait is armed at all times, idle or not; idle, it costs nothing and notices the end.
void PgConnection::watch() {
  link_->wait(Link::Wait::wait_read, [weak = weak_from_this()](const asio::error_code& ec) {
    const auto held = std::static_pointer_cast<PgConnection>(weak.lock());
    if (!held || ec == asio::error::operation_aborted || !held->link_) return;
    held->on_readable();
  });
}

void PgConnection::on_readable() {
  const auto held = self();
  const bool readable = PQconsumeInput(link_->pg()) != 0;
  if (readable) watch();
  if (!work_)
    idle_input(readable);
  else if (work_->pipeline)
    take_results(readable);
  else
    take_script_results(readable);
  take_notices();
}

// They come between results; libpq has put them aside while it parsed those.
void PgConnection::take_notices() {
  if (!noticed_ || !link_) return;
  std::vector<std::pair<std::string, std::string>> notices;
  while (PGnotify* one = PQnotifies(link_->pg())) {
    notices.emplace_back(one->relname, one->extra);
    PQfreemem(one);
  }
  const auto listener = noticed_;
  for (const auto& [channel, payload] : notices) listener(channel, payload);
}

void PgConnection::take_results(bool readable) {
  flush();
  switch (work_->pipeline->advance(link_->pg(), context_)) {
    case Pipeline::Progress::more:
      if (!readable) lose(reason_of_libpq());
      return;
    case Pipeline::Progress::finished: return finish_work(std::move(work_->pipeline->result()), readable);
    case Pipeline::Progress::again:
      if (!readable || !send()) lose(reason_of_libpq());
      return;
    case Pipeline::Progress::lost: {
      const Notice farewell = work_->pipeline->farewell();
      const bool known = !farewell.message.empty();
      return lose(known ? farewell.message : reason_of_libpq(), farewell.sqlstate);
    }
  }
}

void PgConnection::take_script_results(bool readable) {
  flush();
  PGconn* pg = link_->pg();
  while (!PQisBusy(pg)) {
    const ResultPtr result(PQgetResult(pg));
    if (!result) {
      if (work_->script_error.ok() || work_->rolling_back || PQtransactionStatus(pg) == PQTRANS_IDLE) {
        PipelineResult done;
        done.status = work_->script_error;
        if (!PQenterPipelineMode(pg)) return lose(reason_of_libpq());
        return finish_work(std::move(done), readable);
      }
      work_->rolling_back = true;
      if (!PQsendQuery(pg, "ROLLBACK")) return lose(reason_of_libpq());
      flush();
      continue;
    }
    const Notice error = notice_of(result.get());
    switch (PQresultStatus(result.get())) {
      case PGRES_TUPLES_OK:
      case PGRES_COMMAND_OK:
      case PGRES_EMPTY_QUERY: break;
      case PGRES_FATAL_ERROR:
        if (error.fatal() || error.sqlstate.empty())
          return lose(error.message.empty() ? reason_of_libpq() : error.message, error.sqlstate);
        if (work_->script_error.ok())
          work_->script_error = from_server(error.sqlstate, error.message, context_);
        break;
      default: return lose("a script must not use COPY or replication commands");
    }
  }
  if (!readable) lose(reason_of_libpq());
}

void PgConnection::idle_input(bool readable) {
  // Parses what came: notices and parameter changes are for libpq, a FATAL is the end.
  (void)PQisBusy(link_->pg());
  const Notice& notice = link_->last_notice();
  if (readable && !notice.fatal()) return;
  Status status = notice.fatal()
                      ? from_server(notice.sqlstate, notice.message, context_)
                      : Status::make(Code::unavailable, formatted("the connection to {} broke while idle: {}",
                                                                  peer(), reason_of_libpq()));
  drop(true);
  if (const auto listener = std::exchange(broken_, nullptr)) listener(std::move(status));
}

// One timer that is moved only when it goes off: most pipelines end long before, and then cost no
// timer operation at all.
void PgConnection::arm(Nanos deadline) {
  // Scripts wait longer than pipelines, so it may be set too late for what comes next.
  if (timer_at_ <= deadline) return;
  timer_at_ = deadline;
  timer_->expires_after(std::chrono::nanoseconds(std::max<Nanos>(deadline - Clock().now(), 0)));
  timer_->async_wait([weak = weak_from_this()](const asio::error_code& ec) {
    const auto held = std::static_pointer_cast<PgConnection>(weak.lock());
    if (!held || ec) return;
    held->timer_at_ = kForever;
    held->on_timer();
  });
}

void PgConnection::on_timer() {
  if (!work_) return;
  const Nanos deadline = saturating_add(work_->started, work_->timeout);
  if (Clock().now() < deadline) return arm(deadline);
  lose(formatted("no answer within {} ms", work_->timeout / kMilli));
}

void PgConnection::finish_work(PipelineResult result, bool readable) {
  const std::unique_ptr<Work> work = std::move(work_);
  state_ = State::idle;
  // Not readable: complete, and the stream ended behind it. And a transaction left open would leak
  // into the next borrower's statements.
  if (!readable || PQtransactionStatus(link_->pg()) != PQTRANS_IDLE) drop(true);
  // May close, run again, or let go of this connection; `work->keep` lasts until we return.
  work->done(std::move(result));
}

// The connection is gone while something was under way.
void PgConnection::lose(std::string reason, std::string sqlstate) {
  const std::shared_ptr<Work> work = std::move(work_);
  const double elapsed = static_cast<double>(Clock().now() - work->started) / kMilli;
  PipelineResult result;
  result.status = Status::make(
      work->committing ? Code::in_doubt : Code::unavailable,
      formatted("connection to {} lost after {:.0f} ms: {} ({})", peer(), elapsed, reason,
                work->committing ? "sent, the answer is missing: executed or not" : "not executed"),
      std::move(sqlstate));
  if (work->pipeline) {
    PipelineResult& before = work->pipeline->result();
    result.parts = std::move(before.parts);
    result.results = std::move(before.results);
  }
  drop(true);
  // Never inside run() or close().
  asio::post(io_, [work, result = std::make_shared<PipelineResult>(std::move(result))] {
    work->done(std::move(*result));
  });
}

void PgConnection::drop(bool doomed) {
  state_ = State::closed;
  timer_->cancel();
  timer_at_ = kForever;
  if (doomed && link_) link_->doom();
  link_.reset();
}

std::string PgConnection::reason_of_libpq() const {
  std::string text = PQerrorMessage(link_->pg());
  if (const auto end = text.find('\n'); end != std::string::npos) text.resize(end);
  return text.empty() ? "protocol error" : text;
}

void PgConnection::close() {
  if (state_ == State::closed) return;
  closed_by_us_ = true;
  if (state_ == State::connecting) {
    connector_->cancel();
    connector_.reset();
    state_ = State::closed;
    asio::post(io_, [held = self()] {
      held->finish_connect(Status::make(Code::closed, "the connection was closed while it was being made"));
    });
    return;
  }
  if (state_ == State::working) return lose("closed by us");
  drop(false);
}

void PgConnection::abandon_after_fork() {
  if (connector_) connector_->abandon_after_fork();
  if (link_) link_->abandon_after_fork();
  (void)link_.release();
  (void)timer_.release();
  state_ = State::closed;
}

}  // namespace

std::shared_ptr<Connection> Connection::create(asio::io_context& io, ConnInfo info,
                                               ConnectionOptions options) {
  return std::make_shared<PgConnection>(io, std::move(info), std::move(options));
}

}  // namespace ratesync::postgres
