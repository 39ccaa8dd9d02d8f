#include "ratesync/redis/errors.h"

#include <algorithm>
#include <array>

#include "ratesync/base/format.h"

namespace ratesync::redis {
namespace {

bool is_kind(std::string_view word) {
  return word.size() >= 2 && std::all_of(word.begin(), word.end(), [](char c) {
           return (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
         });
}

std::string_view first_word(std::string_view text) {
  const std::string_view word = text.substr(0, text.find_first_of(" \r\n"));
  return is_kind(word) ? word : std::string_view();
}

std::string user_of(const ErrorContext& c) {
  return c.user.empty() ? "the default user" : formatted("user \"{}\"", c.user);
}

std::string at(const ErrorContext& c) { return c.peer.empty() ? "" : " at " + c.peer; }

// What to do, as sentences; empty where nothing general can be said.
std::string cure(std::string_view kind, std::string_view error, const ErrorContext& c) {
  const auto says = [error](std::string_view text) { return error.find(text) != std::string_view::npos; };
  if (kind == "NOAUTH")
    return "The server wants a password: put it into the url (redis://:PASSWORD@host, or user:PASSWORD) or "
           "set the option password.";
  if (kind == "WRONGPASS")
    return formatted("Check the password of {} in the url or the option password, and ACL LIST.", user_of(c));
  if (kind == "NOPERM")
    return formatted(
        "Let an administrator give {} what is missing: ACL SETUSER {} ~<key_prefix>* "
        "&<key_prefix>* +@all -@admin -@dangerous +info +role. `ratesync doctor` names the commands.",
        user_of(c), c.user.empty() ? "default" : c.user);
  if (kind == "OOM")
    return "The server is at its maxmemory and may not evict: raise maxmemory, or keep this on a server of "
           "its "
           "own. With a maxmemory-policy that evicts it would forget limits, locks and dedup keys.";
  if (kind == "LOADING") return "It reads its data from disk after a start; this is tried again by itself.";
  if (kind == "READONLY")
    return "It is a replica: name the primary in the url, or use redis+sentinel:// to have it found. The "
           "connection is made anew by itself.";
  if (kind == "MASTERDOWN")
    return "It is a replica that lost its primary (replica-serve-stale-data no): name the primary in the "
           "url, or use redis+sentinel://.";
  if (kind == "MISCONF")
    return "It stopped writing because its snapshots fail: look at its log, and at the disk that holds its "
           "dir.";
  if (kind == "NOREPLICAS") return "Fewer replicas are connected than min-replicas-to-write demands.";
  if (kind == "BUSY")
    return "Another script has run for longer than busy-reply-threshold; this is tried again by itself. "
           "SCRIPT KILL ends that script.";
  if (kind == "CLUSTERDOWN")
    return "Some slots of the cluster have no primary: CLUSTER INFO says more; this is tried again by "
           "itself.";
  if (kind == "MOVED" || kind == "ASK")
    return "It is a node of a cluster: use a redis+cluster:// url that names some of its nodes.";
  if (kind == "CROSSSLOT")
    return "The keys lie in different slots of the cluster: give them one hash tag, {...}.";
  if (kind == "NOSCRIPT") return "The server forgot the script right after it was loaded.";
  if (kind == "DENIED")
    return "The server is in protected mode: set a password (requirepass) or its bind addresses.";
  if (kind == "WRONGTYPE")
    return "Something else keeps data under this key: choose another prefix (key_prefix for limits) or db.";
  if (says("max number of clients"))
    return "It has no room for another client: raise maxclients, or lower pool_max_size of the processes.";
  if (says("AUTH") && says("without any password"))
    return "The server has no password: remove it from the url and the options.";
  if (says("invalid username-password") || says("invalid password"))
    return formatted("Check the password of {} in the url or the option password.", user_of(c));
  if (says("wrong number of arguments for 'auth'"))
    return "The server is older than Redis 6 and knows no users: give only a password.";
  if (says("DB index is out of range") || says("invalid DB index"))
    return "Choose a db below the server's setting \"databases\" (16 unless set).";
  if (says("SELECT is not allowed in cluster mode"))
    return "A cluster has only db 0: remove the db from the url and the options.";
  if (says("unknown command"))
    return "Redis 6.2 or later, or Valkey, is needed, and the command must not be renamed or disabled.";
  return {};
}

// Nothing was executed, and the same may work in a moment or elsewhere.
bool cannot_serve_now(std::string_view kind, std::string_view error) {
  static constexpr std::array kinds = {"LOADING",  "MASTERDOWN", "READONLY", "CLUSTERDOWN",
                                       "TRYAGAIN", "BUSY",       "MISCONF",  "NOREPLICAS"};
  return std::find(kinds.begin(), kinds.end(), kind) != kinds.end() ||
         error.find("max number of clients") != std::string_view::npos;
}

}  // namespace

std::string_view kind_of(std::string_view error) {
  // Redis 6.2 wraps what a script met: "ERR Error running script (...): @user_script:7: -OOM command
  // not allowed ..."; later versions pass it on as it is.
  if (error.find("script") != std::string_view::npos) {
    for (std::size_t i = error.find(": -"); i != std::string_view::npos; i = error.find(": -", i + 1))
      if (const std::string_view inner = first_word(error.substr(i + 3)); !inner.empty()) return inner;
  }
  // What a script may not call or touch is reported as an error of the script.
  if (error.find("The user executing the script can't") != std::string_view::npos) return "NOPERM";
  const std::string_view word = first_word(error);
  return word.empty() ? std::string_view("ERR") : word;
}

Status from_server(std::string_view error, const ErrorContext& context) {
  const std::string_view kind = kind_of(error);
  std::string message =
      formatted("Redis{}{}{}: {}", at(context), context.command.empty() ? "" : ", ", context.command, error);
  if (const std::string todo = cure(kind, error, context); !todo.empty()) {
    if (message.back() != '.') message += '.';
    message += ' ' + todo;
  }
  return Status::make(cannot_serve_now(kind, error) ? Code::unavailable : Code::server, std::move(message),
                      std::string(kind));
}

Result<Reply> checked(Reply reply, const ErrorContext& context) {
  if (reply.kind == Reply::Kind::error) return from_server(reply.text, context);
  return reply;
}

bool is_wrong_role(std::string_view kind) { return kind == "READONLY" || kind == "MASTERDOWN"; }

}  // namespace ratesync::redis
