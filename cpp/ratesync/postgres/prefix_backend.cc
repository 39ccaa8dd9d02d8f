#include "ratesync/postgres/prefix_backend.h"

#include <utility>

#include "ratesync/postgres/lock_store.h"
#include "ratesync/postgres/state_store.h"

namespace ratesync::postgres {

PrefixBackend::PrefixBackend(asio::io_context& io, const Clock& clock, PgPool& pool, PrefixNames names,
                             ErrorContext context, PrefixOptions options)
    : io_(io),
      clock_(clock),
      pool_(pool),
      names_(std::move(names)),
      options_(std::move(options)),
      context_(std::move(context)),
      schema_(pool, schema_hooks()),
      state_(std::make_unique<PgStateStore>(*this)),
      locks_(std::make_unique<PgLockStore>(*this)) {}

PrefixBackend::~PrefixBackend() = default;

store::StateStore* PrefixBackend::state() const { return state_.get(); }
store::LockStore* PrefixBackend::locks() const { return locks_.get(); }

SchemaWatch::Hooks PrefixBackend::schema_hooks() {
  SchemaWatch::Hooks hooks;
  hooks.params = [this] { return catalogue_params(names_); };
  hooks.steps = [this](const Inventory& found) { return migration_steps(names_, found); };
  hooks.script = [this](const std::vector<store::MigrationStep>& steps) {
    return migration_script(names_, steps);
  };
  hooks.may_create = [this](const Inventory&) { return options_.auto_create; };
  hooks.found = [this](const Inventory& found) {
    found_[0] = check_state(names_, found, options_.auto_create);
    found_[1] = check_locks(names_, found, options_.auto_create);
    lock_waiters_ = lock_waiters_usable(names_, found);
    for (int facet : {0, 1}) ready_[facet] = found_[facet].ok();
    return found_[0].ok() ? found_[1] : found_[0];
  };
  hooks.migrated = [this] { ready_[0] = ready_[1] = false; };
  hooks.explain = [this](const PipelineResult& result) { return explain(Facet::state, result); };
  return hooks;
}

void PrefixBackend::when_ready(Facet facet, Connection::Done done) {
  const auto at = static_cast<std::size_t>(facet);
  if (ready_[at]) return done(Status::success());
  found_[at] = Status::success();
  schema_.check([this, at, done = std::move(done)](const Status& status) {
    if (ready_[at]) return done(Status::success());
    // What the other facet lacks is not our business; why creating it failed may be.
    const bool ours = found_[at].ok() || status.message.starts_with(found_[at].message);
    done(ours ? status : found_[at]);
  });
}

void PrefixBackend::lend(Facet facet, std::shared_ptr<bool> alive, PgPool::OnLease use) {
  when_ready(facet, [this, alive = std::move(alive), use = std::move(use)](Status status) {
    if (!status.ok()) return use(std::move(status));
    if (!*alive) return use(Status::make(Code::closed, "the store was closed"));
    pool_.get([use, alive](Result<PgPool::Lease> got) {
      use(*alive || !got.ok() ? std::move(got) : Status::make(Code::closed, "the store was closed"));
    });
  });
}

Status PrefixBackend::explain(Facet facet, const PipelineResult& result) {
  if (result.status.code != Code::server) return result.status;
  const std::string& sqlstate = result.status.sqlstate;
  // Class 42: a table, column or privilege went away. Look before the next trip.
  if (sqlstate.starts_with("42") || sqlstate.starts_with("3F"))
    ready_[static_cast<std::size_t>(facet)] = false;
  ErrorContext context = context_;
  context.table = facet == Facet::state ? names_.state : names_.locks;
  return from_server(sqlstate, result.server_message, context);
}

void PrefixBackend::examine(const PgPool::Lease& connection,
                            std::function<void(std::vector<store::Finding>)> done) {
  schema_.look(connection, [this, done = std::move(done)](Result<Inventory> found) {
    if (found.ok()) return done(prefix_findings(names_, found.value(), options_.auto_create));
    done({{store::Finding::Level::error, "state", found.status().message}});
  });
}

void PrefixBackend::close(Nanos patience, std::function<void()> done) {
  auto left = std::make_shared<int>(2);
  const auto one = [left, done = std::move(done)] {
    if (--*left == 0) done();
  };
  state_->close(patience, one);
  locks_->close(patience, one);
}

void PrefixBackend::abandon_after_fork() {
  state_->abandon_after_fork();
  locks_->abandon_after_fork();
}

void PrefixBackend::fill(store::Stats& stats) const {
  stats.round_trips += schema_.looks();
  stats.statements += schema_.looks();
  state_->fill(stats);
  locks_->fill(stats);
}

}  // namespace ratesync::postgres
