// The Python objects of state, as raw heap types: State, and the StateCall that each of its methods gives.
//
// A StateCall starts when it is awaited or wait()ed, once. On the memory store it is decided right there, on
// the calling thread; otherwise a Waiter stands for it until the answer comes. All functions need the GIL.
#pragma once

#include <string>

#include "ratesync/bindings/objects.h"
#include "ratesync/engine/lock_service.h"
#include "ratesync/engine/state_service.h"
#include "ratesync/memory/memory_state.h"

namespace ratesync::bindings {

struct StateImpl {
  std::string store_id;
  std::string prefix;
  std::shared_ptr<engine::Engine> engine;
  engine::StateService* service = nullptr;
  engine::LockServices* locks = nullptr;  // of the same store: bells are there
  store::SpaceRef space;
  std::string kind;  // of calls that name none
  Nanos timeout = kForever;
  // The embedded store decides on the calling thread. Null: another store.
  memory::MemoryState* memory = nullptr;
  memory::FamilyRef family;         // of `kind`
  mutable memory::FamilyRef named;  // of the kind that a call named last: StateObject::last_kind
  unsigned generation = 0;
};

struct StateObject {
  PyObject_HEAD PyObject* weakrefs;
  StateImpl* impl;
  PyObject* encode;  // value -> JSON text, for codec="json"; null: by type
  PyObject* decode;
  // On the embedded store: `named` of the impl is of this kind.
  PyObject* last_kind;
  const StateImpl* last_of;
};

// What the caller makes of the reply.
enum class Shape : std::uint8_t {
  created,    // bool
  value,      // the value, or None
  versioned,  // with version and expiry, or None
  version,    // int
  changed,    // bool: done, or absent or of another version
  number,     // int; raises what no counter can do
  swapped,    // int; raises StaleVersionError
  nothing,    // None
  begun,      // (created, version, value of the row found)
  finished,   // (done, version found)
  many,       // list of results and exceptions
};

struct StateCallObject {
  PyObject_HEAD StateObject* state;
  PyObject* key;         // str, checked; null: many
  PyObject* kind;        // str, checked; null: that of the state
  PyObject* value;       // str, bytes or int, checked; or null
  PyObject* parts;       // of many: tuple of StateCalls; else null
  WaiterObject* waiter;  // as a coroutine, once begun
  std::int64_t ttl;      // ms
  std::int64_t number;   // expected, delta or due
  store::StateOp::Verb verb;
  store::Value::Type type;  // of `value`
  Shape shape;
  bool want_actual;
  bool renew;
  bool revive;
  bool due_in;
  bool atomic;
  bool used;
};

// state.cc
bool init_state_type(PyObject* module);
StateImpl* live(StateObject* state);  // rebinds after fork; null with an exception set
PyObject* raise_closed(const StateImpl& impl);

// state_methods.cc
bool init_state_methods();
extern PyMethodDef kStateMethods[];
// From a ratesync.ops.Op. A new reference, or null with an exception set.
PyObject* call_of_op(PyObject* state, PyObject* op);

// state_call.cc
bool init_state_call_type(PyObject* module);
StateCallObject* new_state_call(StateObject* state, store::StateOp::Verb verb, Shape shape);
// Fills an operation from a call. Takes strings by copy: the call may go before it is through.
void fill_op(const StateCallObject& call, const StateImpl& impl, Nanos deadline, store::StateOp* op);

// state_shape.cc: what the caller gets; null with an exception set.
PyObject* shape_answer(const StateCallObject& call, const memory::Answer& answer);
PyObject* shape_reply(const StateCallObject& call, const Status& status, const store::StateReply& reply);

// state_many.cc
PyObject* state_many(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames);
engine::StateManyTask* new_many_task(const StateCallObject& call, const StateImpl& impl, Nanos deadline);
PyObject* shape_many(const StateCallObject& call, const engine::StateManyTask& task);
PyObject* run_many_direct(const StateCallObject& call, const StateImpl& impl);
PyObject* run_one_direct(const StateCallObject& call, const StateImpl& impl);  // state_call.cc

// state_rows.cc: not on the hot path.
PyObject* state_claim_due(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames);
PyObject* state_scan(PyObject* self, PyObject* const* args, Py_ssize_t nargs);
PyObject* state_initialize(PyObject* self, PyObject* unused);
PyObject* state_purge(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames);

// state_values.cc: what comes in is checked before anything is sent; false with an exception set.
bool check_name(PyObject* text, const char* field, std::size_t most);
bool check_ttl(PyObject* value, bool keep_allowed, std::int64_t* out);
bool check_lease(PyObject* value, std::int64_t* out);  // absent: stays as it was
bool check_int64(PyObject* value, const char* field, std::int64_t least, const char* expected,
                 std::int64_t* out);
bool check_due(PyObject* at, std::int64_t* out, bool* relative);
// A new reference to what is to be stored.
bool check_value(const StateObject* state, PyObject* value, PyObject** out, store::Value::Type* type);
void fill_value(PyObject* value, store::Value::Type type, store::Value* out);
PyObject* to_python(const store::Value& value, PyObject* decode);
std::string_view utf8(PyObject* checked);

// Arguments of a METH_FASTCALL | METH_KEYWORDS method by the interned names of its parameters. `out` has one
// place per name, null where nothing was given.
struct Signature {
  const char* function;
  std::size_t count;
  std::size_t positional;  // how many may be given by place
  std::size_t required;    // the first ones
  PyObject* names[6];
};
bool bind_arguments(const Signature& signature, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames,
                    PyObject** out);

inline constexpr std::size_t kMaxName = 255;
inline constexpr std::size_t kMaxKey = 1024;
inline constexpr std::size_t kMaxValue = std::size_t{64} << 20;

}  // namespace ratesync::bindings
