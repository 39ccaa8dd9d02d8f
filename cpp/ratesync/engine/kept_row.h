// The lease of an idempotent call under way: a row of the state, kept alive by touching it for as long as it
// has the version that this caller wrote. See keeper.h.
#pragma once

#include <algorithm>
#include <utility>

#include "ratesync/engine/keeper.h"
#include "ratesync/store/state_store.h"

namespace ratesync::engine {

class KeptRow final : public Kept {
 public:
  KeptRow(Keeper& keeper, store::StateStore& rows, store::SpaceRef space, std::string kind, std::string key,
          std::int64_t version, std::int64_t ttl_ms, Nanos ends_at)
      : Kept(keeper, ttl_ms, true, ends_at), rows_(rows), touch_(*this) {
    touch_.verb = store::StateOp::Verb::touch;
    touch_.space = std::move(space);
    touch_.kind = std::move(kind);
    touch_.key = std::move(key);
    touch_.expected = version;
  }

 protected:
  void ask(std::int64_t ttl_ms) override {
    touch_.ttl = ttl_ms;
    touch_.deadline = saturating_add(keeper().timers().now(), std::min(ttl_ms, kForever / kMilli) * kMilli);
    touch_.reply = {};
    rows_.submit(&touch_);
  }

 private:
  struct Touch final : store::StateOp {
    explicit Touch(KeptRow& row) : owner(row) {}
    void done() override {
      const Keeper::Answer answer = !reply.status.ok() ? Keeper::Answer::failed
                                    : reply.outcome == store::StateReply::Outcome::done
                                        ? Keeper::Answer::held
                                        : Keeper::Answer::lost;
      owner.keeper().answered(owner, answer, reply.status);
    }
    KeptRow& owner;
  };

  store::StateStore& rows_;
  Touch touch_;
};

}  // namespace ratesync::engine
