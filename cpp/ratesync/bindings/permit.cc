// Permit: one acquisition as context manager, awaitable and permit in one object; and acquire(),
// which makes it. What needs no waiting on the memory store is decided here, on the calling
// thread, without touching the event loop.
#include "ratesync/bindings/permit.h"

#include <algorithm>

#include "ratesync/bindings/calls.h"
#include "ratesync/bindings/objects.h"

namespace ratesync::bindings {

using engine::AcquireTask;
using engine::Outcome;

namespace {

PermitObject* self_of(PyObject* object) { return reinterpret_cast<PermitObject*>(object); }
PyObject* object_of(PermitObject* permit) { return reinterpret_cast<PyObject*>(permit); }

Nanos timeout_of(const PermitObject* permit, const LimiterImpl& impl) {
  return permit->timeout < 0 ? impl.core->policy.default_timeout : permit->timeout;
}

const store::GroupRef& group_of(const PermitObject* permit, const LimiterImpl& impl) {
  return permit->group ? permit->group : impl.core->group;
}

}  // namespace

bool check_startable(PermitObject* permit) {
  if (permit->phase == Phase::pending) {
    PyErr_SetString(PyExc_RuntimeError, "this acquire() is already under way: call acquire() once per use");
    return false;
  }
  if ((permit->slot && permit->slot->held) || (permit->parts && any_held(*permit->parts))) {
    PyErr_SetString(PyExc_RuntimeError,
                    "this permit is still held: release it first, or call acquire() once per use");
    return false;
  }
  return true;
}

PyObject* raise_denied(const LimiterImpl& impl, const std::string& group, const std::string& reason,
                       Nanos retry_after) {
  PyObject* error =
      state().denied_error
          ? PyObject_CallFunction(state().denied_error, "s#s#d", group.data(), group.size(), reason.data(),
                                  reason.size(), static_cast<double>(retry_after) / 1e9)
          : PyObject_CallFunction(PyExc_TimeoutError, "s#", impl.id.data(), impl.id.size());
  if (error) {
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error)), error);
    Py_DECREF(error);
  }
  return nullptr;
}

SlotRef hold_slot(LimiterImpl& impl, const store::GroupRef& group, engine::PermitRef engine_permit,
                  store::HolderId holder, bool bare) {
  auto slot = std::make_shared<Slot>();
  slot->limiter = impl.core;
  slot->group = group;
  slot->permit = std::move(engine_permit);
  slot->holder = holder;
  slot->generation = impl.generation;
  if (!bare) return slot;
  if (impl.bare.size() >= impl.bare_sweep_at) {
    std::erase_if(impl.bare,
                  [](const SlotRef& other) { return !other->held.load(std::memory_order_relaxed); });
    impl.bare_sweep_at = std::max<std::size_t>(64, 2 * impl.bare.size());
  }
  impl.bare.push_back(slot);
  return slot;
}

namespace {

// Only a Permit that the caller holds keeps its slot; in the other forms the object is a means, and
// the slot stays with the limiter: with the task that entered it, or with the bare acquires.
void place_slot(PermitObject* permit, LimiterImpl& impl, Mode mode, bool async) {
  if (mode == Mode::permit) return;
  // Also without a slot: whoever leaves must not give back somebody else's.
  if (permit->entered && impl.core->group->params.has_concurrency())
    impl.entered[caller_key(async)].push_back(permit->slot);
  permit->slot = nullptr;
}

// The decision on the calling thread. True: decided (granted, or refused with nothing to wait for).
bool quick(PermitObject* permit, LimiterImpl& impl, memory::QuickReply* reply) {
  if (!impl.memory || !impl.engine->running()) return false;
  const limits::Params& params = impl.core->group->params;
  *reply = permit->group
               ? impl.memory->try_now(*permit->group, permit->cost)
               : impl.memory->try_now(*impl.pin.shard(), *impl.pin.cell(), *impl.core->group, permit->cost);
  engine::Counters& counters = impl.core->counters;
  if (reply->verdict == memory::Quick::granted) {
    // Plain adds: callers hold the GIL, and the I/O thread has counters of its own.
    counters.quick_acquisitions.store(counters.quick_acquisitions.load(std::memory_order_relaxed) + 1,
                                      std::memory_order_relaxed);
    counters.last_acquisition.store(reply->now, std::memory_order_relaxed);
    permit->phase = Phase::granted;
    permit->waited = 0;
    permit->remaining = permit->full_after = -1;
    permit->passed_open = false;
    if (params.has_concurrency()) {
      permit->slot = hold_slot(impl, group_of(permit, impl), nullptr, reply->holder, permit->bare);
      counters.held.fetch_add(1, std::memory_order_relaxed);
    }
    return true;
  }
  if (timeout_of(permit, impl) != 0) return false;
  counters.timeouts.fetch_add(1, std::memory_order_relaxed);
  (reply->why == store::Verdict::rate_limited ? counters.refused_rate : counters.refused_concurrency)
      .fetch_add(1, std::memory_order_relaxed);
  return true;
}

PyObject* refused_quickly(PermitObject* permit, const LimiterImpl& impl, const memory::QuickReply& reply) {
  return raise_denied(impl, group_of(permit, impl)->id,
                      reply.why == store::Verdict::rate_limited ? "rate" : "concurrency", reply.retry_after);
}

AcquireTask* new_task(PermitObject* permit, const LimiterImpl& impl) {
  auto* task = new AcquireTask(impl.core);
  task->group = group_of(permit, impl);
  task->cost = permit->cost;
  task->submitted = impl.engine->clock().now();
  task->deadline = saturating_add(task->submitted, timeout_of(permit, impl));
  return task;
}

}  // namespace

PyObject* raise_closed(const LimiterImpl& impl) {
  return raise_not_taken(
      *impl.engine, impl.store_id,
      "limiter '" + impl.id +
          "' belongs to an engine that was shut down: get it again with get_limiter(), or initialize() it if "
          "you constructed it");
}

PermitObject* new_permit(LimiterObject* limiter, Nanos timeout, std::int64_t cost, PyObject* key) {
  PyTypeObject* type = state().permit_type;
  PermitObject* permit = PyObject_New(PermitObject, type);
  if (!permit) return nullptr;
  Py_INCREF(reinterpret_cast<PyObject*>(limiter));
  permit->limiter = limiter;
  Py_XINCREF(key);
  permit->key = key;
  permit->timeout = timeout;
  permit->cost = cost;
  permit->remaining = -1;
  permit->waited = 0;
  permit->phase = Phase::idle;
  permit->full_after = -1;
  permit->ready = permit->bare = permit->entered = permit->passed_open = false;
  permit->parts = nullptr;
  new (&permit->slot) SlotRef();
  new (&permit->group) store::GroupRef();
  return permit;
}

PyObject* begin_async(PermitObject* permit, Mode mode) {
  if (permit->parts) return begin_all(permit, mode, true);
  LimiterImpl* impl = live(permit->limiter);
  if (!impl || !check_startable(permit)) return nullptr;
  memory::QuickReply reply;
  if (quick(permit, *impl, &reply)) {
    if (reply.verdict == memory::Quick::granted) {
      place_slot(permit, *impl, mode, true);
      if (mode == Mode::permit) {
        permit->ready = true;
        Py_INCREF(object_of(permit));
        return object_of(permit);
      }
      PyObject* ready = mode == Mode::none ? state().ready_none : state().ready_true;
      Py_INCREF(ready);
      return ready;
    }
    if (mode == Mode::boolean) {
      Py_INCREF(state().ready_false);
      return state().ready_false;
    }
    return refused_quickly(permit, *impl, reply);
  }
  return submit_async(permit, *impl, new_task(permit, *impl), mode);
}

PyObject* submit_async(PermitObject* permit, const LimiterImpl& impl, engine::Acquisition* task, Mode mode) {
  std::shared_ptr<LoopState> loop = running_loop_state();
  WaiterObject* waiter = loop ? new_waiter(impl.engine, loop) : nullptr;
  if (!waiter) {
    task->unref();
    return nullptr;
  }
  task->ref();  // one for the engine and its queue, one for the waiter
  task->target = loop->target;
  task->cookie = waiter;
  waiter->completion = task;
  waiter->mode = mode;
  Py_INCREF(object_of(permit));
  waiter->permit = permit;
  waiter->cancellable = true;
  Py_INCREF(reinterpret_cast<PyObject*>(waiter));  // the queue's
  if (!impl.engine->submit(engine::StartTask{task})) {
    waiter->state = WaiterObject::State::consumed;
    task->unref();
    Py_DECREF(reinterpret_cast<PyObject*>(waiter));
    Py_DECREF(reinterpret_cast<PyObject*>(waiter));
    return raise_closed(impl);
  }
  permit->phase = Phase::pending;
  return reinterpret_cast<PyObject*>(waiter);
}

PyObject* run_sync(PermitObject* permit, Mode mode) {
  if (permit->parts) return begin_all(permit, mode, false);
  LimiterImpl* impl = live(permit->limiter);
  if (!impl || !check_startable(permit)) return nullptr;
  memory::QuickReply reply;
  if (quick(permit, *impl, &reply)) {
    if (reply.verdict == memory::Quick::granted) {
      place_slot(permit, *impl, mode, false);
      if (mode == Mode::boolean) Py_RETURN_TRUE;
      if (mode == Mode::none) Py_RETURN_NONE;
      Py_INCREF(object_of(permit));
      return object_of(permit);
    }
    if (mode == Mode::boolean) Py_RETURN_FALSE;
    return refused_quickly(permit, *impl, reply);
  }
  if (in_running_loop()) return raise_would_block(*impl);
  return submit_sync(permit, *impl, new_task(permit, *impl), mode);
}

PyObject* raise_would_block(const LimiterImpl& impl) {
  PyErr_Format(PyExc_RuntimeError,
               "limiter '%s' would have to wait, which would block the running event loop: use `async "
               "with` / `await`",
               impl.id.c_str());
  return nullptr;
}

PyObject* submit_sync(PermitObject* permit, const LimiterImpl& impl, engine::Acquisition* task, Mode mode) {
  auto target = std::make_shared<engine::SyncTarget>();
  task->target = target;
  if (!impl.engine->submit(engine::StartTask{task})) {
    task->unref();
    return raise_closed(impl);
  }
  permit->phase = Phase::pending;
  // The engine may be replaced while the GIL is released: keep ours.
  const std::shared_ptr<engine::Engine> engine = impl.engine;
  engine::Completion* done = wait_sync(*engine, task, target, true);
  permit->phase = Phase::idle;
  if (!done) return nullptr;
  PyObject* result = finish_acquire(permit, *task, mode, false);
  task->unref();
  return result;
}

bool report_outage(LimiterImpl& impl, const std::string& message) {
  const Nanos now = impl.engine->clock().now();
  if (!state().log || (impl.logged != 0 && now - impl.logged <= 10 * kSecond)) return true;
  impl.logged = now;
  const std::string text = "limiter '" + impl.id + "': store '" + impl.store_id +
                           "' does not answer; calls pass unlimited (fail_closed=False): " + message;
  PyObject* nothing = PyObject_CallFunction(state().log, "ss#", "warning", text.data(), text.size());
  Py_XDECREF(nothing);
  return nothing != nullptr;
}

PyObject* finish_acquire(PermitObject* permit, engine::Acquisition& acquisition, Mode mode, bool async) {
  if (permit->parts) return finish_all(permit, static_cast<engine::MultiTask&>(acquisition), mode);
  auto& task = static_cast<AcquireTask&>(acquisition);
  LimiterImpl& impl = *permit->limiter->impl;
  permit->phase = Phase::idle;
  permit->waited = task.waited;
  permit->remaining = task.remaining;
  permit->full_after =
      task.full_at < 0 ? -1 : std::max<Nanos>(0, task.full_at - task.submitted - task.waited);
  permit->passed_open = task.outcome == Outcome::passed_open;
  switch (task.outcome) {
    case Outcome::passed_open:
      if (!report_outage(impl, task.status.message)) return nullptr;
      permit->phase = Phase::granted;
      break;
    case Outcome::granted:
      permit->phase = Phase::granted;
      if (task.permit) permit->slot = hold_slot(impl, group_of(permit, impl), task.permit, 0, permit->bare);
      break;
    case Outcome::refused:
      if (mode == Mode::boolean) Py_RETURN_FALSE;
      return raise_denied(impl, task.group->id,
                          task.why == store::Verdict::rate_limited ? "rate" : "concurrency",
                          task.retry_after);
    case Outcome::failed:
      if (task.outage) return raise_denied(impl, task.group->id, "outage: " + task.status.message, 0);
      return raise_status(task.status, impl.store_id);
    case Outcome::cancelled: PyErr_SetNone(state().cancelled_error); return nullptr;
  }
  place_slot(permit, impl, mode, async);
  switch (mode) {
    case Mode::permit: Py_INCREF(object_of(permit)); return object_of(permit);
    case Mode::boolean: Py_RETURN_TRUE;
    case Mode::none: break;
  }
  Py_RETURN_NONE;
}

namespace {

// A dropped bare permit, one lease later. Owns itself; I/O thread.
class LateRelease final : public engine::TimerNode {
 public:
  LateRelease(SlotRef slot, memory::MemoryStore* memory) : slot_(std::move(slot)), memory_(memory) {}
  void fire() override {
    if (slot_->held.exchange(false)) {
      engine::LimitService& service = *slot_->limiter->service;
      if (slot_->permit) {
        service.release(slot_->permit);
      } else if (memory_) {
        slot_->limiter->counters.held.fetch_sub(1, std::memory_order_relaxed);
        memory_->release_slot(slot_->group->id, slot_->holder);
        service.slot_freed(slot_->group->id);
      }
    }
    delete this;
  }

 private:
  const SlotRef slot_;
  memory::MemoryStore* const memory_;
};

}  // namespace

void release_after_lease(LimiterImpl& impl, const SlotRef& slot) {
  auto* late = new LateRelease(slot, impl.memory);
  const bool taken = impl.engine->submit(engine::Run{[late, slot] {
    engine::Timers& timers = slot->limiter->service->timers();
    timers.arm(*late, timers.now() + slot->group->params.lease);
  }});
  if (!taken) delete late;
}

void release_slot(LimiterImpl& impl, Slot& slot) {
  if (slot.generation != g_generation.load(std::memory_order_relaxed)) return;  // the parent's
  if (!slot.held.exchange(false)) return;
  engine::Counters& counters = slot.limiter->counters;
  counters.releases.fetch_add(1, std::memory_order_relaxed);
  if (slot.permit) {
    impl.engine->submit(engine::ReleasePermit{slot.permit});
    return;
  }
  counters.held.fetch_sub(1, std::memory_order_relaxed);
  if (!impl.memory) return;
  const bool somebody_waits =
      slot.group == impl.core->group
          ? impl.memory->release_slot(*impl.pin.shard(), *impl.pin.cell(), slot.holder)
          : impl.memory->release_slot(slot.group->id, slot.holder);
  if (somebody_waits) impl.engine->submit(engine::SlotFreed{slot.limiter, slot.group->id});
}

namespace {

void let_go(PermitObject* permit) {
  permit->phase = Phase::idle;
  permit->ready = false;
  if (permit->parts) return let_go_all(permit);
  if (!permit->slot) return;
  const SlotRef slot = std::move(permit->slot);
  permit->slot = nullptr;
  release_slot(*permit->limiter->impl, *slot);
}

PyObject* permit_aenter(PyObject* object, PyObject*) {
  PermitObject* permit = self_of(object);
  permit->entered = true;
  permit->bare = false;
  return begin_async(permit, Mode::permit);
}

PyObject* permit_aexit(PyObject* object, PyObject* const*, Py_ssize_t) {
  let_go(self_of(object));
  Py_INCREF(state().ready_none);
  return state().ready_none;
}

PyObject* permit_enter(PyObject* object, PyObject*) {
  PermitObject* permit = self_of(object);
  permit->entered = true;
  permit->bare = false;
  return run_sync(permit, Mode::permit);
}

PyObject* permit_exit(PyObject* object, PyObject* const*, Py_ssize_t) {
  let_go(self_of(object));
  Py_RETURN_NONE;
}

PyObject* permit_release(PyObject* object, PyObject*) {
  let_go(self_of(object));
  Py_RETURN_NONE;
}

// `await acquire("x")`: a bare acquire - unless __aenter__ has just granted and hands us out.
PyObject* permit_await(PyObject* object) {
  PermitObject* permit = self_of(object);
  if (permit->ready) {
    Py_INCREF(object);
    return object;
  }
  permit->bare = true;
  return begin_async(permit, Mode::permit);
}

PySendResult permit_send(PyObject* object, PyObject*, PyObject** result) {
  self_of(object)->ready = false;
  Py_INCREF(object);
  *result = object;
  return PYGEN_RETURN;
}

PyObject* permit_iternext(PyObject* object) {
  self_of(object)->ready = false;
  PyObject* stop = PyObject_CallOneArg(PyExc_StopIteration, object);
  if (stop) {
    PyErr_SetObject(PyExc_StopIteration, stop);
    Py_DECREF(stop);
  }
  return nullptr;
}

PyObject* permit_repr(PyObject* object) {
  const PermitObject* permit = self_of(object);
  const LimiterImpl& impl = *permit->limiter->impl;
  const char* phase = permit->phase == Phase::idle      ? "not held"
                      : permit->phase == Phase::pending ? "waiting"
                                                        : "granted";
  const std::string id = permit->parts ? joined_ids(*permit->parts) : group_of(permit, impl)->id;
  return PyUnicode_FromFormat("<Permit of '%s': %s>", id.c_str(), phase);
}

void permit_dealloc(PyObject* object) {
  PermitObject* permit = self_of(object);
  if (permit->parts) drop_all(permit);
  if (permit->slot && permit->slot->held &&
      permit->slot->generation == g_generation.load(std::memory_order_relaxed)) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    LimiterImpl& impl = *permit->limiter->impl;
    if (PyErr_WarnFormat(
            PyExc_ResourceWarning, 1,
            "a permit of limiter '%s' was dropped without release: use `async with`, or keep it and "
            "call release()",
            impl.id.c_str()) < 0)
      PyErr_WriteUnraisable(nullptr);
    if (permit->bare) {
      // Existing code writes `await acquire("x")` and later `await get_limiter("x").release()`: the
      // slot stays releasable that way for one lease, and comes back by itself after it.
      release_after_lease(impl, permit->slot);
    } else {
      release_slot(impl, *permit->slot);
    }
    PyErr_Restore(type, value, trace);
  }
  delete permit->parts;
  permit->slot.~shared_ptr();
  permit->group.~shared_ptr();
  Py_XDECREF(permit->key);
  Py_DECREF(reinterpret_cast<PyObject*>(permit->limiter));
  PyTypeObject* type = Py_TYPE(object);
  PyObject_Free(object);
  Py_DECREF(reinterpret_cast<PyObject*>(type));
}

PyObject* get_waited(PyObject* object, void*) {
  return PyFloat_FromDouble(static_cast<double>(self_of(object)->waited) / 1e9);
}

// The fast path does not compute what is rarely read; the store still knows.
void ask_memory(PermitObject* permit) {
  LimiterImpl* impl = permit->limiter->impl;
  if (permit->parts || permit->remaining >= 0 || permit->phase != Phase::granted || !impl->memory ||
      impl->generation != g_generation.load(std::memory_order_relaxed))
    return;
  impl->memory->peek(group_of(permit, *impl), [permit](Result<store::Peek> peek) {
    permit->remaining = peek.ok() ? peek.value().available : 0;
    permit->full_after = peek.ok() ? peek.value().full_after : -1;
  });
}

PyObject* get_remaining(PyObject* object, void*) {
  PermitObject* permit = self_of(object);
  ask_memory(permit);
  return PyLong_FromLongLong(std::max<std::int64_t>(0, permit->remaining));
}

PyObject* get_reset_after(PyObject* object, void*) {
  PermitObject* permit = self_of(object);
  ask_memory(permit);
  if (permit->parts)
    return permit->full_after < 0 ? Py_NewRef(Py_None)
                                  : PyFloat_FromDouble(static_cast<double>(permit->full_after) / 1e9);
  if (permit->full_after < 0 || !permit->limiter->impl->core->group->params.has_rate()) Py_RETURN_NONE;
  return PyFloat_FromDouble(static_cast<double>(permit->full_after) / 1e9);
}

PyObject* get_passed_open(PyObject* object, void*) { return PyBool_FromLong(self_of(object)->passed_open); }

PyObject* get_lost(PyObject* object, void*) {
  const PermitObject* permit = self_of(object);
  if (permit->parts) return PyBool_FromLong(any_lost(*permit->parts));
  return PyBool_FromLong(permit->slot && permit->slot->permit &&
                         permit->slot->permit->lost.load(std::memory_order_acquire));
}

PyObject* get_limiter_id(PyObject* object, void*) {
  const PermitObject* permit = self_of(object);
  const std::string id =
      permit->parts ? joined_ids(*permit->parts) : group_of(permit, *permit->limiter->impl)->id;
  return PyUnicode_FromStringAndSize(id.data(), static_cast<Py_ssize_t>(id.size()));
}

PyMethodDef kMethods[] = {
    {"__aenter__", permit_aenter, METH_NOARGS, "Acquire; gives this permit."},
    {"__aexit__", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(permit_aexit)), METH_FASTCALL,
     "Give the concurrency slot back."},
    {"__enter__", permit_enter, METH_NOARGS, "Acquire, blocking this thread; gives this permit."},
    {"__exit__", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(permit_exit)), METH_FASTCALL,
     "Give the concurrency slot back."},
    {"_parts", answers_of_parts, METH_NOARGS, "What each of several limits answered."},
    {"release", permit_release, METH_NOARGS,
     "release()\n--\n\nGive the concurrency slot back, if one is held. Calling it again does nothing.\n\n"
     "Example:\n    permit = await acquire(\"api\")\n    permit.release()"},
    {"settle", settle_method, METH_O,
     "settle(actual_cost)\n--\n\nCorrect the charge to what it really cost: gives the difference back, or "
     "charges more; at every limit of the permit.\n\n"
     "Args:\n    actual_cost: units, 0 or more.\n\nReturns:\n    A `Pending`: await it, or `.wait()` in a "
     "thread.\n\n"
     "Raises:\n    ConfigValidationError: not a whole number of 0 or more.\n    RuntimeError: before the "
     "grant.\n\n"
     "Example:\n    async with acquire(\"llm\", cost=1000) as permit:\n        await "
     "permit.settle(used_tokens)"},
    {nullptr, nullptr, 0, nullptr},
};

PyGetSetDef kGetSet[] = {
    {"waited", get_waited, nullptr, "Seconds between the call and the grant.", nullptr},
    {"remaining", get_remaining, nullptr,
     "Units (or slots) that were left right after the grant; of several limits, the least.", nullptr},
    {"reset_after", get_reset_after, nullptr,
     "Seconds, counted from the grant, until every unit is available again if nobody asks (of several "
     "limits, "
     "the longest); None for a limit without a rate, and where the store did not say.",
     nullptr},
    {"passed_open", get_passed_open, nullptr,
     "True when a store was out and the call was let pass without its decision (`fail_closed` off).",
     nullptr},
    {"lost", get_lost, nullptr,
     "True once the store has given this slot, or one of them, to somebody else (lease lost).", nullptr},
    {"limiter_id", get_limiter_id, nullptr,
     "The group that was charged: the limiter's id, with `:key` for a keyed one; of several limits, all of "
     "them, "
     "joined by a comma and a blank.",
     nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyType_Slot kSlots[] = {
    {Py_tp_doc,
     const_cast<char*>("One acquisition: context manager, awaitable, and the permit that it yields.\n\n"
                       "Made by `acquire()` and `RateLimiter.acquire_context()`.")},
    {Py_tp_dealloc, reinterpret_cast<void*>(permit_dealloc)},
    {Py_tp_repr, reinterpret_cast<void*>(permit_repr)},
    {Py_tp_methods, kMethods},
    {Py_tp_getset, kGetSet},
    {Py_tp_iter, reinterpret_cast<void*>(PyObject_SelfIter)},
    {Py_tp_iternext, reinterpret_cast<void*>(permit_iternext)},
    {Py_am_await, reinterpret_cast<void*>(permit_await)},
    {Py_am_send, reinterpret_cast<void*>(permit_send)},
    {0, nullptr},
};

PyType_Spec kSpec = {"ratesync._core.Permit", sizeof(PermitObject), 0,
                     Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
                     kSlots};

}  // namespace

bool init_permit_type(PyObject* module) {
  state().permit_type = reinterpret_cast<PyTypeObject*>(PyType_FromModuleAndSpec(module, &kSpec, nullptr));
  return state().permit_type &&
         PyModule_AddObjectRef(module, "Permit", reinterpret_cast<PyObject*>(state().permit_type)) == 0;
}

}  // namespace ratesync::bindings
