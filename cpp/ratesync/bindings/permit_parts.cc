// A Permit of several limits: all or nothing. What needs no waiting on the memory store is decided here, on
// the calling thread; the rest is MultiService's.
#include <algorithm>
#include <utility>

#include "ratesync/bindings/calls.h"
#include "ratesync/bindings/convert.h"
#include "ratesync/bindings/permit.h"

namespace ratesync::bindings {

using engine::MultiTask;
using engine::Outcome;

namespace {

PyObject* object_of(PermitObject* permit) { return reinterpret_cast<PyObject*>(permit); }

// The implementations of all limiters, which are on one engine; empty with an exception set.
std::vector<LimiterImpl*> live_all(const PermitParts& parts) {
  std::vector<LimiterImpl*> impls;
  impls.reserve(parts.list.size());
  for (const PermitPart& part : parts.list) {
    LimiterImpl* impl = live(part.limiter);
    if (!impl) return {};
    impls.push_back(impl);
  }
  for (const LimiterImpl* impl : impls) {
    if (impl->engine == impls[0]->engine) continue;
    raise_closed(impl->engine->running() ? *impls[0] : *impl);
    return {};
  }
  return impls;
}

// Without a timeout, the shortest default of the limiters.
Nanos timeout_of(const PermitObject* permit, const std::vector<LimiterImpl*>& impls) {
  if (permit->timeout >= 0) return permit->timeout;
  Nanos least = kForever;
  for (const LimiterImpl* impl : impls) least = std::min(least, impl->core->policy.default_timeout);
  return least;
}

const char* word(store::Verdict why) { return why == store::Verdict::rate_limited ? "rate" : "concurrency"; }

// The part that has to be waited for longest; a full one counts as longest, since nobody knows.
std::size_t worst(const std::vector<store::AcquireReply>& replies) {
  std::size_t found = 0;
  const auto weight = [](const store::AcquireReply& reply) {
    return reply.verdict == store::Verdict::granted        ? Nanos{-1}
           : reply.verdict == store::Verdict::rate_limited ? reply.retry_after
                                                           : kForever;
  };
  for (std::size_t i = 1; i < replies.size(); ++i)
    if (weight(replies[i]) > weight(replies[found])) found = i;
  return found;
}

void note_grant(PermitObject* permit, bool has_rate, std::int64_t remaining, Nanos full_after, bool first) {
  permit->remaining = first ? remaining : std::min(permit->remaining, remaining);
  if (has_rate) permit->full_after = std::max(permit->full_after, full_after);
}

struct Quick {
  bool decided = false;
  bool granted = false;
  std::vector<store::AcquireReply> replies = {};
};

Quick quick_all(PermitObject* permit, const std::vector<LimiterImpl*>& impls, Nanos timeout, bool alone) {
  memory::MemoryStore* memory = impls[0]->memory;
  engine::Engine& engine = *impls[0]->engine;
  if (!memory || !engine.running()) return {};
  for (const LimiterImpl* impl : impls)
    if (impl->memory != memory) return {};
  // Others may stand in line for the same limits: the engine knows.
  if (engine.multi().waiting() > 0 && timeout != 0 && !alone) return {};
  std::vector<store::Part> parts;
  parts.reserve(impls.size());
  for (const PermitPart& part : permit->parts->list) parts.push_back({part.group, part.cost});
  Quick out;
  out.granted = memory->try_all_now(parts, &out.replies);
  out.decided = out.granted || timeout == 0;
  return out;
}

void take_quickly(PermitObject* permit, const std::vector<LimiterImpl*>& impls,
                  const std::vector<store::AcquireReply>& replies) {
  const Nanos now = impls[0]->engine->clock().now();
  permit->phase = Phase::granted;
  permit->waited = 0;
  permit->full_after = -1;
  permit->passed_open = false;
  for (std::size_t i = 0; i < impls.size(); ++i) {
    PermitPart& part = permit->parts->list[i];
    engine::Counters& counters = impls[i]->core->counters;
    counters.quick_acquisitions.store(counters.quick_acquisitions.load(std::memory_order_relaxed) + 1,
                                      std::memory_order_relaxed);
    counters.last_acquisition.store(now, std::memory_order_relaxed);
    note_grant(permit, part.group->params.has_rate(), replies[i].remaining, replies[i].full_after, i == 0);
    part.granted = true;
    part.remaining = replies[i].remaining;
    part.full_after = part.group->params.has_rate() ? replies[i].full_after : -1;
    if (!part.group->params.has_concurrency()) continue;
    part.slot = hold_slot(*impls[i], part.group, nullptr, replies[i].holder, permit->bare);
    counters.held.fetch_add(1, std::memory_order_relaxed);
  }
}

PyObject* refused_quickly(PermitObject* permit, const std::vector<LimiterImpl*>& impls, Mode mode,
                          const std::vector<store::AcquireReply>& replies) {
  const std::size_t blocking = worst(replies);
  engine::Counters& counters = impls[blocking]->core->counters;
  counters.timeouts.fetch_add(1, std::memory_order_relaxed);
  (replies[blocking].verdict == store::Verdict::rate_limited ? counters.refused_rate
                                                             : counters.refused_concurrency)
      .fetch_add(1, std::memory_order_relaxed);
  if (mode == Mode::boolean) Py_RETURN_FALSE;
  return raise_denied(*impls[blocking], permit->parts->list[blocking].group->id,
                      word(replies[blocking].verdict), replies[blocking].retry_after);
}

// What the caller of a granted permit gets. Only a Permit that the caller keeps keeps its slots.
PyObject* hand_out(PermitObject* permit, Mode mode) {
  if (mode == Mode::permit) return Py_NewRef(object_of(permit));
  for (PermitPart& part : permit->parts->list) part.slot = nullptr;
  return Py_NewRef(mode == Mode::boolean ? Py_True : Py_None);
}

// The same, as an awaitable that is done.
PyObject* ready(PermitObject* permit, PyObject* result) {
  if (!result || result == object_of(permit)) {
    permit->ready = result != nullptr;
    return result;
  }
  PyObject* done = result == Py_True    ? state().ready_true
                   : result == Py_False ? state().ready_false
                                        : state().ready_none;
  Py_DECREF(result);
  return Py_NewRef(done);
}

MultiTask* new_task(PermitObject* permit, const std::vector<LimiterImpl*>& impls, Nanos timeout) {
  std::vector<engine::MultiPart> wanted(impls.size());
  for (std::size_t i = 0; i < impls.size(); ++i) {
    wanted[i].limiter = impls[i]->core;
    wanted[i].group = permit->parts->list[i].group;
    wanted[i].cost = permit->parts->list[i].cost;
  }
  auto* task = new MultiTask(impls[0]->engine->multi(), std::move(wanted));
  task->submitted = impls[0]->engine->clock().now();
  task->deadline = saturating_add(task->submitted, timeout);
  return task;
}

}  // namespace

PyObject* begin_all(PermitObject* permit, Mode mode, bool async) {
  const std::vector<LimiterImpl*> impls = live_all(*permit->parts);
  if (impls.empty() || !check_startable(permit)) return nullptr;
  for (std::size_t i = 0; i < impls.size(); ++i) {
    PermitPart& part = permit->parts->list[i];
    part.granted = false;
    part.cost = permit->cost;
  }
  const Nanos timeout = timeout_of(permit, impls);
  const bool in_loop = !async && in_running_loop();
  const Quick quick = quick_all(permit, impls, timeout, in_loop);
  if (quick.decided) {
    if (quick.granted) take_quickly(permit, impls, quick.replies);
    PyObject* result =
        quick.granted ? hand_out(permit, mode) : refused_quickly(permit, impls, mode, quick.replies);
    return async ? ready(permit, result) : result;
  }
  if (in_loop) return raise_would_block(*impls[0]);
  MultiTask* task = new_task(permit, impls, timeout);
  return async ? submit_async(permit, *impls[0], task, mode) : submit_sync(permit, *impls[0], task, mode);
}

PyObject* finish_all(PermitObject* permit, MultiTask& task, Mode mode) {
  permit->phase = Phase::idle;
  permit->waited = task.waited;
  permit->full_after = -1;
  permit->passed_open = task.outcome == Outcome::passed_open;
  const PermitPart& blocking = permit->parts->list[task.blocking];
  LimiterImpl& culprit = *blocking.limiter->impl;
  switch (task.outcome) {
    case Outcome::passed_open:
    case Outcome::granted: break;
    case Outcome::refused:
      if (mode == Mode::boolean) Py_RETURN_FALSE;
      return raise_denied(culprit, blocking.group->id, word(task.why), task.retry_after);
    case Outcome::failed:
      if (task.outage) return raise_denied(culprit, blocking.group->id, "outage: " + task.status.message, 0);
      return raise_status(task.status, culprit.store_id);
    case Outcome::cancelled: PyErr_SetNone(state().cancelled_error); return nullptr;
  }
  permit->phase = Phase::granted;
  bool first = true;
  for (std::size_t i = 0; i < task.limits.size(); ++i) {
    const engine::MultiPart& from = task.limits[i];
    PermitPart& part = permit->parts->list[i];
    LimiterImpl& impl = *part.limiter->impl;
    part.granted = from.granted;
    if (!from.granted) continue;
    const Nanos full = from.full_after < 0 ? -1 : from.at + from.full_after - task.submitted - task.waited;
    part.remaining = from.remaining;
    part.full_after = from.charged && from.full_after >= 0 ? std::max<Nanos>(full, 0) : -1;
    note_grant(permit, from.charged, part.remaining, part.full_after, std::exchange(first, false));
    if (from.permit) part.slot = hold_slot(impl, part.group, from.permit, 0, permit->bare);
  }
  // After the slots are in the permit's hands: logging runs Python code.
  for (const PermitPart& part : permit->parts->list)
    if (!part.granted && !report_outage(*part.limiter->impl, task.status.message)) {
      let_go_all(permit);
      return nullptr;
    }
  return hand_out(permit, mode);
}

// A list of (granted, remaining, reset_after or None), in the order of the limits; None for one limit.
PyObject* answers_of_parts(PyObject* object, PyObject*) {
  const PermitParts* parts = reinterpret_cast<PermitObject*>(object)->parts;
  if (!parts) Py_RETURN_NONE;
  PyObject* list = PyList_New(0);
  for (const PermitPart& part : parts->list) {
    const auto left = static_cast<long long>(std::max<std::int64_t>(0, part.remaining));
    PyObject* item = !list ? nullptr
                     : part.full_after < 0
                         ? Py_BuildValue("(OLO)", part.granted ? Py_True : Py_False, left, Py_None)
                         : Py_BuildValue("(OLd)", part.granted ? Py_True : Py_False, left,
                                         static_cast<double>(part.full_after) / 1e9);
    if (!item || PyList_Append(list, item) < 0) Py_CLEAR(list);
    Py_XDECREF(item);
    if (!list) return nullptr;
  }
  return list;
}

void let_go_all(PermitObject* permit) {
  permit->phase = Phase::idle;
  permit->ready = false;
  for (PermitPart& part : permit->parts->list)
    if (const SlotRef slot = std::exchange(part.slot, nullptr)) release_slot(*part.limiter->impl, *slot);
}

bool any_held(const PermitParts& parts) {
  return std::any_of(parts.list.begin(), parts.list.end(), [](const PermitPart& part) {
    return part.slot && part.slot->held &&
           part.slot->generation == g_generation.load(std::memory_order_relaxed);
  });
}

void drop_all(PermitObject* permit) {
  if (!any_held(*permit->parts)) return;
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  if (PyErr_WarnFormat(PyExc_ResourceWarning, 1,
                       "a permit of the limiters '%s' was dropped without release: use `async with`, or keep "
                       "it and call release()",
                       joined_ids(*permit->parts).c_str()) < 0)
    PyErr_WriteUnraisable(nullptr);
  for (PermitPart& part : permit->parts->list) {
    if (!part.slot || !part.slot->held) continue;
    // As with one limit: a bare acquire stays releasable through its limiter for one lease.
    if (permit->bare) {
      release_after_lease(*part.limiter->impl, part.slot);
    } else {
      release_slot(*part.limiter->impl, *part.slot);
    }
  }
  PyErr_Restore(type, value, trace);
}

bool any_lost(const PermitParts& parts) {
  return std::any_of(parts.list.begin(), parts.list.end(), [](const PermitPart& part) {
    return part.slot && part.slot->permit && part.slot->permit->lost.load(std::memory_order_acquire);
  });
}

std::string joined_ids(const PermitParts& parts) {
  std::string ids;
  for (const PermitPart& part : parts.list) ids.append(ids.empty() ? "" : ", ").append(part.group->id);
  return ids;
}

PyObject* settle_all(PermitObject* permit, PyObject* actual_cost) {
  const std::vector<LimiterImpl*> impls = live_all(*permit->parts);
  if (impls.empty()) return nullptr;
  const bool whole = PyLong_Check(actual_cost) && !PyBool_Check(actual_cost);
  const long long actual = whole ? PyLong_AsLongLong(actual_cost) : -1;
  if (PyErr_Occurred()) PyErr_Clear();
  for (const LimiterImpl* impl : impls) {
    if (actual >= 0 && (actual == 0 || limits::validate_cost(impl->core->group->params, actual).ok()))
      continue;
    raise_invalid("the actual cost must be a whole number", "actual_cost", "int >= 0 within 31 years' reach",
                  actual_cost);
    return nullptr;
  }
  if (permit->phase != Phase::granted) {
    PyErr_SetString(PyExc_RuntimeError, "settle() before the grant: use it inside `with acquire(...)`");
    return nullptr;
  }
  struct Target {
    store::LimitStore* limits;
    store::GroupRef group;
    std::int64_t delta;
  };
  std::vector<Target> targets;
  for (std::size_t i = 0; i < impls.size(); ++i) {
    PermitPart& part = permit->parts->list[i];
    if (part.granted) targets.push_back({&impls[i]->core->service->limits(), part.group, actual - part.cost});
    part.cost = actual;
  }
  return make_call<store::Unit>(impls[0]->engine, impls[0]->store_id, [targets](auto done) {
    struct Open {
      std::size_t left = 0;
      Status status = Status::success();
    };
    auto open = std::make_shared<Open>();
    open->left = targets.size() + 1;
    // All are told; the first that failed is reported.
    const auto one_less = [open, done](const Status& status) {
      if (!status.ok() && open->status.ok()) open->status = status;
      if (--open->left > 0) return;
      open->status.ok() ? done(store::Unit{}) : done(open->status);
    };
    for (const Target& target : targets)
      target.limits->settle(target.group, target.delta,
                            [one_less](Result<store::Unit> result) { one_less(result.status()); });
    one_less(Status::success());
  });
}

}  // namespace ratesync::bindings
