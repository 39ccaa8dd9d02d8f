#include "ratesync/base/status.h"

namespace ratesync {

std::string_view to_string(Code code) {
  switch (code) {
    case Code::ok: return "ok";
    case Code::invalid: return "invalid";
    case Code::cancelled: return "cancelled";
    case Code::timeout: return "timeout";
    case Code::unavailable: return "unavailable";
    case Code::in_doubt: return "in_doubt";
    case Code::exhausted: return "exhausted";
    case Code::protocol: return "protocol";
    case Code::server: return "server";
    case Code::closed: return "closed";
    case Code::internal: return "internal";
  }
  return "internal";
}

}  // namespace ratesync
