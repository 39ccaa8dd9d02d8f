// The nodes of a Redis Cluster, who owns which slot, and how we learn that this changed.
//
// The map is asked for (CLUSTER SLOTS) when a node says MOVED or cannot serve, when a connection is lost,
// and when a node has been silent for a while although it was asked something: one question at a time, no
// more than ten a second, to nodes that work first. A node that does not answer within 200 ms gets
// company: the next one is asked too, and the first answer counts. While no node answers, the cluster is
// down() and asked for again with growing pauses. I/O thread only.
#pragma once

#include <asio/io_context.hpp>
#include <asio/steady_timer.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "ratesync/base/clock.h"
#include "ratesync/base/status.h"
#include "ratesync/redis/connection.h"
#include "ratesync/redis/node.h"
#include "ratesync/redis/slots.h"
#include "ratesync/store/store.h"

namespace ratesync::redis {

// One node that we talk to, or did until a moment ago.
struct Member {
  HostPort at;
  std::shared_ptr<Connection> connection;
  std::shared_ptr<Node> node;
  std::size_t in_flight = 0;  // what was asked and has no answer yet
  Nanos heard_at = 0;         // when it last answered, or was first asked after a pause
};
using MemberRef = std::shared_ptr<Member>;

class ClusterNodes : public std::enable_shared_from_this<ClusterNodes> {
 public:
  using Done = std::function<void(Status)>;

  // `options` of every connection; its target is filled in for each node.
  ClusterNodes(asio::io_context& io, const Clock& clock, ConnectionOptions options,
               std::vector<HostPort> seeds);

  // The first map: answered with it, or with the failure of the first try.
  void connect(Done done);
  // Soon, unless it is being done already.
  void refresh();
  void moved(std::uint16_t slot, const HostPort& node);

  // Whoever owns the slot; nullptr: nobody, or no map yet.
  MemberRef owner(std::uint16_t slot);
  MemberRef at(const HostPort& node);
  // A primary, one that is connected if possible; nullptr: no map yet.
  MemberRef any();
  [[nodiscard]] std::vector<MemberRef> primaries();
  // Where a subscription can be had: every node of a cluster passes on what is published on any.
  net::StreamTarget listening_post();

  // Brackets whatever is asked of a node.
  void asked(Member& member);
  void answered(Member& member);

  [[nodiscard]] bool down() const { return down_; }
  [[nodiscard]] const Status& last_error() const { return last_error_; }
  // After a new map, and after all nodes failed to give one.
  void on_news(std::function<void()> listener) { news_ = std::move(listener); }
  // A new connection to a primary, or a replica that took over.
  void on_up(std::function<void()> listener) { up_.push_back(std::move(listener)); }
  // These nodes do not answer.
  void on_silent(std::function<void(const Member&)> listener) { silent_ = std::move(listener); }

  void add_stats(store::Stats& stats) const;
  // Takes no more commands; those under way are answered, for `grace` at most.
  void finish(Nanos grace, std::function<void()> done);
  void close(const Status& why);
  void abandon_after_fork();

 private:
  void arm(Nanos delay);
  void begin();
  void ask_next();
  void take(const MemberRef& from, Result<Reply> reply);
  void adopt(SlotMap map);
  void fail();
  void prune();
  void tell_connected();
  void watch();
  [[nodiscard]] bool is_silent(const Member& member, Nanos now) const;
  static void count(const Connection& connection, store::Stats& stats);

  asio::io_context& io_;
  const Clock& clock_;  // the engine's: of deadlines
  const Clock real_;    // of everything else
  const ConnectionOptions options_;
  const std::vector<HostPort> seeds_;
  std::minstd_rand random_{std::random_device{}()};

  SlotMap map_;
  bool known_ = false;
  std::vector<MemberRef> owners_;  // beside map_.primaries(); nullptr: not used yet
  std::unordered_map<std::string, MemberRef> members_;
  std::size_t in_flight_ = 0;
  store::Stats retired_;  // of members that are gone

  bool refreshing_ = false;
  bool scheduled_ = false;
  std::uint64_t attempt_ = 0;  // of asking for the map: answers to an earlier one are stale
  std::vector<HostPort> candidates_;
  std::size_t next_ = 0;
  std::size_t unanswered_ = 0;
  Status attempt_error_;
  Nanos give_up_at_ = 0;
  Nanos not_before_ = 0;  // of the next attempt
  int failures_ = 0;
  bool down_ = false;
  bool closed_ = false;
  Status last_error_;
  std::vector<Done> connecting_;

  std::unique_ptr<asio::steady_timer> timer_;        // behind pointers: leaked after fork
  std::unique_ptr<asio::steady_timer> watch_timer_;  // armed while something is in flight
  bool watching_ = false;
  std::function<void()> news_;
  std::vector<std::function<void()>> up_;
  std::function<void(const Member&)> silent_;
};

}  // namespace ratesync::redis
