// Waiters of this process in lines that other processes stand in too.
#include "ratesync/postgres/limit_params.h"
#include "ratesync/postgres/limit_trip.h"

namespace ratesync::postgres {

using store::GroupRef;

bool PgLimitStore::waiters() const { return backend_.ready() && !backend_.limit_sql().unwait.sql.empty(); }

// What the server was just told, with the answer that it gave.
void PgLimitStore::remember(const GroupRef& group, bool waits) {
  if (waits)
    waiting_[group->id] = group;
  else
    waiting_.erase(group->id);
  listener_.want(!waiting_.empty());
}

void PgLimitStore::stop_waiting(const GroupRef& group) {
  if (waiting_.erase(group->id) == 0) return;
  listener_.want(!waiting_.empty());
  if (!closing_) push(QueuedOp{QueuedOp::Kind::unwait, false, group, nullptr, nullptr});
}

// Whatever was told while nobody listened was missed.
void PgLimitStore::ask_everybody() {
  std::vector<std::string> groups;
  for (const auto& [id, group] : waiting_) groups.push_back(id);
  for (const std::string& id : groups)
    if (freed_) freed_(id);
}

void PgLimitStore::probe(const std::string& channel, const std::string& payload) {
  notify(pool_, alive_, channel, payload);
}

void PgLimitStore::add_unwaits(const OpList& unwaits, std::vector<Call>& calls) {
  if (unwaits.empty() || !waiters()) return;
  std::vector<std::string_view> groups;
  ArrayWriter slots;
  for (const QueuedOp* op : unwaits) {
    groups.push_back(op->group->id);
    slots.add(op->group->params.max_concurrent);
  }
  calls.push_back({&backend_.limit_sql().unwait,
                   {Param::text(array_of_text(groups)), slots.take(), Param::text(std::to_string(me_)),
                    Param::text(options_.channel)}});
}

}  // namespace ratesync::postgres
