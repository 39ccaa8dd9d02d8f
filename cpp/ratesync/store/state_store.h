// What a backend must do to carry state: dedup keys, counters, versioned values, timeouts.
//
// A StateStore decides; it never waits for anything but its server. One instance per prefix, which
// names its tables or keys. Methods are called on the engine's I/O thread only, except on the memory
// store, where any thread may call; `done()` may come from inside the call there.
//
// What is the same everywhere:
//   - A row is dead once it was deleted or its time is over. Dead is absent to every operation.
//   - A row that is created where a dead one still lies continues its version; where the dead one was
//     purged, the version starts above the highest that was purged from the same bucket (`bucket_of`), so
//     no version of a key is ever used twice. A key whose bucket never lost a row starts at 1.
//   - Every write adds 1 to the version. touch, schedule and unschedule are no writes.
//   - Operations of one key are executed in the order in which they were submitted.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "ratesync/base/clock.h"
#include "ratesync/base/status.h"
#include "ratesync/store/limit_store.h"

namespace ratesync::store {

// Who a key belongs to: keys of different spaces never meet.
struct Space {
  std::string name_space = "default";
  std::string tenant = "default";
};
using SpaceRef = std::shared_ptr<const Space>;

struct Value {
  enum class Type : std::uint8_t { bytes = 0, text = 1, json = 2, integer = 3 };  // stored: never renumber
  Type type = Type::bytes;
  std::string data;         // bytes, UTF-8; empty for integer
  std::int64_t number = 0;  // integer
  friend bool operator==(const Value&, const Value&) = default;
};

// Milliseconds; ttl of an operation.
inline constexpr std::int64_t kKeepTtl = -2;  // the running expiry stays; a new row never expires
inline constexpr std::int64_t kNoTtl = -1;    // never expires
inline constexpr std::int64_t kAnyVersion = -1;

// Floors of versions are kept per bucket of keys.
inline constexpr std::uint32_t kBuckets = 65'536;
std::uint32_t bucket_of(const Space& space, const std::string& kind, const std::string& key);

struct StateReply {
  enum class Outcome : std::uint8_t {
    done,         // executed as asked; get: found
    absent,       // get, touch, remove, swap: no living row (`version` 0)
    exists,       // create: there is a living row
    stale,        // swap, remove, touch: the row has another version
    not_integer,  // add: the row's value is no integer
    overflow,     // add: the sum does not fit into 64 bits
    rolled_back,  // of an atomic batch: this one would have worked, another one did not
  };
  Status status;  // not ok: nothing below counts
  Outcome outcome = Outcome::done;
  std::int64_t version = 0;     // done: after the operation; otherwise that of the row found, 0: none
  std::int64_t expires_at = 0;  // ms since 1970 on the store's clock, as `version`; 0: never
  bool has_value = false;       // get, add (the sum), and where want_actual: `value` is that of the row
  Value value;
};

// One operation on one key. Owned by the engine, which keeps it alive until done() was called,
// exactly once, or abandon() returned true.
struct StateOp {
  enum class Verb : std::uint8_t {
    get,         // want_actual is implied
    create,      // only where no living row is; `exists` otherwise
    set,         // whatever is there
    swap,        // where the row has version `expected` (> 0)
    remove,      // the same; kAnyVersion: whatever is there
    add,         // `delta` to an integer; creates it
    touch,       // `ttl` from now, where the row has version `expected`; the version stays
    schedule,    // a timeout of the key at `due`; replaces the one it has, and its claim
    unschedule,  // removes it; `expected` > 0: only while this claim is the newest, else `stale`
  };
  Verb verb = Verb::get;
  bool want_actual = false;  // create, swap that failed: reply the row found
  bool renew = false;        // add to a living row: `ttl` starts anew
  bool revive = false;  // swap: a row that expired, but was neither deleted nor overwritten, still counts
  SpaceRef space;
  std::string kind;
  std::string key;
  Value value;                // create, set, swap
  std::int64_t delta = 0;     // add
  std::int64_t ttl = kNoTtl;  // ms from 1; create, set, swap, add, touch
  std::int64_t expected = 0;  // swap, remove, touch, unschedule (claim)
  std::int64_t due = 0;       // schedule: ms since 1970, or `due_in`: ms from the store's now
  bool due_in = false;
  // Unique over all processes, above 0. Stored with the row by every write, so that after a lost answer the
  // store can tell whether it was this operation that wrote it.
  std::int64_t id = 0;
  Nanos deadline = kForever;  // engine's clock: not sent by then, it fails with Code::timeout
  StateReply reply;

  virtual ~StateOp() = default;
  virtual void done() = 0;
};

// Several operations, all or nothing, in one round trip; keys are distinct. When one of them does not
// come out as `done` (get and remove may be `absent`), none is executed.
struct StateBatch {
  std::vector<StateOp*> ops;  // their done() is not called; their replies are filled
  Status status;              // not ok: the replies do not count
  bool applied = false;
  Nanos deadline = kForever;

  virtual ~StateBatch() = default;
  virtual void done() = 0;
};

struct StateRow {
  std::string key;
  Value value;
  std::int64_t version = 0;
  std::int64_t expires_at = 0;  // as in StateReply
};

struct StatePage {
  std::vector<StateRow> rows;
  std::string cursor;  // where the next page begins; empty: this was the last
};

// A timeout that fell due, claimed for the caller.
struct DueKey {
  std::string kind;
  std::string key;
  std::int64_t due = 0;    // ms since 1970: when it fell due
  std::int64_t claim = 0;  // for unschedule(expected); grows with every claim of the store
};

class StateStore {
 public:
  virtual ~StateStore() = default;

  // One call, one done().
  virtual void submit(StateOp* op) = 0;
  virtual void submit(StateBatch* batch) = 0;
  // Takes back what has not been sent. True: it is the caller's again and done() will not be called.
  virtual bool abandon(StateOp* op) = 0;
  virtual bool abandon(StateBatch* batch) = 0;

  // Living rows of one kind whose key starts with `prefix`, a page at a time. A row that is there during
  // the whole scan comes exactly once. Memory and PostgreSQL: ordered by the bytes of the key.
  virtual void scan(const SpaceRef& space, const std::string& kind, const std::string& prefix,
                    const std::string& cursor, std::size_t page_size, Callback<StatePage> done) = 0;
  // Up to `limit` timeouts of the space that are due, oldest first, each to exactly one claimer; each falls
  // due again after `lease` ms unless it is unscheduled before. `kind` empty: of every kind.
  virtual void claim_due(const SpaceRef& space, const std::string& kind, std::size_t limit,
                         std::int64_t lease, Callback<std::vector<DueKey>> done) = 0;
  // Removes dead rows now, at most `limit`; the store does so by itself in the background. How many.
  virtual void purge(std::size_t limit, Callback<std::int64_t> done) = 0;

  // Checks the schema of this prefix (and creates it where configured).
  virtual void initialize(Callback<Unit> done) = 0;
};

}  // namespace ratesync::store
