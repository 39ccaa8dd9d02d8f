// What is right and wrong with a Redis deployment for limits, state and locks, in words.
#pragma once

#include <string>
#include <vector>

#include "ratesync/redis/commander.h"
#include "ratesync/redis/keys.h"
#include "ratesync/store/store.h"

namespace ratesync::redis {

struct Patient {
  Commander& commander;  // outlives the examination, or answers it with Code::closed
  const Keys& keys;
  Nanos deadline = 0;  // of each question
  std::size_t pool_max_size = 0;
  std::vector<std::string> prefixes;  // of state and locks, as far as they were used
};

void examine(const Patient& patient, store::Callback<std::vector<store::Finding>> done);

}  // namespace ratesync::redis
