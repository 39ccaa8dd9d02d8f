#include "ratesync/postgres/libpq.h"

#include <sys/socket.h>
#include <unistd.h>

namespace ratesync::postgres {

Notice notice_of(const PGresult* result) {
  const auto field = [result](int code) {
    const char* text = PQresultErrorField(result, code);
    return std::string(text ? text : "");
  };
  return {field(PG_DIAG_SEVERITY_NONLOCALIZED), field(PG_DIAG_SQLSTATE), field(PG_DIAG_MESSAGE_PRIMARY)};
}

Link::Link(asio::io_context& io, PGconn* conn) : io_(io), conn_(conn) {
  // libpq's own receiver writes to stderr, which belongs to the application.
  PQsetNoticeReceiver(conn_, &Link::receive_notice, this);
}

Link::~Link() {
  if (!conn_) return;
  detach();
  if (doomed_ && PQsocket(conn_) >= 0) ::shutdown(PQsocket(conn_), SHUT_RDWR);
  PQfinish(conn_);
}

bool Link::attach() {
  detach();
  const int fd = PQsocket(conn_);
  if (fd < 0) return false;
  auto socket = std::make_unique<asio::posix::stream_descriptor>(io_);
  asio::error_code ec;
  socket->assign(fd, ec);
  if (ec) return false;
  socket_ = std::move(socket);
  return true;
}

void Link::detach() {
  if (!socket_) return;
  socket_->release();
  socket_.reset();
}

void Link::abandon_after_fork() {
  const int fd = PQsocket(conn_);
  if (fd >= 0) ::close(fd);
  (void)socket_.release();
  conn_ = nullptr;
}

void Link::receive_notice(void* self, const PGresult* result) {
  static_cast<Link*>(self)->notice_ = notice_of(result);
}

}  // namespace ratesync::postgres
