// What the servers that the tests start have in common: a directory, its log, and programs that write to it.
#pragma once

#include <pwd.h>
#include <sys/types.h>

#include <functional>
#include <string>
#include <vector>

namespace ratesync::testing {

struct ServerHome {
  explicit ServerHome(const std::string& name);  // in the directory for temporary files
  ~ServerHome();
  ServerHome(const ServerHome&) = delete;
  ServerHome& operator=(const ServerHome&) = delete;

  // As `account`, when there is one. `at_our_end` is the signal that it gets then, also when a test crashes.
  pid_t spawn(const std::vector<std::string>& command, int at_our_end, const passwd* account = nullptr) const;
  [[nodiscard]] std::string log() const;
  // Throws, with the log, when the program ended (`pid` is 0 then) or a minute is over.
  void wait_until(const std::function<bool()>& ready, const std::string& program, pid_t& pid) const;

  std::string directory;
};

}  // namespace ratesync::testing
