#include "ratesync/postgres/state_store.h"

namespace ratesync::postgres {
namespace {
Status not_yet() { return Status::make(Code::invalid, "this store does not carry state"); }
}  // namespace

void PgStateStore::submit(store::StateOp* op) {
  op->reply = {};
  op->reply.status = not_yet();
  op->done();
}
void PgStateStore::submit(store::StateBatch* batch) {
  batch->status = not_yet();
  batch->done();
}
bool PgStateStore::abandon(store::StateOp*) { return false; }
bool PgStateStore::abandon(store::StateBatch*) { return false; }
void PgStateStore::scan(const store::SpaceRef&, const std::string&, const std::string&, const std::string&,
                        std::size_t, store::Callback<store::StatePage> done) {
  done(not_yet());
}
void PgStateStore::claim_due(const store::SpaceRef&, const std::string&, std::size_t, std::int64_t,
                             store::Callback<std::vector<store::DueKey>> done) {
  done(not_yet());
}
void PgStateStore::purge(std::size_t, store::Callback<std::int64_t> done) { done(not_yet()); }
void PgStateStore::initialize(store::Callback<store::Unit> done) {
  backend_.when_ready(Facet::state, [done = std::move(done)](Status status) {
    status.ok() ? done(store::Unit{}) : done(std::move(status));
  });
}
void PgStateStore::close(Nanos, std::function<void()> done) { done(); }
void PgStateStore::abandon_after_fork() {}
void PgStateStore::fill(store::Stats&) const {}

}  // namespace ratesync::postgres
