// The Lua of the capabilities: parts in lua/*.lua, put together and hashed at build time by
// lua/embed.cmake.
#pragma once

#include "ratesync/redis/commander.h"

namespace ratesync::redis {

const Script& limit_script();  // every operation on limits but the next two
const Script& renew_script();  // leases that go on
const Script& list_script();   // what one key holds, for people

}  // namespace ratesync::redis
