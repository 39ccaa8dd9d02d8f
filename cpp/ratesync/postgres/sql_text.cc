#include "ratesync/postgres/sql_text.h"

#include "ratesync/base/format.h"

namespace ratesync::postgres {

std::string fill(std::string text, const LimitTables& tables) {
  const auto replace = [&text](std::string_view from, const std::string& to) {
    for (std::size_t at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size()))
      text.replace(at, from.size(), to);
  };
  // Fragments may hold fragments, so the outer ones come first; the names, which may hold anything,
  // come last and are never looked into.
  replace("@window_levels@", kWindowLevels);
  replace("@window_remaining@", kWindowRemaining);
  replace("@window_full_after@", kWindowFullAfter);
  // A row may have been purged before the last entries of its log; and another algorithm starts
  // afresh, above the numbers that were used.
  replace("@window_columns@", R"(
         CASE WHEN w.algorithm = i.algo THEN w.total ELSE coalesce(w.total, @newest@) END AS total,
         CASE WHEN w.algorithm = i.algo THEN w.dealt_at ELSE 0 END AS at,
         CASE WHEN w.algorithm = i.algo THEN w.current ELSE @newest@ END AS cur,
         CASE WHEN w.algorithm = i.algo THEN w.previous WHEN w.algorithm IS NOT NULL THEN @newest@ ELSE 0 END AS prev)");
  replace("@newest@",
          "CASE WHEN i.algo = 1 THEN coalesce((SELECT e.seq FROM {3} AS e WHERE e.group_id = i.g ORDER BY "
          "e.seq DESC LIMIT 1), 0) ELSE 0 END");
  replace("@epoch@", "'1970-01-01 00:00:00+00'::timestamptz");
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
  const std::string* const names[] = {&tables.state, &tables.leases, &tables.windows, &tables.log,
                                      &tables.waiters};
  std::string out;
  out.reserve(text.size() + 16 * tables.state.size());
  for (std::size_t at = 0; at < text.size(); ++at) {
    if (text[at] == '{' && at + 2 < text.size() && text[at + 2] == '}' && text[at + 1] >= '0' &&
        text[at + 1] <= '4') {
      out += *names[text[at + 1] - '0'];
      at += 2;
    } else {
      out += text[at];
    }
  }
  return out;
}

Statement named(std::string_view verb, std::string sql) {
  std::uint64_t hash = 0xcbf29ce484222325ull;  // FNV-1a
  for (const char ch : sql) hash = (hash ^ static_cast<unsigned char>(ch)) * 0x100000001b3ull;
  return {formatted("ratesync_{}_{:016x}", verb, hash), std::move(sql)};
}

}  // namespace ratesync::postgres
