// The statements of the limit store, as text for one pair of tables.
//
// Every decision is taken by the server, on its own clock, in microseconds, with the sums of
// limits/gcra.h. README.md in this folder says why each statement looks as it does; the comments
// in limit_sql.cc say what breaks when a line is changed.
#pragma once

#include <string>

#include "ratesync/postgres/connection.h"

namespace ratesync::postgres {

// Quoted names, ready to be put into SQL.
struct LimitTables {
  std::string state;  // "schema"."table"
  std::string leases =
      {};  // "schema"."table_leases"; empty: there is none, slots are counted in the state row
  std::string windows = {};  // both empty: no windows
  std::string log = {};
  std::string waiters = {};  // empty: nobody is told that a slot came free

  bool operator==(const LimitTables&) const = default;
};

struct LimitSql {
  // $1 text[] group, $2 int8[] n, $3 float8[] us per request, $4 int8[] room us (NULL: no bound),
  // $5 int8[] us per unit, $6 bool: commit without waiting for the disk.
  // Rows: for each group ord, k, ahead, stamp, present; before them, for each row that was made,
  // only `inserted` (column 5), its group. Not present, k > 0 and not made: somebody else made the
  // row meanwhile and nothing was granted, ask again.
  Statement rate;
  // $1 text[] groups, sorted by bytes: locks their rows, and makes those that are missing.
  Statement lock;
  // After `lock`: decide_sql.cc, parameters as decide_params() makes them. Row: ord, k, ahead, stamp,
  // may (but for slots), free (slots left), lost, wrote; for windows also waits int8[] us of those
  // granted, retry us of the next, units left, us until all is left.
  Statement slots;     // token buckets and slots
  Statement windows;   // windows too. Empty without their tables
  Statement together;  // all of them, in bundles
  // $1 text[] group, $2 int8[] us, $3 int8[] stamp or NULL, $4 int4[] AdjustMode, $5 int8[] us per unit
  Statement adjust;
  // $1 text[]: the leases of groups that are being reset. Empty without leases.
  Statement drop_leases;
  // $1 text[] group, $2 int8[] holder, $3 int8[] lease us. Row: group. No row: the lease is gone.
  Statement renew;
  // $1 text[] group, $2 int8[] us per unit (0 without rate). Row: ord, ahead, in use.
  Statement peek;
  // window_sql.cc; empty without their tables. The purges take $1 int8: at most so many rows.
  Statement adjust_windows, close_gaps, peek_windows, purge_log, purge_windows;
  // waiter_sql.cc; empty without leases or waiters.
  Statement unwait, purge_waiters;
  // $1 int8 limit. Row: group, ahead of now us, version, in use.
  Statement list_groups;
  // $1 int8 limit. Row: group, holder, slots, held for us, expires in us. Empty without leases.
  Statement list_holders;
};

enum class AdjustMode : int { give_back = 0, charge = 1, reset = 2 };

LimitSql make_limit_sql(const LimitTables& tables);

}  // namespace ratesync::postgres
