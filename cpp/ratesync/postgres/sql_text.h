// Building statements: fragments in @…@, tables in {n}, and names for the prepared ones.
#pragma once

#include <string>
#include <string_view>

#include "ratesync/postgres/limit_sql.h"

namespace ratesync::postgres {

// {0} state, {1} leases, {2} windows, {3} window log, {4} waiters; replaced, not formatted twice.
std::string fill(std::string text, const LimitTables& tables);

// The name holds a hash of the text: behind a pooler that keeps prepared statements, stores with
// different tables share sessions.
Statement named(std::string_view verb, std::string sql);

// decide_sql.cc: lock first, then this.
struct DecideShape {
  bool windows = false;   // runs of window algorithms may be among them
  bool together = false;  // rows of one bundle are granted together or not at all
};
std::string decide_sql(const LimitTables& tables, DecideShape shape);

// window_sql.cc
// Two levels of a WITH. `l` has: g, n, cost, lim, win, patience, algo (0: no window), us and, as
// stored, total, at, cur, prev. `r` adds the window of this moment: start, cur0, prev0, per.
// `x` adds slots_at: the slots of requests 1..n; of a sliding_counter up to the first beyond the patience.
extern const char* const kWindowLevels;
// Of the state that start1, at1, cur1, prev1 describe, at `us`: units left; us until nothing counts.
extern const char* const kWindowRemaining;
extern const char* const kWindowFullAfter;
std::string peek_windows_sql(const LimitTables& tables);
std::string adjust_windows_sql(const LimitTables& tables);
std::string close_gaps_sql(const LimitTables& tables);
std::string purge_log_sql(const LimitTables& tables);
std::string purge_windows_sql(const LimitTables& tables);

// waiter_sql.cc
std::string unwait_sql(const LimitTables& tables);
std::string purge_waiters_sql(const LimitTables& tables);

}  // namespace ratesync::postgres
