// Lease: a lock that is held.
#include <Python.h>
#include <structmember.h>

#include <algorithm>

#include "ratesync/bindings/locks.h"
#include "ratesync/bindings/state.h"

namespace ratesync::bindings {

using engine::Extension;
using engine::Kept;
using engine::LockRelease;

namespace {

LeaseObject* self_of(PyObject* object) { return reinterpret_cast<LeaseObject*>(object); }
PyObject* object_of(LeaseObject* lease) { return reinterpret_cast<PyObject*>(lease); }

Nanos now_of(const LeaseObject* self) { return self->home->engine->clock().now(); }

PyObject* raise_lost(const LeaseObject* self) {
  const std::string& name = self->lease->name;
  PyObject* hook = state().lock_lost;
  PyObject* error =
      hook ? PyObject_CallFunction(hook, "s#L", name.data(), static_cast<Py_ssize_t>(name.size()),
                                   static_cast<long long>(self->lease->token))
           : PyObject_CallFunction(PyExc_RuntimeError, "s", "the lock was lost");
  if (error) {
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error)), error);
    Py_DECREF(error);
  }
  return nullptr;
}

PyObject* raise_of_parent(const LeaseObject* self) {
  return raise_status(Status::make(Code::closed, "this lease is the parent's: it was made before fork"),
                      self->home->store_id);
}

// --- giving back ----------------------------------------------------------------------------------

PyObject* finish_release(PyObject* owner, engine::Completion& completion) {
  auto& task = static_cast<LockRelease&>(completion);
  if (!task.status.ok()) return raise_status(task.status, self_of(owner)->home->store_id);
  return PyBool_FromLong(task.was_held);
}

PyObject* finish_leave(PyObject* owner, LockRelease& task, bool failing) {
  const LeaseObject* self = self_of(owner);
  if (!task.status.ok() && (task.was_held || failing)) {
    // The body ran under the lock, and the lock ends by itself: nothing to fail for.
    const std::string text = "lock '" + self->lease->name + "': not given back, it ends with its ttl of " +
                             std::to_string(self->lease->ttl_ms()) +
                             " ms at the latest: " + task.status.message;
    PyObject* nothing = state().log ? PyObject_CallFunction(state().log, "ss#", "warning", text.data(),
                                                            static_cast<Py_ssize_t>(text.size()))
                                    : Py_NewRef(Py_None);
    return nothing;
  }
  if (!task.was_held && !failing) return raise_lost(self);
  Py_RETURN_NONE;
}

PyObject* finish_leave_well(PyObject* owner, engine::Completion& completion) {
  return finish_leave(owner, static_cast<LockRelease&>(completion), false);
}

PyObject* finish_leave_failing(PyObject* owner, engine::Completion& completion) {
  return finish_leave(owner, static_cast<LockRelease&>(completion), true);
}

PyObject* lease_release(PyObject* object, PyObject*) {
  LeaseObject* self = self_of(object);
  if (!self->home->ours()) return raise_of_parent(self);
  const LockHomeRef& home = self->home;
  return make_task_call({home->engine, home->store_id, object, finish_release, false,
                         [self] { return new LockRelease(self->lease); },
                         [self]() -> PyObject* {
                           if (self->lease->answered) Py_RETURN_FALSE;
                           if (!self->home->direct()) return nullptr;
                           return PyBool_FromLong(self->home->service->release_now(self->lease));
                         }});
}

// --- prolonging, losing ---------------------------------------------------------------------------

PyObject* finish_extend(PyObject* owner, engine::Completion& completion) {
  auto& task = static_cast<Extension&>(completion);
  if (!task.status.ok()) return raise_status(task.status, self_of(owner)->home->store_id);
  if (task.lost) return raise_lost(self_of(owner));
  Py_RETURN_NONE;
}

PyObject* lease_extend(PyObject* object, PyObject* ttl) {
  LeaseObject* self = self_of(object);
  if (!self->home->ours()) return raise_of_parent(self);
  std::int64_t ttl_ms = 0;
  if (!check_lease_ttl(ttl, &ttl_ms)) return nullptr;
  const LockHomeRef& home = self->home;
  return make_task_call({home->engine, home->store_id, object, finish_extend, false,
                         [self, ttl_ms] { return new Extension(self->lease, ttl_ms); },
                         [self, ttl_ms]() -> PyObject* {
                           if (self->lease->fate(now_of(self)) != Kept::Fate::held) return raise_lost(self);
                           if (!self->home->direct()) return nullptr;
                           if (!self->home->service->extend_now(self->lease, ttl_ms)) return raise_lost(self);
                           Py_RETURN_NONE;
                         }});
}

PyObject* lease_lost_signal(PyObject* object, PyObject*) {
  LeaseObject* self = self_of(object);
  if (!self->home->ours()) return raise_of_parent(self);
  return signal_call(self->home->engine, object, self->lease);
}

// --- with -----------------------------------------------------------------------------------------

// The lease of try_lock() and acquire() gives itself back at the end of a `with`.
PyObject* lease_enter(PyObject* object, PyObject*) {
  LeaseObject* self = self_of(object);
  if (!self->home->ours()) return raise_of_parent(self);
  switch (self->lease->fate(now_of(self))) {
    case Kept::Fate::held: return Py_NewRef(object);  // its own awaitable
    case Kept::Fate::lost: return raise_lost(self);
    case Kept::Fate::ended:
      PyErr_Format(PyExc_RuntimeError, "the lease of lock '%s' was given back already: acquire the lock anew",
                   self->lease->name.c_str());
      return nullptr;
  }
  Py_UNREACHABLE();
}

PyObject* lease_aexit(PyObject* object, PyObject* const* args, Py_ssize_t nargs) {
  return leave_lease(self_of(object), true, nargs > 0 && args[0] != Py_None);
}

PyObject* lease_exit(PyObject* object, PyObject* const* args, Py_ssize_t nargs) {
  return leave_lease(self_of(object), false, nargs > 0 && args[0] != Py_None);
}

// --- the object -----------------------------------------------------------------------------------

PyObject* get_name(PyObject* object, void*) {
  const std::string& name = self_of(object)->lease->name;
  return PyUnicode_FromStringAndSize(name.data(), static_cast<Py_ssize_t>(name.size()));
}

PyObject* get_token(PyObject* object, void*) { return PyLong_FromLongLong(self_of(object)->lease->token); }

PyObject* get_lost(PyObject* object, void*) {
  LeaseObject* self = self_of(object);
  return PyBool_FromLong(!self->home->ours() || self->lease->fate(now_of(self)) == Kept::Fate::lost);
}

PyObject* get_held(PyObject* object, void*) {
  LeaseObject* self = self_of(object);
  return PyBool_FromLong(self->home->ours() && self->lease->fate(now_of(self)) == Kept::Fate::held);
}

PyObject* get_remaining(PyObject* object, void*) {
  LeaseObject* self = self_of(object);
  if (!self->home->ours()) return PyFloat_FromDouble(0);
  const Nanos left = self->lease->remaining(now_of(self));
  // Renewed without end by the store itself.
  if (left == kForever) return PyFloat_FromDouble(static_cast<double>(self->lease->ttl_ms()) / 1e3);
  return PyFloat_FromDouble(static_cast<double>(left) / 1e9);
}

PyObject* get_ttl(PyObject* object, void*) {
  return PyFloat_FromDouble(static_cast<double>(self_of(object)->lease->ttl_ms()) / 1e3);
}

PyObject* lease_repr(PyObject* object) {
  LeaseObject* self = self_of(object);
  const Kept::Fate fate = self->home->ours() ? self->lease->fate(now_of(self)) : Kept::Fate::lost;
  return PyUnicode_FromFormat("<Lease of '%s', token %lld: %s>", self->lease->name.c_str(),
                              static_cast<long long>(self->lease->token),
                              fate == Kept::Fate::held   ? "held"
                              : fate == Kept::Fate::lost ? "lost"
                                                         : "released");
}

// `await lock.__aenter__()` where the lock was there at once: the lease is its own awaitable.
PySendResult lease_send(PyObject* object, PyObject*, PyObject** result) {
  *result = Py_NewRef(object);
  return PYGEN_RETURN;
}

PyObject* lease_iternext(PyObject* object) {
  raise_stop(Py_NewRef(object));
  return nullptr;
}

PyObject* lease_send_method(PyObject* object, PyObject*) { return lease_iternext(object); }

void warn_dropped(const LeaseObject* self) {
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  if (PyErr_WarnFormat(
          PyExc_ResourceWarning, 1,
          "a lease of lock '%s' was dropped without release, so others wait until its ttl is over: "
          "use `async with`, or keep it and call release()",
          self->lease->name.c_str()) < 0)
    PyErr_WriteUnraisable(nullptr);
  PyErr_Restore(type, value, trace);
}

void lease_dealloc(PyObject* object) {
  LeaseObject* self = self_of(object);
  if (self->weakrefs) PyObject_ClearWeakRefs(object);
  if (!self->home->ours()) {
    (void)new engine::HeldLockRef(self->lease);  // the parent's, leaked on purpose
  } else if (self->home->engine->running() && !self->lease->releasing &&
             self->lease->fate(now_of(self)) == Kept::Fate::held) {
    warn_dropped(self);
    engine::LockService* service = self->home->service;
    if (self->home->direct()) {
      service->drop_now(self->lease);
    } else {
      self->home->engine->submit(engine::Run{[service, lease = self->lease] { service->drop(lease); }});
    }
  }
  self->lease.~shared_ptr();
  self->home.~shared_ptr();
  PyTypeObject* type = Py_TYPE(object);
  PyObject_Free(object);
  Py_DECREF(reinterpret_cast<PyObject*>(type));
}

PyMethodDef kMethods[] = {
    {"release", lease_release, METH_NOARGS,
     "release($self, /)\n--\n\nGive the lock back.\n\nReturns:\n    A `Pending` of whether it was still "
     "held; "
     "False on the second call.\n\nExample:\n    was_held = await lease.release()"},
    {"extend", lease_extend, METH_O,
     "extend($self, ttl, /)\n--\n\nSet the lease to `ttl` seconds from now, and renew by that from now "
     "on.\n\n"
     "Returns:\n    A `Pending` of None.\n\nRaises:\n    LockLostError: it is not held any more.\n\n"
     "Example:\n    await lease.extend(60)"},
    {"lost_signal", lease_lost_signal, METH_NOARGS,
     "lost_signal($self, /)\n--\n\nWait until it is lost.\n\nReturns:\n    A `Pending` of True: lost, or "
     "False: released.\n\nExample:\n    if await lease.lost_signal(): ..."},
    {"__aenter__", lease_enter, METH_NOARGS, "Gives itself; it is given back at the end of the body."},
    {"__aexit__", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(lease_aexit)), METH_FASTCALL,
     "Give the lock back."},
    {"__enter__", lease_enter, METH_NOARGS, "Gives itself; it is given back at the end of the body."},
    {"__exit__", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(lease_exit)), METH_FASTCALL,
     "Give the lock back."},
    {"send", lease_send_method, METH_O, "Part of the coroutine protocol, for a lease that is there at once."},
    {nullptr, nullptr, 0, nullptr},
};

PyGetSetDef kGetSet[] = {
    {"name", get_name, nullptr, "The name of the lock.", nullptr},
    {"token", get_token, nullptr, "The fencing token: it grows with every acquisition of the name.", nullptr},
    {"lost", get_lost, nullptr, "True once the lock may be somebody else's. It stays so.", nullptr},
    {"held", get_held, nullptr, "True until it is lost or released.", nullptr},
    {"remaining", get_remaining, nullptr,
     "Seconds until it is lost unless it is renewed, counted from when the last renewal was sent.", nullptr},
    {"ttl", get_ttl, nullptr, "Seconds that a renewal gives.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyMemberDef kMembers[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(LeaseObject, weakrefs), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyType_Slot kSlots[] = {
    {Py_tp_doc, const_cast<char*>("A lock that is held, until it is released or lost.")},
    {Py_tp_dealloc, reinterpret_cast<void*>(lease_dealloc)},
    {Py_tp_repr, reinterpret_cast<void*>(lease_repr)},
    {Py_tp_methods, kMethods},
    {Py_tp_getset, kGetSet},
    {Py_tp_members, kMembers},
    {Py_tp_iter, reinterpret_cast<void*>(PyObject_SelfIter)},
    {Py_tp_iternext, reinterpret_cast<void*>(lease_iternext)},
    {Py_am_await, reinterpret_cast<void*>(PyObject_SelfIter)},
    {Py_am_send, reinterpret_cast<void*>(lease_send)},
    {0, nullptr},
};

PyType_Spec kSpec = {"ratesync._core.Lease", sizeof(LeaseObject), 0,
                     Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
                     kSlots};

}  // namespace

LeaseObject* new_lease(LockHomeRef home, engine::HeldLockRef lease) {
  LeaseObject* self = PyObject_New(LeaseObject, state().lease_type);
  if (!self) {
    home->engine->submit(engine::Run{[lease] { lease->service.let_go(lease); }});
    return nullptr;
  }
  self->weakrefs = nullptr;
  new (&self->home) LockHomeRef(std::move(home));
  new (&self->lease) engine::HeldLockRef(std::move(lease));
  return self;
}

PyObject* leave_lease(LeaseObject* self, bool async, bool failing) {
  const LockHomeRef& home = self->home;
  const auto nothing = [async] { return Py_NewRef(async ? state().ready_none : Py_None); };
  if (!home->ours() || !home->engine->running()) return nothing();
  const Kept::Fate fate = self->lease->fate(now_of(self));
  if (fate == Kept::Fate::ended) return nothing();  // released in the body
  if (fate == Kept::Fate::lost && !home->direct()) {
    // Perhaps because the store is out of reach: there is nothing to be waited for.
    self->lease->releasing = true;
    home->engine->submit(
        engine::Run{[service = home->service, lease = self->lease] { service->let_go(lease); }});
    return failing ? nothing() : raise_lost(self);
  }
  if (home->direct()) {
    const bool was_held = home->service->release_now(self->lease);
    return was_held || failing ? nothing() : raise_lost(self);
  }
  const Finish finish = failing ? finish_leave_failing : finish_leave_well;
  auto* task = new LockRelease(self->lease, true);
  if (async) return begin_task(home->engine, home->store_id, task, object_of(self), finish, false);
  return block_task(home->engine, home->store_id, task, object_of(self), finish, false);
}

bool init_lease_type(PyObject* module) {
  ModuleState& s = state();
  s.lease_type = reinterpret_cast<PyTypeObject*>(PyType_FromModuleAndSpec(module, &kSpec, nullptr));
  return s.lease_type &&
         PyModule_AddObjectRef(module, "Lease", reinterpret_cast<PyObject*>(s.lease_type)) == 0;
}

}  // namespace ratesync::bindings
