#include "ratesync/postgres/lock_store.h"

namespace ratesync::postgres {

void PgLockStore::submit(store::LockOp* op) {
  op->reply = {};
  op->reply.status = Status::make(Code::invalid, "this store does not carry locks");
  op->done();
}
bool PgLockStore::abandon(store::LockOp*) { return false; }
void PgLockStore::list(const store::SpaceRef&, std::size_t,
                       store::Callback<std::vector<store::LockInfo>> done) {
  done(std::vector<store::LockInfo>{});
}
void PgLockStore::stop_waiting(const store::SpaceRef&, const std::string&) {}
void PgLockStore::on_freed(std::function<void(const store::Space&, const std::string&)>) {}
bool PgLockStore::pushes() const { return false; }
void PgLockStore::initialize(store::Callback<store::Unit> done) {
  backend_.when_ready(Facet::locks, [done = std::move(done)](Status status) {
    status.ok() ? done(store::Unit{}) : done(std::move(status));
  });
}
void PgLockStore::close(Nanos, std::function<void()> done) { done(); }
void PgLockStore::abandon_after_fork() {}
void PgLockStore::fill(store::Stats&) const {}

}  // namespace ratesync::postgres
