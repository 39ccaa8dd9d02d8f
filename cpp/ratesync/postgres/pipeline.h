// One pipeline on one PGconn: sends the calls with a Sync behind each transaction, and picks the results
// off as libpq has parsed them. Knows nothing of sockets, timers or callbacks; connection.cc does.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "ratesync/postgres/connection.h"
#include "ratesync/postgres/errors.h"
#include "ratesync/postgres/libpq.h"

namespace ratesync::postgres {

// The named statements that this session is believed to hold.
struct StatementNames {
  bool allowed = false;
  std::unordered_set<std::string> prepared;
};

class Pipeline {
 public:
  enum class Progress : std::uint8_t {
    more,      // needs more input
    finished,  // result() is final, the session is ready
    lost,      // the server ended the session, or broke the protocol
    again,     // a named statement was not what we believed; send() once more what did not commit
  };

  Pipeline(std::vector<Call> calls, StatementNames& names);

  // Queues at libpq all transactions that are not answered. False: libpq refused, and the Sync of the
  // last one was not queued.
  bool send(PGconn* pg);
  // Takes what is there, without blocking.
  Progress advance(PGconn* pg, const ErrorContext& context);

  [[nodiscard]] PipelineResult& result() { return result_; }
  // Why it was lost, when the server said so.
  [[nodiscard]] const Notice& farewell() const { return farewell_; }

 private:
  struct Step {
    std::size_t call = 0;
    bool prepare = false;
    bool named = false;
    bool sync = false;  // nothing but the Sync
    std::size_t part = 0;
  };

  // False: the session is over.
  bool note_error(Notice error);
  bool send_part(PGconn* pg, std::size_t part);
  // At a Sync: all answers of its transaction are in. False: the session is not where we think it is.
  bool conclude(const ErrorContext& context);
  Progress finish();
  // True when the error is about our belief in a named statement, not about the caller's SQL.
  bool forget_name(const Step& step, const Notice& error);

  std::vector<Call> calls_;
  StatementNames& names_;
  std::vector<std::size_t> ends_;  // of the transactions: one behind the last call of each
  std::unordered_set<std::string_view> new_names_;
  std::vector<Step> steps_;
  std::size_t at_ = 0;
  bool step_answered_ = false;
  bool plain_ = false;      // second try: no names
  bool again_ = false;      // some transaction wants it
  std::size_t failed_ = 0;  // step of error_
  Notice error_;
  Notice farewell_;
  PipelineResult result_;
};

}  // namespace ratesync::postgres
