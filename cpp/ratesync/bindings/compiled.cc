// compiled(cls): a class decorator that lets a Python class write down the methods of its compiled base, with
// types and documentation, and run the compiled functions all the same.
//
// Each function in the class body that its base has as a compiled method is replaced by a descriptor of that
// very C function, which carries the docstring of the Python one: help(), doctests and editors see one text,
// and no Python frame is in the way.
#include <cstring>
#include <string>

#include "ratesync/bindings/calls.h"

namespace ratesync::bindings {

namespace {

// Method definitions live as long as their descriptors, which live as long as the process: a class that was
// decorated is imported once.
PyMethodDef* described(const PyMethodDef& method, PyObject* function) {
  PyObject* doc = PyObject_GetAttrString(function, "__doc__");
  if (!doc) return nullptr;
  std::string text = method.ml_doc ? method.ml_doc : "";
  // "name(signature)\n--\n\n": what inspect.signature() reads; the rest is replaced.
  const std::size_t signature = text.find(")\n--\n\n");
  text.resize(signature == std::string::npos ? 0 : signature + std::strlen(")\n--\n\n"));
  const char* own = doc == Py_None ? "" : PyUnicode_AsUTF8(doc);
  if (own) text += own;
  Py_DECREF(doc);
  if (!own) return nullptr;
  auto* copy = new PyMethodDef(method);
  copy->ml_doc = (new std::string(std::move(text)))->c_str();
  return copy;
}

bool replace(PyTypeObject* type, PyObject* name, PyObject* function) {
  PyObject* inherited = PyObject_GetAttr(reinterpret_cast<PyObject*>(type->tp_base), name);
  if (!inherited) {
    PyErr_Clear();
    return true;
  }
  bool ok = true;
  if (Py_IS_TYPE(inherited, &PyMethodDescr_Type)) {
    PyMethodDef* method = described(*reinterpret_cast<PyMethodDescrObject*>(inherited)->d_method, function);
    PyObject* descriptor = method ? PyDescr_NewMethod(type, method) : nullptr;
    ok = descriptor && PyObject_SetAttr(reinterpret_cast<PyObject*>(type), name, descriptor) == 0;
    Py_XDECREF(descriptor);
  }
  Py_DECREF(inherited);
  return ok;
}

}  // namespace

PyObject* compiled_class(PyObject*, PyObject* cls) {
  if (!PyType_Check(cls)) {
    PyErr_SetString(PyExc_TypeError, "compiled() decorates a class");
    return nullptr;
  }
  auto* type = reinterpret_cast<PyTypeObject*>(cls);
  PyObject* names = PyDict_Items(type->tp_dict);  // a copy: the dict changes under way
  if (!names) return nullptr;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(names); ++i) {
    PyObject* item = PyList_GET_ITEM(names, i);
    PyObject* name = PyTuple_GET_ITEM(item, 0);
    PyObject* member = PyTuple_GET_ITEM(item, 1);
    if (PyFunction_Check(member) && !replace(type, name, member)) {
      Py_DECREF(names);
      return nullptr;
    }
  }
  Py_DECREF(names);
  return Py_NewRef(cls);
}

}  // namespace ratesync::bindings
