// One call of a lane: its number and receipt, and what is done when its answer is lost.

#include <algorithm>
#include <chrono>
#include <random>
#include <utility>

#include "ratesync/base/format.h"
#include "ratesync/redis/lane_trip.h"
#include "ratesync/redis/scripts.h"

namespace ratesync::redis {
namespace {

constexpr std::int64_t kReceiptLife = 600'000;            // ms; ten times kMostPatience
constexpr Nanos kGreetAgain = kReceiptLife / 2 * kMilli;  // since the lane was used
constexpr Nanos kAskAgain = 50 * kMilli;                  // about a receipt
constexpr Nanos kMostPatience = 60 * kSecond;             // for one without a deadline
constexpr unsigned kMostAttempts = 2;
constexpr unsigned kMostRefusals = 5;

std::string session_name() {
  static thread_local std::mt19937_64 random{(static_cast<std::uint64_t>(std::random_device{}()) << 32) ^
                                             std::random_device{}()};
  return formatted("{:016x}", random());
}

bool is_certain(const Status& status) {
  return status.code == Code::unavailable || status.code == Code::timeout || status.code == Code::exhausted ||
         status.code == Code::closed;
}

Status doubt(const std::string& target, const std::string& why) {
  return Status::make(Code::in_doubt,
                      formatted("{} did not answer whether this was executed: {}", target, why));
}

}  // namespace

Lanes::Lane& Lanes::lane_of(const Trip& trip) { return lanes_[trip.batcher][trip.batch.lane]; }

// --- sending ------------------------------------------------------------------------------------------

void Lanes::send(const TripPtr& trip) {
  Lane& lane = lane_of(*trip);
  trip->sent = clock_.now();
  if (!lane.greeted || trip->sent - lane.used > kGreetAgain) return greet(trip);
  trip->writes = false;
  CallWriter items;
  Nanos deadline = 0;
  host_.begin(items);
  for (const LaneItem& item : trip->aboard) {
    trip->writes |= host_.write(item, trip->looking, items);
    deadline = std::max(deadline, host_.deadline(item));
  }
  trip->number = lane.number + (trip->writes ? 1 : 0);
  carried_ += trip->aboard.size();
  backend_.commander().eval(host_.script(), lane.receipt,
                            items.command(lane.receipt, {lane.number, trip->number, kReceiptLife}),
                            std::min(deadline, saturating_add(trip->sent, options_.call_timeout)),
                            [this, trip, alive = alive_](Result<Reply> reply) {
                              if (*alive) answered(trip, std::move(reply));
                            });
}

// A receipt of a new name, so that whatever is left of an earlier one is refused.
void Lanes::greet(const TripPtr& trip) {
  Lane& lane = lane_of(*trip);
  lane.greeted = false;
  lane.number = 0;
  lane.receipt = keys_.shard(options_.what + "-receipt", lane.shard) + ':' + session_name();
  Command set("SET");
  set.add(lane.receipt).add("0").add("PX").add(kReceiptLife);
  backend_.commander().call(lane.receipt, std::move(set), saturating_add(trip->sent, options_.call_timeout),
                            [this, trip, alive = alive_](const Result<Reply>& reply) {
                              if (!*alive) return;
                              if (!reply.ok()) return not_executed(trip, reply.status());
                              Lane& greeted = lane_of(*trip);
                              greeted.greeted = true;
                              greeted.used = clock_.now();
                              send(trip);
                            });
}

void Lanes::answered(const TripPtr& trip, Result<Reply> reply) {
  if (!reply.ok()) return failed(trip, reply.status());
  std::vector<Reply>& items = reply.value().items;
  const std::int64_t verdict =
      items.empty() || items.front().kind != Reply::Kind::integer ? 0 : items.front().integer;
  Lane& lane = lane_of(*trip);
  if (verdict == -1) {
    // The receipt is not what it was left as: the server lost its memory. Nothing of this was executed.
    lane.greeted = false;
    if (++trip->refusals <= kMostRefusals) return send(trip);
    return settle(trip,
                  Status::make(Code::unavailable,
                               "the server keeps forgetting what was written to it a moment ago: does it "
                               "evict keys, or lose its replicas? ratesync doctor tells more"));
  }
  if (verdict != 1 && verdict != 2)
    return settle(trip, Status::make(Code::protocol, "a script answered what it never answers"));
  lane.used = trip->sent;
  if (verdict == 1) lane.number = trip->number;
  executed(trip, items);
}

void Lanes::executed(const TripPtr& trip, std::vector<Reply>& items) {
  Answers answers(items, 1);
  std::vector<Status> statuses;
  statuses.reserve(trip->aboard.size());
  for (const LaneItem& item : trip->aboard) {
    const Heard heard = host_.read(item, trip->looking, answers);
    if (!answers.ok())
      statuses.push_back(Status::make(Code::protocol, "a script answered what it never answers"));
    else if (heard == Heard::doubtful)
      statuses.push_back(
          Status::make(Code::in_doubt, "the answer was lost, and what it wrote was written over or is gone"));
    else
      statuses.push_back(Status::success());
  }
  settle(trip, std::move(statuses));
}

// --- the end of a call --------------------------------------------------------------------------------

void Lanes::settle(const TripPtr& trip, const Status& status) {
  settle(trip, std::vector<Status>(trip->aboard.size(), status));
}

// The next call leaves before the callers of this one are told: server and client overlap.
void Lanes::settle(const TripPtr& trip, std::vector<Status> statuses) {
  const std::vector<LaneItem> items = std::exchange(trip->aboard, {});
  const auto ghosts = std::exchange(trip->ghosts, {});
  if (Gate* gate = std::exchange(trip->gate, nullptr))
    open(gate);
  else
    advance(trip);
  for (std::size_t i = 0; i < items.size(); ++i) host_.tell(items[i], statuses[i]);
}

void Lanes::failed(const TripPtr& trip, const Status& status) {
  if (is_certain(status)) return not_executed(trip, status);
  if (status.code == Code::in_doubt) {
    backend_.not_answered();
    if (closing_) return settle(trip, status);
    if (trip->writes) return resolve(trip);
    // Nothing was changed.
    return not_executed(trip, Status::make(Code::unavailable, status.message));
  }
  // The script ended in the middle, and left no receipt.
  lane_of(*trip).greeted = false;
  settle(trip, status);
}

void Lanes::not_executed(const TripPtr& trip, const Status& status) {
  if (is_certain(status) || status.code == Code::in_doubt) backend_.not_answered();
  const bool again = (status.code == Code::unavailable || status.code == Code::in_doubt) && !closing_ &&
                     trip->attempt++ < kMostAttempts;
  if (again)
    return backend_.when_ready([this, trip, alive = alive_](const Status& ready) {
      if (!*alive) return;
      if (ready.ok()) return send(trip);
      trip->attempt = kMostAttempts;
      not_executed(trip, ready);
    });
  if (trip->looking) return settle(trip, doubt(backend_.commander().target(), status.message));
  if (status.code == Code::in_doubt)  // of a greeting
    return settle(trip, Status::make(Code::unavailable, status.message));
  settle(trip, status);
}

// --- in doubt -----------------------------------------------------------------------------------------

void Lanes::resolve(const TripPtr& trip) {
  trip->until = 0;
  for (const LaneItem& item : trip->aboard) trip->until = std::max(trip->until, host_.deadline(item));
  trip->until = std::min(trip->until, saturating_add(clock_.now(), kMostPatience));
  doubtful_.push_back(trip);
  if (doubtful_.size() == 1) arm_doubt();
  ask_receipt(trip);
}

void Lanes::arm_doubt() {
  doubt_timer_->expires_after(std::chrono::nanoseconds(kAskAgain));
  doubt_timer_->async_wait([this, alive = alive_](const asio::error_code&) {
    if (!*alive) return;
    for (const TripPtr& trip : std::vector<TripPtr>(doubtful_)) look_after(trip);
    if (!doubtful_.empty()) arm_doubt();
  });
}

// Now and then, while nobody knows: who has no time left is told.
void Lanes::look_after(const TripPtr& trip) {
  const Nanos now = clock_.now();
  if (closing_ || now >= trip->until) {
    end_doubt(*trip);
    lane_of(*trip).greeted = false;
    return settle(trip, doubt(backend_.commander().target(), "no answer before the deadline"));
  }
  std::vector<LaneItem> late;
  for (LaneItem& item : trip->aboard) {
    if (host_.deadline(item) > now) continue;
    // The others need its place in the answer.
    auto [ghost, owner] = host_.ghost(item);
    trip->ghosts.push_back(std::move(owner));
    late.push_back(std::exchange(item, ghost));
  }
  if (trip->gate && !late.empty() && !trip->gate->dead) bury(trip->gate);
  if (!trip->asking) ask_receipt(trip);
  for (const LaneItem& item : late)
    host_.tell(item, doubt(backend_.commander().target(), "no answer before the deadline"));
}

void Lanes::end_doubt(Trip& trip) {
  ++trip.question;
  std::erase_if(doubtful_, [&trip](const TripPtr& each) { return each.get() == &trip; });
}

void Lanes::ask_receipt(const TripPtr& trip) {
  trip->asking = true;
  backend_.when_ready([this, trip, question = ++trip->question, alive = alive_](const Status& status) {
    if (!*alive || trip->question != question) return;
    if (!status.ok()) {
      trip->asking = false;
      return;
    }
    const Lane& lane = lane_of(*trip);
    Command arguments("1");
    arguments.add(lane.receipt).add(lane.number).add(trip->number).add(trip->number + 1).add(kReceiptLife);
    backend_.commander().eval(recover_script(), lane.receipt, std::move(arguments),
                              std::min(trip->until, saturating_add(clock_.now(), options_.call_timeout)),
                              [this, trip, question, alive](Result<Reply> reply) {
                                if (*alive && trip->question == question)
                                  told_receipt(trip, std::move(reply));
                              });
  });
}

void Lanes::told_receipt(const TripPtr& trip, Result<Reply> reply) {
  trip->asking = false;
  Lane& lane = lane_of(*trip);
  if (!reply.ok()) {
    if (is_certain(reply.status()) || reply.status().code == Code::in_doubt)
      return backend_.not_answered();  // asked again
    end_doubt(*trip);
    lane.greeted = false;
    return settle(trip, doubt(backend_.commander().target(), reply.status().message));
  }
  end_doubt(*trip);
  std::vector<Reply>& items = reply.value().items;
  const std::int64_t verdict = items.empty() ? -1 : items.front().integer;
  lane.used = clock_.now();
  trip->attempt = 1;
  if (verdict == 3 && items.size() == 2) {
    lane.number = trip->number;
    return executed(trip, items[1].items);
  }
  if (verdict == 1) {  // not executed
    lane.number = trip->number + 1;
    return send(trip);
  }
  if (verdict == 2)
    lane.number = trip->number;
  else
    lane.greeted = false;
  trip->looking = true;
  send(trip);
}

}  // namespace ratesync::redis
