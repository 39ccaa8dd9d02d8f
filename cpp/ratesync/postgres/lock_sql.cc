#include "ratesync/postgres/lock_sql.h"

#include "ratesync/base/format.h"
#include "ratesync/postgres/inventory.h"
#include "ratesync/postgres/sql_text.h"

namespace ratesync::postgres {
namespace {

// {0} locks, {1} waiters, {2} tokens as a literal, {3} and further fragments.

// A waiter of another process came before $4 ($7 in `take`). The first condition is asked once per statement:
// usually nobody waits anywhere, and then no lock needs a look of its own.
constexpr const char* kBefore = R"((SELECT EXISTS (SELECT FROM {1})) AND EXISTS (
    SELECT FROM {1} AS w
    WHERE w.namespace = x.ns AND w.tenant = x.tn AND w.name = x.nm AND w.waiter_id <> {2}::int8
      AND w.expires_at > clock_timestamp()
      AND w.since < coalesce((SELECT m.since FROM {1} AS m
                              WHERE m.namespace = x.ns AND m.tenant = x.tn AND m.name = x.nm
                                AND m.waiter_id = {2}::int8 AND m.expires_at > clock_timestamp()), 'infinity')))";

// What is held by others is seen before anything is locked, so a refusal writes nothing. Whatever else
// changed meanwhile is decided by the WHERE at the end, which is looked at under the row's lock; so is
// nextval() there: of one name a later acquisition has the larger token. The nextval() above is that of a
// name that has no row. A dead row is purged only after minutes, hence no other token of its name can have
// come and gone between that nextval() and the insertion.
constexpr const char* kTake = R"(
INSERT INTO {0} AS l (namespace, tenant, name, token, holder_id, holder, acquired_at, expires_at)
SELECT ns, tn, nm, nextval({2}), id, $6::text, at, at + ttl * interval '1 millisecond'
FROM (SELECT i.*, clock_timestamp() AS at, coalesce(
               (SELECT CASE WHEN o.holder_id = i.id THEN 'ours'
                            WHEN o.holder_id > 0 AND o.expires_at > clock_timestamp() THEN 'held' END
                FROM {0} AS o WHERE o.namespace = i.ns AND o.tenant = i.tn AND o.name = i.nm), 'free') AS state
      FROM unnest($1::text[], $2::text[], $3::text[], $4::int8[], $5::int8[]) AS i(ns, tn, nm, id, ttl)) AS x
WHERE state = 'ours' OR (state = 'free' AND NOT ({3}))
ON CONFLICT (namespace, tenant, name) DO UPDATE
SET token = CASE WHEN l.holder_id = excluded.holder_id THEN l.token ELSE nextval({2}) END,
    holder_id = excluded.holder_id, holder = excluded.holder,
    acquired_at = CASE WHEN l.holder_id = excluded.holder_id THEN l.acquired_at ELSE clock_timestamp() END,
    expires_at = clock_timestamp() + (excluded.expires_at - excluded.acquired_at)
WHERE l.holder_id <= 0 OR l.expires_at <= clock_timestamp() OR l.holder_id = excluded.holder_id
RETURNING l.holder_id, l.token)";

// An expired lock that nobody took is still ours to renew, but not any more to release: by then it was free.
constexpr const char* kKeep = R"(
UPDATE {0} AS l
SET holder_id = CASE WHEN i.ttl > 0 THEN l.holder_id ELSE i.mark END,
    expires_at = clock_timestamp() + i.ttl * interval '1 millisecond'
FROM unnest($1::text[], $2::text[], $3::text[], $4::int8[], $5::int8[], $6::int8[]) WITH ORDINALITY
     AS i(ns, tn, nm, token, ttl, mark, ord)
WHERE l.namespace = i.ns AND l.tenant = i.tn AND l.name = i.nm AND (l.token = i.token OR i.token = 0)
  AND ((l.holder_id > 0 AND (i.ttl > 0 OR l.expires_at > clock_timestamp())) OR l.holder_id = i.mark)
RETURNING i.ord)";

// Rows written by hand may hold 'infinity', which cannot be subtracted.
constexpr const char* kLeft = R"(ceil(date_part('epoch', least({}, '9999-01-01 00:00:00+00'::timestamptz)
                       - clock_timestamp()) * 1000)::int8)";

constexpr const char* kKeptFor = R"((
    SELECT {3} FROM {1} AS w
    WHERE w.namespace = x.ns AND w.tenant = x.tn AND w.name = x.nm AND w.expires_at > clock_timestamp()
      AND {4}
    ORDER BY w.since LIMIT 1))";

constexpr const char* kLook = R"(
SELECT ord, token, holder, CASE WHEN holder_id > 0 THEN {3} ELSE 0 END, {4}
FROM (SELECT i.*, l.token, l.holder, l.holder_id, l.expires_at
      FROM unnest($1::text[], $2::text[], $3::text[]) WITH ORDINALITY AS i(ns, tn, nm, ord)
      LEFT JOIN {0} AS l ON l.namespace = i.ns AND l.tenant = i.tn AND l.name = i.nm) AS x)";

// The lock on the row makes refusal and place in line one step: whoever releases it comes before, and then it
// is free here, or after, and then it sees us in line. LockRows gives the row as it is after the wait.
constexpr const char* kQueue = R"(
WITH x AS MATERIALIZED (
  SELECT i.ord, i.ns, i.tn, i.nm, l.token, l.holder, l.holder_id, l.expires_at
  FROM unnest($1::text[], $2::text[], $3::text[]) WITH ORDINALITY AS i(ns, tn, nm, ord)
  JOIN {0} AS l ON l.namespace = i.ns AND l.tenant = i.tn AND l.name = i.nm
  FOR NO KEY UPDATE OF l
), seen AS MATERIALIZED (
  SELECT x.*, CASE WHEN holder_id > 0 THEN {3} ELSE 0 END AS ms, {4} AS kept
  FROM x
), line AS (
  INSERT INTO {1} AS w (namespace, tenant, name, waiter_id, since, expires_at)
  SELECT ns, tn, nm, $4::int8, clock_timestamp(), clock_timestamp() + $5::int8 * interval '1 millisecond'
  FROM seen WHERE ms > 0 OR kept IS NOT NULL
  ON CONFLICT (namespace, tenant, name, waiter_id) DO UPDATE
  SET since = CASE WHEN w.expires_at > clock_timestamp() THEN w.since ELSE excluded.since END,
      expires_at = excluded.expires_at
)
SELECT ord, token, holder, ms, kept FROM seen)";

constexpr const char* kServed = R"(
DELETE FROM {1} AS w
USING unnest($1::text[], $2::text[], $3::text[], $4::int8[]) AS i(ns, tn, nm, id)
WHERE w.namespace = i.ns AND w.tenant = i.tn AND w.name = i.nm AND w.waiter_id = $5::int8
  AND EXISTS (SELECT FROM {0} AS l WHERE l.namespace = i.ns AND l.tenant = i.tn AND l.name = i.nm
              AND l.holder_id = i.id))";

constexpr const char* kUnwait = R"(
DELETE FROM {1} AS w
USING unnest($1::text[], $2::text[], $3::text[]) AS i(ns, tn, nm)
WHERE w.namespace = i.ns AND w.tenant = i.tn AND w.name = i.nm AND w.waiter_id = $4::int8)";

// Names may hold anything: the payload tells their lengths.
constexpr const char* kTell = R"(pg_notify($5::text || {}.waiter_id,
                   '=' || octet_length(convert_to(i.ns, 'UTF8')) || ' ' ||
                   octet_length(convert_to(i.tn, 'UTF8')) || ' ' || i.ns || i.tn || i.nm)::text)";

// After what freed the locks, for a snapshot that is younger than the wait for their rows: only then
// everybody who stood in line by then is seen. NOTIFY makes commits wait for each other, so it is spared
// where nobody waits, and where the first in line is ourselves.
constexpr const char* kNotify = R"(
SELECT i.ord, q.waiter_id = $4::int8,
       CASE WHEN q.waiter_id <> $4::int8 THEN
         {2} END
FROM unnest($1::text[], $2::text[], $3::text[]) WITH ORDINALITY AS i(ns, tn, nm, ord), LATERAL (
  SELECT w.waiter_id FROM {1} AS w
  WHERE w.namespace = i.ns AND w.tenant = i.tn AND w.name = i.nm AND w.expires_at > clock_timestamp()
  ORDER BY w.since LIMIT 1) AS q
WHERE (SELECT EXISTS (SELECT FROM {1}))
  AND NOT EXISTS (SELECT FROM {0} AS l WHERE l.namespace = i.ns AND l.tenant = i.tn AND l.name = i.nm
                  AND l.holder_id > 0 AND l.expires_at > clock_timestamp()))";

constexpr const char* kStand = R"(
INSERT INTO {1} AS w (namespace, tenant, name, waiter_id, since, expires_at)
SELECT ns, tn, nm, $4::int8, clock_timestamp(), clock_timestamp() + $5::int8 * interval '1 millisecond'
FROM unnest($1::text[], $2::text[], $3::text[]) AS i(ns, tn, nm)
ON CONFLICT (namespace, tenant, name, waiter_id) DO UPDATE SET expires_at = excluded.expires_at)";

// Whoever looks again after he stood in line either sees what this rings for, or is told. Where nobody waits
// nothing is written.
constexpr const char* kRing = R"(
DELETE FROM {1} AS w
USING unnest($1::text[], $2::text[], $3::text[]) AS i(ns, tn, nm)
WHERE w.namespace = i.ns AND w.tenant = i.tn AND w.name = i.nm
RETURNING CASE WHEN w.waiter_id <> $4::int8 AND w.expires_at > clock_timestamp() THEN {2} END)";

constexpr const char* kRefresh = R"(
UPDATE {1} AS w SET expires_at = clock_timestamp() + $5::int8 * interval '1 millisecond'
FROM unnest($1::text[], $2::text[], $3::text[]) WITH ORDINALITY AS i(ns, tn, nm, ord)
WHERE w.namespace = i.ns AND w.tenant = i.tn AND w.name = i.nm AND w.waiter_id = $4::int8
RETURNING i.ord)";

constexpr const char* kPurgeWaiters = R"(
WITH gone AS (
  DELETE FROM {1} WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM {1} WHERE expires_at < clock_timestamp() - interval '1 minute'
    LIMIT $1::int8 FOR UPDATE SKIP LOCKED))
  RETURNING 1)
SELECT count(*) FROM gone)";

// Page after page along the primary key: an index over the expiry would forbid HOT updates, and every
// acquisition and release would pay for it. A page starts where the one before ended.
constexpr const char* kPurge = R"(
WITH page AS MATERIALIZED (
  SELECT namespace, tenant, name FROM {0}
  WHERE (namespace, tenant, name) > ($1::text, $2::text, $3::text)
    AND (SELECT pg_try_advisory_xact_lock({2}))
  ORDER BY namespace, tenant, name LIMIT $4::int8
), gone AS (
  DELETE FROM {0} WHERE ctid = ANY (ARRAY(
    SELECT l.ctid FROM page JOIN {0} AS l USING (namespace, tenant, name)
    WHERE l.expires_at < clock_timestamp() - $5::int8 * interval '1 millisecond'
    FOR UPDATE OF l SKIP LOCKED))
  RETURNING 1
), last AS (
  SELECT * FROM page ORDER BY namespace DESC, tenant DESC, name DESC LIMIT 1
)
SELECT (SELECT count(*) FROM page), (SELECT count(*) FROM gone), namespace, tenant, name FROM last)";

constexpr const char* kList = R"(
SELECT l.namespace, l.tenant, l.name, l.token, l.holder,
       -{3}, {4}, {5}
FROM {0} AS l
WHERE l.holder_id > 0 AND ($1::text IS NULL OR l.namespace = $1::text)
  AND ($2::text IS NULL OR l.tenant = $2::text)
ORDER BY l.namespace, l.tenant, l.name
LIMIT $3::int8)";

constexpr const char* kCountWaiters = R"((
    SELECT count(*) FROM {1} AS w WHERE w.namespace = l.namespace AND w.tenant = l.tenant AND w.name = l.name
      AND w.expires_at > clock_timestamp()))";

// For pg_try_advisory_xact_lock: of these tables.
std::int64_t lock_key(const std::string& text) {
  std::uint64_t hash = 0xcbf29ce484222325ull;
  for (const char ch : text) hash = (hash ^ static_cast<unsigned char>(ch)) * 0x100000001b3ull;
  return static_cast<std::int64_t>(hash >> 1);
}

}  // namespace

LockSql make_lock_sql(const LockTables& t) {
  const bool line = !t.waiters.empty();
  const auto make = [&t](std::string_view verb, const char* text, const auto&... parts) {
    return named(verb, formatted(fmt::runtime(text), t.locks, t.waiters, parts...));
  };
  const auto left = [](const char* what) { return formatted(fmt::runtime(kLeft), what); };
  const auto before = [&](const char* who) {
    return line ? formatted(fmt::runtime(kBefore), "", t.waiters, who) : formatted("{}::int8 IS NULL", who);
  };
  const std::string tokens = literal(t.tokens) + "::regclass";
  const std::string mine =
      "w.waiter_id <> $4::int8 AND w.since < coalesce((SELECT m.since FROM " + t.waiters +
      " AS m WHERE m.namespace = x.ns AND m.tenant = x.tn AND m.name = x.nm AND m.waiter_id = $4::int8 AND "
      "m.expires_at > clock_timestamp()), 'infinity')";
  const std::string kept =
      line ? formatted(fmt::runtime(kKeptFor), "", t.waiters, "", left("w.expires_at"), mine)
           : "CASE WHEN $4::int8 IS NULL THEN 0 END";

  LockSql sql;
  sql.take = make("lock_take", kTake, tokens, before("$7"));
  sql.keep = make("lock_keep", kKeep);
  sql.look = make("lock_look", kLook, "", left("expires_at"), kept);
  sql.purge = make("lock_purge", kPurge, std::to_string(lock_key(t.locks)));
  sql.list = make("lock_list", kList, "", left("l.acquired_at"), left("l.expires_at"),
                  line ? formatted(fmt::runtime(kCountWaiters), "", t.waiters) : "0");
  if (!line) return sql;
  sql.queue = make("lock_queue", kQueue, "", left("expires_at"), kept);
  sql.served = make("lock_served", kServed);
  sql.unwait = make("lock_unwait", kUnwait);
  sql.notify = make("lock_notify", kNotify, fmt::format(fmt::runtime(kTell), "q"));
  sql.stand = make("lock_stand", kStand);
  sql.ring = make("lock_ring", kRing, fmt::format(fmt::runtime(kTell), "w"));
  sql.refresh = make("lock_refresh", kRefresh);
  sql.purge_waiters = make("lock_purge_waiters", kPurgeWaiters);
  return sql;
}

}  // namespace ratesync::postgres
