// The statement that decides under the lock: rates, windows and slots of many groups at once.
//
// It looks at other rows than the one that was locked (leases, windows, waiters), so its snapshot has
// to be younger than the lock: a statement of its own after `lock`. Whoever changes one of those
// rows writes the state row too, or holds its lock.
//
// Parameters, in this order (limit_params.cc): the columns of `i` as arrays, then who we are.

#include "ratesync/base/format.h"
#include "ratesync/postgres/sql_text.h"

namespace ratesync::postgres {
namespace {

// What each table brings. Without leases slots are a number in the state row, without owner: what
// was given back is subtracted, and the rest is `others`.
struct Parts {
  std::string columns, types;  // of `i`
  int count = 0;
  std::string read, joins;       // of `l`
  std::string kept, changed;     // slots we keep; whether that is news
  std::string holder, in_steps;  // CTEs after the write
  std::string who;
  std::string answer;

  void column(std::string_view name, std::string_view type) {
    columns += formatted("{}{}", count > 0 ? ", " : "", name);
    types += formatted("{}${}::{}[]", count > 0 ? ", " : "", count + 1, type);
    ++count;
  }
};

void add_leases(Parts& p, bool leases) {
  if (!leases) {
    p.column("freed", "int8");
    p.read += ", greatest(coalesce(s.current_concurrent, 0) - i.freed, 0)::int8 AS others, false AS lost";
    p.kept = "0::int8";
    p.changed = "present AND slots IS NOT NULL AND freed > 0";
    return;
  }
  for (const char* name : {"held", "holder", "fresh", "lease"}) p.column(name, "int8");
  p.read += ", o.others, o.mine, i.held > 0 AND o.mine IS NULL AS lost";
  p.joins += R"(
  LEFT JOIN LATERAL (
    SELECT coalesce(sum(slots) FILTER (WHERE holder_id <> i.holder AND expires_at > c.now), 0)::int8 AS others,
           max(slots) FILTER (WHERE holder_id = i.holder) AS mine
    FROM {1} WHERE group_id = i.g AND i.slots IS NOT NULL OFFSET 0) AS o ON true)";
  p.kept = "CASE WHEN lost THEN 0 ELSE held END";
  p.changed = "slots IS NOT NULL AND mine IS DISTINCT FROM nullif(kept + k, 0)";
  p.holder = ", CASE WHEN lost THEN fresh ELSE holder END AS me";
}

void write_leases(Parts& p, bool leases) {
  if (!leases) return;
  p.in_steps += formatted(R"(, gone AS (
  DELETE FROM {{1}} AS x USING a
  WHERE a.wrote AND a.slots IS NOT NULL AND x.group_id = a.g
    AND CASE WHEN x.holder_id = a.me THEN a.kept + a.k = 0 ELSE a.k > 0 AND x.expires_at <= a.now END
), held AS (
  INSERT INTO {{1}} AS x (group_id, holder_id, holder, slots, acquired_at, expires_at)
  SELECT g, me, ${}::text, kept + k, now, now + lease * interval '1 microsecond'
  FROM a WHERE wrote AND slots IS NOT NULL AND kept + k > 0
  ON CONFLICT (group_id, holder_id) DO UPDATE SET slots = excluded.slots, expires_at = excluded.expires_at
))",
                          ++p.count);
}

// Roughly first come, first served, over processes: a slot is not for us while there are as many waiters of
// other processes before us. Who stands in line and finds the limit full is remembered, with the moment
// at which that began; once granted it goes to the back. Who gives slots back tells the first in line.
void add_waiters(Parts& p, const std::string& me) {
  p.column("queued", "int8");
  p.read += ", q.since, q.before";
  p.joins += formatted(R"(
  LEFT JOIN LATERAL (
    SELECT m.since, (SELECT count(*) FROM {{4}} AS x
                     WHERE x.group_id = i.g AND x.waiter_id <> ${0}::int8 AND x.expires_at > c.now
                       AND (m.since IS NULL OR x.since < m.since)) AS before
    FROM (SELECT max(since) AS since FROM {{4}}
          WHERE group_id = i.g AND waiter_id = ${0}::int8 AND expires_at > c.now OFFSET 0) AS m
    WHERE i.slots IS NOT NULL OFFSET 0) AS q ON true)",
                       me);
}

void write_waiters(Parts& p, const std::string& me, int channel) {
  p.in_steps += formatted(R"(, waiting AS (
  INSERT INTO {{4}} AS x (group_id, waiter_id, since, expires_at)
  SELECT g, ${0}::int8, CASE WHEN k > 0 THEN now ELSE coalesce(since, now) END, now + interval '2500 ms'
  FROM a WHERE waits
  ON CONFLICT (group_id, waiter_id) DO UPDATE SET since = excluded.since, expires_at = excluded.expires_at
), served AS (
  DELETE FROM {{4}} AS x USING a
  WHERE a.k > 0 AND NOT a.waits AND a.since IS NOT NULL AND x.group_id = a.g AND x.waiter_id = ${0}::int8
), told AS MATERIALIZED (
  SELECT pg_notify(${1}::text || q.waiter_id, '=' || a.g) AS done
  FROM a, LATERAL (
    SELECT waiter_id FROM {{4}} WHERE group_id = a.g AND expires_at > a.now
      AND a.kept + a.k < a.mine AND a.slots > a.others + a.kept + a.k
    ORDER BY since LIMIT greatest(a.slots - a.others - a.kept - a.k, 0)) AS q
  WHERE a.wrote AND q.waiter_id <> ${0}::int8
))",
                          me, channel);
  p.answer += ", (SELECT count(done) FROM told)";
}

void add_windows(Parts& p) {
  p.column("algo", "int4");
  for (const char* name : {"cost", "lim", "win", "patience"}) p.column(name, "int8");
  p.read += ", (date_part('epoch', c.now) * 1000000)::int8 AS us, @window_columns@";
  p.joins += "\n  LEFT JOIN LATERAL (SELECT * FROM {2} WHERE group_id = i.g AND i.algo > 0) AS w ON true";
}

void write_windows(Parts& p) {
  p.in_steps += R"(, window_rows AS (
  INSERT INTO {2} AS y (group_id, algorithm, total, dealt_at, current, previous, expires_at)
  SELECT g, algo, total1, CASE algo WHEN 3 THEN start1 ELSE at1 END, cur1, prev1,
         @epoch@ + (at1 + 2 * win) * interval '1 microsecond'
  FROM a WHERE wrote AND algo > 0 AND k > 0
  ON CONFLICT (group_id) DO UPDATE
  SET algorithm = excluded.algorithm, total = excluded.total, dealt_at = excluded.dealt_at,
      current = excluded.current, previous = excluded.previous,
      -- Its index forbids HOT updates whenever it changes: it goes ahead in steps.
      expires_at = CASE WHEN y.expires_at >= excluded.expires_at THEN y.expires_at
                        ELSE excluded.expires_at + greatest(excluded.expires_at - clock_timestamp(), interval '1 minute') END
), logged AS (
  INSERT INTO {3} (group_id, seq, units, dealt_at, expires_at)
  SELECT a.g, a.cur + max(z.i) * a.cost, count(*) * a.cost, z.slot,
         @epoch@ + (z.slot + a.win) * interval '1 microsecond'
  FROM a, unnest(a.slots_at[1:a.k::int4]) WITH ORDINALITY AS z(slot, i)
  WHERE a.wrote AND a.algo = 1 AND a.k > 0
  GROUP BY a.g, a.cur, a.cost, a.win, z.slot
), pruned AS (
  -- What left the window since the last write, up to a bound; the purge has the rest.
  DELETE FROM {3} AS e USING (
    SELECT a.g, a.prev, (SELECT max(seq) FROM (
             SELECT o.seq FROM {3} AS o WHERE o.group_id = a.g AND o.seq > a.prev AND o.seq <= a.prev0
             ORDER BY o.seq LIMIT 1000) AS oldest) AS upto
    FROM a WHERE a.wrote AND a.algo = 1 AND a.k > 0 AND a.prev0 > a.prev) AS p
  WHERE e.group_id = p.g AND e.seq > p.prev AND e.seq <= p.upto
))";
  p.answer += R"(,
       CASE WHEN algo > 0 THEN ARRAY(SELECT greatest(z - us, 0) FROM unnest(slots_at[1:k::int4]) AS z) END,
       CASE WHEN algo > 0 THEN greatest(slots_at[k::int4 + 1] - us, 0) END, @window_remaining@, @window_full_after@)";
}

constexpr const char* kMayByRate = "@decide_rate@";
constexpr const char* kMayByWindow = R"(CASE WHEN algo > 0 THEN (
               SELECT count(*) FROM unnest(slots_at) AS z WHERE patience IS NULL OR z <= us + patience)
             ELSE @decide_rate@ END)";

// The window's state after k more requests. A fixed_window's slots are the starts of windows.
constexpr const char* kAfter = R"(
  SELECT *, CASE WHEN k = 0 OR algo IN (0, 1) THEN cur0 + k * cost
                 ELSE cost * (SELECT count(*) FROM unnest(slots_at[1:k::int4]) AS z WHERE z >= start1)
                      + CASE WHEN start1 = start THEN cur0 ELSE 0 END END AS cur1,
         CASE WHEN k = 0 OR algo IN (0, 1) OR start1 = start THEN prev0
              ELSE cost * (SELECT count(*) FROM unnest(slots_at[1:k::int4]) AS z WHERE z >= start1 - win AND z < start1)
                   + CASE WHEN start1 - win = start THEN cur0 ELSE 0 END END AS prev1
  FROM (
    SELECT *, total + k * cost AS total1, CASE WHEN k = 0 THEN at ELSE slots_at[k::int4] END AS at1,
           CASE WHEN k = 0 THEN start ELSE slots_at[k::int4] / win * win END AS start1
    FROM decided OFFSET 0) AS z)";

}  // namespace

std::string decide_sql(const LimitTables& tables, DecideShape shape) {
  const bool leases = !tables.leases.empty(), waiters = leases && !tables.waiters.empty();
  Parts p;
  p.column("g", "text");
  p.column("n", "int8");
  p.column("each", "float8");
  for (const char* name : {"room", "step", "slots"}) p.column(name, "int8");
  add_leases(p, leases);
  // Who we are comes behind all columns: leases and waiters name it before it has a number.
  const std::string me = std::to_string(p.count + (waiters ? 1 : 0) + (shape.windows ? 5 : 0) +
                                        (shape.together ? 1 : 0) + (leases ? 1 : 0) + 1);
  if (waiters) add_waiters(p, me);
  if (shape.windows) add_windows(p);
  if (shape.together) p.column("bundle", "int8");
  write_leases(p, leases);
  if (shape.windows) write_windows(p);
  if (waiters) write_waiters(p, me, std::stoi(me) + 1);
  // A trigger that swallows the write of one part must not leave the others charged.
  if (shape.together) p.answer += ", 1 / ((SELECT count(*) FROM v) = (SELECT count(*) FROM w))::int4";

  const std::string text = formatted(
      R"(
WITH c AS MATERIALIZED (SELECT clock_timestamp() AS now),
l AS MATERIALIZED (
  SELECT i.*, s.version, s.updated_at, s.current_concurrent, s.group_id IS NOT NULL AS present, @last@ AS last, c.now{read}
  FROM c, unnest({types}) WITH ORDINALITY
         AS i({columns}, ord)
  LEFT JOIN LATERAL (SELECT * FROM {{0}} WHERE group_id = i.g) AS s ON true{joins}
), {levels}decided AS MATERIALIZED (
  SELECT *, {changed} AS changed{holder}{waits}
  FROM (
    SELECT *, {together} AS k
    FROM (
      SELECT *, least(may, CASE WHEN slots IS NULL THEN n ELSE greatest(spare, 0) END) AS can
      FROM (
        SELECT *, slots - others - kept{before} AS spare
        FROM (SELECT *, {may} AS may, {kept} AS kept FROM (SELECT *, CASE WHEN each IS NULL THEN 0 ELSE @ahead@ END AS ahead FROM {source} OFFSET 0) AS q
          OFFSET 0) AS e
        OFFSET 0) AS f
      OFFSET 0) AS r
    OFFSET 0) AS p
), d AS MATERIALIZED ({after}
), v AS MATERIALIZED (
  SELECT g, @new_version@ AS version, @new_updated@ AS updated_at,
         CASE WHEN slots IS NULL THEN coalesce(current_concurrent, 0)
              ELSE least(others + kept + k, 2147483647)::int4 END AS in_use,
         CASE WHEN k = 0 THEN coalesce(last, @epoch@){window_last}
              WHEN each IS NULL THEN now
              ELSE @new_last@ END AS last
  FROM d WHERE k > 0 OR changed
), w AS (
  INSERT INTO {{0}} AS t (group_id, last_acquisition_at, version, current_concurrent, updated_at)
  SELECT g, last, version, in_use, updated_at FROM v
  ON CONFLICT (group_id) DO UPDATE
  SET last_acquisition_at = excluded.last_acquisition_at, version = excluded.version,
      current_concurrent = excluded.current_concurrent, updated_at = excluded.updated_at
  WHERE @cas@
  RETURNING group_id, @stamp@
), a AS MATERIALIZED (
  SELECT d.*, w.stamp, w.group_id IS NOT NULL AS wrote FROM d LEFT JOIN w ON w.group_id = d.g
){steps}
SELECT ord, k, ahead, {stamp}, may, spare - k AS free, lost, wrote{answer}
FROM a WHERE wrote OR NOT (k > 0 OR changed))",
      fmt::arg("read", p.read), fmt::arg("types", p.types), fmt::arg("columns", p.columns),
      fmt::arg("joins", p.joins), fmt::arg("levels", shape.windows ? "@window_levels@, " : ""),
      fmt::arg("before", waiters ? " - coalesce(before, 0)" : ""),
      fmt::arg("waits",
               waiters ? ", slots IS NOT NULL AND queued > k AND may > k AND spare <= k AS waits" : ""),
      fmt::arg("changed", p.changed), fmt::arg("holder", p.holder),
      fmt::arg("together", shape.together ? "min(can) OVER (PARTITION BY bundle)" : "can"),
      fmt::arg("may", shape.windows ? kMayByWindow : kMayByRate), fmt::arg("kept", p.kept),
      fmt::arg("source", shape.windows ? "x" : "l"),
      fmt::arg("after", shape.windows ? kAfter : "SELECT * FROM decided"),
      fmt::arg(
          "window_last",
          shape.windows
              ? "\n              WHEN algo > 0 THEN @epoch@ + greatest(at1, us) * interval '1 microsecond'"
              : ""),
      fmt::arg("steps", p.in_steps),
      fmt::arg("stamp", shape.windows ? "CASE WHEN algo > 0 THEN total1 ELSE stamp END" : "stamp"),
      fmt::arg("answer", p.answer));
  return fill(text, tables);
}

}  // namespace ratesync::postgres
