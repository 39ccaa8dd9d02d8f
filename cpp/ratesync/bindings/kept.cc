// Kept: the lease of an idempotent call, a row of the state that is renewed for its writer. And the bell of
// its key, by which others wait for its end.
#include <Python.h>
#include <structmember.h>

#include <algorithm>

#include "ratesync/bindings/locks.h"
#include "ratesync/bindings/state.h"
#include "ratesync/engine/kept_row.h"

namespace ratesync::bindings {

using engine::Kept;
using engine::LossSignal;

namespace {

KeptObject* kept_of(PyObject* object) { return reinterpret_cast<KeptObject*>(object); }

PyObject* finish_signal(PyObject*, engine::Completion& completion) {
  auto& task = static_cast<LossSignal&>(completion);
  if (!task.status.ok()) return raise_status(task.status, {});
  return PyBool_FromLong(task.lost);
}

}  // namespace

PyObject* signal_call(const std::shared_ptr<engine::Engine>& engine, PyObject* object,
                      const engine::KeptRef& kept) {
  return make_task_call({engine,
                         {},
                         object,
                         finish_signal,
                         true,
                         [kept] { return new LossSignal(kept); },
                         [kept, clock = &engine->clock()]() -> PyObject* {
                           const Kept::Fate fate = kept->fate(clock->now());
                           if (fate == Kept::Fate::held) return nullptr;
                           return PyBool_FromLong(fate == Kept::Fate::lost);
                         }});
}

namespace {

bool ours(const KeptObject* self) { return self->generation == g_generation.load(std::memory_order_relaxed); }

PyObject* kept_lost(PyObject* object, void*) {
  const KeptObject* self = kept_of(object);
  return PyBool_FromLong(!ours(self) || self->kept->fate(self->engine->clock().now()) == Kept::Fate::lost);
}

void stop_keeping(const KeptObject* self) {
  if (!self->kept->settle(Kept::Fate::ended)) return;
  self->engine->submit(engine::Run{[kept = self->kept] { kept->keeper().changed(*kept); }});
}

PyObject* kept_stop(PyObject* object, PyObject*) {
  if (ours(kept_of(object))) stop_keeping(kept_of(object));
  Py_RETURN_NONE;
}

PyObject* kept_lost_signal(PyObject* object, PyObject*) {
  KeptObject* self = kept_of(object);
  if (!ours(self)) return raise_status(Status::make(Code::closed, "this lease is the parent's"), {});
  return signal_call(self->engine, object, self->kept);
}

void kept_dealloc(PyObject* object) {
  KeptObject* self = kept_of(object);
  if (self->weakrefs) PyObject_ClearWeakRefs(object);
  if (ours(self)) {
    stop_keeping(self);
  } else {
    (void)new engine::KeptRef(self->kept);  // the parent's, leaked on purpose
  }
  self->kept.~shared_ptr();
  self->engine.~shared_ptr();
  PyTypeObject* type = Py_TYPE(object);
  PyObject_Free(object);
  Py_DECREF(reinterpret_cast<PyObject*>(type));
}

PyMethodDef kKeptMethods[] = {
    {"stop", kept_stop, METH_NOARGS, "stop($self, /)\n--\n\nRenew it no more."},
    {"lost_signal", kept_lost_signal, METH_NOARGS,
     "lost_signal($self, /)\n--\n\nA `Pending` of True: lost, or False: stopped."},
    {nullptr, nullptr, 0, nullptr},
};

PyGetSetDef kKeptGetSet[] = {
    {"lost", kept_lost, nullptr, "True once the row may be somebody else's. It stays so.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyMemberDef kKeptMembers[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(KeptObject, weakrefs), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyType_Slot kKeptSlots[] = {
    {Py_tp_doc, const_cast<char*>("A row of the state that is kept alive for its writer.")},
    {Py_tp_dealloc, reinterpret_cast<void*>(kept_dealloc)},
    {Py_tp_methods, kKeptMethods},
    {Py_tp_getset, kKeptGetSet},
    {Py_tp_members, kKeptMembers},
    {0, nullptr},
};

PyType_Spec kKeptSpec = {"ratesync._core.Kept", sizeof(KeptObject), 0,
                         Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
                         kKeptSlots};

}  // namespace

namespace {

// `age`: how long ago the row was asked for.
PyObject* keep_row(const StateImpl& impl, std::string kind, std::string key, std::int64_t version,
                   std::int64_t ttl_ms, Nanos age) {
  const std::shared_ptr<engine::Engine>& engine = impl.engine;
  const Nanos sent = engine->clock().now() - age;
  const Nanos ends = ttl_ms > kForever / kMilli ? kForever : std::max<Nanos>(1, sent + ttl_ms * kMilli);
  engine::KeptRef kept =
      std::make_shared<engine::KeptRow>(engine->keeper(), impl.service->store(), impl.space, std::move(kind),
                                        std::move(key), version, ttl_ms, ends);
  KeptObject* self = PyObject_New(KeptObject, state().kept_type);
  if (!self) return nullptr;
  self->weakrefs = nullptr;
  self->generation = g_generation.load(std::memory_order_relaxed);
  new (&self->engine) std::shared_ptr<engine::Engine>(engine);
  new (&self->kept) engine::KeptRef(kept);
  if (engine->submit(engine::Run{[kept, sent] { kept->keeper().keep(kept, sent); }}))
    return reinterpret_cast<PyObject*>(self);
  Py_DECREF(reinterpret_cast<PyObject*>(self));
  return raise_not_taken(*engine, {}, "the engine was shut down: get the state again with store.state()");
}

}  // namespace

// _keep(key, version, ttl, kind, age=0.0)
PyObject* state_keep(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 4 && nargs != 5) {
    PyErr_SetString(PyExc_TypeError, "_keep() takes key, version, ttl, kind and age");
    return nullptr;
  }
  PyObject* kind = args[3] == Py_None ? nullptr : args[3];
  std::int64_t version = 0, ttl_ms = 0;
  if (!check_name(args[0], "key", kMaxKey) || (kind && !check_name(kind, "kind", kMaxName)) ||
      !check_int64(args[1], "version", 1, "a version, from 1", &version) ||
      !check_lease_ttl(args[2], &ttl_ms))
    return nullptr;
  bool ok = true;
  const Nanos age = nargs == 5 ? parse_timeout(args[4], 0, &ok) : 0;
  StateImpl* impl = ok ? live(reinterpret_cast<StateObject*>(self)) : nullptr;
  if (!impl) return nullptr;
  return keep_row(*impl, kind ? std::string(utf8(kind)) : impl->kind, std::string(utf8(args[0])), version,
                  ttl_ms, age);
}

namespace {

// The service that has the bells of a state; null with an exception set.
engine::LockService* service_of(const StateImpl& impl) {
  Result<engine::LockService*> service = impl.locks->get(impl.prefix);
  if (service.ok()) return service.value();
  raise_status(service.status(), impl.store_id);
  return nullptr;
}

bool check_key(PyObject* key, PyObject* kind) {
  return check_name(key, "key", kMaxKey) && check_name(kind, "kind", kMaxName);
}

PyObject* finish_bell(PyObject*, engine::Completion& completion) {
  auto& task = static_cast<engine::BellWait&>(completion);
  if (!task.status.ok()) return raise_status(task.status, {});
  return PyLong_FromLongLong(task.seen);
}

}  // namespace

// _bell(key, kind, seen, timeout)
PyObject* state_bell(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 4) {
    PyErr_SetString(PyExc_TypeError, "_bell() takes key, kind, seen and timeout");
    return nullptr;
  }
  std::int64_t seen = 0;
  bool ok = check_key(args[0], args[1]) && check_int64(args[2], "seen", 0, "what _bell() gave, or 0", &seen);
  const Nanos timeout = ok ? parse_timeout(args[3], kForever, &ok) : 0;
  StateImpl* impl = ok ? live(reinterpret_cast<StateObject*>(self)) : nullptr;
  engine::LockService* service = impl ? service_of(*impl) : nullptr;
  if (!service) return nullptr;
  return make_task_call({impl->engine, impl->store_id, self, finish_bell, true,
                         [service, space = impl->space, engine = impl->engine, seen, timeout,
                          name = engine::Bells::name_of(utf8(args[1]), utf8(args[0]))] {
                           auto* task = new engine::BellWait(service->bells(), space, name);
                           task->seen = seen;
                           task->until = saturating_add(engine->clock().now(), timeout);
                           return task;
                         }});
}

// _ring(key, kind)
PyObject* state_ring(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 2) {
    PyErr_SetString(PyExc_TypeError, "_ring() takes key and kind");
    return nullptr;
  }
  StateImpl* impl = check_key(args[0], args[1]) ? live(reinterpret_cast<StateObject*>(self)) : nullptr;
  engine::LockService* service = impl ? service_of(*impl) : nullptr;
  if (!service) return nullptr;
  // Not taken after a shutdown: then nobody waits here, and who waits elsewhere looks now and then.
  if (service->shared() || service->bells().awaited())
    impl->engine->submit(engine::Run{
        [service, space = impl->space, name = engine::Bells::name_of(utf8(args[1]), utf8(args[0]))] {
          service->bells().ring(space, name);
        }});
  Py_RETURN_NONE;
}

bool init_kept_type(PyObject* module) {
  ModuleState& s = state();
  s.kept_type = reinterpret_cast<PyTypeObject*>(PyType_FromModuleAndSpec(module, &kKeptSpec, nullptr));
  return s.kept_type && PyModule_AddObjectRef(module, "Kept", reinterpret_cast<PyObject*>(s.kept_type)) == 0;
}

}  // namespace ratesync::bindings
