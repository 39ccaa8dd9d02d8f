#include "ratesync/net/tls.h"

#include <openssl/ssl.h>
#include <openssl/x509v3.h>

#include <asio/ssl/error.hpp>

#include "ratesync/base/format.h"
#include "ratesync/net/resolver.h"

namespace ratesync::net {
namespace {

Status bad_file(std::string_view what, std::string_view option, const std::string& file,
                const asio::error_code& ec) {
  return Status::make(
      Code::invalid,
      formatted("cannot use the {} \"{}\" ({}): {}. A PEM file that this process may read is wanted.", what,
                file, option, ec.message()));
}

}  // namespace

Result<std::shared_ptr<asio::ssl::context>> make_tls_context(const TlsOptions& options) {
  auto context = std::make_shared<asio::ssl::context>(asio::ssl::context::tls_client);
  SSL_CTX_set_min_proto_version(context->native_handle(), TLS1_2_VERSION);
  asio::error_code ec;
  // Without this OpenSSL would ask for the key's passphrase on the terminal.
  context->set_password_callback(
      [](std::size_t, asio::ssl::context::password_purpose) { return std::string(); }, ec);
  context->set_verify_mode(options.verify ? asio::ssl::verify_peer : asio::ssl::verify_none, ec);
  if (options.verify && options.ca_file.empty()) {
    context->set_default_verify_paths(ec);
    if (ec)
      return Status::make(Code::invalid, "cannot read the system's certificate authorities: " + ec.message());
  } else if (!options.ca_file.empty()) {
    context->load_verify_file(options.ca_file, ec);
    if (ec) return bad_file("authority", "ssl_ca_certs", options.ca_file, ec);
  }
  if (!options.cert_file.empty()) {
    context->use_certificate_chain_file(options.cert_file, ec);
    if (ec) return bad_file("client certificate", "ssl_certfile", options.cert_file, ec);
    const std::string& key = options.key_file.empty() ? options.cert_file : options.key_file;
    context->use_private_key_file(key, asio::ssl::context::pem, ec);
    if (ec) return bad_file("client key, without passphrase,", "ssl_keyfile", key, ec);
  }
  return context;
}

Status prepare_tls(SSL* ssl, const std::string& host, const TlsOptions& options) {
  const bool numeric = is_numeric_address(host);
  bool fine = numeric || SSL_set_tlsext_host_name(ssl, host.c_str()) == 1;
  if (options.verify) {
    fine = fine && (numeric ? X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(ssl), host.c_str()) == 1
                            : SSL_set1_host(ssl, host.c_str()) == 1);
    SSL_set_hostflags(ssl, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
  }
  if (fine) return Status::success();
  return Status::make(Code::invalid, formatted("\"{}\" is no host name that TLS can verify", host));
}

Status tls_failure(SSL* ssl, const asio::error_code& ec, const StreamTarget& target) {
  const long verdict = SSL_get_verify_result(ssl);
  if (verdict != X509_V_OK && target.tls.verify)
    return Status::make(
        Code::server,
        formatted(
            "the TLS certificate of {} was not accepted: {}. Name its authority with ssl_ca_certs=FILE, "
            "connect by a name that the certificate holds, or (testing only) set ssl_cert_reqs=none.",
            target.describe(), X509_verify_cert_error_string(verdict)));
  std::string reason = ec.message();
  if (ec == asio::ssl::error::stream_truncated || ec.category() == asio::error::get_system_category() ||
      ec.category() == asio::error::get_misc_category())
    return Status::make(
        Code::unavailable,
        formatted("TLS handshake with {} broke off: {}. Is that port TLS? Without TLS the url begins "
                  "with redis:// instead of rediss://.",
                  target.describe(), reason));
  return Status::make(Code::server,
                      formatted("TLS handshake with {} failed: {}. Does the port speak TLS (if not: redis:// "
                                "instead of rediss://), and does it want a client certificate "
                                "(ssl_certfile, ssl_keyfile)?",
                                target.describe(), reason));
}

}  // namespace ratesync::net
