// What the parts of a Permit share: one limit (permit.cc), several (permit_parts.cc), and acquire(), which
// makes both (acquire.cc).
#pragma once

#include <string>
#include <vector>

#include "ratesync/bindings/objects.h"

namespace ratesync::bindings {

// One limit of an acquisition of several.
struct PermitPart {
  LimiterObject* limiter;  // owned
  store::GroupRef group;
  std::int64_t cost;
  SlotRef slot = nullptr;
  bool granted = false;        // not: its store was out, and the call was let pass
  std::int64_t remaining = 0;  // right after the grant, as the permit's
  Nanos full_after = -1;
};

struct PermitParts {
  PermitParts() = default;
  PermitParts(const PermitParts&) = delete;
  PermitParts& operator=(const PermitParts&) = delete;
  ~PermitParts() {
    for (const PermitPart& part : list) Py_DECREF(reinterpret_cast<PyObject*>(part.limiter));
  }
  std::vector<PermitPart> list;
};

// permit.cc
bool check_startable(PermitObject* permit);
PyObject* raise_denied(const LimiterImpl& impl, const std::string& group, const std::string& reason,
                       Nanos retry_after);
PyObject* raise_closed(const LimiterImpl& impl);
PyObject* raise_would_block(const LimiterImpl& impl);
// Says that calls pass because the store is out, once per interval. False with an exception set.
bool report_outage(LimiterImpl& impl, const std::string& message);
SlotRef hold_slot(LimiterImpl& impl, const store::GroupRef& group, engine::PermitRef engine_permit,
                  store::HolderId holder, bool bare);
void release_after_lease(LimiterImpl& impl, const SlotRef& slot);
// Both take over the reference to `task`.
PyObject* submit_async(PermitObject* permit, const LimiterImpl& impl, engine::Acquisition* task, Mode mode);
PyObject* submit_sync(PermitObject* permit, const LimiterImpl& impl, engine::Acquisition* task, Mode mode);

// permit_parts.cc
PyObject* begin_all(PermitObject* permit, Mode mode, bool async);
PyObject* finish_all(PermitObject* permit, engine::MultiTask& task, Mode mode);
void let_go_all(PermitObject* permit);
void drop_all(PermitObject* permit);  // collected, perhaps with slots held
bool any_held(const PermitParts& parts);
bool any_lost(const PermitParts& parts);
std::string joined_ids(const PermitParts& parts);
PyObject* settle_all(PermitObject* permit, PyObject* actual_cost);
PyObject* answers_of_parts(PyObject* permit, PyObject* unused);  // Permit._parts()

}  // namespace ratesync::bindings
