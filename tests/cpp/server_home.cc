#include "server_home.h"

#include <fcntl.h>
#include <grp.h>
#include <sys/wait.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/prctl.h>
#endif

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <thread>

namespace ratesync::testing {

ServerHome::ServerHome(const std::string& name) : directory("/tmp/ratesync-" + name + "-XXXXXX") {
  if (!mkdtemp(directory.data())) throw std::runtime_error("mkdtemp failed");
}

ServerHome::~ServerHome() {
  std::error_code ignored;
  std::filesystem::remove_all(directory, ignored);
}

pid_t ServerHome::spawn(const std::vector<std::string>& command, [[maybe_unused]] int at_our_end,
                        const passwd* account) const {
  std::vector<char*> argv;
  for (const std::string& word : command) argv.push_back(const_cast<char*>(word.c_str()));
  argv.push_back(nullptr);
  const std::string log_file = directory + "/log";
  const pid_t pid = fork();
  if (pid != 0) return pid;
  if (account && (setgroups(0, nullptr) != 0 || setgid(account->pw_gid) != 0 || setuid(account->pw_uid) != 0))
    _exit(126);
#if defined(__linux__)
  prctl(PR_SET_PDEATHSIG, at_our_end);
#endif
  const int out = open(log_file.c_str(), O_CREAT | O_WRONLY | O_APPEND, 0644);
  dup2(out, 1);
  dup2(out, 2);
  execvp(argv[0], argv.data());
  _exit(127);
}

std::string ServerHome::log() const {
  std::ifstream in(directory + "/log");
  return {std::istreambuf_iterator<char>(in), {}};
}

void ServerHome::wait_until(const std::function<bool()>& ready, const std::string& program,
                            pid_t& pid) const {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (!ready()) {
    const bool ended = waitpid(pid, nullptr, WNOHANG) == pid;
    if (ended) pid = 0;
    if (ended || std::chrono::steady_clock::now() > end)
      throw std::runtime_error(program + (ended ? " did not start: " : " was not ready within 60 s: ") +
                               log());
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

}  // namespace ratesync::testing
