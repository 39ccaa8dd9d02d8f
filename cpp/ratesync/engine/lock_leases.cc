// Locks that are held: renewed by the Keeper, given back, lost. And what the memory store decides at once.
#include <algorithm>
#include <utility>
#include <vector>

#include "ratesync/engine/lock_service.h"
#include "ratesync/engine/op_ids.h"

namespace ratesync::engine {

using store::LockOp;
using store::LockReply;

namespace {

// How long a release may wait for its answer, at most, and how often it is sent again after that. All of it
// ends with the lease, but is tried for a moment even when that is (nearly) over.
constexpr Nanos kReleaseTime = 5 * kSecond;
constexpr Nanos kShortestRelease = kSecond;
constexpr int kReleaseTries = 3;
// For leases of the memory store that are renewed: their holder lives as long as the store does.
constexpr std::int64_t kUnending = 100LL * 366 * 86'400 * 1'000;

Nanos end_of(Nanos sent, std::int64_t ttl_ms) {
  return ttl_ms > kForever / kMilli ? kForever : saturating_add(sent, ttl_ms * kMilli);
}

// Asked and answered within the call.
struct Now final : LockOp {
  void done() override {}
};

}  // namespace

HeldLock::HeldLock(LockService& owner, store::SpaceRef in, std::string called, std::int64_t fencing_token,
                   std::int64_t ttl_ms, bool auto_renew, Nanos ends_at)
    : Kept(owner.keeper(), ttl_ms, auto_renew, ends_at),
      service(owner),
      space(std::move(in)),
      name(std::move(called)),
      token(fencing_token) {}

HeldLock::~HeldLock() {
  if (local()) service.forget_local(*this);
}

bool HeldLock::local() const { return !service.shared(); }

void HeldLock::ask(std::int64_t ttl_ms) {
  if (!renewal_) {
    renewal_ = std::make_unique<Renewal>(*this);
    renewal_->verb = LockOp::Verb::renew;
    renewal_->space = space;
    renewal_->name = name;
    renewal_->token = token;
  }
  renewal_->ttl = ttl_ms;
  renewal_->reply = {};
  renewal_->deadline = end_of(keeper().timers().now(), ttl_ms);
  service.store().submit(renewal_.get());
}

void HeldLock::Renewal::done() {
  const Keeper::Answer answer = !reply.status.ok()                          ? Keeper::Answer::failed
                                : reply.outcome == LockReply::Outcome::held ? Keeper::Answer::held
                                                                            : Keeper::Answer::lost;
  owner.keeper().answered(owner, answer, reply.status);
}

void HeldLock::on_lost() { service.lost(*this); }

HeldLockRef LockService::make_lease(const store::SpaceRef& space, const std::string& name, std::int64_t token,
                                    std::int64_t ttl_ms, bool auto_renew, Nanos sent, std::int64_t runs_ms) {
  const bool unending = !shared_ && auto_renew;
  auto lease = std::make_shared<HeldLock>(*this, space, name, token, ttl_ms, auto_renew,
                                          unending ? kForever : end_of(sent, runs_ms));
  if (shared_) {
    list_held(*lease);
    keeper_.keep(lease, sent);
  } else {
    const std::lock_guard lock(local_mutex_);
    local_[token] = lease;
  }
  return lease;
}

void LockService::list_held(HeldLock& lease) {
  lease.listed_ = lease.shared_from_this();
  lease.after_ = held_;
  if (held_) held_->previous_ = &lease;
  held_ = &lease;
}

void LockService::unlist_held(HeldLock& lease) {
  const KeptRef self = std::move(lease.listed_);
  if (!self) return;
  (lease.previous_ ? lease.previous_->after_ : held_) = lease.after_;
  if (lease.after_) lease.after_->previous_ = lease.previous_;
  lease.previous_ = lease.after_ = nullptr;
}

// --- giving back ----------------------------------------------------------------------------------

void LockRelease::start() { lease->service.release(this); }

void LockRelease::done() { lease->service.answered(this); }

void LockRelease::fire() { lease->service.left(this); }

void LockService::release(LockRelease* task) {
  const HeldLockRef lease = task->lease;
  const Nanos now = timers_.now();
  task->until_ = saturating_add(now, std::max(kShortestRelease, lease->remaining(now)));
  if (keeper_.end(lease)) lease->held_until_released_ = true;
  unlist_held(*lease);
  if (lease->answered) {
    if (task->alone_) return task->unref();
    return task->target->deliver(task);
  }
  task->verb = LockOp::Verb::release;
  task->space = lease->space;
  task->name = lease->name;
  task->token = lease->token;
  if (task->leaving_) timers_.arm(*task, saturating_add(now, kLeavingTime));
  send(task);
  handed_back(lease);
}

// The store still has it, and goes on trying.
void LockService::left(LockRelease* task) {
  task->was_held = task->lease->held_until_released_;
  task->status =
      Status::make(Code::timeout, "the store has not answered within 1 s; it is still being tried");
  task->alone_ = true;
  task->ref();
  task->target->deliver(task);
}

void LockService::send(LockRelease* task) {
  task->deadline = std::min(task->until_, saturating_add(timers_.now(), kReleaseTime));
  task->reply = {};
  ++in_store_;
  store_.submit(task);
}

void LockService::answered(LockRelease* task) {
  --in_store_;
  Status& status = task->reply.status;
  const bool again = status.code == Code::in_doubt && !closing_ && timers_.now() < task->until_;
  if (again && ++task->doubts_ <= kReleaseTries) return send(task);
  if (status.ok()) task->lease->answered = true;
  if (task->alone_) {
    task->unref();
    return farewell();
  }
  timers_.cancel(*task);
  // After a lost answer, the first one has done it.
  task->was_held = task->lease->held_until_released_ &&
                   (!status.ok() || task->reply.outcome == LockReply::Outcome::held || task->doubts_ > 0);
  task->status = std::move(status);
  task->target->deliver(task);
  farewell();
}

void LockService::let_go(const HeldLockRef& lease) {
  if (!shared_) {
    (void)release_now(lease);
    return;
  }
  auto* task = new LockRelease(lease);
  task->alone_ = true;
  release(task);
}

void LockService::drop(const HeldLockRef& lease) {
  if (!shared_) return drop_now(lease);
  keeper_.end(lease);
  unlist_held(*lease);
  lost(*lease);
}

// A lease of this process is on its way back to the store: the next in line asks right behind it.
void LockService::handed_back(const HeldLockRef& lease) {
  Name* name = find(key_of(*lease->space, lease->name));
  if (!name || name->holder.lock() != lease) return;
  name->holder.reset();
  if (name->line.empty()) return drop_if_idle(*name);
  if (name->handovers < kMaxHandovers) {
    ++name->handovers;
    return ask_first(name->key);
  }
  // Others had better get a chance: the store tells who is next, or whoever asks first has it.
  name->handovers = 0;
  name->pause = 0;
  plan(*name, 0);
}

// Without being asked to: broken, or over.
void LockService::lost(HeldLock& lease) {
  Name* name = find(key_of(*lease.space, lease.name));
  unlist_held(lease);
  if (!name || name->holder.lock().get() != &lease) return;
  name->holder.reset();
  ask_first(name->key);
}

// --- by hand --------------------------------------------------------------------------------------

void LockBreak::start() {
  verb = LockOp::Verb::break_;
  service.store().submit(this);
}

void LockBreak::done() { service.broken(this); }

void LockService::broken(LockBreak* task) {
  if (task->reply.status.ok()) {
    task->was_held = task->reply.outcome == LockReply::Outcome::held;
  } else {
    task->status = std::move(task->reply.status);
  }
  if (task->was_held) {
    // The holder may be here; elsewhere the next renewal says so.
    HeldLockRef lease;
    std::vector<HeldLockRef> seen;  // outlives the lock: the last reference may be here
    if (!shared_) {
      const std::lock_guard lock(local_mutex_);
      for (const auto& [token, held] : local_) {
        seen.push_back(held.lock());
        const HeldLockRef& other = seen.back();
        if (!other || other->name != task->name || other->space->name_space != task->space->name_space ||
            other->space->tenant != task->space->tenant)
          continue;
        if (!lease || other->token > lease->token) lease = other;
      }
    } else if (Name* name = find(key_of(*task->space, task->name))) {
      lease = name->holder.lock();
    }
    if (lease && (task->token == 0 || task->token == lease->token) && lease->settle(Kept::Fate::lost))
      keeper_.tell(*lease);
  }
  task->target->deliver(task);
}

void LockService::list(std::size_t limit, store::Callback<std::vector<store::LockInfo>> done) {
  if (shared_) return store_.list(nullptr, limit, std::move(done));
  store_.list(nullptr, limit, [this, done = std::move(done)](Result<std::vector<store::LockInfo>> found) {
    // Renewed without end: as if the last renewal was just now.
    std::vector<HeldLockRef> seen;
    if (found.ok()) {
      const std::lock_guard lock(local_mutex_);
      for (store::LockInfo& info : found.value()) {
        if (known_remaining(info.expires_in) != 0) continue;
        const auto lease = local_.find(info.token);
        if (lease == local_.end()) continue;
        seen.push_back(lease->second.lock());
        if (seen.back()) info.expires_in = seen.back()->ttl_ms();
      }
    }
    done(std::move(found));
  });
}

// --- on the calling thread: stores of this process ------------------------------------------------

HeldLockRef LockService::take_now(const store::SpaceRef& space, const std::string& name, std::int64_t ttl_ms,
                                  bool auto_renew, LockReply* reply) {
  Now op;
  op.space = space;
  op.name = name;
  op.ttl = store_ttl(ttl_ms, auto_renew);
  op.id = next_op_id();
  const Nanos sent = timers_.now();
  store_.submit(&op);
  *reply = std::move(op.reply);
  if (!reply->status.ok() || reply->outcome != LockReply::Outcome::held) return nullptr;
  return make_lease(space, name, reply->token, ttl_ms, auto_renew, sent, ttl_ms);
}

std::int64_t LockService::store_ttl(std::int64_t ttl_ms, bool auto_renew) const {
  return !shared_ && auto_renew ? kUnending : ttl_ms;
}

std::int64_t LockService::known_remaining(std::int64_t remaining_ms) {
  return remaining_ms > kUnending / 2 ? 0 : remaining_ms;
}

bool LockService::release_now(const HeldLockRef& lease) {
  const bool held = lease->fate(timers_.now()) == Kept::Fate::held && lease->settle(Kept::Fate::ended);
  if (lease->answered.exchange(true)) return false;
  Now op;
  op.verb = LockOp::Verb::release;
  op.space = lease->space;
  op.name = lease->name;
  op.token = lease->token;
  store_.submit(&op);
  tell_later(lease);
  return held && op.reply.status.ok() && op.reply.outcome == LockReply::Outcome::held;
}

bool LockService::extend_now(const HeldLockRef& lease, std::int64_t ttl_ms) {
  const Nanos sent = timers_.now();
  if (lease->fate(sent) != Kept::Fate::held) return false;
  lease->set_ttl_ms(ttl_ms);
  if (lease->auto_renew()) return true;
  Now op;
  op.verb = LockOp::Verb::renew;
  op.space = lease->space;
  op.name = lease->name;
  op.token = lease->token;
  op.ttl = ttl_ms;
  store_.submit(&op);
  const bool held = op.reply.status.ok() && op.reply.outcome == LockReply::Outcome::held &&
                    lease->prolong(sent, end_of(sent, ttl_ms));
  if (!held) lease->settle(Kept::Fate::lost);
  tell_later(lease);
  return held;
}

// The lease of somebody who forgot it runs out as one of any other store.
void LockService::drop_now(const HeldLockRef& lease) {
  if (lease->fate(timers_.now()) != Kept::Fate::held || !lease->settle(Kept::Fate::ended)) return;
  if (lease->auto_renew()) {
    Now op;
    op.verb = LockOp::Verb::renew;
    op.space = lease->space;
    op.name = lease->name;
    op.token = lease->token;
    op.ttl = lease->ttl_ms();
    store_.submit(&op);
    // Those in line think that it has no end.
    if (somebody_waits()) post_([this, key = key_of(*lease->space, lease->name)] { ask_first(key); });
  }
  tell_later(lease);
}

void LockService::tell_later(const HeldLockRef& lease) {
  if (!lease->watched()) return;
  post_([lease] { lease->keeper().changed(*lease); });
}

void LockService::forget_local(const HeldLock& lease) {
  const std::lock_guard lock(local_mutex_);
  local_.erase(lease.token);
}

}  // namespace ratesync::engine
