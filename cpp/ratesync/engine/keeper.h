// Leases that end unless they are renewed: held locks, and the rows of idempotent calls under way.
//
// The Keeper knows when to renew and when all is lost; what is renewed, and how, is the Kept's own
// (HeldLock in lock_service.h, KeptRow in kept_row.h). Renewals run on the I/O thread, so they are on time
// while Python is busy. A lease is over by this machine's clock, counted from the moment when the request
// was handed over for sending: never later than the store thinks.
//
//   keep ─► held ── a third of the ttl ─► renewing ── answered in time ─► held
//            │                             ├─ failed ─► again, until the end
//            │                             └─ "not yours any more" ─► lost
//            ├─ end reached, whatever else is under way ─► lost
//            └─ end() ─► ended
//
// `lost` and `ended` are final. Whichever thread first sees that the end was reached makes it so, and
// no answer that comes later undoes it.
#pragma once

#include <atomic>
#include <deque>
#include <list>
#include <memory>
#include <random>
#include <string>

#include "ratesync/base/status.h"
#include "ratesync/engine/completion.h"
#include "ratesync/engine/timers.h"

namespace ratesync::engine {

class Keeper;
class LossSignal;
class Extension;

class Kept : public TimerNode, public std::enable_shared_from_this<Kept> {
 public:
  enum class Fate : std::uint8_t { held, lost, ended };

  Kept(Keeper& keeper, std::int64_t ttl_ms, bool auto_renew, Nanos ends_at);

  // Any thread. Reaching the end is noticed here at the latest, for good.
  Fate fate(Nanos now);
  // Until the end; 0 when lost or ended.
  [[nodiscard]] Nanos remaining(Nanos now);
  // Any thread: not any more, for the reason given. False: it was final already.
  bool settle(Fate why);
  // Any thread: the end is at `ends_at` now. False: it is final.
  bool prolong(Nanos now, Nanos ends_at);

  [[nodiscard]] Keeper& keeper() const { return keeper_; }
  [[nodiscard]] std::int64_t ttl_ms() const { return ttl_ms_.load(std::memory_order_relaxed); }
  [[nodiscard]] bool auto_renew() const { return auto_renew_; }
  // Somebody waits for the loss signal.
  // Whoever makes it final and finds false here has nobody to tell: who begins to watch looks at the fate
  // afterwards. Sequentially consistent, all of it.
  [[nodiscard]] bool watched() const { return watched_.load(); }
  void set_ttl_ms(std::int64_t ttl_ms) { ttl_ms_.store(ttl_ms, std::memory_order_relaxed); }

 protected:
  friend class Keeper;
  // I/O thread. Asks the store for `ttl_ms` from now; Keeper::answered() is called exactly once, and the
  // object kept alive until then (answering_).
  virtual void ask(std::int64_t ttl_ms) = 0;
  // I/O thread, exactly once: it is lost, and everybody who waited for the signal has been told.
  virtual void on_lost() {}
  // A lease that needs no renewals to live: the memory store's.
  [[nodiscard]] virtual bool local() const { return false; }
  void fire() final;

 private:
  static constexpr Nanos kLost = 0;
  static constexpr Nanos kEnded = -1;

  Keeper& keeper_;
  const bool auto_renew_;
  std::atomic<std::int64_t> ttl_ms_;
  std::atomic<Nanos> ends_at_;  // or kLost, kEnded
  std::atomic<bool> watched_{false};
  // I/O thread:
  bool told_ = false;  // of its final state
  Nanos sent_ = 0;     // when the renewal under way was handed over
  Nanos next_ = kForever;
  std::int64_t asked_ms_ = 0;
  int failures_ = 0;
  std::shared_ptr<Kept> answering_;  // itself, while a renewal is under way
  std::shared_ptr<Kept> kept_;       // itself, while the Keeper cares for it: then it is in its list
  Kept* previous_ = nullptr;
  Kept* after_ = nullptr;
  std::deque<Extension*> extensions_;
  bool extending_ = false;  // the renewal under way is that of extensions_.front()
  std::list<LossSignal*> signals_;
};
using KeptRef = std::shared_ptr<Kept>;

// One call that waits until a lease is lost (true) or ended (false).
class LossSignal final : public Acquisition {
 public:
  explicit LossSignal(KeptRef lease) : kept(std::move(lease)) {}
  void start() override;
  void cancel() override;
  void orphaned() override {}

  const KeptRef kept;
  bool lost = false;
  Status status;  // not ok: the engine was shut down

 private:
  friend class Keeper;
  ~LossSignal() override = default;
  bool waiting_ = false;
  std::list<LossSignal*>::iterator place_;
};

// One call that sets a lease to a new ttl, counted from now.
class Extension final : public Acquisition {
 public:
  Extension(KeptRef lease, std::int64_t new_ttl_ms) : kept(std::move(lease)), ttl_ms(new_ttl_ms) {}
  void start() override;
  void cancel() override {}  // it is on its way, or about to be
  void orphaned() override {}

  const KeptRef kept;
  const std::int64_t ttl_ms;
  bool lost = false;  // nothing was extended: it is not held any more
  Status status;

 private:
  ~Extension() override = default;
};

// All methods on the I/O thread.
class Keeper {
 public:
  Keeper(Timers& timers, std::uint64_t seed)
      : timers_(timers), random_(static_cast<std::minstd_rand::result_type>(seed | 1)) {}

  enum class Answer { held, lost, failed };

  // From now on: renews it, or at least rings at its end. `sent`: when it was asked for.
  void keep(const KeptRef& kept, Nanos sent);
  // What the store said to ask().
  void answered(Kept& kept, Answer answer, const Status& status = {});
  // No renewals any more. True: it was held until now, as far as is known here.
  bool end(const KeptRef& kept);
  // It turned out to be final: tells everybody who waits.
  void tell(Kept& kept);
  // Its end was moved, or it was made final, by another thread.
  void changed(Kept& kept) { kept.fate(timers_.now()) == Kept::Fate::held ? arm(kept) : tell(kept); }
  void watch(LossSignal* signal);     // takes over one reference
  void unwatch(LossSignal* signal);   // borrowed
  void extend(Extension* extension);  // takes over one reference
  // Nothing is renewed any more; those who wait get Code::closed.
  void shutdown();

  [[nodiscard]] Timers& timers() { return timers_; }
  [[nodiscard]] std::size_t kept() const { return count_; }

 private:
  friend class Kept;

  void due(Kept& kept);
  void unlink(Kept& kept);
  void arm(Kept& kept);
  void send(Kept& kept, std::int64_t ttl_ms);
  void send_next(Kept& kept);
  Nanos jittered(Nanos base);

  Timers& timers_;
  Kept* first_ = nullptr;
  std::size_t count_ = 0;
  bool closing_ = false;
  std::minstd_rand random_;
};

}  // namespace ratesync::engine
