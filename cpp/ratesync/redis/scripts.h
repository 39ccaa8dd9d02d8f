// The Lua of the capabilities: parts in lua/*.lua, put together and hashed at build time by
// lua/embed.cmake.
#pragma once

#include "ratesync/redis/commander.h"

namespace ratesync::redis {

const Script& limit_script();    // every operation on limits but the next two
const Script& renew_script();    // leases that go on
const Script& list_script();     // what one key holds, for people
const Script& state_script();    // every operation on rows and timeouts
const Script& locks_script();    // every operation on locks
const Script& recover_script();  // what became of a call to those two whose answer was lost
const Script& purge_script();    // rows that are over
const Script& due_script();      // timeouts that fell due

}  // namespace ratesync::redis
