// One pipeline on one PGconn: sends the calls with one Sync, and picks the results off as libpq has
// parsed them. Knows nothing of sockets, timers or callbacks; connection.cc does.
#pragma once

#include <cstdint>
#include <string>
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
    again,     // a named statement was not what we believed; nothing was committed: send() once more
  };

  Pipeline(std::vector<Call> calls, StatementNames& names) : calls_(std::move(calls)), names_(names) {}

  // Queues everything at libpq. False: libpq refused, and the Sync was not queued: nothing can have
  // been committed.
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
  };

  // False: the session is over.
  bool note_error(Notice error);
  // At the Sync: all answers are in.
  Progress conclude(const ErrorContext& context);
  // True when the error is about our belief in a named statement, not about the caller's SQL.
  bool forget_name(const Step& step);

  std::vector<Call> calls_;
  StatementNames& names_;
  std::vector<Step> steps_;
  std::size_t at_ = 0;
  bool step_answered_ = false;
  bool plain_ = false;      // second try: no names
  std::size_t failed_ = 0;  // step of error_
  Notice error_;
  Notice farewell_;
  PipelineResult result_;
};

}  // namespace ratesync::postgres
