// Locks with fencing tokens in PostgreSQL. I/O thread only, but for the construction.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "ratesync/postgres/prefix_backend.h"
#include "ratesync/store/lock_store.h"

namespace ratesync::postgres {

class PgLockStore final : public store::LockStore {
 public:
  explicit PgLockStore(PrefixBackend& backend) : backend_(backend) {}

  void submit(store::LockOp* op) override;
  bool abandon(store::LockOp* op) override;
  void list(const store::SpaceRef& space, std::size_t limit,
            store::Callback<std::vector<store::LockInfo>> done) override;
  void stop_waiting(const store::SpaceRef& space, const std::string& name) override;
  void on_freed(std::function<void(const store::Space&, const std::string& name)> listener) override;
  [[nodiscard]] bool pushes() const override;
  void initialize(store::Callback<store::Unit> done) override;

  // Fails what is queued with Code::closed and lets trips under way end, for `patience` at most.
  void close(Nanos patience, std::function<void()> done);
  void abandon_after_fork();
  void fill(store::Stats& stats) const;

 private:
  PrefixBackend& backend_;
};

}  // namespace ratesync::postgres
