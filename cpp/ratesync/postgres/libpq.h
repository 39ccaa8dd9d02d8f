// Ownership of libpq's objects, and the marriage of a PGconn with Asio. The only file that includes
// libpq-fe.h; private to this folder's conninfo.cc, connector.cc and connection.cc.
//
// The hazard: libpq owns the descriptor and may close and reopen it, Asio registers it. So Asio
// never closes it, and is made to let go of it before libpq can close it.
#pragma once

#include <libpq-fe.h>

#include <asio/io_context.hpp>
#include <asio/posix/stream_descriptor.hpp>
#include <memory>
#include <string>
#include <utility>

namespace ratesync::postgres {

struct PgFree {
  void operator()(PGresult* r) const { PQclear(r); }
  void operator()(PQconninfoOption* o) const { PQconninfoFree(o); }
  void operator()(char* text) const { PQfreemem(text); }
};
using ResultPtr = std::unique_ptr<PGresult, PgFree>;
using OptionsPtr = std::unique_ptr<PQconninfoOption, PgFree>;
using TextPtr = std::unique_ptr<char, PgFree>;

// What the server said unasked: notices, and the FATAL that ends an idle session.
struct Notice {
  std::string severity;  // never translated: NOTICE, WARNING, FATAL ...
  std::string sqlstate;
  std::string message;
  [[nodiscard]] bool fatal() const { return severity == "FATAL" || severity == "PANIC"; }
};
Notice notice_of(const PGresult* result);

class Link {
 public:
  using Wait = asio::posix::stream_descriptor::wait_type;

  Link(asio::io_context& io, PGconn* conn);
  // Lets go of the descriptor, then PQfinish. `doomed` sockets are shut down first, so that the
  // farewell message cannot wait for anybody.
  ~Link();
  Link(const Link&) = delete;
  Link& operator=(const Link&) = delete;

  [[nodiscard]] PGconn* pg() const { return conn_; }
  [[nodiscard]] const Notice& last_notice() const { return notice_; }

  // Registers libpq's present socket with Asio. False: no socket, or the system refused.
  bool attach();
  // Before every PQconnectPoll: it may close the socket and open another under the same number.
  void detach();
  // Pending waits end with operation_aborted on detach.
  template <class Handler>
  void wait(Wait kind, Handler&& handler) {
    socket_->async_wait(kind, std::forward<Handler>(handler));
  }

  void doom() { doomed_ = true; }
  // In a forked child. Everything but the descriptor is leaked: deregistering would reach the epoll
  // set shared with the parent, PQfinish would end the parent's session.
  void abandon_after_fork();

 private:
  static void receive_notice(void* self, const PGresult* result);

  asio::io_context& io_;
  PGconn* conn_;
  std::unique_ptr<asio::posix::stream_descriptor> socket_;
  Notice notice_;
  bool doomed_ = false;
};

}  // namespace ratesync::postgres
