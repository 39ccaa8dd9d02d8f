// A pool at a hand-moved time, with the actions of the latest call sorted for the tests to look at.
#pragma once

#include <algorithm>
#include <map>
#include <utility>
#include <vector>

#include "ratesync/pool/pool.h"

namespace ratesync::pool {

using Kind = PoolAction::Kind;
using Ids = std::vector<NodeId>;

struct Rig {
  explicit Rig(PoolOptions options = {}, double luck = 0.5) : pool(options, [luck] { return luck; }) {}

  Ids nodes(Kind kind) {
    Ids ids;
    for (const PoolAction& a : out) {
      if (a.kind == kind) ids.push_back(a.node);
    }
    return ids;
  }
  std::map<WaiterId, NodeId> grants() {
    std::map<WaiterId, NodeId> map;
    for (const PoolAction& a : out) {
      if (a.kind == Kind::grant) map[a.waiter] = a.node;
    }
    return map;
  }
  std::map<WaiterId, Status> fails() {
    std::map<WaiterId, Status> map;
    for (const PoolAction& a : out) {
      if (a.kind == Kind::fail) map[a.waiter] = a.status;
    }
    return map;
  }
  Nanos timer() {  // the earliest asked for since the last call
    Nanos at = kForever;
    for (const PoolAction& a : out) {
      if (a.kind == Kind::timer) at = std::min(at, a.at);
    }
    return at;
  }
  bool said_closed() {
    return std::any_of(out.begin(), out.end(), [](const PoolAction& a) { return a.kind == Kind::closed; });
  }

  // Each call forgets the actions of the one before.
  Rig& get(WaiterId w) { return out.clear(), pool.get(w, now, out), *this; }
  Rig& put(NodeId n, bool open = true) { return out.clear(), pool.put(n, open, now, out), *this; }
  Rig& open(NodeId n) {
    out.clear();
    pool.connected(n, now, out);
    pool.setup_done(n, now, out);
    return *this;
  }
  Rig& fail(NodeId n, Status status) {
    out.clear();
    pool.connect_failed(n, std::move(status), now, out);
    return *this;
  }
  Rig& gone(NodeId n) { return out.clear(), pool.closed(n, now, out), *this; }
  Rig& broken(NodeId n) { return out.clear(), pool.broken(n, now, out), *this; }
  Rig& tick(Nanos later = 0) { return now += later, out.clear(), pool.tick(now, out), *this; }
  Rig& close() { return out.clear(), pool.close(now, out), *this; }

  Pool pool;
  Nanos now = 1'000 * kSecond;
  Actions out;
};

}  // namespace ratesync::pool
