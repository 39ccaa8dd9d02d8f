// Waiting until somebody, in this process or another, rings for a name: places in the store's lines of
// waiters without a lock behind them. Who waits for the result of an idempotent call does so. I/O thread
// only, unless said otherwise.
//
//   first who waits ─► asking (stand) ─► placed: everybody looks once more, since it may have rung before
//                                          ├─ rung here or elsewhere ─► everybody looks, the place is gone
//                                          └─ now and then ─► everybody looks, in case a message was lost
//                        └─ refused, or the store cannot push: everybody looks more often
//
// A bell says that looking is worth it, never what will be seen; so it may be rung too often, and a name may
// stand for two. `seen` is how a caller says since when it looks: what it got from the wait before it looked.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>

#include "ratesync/engine/completion.h"
#include "ratesync/engine/timers.h"
#include "ratesync/store/lock_store.h"

namespace ratesync::engine {

class Bells;
struct Bell;

// Finished when it is time to look, or when the caller's time is over.
class BellWait final : public Acquisition, public TimerNode {
 public:
  BellWait(Bells& owner, store::SpaceRef in, std::string called)
      : bells(owner), space(std::move(in)), name(std::move(called)) {}
  void start() override;
  void cancel() override;
  void fire() override;
  void orphaned() override {}

  Bells& bells;
  const store::SpaceRef space;
  const std::string name;
  std::int64_t seen = 0;  // in: of the wait before, 0 for the first; out: for the next one
  Nanos until = kForever;
  Status status;

 private:
  friend class Bells;
  ~BellWait() override = default;
  Bell* at_ = nullptr;
  std::list<BellWait*>::iterator place_;
};

struct Bell final : TimerNode {
  Bell(Bells& owner, std::string id, const BellWait& first)
      : bells(owner), key(std::move(id)), space(first.space), name(first.name) {}
  void fire() override;
  Bells& bells;
  const std::string key;
  const store::SpaceRef space;
  const std::string name;
  std::list<BellWait*> waits;
  std::int64_t turn = 0;         // names the place that we have; 0: none
  const void* asking = nullptr;  // for a place
  bool pushed = false;           // the store could push when we asked
  Nanos ask_at = 0;              // not before
  Nanos pause = 0;               // between two looks where the store cannot push
  Nanos idle_since = 0;
};

class Bells {
 public:
  // `shared`: others may ring, through the store. `answered` follows each answer of the store.
  Bells(store::LockStore& store, Timers& timers, bool shared, std::uint64_t seed,
        std::function<void()> answered);
  ~Bells();
  Bells(const Bells&) = delete;
  Bells& operator=(const Bells&) = delete;

  // The name of the bell of a key, apart from those of locks: none of theirs begins like this, unless by
  // intent.
  static std::string name_of(std::string_view kind, std::string_view key);

  void start(BellWait* task);                                        // takes over one reference
  void cancel(BellWait* task, bool in_time);                         // borrowed
  void ring(const store::SpaceRef& space, const std::string& name);  // everybody, everywhere
  bool heard(const std::string& key);  // from the store; false: nobody waits for that here
  void shutdown();
  // Any thread. Somebody here waits, or did so a moment ago.
  [[nodiscard]] bool awaited() const { return awaited_.load() > 0; }
  [[nodiscard]] std::size_t asked() const { return asked_; }  // questions that the store has

 private:
  friend struct Bell;
  struct Stand;
  struct Ring;

  void ask(Bell& bell);
  void placed(Bell& bell, const Status& status);
  void wake(Bell& bell);
  void look_now_and_then(Bell& bell);
  void plan(Bell& bell);
  void erase(Bell& bell);
  void finish(BellWait* task);

  store::LockStore& store_;
  Timers& timers_;
  const bool shared_;
  std::unordered_map<std::string, std::unique_ptr<Bell>> bells_;
  std::atomic<std::size_t> awaited_{0};  // as many as there are bells
  std::int64_t turns_ = 0;
  std::size_t asked_ = 0;
  Nanos ring_at_ = 0;  // not before: the store refused
  bool closing_ = false;
  std::minstd_rand random_;
  const std::function<void()> answered_;
};

// namespace NUL tenant NUL name: no part contains NUL.
std::string key_of(const store::Space& space, const std::string& name);

}  // namespace ratesync::engine
