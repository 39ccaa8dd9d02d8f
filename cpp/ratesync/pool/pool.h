// A connection pool without connections: sizing, a bounded FIFO of waiters, lifetimes, back-off and
// fail-fast as pure decisions. No sockets, no timers, no clock: `now` is a parameter, and what has to
// be done is appended to `out`. The glue owns the sockets and does what it is told, in order:
//
//   void drive(Actions actions) {                   // after every call below
//     for (PoolAction& a : actions) switch (a.kind) {
//       case Kind::connect: start connecting a.node, then connected(a.node) or connect_failed(a.node, status)
//       case Kind::setup:   run the set-up on it, then setup_done(a.node) or connect_failed(a.node, status)
//       case Kind::close:   drop it (whatever is left of it), then closed(a.node)
//       case Kind::grant:   give a.node to a.waiter; exactly one put(a.node, open) follows
//       case Kind::fail:    answer a.waiter with a.status
//       case Kind::timer:   set the one timer to a.at, unless it is set to go off earlier; then tick()
//       case Kind::closed:  every connection is gone; the pool can be destroyed
//     }
//   }
//
// Calling the pool from inside `drive` is fine with a fresh `out`: the pool keeps no reference to it
// and is consistent when a call returns. Reports that cross a close (connected, setup_done,
// connect_failed, broken on a node that is closing or gone) are ignored, so callbacks need no guard.
// Not thread-safe: one thread owns it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "ratesync/base/clock.h"
#include "ratesync/base/status.h"
#include "ratesync/pool/node_fsm.h"

namespace ratesync::pool {

using NodeId = std::uint64_t;    // given by the pool from 1 on, never used twice
using WaiterId = std::uint64_t;  // given by the caller, unique among those waiting

struct PoolOptions {
  std::size_t min_size = 2;                 // kept open once the pool was first used; 0..max_size
  std::size_t max_size = 10;                // connections at the server, those being closed included; from 1
  std::size_t max_waiting = 1'000;          // callers queued; from 1
  Nanos acquire_timeout = 5 * kSecond;      // in the queue; kForever: no bound
  Nanos max_lifetime = 3'600 * kSecond;     // of a connection, jittered by 10 % either way; kForever: off
  Nanos max_idle = 600 * kSecond;           // of connections beyond min_size; kForever: off
  Nanos connect_backoff_min = 50 * kMilli;  // pause after a failed connect: the floor ...
  Nanos connect_backoff_max = 1 * kSecond;  // ... and the ceiling, which doubles up to here
  std::size_t fail_after = 2;               // failed connects in a row until `down`; from 1
};

struct PoolAction {
  enum class Kind : std::uint8_t { connect, setup, close, grant, fail, timer, closed };
  Kind kind;
  NodeId node = 0;      // connect, setup, close, grant
  WaiterId waiter = 0;  // grant, fail
  Nanos at = 0;         // timer
  Status status = {};   // fail
};
using Actions = std::vector<PoolAction>;

struct Gauges {
  std::size_t open = 0;     // idle and lent
  std::size_t in_use = 0;   // lent
  std::size_t pending = 0;  // connecting or setting up
  std::size_t closing = 0;
  std::size_t waiting = 0;
  std::uint64_t reconnects = 0;  // counter: connections that took the place of a broken one
};

// How the latest attempts to connect went; decides how boldly to connect.
enum class Health : std::uint8_t {
  well,
  probing,  // the latest failed: one attempt at a time
  refused,  // the server answered and said no: one at a time, and only while somebody waits
  down,     // unreachable repeatedly, nothing open: one at a time, also when nobody waits
};

struct Sizing {
  std::size_t min_size = 0, max_size = 0;
  std::size_t idle = 0, busy = 0, pending = 0, closing = 0, waiting = 0;
  bool started = false;  // the pool was used
  Health health = Health::well;
};

// How many connects to start now, back-off aside. Grows only for waiters that neither an idle nor a
// pending connection will serve, and up to min_size.
std::size_t connections_to_open(const Sizing& sizing);

class Pool {
 public:
  using Random = std::function<double()>;  // 0 <= x < 1

  Pool(PoolOptions options, Random random);

  // Callers. Each get is answered by exactly one grant or fail, unless cancel returns true.
  // Fails at once: closed; exhausted (queue full); unavailable while down; the server's own refusal
  // (authentication, no such database) while that is fresh.
  void get(WaiterId waiter, Nanos now, Actions& out);
  // True: it was waiting and will never be answered. False: it was answered already; a granted node
  // must still be put back.
  bool cancel(WaiterId waiter);
  // A granted node comes back. open == false: it is of no use any more.
  void put(NodeId node, bool open, Nanos now, Actions& out);

  // The glue's reports.
  void connected(NodeId node, Nanos now, Actions& out);
  void setup_done(NodeId node, Nanos now, Actions& out);
  // Status codes server, invalid and protocol mean that the other side answered: those waiting get
  // this very status at once. All others mean unreachable and count towards fail_after, those that failed
  // side by side as one.
  void connect_failed(NodeId node, Status status, Nanos now, Actions& out);
  void broken(NodeId node, Nanos now, Actions& out);  // any state; a lent one is closed on return
  void closed(NodeId node, Nanos now, Actions& out);
  void tick(Nanos now, Actions& out);

  // Waiters fail with Code::closed, idle and pending connections are closed at once, lent ones when
  // they are put back; then Kind::closed, once.
  void close(Nanos now, Actions& out);

  // fail_after connects failed in a row and nothing is open. While a lent connection is alive the
  // pool is not down: it comes back and serves.
  [[nodiscard]] bool down() const;
  [[nodiscard]] Gauges gauges() const;
  [[nodiscard]] const Status& last_connect_error() const { return last_error_; }  // ok when none
  // Calls that no interleaving allows (a second put, closed for a node that was not told to close,
  // one waiter id twice). They change nothing. 0 in a correct program.
  [[nodiscard]] std::uint64_t misuses() const { return misuses_; }

 private:
  struct Node {
    NodeFsm fsm;
    Nanos opened_at = 0;
    Nanos expires_at = kForever;
    Nanos idle_since = 0;
  };
  struct Waiter {
    WaiterId id = 0;
    Nanos since = 0;
  };
  using Nodes = std::map<NodeId, Node>;

  Node* find(NodeId id);
  Action resume(Node& node, Event event);
  void leave_idle(NodeId id);
  // Feeds the node's machine and does what it answers.
  void step(NodeId id, Node& node, Event event, Nanos now, Actions& out);
  void count_broken(const Node& node, Nanos now);
  void back_off(Nanos now);

  // Every call ends here: serve, fail the hopeless, connect, arm the timer, say closed.
  void settle(Nanos now, Actions& out);
  void serve_waiters(Actions& out);
  void fail_hopeless(Nanos now, Actions& out);
  void open_connections(Nanos now, Actions& out);
  void expire_waiters(Nanos now, Actions& out);
  void retire_old_nodes(Nanos now, Actions& out);
  void fail_all(const Status& status, Actions& out);
  void arm(Nanos at, Actions& out);
  void arm_next(Actions& out);

  [[nodiscard]] std::size_t count(State state) const { return counts_[static_cast<std::size_t>(state)]; }
  [[nodiscard]] std::size_t pending() const { return count(State::connecting) + count(State::setting_up); }
  [[nodiscard]] std::size_t live() const { return nodes_.size() - count(State::closing); }
  // Connections that will serve without a connect: idle ones and lent ones that are still sound.
  [[nodiscard]] std::size_t sound() const { return idle_.size() + count(State::busy) - doomed_; }
  [[nodiscard]] Health health() const;
  [[nodiscard]] Sizing sizing() const;
  [[nodiscard]] std::string numbers() const;
  [[nodiscard]] Status timed_out(Nanos waited) const;
  [[nodiscard]] Status unreachable() const;

  const PoolOptions options_;
  const Random random_;

  Nodes nodes_;
  std::size_t counts_[kStates] = {};
  std::size_t doomed_ = 0;
  NodeId next_node_ = 1;
  // Lent from the back (last in, first out), so that those at the front age and can be shed.
  std::vector<NodeId> idle_;

  std::list<Waiter> waiters_;  // first come, first served
  std::unordered_map<WaiterId, std::list<Waiter>::iterator> waiter_at_;

  bool started_ = false;
  bool closing_ = false;
  bool closed_said_ = false;

  Status last_error_;         // of the latest connect; ok after a success
  bool refused_ = false;      // last_error_ is the server's own answer
  std::size_t failures_ = 0;  // unreachable, in a row
  std::size_t backoff_level_ = 0;
  Nanos retry_at_ = 0;      // no connect starts before
  Nanos armed_ = kForever;  // when the glue's timer goes off

  std::uint64_t broken_ = 0;  // not replaced yet
  std::uint64_t reconnects_ = 0;
  std::uint64_t misuses_ = 0;
};

}  // namespace ratesync::pool
