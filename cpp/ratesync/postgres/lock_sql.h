// The statements of the lock store, as text for the tables of one prefix.
//
// What makes a lock change hands is one statement, `take`; it decides under the row's lock, on the server's
// clock. A row is held while holder_id > 0 and its lease runs. holder_id <= 0 marks a released one, by the
// negative number of the release that did it, so that the same release, sent again after a lost answer,
// knows itself, while any other finds that the lock is gone.
#pragma once

#include <string>

#include "ratesync/postgres/connection.h"

namespace ratesync::postgres {

// Quoted names, ready to be put into SQL.
struct LockTables {
  std::string locks;
  std::string waiters;  // empty: nobody is told that a lock was freed, and nobody stands in line
  std::string tokens;   // sequence
};

// Names come as three arrays, $1 namespaces, $2 tenants, $3 names, sorted by bytes; `ord` counts them from 1.
struct LockSql {
  // $4 int8[] id, $5 int8[] ttl ms, $6 text holder, $7 int8 who waits. Row for each lock that is ours now:
  // id, token. The others are held, or kept for somebody who waits longer.
  Statement take;
  // $4 int8[] token (0: any), $5 int8[] ttl ms (0: the end), $6 int8[] mark (< 0). Row: ord, when it was
  // held.
  Statement keep;
  // $4 int8 who waits. Row: ord, token, holder, ms the lease still runs, ms a free lock is kept for another
  // waiter (NULL: it is not). No row of `queue`: there is no such lock.
  Statement look;
  // The same under the rows' locks, $5 int8 ms: what cannot be had now is remembered for so long.
  Statement queue;
  // The following are empty without waiters.
  // $4 int8[] id, $5 int8 who waits: does so no more where it got the lock.
  Statement served;
  Statement unwait;  // $4 int8 who
  // $4 int8 who, $5 text channel. Tells the first in line of each lock that is free. Row: ord, it is $4.
  Statement notify;
  // Bells, which have no lock. $4 int8 who, $5 int8 ms.
  Statement stand;
  // $4 int8 who, $5 text channel. Tells all but $4, and forgets them all.
  Statement ring;
  // $4 int8 who, $5 int8 ms. Row: ord, of those that are still remembered.
  Statement refresh;
  // $1 int8: at most so many.
  Statement purge_waiters;

  // $1, $2, $3: where to begin; $4 int8: so many rows are looked at; $5 int8 ms dead for so long. Row: looked
  // at, removed, and the last one's name. No process but one at a time looks at any.
  Statement purge;
  // $1 text namespace, $2 text tenant (NULL: all), $3 int8 limit. Row: as LockInfo, times in ms.
  Statement list;
};

LockSql make_lock_sql(const LockTables& tables);

}  // namespace ratesync::postgres
