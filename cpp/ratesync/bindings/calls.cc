// Calls that return a Pending (await it, or wait() in a plain thread), and limiter construction.
#include "ratesync/bindings/calls.h"

#include <pybind11/pybind11.h>

#include <cmath>

#include "ratesync/bindings/convert.h"
#include "ratesync/bindings/permit.h"

namespace py = pybind11;

namespace ratesync::bindings {

namespace {

// Keeps a Python object alive inside a std::function.
struct Keep {
  explicit Keep(PyObject* held) : object(py::reinterpret_borrow<py::object>(held)) {}
  py::object object;
  [[nodiscard]] PyObject* get() const { return object.ptr(); }
};

PyObject* acquire_call(PyObject* self, PyObject* const* args, Py_ssize_t nargs, Mode mode) {
  if (nargs != 3) {
    PyErr_SetString(PyExc_TypeError, "expected timeout, cost, key");
    return nullptr;
  }
  PyObject* names = PyTuple_New(2);
  if (!names) return nullptr;
  PyTuple_SET_ITEM(names, 0, PyUnicode_InternFromString("cost"));
  PyTuple_SET_ITEM(names, 1, PyUnicode_InternFromString("key"));
  PyObject* made = make_permit(reinterpret_cast<LimiterObject*>(self), args, 1, names, "acquire");
  Py_DECREF(names);
  if (!made) return nullptr;
  reinterpret_cast<PermitObject*>(made)->bare = true;
  PyObject* pending = make_attempt(made, mode);
  Py_DECREF(made);
  return pending;
}

}  // namespace

PyObject* make_attempt(PyObject* object, Mode mode) {
  auto permit = std::make_shared<Keep>(object);
  return make_pending(
      [permit, mode] { return begin_async(reinterpret_cast<PermitObject*>(permit->get()), mode); },
      [permit, mode] { return run_sync(reinterpret_cast<PermitObject*>(permit->get()), mode); });
}

engine::Completion* wait_sync(engine::Engine& engine, engine::Completion* completion,
                              const std::shared_ptr<engine::SyncTarget>& target, bool cancellable) {
  engine::Completion* done = nullptr;
  while (!done) {
    Py_BEGIN_ALLOW_THREADS done = target->wait(50 * kMilli);
    Py_END_ALLOW_THREADS if (done || PyErr_CheckSignals() == 0) continue;
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    if (cancellable) {
      completion->ref();
      if (!engine.submit(engine::CancelTask{static_cast<engine::Acquisition*>(completion)}))
        completion->unref();
    }
    if (engine::Completion* unwanted = target->give_up()) {
      give_back(engine, unwanted);
      unwanted->unref();
    }
    PyErr_Restore(type, value, trace);
    return nullptr;
  }
  return done;
}

PyObject* limiter_try(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
  return acquire_call(self, args, nargs, Mode::boolean);
}

PyObject* limiter_acquire_bare(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
  return acquire_call(self, args, nargs, Mode::none);
}

PyObject* limiter_peek(PyObject* self, PyObject* key) {
  LimiterImpl* impl = live(reinterpret_cast<LimiterObject*>(self));
  const store::GroupRef group = impl ? group_for_key(*impl, key) : nullptr;
  if (!group) return nullptr;
  store::LimitStore* limits = &impl->core->service->limits();
  return make_call<store::Peek>(impl->engine, impl->store_id,
                                [limits, group](auto done) { limits->peek(group, std::move(done)); });
}

PyObject* limiter_reset(PyObject* self, PyObject* key) {
  LimiterImpl* impl = live(reinterpret_cast<LimiterObject*>(self));
  const store::GroupRef group = impl ? group_for_key(*impl, key) : nullptr;
  if (!group) return nullptr;
  engine::LimitService* service = impl->core->service;
  return make_call<store::Unit>(impl->engine, impl->store_id, [service, group](auto done) {
    service->limits().reset(group, [service, group, done](Result<store::Unit> result) {
      if (result.ok()) service->was_reset(group->id);
      done(std::move(result));
    });
  });
}

PyObject* settle_method(PyObject* self, PyObject* actual_cost) {
  auto* permit = reinterpret_cast<PermitObject*>(self);
  if (permit->parts) return settle_all(permit, actual_cost);
  LimiterImpl* impl = live(permit->limiter);
  if (!impl) return nullptr;
  const bool whole = PyLong_Check(actual_cost) && !PyBool_Check(actual_cost);
  const long long actual = whole ? PyLong_AsLongLong(actual_cost) : -1;
  if (PyErr_Occurred()) PyErr_Clear();
  const limits::Params& params = impl->core->group->params;
  if (actual < 0 || (actual > 0 && !limits::validate_actual(params, actual).ok())) {
    raise_invalid("the actual cost must be a whole number", "actual_cost",
                  params.is_window() ? "int from 0 to 1000000000" : "int >= 0 within 31 years' reach",
                  actual_cost);
    return nullptr;
  }
  if (permit->phase != Phase::granted) {
    PyErr_SetString(PyExc_RuntimeError, "settle() before the grant: use it inside `with acquire(...)`");
    return nullptr;
  }
  const std::int64_t delta = actual - permit->cost;
  permit->cost = actual;
  const store::GroupRef group = permit->group ? permit->group : impl->core->group;
  store::LimitStore* limits = &impl->core->service->limits();
  return make_call<store::Unit>(impl->engine, impl->store_id, [limits, group, delta](auto done) {
    limits->settle(group, delta, std::move(done));
  });
}

PyObject* limiter_counters(PyObject* self, PyObject*) {
  LimiterImpl* impl = live(reinterpret_cast<LimiterObject*>(self));
  if (!impl) return nullptr;
  return counters_dict(*impl);
}

namespace {

// Seconds as nanoseconds; `what` names the field when the value is not a number in range.
bool seconds(PyObject* value, const char* what, double min, double max, Nanos* out) {
  const double number =
      PyFloat_Check(value) || (PyLong_Check(value) && !PyBool_Check(value)) ? PyFloat_AsDouble(value) : -1;
  if (PyErr_Occurred()) PyErr_Clear();
  if (!(number >= min && number <= max))
    return raise_invalid("not a number of seconds in range", what,
                         (std::to_string(min) + " to " + std::to_string(max)).c_str(), value);
  *out = from_seconds(number);
  return true;
}

bool whole(PyObject* value, const char* what, std::int64_t* out) {
  if (!PyLong_Check(value) || PyBool_Check(value))
    return raise_invalid("not a whole number", what, "int", value);
  *out = PyLong_AsLongLong(value);
  if (!PyErr_Occurred()) return true;
  PyErr_Clear();
  return raise_invalid("number too large", what, "int of at most 1000000000", value);
}

bool positive(PyObject* value, const char* what, std::int64_t* out) {
  if (!whole(value, what, out)) return false;
  if (*out >= 1) return true;
  return raise_invalid((std::string(what) + " must be > 0").c_str(), what,
                       "a whole number from 1 to 1000000000", value);
}

// Algorithm, rate, burst, limit and window. What the algorithm ignores is not looked at.
bool parse_spacing(PyObject* algorithm, PyObject* rate, PyObject* burst, PyObject* limit, PyObject* window,
                   limits::Params* params) {
  if (algorithm) {
    const char* name = PyUnicode_Check(algorithm) ? PyUnicode_AsUTF8(algorithm) : nullptr;
    PyErr_Clear();
    if (!name || !limits::parse_algorithm(name, &params->algorithm))
      return raise_invalid("not an algorithm", "algorithm",
                           "token_bucket, sliding_window, sliding_counter or fixed_window", algorithm);
  }
  if (params->is_window()) {
    if (limit != Py_None && !positive(limit, "limit", &params->limit)) return false;
    if (window == Py_None) return true;
    Nanos length = 0;
    if (!seconds(window, "window_seconds", 0.001, 366.0 * 86400, &length)) return false;
    params->window = (length + kMicro / 2) / kMicro * kMicro;
    return true;
  }
  if (burst && !whole(burst, "burst", &params->burst)) return false;
  if (rate == Py_None) return true;
  params->rate_per_second = PyFloat_AsDouble(rate);
  const bool bad = PyErr_Occurred() || PyBool_Check(rate) || params->rate_per_second == 0;
  PyErr_Clear();
  return !bad || raise_invalid("rate_per_second must be > 0", "rate_per_second",
                               "a finite number above 0 and at most 1e9", rate);
}

}  // namespace

LimiterImpl* make_limiter_impl(PyObject* args, PyObject* kwargs) {
  static const char* names[] = {
      "store",         "group_id",       "algorithm",        "rate_per_second",  "burst",
      "limit",         "window_seconds", "max_concurrent",   "timeout",          "fail_closed",
      "outage_budget", "lease_seconds",  "max_hold_seconds", "timing_margin_ms", nullptr};
  PyObject *store_object, *group_id, *algorithm = nullptr;
  PyObject *rate = Py_None, *burst = nullptr, *limit = Py_None, *window = Py_None;
  PyObject *concurrent = Py_None, *timeout = Py_None, *budget = nullptr;
  PyObject *lease = nullptr, *max_hold = Py_None, *margin = nullptr;
  int fail_closed = 0;
  if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OU|$OOOOOOOpOOOO:Limiter", const_cast<char**>(names),
                                   &store_object, &group_id, &algorithm, &rate, &burst, &limit, &window,
                                   &concurrent, &timeout, &fail_closed, &budget, &lease, &max_hold, &margin))
    return nullptr;
  PyStore* store = nullptr;
  try {
    store = py::cast<PyStore*>(py::handle(store_object));
  } catch (const py::cast_error&) {
    PyErr_SetString(PyExc_TypeError, "store must be a _core.Store");
    return nullptr;
  }
  Py_ssize_t size = 0;
  const char* text = PyUnicode_AsUTF8AndSize(group_id, &size);
  if (!text || size == 0 || PyUnicode_GetLength(group_id) > 255 ||
      std::char_traits<char>::length(text) != static_cast<std::size_t>(size)) {
    PyErr_Clear();
    raise_invalid("a limiter's name must be 1 to 255 characters without NUL", "limiter_id",
                  "1 to 255 characters", group_id);
    return nullptr;
  }
  limits::Params params;
  engine::Policy policy;
  policy.fail_closed = fail_closed != 0;
  bool ok = true;
  if (!parse_spacing(algorithm, rate, burst, limit, window, &params)) return nullptr;
  if (concurrent != Py_None && !positive(concurrent, "max_concurrent", &params.max_concurrent))
    return nullptr;
  policy.default_timeout = parse_timeout(timeout, kForever, &ok);
  if (!ok) return nullptr;
  if (budget && !seconds(budget, "outage_budget", 0, 60, &policy.outage_budget)) return nullptr;
  if (lease && !seconds(lease, "lease_seconds", 0.1, 86400, &params.lease)) return nullptr;
  if (max_hold != Py_None && !seconds(max_hold, "max_hold_seconds", 0.001, 1e9, &policy.max_hold))
    return nullptr;
  if (margin) {
    const double ms = PyFloat_AsDouble(margin);
    if (PyErr_Occurred() || !(ms >= 0 && ms <= 1e6)) {
      PyErr_Clear();
      raise_invalid("not a number of milliseconds in range", "timing_margin_ms", "0 to 1000000", margin);
      return nullptr;
    }
    params.timing_margin = static_cast<Nanos>(ms * 1e6);
  }
  const Status valid = limits::validate(params);
  if (!valid.ok()) {
    const std::string field = valid.message.substr(0, valid.message.find(':'));
    PyObject* received = field == "rate_per_second"  ? rate
                         : field == "burst"          ? burst
                         : field == "limit"          ? limit
                         : field == "window_seconds" ? window
                                                     : concurrent;
    raise_invalid(valid.message.c_str(), field.c_str(), "see the message", received);
    return nullptr;
  }
  if (store->generation != g_generation.load(std::memory_order_relaxed) || !store->engine->running()) {
    raise_status(Status::make(Code::closed, "the store's engine was shut down"), store->entry->id);
    return nullptr;
  }
  auto impl = std::make_unique<LimiterImpl>(
      LimiterImpl{std::string(text, static_cast<std::size_t>(size)), store->entry->id, store->engine,
                  std::make_shared<engine::LimiterCore>(), nullptr, memory::Pin(), store->generation});
  impl->core->group = std::make_shared<const store::Group>(impl->id, params);
  impl->core->policy = policy;
  impl->core->service = store->entry->limits.get();
  auto* memory = dynamic_cast<memory::MemoryStore*>(store->entry->store.get());
  if (memory && policy.max_hold == kForever) {
    // Needs aggregate assignment of a move-only member: build anew with the pin.
    return new LimiterImpl{impl->id, impl->store_id,        impl->engine,     impl->core,
                           memory,   memory->pin(impl->id), impl->generation, !params.has_concurrency()};
  }
  return impl.release();
}

}  // namespace ratesync::bindings
