// The TLS side of a Stream: a context made of TlsOptions, and what went wrong in words.
#pragma once

#include <asio/error_code.hpp>
#include <asio/ssl/context.hpp>
#include <memory>
#include <string>

#include "ratesync/base/status.h"
#include "ratesync/net/stream.h"

namespace ratesync::net {

// Read anew for every connection, so that renewed certificates are taken up.
Result<std::shared_ptr<asio::ssl::context>> make_tls_context(const TlsOptions& options);

// Names the server (SNI) and, with verification on, demands that its certificate is for `host`.
Status prepare_tls(SSL* ssl, const std::string& host, const TlsOptions& options);

// Why the handshake failed, with the cure where the certificate was at fault.
Status tls_failure(SSL* ssl, const asio::error_code& ec, const StreamTarget& target);

}  // namespace ratesync::net
