// What State takes and gives: names, values, times, arguments.
#include <Python.h>
#include <datetime.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "ratesync/bindings/state.h"

namespace ratesync::bindings {

using store::Value;

namespace {

// A thousand years: what lies beyond is a mistake of units, and would overflow the servers' dates.
constexpr double kMaxSeconds = 3.2e10;

// Seconds of a number or a timedelta. False: neither.
bool seconds_of(PyObject* value, double* out) {
  if (PyBool_Check(value)) return false;
  if (PyFloat_Check(value)) {
    *out = PyFloat_AS_DOUBLE(value);
    return true;
  }
  if (PyLong_Check(value)) {
    *out = PyLong_AsDouble(value);
    if (!PyErr_Occurred()) return true;
    PyErr_Clear();  // beyond a double
    *out = Py_SIZE(value) < 0 ? -HUGE_VAL : HUGE_VAL;
    return true;
  }
  if (!PyDateTimeAPI) PyDateTime_IMPORT;
  if (!PyDateTimeAPI) {
    PyErr_Clear();
    return false;
  }
  if (!PyDelta_Check(value)) return false;
  *out = static_cast<double>(PyDateTime_DELTA_GET_DAYS(value)) * 86400.0 +
         static_cast<double>(PyDateTime_DELTA_GET_SECONDS(value)) +
         static_cast<double>(PyDateTime_DELTA_GET_MICROSECONDS(value)) / 1e6;
  return true;
}

}  // namespace

std::string_view utf8(PyObject* checked) {
  if (PyUnicode_IS_COMPACT_ASCII(checked))
    return {reinterpret_cast<const char*>(PyUnicode_1BYTE_DATA(checked)),
            static_cast<std::size_t>(PyUnicode_GET_LENGTH(checked))};
  Py_ssize_t size = 0;
  const char* text = PyUnicode_AsUTF8AndSize(checked, &size);
  return {text, static_cast<std::size_t>(size)};
}

bool check_name(PyObject* text, const char* field, std::size_t most) {
  const auto refuse = [&](const char* message) {
    const std::string expected = "text of 1 to " + std::to_string(most) + " bytes (UTF-8) without NUL";
    return raise_invalid((std::string(field) + " " + message).c_str(), field, expected.c_str(), text);
  };
  if (!PyUnicode_Check(text)) return refuse("must be a string");
  const std::string_view bytes = utf8(text);
  if (!bytes.data()) {
    if (PyErr_ExceptionMatches(PyExc_MemoryError)) return false;
    PyErr_Clear();
    return refuse("must be encodable as UTF-8: it has a lone surrogate");
  }
  if (bytes.empty()) return refuse("must not be empty");
  if (bytes.size() > most) return refuse("is too long: shorten or hash it");
  if (std::memchr(bytes.data(), 0, bytes.size())) return refuse("must not contain NUL");
  return true;
}

bool check_ttl(PyObject* value, bool keep_allowed, std::int64_t* out) {
  if (!value || value == Py_None) {
    *out = store::kNoTtl;
    return true;
  }
  if (value == state().keep) {
    if (keep_allowed) {
      *out = store::kKeepTtl;
      return true;
    }
    return raise_invalid("KEEP is for compare_and_swap: name the time to live, or None for ever", "ttl",
                         "seconds above 0, a timedelta, or None", value);
  }
  constexpr auto kMost = static_cast<long long>(kMaxSeconds);
  if (PyLong_CheckExact(value)) {
    int overflow = 0;
    const long long whole = PyLong_AsLongLongAndOverflow(value, &overflow);
    if (overflow == 0 && whole > 0 && whole <= kMost) {
      *out = whole * 1000;
      return true;
    }
  }
  double seconds = 0;
  if (!seconds_of(value, &seconds))
    return raise_invalid("a time to live is a number of seconds, a timedelta, or None for ever", "ttl",
                         "seconds above 0, a timedelta, or None", value);
  if (!(seconds > 0))
    return raise_invalid("a time to live must be above 0: use delete() to remove, None to keep for ever",
                         "ttl", "seconds above 0, a timedelta, or None", value);
  if (seconds > kMaxSeconds)
    return raise_invalid("a time to live is at most 1000 years: use None for ever", "ttl",
                         "seconds up to 32000000000, a timedelta, or None", value);
  *out = std::max<std::int64_t>(1, std::llround(seconds * 1e3));
  return true;
}

bool check_lease(PyObject* value, std::int64_t* out) {
  if (!value) return true;
  double seconds = 0;
  if (value == Py_None || !seconds_of(value, &seconds) || !(seconds > 0) || seconds > kMaxSeconds)
    return raise_invalid("a lease has an end: what its claimer has not done by then falls due again", "lease",
                         "seconds from 0.001 to 32000000000, or a timedelta", value);
  *out = std::max<std::int64_t>(1, std::llround(seconds * 1e3));
  return true;
}

bool check_int64(PyObject* value, const char* field, std::int64_t least, const char* expected,
                 std::int64_t* out) {
  if (!PyLong_Check(value) || PyBool_Check(value))
    return raise_invalid((std::string(field) + " must be a whole number").c_str(), field, expected, value);
  int overflow = 0;
  *out = PyLong_AsLongLongAndOverflow(value, &overflow);
  if (overflow != 0 || *out < least)
    return raise_invalid((std::string(field) + " is out of range").c_str(), field, expected, value);
  return true;
}

bool check_due(PyObject* at, std::int64_t* out, bool* relative) {
  static const char* const expected =
      "a datetime with a time zone, seconds since 1970, or a timedelta from now";
  if (!PyDateTimeAPI) PyDateTime_IMPORT;
  if (!PyDateTimeAPI) return false;
  double seconds = 0;
  *relative = PyDelta_Check(at);
  if (PyDateTime_Check(at)) {
    PyObject* offset = PyObject_CallMethod(at, "utcoffset", nullptr);
    if (!offset) return false;
    const bool naive = offset == Py_None;
    Py_DECREF(offset);
    if (naive)
      return raise_invalid("a datetime without a time zone names no moment: add tzinfo=timezone.utc", "at",
                           expected, at);
    PyObject* stamp = PyObject_CallMethod(at, "timestamp", nullptr);
    if (!stamp) return false;
    seconds = PyFloat_AsDouble(stamp);
    Py_DECREF(stamp);
    if (PyErr_Occurred()) return false;
  } else if (!seconds_of(at, &seconds)) {
    return raise_invalid("`at` must be a moment, or a span from now", "at", expected, at);
  }
  if (!(std::abs(seconds) <= kMaxSeconds))
    return raise_invalid("`at` is out of range: seconds, not milliseconds, and within 1000 years", "at",
                         expected, at);
  *out = std::llround(seconds * 1e3);
  return true;
}

bool check_value(const StateObject* self, PyObject* value, PyObject** out, Value::Type* type) {
  const auto refuse = [value](const char* message, const char* expected) {
    return raise_invalid(message, "value", expected, value);
  };
  PyObject* stored = nullptr;
  if (PyLong_Check(value) && !PyBool_Check(value)) {
    int overflow = 0;
    (void)PyLong_AsLongLongAndOverflow(value, &overflow);
    if (overflow == 0) {
      *type = Value::Type::integer;
      *out = Py_NewRef(value);
      return true;
    }
    if (!self->encode)
      return refuse("an integer value must fit into 64 bits: store it as str(value), or with codec=\"json\"",
                    "-2**63 to 2**63-1");
  }
  if (self->encode) {
    stored = PyObject_CallOneArg(self->encode, value);
    if (!stored) return false;
    *type = Value::Type::json;
    if (PyBytes_Check(stored)) {
      Py_SETREF(stored, PyUnicode_DecodeUTF8(PyBytes_AS_STRING(stored), PyBytes_GET_SIZE(stored), "strict"));
      if (!stored) PyErr_Clear();
    }
    if (!stored || !PyUnicode_Check(stored)) {
      Py_XDECREF(stored);
      return refuse("the codec must give text, or bytes in UTF-8", "a value that its codec can encode");
    }
  } else if (PyUnicode_Check(value)) {
    *type = Value::Type::text;
    stored = Py_NewRef(value);
  } else if (PyBytes_Check(value)) {
    *type = Value::Type::bytes;
    stored = Py_NewRef(value);
  } else if (PyByteArray_Check(value) || PyMemoryView_Check(value)) {
    *type = Value::Type::bytes;
    stored = PyBytes_FromObject(value);  // now: it may change until it is sent
    if (!stored) return false;
  } else {
    return refuse("a value is str, bytes or int: make the state with codec=\"json\" for anything else",
                  "str, bytes or int");
  }
  std::size_t size = 0;
  if (PyUnicode_Check(stored)) {
    const std::string_view bytes = utf8(stored);
    if (!bytes.data()) {
      Py_DECREF(stored);
      if (PyErr_ExceptionMatches(PyExc_MemoryError)) return false;
      PyErr_Clear();
      return refuse("a text must be encodable as UTF-8: it has a lone surrogate", "text without surrogates");
    }
    size = bytes.size();
  } else {
    size = static_cast<std::size_t>(PyBytes_GET_SIZE(stored));
  }
  if (size > kMaxValue) {
    Py_DECREF(stored);
    return refuse("a value is at most 64 MiB: store where it lies instead", "at most 67108864 bytes");
  }
  *out = stored;
  return true;
}

void fill_value(PyObject* value, Value::Type type, Value* out) {
  out->type = type;
  if (type == Value::Type::integer) {
    out->number = PyLong_AsLongLong(value);
  } else if (PyUnicode_Check(value)) {
    out->data = utf8(value);
  } else {
    out->data.assign(PyBytes_AS_STRING(value), static_cast<std::size_t>(PyBytes_GET_SIZE(value)));
  }
}

PyObject* to_python(const Value& value, PyObject* decode) {
  const auto size = static_cast<Py_ssize_t>(value.data.size());
  switch (value.type) {
    case Value::Type::integer: return PyLong_FromLongLong(value.number);
    case Value::Type::bytes: return PyBytes_FromStringAndSize(value.data.data(), size);
    case Value::Type::text: return PyUnicode_DecodeUTF8(value.data.data(), size, "strict");
    case Value::Type::json: break;
  }
  PyObject* text = PyUnicode_DecodeUTF8(value.data.data(), size, "strict");
  if (!text || !decode) return text;
  PyObject* decoded = PyObject_CallOneArg(decode, text);
  Py_DECREF(text);
  return decoded;
}

bool bind_arguments(const Signature& signature, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames,
                    PyObject** out) {
  if (static_cast<std::size_t>(nargs) > signature.positional) {
    PyErr_Format(PyExc_TypeError, "%s() takes at most %zu positional arguments, %zd were given: use names",
                 signature.function, signature.positional, nargs);
    return false;
  }
  for (Py_ssize_t i = 0; i < nargs; ++i) out[i] = args[i];
  for (std::size_t i = static_cast<std::size_t>(nargs); i < signature.count; ++i) out[i] = nullptr;
  const Py_ssize_t named = kwnames ? PyTuple_GET_SIZE(kwnames) : 0;
  for (Py_ssize_t i = 0; i < named; ++i) {
    PyObject* name = PyTuple_GET_ITEM(kwnames, i);
    std::size_t place = 0;
    while (place < signature.count && signature.names[place] != name) ++place;
    if (place == signature.count) {  // a name that is not interned
      place = 0;
      while (place < signature.count && PyUnicode_Compare(signature.names[place], name) != 0) ++place;
      if (PyErr_Occurred()) return false;
    }
    if (place == signature.count) {
      PyErr_Format(PyExc_TypeError, "%s() got an unexpected keyword argument '%U'", signature.function, name);
      return false;
    }
    if (out[place]) {
      PyErr_Format(PyExc_TypeError, "%s() got multiple values for argument '%U'", signature.function, name);
      return false;
    }
    out[place] = args[nargs + i];
  }
  for (std::size_t i = 0; i < signature.required; ++i) {
    if (out[i]) continue;
    PyErr_Format(PyExc_TypeError, "%s() missing required argument '%U'", signature.function,
                 signature.names[i]);
    return false;
  }
  return true;
}

}  // namespace ratesync::bindings
