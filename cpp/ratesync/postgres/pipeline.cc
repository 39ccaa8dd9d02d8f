#include "ratesync/postgres/pipeline.h"

#include <algorithm>
#include <charconv>
#include <utility>

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

std::int64_t Rows::number(int row, int column) const {
  const std::string_view bytes = text(row, column);
  if (bytes.empty() || bytes.size() > 8) return 0;
  // Big-endian, two's complement; a bool is one byte, 0 or 1.
  std::uint64_t value = bytes.size() > 1 && (bytes[0] & 0x80) != 0 ? ~std::uint64_t{0} : 0;
  for (const char byte : bytes) value = (value << 8) | static_cast<unsigned char>(byte);
  return static_cast<std::int64_t>(value);
}

Pipeline::Pipeline(std::vector<Call> calls, StatementNames& names) : calls_(std::move(calls)), names_(names) {
  for (std::size_t i = 0; i < calls_.size(); ++i)
    if (calls_[i].sync || i + 1 == calls_.size()) ends_.push_back(i + 1);
  if (ends_.empty()) ends_.push_back(0);
  result_.parts.resize(ends_.size());
  result_.results.resize(calls_.size());
}

bool Pipeline::send(PGconn* pg) {
  steps_.clear();
  at_ = 0;
  step_answered_ = false;
  failed_ = 0;
  error_ = {};
  again_ = false;
  new_names_.clear();
  for (std::size_t part = 0; part < ends_.size(); ++part)
    if (!result_.parts[part].answered && !send_part(pg, part)) return false;
  return true;
}

bool Pipeline::send_part(PGconn* pg, std::size_t part) {
  std::vector<const char*> values;
  std::vector<int> lengths, formats;
  for (std::size_t i = part == 0 ? 0 : ends_[part - 1]; i < ends_[part]; ++i) {
    const Statement& statement = *calls_[i].statement;
    const bool named = names_.allowed && !plain_ && !statement.name.empty();
    values.clear();
    lengths.clear();
    formats.clear();
    for (const Param& p : calls_[i].params) {
      values.push_back(p.value ? p.value->c_str() : nullptr);
      lengths.push_back(p.value ? static_cast<int>(p.value->size()) : 0);
      formats.push_back(p.binary ? 1 : 0);
    }
    const int n = static_cast<int>(values.size()), rows = statement.binary_rows ? 1 : 0;
    if (named && !names_.prepared.contains(statement.name) && new_names_.insert(statement.name).second) {
      if (!PQsendPrepare(pg, statement.name.c_str(), statement.sql.c_str(), 0, nullptr)) return false;
      steps_.push_back({i, true, true, false, part});
    }
    const int sent = named ? PQsendQueryPrepared(pg, statement.name.c_str(), n, values.data(), lengths.data(),
                                                 formats.data(), rows)
                           : PQsendQueryParams(pg, statement.sql.c_str(), n, nullptr, values.data(),
                                               lengths.data(), formats.data(), rows);
    if (!sent) return false;
    steps_.push_back({i, false, named, false, part});
  }
  steps_.push_back({ends_[part], false, false, true, part});
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
      // The error of a commit comes before the Sync's own answer.
      if (at_ < steps_.size() && !steps_[at_].sync) ++at_;
      continue;
    }
    const ExecStatusType status = PQresultStatus(result.get());
    if (status == PGRES_PIPELINE_SYNC) {
      if (!conclude(context)) return Progress::lost;
      if (at_ == steps_.size()) return finish();
      continue;
    }
    step_answered_ = true;
    switch (status) {
      case PGRES_TUPLES_OK:
      case PGRES_COMMAND_OK:
      case PGRES_EMPTY_QUERY:
        if (at_ >= steps_.size() || steps_[at_].sync) return Progress::lost;
        if (!steps_[at_].prepare)
          result_.results[steps_[at_].call] = std::make_unique<PgRows>(std::move(result));
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
  // At the step of the Sync: the commit itself failed (a deferred constraint).
  failed_ = std::min(at_, steps_.size() - 1);
  return true;
}

bool Pipeline::conclude(const ErrorContext& context) {
  if (at_ >= steps_.size() || !steps_[at_].sync) return false;
  const std::size_t part = steps_[at_].part;
  ++at_;
  step_answered_ = false;
  PipelineResult::Part& answer = result_.parts[part];
  if (error_.sqlstate.empty()) return answer.answered = true;
  const Notice error = std::exchange(error_, {});
  const Step step = steps_[failed_];
  const std::size_t first = part == 0 ? 0 : ends_[part - 1];
  for (std::size_t i = first; i < ends_[part]; ++i) result_.results[i] = nullptr;
  if (step.named && !plain_ && forget_name(step, error)) return again_ = true;
  answer.answered = true;
  answer.status = from_server(error.sqlstate, error.message, context);
  answer.server_message = error.message;
  if (result_.status.ok()) {
    result_.status = answer.status;
    result_.server_message = answer.server_message;
    result_.failed_call = step.sync && step.call > first ? step.call - 1 : step.call;
  }
  return true;
}

Pipeline::Progress Pipeline::finish() {
  if (again_) {
    plain_ = true;
    return Progress::again;
  }
  if (!result_.status.ok() && ends_.size() == 1) result_.results.clear();
  return Progress::finished;
}

bool Pipeline::forget_name(const Step& step, const Notice& error) {
  // 26000: our statement is gone (DEALLOCATE ALL, or a pooler gave us another session). The next
  // pipeline prepares it anew.
  if (error.sqlstate == "26000") return names_.prepared.erase(calls_[step.call].statement->name), true;
  // 42P05: the name is taken by somebody else's statement. 0A000: the plan's result type changed
  // under it (a migration). Neither gets better on this session.
  if (error.sqlstate == "42P05" || (error.sqlstate == "0A000" && !step.prepare)) {
    names_.allowed = false;
    return true;
  }
  return false;
}

}  // namespace ratesync::postgres
