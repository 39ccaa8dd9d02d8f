// Calls on state that are not of one key, through the I/O thread.
#include <pybind11/pybind11.h>

#include <cmath>

#include "ratesync/bindings/convert.h"
#include "ratesync/bindings/state.h"

namespace ratesync::bindings {

namespace {

constexpr std::int64_t kMaxRows = 10'000;

Signature signature(const char* function, std::size_t positional, std::initializer_list<const char*> names) {
  Signature made{function, 0, positional, 0, {}};
  for (const char* name : names) made.names[made.count++] = PyUnicode_InternFromString(name);
  return made;
}

bool check_count(PyObject* given, const char* field, std::int64_t* out) {
  if (!check_int64(given, field, 1, "1 to 10000", out)) return false;
  return *out <= kMaxRows || raise_invalid("too many for one call", field, "1 to 10000", given);
}

// Text of a name that need not be there.
bool check_optional(PyObject* given, const char* field, std::size_t most, std::string* out) {
  if (!given || given == Py_None) return true;
  if (PyUnicode_Check(given) && PyUnicode_GET_LENGTH(given) == 0) {
    out->clear();
    return true;
  }
  if (!check_name(given, field, most)) return false;
  *out = utf8(given);
  return true;
}

StateObject* self_of(PyObject* object) { return reinterpret_cast<StateObject*>(object); }

}  // namespace

namespace {

PyObject* due_to_python(const std::vector<store::DueKey>& keys) {
  PyObject* list = PyList_New(static_cast<Py_ssize_t>(keys.size()));
  for (std::size_t i = 0; list && i < keys.size(); ++i) {
    const store::DueKey& key = keys[i];
    PyObject* fields = Py_BuildValue("(s#s#LL)", key.key.data(), static_cast<Py_ssize_t>(key.key.size()),
                                     key.kind.data(), static_cast<Py_ssize_t>(key.kind.size()),
                                     static_cast<long long>(key.due), static_cast<long long>(key.claim));
    PyObject* made = fields && state().due ? PyObject_CallObject(state().due, fields) : Py_XNewRef(fields);
    Py_XDECREF(fields);
    if (made) {
      PyList_SET_ITEM(list, static_cast<Py_ssize_t>(i), made);
    } else {
      Py_CLEAR(list);
    }
  }
  return list;
}

PyObject* page_to_python(const store::StatePage& page, PyObject* decode) {
  PyObject* rows = PyList_New(static_cast<Py_ssize_t>(page.rows.size()));
  for (std::size_t i = 0; rows && i < page.rows.size(); ++i) {
    const store::StateRow& row = page.rows[i];
    PyObject* value = to_python(row.value, decode);
    PyObject* made =
        value ? Py_BuildValue("(s#NLL)", row.key.data(), static_cast<Py_ssize_t>(row.key.size()), value,
                              static_cast<long long>(row.version), static_cast<long long>(row.expires_at))
              : nullptr;
    if (made) {
      PyList_SET_ITEM(rows, static_cast<Py_ssize_t>(i), made);
    } else {
      Py_CLEAR(rows);
    }
  }
  // A cursor is the store's own bytes, which need not be text: one character per byte.
  PyObject* cursor =
      PyUnicode_DecodeLatin1(page.cursor.data(), static_cast<Py_ssize_t>(page.cursor.size()), "strict");
  if (rows && cursor) return Py_BuildValue("(NN)", rows, cursor);
  Py_XDECREF(rows);
  Py_XDECREF(cursor);
  return nullptr;
}

}  // namespace

namespace {

// A call of the store, within the timeout of the state.
template <class T>
PyObject* bounded(const StateImpl& impl, bool changes, std::function<void(store::Callback<T>)> work,
                  std::function<PyObject*(T&)> shape) {
  return make_call<T>(
      impl.engine, impl.store_id,
      [service = impl.service, timeout = impl.timeout, changes, work = std::move(work)](auto done) {
        service->ask<T>(timeout, changes, work, std::move(done));
      },
      std::move(shape));
}

}  // namespace

PyObject* state_claim_due(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  static const Signature kSignature = signature("claim_due", 2, {"limit", "lease", "kind"});
  PyObject* given[3];
  if (!bind_arguments(kSignature, args, nargs, kwnames, given)) return nullptr;
  const StateImpl* impl = live(self_of(self));
  if (!impl) return nullptr;
  std::int64_t limit = 100;
  std::int64_t lease = 60'000;
  std::string kind;
  if (given[0] && !check_count(given[0], "limit", &limit)) return nullptr;
  if (!check_lease(given[1], &lease)) return nullptr;
  if (given[2] && given[2] != Py_None) {
    if (!check_name(given[2], "kind", kMaxName)) return nullptr;
    kind = utf8(given[2]);
  }
  store::StateStore* store = &impl->service->store();
  return bounded<std::vector<store::DueKey>>(
      *impl, true,
      [store, space = impl->space, kind, count = static_cast<std::size_t>(limit), lease](auto done) {
        store->claim_due(space, kind, count, lease, std::move(done));
      },
      due_to_python);
}

// (kind, prefix, cursor, page_size)
PyObject* state_scan(PyObject* self, PyObject* const* args, Py_ssize_t nargs) {
  if (nargs != 4) {
    PyErr_SetString(PyExc_TypeError, "_scan(kind, prefix, cursor, page_size)");
    return nullptr;
  }
  const StateImpl* impl = live(self_of(self));
  if (!impl) return nullptr;
  std::string kind = impl->kind;
  std::string prefix;
  std::string cursor;
  std::int64_t page_size = 0;
  if (args[0] != Py_None) {
    if (!check_name(args[0], "kind", kMaxName)) return nullptr;
    kind = utf8(args[0]);
  }
  if (!check_optional(args[1], "prefix", kMaxKey, &prefix) || !check_count(args[3], "page_size", &page_size))
    return nullptr;
  PyObject* bytes = PyUnicode_Check(args[2]) ? PyUnicode_AsLatin1String(args[2]) : nullptr;
  if (!bytes) {
    PyErr_Clear();
    raise_invalid("not a cursor of a scan", "cursor", "what the page before gave, or ''", args[2]);
    return nullptr;
  }
  cursor.assign(PyBytes_AS_STRING(bytes), static_cast<std::size_t>(PyBytes_GET_SIZE(bytes)));
  Py_DECREF(bytes);
  PyObject* decode = self_of(self)->decode;
  store::StateStore* store = &impl->service->store();
  return bounded<store::StatePage>(
      *impl, false,
      [store, space = impl->space, kind, prefix, cursor, count = static_cast<std::size_t>(page_size)](
          auto done) { store->scan(space, kind, prefix, cursor, count, std::move(done)); },
      [codec = pybind11::reinterpret_borrow<pybind11::object>(decode)](store::StatePage& page) {
        return page_to_python(page, codec.ptr());
      });
}

PyObject* state_initialize(PyObject* self, PyObject*) {
  const StateImpl* impl = live(self_of(self));
  if (!impl) return nullptr;
  store::StateStore* store = &impl->service->store();
  return make_call<store::Unit>(impl->engine, impl->store_id,
                                [store](auto done) { store->initialize(std::move(done)); });
}

PyObject* state_purge(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  static const Signature kSignature = signature("purge", 1, {"limit"});
  PyObject* given[1];
  if (!bind_arguments(kSignature, args, nargs, kwnames, given)) return nullptr;
  const StateImpl* impl = live(self_of(self));
  if (!impl) return nullptr;
  std::int64_t limit = kMaxRows;
  if (given[0] && !check_int64(given[0], "limit", 1, "a number of rows, from 1", &limit)) return nullptr;
  store::StateStore* store = &impl->service->store();
  return make_call<std::int64_t>(
      impl->engine, impl->store_id,
      [store, most = static_cast<std::size_t>(limit)](auto done) { store->purge(most, std::move(done)); },
      [](std::int64_t& count) { return PyLong_FromLongLong(count); });
}

}  // namespace ratesync::bindings
