// The Store interface: one configured backend, what it can do, and its life cycle.
//
// A capability is an interface of its own (limits now; locks, state, actors, events, audit come on
// the same pattern): a store returns a pointer to it, or nullptr where it cannot. All methods run
// on the engine's I/O thread unless said otherwise.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "ratesync/base/status.h"
#include "ratesync/store/limit_store.h"
#include "ratesync/store/lock_store.h"
#include "ratesync/store/state_store.h"

namespace ratesync::store {

enum class Consistency {
  strong,    // decisions are atomic and survive what the store survives
  eventual,  // not for deduplication or mutual exclusion
};

// What tests and callers may rely on; the contract suites are parametrised by it.
struct Capabilities {
  bool limits = false;
  bool locks = false;
  bool state = false;
  bool actors = false;
  bool events = false;
  bool audit = false;
  bool shared = false;   // seen by other processes
  bool durable = false;  // survives a restart of the store
  Consistency consistency = Consistency::strong;
};

// Counters since the start; gauges where said. Read on the I/O thread.
struct Stats {
  std::uint64_t round_trips = 0;
  std::uint64_t statements = 0;
  std::uint64_t batched_ops = 0;  // operations carried by those round trips
  std::uint64_t conflicts = 0;    // lost races that were retried
  std::uint64_t reconnects = 0;
  std::uint64_t leases_lost = 0;
  std::uint64_t connections_open = 0;     // gauge
  std::uint64_t connections_in_use = 0;   // gauge
  std::uint64_t connections_waiting = 0;  // gauge: callers waiting for a connection
};

struct MigrationStep {
  std::int64_t number = 0;
  std::string name;
  std::string sql;
  bool applied = false;  // before this run
};

struct Finding {
  enum class Level { ok, warning, error };
  Level level = Level::ok;
  std::string subject;  // "table", "grants", "server version" ...
  std::string message;  // with the cure
};

class Store {
 public:
  virtual ~Store() = default;

  [[nodiscard]] virtual Capabilities capabilities() const = 0;
  // Connects, checks the schema (creates it where configured), and says what is wrong.
  virtual void initialize(Callback<Unit> done) = 0;
  // Applies outstanding migrations; dry_run only lists them.
  virtual void migrate(bool dry_run, Callback<std::vector<MigrationStep>> done) = 0;
  virtual void doctor(Callback<std::vector<Finding>> done) = 0;
  [[nodiscard]] virtual Stats stats() const = 0;
  // Ends all work: queued operations get Code::closed; `done` runs when the sockets are closed.
  virtual void close(std::function<void()> done) = 0;
  // After fork, in the child, before the inherited object is leaked: close descriptors, send nothing.
  virtual void abandon_after_fork() = 0;
  // True after repeated connect failures, until a connection succeeds: calls fail fast.
  [[nodiscard]] virtual bool down() const = 0;

  [[nodiscard]] virtual LimitStore* limits() { return nullptr; }

  // One instance per prefix of tables or keys, made at the first call; it lives as long as the store. Any
  // thread, no I/O. Code::invalid: the prefix is no good here (the message says what is), or the store
  // cannot do it.
  virtual Result<StateStore*> state(const std::string&) { return not_here("state"); }
  virtual Result<LockStore*> locks(const std::string&) { return not_here("locks"); }
  // As migrate(), for the tables of one prefix: state, timeouts and locks.
  virtual void migrate_state(const std::string& prefix, bool dry_run,
                             Callback<std::vector<MigrationStep>> done) {
    (void)prefix, (void)dry_run;
    done(std::vector<MigrationStep>{});
  }

 private:
  static Status not_here(const char* what) {
    return Status::make(Code::invalid, std::string("this store does not carry ") + what);
  }
};

}  // namespace ratesync::store
