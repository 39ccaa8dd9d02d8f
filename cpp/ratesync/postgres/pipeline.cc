#include "ratesync/postgres/pipeline.h"

#include <algorithm>
#include <charconv>

namespace ratesync::postgres {
namespace {

// Zero copy: the text stays in libpq's result.
class PgRows final : public Rows {
 public:
  explicit PgRows(ResultPtr result) : result_(std::move(result)) {}
  [[nodiscard]] int rows() const override { return PQntuples(result_.get()); }
  [[nodiscard]] int columns() const override { return PQnfields(result_.get()); }
  [[nodiscard]] bool is_null(int row, int column) const override {
    return !inside(row, column) || PQgetisnull(result_.get(), row, column) != 0;
  }
  [[nodiscard]] std::string_view text(int row, int column) const override {
    if (!inside(row, column)) return {};
    return {PQgetvalue(result_.get(), row, column),
            static_cast<std::size_t>(PQgetlength(result_.get(), row, column))};
  }

 private:
  // libpq would answer with a warning to the notice receiver of a PGconn that may be gone by now.
  [[nodiscard]] bool inside(int row, int column) const {
    return row >= 0 && row < rows() && column >= 0 && column < columns();
  }

  ResultPtr result_;
};

}  // namespace

std::int64_t Rows::integer(int row, int column) const {
  const std::string_view digits = text(row, column);
  std::int64_t value = 0;
  std::from_chars(digits.data(), digits.data() + digits.size(), value);
  return value;
}

bool Pipeline::send(PGconn* pg) {
  steps_.clear();
  at_ = 0;
  step_answered_ = false;
  failed_ = 0;
  error_ = {};
  result_ = {};
  std::unordered_set<std::string_view> new_names;
  std::vector<const char*> values;
  for (std::size_t i = 0; i < calls_.size(); ++i) {
    const Statement& statement = *calls_[i].statement;
    const bool named = names_.allowed && !plain_ && !statement.name.empty();
    values.clear();
    for (const Param& p : calls_[i].params) values.push_back(p.value ? p.value->c_str() : nullptr);
    const int n = static_cast<int>(values.size());
    if (named && !names_.prepared.contains(statement.name) && new_names.insert(statement.name).second) {
      if (!PQsendPrepare(pg, statement.name.c_str(), statement.sql.c_str(), 0, nullptr)) return false;
      steps_.push_back({i, true, true});
    }
    const int sent =
        named ? PQsendQueryPrepared(pg, statement.name.c_str(), n, values.data(), nullptr, nullptr, 0)
              : PQsendQueryParams(pg, statement.sql.c_str(), n, nullptr, values.data(), nullptr, nullptr, 0);
    if (!sent) return false;
    steps_.push_back({i, false, named});
  }
  return PQpipelineSync(pg) != 0;
}

Pipeline::Progress Pipeline::advance(PGconn* pg, const ErrorContext& context) {
  // PQgetResult never blocks after PQisBusy said no; so it is asked before each.
  while (!PQisBusy(pg)) {
    ResultPtr result(PQgetResult(pg));
    if (!result) {
      // The NULL that ends the results of one step. With nothing before it, libpq has no command
      // left and the session is not in the state we think.
      if (!step_answered_) return Progress::lost;
      step_answered_ = false;
      ++at_;
      continue;
    }
    const ExecStatusType status = PQresultStatus(result.get());
    if (status == PGRES_PIPELINE_SYNC) return conclude(context);
    step_answered_ = true;
    switch (status) {
      case PGRES_TUPLES_OK:
      case PGRES_COMMAND_OK:
      case PGRES_EMPTY_QUERY:
        if (at_ >= steps_.size()) return Progress::lost;
        if (!steps_[at_].prepare)
          result_.results.push_back(std::make_unique<PgRows>(std::move(result)));
        else  // outlives the transaction, also when that is rolled back
          names_.prepared.insert(calls_[steps_[at_].call].statement->name);
        break;
      case PGRES_PIPELINE_ABORTED: break;  // behind the error; not executed
      case PGRES_FATAL_ERROR:
        if (!note_error(notice_of(result.get()))) return Progress::lost;
        break;
      default: return Progress::lost;  // COPY: no caller of ours does that
    }
  }
  return Progress::more;
}

bool Pipeline::note_error(Notice error) {
  // FATAL: the session ends with it. No SQLSTATE: libpq's own words about a broken connection.
  if (error.fatal() || error.sqlstate.empty()) {
    farewell_ = std::move(error);
    return false;
  }
  if (!error_.sqlstate.empty()) return true;
  error_ = std::move(error);
  // Past the last step: the commit itself failed (a deferred constraint).
  failed_ = std::min(at_, steps_.empty() ? 0 : steps_.size() - 1);
  return true;
}

Pipeline::Progress Pipeline::conclude(const ErrorContext& context) {
  if (at_ < steps_.size()) return Progress::lost;
  if (error_.sqlstate.empty()) return Progress::finished;
  const Step step = steps_.empty() ? Step{} : steps_[failed_];
  if (step.named && !plain_ && forget_name(step)) {
    plain_ = true;
    return Progress::again;
  }
  result_.results.clear();
  result_.failed_call = step.call;
  result_.status = from_server(error_.sqlstate, error_.message, context);
  result_.server_message = error_.message;
  return Progress::finished;
}

bool Pipeline::forget_name(const Step& step) {
  // 26000: our statement is gone (DEALLOCATE ALL, or a pooler gave us another session). The next
  // pipeline prepares it anew.
  if (error_.sqlstate == "26000") return names_.prepared.erase(calls_[step.call].statement->name), true;
  // 42P05: the name is taken by somebody else's statement. 0A000: the plan's result type changed
  // under it (a migration). Neither gets better on this session.
  if (error_.sqlstate == "42P05" || (error_.sqlstate == "0A000" && !step.prepare)) {
    names_.allowed = false;
    return true;
  }
  return false;
}

}  // namespace ratesync::postgres
