// A PostgreSQL store whose connections a test can stall, cut and heal.
#pragma once

#include "limit_rig.h"
#include "tcp_proxy.h"

namespace ratesync::testing {

inline std::string through(const TcpProxy& proxy, const std::string& url) {
  const postgres::ConnInfo info = postgres::parse_conninfo(url).value();
  std::string out = "host=127.0.0.1 port=" + std::to_string(proxy.port());
  for (const auto& [key, value] : info.settings) out += " " + key + "='" + value + "'";
  return out;
}

inline std::uint16_t port_of(const std::string& url) {
  return static_cast<std::uint16_t>(std::stoi(postgres::parse_conninfo(url).value().hosts.front().port));
}

// A store behind a proxy on a loop of its own thread's choosing: the process drives both.
struct Behind {
  explicit Behind(const Schema& schema, Nanos command_timeout = 4 * kSecond)
      : url(PostgresServer::instance().url()),
        proxy(std::make_unique<TcpProxy>(proxy_io, port_of(url))),
        process(std::make_unique<Process>(schema, [&](postgres::PostgresOptions& options) {
          options.url = through(*proxy, url);
          options.command_timeout = command_timeout;
          options.connect_timeout = 5 * kSecond;
        })) {}
  // Both loops turn until `ready`.
  bool until(const std::function<bool()>& ready) {
    return process->until([&] {
      proxy_io.restart();
      proxy_io.poll();
      return ready();
    });
  }
  store::AcquireReply acquire(const store::GroupRef& group) {
    Request request;
    request.group = group;
    process->store->limits()->acquire(&request);
    EXPECT_TRUE(until([&] { return request.answered; }));
    return request.reply;
  }
  void heal() {
    const std::uint16_t port = proxy->port();
    proxy.reset();
    proxy_io.restart();
    proxy_io.poll();
    proxy = std::make_unique<TcpProxy>(proxy_io, port_of(url), port);
  }
  ~Behind() {
    bool closed = false;
    process->store->close([&] { closed = true; });
    EXPECT_TRUE(until([&] { return closed; }));
    process->store.reset();
  }

  std::string url;
  asio::io_context proxy_io;
  std::unique_ptr<TcpProxy> proxy;
  std::unique_ptr<Process> process;
};

}  // namespace ratesync::testing
