// Several operations on state in one call.
#include <set>
#include <utility>
#include <vector>

#include "ratesync/bindings/state.h"

namespace ratesync::bindings {

using Outcome = store::StateReply::Outcome;

namespace {

constexpr Py_ssize_t kMaxOps = 10'000;

const StateCallObject& part_of(PyObject* parts, Py_ssize_t i) {
  return *reinterpret_cast<StateCallObject*>(PyTuple_GET_ITEM(parts, i));
}

// A new reference to the call that `op` is, or stands for.
PyObject* call_of(PyObject* self, PyObject* op) {
  if (PyTuple_Check(op)) return call_of_op(self, op);
  if (Py_TYPE(op) != state().state_call_type) {
    raise_invalid("an operation of many() is made by the functions of ratesync.ops", "ops",
                  "ops.set(...), ops.get(...) ...", op);
    return nullptr;
  }
  auto* call = reinterpret_cast<StateCallObject*>(op);
  if (reinterpret_cast<PyObject*>(call->state) != self || call->parts) {
    raise_invalid("the calls of many() are single ones of the same state", "ops", "calls of this state", op);
    return nullptr;
  }
  return Py_NewRef(op);
}

// They belong to this call from now on.
bool take_over(PyObject* parts) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(parts); ++i) {
    auto* part = reinterpret_cast<StateCallObject*>(PyTuple_GET_ITEM(parts, i));
    if (!part->used) {
      part->used = true;
      continue;
    }
    while (--i >= 0) reinterpret_cast<StateCallObject*>(PyTuple_GET_ITEM(parts, i))->used = false;
    PyErr_SetString(PyExc_RuntimeError, "this call was made already: call the method again for a new one");
    return false;
  }
  return true;
}

bool check_distinct(PyObject* parts, const StateImpl& impl) {
  std::set<std::pair<std::string_view, std::string_view>> seen;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(parts); ++i) {
    const StateCallObject& part = part_of(parts, i);
    if (!seen.insert({part.kind ? utf8(part.kind) : std::string_view(impl.kind), utf8(part.key)}).second)
      return raise_invalid("the operations of an atomic call have different keys: make two calls", "ops",
                           "each key once", part.key);
  }
  return true;
}

// The exception that is set, as an object. Null: it is none that belongs into a list of results.
PyObject* take_exception() {
  if (!PyErr_ExceptionMatches(PyExc_Exception) || PyErr_ExceptionMatches(PyExc_MemoryError)) return nullptr;
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  PyErr_NormalizeException(&type, &value, &trace);
  Py_XDECREF(type);
  Py_XDECREF(trace);
  return value;
}

// What became of one of them.
struct Reply {
  const Status* status;
  const store::StateReply* reply;
};

PyObject* list_of(PyObject* parts, const std::vector<Reply>& replies) {
  PyObject* list = PyList_New(static_cast<Py_ssize_t>(replies.size()));
  for (std::size_t i = 0; list && i < replies.size(); ++i) {
    const auto place = static_cast<Py_ssize_t>(i);
    PyObject* one = replies[i].status->ok() && replies[i].reply->outcome == Outcome::rolled_back
                        ? Py_NewRef(Py_None)
                        : shape_reply(part_of(parts, place), *replies[i].status, *replies[i].reply);
    if (!one) one = take_exception();
    if (one) {
      PyList_SET_ITEM(list, place, one);
    } else {
      Py_CLEAR(list);
    }
  }
  return list;
}

// All failed for the same reason, which is then that of the call.
const Status* failure_of_all(const std::vector<Reply>& replies) {
  for (const Reply& one : replies)
    if (one.status->ok() || one.status->code != replies.front().status->code) return nullptr;
  return replies.empty() ? nullptr : replies.front().status;
}

PyObject* raise_rolled_back(PyObject* outcomes) {
  PyObject* error = !outcomes ? nullptr
                    : state().rolled_back
                        ? PyObject_CallOneArg(state().rolled_back, outcomes)
                        : PyObject_CallFunction(PyExc_RuntimeError, "s", "the whole call was rolled back");
  Py_XDECREF(outcomes);
  if (error) {
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error)), error);
    Py_DECREF(error);
  }
  return nullptr;
}

struct DirectOp final : store::StateOp {
  void done() override {}
};

struct DirectBatch final : store::StateBatch {
  void done() override {}
};

}  // namespace

PyObject* state_many(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
  static const Signature kSignature = {
      "many", 2, 1, 1, {PyUnicode_InternFromString("ops"), PyUnicode_InternFromString("atomic")}};
  PyObject* given[2];
  if (!bind_arguments(kSignature, args, nargs, kwnames, given)) return nullptr;
  const int atomic = given[1] ? PyObject_IsTrue(given[1]) : 0;
  auto* owner = reinterpret_cast<StateObject*>(self);
  const StateImpl* impl = live(owner);
  if (atomic < 0 || !impl) return nullptr;
  PyObject* ops = PySequence_Tuple(given[0]);
  if (!ops) return nullptr;
  const Py_ssize_t count = PyTuple_GET_SIZE(ops);
  bool ok = true;
  if (count > kMaxOps) {
    PyObject* shown = PyLong_FromSsize_t(count);
    ok = raise_invalid("too many operations for one call: make several", "ops", "at most 10000", shown);
    Py_XDECREF(shown);
  }
  PyObject* parts = ok ? PyTuple_New(count) : nullptr;
  for (Py_ssize_t i = 0; parts && i < count; ++i) {
    PyObject* call = call_of(self, PyTuple_GET_ITEM(ops, i));
    if (call) {
      PyTuple_SET_ITEM(parts, i, call);
    } else {
      Py_CLEAR(parts);
    }
  }
  Py_DECREF(ops);
  if (!parts) return nullptr;
  StateCallObject* call = nullptr;
  if ((!atomic || check_distinct(parts, *impl)) && take_over(parts))
    call = new_state_call(owner, store::StateOp::Verb::get, Shape::many);
  if (!call) {
    Py_DECREF(parts);
    return nullptr;
  }
  call->parts = parts;
  call->atomic = atomic > 0;
  return reinterpret_cast<PyObject*>(call);
}

engine::StateManyTask* new_many_task(const StateCallObject& call, const StateImpl& impl, Nanos deadline) {
  auto* task = new engine::StateManyTask(*impl.service, call.atomic);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(call.parts); ++i)
    fill_op(part_of(call.parts, i), impl, deadline, &task->add());
  task->deadline = deadline;
  return task;
}

PyObject* shape_many(const StateCallObject& call, const engine::StateManyTask& task) {
  const std::string& store_id = call.state->impl->store_id;
  if (!task.failure().ok()) return raise_status(task.failure(), store_id);
  std::vector<Reply> replies;
  for (const auto& part : task.parts) replies.push_back({&part.status(), &part.reply});
  if (const Status* all = failure_of_all(replies)) return raise_status(*all, store_id);
  PyObject* list = list_of(call.parts, replies);
  return call.atomic && !task.applied ? raise_rolled_back(list) : list;
}

PyObject* run_many_direct(const StateCallObject& call, const StateImpl& impl) {
  std::vector<DirectOp> ops(static_cast<std::size_t>(PyTuple_GET_SIZE(call.parts)));
  std::vector<Reply> replies;
  DirectBatch batch;
  for (std::size_t i = 0; i < ops.size(); ++i) {
    fill_op(part_of(call.parts, static_cast<Py_ssize_t>(i)), impl, kForever, &ops[i]);
    replies.push_back({&ops[i].reply.status, &ops[i].reply});
    batch.ops.push_back(&ops[i]);
  }
  if (call.atomic) {
    if (!ops.empty()) impl.memory->decide(batch);
    if (!batch.status.ok()) return raise_status(batch.status, impl.store_id);
    PyObject* list = list_of(call.parts, replies);
    return ops.empty() || batch.applied ? list : raise_rolled_back(list);
  }
  for (DirectOp& op : ops) impl.memory->decide(op);
  return list_of(call.parts, replies);
}

}  // namespace ratesync::bindings
