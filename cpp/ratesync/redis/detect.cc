#include "ratesync/redis/detect.h"

#include <string>
#include <utility>
#include <vector>

#include "ratesync/redis/forward.h"

namespace ratesync::redis {
namespace {

bool says_cluster(const Result<Reply>& info) {
  return info.ok() && info.value().text.find("cluster_enabled:1") != std::string::npos;
}

class Detecting final : public Forward {
 public:
  Detecting(std::unique_ptr<Commander> single, std::shared_ptr<Connection> probe,
            std::function<std::unique_ptr<Commander>()> make_cluster)
      : Forward(std::move(single)), make_cluster_(std::move(make_cluster)), probe_(std::move(probe)) {
    probe_->on_up([weak = std::weak_ptr(alive_)] {
      if (const auto self = weak.lock()) (*self)->ask();
    });
  }
  ~Detecting() override {
    alive_.reset();
    end_probe();
  }

  void connect(std::function<void(Status)> done) override {
    if (asked_) return inner_->connect(std::move(done));
    probe_->keep_open(true);  // until it was answered
    probe_->connect([weak = std::weak_ptr(alive_), done = std::move(done)](const Status& status) mutable {
      const auto self = weak.lock();
      if (!self) return done(Status::make(Code::closed, "the store was closed"));
      if (!status.ok() || (*self)->asked_) return (*self)->inner_->connect(std::move(done));
      (*self)->connecting_.push_back(std::move(done));
    });
  }
  void call(std::string_view key, Command command, Nanos deadline, ReplyCallback done) override {
    if (decided_) return inner_->call(key, std::move(command), deadline, std::move(done));
    auto again = [this, key = std::string(key), command, deadline](ReplyCallback then) {
      inner_->call(key, command, deadline, std::move(then));
    };
    inner_->call(key, std::move(command), deadline, follow(std::move(again), std::move(done)));
  }
  void eval(const Script& script, std::string_view key, Command arguments, Nanos deadline,
            ReplyCallback done) override {
    if (decided_) return inner_->eval(script, key, std::move(arguments), deadline, std::move(done));
    auto again = [this, &script, key = std::string(key), arguments, deadline](ReplyCallback then) {
      inner_->eval(script, key, arguments, deadline, std::move(then));
    };
    inner_->eval(script, key, std::move(arguments), deadline, follow(std::move(again), std::move(done)));
  }
  void subscribe(std::string channel, std::function<void(std::string_view)> listener) override {
    if (!decided_) channels_.emplace_back(channel, listener);
    inner_->subscribe(std::move(channel), std::move(listener));
  }
  void on_reconnect(std::function<void()> listener) override {
    if (!decided_) listeners_.push_back(listener);
    inner_->on_reconnect(std::move(listener));
  }
  void close(std::function<void()> done) override {
    decided_ = true;  // too late to find out
    alive_.reset();
    end_probe();
    connect_waiters();
    inner_->close(std::move(done));
  }
  void abandon_after_fork() override {
    inner_->abandon_after_fork();
    probe_->abandon_after_fork();
    (void)new auto(probe_);
    if (retired_) {
      retired_->abandon_after_fork();
      (void)retired_.release();
    }
  }

 private:
  using Again = std::function<void(ReplyCallback)>;

  // What was sent before we knew may be told that the key is elsewhere, or still wait for the connection
  // of the single server when that is given up: neither was executed.
  ReplyCallback follow(Again again, ReplyCallback done) {
    return [weak = std::weak_ptr(alive_), again = std::move(again),
            done = std::move(done)](Result<Reply> result) mutable {
      const auto self = weak.lock();
      if (!self || result.ok()) return done(std::move(result));
      const Status& status = result.status();
      if (status.sqlstate == "MOVED" || status.sqlstate == "ASK")
        (*self)->become_cluster();
      else if (!(*self)->retired_ || (status.code != Code::closed && status.code != Code::unavailable))
        return done(std::move(result));
      again(std::move(done));
    };
  }

  void ask() {
    if (asked_) return;
    Command command("INFO");
    command.add("cluster");
    probe_->send(command, kForever, [weak = std::weak_ptr(alive_)](const Result<Reply>& info) {
      const auto self = weak.lock();
      if (!self) return;
      if (info.ok()) return (*self)->learn(info);
      (*self)->connect_waiters();  // asked again with the next connection
    });
  }

  // A server that may not be asked (an error reply: its ACL) counts as a single one, until it redirects.
  void learn(const Result<Reply>& info) {
    if (std::exchange(asked_, true)) return;
    if (says_cluster(info)) return become_cluster();
    if (info.value().kind != Reply::Kind::error) {
      decided_ = true;
      channels_.clear();
      listeners_.clear();
    }
    answered();
  }

  void answered() {
    end_probe();
    connect_waiters();
  }
  void connect_waiters() {
    for (auto& waiter : std::exchange(connecting_, {})) inner_->connect(std::move(waiter));
  }

  void end_probe() { probe_->close(Status::make(Code::closed, "the question was answered")); }

  void become_cluster() {
    if (decided_) return;
    decided_ = asked_ = true;
    retired_ = std::exchange(inner_, make_cluster_());  // its commands under way are still answered
    for (auto& listener : std::exchange(listeners_, {})) {
      inner_->on_reconnect(listener);
      listener();  // other servers have the keys than the one that we asked
    }
    for (auto& [channel, listener] : std::exchange(channels_, {})) inner_->subscribe(channel, listener);
    retired_->close([] {});
    answered();
  }

  const std::function<std::unique_ptr<Commander>()> make_cluster_;
  const std::shared_ptr<Connection> probe_;
  bool asked_ = false;                  // and answered
  bool decided_ = false;                // for good
  std::unique_ptr<Commander> retired_;  // the single server's, once there is a Cluster
  std::vector<std::function<void(Status)>> connecting_;
  std::vector<std::pair<std::string, std::function<void(std::string_view)>>> channels_;
  std::vector<std::function<void()>> listeners_;
  std::shared_ptr<Detecting*> alive_ = std::make_shared<Detecting*>(this);
};

}  // namespace

std::unique_ptr<Commander> make_detecting(std::unique_ptr<Commander> single,
                                          std::shared_ptr<Connection> probe,
                                          std::function<std::unique_ptr<Commander>()> make_cluster) {
  return std::make_unique<Detecting>(std::move(single), std::move(probe), std::move(make_cluster));
}

}  // namespace ratesync::redis
