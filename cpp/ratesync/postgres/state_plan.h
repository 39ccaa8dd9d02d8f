// What one round of the state store asks: operations dealt into stages, one statement each, with one line
// for each key. Pure.
//
// A key appears once in a round. Operations of one key merge into a line where the outcome of each can be
// told from that of the line; whatever does not merge waits for the next round, so that it is carried out
// behind the others. Stages therefore are independent of each other, and each is a transaction of its own.
#pragma once

#include <cstdint>
#include <vector>

#include "ratesync/batch/batcher.h"
#include "ratesync/postgres/patience.h"
#include "ratesync/store/state_store.h"

namespace ratesync::postgres {

// An operation, or a batch of them, on its way through the store.
struct QueuedState {
  store::StateOp* op = nullptr;
  store::StateBatch* batch = nullptr;  // then op is null
  std::uint32_t bucket = 0;            // of the key (op)
  bool wide = false;                   // travels in the lane of batches
  bool alone = false;                  // has to be decided on by itself
  bool seen = false;                   // create: the key has been there a moment ago
  unsigned cut = 0;                    // after a row was refused: stages are cut in two until it is found
  Patience patience;                   // with refusals for a passing reason
  unsigned races = 0;                  // in a row in which it got no answer
  bool doubted = false;                // its first answer was lost, and it is sent again
  QueuedState* next = nullptr;         // of the same line
};
using StateItems = std::vector<QueuedState*>;

// One row of a statement.
struct StateLine {
  QueuedState* first = nullptr;
  QueuedState* last = nullptr;
  std::int64_t count = 0;
  store::StateOp* key = nullptr;  // whose names it has; of a batch: the operation
  std::int64_t delta = 0;         // add: of all together
  std::int64_t group = 0;         // decide: batches of the statement, from 0
};

struct StateStage {
  enum class Kind : std::uint8_t {
    create,
    create_seen,
    set,
    add,
    add_renew,
    get,
    modify,  // swap, remove, touch
    schedule,
    unschedule,
    decide,  // batches, and what has to be decided on alone
  };
  Kind kind = Kind::get;
  unsigned cut = 0;
  bool all_new = false;             // create: nobody was refused of late, and one who is may ask again
  std::vector<StateLine> lines;     // sorted by primary key
  std::vector<QueuedState*> items;  // decide: by group
  std::size_t first_call = 0;       // of its result, in the pipeline
};

struct StateRound {
  std::vector<StateStage> stages;
  StateItems later;  // in the order of their arrival
};

// By the bytes of namespace, tenant, kind, key.
int compare_keys(const store::StateOp& a, const store::StateOp& b);

// `pending` in the order of arrival; the keys of batches among them differ from all others.
StateRound plan_state(const StateItems& pending, std::size_t max_bytes);

}  // namespace ratesync::postgres
