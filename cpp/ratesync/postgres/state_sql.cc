#include "ratesync/postgres/state_sql.h"

#include <string_view>
#include <utility>

#include "ratesync/postgres/inventory.h"
#include "ratesync/postgres/sql_text.h"

namespace ratesync::postgres {
namespace {

// Replaces from the first pair to the last: fragments may hold later fragments. The names, which may hold
// anything, come last and are never looked into.
std::string filled(std::string text, const PrefixNames& n) {
  static const std::pair<std::string_view, std::string_view> fragments[] = {
      // What a new row gets. The clock is read once per row, and the query below keeps the order of the rows:
      // all statements lock in the order of the primary key.
      {"@names@", "($1::text[])[i.s], ($2::text[])[i.s], ($3::text[])[i.s], i.k"},
      {"@floor@", "coalesce((SELECT f.version FROM {floors} AS f WHERE f.bucket = i.b), 0)"},
      {"@expiry@", "CASE WHEN i.ttl >= 0 THEN i.now + i.ttl * interval '1 millisecond' END"},
      // The ttl counts from after the wait for the row. The difference of two timestamps as an interval would
      // have days in it, which are not always 24 hours.
      {"@new_expiry@", "clock_timestamp() + @ttl@"},
      {"@ttl@",
       "(date_part('epoch', excluded.expires_at) - date_part('epoch', excluded.updated_at)) * interval '1 "
       "second'"},
      // A row that is made starts above the floor, by as many versions as there were writes.
      {"@writes@",
       "(excluded.version - coalesce((SELECT f.version FROM {floors} AS f WHERE f.bucket = "
       "excluded.bucket), 0))"},
      {"@same@",
       "t.namespace = ($1::text[])[i.s] AND t.tenant = ($2::text[])[i.s] AND t.kind = ($3::text[])[i.s] AND "
       "t.key = i.k"},
      {"@living@", "(NOT t.removed AND (t.expires_at IS NULL OR t.expires_at > clock_timestamp()))"},
      {"@dead@", "(t.removed OR t.expires_at <= clock_timestamp())"},
      {"@insert@",
       "INSERT INTO {state} AS t (namespace, tenant, kind, key, bucket, type, value, number, version, op_id, "
       "updated_at, expires_at)"},
      {"@conflict@", "ON CONFLICT (namespace, tenant, kind, key) DO UPDATE SET"},
      {"@written@",
       "type = excluded.type, value = excluded.value, number = excluded.number, removed = false, op_id = "
       "excluded.op_id, updated_at = clock_timestamp()"},
      {"@actual@",
       "CASE WHEN i.w THEN t.type END AS type, CASE WHEN i.w THEN t.value END AS value, CASE WHEN i.w THEN "
       "t.number END AS number"},
      // What `modify` and `decide` do to a row, given the decision i about it.
      {"@change@", R"(
  type = CASE WHEN i.verb IN (1, 2, 3) THEN i.ty WHEN i.verb = 5 THEN 3 ELSE t.type END,
  value = CASE WHEN i.verb IN (1, 2, 3) THEN i.v WHEN i.verb = 6 THEN t.value END,
  number = CASE WHEN i.verb IN (1, 2, 3) THEN i.n WHEN i.verb = 6 THEN t.number
                WHEN i.verb = 5 THEN CASE WHEN i.living THEN t.number + i.n ELSE i.n END END,
  version = t.version + CASE WHEN i.verb IN (4, 6) THEN 0 ELSE 1 END,
  removed = i.verb = 4,
  op_id = CASE WHEN i.verb = 6 THEN t.op_id ELSE i.op END,
  updated_at = CASE WHEN i.verb = 6 THEN t.updated_at ELSE i.now END,
  expires_at = CASE WHEN i.verb = 4 THEN i.now
                    WHEN i.verb = 5 AND i.living AND i.fl & 4 = 0 THEN t.expires_at
                    WHEN i.ttl = -2 AND (i.living OR i.verb = 3) THEN t.expires_at
                    WHEN i.ttl >= 0 THEN i.now + i.ttl * interval '1 millisecond' END)"},
      {"@judged@",
       "(SELECT *, NOT removed AND (expires_at IS NULL OR expires_at > now) AS living, x = -1 OR version = x "
       "AS meant FROM l) AS l"},
      {"@matched@",
       "CASE WHEN NOT coalesce(living OR (fl & 2 <> 0 AND verb = 3 AND NOT removed AND meant), false) THEN 1 "
       "WHEN NOT meant THEN 3 ELSE 0 END"},
      {"@ms(", "coalesce((date_part('epoch', "},
      {")@", ") * 1000)::int8, 0)"},
      {"@epoch@", "'1970-01-01 00:00:00+00'::timestamptz"},
  };
  const auto replace = [&text](std::string_view from, std::string_view to) {
    for (std::size_t at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size()))
      text.replace(at, from.size(), to);
  };
  for (const auto& [from, to] : fragments) replace(from, to);
  const std::pair<std::string_view, std::string> tables[] = {
      {"{state}", n.quoted(n.state)},
      {"{floors}", n.quoted(n.floors)},
      {"{timeouts}", n.quoted(n.timeouts)},
      {"{tokens}", literal(n.quoted(n.lock_tokens))},
      {"{state_name}", literal(n.quoted(n.state))},
  };
  std::string out;
  for (std::size_t at = 0; at < text.size();) {
    std::size_t taken = 0;
    if (text[at] == '{')
      for (const auto& [from, to] : tables)
        if (text.compare(at, from.size(), from) == 0) {
          out += to;
          taken = from.size();
        }
    if (taken == 0) out += text[at];
    at += taken == 0 ? 1 : taken;
  }
  return out;
}

constexpr const char* kCreate = R"(
WITH i AS MATERIALIZED (
  SELECT * FROM unnest($4::int2[], $5::text[], $6::int4[], $7::int2[], $8::bytea[], $9::int8[], $10::int8[],
                       $11::int8[], $12::bool[]) AS i(s, k, b, ty, v, n, op, ttl, w)
), made AS (
  @insert@
  SELECT @names@, i.b, i.ty, i.v, i.n, @floor@ + 1, i.op, i.now, @expiry@
  FROM (SELECT *, clock_timestamp() AS now FROM i OFFSET 0) AS i
  @conflict@ @written@, version = t.version + 1, expires_at = @new_expiry@ WHERE @dead@
  RETURNING op_id, version, expires_at
)
SELECT op_id, 0::int2, version, @ms(expires_at)@, NULL::int2, NULL::bytea, NULL::int8 FROM made
UNION ALL
SELECT i.op, 2::int2, t.version, @ms(t.expires_at)@, t.type, t.value, t.number
FROM i CROSS JOIN LATERAL (
  SELECT t.version, t.expires_at, @actual@ FROM {state} AS t WHERE @same@ AND @living@ OFFSET 0) AS t
WHERE i.op NOT IN (SELECT op_id FROM made))";

constexpr const char* kCreateSeen = R"(
WITH i AS MATERIALIZED (
  SELECT i.*, t.version AS v0, t.expires_at AS e0, t.type, t.value, t.number
  FROM unnest($4::int2[], $5::text[], $6::int4[], $7::int2[], $8::bytea[], $9::int8[], $10::int8[],
              $11::int8[], $12::bool[]) AS i(s, k, b, ty, v, n, op, ttl, w)
  LEFT JOIN LATERAL (
    SELECT t.version, t.expires_at, @actual@ FROM {state} AS t WHERE @same@ AND @living@ OFFSET 0) AS t ON true
), made AS (
  @insert@
  SELECT @names@, i.b, i.ty, i.v, i.n, @floor@ + 1, i.op, i.now, @expiry@
  FROM (SELECT *, clock_timestamp() AS now FROM i WHERE v0 IS NULL OFFSET 0) AS i
  @conflict@ @written@, version = t.version + 1, expires_at = @new_expiry@ WHERE @dead@
  RETURNING op_id, version, expires_at
)
SELECT op_id, 0::int2, version, @ms(expires_at)@, NULL::int2, NULL::bytea, NULL::int8 FROM made
UNION ALL
SELECT i.op, 2::int2, i.v0, @ms(i.e0)@, i.type, i.value, i.number FROM i WHERE i.v0 IS NOT NULL)";

// For who creates much and is never refused: half of what `create` does is the look at living rows.
constexpr const char* kCreateNew = R"(
@insert@
SELECT @names@, i.b, i.ty, i.v, i.n, @floor@ + 1, i.op, i.now, @expiry@
FROM (SELECT *, clock_timestamp() AS now
      FROM unnest($4::int2[], $5::text[], $6::int4[], $7::int2[], $8::bytea[], $9::int8[], $10::int8[],
                  $11::int8[], $12::bool[]) AS i(s, k, b, ty, v, n, op, ttl, w) OFFSET 0) AS i
@conflict@ @written@, version = t.version + 1, expires_at = @new_expiry@ WHERE @dead@
RETURNING op_id, 0::int2, version, @ms(expires_at)@)";

constexpr const char* kSet = R"(
@insert@
SELECT @names@, i.b, i.ty, i.v, i.n, @floor@ + i.c, i.op, i.now, @expiry@
FROM (SELECT *, clock_timestamp() AS now
      FROM unnest($4::int2[], $5::text[], $6::int4[], $7::int2[], $8::bytea[], $9::int8[], $10::int8[],
                  $11::int8[], $12::int8[]) AS i(s, k, b, ty, v, n, op, ttl, c) OFFSET 0) AS i
@conflict@ @written@, version = t.version + @writes@, expires_at = @new_expiry@
RETURNING op_id, version, @ms(expires_at)@)";

// The clock is read once for all columns: whether the row is dead must not change between two of them. It
// may have been living for the last line and be dead then, never the other way round.
constexpr const char* kAdd = R"(
@insert@
SELECT @names@, i.b, 3, NULL, i.n, @floor@ + i.c, i.op, i.now, @expiry@
FROM (SELECT *, clock_timestamp() AS now
      FROM unnest($4::int2[], $5::text[], $6::int4[], $7::int8[], $8::int8[], $9::int8[], $10::int8[])
        AS i(s, k, b, n, op, ttl, c) OFFSET 0) AS i
@conflict@ (type, value, number, version, removed, op_id, updated_at, expires_at) = (
  SELECT 3, NULL::bytea, CASE WHEN dead THEN excluded.number ELSE t.number + excluded.number END,
         t.version + @writes@, false, excluded.op_id, now,
         CASE WHEN dead OR @renew@ THEN now + @ttl@ ELSE t.expires_at END
  FROM (SELECT now, t.removed OR coalesce(t.expires_at <= now, false) AS dead
        FROM (SELECT clock_timestamp() AS now OFFSET 0) AS c OFFSET 0) AS c)
WHERE @dead@ OR (t.type = 3 AND CASE WHEN excluded.number >= 0
                                     THEN t.number <= 9223372036854775807 - excluded.number
                                     ELSE t.number >= -9223372036854775807 - 1 - excluded.number END)
RETURNING op_id, version, @ms(expires_at)@, number)";

constexpr const char* kGet = R"(
SELECT i.o, t.type, t.value, t.number, t.version, @ms(t.expires_at)@
FROM unnest($4::int2[], $5::text[]) WITH ORDINALITY AS i(s, k, o)
LEFT JOIN LATERAL (SELECT * FROM {state} AS t WHERE @same@ AND @living@ OFFSET 0) AS t ON true)";

// The lateral query locks row by row, in the order of i; the clock is read behind each lock.
constexpr const char* kModify = R"(
WITH i AS MATERIALIZED (
  SELECT * FROM unnest($4::int2[], $5::text[], $6::int2[], $7::int2[], $8::int2[], $9::bytea[], $10::int8[],
                       $11::int8[], $12::int8[], $13::int8[])
    WITH ORDINALITY AS i(s, k, verb, fl, ty, v, n, op, ttl, x, o)
), l AS MATERIALIZED (
  SELECT i.*, t.*, clock_timestamp() AS now
  FROM i CROSS JOIN LATERAL (
    SELECT t.type, t.value, t.number, t.version, t.removed, t.expires_at FROM {state} AS t WHERE @same@
    FOR UPDATE) AS t
), d AS MATERIALIZED (
  SELECT *, @matched@ AS outcome FROM @judged@
), u AS (
  UPDATE {state} AS t SET @change@
  FROM d AS i WHERE i.outcome = 0 AND @same@
  RETURNING i.o, t.version, t.expires_at
)
SELECT i.o, CASE WHEN d.o IS NULL THEN 1 WHEN d.outcome <> 0 OR u.o IS NOT NULL THEN d.outcome END::int2,
       CASE WHEN u.o IS NOT NULL THEN u.version WHEN d.outcome = 3 THEN d.version ELSE 0 END,
       CASE WHEN u.o IS NOT NULL THEN @ms(u.expires_at)@ WHEN d.outcome = 3 THEN @ms(d.expires_at)@ ELSE 0 END,
       CASE WHEN d.outcome = 3 AND i.fl & 1 <> 0 THEN d.type END,
       CASE WHEN d.outcome = 3 AND i.fl & 1 <> 0 THEN d.value END,
       CASE WHEN d.outcome = 3 AND i.fl & 1 <> 0 THEN d.number END
FROM i LEFT JOIN d ON d.o = i.o LEFT JOIN u ON u.o = i.o)";

// Locks the rows that are there, and makes dead ones where none is, in one order.
constexpr const char* kLock = R"(
INSERT INTO {state} AS t (namespace, tenant, kind, key, bucket, type, version, removed, op_id, updated_at,
                          expires_at)
SELECT @names@, i.b, 0, @floor@, true, 0, i.now, i.now
FROM (SELECT *, clock_timestamp() AS now FROM unnest($4::int2[], $5::text[], $6::int4[]) AS i(s, k, b) OFFSET 0)
  AS i
@conflict@ version = t.version WHERE false)";

// In a fresh snapshot: what `lock` had to wait for is seen.
constexpr const char* kDecide = R"(
WITH c AS MATERIALIZED (SELECT clock_timestamp() AS now),
i AS MATERIALIZED (
  SELECT * FROM unnest($4::int2[], $5::text[], $6::int2[], $7::int2[], $8::int2[], $9::bytea[], $10::int8[],
                       $11::int8[], $12::int8[], $13::int8[], $14::int4[])
    WITH ORDINALITY AS i(s, k, verb, fl, ty, v, n, op, ttl, x, b, o)
), l AS MATERIALIZED (
  SELECT i.*, t.*, c.now, @claim_of@ AS claim
  FROM i CROSS JOIN c LEFT JOIN LATERAL (
    SELECT t.type, t.value, t.number, t.version, t.removed, t.expires_at FROM {state} AS t
    WHERE i.verb < 7 AND @same@ OFFSET 0) AS t ON true
), d AS MATERIALIZED (
  SELECT *, CASE WHEN verb = 0 THEN CASE WHEN living THEN 0 ELSE 1 END
                 WHEN verb = 1 THEN CASE WHEN living THEN 2 ELSE 0 END
                 WHEN verb = 2 THEN 0
                 WHEN verb = 5 THEN CASE
                   WHEN NOT coalesce(living, false) THEN 0
                   WHEN type <> 3 THEN 4
                   WHEN CASE WHEN n >= 0 THEN number > 9223372036854775807 - n
                             ELSE number < -9223372036854775807 - 1 - n END THEN 5
                   ELSE 0 END
                 WHEN verb = 7 THEN 0
                 WHEN verb = 8 THEN CASE WHEN claim IS NULL THEN 1 WHEN x > 0 AND claim <> x THEN 3 ELSE 0 END
                 ELSE @matched@ END AS outcome
  FROM @judged@
), e AS MATERIALIZED (
  SELECT *, bool_and(outcome = 0 OR (outcome = 1 AND verb IN (0, 4))) OVER (PARTITION BY b) AS applied FROM d
), u AS (
  UPDATE {state} AS t SET @change@
  FROM e AS i WHERE i.applied AND i.outcome = 0 AND i.verb BETWEEN 1 AND 6 AND @same@
  RETURNING i.o, t.version, t.expires_at, t.number
)@timeouts@
SELECT d.o, CASE WHEN NOT d.applied OR d.outcome <> 0 OR d.verb IN (0, 7, 8) OR u.o IS NOT NULL
                 THEN d.outcome END::int2, d.applied,
       CASE WHEN u.o IS NOT NULL THEN u.version WHEN d.verb = 8 THEN coalesce(d.claim, 0)
            WHEN d.living AND d.outcome <> 1 THEN d.version ELSE 0 END,
       CASE WHEN u.o IS NOT NULL THEN @ms(u.expires_at)@
            WHEN d.living AND d.outcome <> 1 THEN @ms(d.expires_at)@ ELSE 0 END,
       CASE WHEN d.living AND (d.verb = 0 OR (d.outcome > 1 AND d.fl & 1 <> 0)) THEN d.type END,
       CASE WHEN d.living AND (d.verb = 0 OR (d.outcome > 1 AND d.fl & 1 <> 0)) THEN d.value END,
       CASE WHEN d.verb = 5 AND u.o IS NOT NULL THEN u.number
            WHEN d.living AND (d.verb = 0 OR (d.outcome > 1 AND d.fl & 1 <> 0)) THEN d.number END
FROM e AS d LEFT JOIN u ON u.o = d.o)";

constexpr const char* kClaimOf = R"((SELECT claim FROM lt WHERE lt.o = i.o))";
constexpr const char* kLockTimeouts = R"(lt AS MATERIALIZED (
  SELECT i.o, t.claim FROM i CROSS JOIN LATERAL (
    SELECT t.claim FROM {timeouts} AS t WHERE i.verb = 8 AND @same@ FOR UPDATE) AS t
), l AS MATERIALIZED ()";
constexpr const char* kTimeoutsOfDecide = R"(, sc AS (
  INSERT INTO {timeouts} (namespace, tenant, kind, key, due_at, next_at, claim)
  SELECT @names@, i.at, i.at, 0
  FROM (SELECT *, CASE WHEN fl & 8 <> 0 THEN now ELSE @epoch@ END + n * interval '1 millisecond' AS at
        FROM e WHERE applied AND verb = 7 ORDER BY o OFFSET 0) AS i
  ON CONFLICT (namespace, tenant, kind, key)
  DO UPDATE SET due_at = excluded.due_at, next_at = excluded.next_at, claim = 0
), un AS (
  DELETE FROM {timeouts} AS t USING e AS i WHERE i.applied AND i.verb = 8 AND i.outcome = 0 AND @same@
))";

constexpr const char* kSchedule = R"(
WITH made AS (
  INSERT INTO {timeouts} (namespace, tenant, kind, key, due_at, next_at, claim)
  SELECT @names@, i.at, i.at, 0
  FROM (SELECT *, CASE WHEN i.rel THEN clock_timestamp() ELSE @epoch@ END + i.due * interval '1 millisecond' AS at
        FROM unnest($4::int2[], $5::text[], $6::int8[], $7::bool[]) AS i(s, k, due, rel) OFFSET 0) AS i
  ON CONFLICT (namespace, tenant, kind, key)
  DO UPDATE SET due_at = excluded.due_at, next_at = excluded.next_at, claim = 0
  RETURNING 1
)
SELECT count(*) FROM made)";

constexpr const char* kUnschedule = R"(
WITH i AS MATERIALIZED (
  SELECT * FROM unnest($4::int2[], $5::text[], $6::int8[]) WITH ORDINALITY AS i(s, k, x, o)
), l AS MATERIALIZED (
  SELECT i.*, t.claim FROM i CROSS JOIN LATERAL (
    SELECT t.claim FROM {timeouts} AS t WHERE @same@ FOR UPDATE) AS t
), gone AS (
  DELETE FROM {timeouts} AS t USING l AS i WHERE @same@ AND (i.x <= 0 OR i.claim = i.x) RETURNING i.o
)
SELECT i.o, CASE WHEN l.o IS NULL THEN 1 WHEN l.x > 0 AND l.claim <> l.x THEN 3
                 WHEN gone.o IS NOT NULL THEN 0 END::int2, coalesce(l.claim, 0)
FROM i LEFT JOIN l ON l.o = i.o LEFT JOIN gone ON gone.o = i.o)";

constexpr const char* kResolve = R"(
SELECT i.o, coalesce(t.op_id, 0), t.version, t.removed, @living@,
       ((date_part('epoch', clock_timestamp()) - date_part('epoch', t.updated_at)) * 1000000)::int8,
       t.type, t.value, t.number, @ms(t.expires_at)@
FROM unnest($4::int2[], $5::text[]) WITH ORDINALITY AS i(s, k, o)
LEFT JOIN LATERAL (SELECT * FROM {state} AS t WHERE @same@ OFFSET 0) AS t ON true)";

// Bounds, not LIKE: whatever is in a name means itself.
constexpr const char* kScan = R"(
SELECT t.key, t.type, t.value, t.number, t.version, @ms(t.expires_at)@
FROM {state} AS t
WHERE t.namespace = $1 AND t.tenant = $2 AND t.kind = $3 AND t.key >= $4 AND t.key > $5
  AND ($6::text IS NULL OR t.key < $6) AND @living@
ORDER BY t.namespace, t.tenant, t.kind, t.key LIMIT $7::int8)";

// statement_timestamp(): a clock that moves while the index is read cannot be looked up in it.
constexpr const char* kClaim = R"(
WITH due AS MATERIALIZED (
  SELECT t.kind, t.key FROM {timeouts} AS t
  WHERE t.namespace = $1 AND t.tenant = $2 AND ($5::text IS NULL OR t.kind = $5)
    AND t.next_at <= statement_timestamp()
  ORDER BY t.next_at LIMIT $3::int8 FOR UPDATE SKIP LOCKED
)
UPDATE {timeouts} AS t
SET next_at = clock_timestamp() + $4::int8 * interval '1 millisecond', claim = nextval({tokens}::regclass)
FROM due WHERE t.namespace = $1 AND t.tenant = $2 AND t.kind = due.kind AND t.key = due.key
RETURNING t.kind, t.key, @ms(t.due_at)@, t.claim)";

constexpr const char* kRaiseFloors = R"(
WITH dead AS MATERIALIZED (
  SELECT bucket, version, expires_at FROM {state}
  WHERE expires_at <= statement_timestamp() - $3::int8 * interval '1 millisecond'
    AND (NOT $2::bool OR (SELECT pg_try_advisory_xact_lock(hashtextextended('ratesync purge ' || {state_name}, 0))))
  ORDER BY expires_at LIMIT $1::int8
), raised AS (
  INSERT INTO {floors} AS f (bucket, version)
  SELECT bucket, max(version) FROM dead GROUP BY bucket ORDER BY bucket
  ON CONFLICT (bucket) DO UPDATE SET version = excluded.version WHERE f.version < excluded.version
)
SELECT bucket, max(version), (date_part('epoch', max(max(expires_at)) OVER ()) * 1000000)::int8
FROM dead GROUP BY bucket)";

// A statement that may make rows locks the table before it takes its snapshot.
constexpr const char* kWriters = R"(
SELECT DISTINCT virtualtransaction FROM pg_catalog.pg_locks
WHERE locktype = 'relation' AND relation = {state_name}::regclass AND pid <> pg_backend_pid()
  AND database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = current_database())
  AND mode IN ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
  AND ($1::text[] IS NULL OR virtualtransaction = ANY ($1)))";

constexpr const char* kPurge = R"(
WITH gone AS (
  DELETE FROM {state} WHERE ctid = ANY (ARRAY(
    SELECT s.ctid FROM {state} AS s JOIN unnest($1::int4[], $2::int8[]) AS f(b, v)
      ON f.b = s.bucket AND s.version <= f.v
    WHERE s.expires_at <= @epoch@ + $3::int8 * interval '1 microsecond'
    ORDER BY s.expires_at LIMIT $4::int8 FOR UPDATE OF s SKIP LOCKED))
  RETURNING 1
)
SELECT count(*) FROM gone)";

// Only of our own role: a pid may belong to somebody else by now.
constexpr const char* kEndBackend = R"(
SELECT CASE WHEN usename = current_user THEN pg_terminate_backend(pid) ELSE false END
FROM pg_catalog.pg_stat_activity
WHERE pid = $1::int4 AND (date_part('epoch', backend_start) * 1000000)::int8 = $2::int8)";

}  // namespace

StateSql make_state_sql(const PrefixNames& n) {
  const auto with = [](std::string text, std::string_view from, std::string_view to) {
    for (std::size_t at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size()))
      text.replace(at, from.size(), to);
    return text;
  };
  const auto make = [&n](const char* verb, std::string text) {
    Statement statement = named(verb, filled(std::move(text), n));
    statement.binary_rows = true;
    return statement;
  };
  StateSql sql;
  sql.create = make("create", kCreate);
  sql.create_seen = make("create_seen", kCreateSeen);
  sql.create_new = make("create_new", kCreateNew);
  sql.set = make("set", kSet);
  sql.add = make("add", with(kAdd, "@renew@", "false"));
  sql.add_renew = make("add_renew", with(kAdd, "@renew@", "true"));
  sql.get = make("get", kGet);
  sql.modify = make("modify", kModify);
  sql.lock = make("lock_keys", kLock);
  sql.decide = make("decide", with(with(kDecide, "@claim_of@", "NULL::int8"), "@timeouts@", ""));
  sql.decide_timeouts =
      make("decide_timeouts",
           with(with(with(kDecide, "l AS MATERIALIZED (", kLockTimeouts), "@claim_of@", kClaimOf),
                "@timeouts@", kTimeoutsOfDecide));
  sql.schedule = make("schedule", kSchedule);
  sql.unschedule = make("unschedule", kUnschedule);
  sql.resolve = make("resolve", kResolve);
  sql.scan = make("scan", kScan);
  sql.claim = make("claim", kClaim);
  sql.raise_floors = make("raise_floors", kRaiseFloors);
  sql.writers = make("writers", kWriters);
  sql.purge = make("purge_state", kPurge);
  sql.end_backend = make("", kEndBackend);
  sql.end_backend.name.clear();
  return sql;
}

}  // namespace ratesync::postgres
