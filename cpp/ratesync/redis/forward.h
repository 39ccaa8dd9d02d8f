// A Commander in front of another one: what is not overridden is passed on.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ratesync/redis/commander.h"

namespace ratesync::redis {

class Forward : public Commander {
 public:
  explicit Forward(std::unique_ptr<Commander> inner) : inner_(std::move(inner)) {}

  void connect(std::function<void(Status)> done) override { inner_->connect(std::move(done)); }
  void call(std::string_view key, Command command, Nanos deadline, ReplyCallback done) override {
    inner_->call(key, std::move(command), deadline, std::move(done));
  }
  void eval(const Script& script, std::string_view key, Command arguments, Nanos deadline,
            ReplyCallback done) override {
    inner_->eval(script, key, std::move(arguments), deadline, std::move(done));
  }
  void call_all(Command command, Nanos deadline,
                std::function<void(std::vector<Result<Reply>>)> done) override {
    inner_->call_all(std::move(command), deadline, std::move(done));
  }
  void walk(std::string pattern, KeySink each, Nanos deadline, std::function<void(Status)> done) override {
    inner_->walk(std::move(pattern), std::move(each), deadline, std::move(done));
  }
  [[nodiscard]] std::uint16_t slot_of(std::string_view key) const override { return inner_->slot_of(key); }
  [[nodiscard]] bool clustered() const override { return inner_->clustered(); }
  void subscribe(std::string channel, std::function<void(std::string_view)> listener) override {
    inner_->subscribe(std::move(channel), std::move(listener));
  }
  [[nodiscard]] bool subscribed() const override { return inner_->subscribed(); }
  void on_reconnect(std::function<void()> listener) override { inner_->on_reconnect(std::move(listener)); }
  [[nodiscard]] bool down() const override { return inner_->down(); }
  void add_stats(store::Stats& stats) const override { inner_->add_stats(stats); }
  [[nodiscard]] std::string target() const override { return inner_->target(); }
  void close(std::function<void()> done) override { inner_->close(std::move(done)); }
  void abandon_after_fork() override { inner_->abandon_after_fork(); }

 protected:
  std::unique_ptr<Commander> inner_;
};

}  // namespace ratesync::redis
