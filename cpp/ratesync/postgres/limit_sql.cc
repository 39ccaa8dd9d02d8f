#include "ratesync/postgres/limit_sql.h"

#include <fmt/format.h>

namespace ratesync::postgres {
namespace {

// {0} state table, {1} leases table in all texts below; replaced, not formatted twice.
std::string fill(std::string text, const LimitTables& tables) {
  const auto replace = [&text](std::string_view from, const std::string& to) {
    for (std::size_t at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size()))
      text.replace(at, from.size(), to);
  };
  // Fragments may hold fragments, so the outer ones come first; the names, which may hold anything,
  // come last and are never looked into.
  replace("@decide_rate@", R"(CASE WHEN room IS NULL THEN n
            WHEN room < ahead THEN 0
            ELSE least(n, floor((room - ahead + 0.001::float8) / each)::int8) END)");
  replace("@ahead@",
          "CASE WHEN present THEN greatest((date_part('epoch', last - now) * 1000000)::int8 + step, 0) ELSE "
          "0 END");
  // Rows written by hand may hold 'infinity', which cannot be subtracted.
  replace("@last@",
          "greatest(least(s.last_acquisition_at, '9999-01-01 00:00:00+00'::timestamptz), "
          "'1970-01-01 00:00:00+00'::timestamptz)");
  replace("@new_last@",
          "now + (ahead + ceil(k * each - 0.001::float8)::int8 - step) * interval '1 microsecond'");
  replace("@stamp@", "(date_part('epoch', last_acquisition_at) * 1000000)::int8 AS stamp");
  // Of a row that does not exist, version is NULL: 1.
  replace("@new_version@", "CASE WHEN version < 2147483647 THEN version + 1 ELSE 1 END");
  // The seed's index on updated_at forbids HOT updates whenever the column changes.
  replace("@new_updated@", "CASE WHEN updated_at > now - interval '1 minute' THEN updated_at ELSE now END");
  // Compare-and-set: what was decided on another version does not land.
  replace("@cas@", "t.version = excluded.version - 1 OR (excluded.version = 1 AND t.version = 2147483647)");
  std::string out;
  out.reserve(text.size() + 8 * (tables.state.size() + tables.leases.size()));
  for (std::size_t at = 0; at < text.size(); ++at) {
    if (text.compare(at, 3, "{0}") == 0) {
      out += tables.state;
      at += 2;
    } else if (text.compare(at, 3, "{1}") == 0) {
      out += tables.leases;
      at += 2;
    } else {
      out += text[at];
    }
  }
  return out;
}

// The row lock and everything that is read of the row come from one LockRows node, which re-reads
// the row after a wait; the clock is read in the projection above it, hence after the wait. Only
// the row itself is looked at, so the statement's snapshot may be old.
//
// Rows are locked, or inserted, one after the other in the order of $1: INSERT pulls `d` row by row,
// and because UNION ALL reads `w` first, nobody has pulled `d` before. So whoever waits for a key
// holds smaller keys only, and no two processes deadlock. (Locking all that exist and then inserting
// the others did: an INSERT also waits for whoever is updating a row that its snapshot cannot see.)
// A row that appeared after the snapshot fails the compare-and-set: no row comes from `w` for it.
//
// OFFSET 0 keeps the planner from merging the levels, which would compute @ahead@ once per mention.
constexpr const char* kRate = R"(
WITH d AS MATERIALIZED (
  SELECT *, (date_part('epoch', new_last) * 1000000)::int8 AS stamp
  FROM (
    SELECT g, ord, version, updated_at, present, now, ahead, k, @new_last@ AS new_last
    FROM (
      SELECT *, @decide_rate@ AS k
      FROM (
        SELECT *, @ahead@ AS ahead
        FROM (
          SELECT i.*, s.version, s.updated_at, s.version IS NOT NULL AS present, @last@ AS last,
                 clock_timestamp() AS now
          FROM unnest($1::text[], $2::int8[], $3::float8[], $4::int8[], $5::int8[]) WITH ORDINALITY
                 AS i(g, n, each, room, step, ord)
          LEFT JOIN LATERAL (
            SELECT version, last_acquisition_at, updated_at FROM {0} WHERE group_id = i.g FOR UPDATE) AS s ON true
          OFFSET 0) AS l
        OFFSET 0) AS q
      OFFSET 0) AS r
    OFFSET 0) AS p
), w AS (
  INSERT INTO {0} AS t (group_id, last_acquisition_at, version, updated_at)
  SELECT g, new_last, @new_version@, @new_updated@ FROM d WHERE k > 0
  ON CONFLICT (group_id) DO UPDATE
  SET last_acquisition_at = excluded.last_acquisition_at, version = excluded.version,
      updated_at = excluded.updated_at
  WHERE @cas@
  RETURNING group_id, version
)
SELECT NULL::int8 AS ord, NULL::int8 AS k, NULL::int8 AS ahead, NULL::int8 AS stamp, NULL::bool AS present,
       group_id::text AS inserted, NULL::text AS sync
FROM w WHERE version = 1
UNION ALL
SELECT ord, k, ahead, stamp, present, NULL,
       (SELECT CASE WHEN $6::bool THEN set_config('synchronous_commit', 'off', true) END)
FROM d)";

// Locks rows in the order of $1, those that do not exist by making them (idle, version 0): DO UPDATE
// locks the row in its way even where its condition is false. After this nothing waits any more.
constexpr const char* kLock = R"(
INSERT INTO {0} AS t (group_id, last_acquisition_at, version)
SELECT g, '1970-01-01 00:00:00+00'::timestamptz, 0 FROM unnest($1::text[]) AS i(g)
ON CONFLICT (group_id) DO UPDATE SET version = t.version WHERE false)";

// Counts other rows (leases), so its snapshot has to be younger than the lock: a statement of its
// own after kLock. Whoever changes a lease writes the state row too.
constexpr const char* kSlots = R"(
WITH c AS MATERIALIZED (SELECT clock_timestamp() AS now),
l AS MATERIALIZED (
  SELECT i.*, s.version, s.updated_at, s.group_id IS NOT NULL AS present, @last@ AS last, c.now,
         o.others, o.mine, i.held > 0 AND o.mine IS NULL AS lost
  FROM c, unnest($1::text[], $2::int8[], $3::float8[], $4::int8[], $5::int8[], $6::int8[], $7::int8[],
                 $8::int8[], $9::int8[], $10::int8[]) WITH ORDINALITY
         AS i(g, n, each, room, step, slots, held, holder, fresh, lease, ord)
  LEFT JOIN LATERAL (SELECT * FROM {0} WHERE group_id = i.g) AS s ON true
  LEFT JOIN LATERAL (
    SELECT coalesce(sum(slots) FILTER (WHERE holder_id <> i.holder AND expires_at > c.now), 0)::int8 AS others,
           max(slots) FILTER (WHERE holder_id = i.holder) AS mine
    FROM {1} WHERE group_id = i.g OFFSET 0) AS o ON true
), d AS MATERIALIZED (
  SELECT *, CASE WHEN lost THEN fresh ELSE holder END AS me,
         mine IS DISTINCT FROM nullif(kept + k, 0) AS changed
  FROM (
    SELECT *, least(may, greatest(slots - others - kept, 0)) AS k
    FROM (
      SELECT *, @decide_rate@ AS may, CASE WHEN lost THEN 0 ELSE held END AS kept
      FROM (SELECT *, CASE WHEN each IS NULL THEN 0 ELSE @ahead@ END AS ahead FROM l OFFSET 0) AS q) AS r
    OFFSET 0) AS p
), v AS MATERIALIZED (
  SELECT g, @new_version@ AS version, @new_updated@ AS updated_at,
         least(others + kept + k, 2147483647)::int4 AS in_use,
         CASE WHEN k = 0 THEN coalesce(last, '1970-01-01 00:00:00+00'::timestamptz)
              WHEN each IS NULL THEN now
              ELSE @new_last@ END AS last
  FROM d WHERE k > 0 OR changed
), w AS (
  INSERT INTO {0} AS t (group_id, last_acquisition_at, version, current_concurrent, updated_at)
  SELECT g, last, version, in_use, updated_at FROM v
  ON CONFLICT (group_id) DO UPDATE
  SET last_acquisition_at = excluded.last_acquisition_at, version = excluded.version,
      current_concurrent = excluded.current_concurrent, updated_at = excluded.updated_at
  WHERE @cas@
  RETURNING group_id, @stamp@
), a AS MATERIALIZED (
  SELECT d.*, w.stamp, w.group_id IS NOT NULL AS wrote FROM d LEFT JOIN w ON w.group_id = d.g
), gone AS (
  DELETE FROM {1} AS x USING a
  WHERE a.wrote AND x.group_id = a.g
    AND CASE WHEN x.holder_id = a.me THEN a.kept + a.k = 0 ELSE a.k > 0 AND x.expires_at <= a.now END
), kept AS (
  INSERT INTO {1} AS x (group_id, holder_id, holder, slots, acquired_at, expires_at)
  SELECT g, me, $11::text, kept + k, now, now + lease * interval '1 microsecond'
  FROM a WHERE wrote AND kept + k > 0
  ON CONFLICT (group_id, holder_id) DO UPDATE SET slots = excluded.slots, expires_at = excluded.expires_at
)
SELECT ord, k, ahead, stamp, may, slots - others - kept - k AS free, lost, wrote
FROM a WHERE wrote OR NOT (k > 0 OR changed))";

// The seed's table alone: slots are a number in the state row, without owner and without expiry.
constexpr const char* kBareSlots = R"(
WITH c AS MATERIALIZED (SELECT clock_timestamp() AS now),
l AS MATERIALIZED (
  SELECT i.*, s.version, s.updated_at, s.group_id IS NOT NULL AS present, @last@ AS last, c.now,
         greatest(coalesce(s.current_concurrent, 0) - i.freed, 0)::int8 AS used
  FROM c, unnest($1::text[], $2::int8[], $3::float8[], $4::int8[], $5::int8[], $6::int8[], $7::int8[]) WITH ORDINALITY
         AS i(g, n, each, room, step, slots, freed, ord)
  LEFT JOIN LATERAL (SELECT * FROM {0} WHERE group_id = i.g) AS s ON true
), d AS MATERIALIZED (
  SELECT *, present AND freed > 0 AS changed
  FROM (
    SELECT *, least(may, greatest(slots - used, 0)) AS k
    FROM (
      SELECT *, @decide_rate@ AS may
      FROM (SELECT *, CASE WHEN each IS NULL THEN 0 ELSE @ahead@ END AS ahead FROM l OFFSET 0) AS q) AS r
    OFFSET 0) AS p
), v AS MATERIALIZED (
  SELECT g, @new_version@ AS version, @new_updated@ AS updated_at,
         least(used + k, 2147483647)::int4 AS in_use,
         CASE WHEN k = 0 THEN last WHEN each IS NULL THEN now ELSE @new_last@ END AS last
  FROM d WHERE k > 0 OR changed
), w AS (
  INSERT INTO {0} AS t (group_id, last_acquisition_at, version, current_concurrent, updated_at)
  SELECT g, last, version, in_use, updated_at FROM v
  ON CONFLICT (group_id) DO UPDATE
  SET last_acquisition_at = excluded.last_acquisition_at, version = excluded.version,
      current_concurrent = excluded.current_concurrent, updated_at = excluded.updated_at
  WHERE @cas@
  RETURNING group_id, @stamp@
)
SELECT d.ord, d.k, d.ahead, w.stamp, d.may, d.slots - d.used - d.k AS free, false AS lost,
       w.group_id IS NOT NULL AS wrote
FROM d LEFT JOIN w ON w.group_id = d.g
WHERE w.group_id IS NOT NULL OR NOT (d.k > 0 OR d.changed))";

// All expressions are over the row as it is after a lock wait, and the clock is read then.
constexpr const char* kAdjust = R"(
UPDATE {0} AS t
SET last_acquisition_at = CASE i.mode
      WHEN 0 THEN t.last_acquisition_at - i.shift * interval '1 microsecond'
      WHEN 1 THEN greatest(t.last_acquisition_at, clock_timestamp() - i.step * interval '1 microsecond')
                  + i.shift * interval '1 microsecond'
      ELSE clock_timestamp() - interval '1 day' - i.step * interval '1 microsecond' END,
    version = CASE WHEN t.version < 2147483647 THEN t.version + 1 ELSE 1 END,
    current_concurrent = CASE i.mode WHEN 2 THEN 0 ELSE t.current_concurrent END,
    updated_at = CASE WHEN t.updated_at > clock_timestamp() - interval '1 minute' THEN t.updated_at
                      ELSE clock_timestamp() END
FROM unnest($1::text[], $2::int8[], $3::int8[], $4::int4[], $5::int8[]) AS i(g, shift, stamp, mode, step)
WHERE t.group_id = i.g
  AND (i.stamp IS NULL
       OR t.last_acquisition_at = '1970-01-01 00:00:00+00'::timestamptz + i.stamp * interval '1 microsecond'))";

constexpr const char* kDropLeases = "DELETE FROM {1} WHERE group_id = ANY ($1::text[])";

// After kLock. A lease that has expired but still exists may be renewed: under the lock its
// existence proves that nobody took the slots.
constexpr const char* kRenew = R"(
UPDATE {1} AS x SET expires_at = clock_timestamp() + i.lease * interval '1 microsecond'
FROM unnest($1::text[], $2::int8[], $3::int8[]) AS i(g, holder, lease)
WHERE x.group_id = i.g AND x.holder_id = i.holder
RETURNING x.group_id)";

constexpr const char* kPeek = R"(
SELECT ord, @ahead@ AS ahead, in_use
FROM (
  SELECT i.*, s.group_id IS NOT NULL AS present, @last@ AS last, clock_timestamp() AS now, @in_use@ AS in_use
  FROM unnest($1::text[], $2::int8[]) WITH ORDINALITY AS i(g, step, ord)
  LEFT JOIN LATERAL (SELECT * FROM {0} WHERE group_id = i.g) AS s ON true
  OFFSET 0) AS q)";

constexpr const char* kListGroups = R"(
SELECT s.group_id, (date_part('epoch', @last@ - clock_timestamp()) * 1000000)::int8, s.version, @in_use@
FROM {0} AS s ORDER BY s.group_id LIMIT $1::int8)";

constexpr const char* kListHolders = R"(
SELECT group_id, holder, slots, (date_part('epoch', clock_timestamp() - acquired_at) * 1000000)::int8,
       (date_part('epoch', expires_at - clock_timestamp()) * 1000000)::int8
FROM {1} ORDER BY group_id, holder_id LIMIT $1::int8)";

std::string with_in_use(std::string text, bool leases, std::string_view group) {
  const std::string count = leases ? fmt::format(
                                         "coalesce((SELECT sum(slots) FROM {{1}} WHERE group_id = {} "
                                         "AND expires_at > clock_timestamp()), 0)",
                                         group)
                                   : "coalesce(s.current_concurrent, 0)";
  const std::string_view mark = "@in_use@";
  return text.replace(text.find(mark), mark.size(), count);
}

// The name holds a hash of the text: behind a pooler that keeps prepared statements, stores with
// different tables share sessions.
Statement named(std::string_view verb, std::string sql) {
  std::uint64_t hash = 0xcbf29ce484222325ull;  // FNV-1a
  for (const char ch : sql) hash = (hash ^ static_cast<unsigned char>(ch)) * 0x100000001b3ull;
  return {fmt::format("ratesync_{}_{:016x}", verb, hash), std::move(sql)};
}

}  // namespace

LimitSql make_limit_sql(const LimitTables& tables) {
  const bool leases = !tables.leases.empty();
  LimitSql sql;
  sql.rate = named("rate", fill(kRate, tables));
  sql.lock = named("lock", fill(kLock, tables));
  sql.slots = named("slots", fill(leases ? kSlots : kBareSlots, tables));
  sql.adjust = named("adjust", fill(kAdjust, tables));
  sql.peek = named("peek", fill(with_in_use(kPeek, leases, "i.g"), tables));
  sql.list_groups = {"", fill(with_in_use(kListGroups, leases, "s.group_id"), tables)};
  if (leases) {
    sql.drop_leases = named("drop_leases", fill(kDropLeases, tables));
    sql.renew = named("renew", fill(kRenew, tables));
    sql.list_holders = {"", fill(kListHolders, tables)};
  }
  return sql;
}

}  // namespace ratesync::postgres
