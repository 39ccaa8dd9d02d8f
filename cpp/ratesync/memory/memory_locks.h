// Locks in memory: fencing tokens from one counter, decided on the calling thread.
//
// A lock that nobody holds and nobody waits for is forgotten; the counter is all that must be remembered.
// One that expired is kept for a while, since its holder may still renew it as long as nobody else took it.
#pragma once

#include <array>
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "ratesync/base/spin_lock.h"
#include "ratesync/store/lock_store.h"

namespace ratesync::memory {

class MemoryLocks final : public store::LockStore {
 public:
  explicit MemoryLocks(const Clock& clock) : clock_(clock) {}

  // Any thread; done() is not called. May call the listener, with no lock of ours held.
  void decide(store::LockOp& op);
  // Locks kept, free and expired ones included: for tests.
  [[nodiscard]] std::size_t kept();

  // LockStore; any thread, done() comes before the call returns.
  void submit(store::LockOp* op) override {
    decide(*op);
    op->done();
  }
  bool abandon(store::LockOp*) override { return false; }
  void list(const store::SpaceRef& space, std::size_t limit,
            store::Callback<std::vector<store::LockInfo>> done) override;
  void stop_waiting(const store::SpaceRef& space, const std::string& name) override;
  void on_freed(std::function<void(const store::Space&, const std::string& name)> listener) override;
  [[nodiscard]] bool pushes() const override { return true; }
  void initialize(store::Callback<store::Unit> done) override { done(store::Unit{}); }

 private:
  using Listener = std::function<void(const store::Space&, const std::string&)>;
  struct Entry {
    std::int64_t token = 0;  // of the holder; 0: free
    std::int64_t id = 0;     // its acquisition
    Nanos since = 0;
    Nanos expires = 0;
    bool awaited = false;  // somebody of this process stands in line

    [[nodiscard]] bool held(Nanos now) const { return token != 0 && expires > now; }
  };
  // Name of a lock in all its parts, and a view of one for looking up.
  struct Name {
    std::string name_space, tenant, name;
  };
  struct NameView {
    std::string_view name_space, tenant, name;
    NameView(const Name& n)  // NOLINT(google-explicit-constructor)
        : name_space(n.name_space), tenant(n.tenant), name(n.name) {}
    NameView(const store::Space& space, const std::string& n)
        : name_space(space.name_space), tenant(space.tenant), name(n) {}
  };
  struct Hash {
    using is_transparent = void;
    std::size_t operator()(const NameView& n) const;
  };
  struct Equal {
    using is_transparent = void;
    bool operator()(const NameView& a, const NameView& b) const {
      return a.name == b.name && a.tenant == b.tenant && a.name_space == b.name_space;
    }
  };
  struct Shard {
    SpinLock mutex;  // guards the rest
    std::unordered_map<Name, Entry, Hash, Equal> locks;
    std::size_t sweep_at = 1024;  // size at which forgotten ones are looked for
  };
  static constexpr std::size_t kShards = 64;
  static constexpr Nanos kGrace = 60 * kSecond;  // an expired lock is kept this long

  Shard& shard_of(const NameView& name) { return shards_[Hash{}(name) / 64 % kShards]; }
  // All of these with the shard's mutex held.
  void acquire(Shard& shard, store::LockOp& op, const NameView& name, Nanos now);
  Entry& entry_of(Shard& shard, const NameView& name, Nanos now);
  // True: it was freed, and somebody has to be told.
  bool free(Shard& shard, store::LockOp& op, const NameView& name, Nanos now);

  const Clock& clock_;
  std::array<Shard, kShards> shards_;
  std::atomic<std::int64_t> tokens_{0};
  std::mutex listener_mutex_;  // guards the next one
  std::shared_ptr<const Listener> listener_;
};

}  // namespace ratesync::memory
