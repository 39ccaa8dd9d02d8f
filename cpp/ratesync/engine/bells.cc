#include "ratesync/engine/bells.h"

#include <algorithm>
#include <utility>

namespace ratesync::engine {

using store::LockOp;

namespace {

// Between two looks: while the store tells us, and while it cannot.
constexpr Nanos kPushed = kSecond;
constexpr Nanos kPollMin = 20 * kMilli;
constexpr Nanos kPollMax = 500 * kMilli;
// Nobody waited for so long: those who looked are through with it.
constexpr Nanos kIdle = kSecond;
constexpr Nanos kAnswerTime = 2 * kSecond;
constexpr std::size_t kMaxName = 1'024;  // bytes, of a lock

}  // namespace

std::string key_of(const store::Space& space, const std::string& name) {
  std::string key;
  key.reserve(space.name_space.size() + space.tenant.size() + name.size() + 2);
  key.append(space.name_space).push_back('\0');
  key.append(space.tenant).push_back('\0');
  return key.append(name);
}

std::string Bells::name_of(std::string_view kind, std::string_view key) {
  std::string name = "\x01";
  name.append(kind).push_back('\x01');
  name.append(key);
  if (name.size() <= kMaxName) return name;
  std::size_t end = kMaxName;  // not within a character
  while ((static_cast<unsigned char>(name[end]) & 0xC0) == 0x80) --end;
  name.resize(end);
  return name;
}

void BellWait::start() { bells.start(this); }
void BellWait::cancel() { bells.cancel(this, false); }
void BellWait::fire() { bells.cancel(this, true); }
void Bell::fire() { bells.look_now_and_then(*this); }

Bells::Bells(store::LockStore& store, Timers& timers, bool shared, std::uint64_t seed,
             std::function<void()> answered)
    : store_(store),
      timers_(timers),
      shared_(shared),
      random_(static_cast<std::minstd_rand::result_type>(seed | 1)),
      answered_(std::move(answered)) {}

Bells::~Bells() {
  for (auto& [key, bell] : bells_) timers_.cancel(*bell);
}

// What the store is asked lives until it is answered, whatever became of the bell.
struct Bells::Stand final : LockOp {
  explicit Stand(Bells& owner) : bells(owner) {}
  void done() override {
    const std::unique_ptr<Stand> self(this);
    --bells.asked_;
    const auto found = bells.bells_.find(key_of(*space, name));
    if (found != bells.bells_.end() && found->second->asking == this) {
      bells.placed(*found->second, reply.status);
    } else if (found == bells.bells_.end() && reply.status.ok() && !bells.closing_) {
      bells.store_.stop_waiting(space, name);
    }
    bells.answered_();
  }
  Bells& bells;
};

struct Bells::Ring final : LockOp {
  explicit Ring(Bells& owner) : bells(owner) {}
  void done() override {
    const std::unique_ptr<Ring> self(this);
    --bells.asked_;
    if (!reply.status.ok()) bells.ring_at_ = saturating_add(bells.timers_.now(), kPushed);
    bells.answered_();
  }
  Bells& bells;
};

void Bells::start(BellWait* task) {
  if (closing_) {
    task->status = Status::make(Code::closed, "the engine was shut down; configure the store again to go on");
    return finish(task);
  }
  std::string key = key_of(*task->space, task->name);
  auto& place = bells_[key];
  if (!place) {
    place = std::make_unique<Bell>(*this, std::move(key), *task);
    awaited_.fetch_add(1);
  }
  Bell& bell = *place;
  if (!shared_ && bell.turn == 0) bell.turn = ++turns_;
  const bool look = bell.turn != 0 && bell.turn != task->seen;
  task->seen = bell.turn;
  bell.idle_since = timers_.now();
  if (!look && task->until > timers_.now()) {
    task->at_ = &bell;
    task->place_ = bell.waits.insert(bell.waits.end(), task);
    if (task->until != kForever) timers_.arm(*task, task->until);
    const bool first = bell.waits.size() == 1;
    if (shared_ && bell.turn == 0 && !bell.asking && bell.ask_at <= timers_.now()) ask(bell);
    if (first) plan(bell);
    return;
  }
  if (!bell.armed()) plan(bell);
  finish(task);
}

// May be answered within.
void Bells::ask(Bell& bell) {
  auto* stand = new Stand(*this);
  stand->verb = LockOp::Verb::stand;
  stand->space = bell.space;
  stand->name = bell.name;
  stand->queued = true;
  stand->deadline = saturating_add(timers_.now(), kAnswerTime);
  bell.asking = stand;
  bell.pushed = store_.pushes();
  ++asked_;
  store_.submit(stand);
}

void Bells::placed(Bell& bell, const Status& status) {
  bell.asking = nullptr;
  if (!status.ok()) {
    bell.ask_at = saturating_add(timers_.now(), kPushed);
    return;
  }
  if (bell.turn != 0) return;  // it was to stay remembered
  bell.turn = ++turns_;
  wake(bell);
}

// The bell stays: they come back, unless they see what they wait for.
void Bells::wake(Bell& bell) {
  bell.idle_since = timers_.now();
  const std::list<BellWait*> waits = std::exchange(bell.waits, {});
  for (BellWait* task : waits) {
    task->seen = bell.turn;
    finish(task);
  }
}

bool Bells::heard(const std::string& key) {
  const auto found = bells_.find(key);
  if (found == bells_.end()) return false;
  Bell& bell = *found->second;
  // A question under way may have been answered before it rang or after that.
  bell.turn = 0;
  bell.asking = nullptr;
  bell.ask_at = 0;
  bell.pause = 0;
  wake(bell);
  return true;
}

void Bells::ring(const store::SpaceRef& space, const std::string& name) {
  heard(key_of(*space, name));
  // Not at all where the store refuses (no tables of locks, say): who waits elsewhere looks now and then.
  if (!shared_ || closing_ || timers_.now() < ring_at_) return;
  auto* ring = new Ring(*this);
  ring->verb = LockOp::Verb::ring;
  ring->space = space;
  ring->name = name;
  ring->deadline = saturating_add(timers_.now(), kAnswerTime);
  ++asked_;
  store_.submit(ring);
}

void Bells::look_now_and_then(Bell& bell) {
  const Nanos now = timers_.now();
  if (bell.waits.empty() && now - bell.idle_since >= kIdle) return erase(bell);
  if (shared_ && !bell.waits.empty() && !bell.asking && bell.ask_at <= now) {
    const bool pushes = store_.pushes();
    // It knows since now that it can tell us: what came before was missed.
    if (pushes && !bell.pushed) bell.turn = 0;
    if (pushes || bell.turn == 0) ask(bell);
  }
  wake(bell);
  plan(bell);
}

void Bells::plan(Bell& bell) {
  Nanos base = kPushed;
  if (shared_ && !bell.waits.empty() && !bell.asking && !(bell.turn != 0 && store_.pushes()))
    base = bell.pause = bell.pause == 0 ? kPollMin : std::min(2 * bell.pause, kPollMax);
  const double part = std::uniform_real_distribution<>(0.5, 1.5)(random_);
  timers_.arm(bell, saturating_add(timers_.now(), static_cast<Nanos>(part * static_cast<double>(base))));
}

void Bells::erase(Bell& bell) {
  timers_.cancel(bell);
  const store::SpaceRef space = bell.space;
  const std::string name = bell.name;
  const bool stands = bell.turn != 0;
  bells_.erase(std::string(bell.key));
  awaited_.fetch_sub(1);
  if (stands && shared_) store_.stop_waiting(space, name);
}

void Bells::cancel(BellWait* task, bool in_time) {
  if (!task->at_) return;
  Bell& bell = *task->at_;
  bell.waits.erase(task->place_);
  bell.idle_since = timers_.now();
  if (!in_time) task->status = Status::make(Code::cancelled, "the caller gave up");
  finish(task);
}

void Bells::finish(BellWait* task) {
  timers_.cancel(*task);
  task->at_ = nullptr;
  task->target->deliver(task);  // hands over the reference; task may be gone now
}

void Bells::shutdown() {
  closing_ = true;
  for (auto& [key, bell] : bells_) {
    timers_.cancel(*bell);
    for (BellWait* task : bell->waits)
      task->status =
          Status::make(Code::closed, "the engine was shut down; configure the store again to go on");
    wake(*bell);
  }
  awaited_.store(0);
  bells_.clear();
}

}  // namespace ratesync::engine
