// Lock: base of ratesync.Lock. A named lock of a space, `async with`, `with`, or acquire().
#include "ratesync/bindings/locks.h"

#include <pybind11/pybind11.h>
#include <structmember.h>

#include <algorithm>
#include <tuple>

#include "ratesync/bindings/convert.h"
#include "ratesync/bindings/state.h"

namespace py = pybind11;

namespace ratesync::bindings {

using engine::LockAcquire;
using engine::LockBreak;

namespace {

// Spaces of a store that are looked up without building their strings anew.
constexpr std::size_t kMaxHomes = 64;

LockObject* self_of(PyObject* object) { return reinterpret_cast<LockObject*>(object); }
PyObject* object_of(LockObject* lock) { return reinterpret_cast<PyObject*>(lock); }
PyObject* object_of(LeaseObject* lease) { return reinterpret_cast<PyObject*>(lease); }

// What of `terms` is given. False with an exception set.
bool read_terms(PyObject* ttl, PyObject* timeout, PyObject* auto_renew, LockTerms* terms) {
  bool ok = true;
  if (ttl && !check_lease_ttl(ttl, &terms->ttl_ms)) return false;
  if (timeout) terms->timeout = parse_timeout(timeout, kForever, &ok);
  if (!ok) return false;
  if (auto_renew) {
    const int truth = PyObject_IsTrue(auto_renew);
    if (truth < 0) return false;
    terms->auto_renew = truth != 0;
  }
  return true;
}

PyStore* store_of(PyObject* object) {
  try {
    return py::cast<PyStore*>(py::handle(object));
  } catch (const py::cast_error&) {
    PyErr_SetString(PyExc_TypeError, "store must be a _core.Store");
    return nullptr;
  }
}

int lock_init(PyObject* object, PyObject* args, PyObject* kwargs) {
  static const char* names[] = {"store", "prefix",  "namespace",  "tenant", "name",
                                "ttl",   "timeout", "auto_renew", nullptr};
  PyObject *store_object, *prefix, *name_space, *tenant, *name;
  PyObject *ttl = nullptr, *timeout = nullptr, *auto_renew = nullptr;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOOO|$OOO:Lock", const_cast<char**>(names), &store_object,
                                   &prefix, &name_space, &tenant, &name, &ttl, &timeout, &auto_renew))
    return -1;
  LockObject* self = self_of(object);
  if (self->impl) {
    PyErr_SetString(PyExc_RuntimeError, "a lock is initialised once: its leases refer to what it is");
    return -1;
  }
  LockTerms terms;
  if (!check_name(name, "name", kMaxName) || !read_terms(ttl, timeout, auto_renew, &terms)) return -1;
  PyStore* store = store_of(store_object);
  LockHomeRef home = store ? lock_home(*store, prefix, name_space, tenant) : nullptr;
  if (!home) return -1;
  self->impl = new LockImpl{std::move(home), std::string(utf8(name)), terms};
  return 0;
}

// Rebinds after fork; null with an exception set.
LockImpl* live(LockObject* self) {
  LockImpl* impl = self->impl;
  if (!impl) {
    PyErr_SetString(PyExc_RuntimeError, "the lock was not initialised: call super().__init__()");
    return nullptr;
  }
  if (impl->home->ours()) return impl;
  if (!PyObject_HasAttrString(object_of(self), "_renew")) {
    raise_status(Status::make(Code::closed, "this lock was made before fork: make it again in the child"),
                 impl->home->store_id);
    return nullptr;
  }
  PyObject* fresh = PyObject_CallMethod(object_of(self), "_renew", nullptr);
  if (!fresh) return nullptr;
  if (PyObject_TypeCheck(fresh, state().lock_type) && self_of(fresh)->impl &&
      self_of(fresh)->impl->home->ours()) {
    // What belongs to the parent is leaked on purpose.
    impl = self->impl = new LockImpl{self_of(fresh)->impl->home, impl->name, impl->terms};
  } else {
    PyErr_SetString(PyExc_TypeError, "_renew() must return a Lock made in this process");
    impl = nullptr;
  }
  Py_DECREF(fresh);
  return impl;
}

// --- asking ---------------------------------------------------------------------------------------

PyObject* raise_not_in_time(const LockImpl& impl, Nanos timeout, const std::string& holder,
                            std::int64_t remaining_ms) {
  PyObject* hook = state().lock_timeout ? state().lock_timeout : PyExc_TimeoutError;
  PyObject* remaining =
      remaining_ms > 0 ? PyFloat_FromDouble(static_cast<double>(remaining_ms) / 1e3) : Py_NewRef(Py_None);
  PyObject* error = remaining ? PyObject_CallFunction(hook, "s#dzN", impl.name.data(),
                                                      static_cast<Py_ssize_t>(impl.name.size()),
                                                      static_cast<double>(timeout) / 1e9,
                                                      holder.empty() ? nullptr : holder.c_str(), remaining)
                              : nullptr;
  if (error) {
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error)), error);
    Py_DECREF(error);
  }
  return nullptr;
}

PyObject* raise_closed(const LockImpl& impl) {
  return raise_not_taken(
      *impl.home->engine, impl.home->store_id,
      "lock '" + impl.name + "' belongs to an engine that was shut down: get it again with store.lock()");
}

LockAcquire* new_task(const LockImpl& impl, const LockTerms& terms) {
  auto* task = new LockAcquire(*impl.home->service);
  task->space = impl.home->space;
  task->name = impl.name;
  task->auto_renew = terms.auto_renew;
  task->lease_ms = terms.ttl_ms;
  task->submitted = impl.home->engine->clock().now();
  task->until = saturating_add(task->submitted, terms.timeout);
  return task;
}

// On stores that decide at once. None: taken, and there is no time to wait; null without an exception: it has
// to be waited for.
PyObject* decide(const LockImpl& impl, const LockTerms& terms) {
  const LockHome& home = *impl.home;
  if (!home.direct()) return nullptr;
  if (!home.engine->running()) return raise_closed(impl);
  // Nobody overtakes those who wait.
  if (terms.timeout != 0 && home.service->somebody_waits()) return nullptr;
  store::LockReply reply;
  engine::HeldLockRef lease =
      home.service->take_now(home.space, impl.name, terms.ttl_ms, terms.auto_renew, &reply);
  if (lease) return object_of(new_lease(impl.home, std::move(lease)));
  if (!reply.status.ok()) return raise_status(reply.status, home.store_id);
  if (terms.timeout == 0) Py_RETURN_NONE;
  return nullptr;
}

// A Lease; None: not in time; null with an exception set.
PyObject* outcome_of(const LockImpl& impl, LockAcquire& task) {
  switch (task.outcome) {
    case LockAcquire::Outcome::held:
      return object_of(new_lease(impl.home, std::exchange(task.lease, nullptr)));
    case LockAcquire::Outcome::not_in_time: Py_RETURN_NONE;
    case LockAcquire::Outcome::failed: return raise_status(task.status, impl.home->store_id);
    case LockAcquire::Outcome::cancelled: PyErr_SetNone(state().cancelled_error); return nullptr;
  }
  Py_UNREACHABLE();
}

PyObject* finish_acquire_lock(PyObject* owner, engine::Completion& completion) {
  return outcome_of(*self_of(owner)->impl, static_cast<LockAcquire&>(completion));
}

// --- with -----------------------------------------------------------------------------------------

PyObject* entered(LockImpl& impl, PyObject* lease, bool async) {
  if (lease) impl.entered.emplace_back(caller_key(async), reinterpret_cast<LeaseObject*>(Py_NewRef(lease)));
  return lease;
}

PyObject* finish_enter(PyObject* owner, LockAcquire& task, bool async) {
  LockImpl& impl = *self_of(owner)->impl;
  PyObject* lease = outcome_of(impl, task);
  if (lease != Py_None) return entered(impl, lease, async);
  Py_DECREF(lease);
  return raise_not_in_time(impl, task.until == kForever ? kForever : task.until - task.submitted, task.holder,
                           task.remaining_ms);
}

PyObject* finish_aenter(PyObject* owner, engine::Completion& completion) {
  return finish_enter(owner, static_cast<LockAcquire&>(completion), true);
}

PyObject* finish_with(PyObject* owner, engine::Completion& completion) {
  return finish_enter(owner, static_cast<LockAcquire&>(completion), false);
}

PyObject* enter(LockObject* self, bool async) {
  LockImpl* impl = live(self);
  if (!impl) return nullptr;
  PyObject* result = decide(*impl, impl->terms);
  if (result == Py_None) {
    Py_DECREF(result);
    return raise_not_in_time(*impl, 0, {}, 0);
  }
  if (result) return entered(*impl, result, async);
  if (PyErr_Occurred()) return nullptr;
  const LockHome& home = *impl->home;
  if (async)
    return begin_task(home.engine, home.store_id, new_task(*impl, impl->terms), object_of(self),
                      finish_aenter, true);
  if (in_running_loop()) {
    PyErr_Format(
        PyExc_RuntimeError,
        "lock '%s' would have to be waited for, which would block the running event loop: use `async "
        "with` / `await`",
        impl->name.c_str());
    return nullptr;
  }
  return block_task(home.engine, home.store_id, new_task(*impl, impl->terms), object_of(self), finish_with,
                    true);
}

PyObject* leave(LockObject* self, PyObject* const* args, Py_ssize_t nargs, bool async) {
  LockImpl* impl = self->impl;
  if (!impl || impl->entered.empty()) {
    PyErr_SetString(PyExc_RuntimeError, "the lock was not entered");
    return nullptr;
  }
  auto at = std::prev(impl->entered.end());
  if (impl->entered.size() > 1) {
    const std::uint64_t key = caller_key(async);
    const auto mine = std::find_if(impl->entered.rbegin(), impl->entered.rend(),
                                   [key](const auto& entry) { return entry.first == key; });
    // Left by another task than entered it (an exit stack): the latest one, then.
    if (mine != impl->entered.rend()) at = std::prev(mine.base());
  }
  LeaseObject* lease = at->second;
  impl->entered.erase(at);
  PyObject* result = leave_lease(lease, async, nargs > 0 && args[0] != Py_None);
  Py_DECREF(object_of(lease));
  return result;
}

PyObject* lock_aenter(PyObject* self, PyObject*) { return enter(self_of(self), true); }
PyObject* lock_enter(PyObject* self, PyObject*) { return enter(self_of(self), false); }
PyObject* lock_aexit(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
  return leave(self_of(self), args, nargs, true);
}
PyObject* lock_exit(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
  return leave(self_of(self), args, nargs, false);
}

PyObject* lock_acquire(PyObject* object, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  static const Signature kSignature = {
      "acquire",
      3,
      3,
      0,
      {PyUnicode_InternFromString("ttl"), PyUnicode_InternFromString("timeout"),
       PyUnicode_InternFromString("auto_renew")}};
  PyObject* given[3];
  if (!bind_arguments(kSignature, args, nargs, kwnames, given)) return nullptr;
  LockImpl* impl = live(self_of(object));
  if (!impl) return nullptr;
  LockTerms terms = impl->terms;
  if (!read_terms(given[0], given[1], given[2], &terms)) return nullptr;
  return make_task_call({impl->home->engine, impl->home->store_id, object, finish_acquire_lock, true,
                         [impl, terms] { return new_task(*impl, terms); },
                         [impl, terms] { return decide(*impl, terms); }});
}

// --- the object -----------------------------------------------------------------------------------

PyObject* get_name(PyObject* object, void*) {
  const LockImpl* impl = self_of(object)->impl;
  if (!impl) Py_RETURN_NONE;
  return PyUnicode_FromStringAndSize(impl->name.data(), static_cast<Py_ssize_t>(impl->name.size()));
}

int lock_traverse(PyObject* object, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(object));
  if (!self_of(object)->impl) return 0;
  for (const auto& [key, lease] : self_of(object)->impl->entered) Py_VISIT(object_of(lease));
  return 0;
}

int lock_clear(PyObject* object) {
  LockImpl* impl = self_of(object)->impl;
  if (!impl) return 0;
  const auto left = std::exchange(impl->entered, {});
  for (const auto& [key, lease] : left) Py_DECREF(object_of(lease));
  return 0;
}

void lock_dealloc(PyObject* object) {
  LockObject* self = self_of(object);
  PyObject_GC_UnTrack(object);
  if (self->weakrefs) PyObject_ClearWeakRefs(object);
  (void)lock_clear(object);
  if (self->impl && self->impl->home->ours()) delete self->impl;  // otherwise the parent's, leaked on purpose
  PyTypeObject* type = Py_TYPE(object);
  type->tp_free(object);
  Py_DECREF(reinterpret_cast<PyObject*>(type));
}

template <class Function>
PyCFunction method(Function function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function));
}

PyMethodDef kMethods[] = {
    {"acquire", method(lock_acquire), METH_FASTCALL | METH_KEYWORDS,
     "acquire($self, /, ttl=..., timeout=..., auto_renew=...)\n--\n\nAsk for the lock; what is not given is "
     "as "
     "the lock was made.\n\n"
     "Args:\n    ttl: seconds (or a timedelta) after which others may take it, if its holder is gone.\n"
     "    timeout: seconds to wait; 0 asks once, None waits without bound.\n"
     "    auto_renew: keep the lease alive until it is released.\n\n"
     "Returns:\n    A `Pending` of a `Lease`, or of None when somebody else held it until the timeout.\n\n"
     "Example:\n    lease = await lock.acquire(timeout=0)"},
    {"__aenter__", lock_aenter, METH_NOARGS, "Acquire; gives the Lease, or raises LockTimeoutError."},
    {"__aexit__", method(lock_aexit), METH_FASTCALL, "Give the lock back."},
    {"__enter__", lock_enter, METH_NOARGS, "Acquire, blocking this thread; gives the Lease."},
    {"__exit__", method(lock_exit), METH_FASTCALL, "Give the lock back."},
    {nullptr, nullptr, 0, nullptr},
};

PyGetSetDef kGetSet[] = {
    {"name", get_name, nullptr, "The name of the lock.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyMemberDef kMembers[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(LockObject, weakrefs), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyType_Slot kSlots[] = {
    {Py_tp_doc, const_cast<char*>("Base of ratesync.Lock: the hot path.")},
    {Py_tp_new, reinterpret_cast<void*>(PyType_GenericNew)},
    {Py_tp_init, reinterpret_cast<void*>(lock_init)},
    {Py_tp_dealloc, reinterpret_cast<void*>(lock_dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(lock_traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(lock_clear)},
    {Py_tp_methods, kMethods},
    {Py_tp_getset, kGetSet},
    {Py_tp_members, kMembers},
    {0, nullptr},
};

PyType_Spec kSpec = {"ratesync._core.Lock", sizeof(LockObject), 0,
                     Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC, kSlots};

PyObject* finish_break(PyObject*, engine::Completion& completion) {
  auto& task = static_cast<LockBreak&>(completion);
  if (!task.status.ok()) return raise_status(task.status, {});
  return PyBool_FromLong(task.was_held);
}

engine::LockService* service_of(const PyStore& store, PyObject* prefix) {
  if (!PyUnicode_Check(prefix) || !utf8(prefix).data()) {
    PyErr_Clear();
    raise_invalid("a prefix must be text", "prefix", "up to 40 characters of a name", prefix);
    return nullptr;
  }
  if (store.generation != g_generation.load(std::memory_order_relaxed) || !store.engine->running()) {
    raise_status(Status::make(Code::closed, "the store's engine was shut down"), store.entry->id);
    return nullptr;
  }
  Result<engine::LockService*> service = store.entry->locks->get(std::string(utf8(prefix)));
  if (service.ok()) return service.value();
  if (service.status().code == Code::invalid) {
    raise_invalid(service.status().message.c_str(), "prefix", "", prefix);
  } else {
    raise_status(service.status(), store.entry->id);
  }
  return nullptr;
}

}  // namespace

bool check_lease_ttl(PyObject* value, std::int64_t* out) {
  if (value != Py_None && check_ttl(value, false, out)) return true;
  PyErr_Clear();
  return raise_invalid("a lease needs a time to live, after which others may have it if its holder is gone",
                       "ttl", "seconds above 0 and up to 1000 years, or a timedelta", value);
}

LockHomeRef lock_home(const PyStore& store, PyObject* prefix, PyObject* name_space, PyObject* tenant) {
  if (!check_name(name_space, "namespace", kMaxName) || !check_name(tenant, "tenant", kMaxName))
    return nullptr;
  if (PyUnicode_Check(prefix) && store.engine->running()) {
    const std::string_view text = utf8(prefix);
    for (const LockHomeRef& home : store.lock_homes)
      if (home->ours() && home->prefix == text && home->space->name_space == utf8(name_space) &&
          home->space->tenant == utf8(tenant))
        return home;
    PyErr_Clear();
  }
  engine::LockService* service = service_of(store, prefix);
  if (!service) return nullptr;
  auto home = std::make_shared<LockHome>();
  home->store_id = store.entry->id;
  home->prefix = utf8(prefix);
  home->engine = store.engine;
  home->service = service;
  home->space = std::make_shared<const store::Space>(
      store::Space{std::string(utf8(name_space)), std::string(utf8(tenant))});
  home->generation = store.generation;
  if (store.lock_homes.size() >= kMaxHomes) store.lock_homes.erase(store.lock_homes.begin());
  store.lock_homes.push_back(home);
  return home;
}

PyObject* break_lock(const LockHomeRef& home, PyObject* name, std::int64_t token) {
  if (!check_name(name, "name", kMaxName)) return nullptr;
  return make_task_call({home->engine, home->store_id, Py_None, finish_break, false,
                         [home, called = std::string(utf8(name)), token]() -> engine::Acquisition* {
                           auto* task = new LockBreak(*home->service);
                           task->space = home->space;
                           task->name = called;
                           task->token = token;
                           return task;
                         }});
}

PyObject* to_python(const std::vector<store::LockInfo>& locks) {
  py::list out;
  for (const store::LockInfo& lock : locks) {
    py::dict row;
    row["namespace"] = lock.name_space;
    row["tenant"] = lock.tenant;
    row["name"] = lock.name;
    row["token"] = lock.token;
    row["holder"] = lock.holder;
    row["held_for"] = static_cast<double>(lock.held_for) / 1e3;
    row["expires_in"] = static_cast<double>(lock.expires_in) / 1e3;
    row["waiters"] = lock.waiters;
    out.append(row);
  }
  return out.release().ptr();
}

PyObject* list_locks(const PyStore& store, PyObject* prefix, std::size_t limit) {
  engine::LockService* service = service_of(store, prefix);
  if (!service) return nullptr;
  return make_call<std::vector<store::LockInfo>>(
      store.engine, store.entry->id, [service, limit](auto done) { service->list(limit, std::move(done)); });
}

bool init_lock_type(PyObject* module) {
  state().lock_type = reinterpret_cast<PyTypeObject*>(PyType_FromModuleAndSpec(module, &kSpec, nullptr));
  return state().lock_type && init_lease_type(module) && init_kept_type(module) &&
         PyModule_AddObjectRef(module, "Lock", reinterpret_cast<PyObject*>(state().lock_type)) == 0;
}

}  // namespace ratesync::bindings
