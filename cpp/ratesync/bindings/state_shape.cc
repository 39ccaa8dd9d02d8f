// What an operation on state comes to for its caller.
#include "ratesync/bindings/state.h"

namespace ratesync::bindings {

using store::StateOp;
using Outcome = store::StateReply::Outcome;

namespace {

void raise_object(PyObject* error) {
  if (!error) return;
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error)), error);
  Py_DECREF(error);
}

template <class Reply>
PyObject* raise_stale(const StateCallObject& call, const Reply& reply) {
  const auto expected = static_cast<long long>(call.verb == StateOp::Verb::create ? 0 : call.number);
  const auto actual = static_cast<long long>(reply.outcome == Outcome::absent ? 0 : reply.version);
  raise_object(state().stale_error
                   ? PyObject_CallFunction(state().stale_error, "LL", expected, actual)
                   : PyObject_CallFunction(PyExc_RuntimeError, "s", "the version is not the expected one"));
  return nullptr;
}

PyObject* raise_counter(const StateCallObject& call, const char* reason) {
  raise_object(state().counter_error ? PyObject_CallFunction(state().counter_error, "sO", reason, call.key)
                                     : PyObject_CallFunction(PyExc_ValueError, "s", reason));
  return nullptr;
}

PyObject* raise_rolled_back() {
  PyErr_SetString(PyExc_RuntimeError, "not executed: another operation of the same atomic call failed");
  return nullptr;
}

template <class Reply>
PyObject* make_versioned(const Reply& reply, PyObject* decode) {
  PyObject* value = to_python(reply.value, decode);
  if (!value) return nullptr;
  PyObject* expires = PyLong_FromLongLong(reply.expires_at);
  PyObject* version = PyLong_FromLongLong(reply.version);
  PyObject* made = nullptr;
  if (expires && version) {
    PyObject* const args[] = {value, version, expires};
    made = state().versioned ? PyObject_Vectorcall(state().versioned, args, 3, nullptr)
                             : PyTuple_Pack(3, value, version, expires);
  }
  Py_DECREF(value);
  Py_XDECREF(version);
  Py_XDECREF(expires);
  return made;
}

// A StateReply or a memory::Answer.
template <class Reply>
PyObject* shape(const StateCallObject& call, const Reply& reply) {
  const bool done = reply.outcome == Outcome::done;
  if (reply.outcome == Outcome::rolled_back) return raise_rolled_back();
  PyObject* decode = call.state->decode;
  switch (call.shape) {
    case Shape::created:
    case Shape::changed: return PyBool_FromLong(done);
    case Shape::value: return done ? to_python(reply.value, decode) : Py_NewRef(Py_None);
    case Shape::versioned: return done ? make_versioned(reply, decode) : Py_NewRef(Py_None);
    case Shape::version: return PyLong_FromLongLong(reply.version);
    case Shape::number:
      if (reply.outcome == Outcome::not_integer) return raise_counter(call, "not_integer");
      if (reply.outcome == Outcome::overflow) return raise_counter(call, "overflow");
      return PyLong_FromLongLong(reply.value.number);
    case Shape::swapped: return done ? PyLong_FromLongLong(reply.version) : raise_stale(call, reply);
    case Shape::nothing: Py_RETURN_NONE;
    case Shape::begun: {
      PyObject* value = !done && reply.has_value ? to_python(reply.value, decode) : Py_NewRef(Py_None);
      if (!value) return nullptr;
      return Py_BuildValue("(OLN)", done ? Py_True : Py_False, static_cast<long long>(reply.version), value);
    }
    case Shape::many: break;
    case Shape::finished:
      return Py_BuildValue("(OL)", done ? Py_True : Py_False, static_cast<long long>(reply.version));
  }
  PyErr_SetString(PyExc_SystemError, "not the shape of one operation");
  return nullptr;
}

}  // namespace

PyObject* shape_answer(const StateCallObject& call, const memory::Answer& answer) {
  return shape(call, answer);
}

PyObject* shape_reply(const StateCallObject& call, const Status& status, const store::StateReply& reply) {
  return status.ok() ? shape(call, reply) : raise_status(status, call.state->impl->store_id);
}

}  // namespace ratesync::bindings
