// Status and Result: how the core reports failure without exceptions.
//
// A Status is what went wrong with the *store* (or the call); business outcomes - denied, stale,
// held, duplicate - are ordinary values and never travel in a Status. No exception crosses a
// folder of the core.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <variant>

namespace ratesync {

enum class Code {
  ok,
  invalid,      // the caller's input was refused before anything was sent
  cancelled,    // the caller gave up
  timeout,      // a deadline passed; certainly not executed unless said otherwise
  unavailable,  // the store cannot be reached; certainly not executed
  in_doubt,     // sent, answer lost: executed or not
  exhausted,    // a bound of ours is full (queue, pool)
  protocol,     // the store answered something we do not understand
  server,       // the server refused: see sqlstate
  closed,       // the engine or the store was shut down
  internal,     // a bug of ours
};

std::string_view to_string(Code code);

struct [[nodiscard]] Status {
  Code code = Code::ok;
  std::string sqlstate;  // five characters when the server named one
  std::string message;   // for a human: what, where, what to do; never a password

  static Status success() { return {}; }
  static Status make(Code code, std::string message, std::string sqlstate = {}) {
    return Status{code, std::move(sqlstate), std::move(message)};
  }
  [[nodiscard]] bool ok() const { return code == Code::ok; }
};

template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::move(value)) {}         // NOLINT(google-explicit-constructor)
  Result(Status status) : state_(std::move(status)) {}  // NOLINT(google-explicit-constructor)

  [[nodiscard]] bool ok() const { return state_.index() == 0; }
  [[nodiscard]] const Status& status() const {
    static const Status success;
    return ok() ? success : std::get<1>(state_);
  }
  T& value() { return std::get<0>(state_); }
  const T& value() const { return std::get<0>(state_); }

 private:
  std::variant<T, Status> state_;
};

}  // namespace ratesync
