#include "ratesync/redis/scan.h"

#include <unordered_set>
#include <utility>

#include "ratesync/redis/errors.h"

namespace ratesync::redis {
namespace {

class Scan : public std::enable_shared_from_this<Scan> {
 public:
  Scan(std::shared_ptr<Node> node, std::string pattern, std::size_t limit, Nanos deadline,
       std::function<void(Result<std::vector<std::string>>)> done)
      : node_(std::move(node)),
        pattern_(std::move(pattern)),
        limit_(limit),
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
    // The server may name a key twice while it grows its table.
    for (Reply& key : items[1].items)
      if (keys_.size() < limit_) keys_.insert(std::move(key.text));
    cursor_ = std::move(items[0].text);
    if (cursor_ != "0" && keys_.size() < limit_) return next();
    std::vector<std::string> out;
    out.reserve(keys_.size());
    while (!keys_.empty()) out.push_back(std::move(keys_.extract(keys_.begin()).value()));
    done_(std::move(out));
  }

  const std::shared_ptr<Node> node_;
  const std::string pattern_;
  const std::size_t limit_;
  const Nanos deadline_;
  const std::function<void(Result<std::vector<std::string>>)> done_;
  std::string cursor_ = "0";
  std::unordered_set<std::string> keys_;
};

}  // namespace

void scan_node(const std::shared_ptr<Node>& node, std::string pattern, std::size_t limit, Nanos deadline,
               std::function<void(Result<std::vector<std::string>>)> done) {
  std::make_shared<Scan>(node, std::move(pattern), limit, deadline, std::move(done))->next();
}

}  // namespace ratesync::redis
