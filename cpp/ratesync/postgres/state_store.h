// State in PostgreSQL. I/O thread only, but for the construction.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "ratesync/postgres/prefix_backend.h"
#include "ratesync/store/state_store.h"

namespace ratesync::postgres {

class PgStateStore final : public store::StateStore {
 public:
  explicit PgStateStore(PrefixBackend& backend) : backend_(backend) {}

  void submit(store::StateOp* op) override;
  void submit(store::StateBatch* batch) override;
  bool abandon(store::StateOp* op) override;
  bool abandon(store::StateBatch* batch) override;
  void scan(const store::SpaceRef& space, const std::string& kind, const std::string& prefix,
            const std::string& cursor, std::size_t page_size,
            store::Callback<store::StatePage> done) override;
  void claim_due(const store::SpaceRef& space, const std::string& kind, std::size_t limit, std::int64_t lease,
                 store::Callback<std::vector<store::DueKey>> done) override;
  void purge(std::size_t limit, store::Callback<std::int64_t> done) override;
  void initialize(store::Callback<store::Unit> done) override;

  void close(Nanos patience, std::function<void()> done);
  void abandon_after_fork();
  void fill(store::Stats& stats) const;

 private:
  PrefixBackend& backend_;
};

}  // namespace ratesync::postgres
