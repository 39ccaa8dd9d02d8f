/* The floor: one statement over one connection with nothing in between but libpq, in pipeline mode.
 *
 *   raw_libpq CONNINFO STATEMENT PARAMETER SECONDS DEPTH
 *
 * Keeps DEPTH executions of the prepared STATEMENT under way, each its own transaction (a Sync after each),
 * for SECONDS, and prints {"operations": n, "seconds": s, "p50": s, "p99": s}. With DEPTH 1 p50 is the raw round
 * trip. Trap avoided: times are taken around send and answer of each operation, not divided out of a total,
 * so a pipeline's latency is not mistaken for its period.
 */
#include <libpq-fe.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define MAX_DEPTH 10000
#define MAX_SAMPLES 20000000

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void die(const char *what, PGconn *conn) {
  fprintf(stderr, "%s: %s\n", what, PQerrorMessage(conn));
  exit(1);
}

static int by_value(const void *a, const void *b) {
  const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
  return (x > y) - (x < y);
}

int main(int argc, char **argv) {
  if (argc != 6) {
    fprintf(stderr, "usage: raw_libpq CONNINFO STATEMENT PARAMETER SECONDS DEPTH\n");
    return 2;
  }
  const char *const values[1] = {argv[3]};
  const double seconds = atof(argv[4]);
  const int depth = atoi(argv[5]);
  if (depth < 1 || depth > MAX_DEPTH) return 2;

  PGconn *conn = PQconnectdb(argv[1]);
  if (PQstatus(conn) != CONNECTION_OK) die("connect", conn);
  PGresult *prepared = PQprepare(conn, "op", argv[2], 1, NULL);
  if (PQresultStatus(prepared) != PGRES_COMMAND_OK) die("prepare", conn);
  PQclear(prepared);
  if (PQsetnonblocking(conn, 1) != 0 || !PQenterPipelineMode(conn)) die("pipeline mode", conn);

  static int64_t sent_at[MAX_DEPTH];
  int64_t *samples = malloc(sizeof(int64_t) * MAX_SAMPLES);
  int64_t sent = 0, answered = 0, count = 0;
  const int64_t begin = now_ns();
  const int64_t end = begin + (int64_t)(seconds * 1e9);
  int64_t now = begin;
  struct pollfd wait = {PQsocket(conn), 0, 0};

  while (now < end || answered < sent) {
    while (now < end && sent - answered < depth) {
      sent_at[sent % depth] = now_ns();
      if (!PQsendQueryPrepared(conn, "op", 1, values, NULL, NULL, 0) || !PQpipelineSync(conn)) die("send", conn);
      ++sent;
    }
    const int unsent = PQflush(conn);
    if (unsent < 0) die("flush", conn);
    wait.events = POLLIN | (unsent ? POLLOUT : 0);
    if (poll(&wait, 1, 10000) <= 0) die("poll", conn);
    if (wait.revents & ~POLLOUT && !PQconsumeInput(conn)) die("read", conn);
    now = now_ns();
    while (answered < sent && !PQisBusy(conn)) {
      PGresult *result = PQgetResult(conn);
      if (!result) continue;
      const ExecStatusType status = PQresultStatus(result);
      if (status == PGRES_TUPLES_OK && PQntuples(result) != 1) die("the statement refused", conn);
      if (status != PGRES_TUPLES_OK && status != PGRES_PIPELINE_SYNC) die(PQresultErrorMessage(result), conn);
      PQclear(result);
      if (status != PGRES_PIPELINE_SYNC) continue;
      if (count < MAX_SAMPLES) samples[count++] = now - sent_at[answered % depth];
      ++answered;
    }
  }
  const double elapsed = (double)(now - begin) / 1e9;
  PQfinish(conn);
  qsort(samples, (size_t)count, sizeof(int64_t), by_value);
  printf("{\"operations\": %lld, \"seconds\": %.6f, \"p50\": %.9f, \"p99\": %.9f}\n", (long long)answered, elapsed,
         (double)samples[count / 2] / 1e9, (double)samples[count - 1 - count / 100] / 1e9);
  free(samples);
  return 0;
}
