#include "ratesync/net/resolver.h"

#include <algorithm>
#include <asio/ip/address.hpp>
#include <asio/post.hpp>

namespace ratesync::net {

bool is_numeric_address(const std::string& host) {
  asio::error_code ec;
  asio::ip::make_address(host, ec);
  return !ec;
}

void Resolver::resolve(const std::string& host, Done done) {
  cancel();
  alive_ = std::make_shared<bool>(true);
  // Ours is the only strong reference: cancel() and the destructor
  // silence it, also when it is queued already.
  std::weak_ptr<bool> alive = alive_;
  if (is_numeric_address(host)) {
    asio::post(resolver_.get_executor(), [alive, host, done = std::move(done)] {
      if (!alive.expired()) done(std::vector<std::string>{host});
    });
    return;
  }
  // An empty service: only addresses are wanted, one per socket type.
  resolver_.async_resolve(
      host, "",
      [alive, host, done = std::move(done)](const asio::error_code& ec,
                                            const asio::ip::tcp::resolver::results_type& results) {
        if (alive.expired()) return;
        if (ec) {
          done(Status::make(Code::unavailable, "cannot resolve host name \"" + host + "\": " + ec.message()));
          return;
        }
        std::vector<std::string> addresses;
        for (const auto& entry : results) {
          std::string address = entry.endpoint().address().to_string();
          if (std::find(addresses.begin(), addresses.end(), address) == addresses.end())
            addresses.push_back(std::move(address));
        }
        if (addresses.empty())
          done(Status::make(Code::unavailable, "host name \"" + host + "\" has no address"));
        else
          done(std::move(addresses));
      });
}

void Resolver::cancel() {
  if (!alive_) return;
  alive_.reset();
  resolver_.cancel();
}

}  // namespace ratesync::net
