#include "ratesync/base/format.h"

namespace ratesync {

std::string format_args(fmt::string_view format, fmt::format_args args) { return fmt::vformat(format, args); }

}  // namespace ratesync
