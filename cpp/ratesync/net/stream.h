// One byte stream to a server, on the I/O thread: TCP, a Unix socket, or TLS over TCP.
//
// Names are resolved without blocking, and every address is tried within one deadline. Callbacks run on
// the loop, never inside the call they were given to, and not at all after close(). A pending call keeps
// the stream alive.
#pragma once

#include <asio/io_context.hpp>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "ratesync/base/clock.h"
#include "ratesync/base/status.h"

namespace ratesync::net {

struct TlsOptions {
  bool on = false;
  bool verify = true;     // the certificate's chain and that it names the host
  std::string ca_file;    // PEM; empty: the system's authorities
  std::string cert_file;  // of the client, PEM; empty: none
  std::string key_file;   // PEM; empty: it is in cert_file
  bool operator==(const TlsOptions&) const = default;
};

struct StreamTarget {
  std::string host;  // name or numeric address, IPv6 without brackets
  std::uint16_t port = 0;
  std::string path;  // a Unix socket: then host, port and tls do not count
  TlsOptions tls;

  // "host:port", "[::1]:6379" or the path.
  [[nodiscard]] std::string describe() const;
  bool operator==(const StreamTarget&) const = default;
};

class Stream : public std::enable_shared_from_this<Stream> {
 public:
  using Done = std::function<void(Status)>;
  // Bytes read into the buffer, never 0 when ok; an end of stream is Code::unavailable.
  using Received = std::function<void(Status, std::size_t)>;

  static std::shared_ptr<Stream> create(asio::io_context& io, StreamTarget target);
  virtual ~Stream() = default;

  // Once. Resolves, connects and shakes hands within `timeout`. Errors say host, port and elapsed time:
  // unavailable (nobody there, no answer), invalid (certificate files of ours), server (TLS refused).
  virtual void connect(Nanos timeout, Done done) = 0;
  // One at a time; `into` must stay valid until the answer or close().
  virtual void read(char* into, std::size_t size, Received done) = 0;
  // One at a time; `bytes` must stay valid until the answer. True: all of it went into the socket at
  // once and `done` will not be called.
  virtual bool write(std::string_view bytes, Done done) = 0;
  virtual void close() = 0;
  // In a forked child: closes the descriptor, sends nothing, frees nothing.
  virtual void abandon_after_fork() = 0;
};

}  // namespace ratesync::net
