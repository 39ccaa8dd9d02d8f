#include "ratesync/redis/node.h"

#include <utility>

namespace ratesync::redis {
namespace {

constexpr int kMaxLoads = 3;

bool is_noscript(const Result<Reply>& result) {
  return result.ok() && result.value().kind == Reply::Kind::error &&
         result.value().text.starts_with("NOSCRIPT");
}

}  // namespace

void Node::eval(const Script& script, Command arguments, Nanos deadline, ReplyCallback done, bool asking) {
  run(std::make_shared<Call>(Call{&script, std::move(arguments), deadline, std::move(done), asking}));
}

void Node::run(CallRef call) {
  static const Command kAsking("ASKING");
  if (call->asking) connection_->send(kAsking, call->deadline, [](const Result<Reply>&) {});
  const Call& c = *call;
  connection_->send({"EVALSHA", c.script->sha1}, c.arguments, c.deadline,
                    [weak = weak_from_this(), call = std::move(call)](Result<Reply> result) mutable {
                      const auto self = weak.lock();
                      if (self && is_noscript(result) && call->loads < kMaxLoads)
                        self->load(std::move(call));
                      else
                        call->done(std::move(result));
                    });
}

void Node::load(CallRef call) {
  ++call->loads;
  const Script& script = *call->script;
  const Nanos deadline = call->deadline;
  std::vector<CallRef>& waiting = loading_[script.sha1];
  waiting.push_back(std::move(call));
  if (waiting.size() > 1) return;
  // Answers come in order: whoever sent EVALSHA before this LOAD meets NOSCRIPT before it is answered.
  Command command("SCRIPT");
  command.add("LOAD").add(script.source);
  connection_->send(command, deadline, [self = shared_from_this(), &script](Result<Reply> result) {
    const std::vector<CallRef> ready = std::move(self->loading_.extract(script.sha1).mapped());
    if (!result.ok() && result.status().code == Code::in_doubt)
      // Whether the script is known now does not matter: nothing was executed.
      result = Status::make(Code::unavailable, result.status().message);
    const bool loaded = result.ok() && result.value().kind != Reply::Kind::error;
    for (const CallRef& one : ready) {
      if (loaded)
        self->run(one);
      else
        one->done(result);
    }
  });
}

}  // namespace ratesync::redis
