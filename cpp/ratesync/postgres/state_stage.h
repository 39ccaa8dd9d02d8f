// One stage of a round: its parameters, and its answer dealt out to the operations.
#pragma once

#include <vector>

#include "ratesync/postgres/connection.h"
#include "ratesync/postgres/state_plan.h"
#include "ratesync/postgres/state_sql.h"

namespace ratesync::postgres {

// Appends the calls of one transaction, and notes which of them answers.
void add_stage(const StateSql& sql, StateStage& stage, std::vector<Call>& calls);

struct StateDealt {
  StateItems done;   // replies are filled in
  StateItems again;  // got no answer
};
void deal_stage(const StateStage& stage, const Rows& rows, StateDealt& dealt);

// All operations of a stage, in the order of their lines.
StateItems items_of(const StateStage& stage);

// $1 to $5 for the keys of these operations, which are sorted.
std::vector<Param> key_params(const std::vector<const store::StateOp*>& keys);
// The value in three columns of a row, from `column` on.
store::Value read_value(const Rows& rows, int row, int column);

}  // namespace ratesync::postgres
