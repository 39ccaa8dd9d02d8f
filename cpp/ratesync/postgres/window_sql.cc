// The windows in SQL: sliding_window (exact log), sliding_counter, fixed_window. Times are whole
// microseconds since 1970, so that windows are aligned to the calendar.
//
// One row per group in {2}: algorithm (another one starts afresh), total (units dealt so far, the stamp), at
// (the latest slot; fixed_window: the start of its window), and two numbers:
//
//                    cur                              prev
//   sliding_window   number of the newest unit        units up to this number have left the window
//   sliding_counter  units in the window of `at`      units in the window before
//   fixed_window     units in the window of `at`       units in the window before
//
// {3} is the exact log: an entry stands for the units (seq - units, seq], dealt for the moment `at`. Exact
// without counting rows: the unit that has to leave the window before a request of cost c may pass is
// number cur + c - limit, and the index on (group_id, seq) finds it. limits/window.h has the same sums.
#include "ratesync/postgres/sql_text.h"

namespace ratesync::postgres {

// `per` requests of this cost fit into one window. From the per-th on, slots repeat one window later,
// hence at most `per` look-ups for any number of requests.
const char* const kWindowLevels = R"(
r AS MATERIALIZED (
  SELECT l.*, lim / cost AS per,
         CASE algo WHEN 2 THEN greatest(us, at) / win * win WHEN 3 THEN greatest(us / win, at / win) * win END AS start,
         CASE WHEN algo = 1 OR at / win >= us / win THEN cur ELSE 0 END AS cur0,
         CASE algo
           WHEN 1 THEN greatest(prev, coalesce((
             SELECT e.seq - e.units FROM {3} AS e
             WHERE e.group_id = g AND e.seq > prev AND e.dealt_at > us - win ORDER BY e.seq LIMIT 1), cur))
           ELSE CASE at / win - us / win WHEN -1 THEN cur ELSE CASE WHEN at / win >= us / win THEN prev ELSE 0 END END
         END AS prev0
  FROM l
), x AS MATERIALIZED (
  SELECT r.*, CASE algo
    WHEN 1 THEN ARRAY(
      SELECT base.slots[(i - 1) % per + 1] + (i - 1) / per * win
      FROM (
        SELECT ARRAY(
          SELECT greatest(us, at, max(bound) OVER (ORDER BY i))
          FROM (
            SELECT i, (SELECT CASE WHEN e.seq - e.units < cur + i * cost - lim THEN e.dealt_at + win END
                       FROM {3} AS e
                       WHERE e.group_id = g AND e.seq >= cur + i * cost - lim AND cur + i * cost - lim > prev0
                       ORDER BY e.seq LIMIT 1) AS bound
            FROM generate_series(1, least(n, per)) AS i OFFSET 0) AS unit
          ORDER BY i) AS slots
        OFFSET 0) AS base, generate_series(1, n) AS i)
    WHEN 2 THEN ARRAY(
      WITH RECURSIVE step (done, upto, start, cur, prev, t, slot) AS (
        SELECT 0::int8, 0::int8, start, cur0, prev0, greatest(us, at), NULL::int8
        UNION ALL
        SELECT upto, CASE WHEN fits THEN upto + more ELSE upto END,
               CASE WHEN fits THEN start ELSE start + win END,
               CASE WHEN fits THEN cur + more * cost ELSE 0 END,
               CASE WHEN fits THEN prev ELSE cur END,
               CASE WHEN fits THEN slot ELSE greatest(t, start + win) END,
               CASE WHEN fits THEN slot END
        FROM (
          SELECT *, coalesce(slot < start + win, false) AS fits
          FROM (
            SELECT upto, start, cur, prev, t,
                   -- As many as pass at this very moment go in one step.
                   CASE WHEN prev <= lim - cur - cost THEN least(n - upto, (lim - cur - prev) / cost) ELSE 1 END AS more,
                   CASE WHEN lim - cur - cost < 0 THEN NULL
                        WHEN prev <= lim - cur - cost THEN greatest(t, start)
                        ELSE greatest(t, start + win - floor((lim - cur - cost)::float8 * win::float8 / prev::float8)::int8)
                   END AS slot
            FROM step
            WHERE upto < n AND per > 0 AND (slot IS NULL OR patience IS NULL OR slot <= us + patience)
            OFFSET 0) AS next
          OFFSET 0) AS tried
      )
      SELECT slot FROM step, generate_series(done + 1, upto) AS i WHERE slot IS NOT NULL ORDER BY i)
    WHEN 3 THEN ARRAY(
      SELECT CASE WHEN i <= fit THEN start ELSE start + (1 + (i - fit - 1) / per) * win END
      FROM (SELECT greatest(lim - cur0, 0) / cost AS fit OFFSET 0) AS room, generate_series(1, n) AS i)
    END AS slots_at
  FROM r
))";

const char* const kWindowRemaining = R"(
CASE algo
  WHEN 1 THEN greatest(lim - (cur1 - prev0), 0)
  WHEN 2 THEN CASE WHEN at1 > us THEN 0
                   ELSE greatest(lim - cur1 - ceil(prev1::float8 * (win - (us - start1))::float8 / win::float8)::int8, 0) END
  WHEN 3 THEN CASE WHEN start1 > us THEN 0 ELSE greatest(lim - cur1, 0) END
END)";

const char* const kWindowFullAfter = R"(
CASE algo
  WHEN 1 THEN CASE WHEN cur1 > prev0 THEN greatest(at1 + win - us, 0) ELSE 0 END
  WHEN 2 THEN CASE WHEN cur1 > 0 THEN start1 + 2 * win - us WHEN prev1 > 0 THEN start1 + win - us ELSE 0 END
  WHEN 3 THEN CASE WHEN cur1 > 0 THEN start1 + win - us ELSE 0 END
END)";

namespace {

// $1 text[] group, $2 int4[] algorithm, $3 int8[] limit, $4 int8[] window us.
// Row: ord, us until one unit, units left, us until all is left, in use.
constexpr const char* kPeekWindows = R"(
WITH c AS MATERIALIZED (SELECT clock_timestamp() AS now),
l AS MATERIALIZED (
  SELECT i.*, 1::int8 AS n, 1::int8 AS cost, NULL::int8 AS patience,
         (date_part('epoch', c.now) * 1000000)::int8 AS us, @in_use@ AS in_use, @window_columns@
  FROM c, unnest($1::text[], $2::int4[], $3::int8[], $4::int8[]) WITH ORDINALITY AS i(g, algo, lim, win, ord)
  LEFT JOIN LATERAL (SELECT * FROM {0} WHERE group_id = i.g) AS s ON true
  LEFT JOIN LATERAL (SELECT * FROM {2} WHERE group_id = i.g) AS w ON true
), @window_levels@
SELECT ord, greatest(slots_at[1] - us, 0), @window_remaining@, @window_full_after@, in_use
FROM (SELECT *, start AS start1, at AS at1, cur0 AS cur1, prev0 AS prev1 FROM x) AS x)";

// After `lock`. $1 text[] group, $2 int4[] AdjustMode, $3 int8[] units, $4 int8[] stamp or NULL,
// $5 int4[] algorithm, $6 int8[] window us, $7 int8[] limit.
// A refund (with a stamp) takes the newest units, in whatever window they are; a calendar window that is left
// without any is left for one before, of which those that are not kept are taken as full. A settlement is of
// this moment: it takes the newest units whose moment has come. The gap that this leaves below the entries of
// the future is closed by close_gaps: one statement cannot move them without passing through numbers that are
// taken.
constexpr const char* kAdjustWindows = R"(
WITH c AS MATERIALIZED (SELECT clock_timestamp() AS now),
l AS MATERIALIZED (
  SELECT i.*, c.now, (date_part('epoch', c.now) * 1000000)::int8 AS us, w.group_id IS NOT NULL AS present,
         @window_columns@
  FROM c, (
    SELECT g, mode, units, stamp, win, lim,
           CASE WHEN mode = 2 THEN (SELECT algorithm FROM {2} WHERE group_id = g) ELSE algo END AS algo
    FROM unnest($1::text[], $2::int4[], $3::int8[], $4::int8[], $5::int4[], $6::int8[], $7::int8[])
           AS i(g, mode, units, stamp, algo, win, lim)) AS i
  LEFT JOIN LATERAL (SELECT * FROM {2} WHERE group_id = i.g) AS w ON true
), r AS MATERIALIZED (
  SELECT g, mode, units, stamp, algo, win, lim, now, us, total,
         CASE WHEN here THEN cur ELSE 0 END AS cur,
         CASE WHEN algo = 1 AND stamp IS NULL THEN greatest(prev, coalesce((
                SELECT e.seq - e.units FROM {3} AS e
                WHERE e.group_id = g AND e.seq > prev AND e.dealt_at > us - win ORDER BY e.seq LIMIT 1), cur))
              WHEN here THEN prev WHEN algo > 1 AND at / win = us / win - 1 THEN cur ELSE 0 END AS prev,
         CASE WHEN stamp IS NOT NULL OR mode = 2 OR (algo = 1 AND mode = 0) THEN at
              WHEN algo = 3 THEN greatest(at / win, us / win) * win ELSE greatest(us, at) END AS at
  FROM (
    SELECT *, algo = 1 OR mode = 2 OR stamp IS NOT NULL OR at / win >= us / win AS here FROM l
    WHERE (stamp IS NULL OR stamp = total) AND (mode = 1 OR present)) AS q
), t AS MATERIALIZED (
  SELECT *, upto - cut AS taken,
         CASE WHEN algo = 1 OR stamp IS NULL OR units < cur THEN 0
              WHEN units = cur OR units < cur + prev THEN 1
              ELSE 2 + (units - cur - prev) / lim END AS back
  FROM (
    SELECT *, CASE WHEN mode <> 0 THEN upto
                   WHEN algo = 1 THEN least(upto, greatest(upto - units, prev))
                   ELSE greatest(upto - units, 0) END AS cut
    FROM (
      SELECT *, CASE WHEN algo = 1 AND mode = 0 AND stamp IS NULL THEN coalesce((
                       SELECT e.seq FROM {3} AS e WHERE e.group_id = g AND e.seq > prev AND e.dealt_at <= us
                       ORDER BY e.seq DESC LIMIT 1), prev)
                     ELSE cur END AS upto
      FROM r) AS q) AS p
), gone AS (
  DELETE FROM {3} AS e USING t
  WHERE t.taken > 0 AND t.algo = 1 AND e.group_id = t.g AND e.seq > t.cut AND e.seq <= t.upto AND e.seq - e.units >= t.cut
), shrunk AS (
  UPDATE {3} AS e SET seq = t.cut, units = e.units - (e.seq - t.cut) FROM t
  WHERE t.taken > 0 AND t.algo = 1 AND e.group_id = t.g AND e.seq > t.cut AND e.seq <= t.upto AND e.seq - e.units < t.cut
), moved AS (
  UPDATE {3} AS e SET seq = e.seq - t.taken + 4611686018427387904 FROM t
  WHERE t.taken > 0 AND t.algo = 1 AND e.group_id = t.g AND e.seq > t.upto
), added AS (
  INSERT INTO {3} (group_id, seq, units, dealt_at, expires_at)
  SELECT g, cur + units, units, at, @epoch@ + (at + win) * interval '1 microsecond'
  FROM t WHERE mode = 1 AND algo = 1
), w AS (
  INSERT INTO {2} AS y (group_id, algorithm, total, dealt_at, current, previous, expires_at)
  SELECT g, algo,
         CASE WHEN mode = 1 THEN total + units WHEN stamp IS NOT NULL THEN total - units ELSE total END,
         CASE WHEN mode = 2 THEN 0
              WHEN algo = 1 AND stamp IS NOT NULL THEN coalesce((
                SELECT e.dealt_at FROM {3} AS e WHERE e.group_id = g AND e.seq >= cut AND cut > prev ORDER BY e.seq LIMIT 1), 0)
              WHEN back > 0 THEN (at / win - back) * win
              ELSE at END,
         CASE WHEN back = 1 THEN cur + prev - units WHEN back > 1 THEN lim - (units - cur - prev) % lim ELSE
         CASE mode WHEN 0 THEN cur - taken WHEN 1 THEN cur + units ELSE CASE WHEN algo = 1 THEN cur ELSE 0 END END END,
         CASE WHEN back > 0 THEN lim WHEN mode <> 2 THEN prev WHEN algo = 1 THEN cur ELSE 0 END,
         now + 2 * greatest(coalesce(win, 0), 60000000) * interval '1 microsecond'
  FROM t
  ON CONFLICT (group_id) DO UPDATE
  SET algorithm = excluded.algorithm, total = excluded.total, dealt_at = excluded.dealt_at,
      current = excluded.current, previous = excluded.previous,
      expires_at = CASE WHEN y.expires_at >= excluded.expires_at THEN y.expires_at ELSE excluded.expires_at END
)
UPDATE {0} AS s
SET version = CASE WHEN s.version < 2147483647 THEN s.version + 1 ELSE 1 END,
    updated_at = CASE WHEN s.updated_at > t.now - interval '1 minute' THEN s.updated_at ELSE t.now END
FROM t WHERE s.group_id = t.g AND t.mode <> 2)";

constexpr const char* kCloseGaps =
    "UPDATE {3} SET seq = seq - 4611686018427387904 "
    "WHERE group_id = ANY ($1::text[]) AND seq > 2305843009213693952";

// Of groups that went quiet. Nothing is decided on what has expired, so no row lock is needed; the minute
// is for clocks that are set back. SKIP LOCKED: it never waits, hence never deadlocks.
constexpr const char* kPurge = R"(
WITH gone AS (
  DELETE FROM @table@ WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM @table@ WHERE expires_at < clock_timestamp() - interval '1 minute'
    ORDER BY expires_at LIMIT $1::int8 FOR UPDATE SKIP LOCKED))
  RETURNING 1)
SELECT count(*) FROM gone)";

std::string replaced(std::string text, std::string_view mark, std::string_view by) {
  for (std::size_t at = text.find(mark); at != std::string::npos; at = text.find(mark, at + by.size()))
    text.replace(at, mark.size(), by);
  return text;
}

}  // namespace

std::string peek_windows_sql(const LimitTables& tables) {
  const char* in_use =
      tables.leases.empty()
          ? "coalesce(s.current_concurrent, 0)"
          : "coalesce((SELECT sum(slots) FROM {1} WHERE group_id = i.g AND expires_at > c.now), 0)";
  return fill(replaced(kPeekWindows, "@in_use@", in_use), tables);
}
std::string adjust_windows_sql(const LimitTables& tables) { return fill(kAdjustWindows, tables); }
std::string close_gaps_sql(const LimitTables& tables) { return fill(kCloseGaps, tables); }
std::string purge_log_sql(const LimitTables& tables) {
  return fill(replaced(kPurge, "@table@", "{3}"), tables);
}
std::string purge_windows_sql(const LimitTables& tables) {
  return fill(replaced(kPurge, "@table@", "{2}"), tables);
}

}  // namespace ratesync::postgres
