// The extension module `_core`: Engine, Store, Pending, the hooks, and the raw types.
#include <pthread.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <mutex>
#include <set>

#include "ratesync/bindings/convert.h"
#include "ratesync/bindings/locks.h"
#include "ratesync/bindings/state.h"

namespace py = pybind11;
using namespace py::literals;

namespace ratesync::bindings {

namespace {

double secs(Nanos nanos) { return static_cast<double>(nanos) / 1e9; }

// Engines alive, for the fork handler.
std::set<engine::Engine*>& engines() {
  static auto* all = new std::set<engine::Engine*>();
  return *all;
}

struct PyEngine {
  std::shared_ptr<engine::Engine> engine;
};

void require_same_process(unsigned generation) {
  if (generation == g_generation.load(std::memory_order_relaxed)) return;
  raise_status(
      Status::make(Code::closed, "this object was made before fork: configure the store again in the child"),
      "");
  throw py::error_already_set();
}

py::object steal_or_throw(PyObject* object) {
  if (!object) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

engine::StoreOptions options_of(const py::dict& dict) {
  engine::StoreOptions options;
  for (const auto& [key, value] : dict) {
    if (value.is_none()) continue;
    const auto name = py::cast<std::string>(key);
    if (py::isinstance<py::bool_>(value)) {
      options[name] = py::cast<bool>(value);
    } else if (py::isinstance<py::int_>(value)) {
      options[name] = py::cast<std::int64_t>(value);
    } else if (py::isinstance<py::float_>(value)) {
      options[name] = py::cast<double>(value);
    } else {
      options[name] = py::cast<std::string>(value);
    }
  }
  return options;
}

std::shared_ptr<engine::Engine> make_engine(bool manual_clock) {
  auto* raw = new engine::Engine(manual_clock);
  const unsigned born = g_generation.load();
  engines().insert(raw);
  // The last reference may go while the GIL is held: joining must not need it, so release it.
  return std::shared_ptr<engine::Engine>(raw, [born](engine::Engine* dying) {
    engines().erase(dying);
    if (born != g_generation.load()) return;  // forked: leaked on purpose
    if (PyGILState_Check()) {
      const py::gil_scoped_release release;
      delete dying;
    } else {
      delete dying;
    }
  });
}

template <class T, class Work>
py::object store_call(const PyStore& store, Work work) {
  require_same_process(store.generation);
  return steal_or_throw(make_call<T>(store.engine, store.entry->id, std::move(work)));
}

py::dict capabilities(const store::Capabilities& caps) {
  return py::dict("limits"_a = caps.limits, "locks"_a = caps.locks, "state"_a = caps.state,
                  "actors"_a = caps.actors, "events"_a = caps.events, "audit"_a = caps.audit,
                  "shared"_a = caps.shared, "durable"_a = caps.durable,
                  "consistency"_a = caps.consistency == store::Consistency::strong ? "strong" : "eventual");
}

void bind_store(py::module_& module) {
  py::class_<PyStore>(module, "Store", "One configured backend of an engine.")
      .def_property_readonly("store_id", [](const PyStore& s) { return s.entry->id; })
      .def_property_readonly("engine", [](const PyStore& s) { return s.entry->kind; })
      .def_property_readonly("capabilities",
                             [](const PyStore& s) { return capabilities(s.entry->store->capabilities()); })
      .def("initialize",
           [](const PyStore& s) {
             auto* store = s.entry->store.get();
             return store_call<store::Unit>(s, [store](auto done) { store->initialize(std::move(done)); });
           })
      .def(
          "migrate",
          [](const PyStore& s, bool dry_run) {
            auto* store = s.entry->store.get();
            return store_call<std::vector<store::MigrationStep>>(
                s, [store, dry_run](auto done) { store->migrate(dry_run, std::move(done)); });
          },
          "dry_run"_a)
      .def(
          "migrate_state",
          [](const PyStore& s, const std::string& prefix, bool dry_run) {
            auto* store = s.entry->store.get();
            return store_call<std::vector<store::MigrationStep>>(s, [store, prefix, dry_run](auto done) {
              store->migrate_state(prefix, dry_run, std::move(done));
            });
          },
          "prefix"_a, "dry_run"_a)
      .def("doctor",
           [](const PyStore& s) {
             auto* store = s.entry->store.get();
             return store_call<std::vector<store::Finding>>(
                 s, [store](auto done) { store->doctor(std::move(done)); });
           })
      .def(
          "list",
          [](const PyStore& s, std::int64_t limit) {
            auto* store = s.entry->store.get();
            const auto most = static_cast<std::size_t>(std::max<std::int64_t>(0, limit));
            return store_call<store::Listing>(s, [store, most](auto done) {
              if (store->limits()) return store->limits()->list(most, std::move(done));
              done(store::Listing{});
            });
          },
          "limit"_a)
      .def(
          "locks",
          [](const PyStore& s, const py::str& prefix, std::int64_t limit) {
            require_same_process(s.generation);
            const auto most = static_cast<std::size_t>(std::max<std::int64_t>(0, limit));
            return steal_or_throw(list_locks(s, prefix.ptr(), most));
          },
          "prefix"_a, "limit"_a)
      .def(
          "break_lock",
          [](const PyStore& s, const py::str& prefix, const py::str& name_space, const py::str& tenant,
             const py::str& name, std::int64_t token) {
            require_same_process(s.generation);
            const LockHomeRef home = lock_home(s, prefix.ptr(), name_space.ptr(), tenant.ptr());
            if (!home) throw py::error_already_set();
            return steal_or_throw(break_lock(home, name.ptr(), token));
          },
          "prefix"_a, "namespace"_a, "tenant"_a, "name"_a, "token"_a)
      .def("stats",
           [](const PyStore& s) {
             auto* store = s.entry->store.get();
             return store_call<store::Stats>(s, [store](auto done) { done(store->stats()); });
           })
      .def("close", [](const PyStore& s) {
        auto* entry = s.entry;
        return store_call<store::Unit>(s,
                                       [entry](auto done) { entry->close([done] { done(store::Unit{}); }); });
      });
}

void bind_engine(py::module_& module) {
  py::class_<PyEngine>(module, "Engine", "One I/O thread with its stores.")
      .def(py::init([](bool manual_clock) { return PyEngine{make_engine(manual_clock)}; }), py::kw_only(),
           "manual_clock"_a = false)
      .def(
          "add_store",
          [](const PyEngine& self, const std::string& id, const std::string& kind, const py::dict& options) {
            Result<engine::StoreEntry*> entry = self.engine->add_store(id, kind, options_of(options));
            if (!entry.ok()) {
              raise_status(entry.status(), id);
              throw py::error_already_set();
            }
            return PyStore{self.engine, entry.value(), g_generation.load()};
          },
          "store_id"_a, "engine"_a, "options"_a)
      .def(
          "advance",
          [](const PyEngine& self, double seconds) {
            if (!self.engine->clock().manual())
              throw py::value_error("advance() needs an engine with manual_clock=True");
            if (!(seconds >= 0)) throw py::value_error("time only goes forward");
            const py::gil_scoped_release release;
            self.engine->advance(from_seconds(seconds));
          },
          "seconds"_a)
      .def(
          "step",
          [](const PyEngine& self, Nanos to, bool idle) -> py::object {
            if (!self.engine->clock().manual())
              throw py::value_error("step() needs an engine with manual_clock=True");
            Nanos next;
            if (idle) {
              next = self.engine->step(to, true);
            } else {
              const py::gil_scoped_release release;
              next = self.engine->step(to, false);
            }
            if (next == kForever) return py::none();
            return py::int_(next);
          },
          "to_ns"_a, "idle"_a)
      .def("now_ns", [](const PyEngine& self) { return self.engine->clock().now(); })
      .def("now", [](const PyEngine& self) { return secs(self.engine->clock().now()); })
      .def("shutdown", [](const PyEngine& self) {
        const py::gil_scoped_release release;
        self.engine->shutdown();
      });
}

void set_hook(PyObject*& slot, const py::object& hook) {
  PyObject* old = slot;
  slot = hook.is_none() ? nullptr : hook.inc_ref().ptr();
  Py_XDECREF(old);
}

PyMethodDef kAcquire = {"acquire", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(acquire_function)),
                        METH_FASTCALL | METH_KEYWORDS, kAcquireDoc};

PyMethodDef kAcquireLimits = {
    "acquire_limits", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(acquire_limits_function)),
    METH_FASTCALL, "acquire_limits(limits, timeout)\n--\n\nThe permit of several (limiter, key or None)."};

PyMethodDef kAttempt = {"attempt", attempt_function, METH_O,
                        "attempt(permit)\n--\n\nWhether the permit is granted, as a Pending."};

PyMethodDef kCompiled = {
    "compiled", compiled_class, METH_O,
    "compiled(cls)\n--\n\nClass decorator: compiled methods of the base, documented by the class."};

void after_fork_in_child() {
  for (engine::Engine* engine : engines()) engine->abandon_after_fork();
  engines().clear();
  abandon_loops_after_fork();
}

}  // namespace

py::object PendingCall::iterator() {
  if (!iterator_)
    iterator_ = steal_or_throw(steal_or_throw(begin()).attr("__await__")().release().ptr()).release().ptr();
  return py::reinterpret_borrow<py::object>(iterator_);
}

py::object PendingCall::throw_into(const py::args& args) {
  // Cancelled before the first step: nothing has begun, and nothing begins.
  if (iterator_ && py::hasattr(py::handle(iterator_), "throw"))
    return py::handle(iterator_).attr("throw")(*args);
  std::vector<PyObject*> given;
  for (const py::handle& arg : args) given.push_back(arg.ptr());
  return steal_or_throw(raise_thrown(given.data(), static_cast<Py_ssize_t>(given.size())));
}

void PendingCall::close() {
  if (!iterator_) return;
  const py::object closing = py::reinterpret_steal<py::object>(std::exchange(iterator_, nullptr));
  if (py::hasattr(closing, "close")) closing.attr("close")();
}

PendingCall::~PendingCall() { Py_XDECREF(iterator_); }

PyObject* make_pending(PendingCall::Start begin, PendingCall::Start block) {
  return py::cast(std::make_unique<PendingCall>(std::move(begin), std::move(block))).release().ptr();
}

PyObject* to_python(const store::Unit&) { Py_RETURN_NONE; }

PyObject* to_python(const store::Peek& peek) {
  return py::dict("available"_a = peek.available, "in_use"_a = peek.in_use,
                  "retry_after"_a = secs(peek.retry_after), "full_after"_a = secs(peek.full_after),
                  "used"_a = peek.used)
      .release()
      .ptr();
}

PyObject* to_python(const store::Listing& listing) {
  py::list groups, holders;
  for (const store::GroupInfo& g : listing.groups)
    groups.append(py::dict("group"_a = g.group, "last_ahead"_a = secs(g.last_ahead), "version"_a = g.version,
                           "in_use"_a = g.in_use));
  for (const store::HolderInfo& h : listing.holders)
    holders.append(py::dict("group"_a = h.group, "holder"_a = h.holder, "slots"_a = h.slots,
                            "held_for"_a = secs(h.held_for), "expires_in"_a = secs(h.expires_in)));
  return py::dict("groups"_a = groups, "holders"_a = holders, "truncated"_a = listing.truncated)
      .release()
      .ptr();
}

PyObject* to_python(const store::Stats& s) {
  return py::dict("round_trips"_a = s.round_trips, "statements"_a = s.statements,
                  "batched_ops"_a = s.batched_ops, "conflicts"_a = s.conflicts, "reconnects"_a = s.reconnects,
                  "leases_lost"_a = s.leases_lost, "connections_open"_a = s.connections_open,
                  "connections_in_use"_a = s.connections_in_use,
                  "connections_waiting"_a = s.connections_waiting)
      .release()
      .ptr();
}

PyObject* to_python(const std::vector<store::MigrationStep>& steps) {
  py::list out;
  for (const store::MigrationStep& step : steps)
    out.append(py::dict("number"_a = step.number, "name"_a = step.name, "sql"_a = step.sql,
                        "applied"_a = step.applied));
  return out.release().ptr();
}

PyObject* to_python(const std::vector<store::Finding>& findings) {
  py::list out;
  for (const store::Finding& f : findings) {
    const char* level = f.level == store::Finding::Level::ok        ? "ok"
                        : f.level == store::Finding::Level::warning ? "warning"
                                                                    : "error";
    out.append(py::dict("level"_a = level, "subject"_a = f.subject, "message"_a = f.message));
  }
  return out.release().ptr();
}

PyObject* counters_dict(const LimiterImpl& impl) {
  const engine::Counters& c = impl.core->counters;
  const std::uint64_t quick = c.quick_acquisitions.load();
  py::list bounds, waits;
  for (const Nanos bound : engine::kWaitBuckets) bounds.append(secs(bound));
  for (std::size_t i = 0; i < c.waits.size(); ++i) waits.append(c.waits[i].load() + (i == 0 ? quick : 0));
  return py::dict("acquisitions"_a = quick + c.acquisitions.load(), "cas_failures"_a = c.cas_failures.load(),
                  "wait_bounds"_a = bounds, "wait_counts"_a = waits,
                  "wait_seconds"_a = secs(static_cast<Nanos>(c.wait_ns.load())),
                  "max_wait_seconds"_a = secs(static_cast<Nanos>(c.max_wait_ns.load())),
                  "timeouts"_a = c.timeouts.load(), "refused_rate"_a = c.refused_rate.load(),
                  "refused_concurrency"_a = c.refused_concurrency.load(), "cancelled"_a = c.cancelled.load(),
                  "passed_open"_a = c.passed_open.load(), "failed"_a = c.failed.load(),
                  "releases"_a = c.releases.load(), "leases_lost"_a = c.leases_lost.load(),
                  "held"_a = c.held.load(), "last_acquisition"_a = secs(c.last_acquisition.load()))
      .release()
      .ptr();
}

PYBIND11_MODULE(_core, module) {
  module.doc() = "The compiled engine of ratesync. Only `ratesync._engine` imports this module.";
#ifdef RATESYNC_HAS_POSTGRES
  module.attr("HAS_POSTGRES") = true;
#else
  module.attr("HAS_POSTGRES") = false;
#endif
#ifdef RATESYNC_HAS_REDIS
  module.attr("HAS_REDIS") = true;
#else
  module.attr("HAS_REDIS") = false;
#endif
  ModuleState& s = state();
  if (!init_waiter_type(module.ptr()) || !init_permit_type(module.ptr()) ||
      !init_limiter_type(module.ptr()) || !init_state_type(module.ptr()) || !init_lock_type(module.ptr()))
    throw py::error_already_set();
  s.bound = PyDict_New();

  py::class_<PendingCall, std::unique_ptr<PendingCall>>(
      module, "Pending", "One call: `await` it in asyncio, or `wait()` in a plain thread.")
      .def("__await__",
           [](const PendingCall& self) {
             // begin() gives an awaitable; its iterator is what `await` wants.
             const py::object awaitable = steal_or_throw(self.begin());
             return awaitable.attr("__await__")();
           })
      // The rest of the coroutine protocol, so that create_task() takes it.
      .def("send",
           [](PendingCall& self, const py::object& value) { return self.iterator().attr("send")(value); })
      .def("throw", [](PendingCall& self, const py::args& args) { return self.throw_into(args); })
      .def("close", [](PendingCall& self) { self.close(); })
      .def(
          "wait", [](const PendingCall& self) { return steal_or_throw(self.block()); },
          "wait()\n--\n\nRun the call from a plain thread and return its result. Ctrl-C works.");
  bind_store(module);
  bind_engine(module);

  module.add_object("acquire", py::reinterpret_steal<py::object>(PyCFunction_NewEx(
                                   &kAcquire, module.ptr(), py::str("ratesync").release().ptr())));
  module.add_object("acquire_limits",
                    py::reinterpret_steal<py::object>(PyCFunction_NewEx(
                        &kAcquireLimits, module.ptr(), py::str("ratesync").release().ptr())));
  module.add_object("attempt", py::reinterpret_steal<py::object>(PyCFunction_NewEx(
                                   &kAttempt, module.ptr(), py::str("ratesync").release().ptr())));
  module.add_object("compiled", py::reinterpret_steal<py::object>(PyCFunction_NewEx(
                                    &kCompiled, module.ptr(), py::str("ratesync").release().ptr())));
  module.def("bound_limiters", [] { return py::reinterpret_borrow<py::dict>(state().bound); });
  module.def("forked", [] { return g_generation.load() != 0; });
  module.def(
      "set_hooks",
      [](const py::object& resolve, const py::object& status_error, const py::object& denied_error,
         const py::object& invalid_error, const py::object& log, const py::object& stale_error,
         const py::object& counter_error, const py::object& rolled_back, const py::object& versioned,
         const py::object& due, const py::object& lock_timeout, const py::object& lock_lost) {
        set_hook(state().resolve, resolve);
        set_hook(state().status_error, status_error);
        set_hook(state().denied_error, denied_error);
        set_hook(state().invalid_error, invalid_error);
        set_hook(state().log, log);
        set_hook(state().stale_error, stale_error);
        set_hook(state().counter_error, counter_error);
        set_hook(state().rolled_back, rolled_back);
        set_hook(state().versioned, versioned);
        set_hook(state().due, due);
        set_hook(state().lock_timeout, lock_timeout);
        set_hook(state().lock_lost, lock_lost);
      },
      py::kw_only(), "resolve"_a, "status_error"_a, "denied_error"_a, "invalid_error"_a, "log"_a,
      "stale_error"_a = py::none(), "counter_error"_a = py::none(), "rolled_back"_a = py::none(),
      "versioned"_a = py::none(), "due"_a = py::none(), "lock_timeout"_a = py::none(),
      "lock_lost"_a = py::none());

  // Two steps: the generation at once (any fork, also by C code), the descriptors when Python says so.
  pthread_atfork(nullptr, nullptr, [] { g_generation.fetch_add(1); });
  py::module_::import("os").attr("register_at_fork")("after_in_child"_a =
                                                         py::cpp_function(after_fork_in_child));
}

}  // namespace ratesync::bindings
