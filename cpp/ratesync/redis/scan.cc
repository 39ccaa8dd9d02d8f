#include "ratesync/redis/scan.h"

#include <unordered_set>
#include <utility>

#include "ratesync/redis/errors.h"

namespace ratesync::redis {
namespace {

class Walk : public std::enable_shared_from_this<Walk> {
 public:
  Walk(std::shared_ptr<Node> node, std::string pattern, KeySink each, Nanos deadline,
       std::function<void(Result<bool>)> done)
      : node_(std::move(node)),
        pattern_(std::move(pattern)),
        each_(std::move(each)),
        deadline_(deadline),
        done_(std::move(done)) {}

  void next() {
    Command command("SCAN");
    command.add(cursor_).add("MATCH").add(pattern_).add("COUNT").add("1000");
    node_->call(command, deadline_,
                [self = shared_from_this()](Result<Reply> reply) { self->take(std::move(reply)); });
  }

 private:
  void take(Result<Reply> reply) {
    if (reply.ok()) reply = checked(std::move(reply.value()), {node_->connection().peer(), {}, "SCAN"});
    if (!reply.ok()) return done_(reply.status());
    std::vector<Reply>& items = reply.value().items;
    if (items.size() != 2) return done_(Status::make(Code::protocol, "SCAN was answered with no cursor"));
    for (Reply& key : items[1].items)
      if (!each_(std::move(key.text))) return done_(false);
    cursor_ = std::move(items[0].text);
    if (cursor_ != "0") return next();
    done_(true);
  }

  const std::shared_ptr<Node> node_;
  const std::string pattern_;
  const KeySink each_;
  const Nanos deadline_;
  const std::function<void(Result<bool>)> done_;
  std::string cursor_ = "0";
};

}  // namespace

void walk_node(const std::shared_ptr<Node>& node, std::string pattern, KeySink each, Nanos deadline,
               std::function<void(Result<bool>)> done) {
  std::make_shared<Walk>(node, std::move(pattern), std::move(each), deadline, std::move(done))->next();
}

void Commander::scan(std::string pattern, std::size_t limit, Nanos deadline,
                     std::function<void(Result<std::vector<std::string>>)> done) {
  // The server may name a key twice while it grows its table.
  const auto keys = std::make_shared<std::unordered_set<std::string>>();
  walk(
      std::move(pattern),
      [keys, limit](std::string key) {
        if (keys->size() < limit) keys->insert(std::move(key));
        return keys->size() < limit;
      },
      deadline,
      [keys, done = std::move(done)](const Status& status) {
        if (!status.ok()) return done(status);
        std::vector<std::string> out;
        out.reserve(keys->size());
        while (!keys->empty()) out.push_back(std::move(keys->extract(keys->begin()).value()));
        done(std::move(out));
      });
}

}  // namespace ratesync::redis
