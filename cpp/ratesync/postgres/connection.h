// One non-blocking libpq connection on the engine's Asio loop. The only header that a user of
// PostgreSQL inside this folder needs; `libpq-fe.h` stays behind libpq.h.
//
// Everything happens on the I/O thread. A time-out drops the connection (PQcancel of libpq 15
// blocks and is unencrypted). A connection runs one pipeline at a time. Callbacks never run inside
// the call that they were given to; inside a callback everything is allowed: another run, close,
// letting go of the last reference. Work under way keeps the connection alive until its callback
// has run, exactly once.
#pragma once

#include <asio/io_context.hpp>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "ratesync/base/clock.h"
#include "ratesync/base/status.h"
#include "ratesync/postgres/conninfo.h"

namespace ratesync::postgres {

// `name` empty: unnamed. A named one is prepared on first use of each connection when the connection
// may keep statements (see Connection::named_statements).
struct Statement {
  std::string name;
  std::string sql;
  bool binary_rows = false;  // its rows come in binary format
};

struct Param {
  std::optional<std::string> value;  // nullopt: NULL
  bool binary = false;               // in the binary format of its type
  static Param null() { return {}; }
  static Param text(std::string v) { return Param{std::move(v)}; }
  static Param bytes(std::string v) { return Param{std::move(v), true}; }
};

// One statement of a pipeline.
struct Call {
  const Statement* statement = nullptr;  // outlives the pipeline
  std::vector<Param> params;
  // A Sync follows: the transaction ends here, and what comes behind is another one. Behind the last
  // call there is always one.
  bool sync = false;
};

// Rows of one statement, owned (a PGresult behind a unique_ptr). Text format, but for Statement::binary_rows.
class Rows {
 public:
  virtual ~Rows() = default;
  [[nodiscard]] virtual int rows() const = 0;
  [[nodiscard]] virtual int columns() const = 0;
  [[nodiscard]] virtual bool is_null(int row, int column) const = 0;
  [[nodiscard]] virtual std::string_view text(int row, int column) const = 0;
  [[nodiscard]] std::int64_t integer(int row, int column) const;  // 0 for NULL
  [[nodiscard]] bool boolean(int row, int column) const { return text(row, column) == "t"; }
  // Binary format, of int2, int4, int8 or bool; 0 for NULL.
  [[nodiscard]] std::int64_t number(int row, int column) const;
};
using RowsPtr = std::unique_ptr<Rows>;

// What a pipeline brought: all of its results, or the first error. code:
//   server      the server refused a statement (sqlstate set); nothing of the pipeline was committed
//   unavailable not sent: certainly not executed
//   in_doubt    sent, connection lost or timed out before the answer
struct PipelineResult {
  // One of the pipeline's transactions.
  struct Part {
    bool answered = false;  // its end is known: `status` says whether it committed
    Status status;
    std::string server_message;
  };
  Status status;                 // of several transactions: the first that is not ok
  std::vector<RowsPtr> results;  // one per call when ok; of several transactions: null where one failed
  std::vector<Part> parts;       // one per transaction. After a loss some may be answered nevertheless
  std::size_t failed_call = 0;   // index, when status.code == server
  // The server's bare primary message, when status.code == server: for from_server() in errors.h
  // with the schema and table that only the caller knows.
  std::string server_message;
};

struct ConnectionOptions {
  Nanos connect_timeout = 5 * kSecond;  // per host, name look-up included; connect_timeout in the url wins
  Nanos command_timeout = 5 * kSecond;  // per pipeline
  std::string application_name = "ratesync";
  enum class StatementCache { automatic, on, off } statement_cache = StatementCache::automatic;
};

// The server process behind a connection; all empty behind a pooler, or where nobody looked.
struct Backend {
  int pid = 0;
  std::int64_t started = 0;  // us since 1970
  std::string timeline;      // of the server's history; changes with every failover
};

inline constexpr Nanos kScriptTimeout = 600 * kSecond;

class Connection : public std::enable_shared_from_this<Connection> {
 public:
  using Done = std::function<void(Status)>;
  using PipelineDone = std::function<void(PipelineResult)>;

  static std::shared_ptr<Connection> create(asio::io_context& io, ConnInfo info, ConnectionOptions options);
  virtual ~Connection() = default;

  // Resolves, connects (host after host, as target_session_attrs wants), authenticates, and learns
  // whether a pooler sits in between (the backend's pid differs from the one in the start-up
  // packet): then statements stay unnamed unless statement_cache is on.
  virtual void connect(Done done) = 0;
  // Runs the calls as one pipeline. One Sync is one implicit transaction.
  virtual void run(std::vector<Call> calls, PipelineDone done) = 0;
  // Runs a script of several statements through the simple protocol (migrations), in the
  // transaction that the script itself opens; one left open by an error is rolled back. Results are
  // dropped. Bound by kScriptTimeout, not by command_timeout: an index may take its time.
  virtual void run_script(std::string sql, Done done) = 0;
  virtual void close() = 0;
  // In a forked child: close the descriptor, tell the server nothing, free nothing.
  virtual void abandon_after_fork() = 0;

  [[nodiscard]] virtual bool open() const = 0;
  [[nodiscard]] virtual int server_version() const = 0;  // 150018 for 15.18
  [[nodiscard]] virtual bool named_statements() const = 0;
  [[nodiscard]] virtual const Backend& backend() const = 0;
  [[nodiscard]] virtual std::string peer() const = 0;  // "host:port/database", never a password
  // The server closed an idle connection (or it broke): called at most once, not for close(), and
  // not when a pipeline is under way: that one's result says it.
  virtual void on_broken(std::function<void(Status)> listener) = 0;
  // LISTEN: called with channel and payload of what the server tells. The listener may close.
  virtual void on_notice(std::function<void(const std::string&, const std::string&)> listener) = 0;
};

// Encoders for array parameters.
std::string array_of_text(const std::vector<std::string_view>& values);  // {"a","b"}, quoted and escaped
std::string array_of_int(const std::vector<std::int64_t>& values);

// Characters of valid UTF-8 without NUL, or -1.
std::ptrdiff_t utf8_length(std::string_view text);

// PostgreSQL identifier: quoted, embedded quotes doubled. The length and NUL are checked by
// check_identifier, with a message that names the option.
std::string quote_identifier(std::string_view name);
Status check_identifier(std::string_view option, std::string_view name);

}  // namespace ratesync::postgres
