// The one place that knows all backends: makes a Store from its configured options.
#pragma once

#include <asio/io_context.hpp>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <variant>

#include "ratesync/base/clock.h"
#include "ratesync/base/status.h"
#include "ratesync/store/store.h"

namespace ratesync::engine {

using Option = std::variant<bool, std::int64_t, double, std::string>;
using StoreOptions = std::map<std::string, Option>;

Result<std::unique_ptr<store::Store>> make_store(const std::string& kind, const StoreOptions& options,
                                                 asio::io_context& io, const Clock& clock);

}  // namespace ratesync::engine
