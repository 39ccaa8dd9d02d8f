// The connect phase: from a ConnInfo to one authenticated session, without blocking.
//
// We walk hosts and addresses ourselves and give libpq one numeric address at a time, because its
// own walk resolves names on the calling thread and knows no time-outs in non-blocking mode.
#pragma once

#include <asio/io_context.hpp>
#include <asio/steady_timer.hpp>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "ratesync/base/clock.h"
#include "ratesync/net/resolver.h"
#include "ratesync/postgres/connection.h"
#include "ratesync/postgres/errors.h"
#include "ratesync/postgres/libpq.h"

namespace ratesync::postgres {

struct Established {
  std::unique_ptr<Link> link;
  ErrorContext context;  // host, port, database, user of the session
};

class Connector : public std::enable_shared_from_this<Connector> {
 public:
  using Done = std::function<void(Result<Established>)>;

  Connector(asio::io_context& io, ConnInfo info, const ConnectionOptions& options);

  // `done` runs on the loop, never inside start().
  void start(Done done);
  void cancel();  // `done` will not run
  void abandon_after_fork();

 private:
  struct Attempt {
    std::size_t host = 0;
    std::string attrs;  // target_session_attrs
  };

  void next_host();
  void next_address();
  void connect_to(const std::string& address);
  void poll();
  void wait_for(PostgresPollingStatusType state);
  void arm(Nanos deadline, void (Connector::*expired)());
  void resolve_expired();
  void address_expired();
  void attempt_failed(Status status);
  [[nodiscard]] Status failure_of_libpq() const;
  [[nodiscard]] Status overall_failure() const;
  void finish(Result<Established> result);
  [[nodiscard]] const HostPort& host() const { return info_.hosts[plan_[at_].host]; }

  asio::io_context& io_;
  const ConnInfo info_;
  const std::string application_name_;
  Nanos timeout_;
  Clock clock_;
  std::vector<Attempt> plan_;
  std::size_t at_ = 0;
  std::vector<std::string> addresses_;  // of the present host; still to try
  Nanos host_started_ = 0;
  Nanos host_deadline_ = 0;
  std::vector<Status> failures_;
  ErrorContext context_;
  // Behind pointers because abandon_after_fork leaks them: their destructors take locks that the
  // parent's threads may hold at the time of the fork.
  std::unique_ptr<net::Resolver> resolver_;
  std::unique_ptr<asio::steady_timer> timer_;
  std::unique_ptr<Link> link_;
  std::uint64_t generation_ = 0;  // handlers of an earlier step see that they are late
  Done done_;
};

}  // namespace ratesync::postgres
