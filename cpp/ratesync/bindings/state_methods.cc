// The methods of State that are calls of one key. Each is a signature and a function that checks what was
// given and makes the StateCall; operations of many() come here, too.
#include <string_view>
#include <utility>

#include "ratesync/bindings/state.h"

namespace ratesync::bindings {

using store::StateOp;

namespace {

StateObject* self_of(PyObject* object) { return reinterpret_cast<StateObject*>(object); }

// A call of one key while its arguments are checked; null with an exception set.
class Draft {
 public:
  Draft(PyObject* self, StateOp::Verb verb, Shape shape, PyObject* key, PyObject* kind) {
    if (!check_name(key, "key", kMaxKey)) return;
    if (kind == Py_None) kind = nullptr;
    if (kind && !check_name(kind, "kind", kMaxName)) return;
    call_ = new_state_call(self_of(self), verb, shape);
    if (!call_) return;
    call_->key = Py_NewRef(key);
    call_->kind = Py_XNewRef(kind);
  }
  Draft(const Draft&) = delete;
  Draft& operator=(const Draft&) = delete;
  ~Draft() { Py_XDECREF(reinterpret_cast<PyObject*>(call_)); }
  explicit operator bool() const { return call_ != nullptr; }
  StateCallObject* operator->() const { return call_; }

  bool value(PyObject* given) const { return check_value(call_->state, given, &call_->value, &call_->type); }
  bool ttl(PyObject* given, bool keep_allowed = false) const {
    return check_ttl(given, keep_allowed, &call_->ttl);
  }
  bool number(const char* field, PyObject* given, std::int64_t least, const char* expected) const {
    return !given || given == Py_None || check_int64(given, field, least, expected, &call_->number);
  }
  // The version that the key must have, if one is named.
  bool version(PyObject* given) const {
    call_->number = store::kAnyVersion;
    return number("expected", given, 1, "a version, from 1, or None");
  }
  PyObject* release() { return reinterpret_cast<PyObject*>(std::exchange(call_, nullptr)); }

 private:
  StateCallObject* call_ = nullptr;
};

// key, value, ttl, kind
PyObject* make_check_and_set(PyObject* self, PyObject* const* given) {
  static PyObject* const kOne = PyUnicode_InternFromString("1");
  Draft call(self, StateOp::Verb::create, Shape::created, given[0], given[3]);
  if (!call || !call.value(given[1] ? given[1] : kOne) || !call.ttl(given[2])) return nullptr;
  return call.release();
}

// key, kind
PyObject* make_get(PyObject* self, PyObject* const* given) {
  return Draft(self, StateOp::Verb::get, Shape::value, given[0], given[1]).release();
}

PyObject* make_get_versioned(PyObject* self, PyObject* const* given) {
  return Draft(self, StateOp::Verb::get, Shape::versioned, given[0], given[1]).release();
}

// key, value, ttl, kind
PyObject* make_set(PyObject* self, PyObject* const* given) {
  Draft call(self, StateOp::Verb::set, Shape::version, given[0], given[3]);
  if (!call || !call.value(given[1]) || !call.ttl(given[2])) return nullptr;
  return call.release();
}

// key, expected, kind
PyObject* make_delete(PyObject* self, PyObject* const* given) {
  Draft call(self, StateOp::Verb::remove, Shape::changed, given[0], given[2]);
  if (!call || !call.version(given[1])) return nullptr;
  return call.release();
}

// key, delta, ttl, renew, kind
PyObject* make_increment(PyObject* self, PyObject* const* given) {
  Draft call(self, StateOp::Verb::add, Shape::number, given[0], given[4]);
  if (!call) return nullptr;
  call->number = 1;
  if (given[1] && !check_int64(given[1], "delta", INT64_MIN, "an int within 64 bits", &call->number))
    return nullptr;
  const int renew = given[3] ? PyObject_IsTrue(given[3]) : 0;
  if (renew < 0 || !call.ttl(given[2])) return nullptr;
  call->renew = renew > 0;
  return call.release();
}

// key, expected, value, ttl, kind
PyObject* make_compare_and_swap(PyObject* self, PyObject* const* given) {
  Draft call(self, StateOp::Verb::swap, Shape::swapped, given[0], given[4]);
  if (!call || !check_int64(given[1], "expected", 0, "a version, or 0 to create", &call->number) ||
      !call.value(given[2]) || !call.ttl(given[3] ? given[3] : state().keep, true))
    return nullptr;
  if (call->number > 0) return call.release();
  call->verb = StateOp::Verb::create;
  if (call->ttl == store::kKeepTtl) call->ttl = store::kNoTtl;  // there is none to keep
  return call.release();
}

// key, ttl, expected, kind
PyObject* make_touch(PyObject* self, PyObject* const* given) {
  Draft call(self, StateOp::Verb::touch, Shape::changed, given[0], given[3]);
  if (!call || !call.ttl(given[1]) || !call.version(given[2])) return nullptr;
  return call.release();
}

// key, at, kind
PyObject* make_schedule(PyObject* self, PyObject* const* given) {
  Draft call(self, StateOp::Verb::schedule, Shape::nothing, given[0], given[2]);
  if (!call || !check_due(given[1], &call->number, &call->due_in)) return nullptr;
  return call.release();
}

// key, claim, kind
PyObject* make_unschedule(PyObject* self, PyObject* const* given) {
  Draft call(self, StateOp::Verb::unschedule, Shape::changed, given[0], given[2]);
  if (!call || !call.number("claim", given[1], 1, "the claim that claim_due() gave, or None")) return nullptr;
  return call.release();
}

// key, value, ttl, kind. The row found is replied; its writer may come late.
PyObject* make_begin(PyObject* self, PyObject* const* given) {
  Draft call(self, StateOp::Verb::create, Shape::begun, given[0], given[3]);
  if (!call || !call.value(given[1]) || !call.ttl(given[2])) return nullptr;
  call->want_actual = true;
  return call.release();
}

// key, value, version, ttl, kind
PyObject* make_finish(PyObject* self, PyObject* const* given) {
  Draft call(self, StateOp::Verb::swap, Shape::finished, given[0], given[4]);
  if (!call || !call.value(given[1]) ||
      !check_int64(given[2], "version", 1, "the version that _begin() gave", &call->number) ||
      !call.ttl(given[3], true))
    return nullptr;
  call->revive = true;
  return call.release();
}

// --- as methods -----------------------------------------------------------------------------------

struct Method {
  const char* name;
  PyObject* (*make)(PyObject* self, PyObject* const* given);
  std::uint8_t positional;
  std::uint8_t required;
  const char* parameters[5];
};

constexpr Method kTable[] = {
    {"check_and_set", make_check_and_set, 3, 1, {"key", "value", "ttl", "kind"}},
    {"get", make_get, 1, 1, {"key", "kind"}},
    {"get_versioned", make_get_versioned, 1, 1, {"key", "kind"}},
    {"set", make_set, 3, 2, {"key", "value", "ttl", "kind"}},
    {"delete", make_delete, 2, 1, {"key", "expected", "kind"}},
    {"increment", make_increment, 4, 1, {"key", "delta", "ttl", "renew", "kind"}},
    {"compare_and_swap", make_compare_and_swap, 1, 3, {"key", "expected", "value", "ttl", "kind"}},
    {"touch", make_touch, 2, 2, {"key", "ttl", "expected", "kind"}},
    {"schedule", make_schedule, 2, 2, {"key", "at", "kind"}},
    {"unschedule", make_unschedule, 1, 1, {"key", "claim", "kind"}},
    {"_begin", make_begin, 4, 4, {"key", "value", "ttl", "kind"}},
    {"_finish", make_finish, 5, 5, {"key", "value", "version", "ttl", "kind"}},
};
constexpr std::size_t kMethodCount = std::size(kTable);
constexpr std::size_t kPublicCount = kMethodCount - 2;  // what many() takes

Signature g_signatures[kMethodCount];

template <std::size_t index>
PyObject* method(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  PyObject* given[5];
  if (!bind_arguments(g_signatures[index], args, nargs, kwnames, given)) return nullptr;
  return kTable[index].make(self, given);
}

template <std::size_t index>
PyMethodDef define(const char* doc) {
  return {kTable[index].name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(method<index>)),
          METH_FASTCALL | METH_KEYWORDS, doc};
}

// Fields of ratesync.ops.Op, in order: an agreement with it.
constexpr std::string_view kFields[] = {"verb",     "key",   "kind",  "value", "ttl",
                                        "expected", "delta", "renew", "at"};

Py_ssize_t field_of(std::string_view name) {
  Py_ssize_t place = 0;
  while (kFields[place] != name) ++place;
  return place;
}

}  // namespace

PyMethodDef kStateMethods[] = {
    define<0>(
        "check_and_set($self, /, key, value='1', ttl=None, *, kind=None)\n--\n\nCreate a key that is not "
        "there: "
        "deduplication.\n\n"
        "Args:\n    key: text of 1 to 1024 bytes.\n    value: what to store.\n    ttl: seconds above 0 (or a "
        "timedelta) until it is gone; None: never.\n    kind: of the key; that of this state by default.\n\n"
        "Returns:\n    True when it was created now, False when it was there; exactly one of any number of "
        "callers gets True.\n\n"
        "Example:\n    if await state.check_and_set(\"order-42\", ttl=300):\n        ..."),
    define<1>(
        "get($self, /, key, *, kind=None)\n--\n\nThe value of a key, or None.\n\nExample:\n    value = await "
        "state.get(\"order-42\")"),
    define<2>("get_versioned($self, /, key, *, kind=None)\n--\n\nThe value of a key with its version and "
              "expiry, or "
              "None.\n\nExample:\n    found = await state.get_versioned(\"order-42\")"),
    define<3>("set($self, /, key, value, ttl=None, *, kind=None)\n--\n\nStore a value, whatever is there; "
              "the expiry "
              "is replaced, too.\n\nReturns:\n    The version written.\n\nExample:\n    version = await "
              "state.set(\"order-42\", \"paid\", ttl=300)"),
    define<4>("delete($self, /, key, expected=None, *, kind=None)\n--\n\nRemove a key; only while it has the "
              "version "
              "`expected`, if given.\n\nReturns:\n    Whether it was there, in that version.\n\nExample:\n   "
              " gone = "
              "await state.delete(\"order-42\")"),
    define<5>(
        "increment($self, /, key, delta=1, ttl=None, renew=False, *, kind=None)\n--\n\nAdd to an integer; a "
        "key "
        "that is not there counts as 0.\n\nArgs:\n    delta: an int within 64 bits, also negative.\n    ttl: "
        "of "
        "the key when it is created; with `renew` also later.\n\nReturns:\n    The sum.\n\nRaises:\n    "
        "CounterError: the value is no integer, or the sum does not fit into 64 bits; nothing was "
        "changed.\n\n"
        "Example:\n    count = await state.increment(\"visits\", ttl=60)"),
    define<6>("compare_and_swap($self, /, key, *, expected, value, ttl=KEEP, kind=None)\n--\n\nReplace the "
              "value of a "
              "key that has the version `expected`; 0: create it.\n\nArgs:\n    ttl: KEEP leaves the running "
              "expiry.\n\nReturns:\n    The new version.\n\nRaises:\n    StaleVersionError: it has another "
              "version, "
              "or "
              "is gone.\n\nExample:\n    version = await state.compare_and_swap(\"order-42\", expected=3, "
              "value=\"paid\")"),
    define<7>(
        "touch($self, /, key, ttl, *, expected=None, kind=None)\n--\n\nGive a key `ttl` seconds from now; "
        "the "
        "version stays.\n\nReturns:\n    Whether it is there (in the version `expected`).\n\nExample:\n    "
        "alive = await state.touch(\"session\", 300)"),
    define<8>(
        "schedule($self, /, key, at, *, kind=None)\n--\n\nGive a key a timeout, in place of the one it "
        "has.\n\nArgs:\n    at: a datetime with a time zone, seconds since 1970, or a timedelta from the "
        "store's now.\n\nExample:\n    await state.schedule(\"order-42\", timedelta(minutes=5))"),
    define<9>(
        "unschedule($self, /, key, *, claim=None, kind=None)\n--\n\nRemove the timeout of a key; only while "
        "`claim` is its newest claim, if given.\n\nReturns:\n    Whether it was there.\n\nExample:\n    "
        "await "
        "state.unschedule(due.key, claim=due.claim)"),
    define<10>("Pending[(created, version, value of the row found)]"),
    define<11>("Pending[(done, version found)]"),
    {"many", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(state_many)),
     METH_FASTCALL | METH_KEYWORDS,
     "many($self, /, ops, *, atomic=False)\n--\n\nMake several operations in one call.\n\n"
     "Args:\n    ops: made by the functions of `ratesync.ops`, or calls of this state that were not awaited; "
     "at "
     "most 10,000. Operations of one key are executed in their order.\n    atomic: all or nothing, of "
     "different keys.\n\n"
     "Returns:\n    A list with one entry for each operation: what its method returns, or the exception it "
     "would raise.\n\n"
     "Raises:\n    RolledBackError: one of an atomic call could not be done, so none was.\n\n"
     "Example:\n    from ratesync import ops\n    await state.many([ops.set(\"a\", 1), ops.delete(\"b\")], "
     "atomic=True)"},
    {"claim_due", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(state_claim_due)),
     METH_FASTCALL | METH_KEYWORDS,
     "claim_due($self, /, limit=100, lease=60, *, kind=None)\n--\n\nTake timeouts that are due, oldest "
     "first; "
     "each goes to exactly one caller.\n\n"
     "Args:\n    limit: at most so many, 1 to 10,000.\n    lease: seconds (or a timedelta) after which what "
     "was "
     "not unscheduled falls due again.\n    kind: of the keys; None: every kind.\n\n"
     "Returns:\n    A list of Due(key, kind, due_at, claim).\n\n"
     "Example:\n    for due in await state.claim_due():\n        await state.unschedule(due.key, "
     "claim=due.claim, kind=due.kind)"},
    {"_scan", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(state_scan)), METH_FASTCALL,
     "Pending[([(key, value, version, ms since 1970 or 0)], cursor, empty at the end)]"},
    {"initialize", state_initialize, METH_NOARGS,
     "initialize($self, /)\n--\n\nConnect and check the tables of this prefix; otherwise the first use "
     "does.\n\nExample:\n    await state.initialize()"},
    {"purge", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(state_purge)),
     METH_FASTCALL | METH_KEYWORDS,
     "purge($self, /, limit=10000)\n--\n\nThrow dead rows away now; the store does so by itself in the "
     "background.\n\nReturns:\n    How many.\n\nExample:\n    gone = await state.purge()"},
    {nullptr, nullptr, 0, nullptr},
};

PyObject* call_of_op(PyObject* self, PyObject* op) {
  if (PyTuple_GET_SIZE(op) != static_cast<Py_ssize_t>(std::size(kFields))) {
    raise_invalid("an operation of many() is made by the functions of ratesync.ops", "ops",
                  "ops.set(...), ops.get(...) ...", op);
    return nullptr;
  }
  PyObject* verb = PyTuple_GET_ITEM(op, 0);
  for (std::size_t i = 0; i < kPublicCount; ++i) {
    if (!PyUnicode_Check(verb) || PyUnicode_CompareWithASCIIString(verb, kTable[i].name) != 0) continue;
    PyObject* given[5] = {};
    for (std::size_t p = 0; p < 5 && kTable[i].parameters[p]; ++p) {
      const std::string_view name = kTable[i].parameters[p];
      given[p] = PyTuple_GET_ITEM(op, field_of(name == "claim" ? "expected" : name));
    }
    return kTable[i].make(self, given);
  }
  raise_invalid("not an operation of many()", "ops", "what the functions of ratesync.ops make", op);
  return nullptr;
}

bool init_state_methods() {
  for (std::size_t i = 0; i < kMethodCount; ++i) {
    Signature& signature = g_signatures[i];
    signature = {kTable[i].name, 0, kTable[i].positional, kTable[i].required, {}};
    while (signature.count < 5 && kTable[i].parameters[signature.count]) {
      PyObject* name = PyUnicode_InternFromString(kTable[i].parameters[signature.count]);
      if (!name) return false;
      signature.names[signature.count++] = name;
    }
  }
  return true;
}

}  // namespace ratesync::bindings
