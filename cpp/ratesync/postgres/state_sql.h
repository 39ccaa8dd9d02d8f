// The statements of the state store, as text for the tables of one prefix. README.md in this folder says
// why each looks as it does; the comments in state_sql.cc say what breaks when a line is changed.
//
// Parameters are binary arrays, one element per row, rows sorted by primary key; $1 to $3 are the distinct
// (namespace, tenant, kind) of a statement, $4 int2[] which of them a row means, $5 text[] its key.
// Rows come in binary format. Outcomes are StateReply::Outcome, verbs StateOp::Verb.
#pragma once

#include "ratesync/postgres/connection.h"
#include "ratesync/postgres/state_schema.h"

namespace ratesync::postgres {

// $7 of `modify` and `decide`.
inline constexpr std::int64_t kWantActual = 1, kRevive = 2, kRenew = 4, kDueIn = 8;

struct StateSql {
  // $6 int4[] bucket, $7 int2[] type, $8 bytea[] value, $9 int8[] number, $10 int8[] op, $11 int8[] ttl,
  // $12 bool[] want_actual. Row: op, outcome, version, expires, then type, value, number where wanted.
  // No row: somebody else made it meanwhile, ask again. `create` hopes for new keys, `create_seen` looks
  // first: a refusal then locks and writes nothing. `create_new` is sure of it: no row for what is there, and
  // ask again.
  Statement create, create_seen, create_new;
  // $6 to $11 as above, $12 int8[]: so many writes at once. Row: op, version, expires.
  Statement set;
  // $6 int4[] bucket, $7 int8[] delta, $8 int8[] op, $9 int8[] ttl, $10 int8[] writes; `add_renew`: the ttl
  // starts anew. Row: op, version, expires, number. No row: no integer, or the sum is too large.
  Statement add, add_renew;
  // Row: ord, type, value, number, version (NULL: absent), expires.
  Statement get;
  // swap, remove, touch. $6 int2[] verb, $7 int2[] flags, $8 int2[] type, $9 bytea[] value, $10 int8[]
  // number, $11 int8[] op, $12 int8[] ttl, $13 int8[] expected.
  // Row: ord, outcome (NULL: ask again), version, expires, then type, value, number where wanted.
  Statement modify;
  // Any verb, all or nothing per batch: `lock` ($6 int4[] bucket) and, in the same transaction, `decide`
  // ($6 to $13 as of modify; number is also delta and due, $14 int4[] batch).
  // Row: ord, outcome (NULL: something else removed the row), applied, version, expires, type, value, number.
  Statement lock, decide;
  Statement decide_timeouts;  // where schedule or unschedule are among them
  // $6 int8[] due ms, $7 bool[] from now. Row: how many.
  Statement schedule;
  // $6 int8[] claim or 0. Row: ord, outcome, claim.
  Statement unschedule;
  // After a lost answer. Row: ord, op (0: no row, or none that was written), version, removed, living, age of
  // the last write in us, type, value, number, expires.
  Statement resolve;

  // Text parameters: $1 namespace, $2 tenant, $3 kind, $4 prefix, $5 cursor, $6 behind the prefix (NULL:
  // no end), $7 limit. Row: key, type, value, number, version, expires.
  Statement scan;
  // $1 namespace, $2 tenant, $3 limit, $4 lease ms, $5 kind (NULL: all). Row: kind, key, due ms, claim.
  Statement claim;

  // $1 limit, $2 bool: only while nobody else does, $3 ms: dead for so long. Row: bucket, version, newest
  // expiry in us.
  Statement raise_floors;
  // $1 text[] transactions or NULL. Row: those of them (NULL: all) that may write the table.
  Statement writers;
  // $1 int4[] bucket, $2 int8[] floor (binary), $3 newest expiry, $4 limit. Row: how many.
  Statement purge;

  // $1 pid, $2 start of the backend. Row: it is still there, and was told to end.
  Statement end_backend;
};

StateSql make_state_sql(const PrefixNames& names);

}  // namespace ratesync::postgres
