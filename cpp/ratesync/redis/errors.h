// One map from what a Redis server says to what it means for us: which Code, and a message that says
// the cure. Everything that turns an error reply into words goes through here.
#pragma once

#include <string>
#include <string_view>

#include "ratesync/base/status.h"
#include "ratesync/redis/reply.h"

namespace ratesync::redis {

// What the message can name. Empty fields are left out.
struct ErrorContext {
  std::string peer;     // host:port
  std::string user;     // of the url
  std::string command;  // or the script's name
};

// The first word of an error reply, its kind: "NOSCRIPT", "MOVED", "ERR". Also where a script passed
// on the error of a command that it called.
std::string_view kind_of(std::string_view error);

// The server's refusal. Status::sqlstate carries kind_of(error). Code::unavailable when it cannot serve
// at the moment and has executed nothing (LOADING, MASTERDOWN, READONLY, CLUSTERDOWN, TRYAGAIN, BUSY,
// MISCONF, NOREPLICAS, too many clients); Code::server otherwise. The text is repeated, with the cure.
Status from_server(std::string_view error, const ErrorContext& context);

// The reply, or the Status of a reply that is an error.
Result<Reply> checked(Reply reply, const ErrorContext& context);

// The server is a replica or lost its primary: another one should be found, or the same connected anew.
bool is_wrong_role(std::string_view kind);

}  // namespace ratesync::redis
