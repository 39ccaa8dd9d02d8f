// Reading what the limit script answers, and dealing it to the callers.
#include <algorithm>

#include "ratesync/limits/micro_rate.h"
#include "ratesync/redis/limit_plan.h"

namespace ratesync::redis {
namespace {

using limits::MicroRate;
using store::AcquireReply;
using store::Verdict;

Nanos nanos(std::int64_t micros) { return micros > kForever / kMicro ? kForever : micros * kMicro; }

// Whole numbers out of nested arrays; what does not fit is remembered.
class Cursor {
 public:
  explicit Cursor(const Reply& reply) : items_(&reply.items) {
    if (reply.kind != Reply::Kind::array) ok_ = false;
  }
  std::int64_t number() {
    const Reply* item = next();
    if (item && item->kind == Reply::Kind::integer) return item->integer;
    ok_ = false;
    return 0;
  }
  const Reply& array() {
    static const Reply none{Reply::Kind::array, 0, {}, {}};
    const Reply* item = next();
    if (item && item->kind == Reply::Kind::array) return *item;
    ok_ = false;
    return none;
  }
  [[nodiscard]] bool more() const { return at_ < items_->size(); }
  [[nodiscard]] bool ok() const { return ok_; }
  bool check(bool condition) { return ok_ = ok_ && condition; }

 private:
  const Reply* next() { return more() ? &(*items_)[at_++] : nullptr; }
  const std::vector<Reply>* items_;
  std::size_t at_ = 0;
  bool ok_ = true;
};

Standing read_standing(Cursor& from) {
  const Reply& array = from.array();
  Cursor c(array);
  Standing out{c.number(), c.number(), c.number(), c.number(), c.number()};
  from.check(c.ok());
  return out;
}

RunAnswer read_run(Cursor& from) {
  Cursor c(from.array());
  RunAnswer out;
  out.granted = c.number();
  out.full = c.number() == 2;
  out.wait = c.number();
  out.ahead = c.number();
  out.after = read_standing(c);
  Cursor waits(c.array());
  while (waits.more()) {
    const std::int64_t count = waits.number();
    out.waits.emplace_back(count, waits.number());
    if (!waits.ok()) break;
  }
  from.check(c.ok() && waits.ok());
  return out;
}

AllAnswer read_all(Cursor& from, std::size_t parts) {
  Cursor c(from.array());
  AllAnswer out;
  out.granted = c.number() == 1;
  for (std::size_t i = 0; i < parts; ++i) {
    Cursor part(c.array());
    AllAnswer::Part answer;
    const std::int64_t verdict = part.number();
    answer.verdict = verdict == 0   ? Verdict::granted
                     : verdict == 1 ? Verdict::rate_limited
                                    : Verdict::concurrency_full;
    answer.wait = part.number();
    answer.after = read_standing(part);
    c.check(part.ok());
    out.parts.push_back(answer);
  }
  from.check(c.ok());
  return out;
}

CallAnswer read_quick(const LimitCall& call, Cursor& c) {
  CallAnswer out;
  out.groups.resize(call.groups.size());
  out.runs.resize(call.runs.size());
  for (RunAnswer& run : out.runs) {
    run.granted = c.number();
    run.ahead = c.number();
    run.after.stamp = c.number();
  }
  return out;
}

}  // namespace

Result<CallAnswer> read_answer(const LimitCall& call, const Reply& reply) {
  Cursor c(reply);
  CallAnswer out;
  if (call.quick()) {
    out = read_quick(call, c);
  } else {
    for (std::size_t i = 0; i < call.groups.size(); ++i) {
      Cursor slots(c.array());
      CallAnswer::Slots state;
      if (slots.more()) {
        state.lost = slots.number() == 1;
        state.wrote = slots.number() == 1;
      }
      c.check(slots.ok());
      out.groups.push_back(state);
    }
    for (std::size_t i = 0; i < call.adjustments.size() + call.leaves.size(); ++i) (void)c.number();
    for (const AllParts& all : call.alls) out.alls.push_back(read_all(c, all.groups.size()));
    for (std::size_t i = 0; i < call.runs.size(); ++i) out.runs.push_back(read_run(c));
    for (std::size_t i = 0; i < call.peeks.size(); ++i) {
      Cursor peek(c.array());
      PeekAnswer answer;
      answer.now = read_standing(peek);
      answer.in_use = peek.number();
      answer.wait = peek.number();
      c.check(peek.ok());
      out.peeks.push_back(answer);
    }
    for (std::size_t i = 0; i < call.resets.size(); ++i) (void)c.number();
  }
  if (!c.ok() || c.more())
    return Status::make(Code::protocol, "the limit script answered what it never answers");
  return out;
}

void deal_run(Run& run, const store::Group& group, const RunAnswer& answer, store::HolderId holder,
              Nanos planned_at, OpList& done, OpList& again) {
  const limits::Params& params = group.params;
  const MicroRate rate(params);
  const bool bucket = rate.interval > 0;
  const auto n = static_cast<std::int64_t>(run.ops.size());
  const std::int64_t granted = std::clamp<std::int64_t>(answer.granted, 0, n);
  const std::int64_t ahead = answer.ahead + (bucket ? rate.span(granted * run.cost) : 0);
  const std::int64_t remaining = bucket              ? rate.available(ahead)
                                 : params.has_rate() ? answer.after.remaining
                                                     : answer.after.free;
  auto wait = answer.waits.begin();
  std::int64_t of_this_wait = 0;
  for (std::int64_t i = 0; i < granted; ++i) {
    QueuedOp& op = run.ops[static_cast<std::size_t>(i)];
    AcquireReply& reply = op.acquire->reply;
    reply = AcquireReply{};
    reply.remaining = remaining;
    reply.holder = params.has_concurrency() ? holder : 0;
    if (bucket) {
      const std::int64_t us = answer.ahead + rate.span((i + 1) * run.cost) - rate.burst_span;
      reply.wait = us <= rate.margin ? 0 : nanos(us);
      reply.full_after = nanos(ahead);
    } else if (params.has_rate()) {
      while (wait != answer.waits.end() && of_this_wait >= wait->first) {
        ++wait;
        of_this_wait = 0;
      }
      ++of_this_wait;
      reply.wait = wait == answer.waits.end() ? 0 : nanos(wait->second);
      reply.full_after = nanos(answer.after.full_after);
    }
    if (params.has_rate()) reply.stamp = answer.after.stamp;
    done.push_back(std::move(op));
  }

  const std::int64_t slot = bucket ? ahead + rate.span(run.cost) - rate.burst_span : answer.wait;
  const Nanos retry_after = slot > rate.margin ? nanos(slot - rate.margin) : 0;
  for (std::int64_t i = granted; i < n; ++i) {
    QueuedOp& op = run.ops[static_cast<std::size_t>(i)];
    const Nanos deadline = op.acquire->deadline;
    const Nanos patience = deadline == kForever ? kForever : std::max<Nanos>(0, deadline - planned_at);
    if (!answer.full && patience > run.patience && retry_after <= patience) {
      op.exact = true;
      again.push_back(std::move(op));
      continue;
    }
    AcquireReply& reply = op.acquire->reply;
    reply = AcquireReply{};
    reply.verdict = answer.full ? Verdict::concurrency_full : Verdict::rate_limited;
    reply.retry_after = answer.full ? 0 : retry_after;
    reply.remaining = answer.full ? 0 : remaining;
    done.push_back(std::move(op));
  }
  run.ops.clear();
}

AcquireReply deal_part(const store::Part& part, const AllAnswer& all, const AllAnswer::Part& answer,
                       store::HolderId holder) {
  const limits::Params& params = part.group->params;
  const MicroRate rate(params);
  const bool bucket = rate.interval > 0;
  AcquireReply out;
  out.verdict = answer.verdict;
  out.remaining = bucket              ? rate.available(answer.after.ahead)
                  : params.has_rate() ? answer.after.remaining
                                      : answer.after.free;
  if (answer.verdict == Verdict::rate_limited)
    out.retry_after = nanos(std::max<std::int64_t>(1, answer.wait - rate.margin));
  if (params.has_rate()) out.full_after = nanos(bucket ? answer.after.ahead : answer.after.full_after);
  if (!all.granted) return out;
  if (params.has_rate()) out.stamp = answer.after.stamp;
  if (params.has_concurrency()) out.holder = holder;
  return out;
}

store::Peek deal_peek(const limits::Params& params, const PeekAnswer& answer) {
  store::Peek out;
  out.in_use = answer.in_use;
  const MicroRate rate(params);
  if (rate.interval > 0) {
    out.available = rate.available(answer.now.ahead);
    out.full_after = nanos(answer.now.ahead);
    out.retry_after = answer.wait > rate.margin ? nanos(answer.wait - rate.margin) : 0;
  } else if (params.has_rate()) {
    out.available = answer.now.remaining;
    out.used = params.limit - out.available;
    out.full_after = nanos(answer.now.full_after);
    out.retry_after = nanos(answer.wait);
  }
  if (params.has_concurrency()) {
    const std::int64_t free = std::max<std::int64_t>(0, params.max_concurrent - answer.in_use);
    out.available = params.has_rate() ? std::min(out.available, free) : free;
  }
  return out;
}

}  // namespace ratesync::redis
