// The parameters of the limit statements: columns of runs, adjustments and peeks as array literals.
// Pure.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "ratesync/postgres/limit_plan.h"

namespace ratesync::postgres {

// Builds PostgreSQL array literals, column by column.
class ArrayWriter {
 public:
  void add(std::int64_t value);
  void add(double value);
  void add_null();
  Param take();

 private:
  void separate();
  std::string text_ = "{";
};

// $1 to $5 of LimitSql::rate, and the first of what decide_sql() makes.
std::vector<Param> run_params(const Layer& layer);
// algo, cost, lim, win, patience of decide_sql().
void add_window_params(const Layer& layer, std::vector<Param>& out);
std::vector<Param> adjust_params(const std::vector<const Adjustment*>& adjustments);
std::vector<Param> adjust_windows_params(const std::vector<const Adjustment*>& adjustments);
std::vector<Param> peek_params(const OpList& peeks);
std::vector<Param> peek_windows_params(const OpList& peeks);

std::vector<std::int64_t> integers(std::string_view array);  // {1,2,3}

}  // namespace ratesync::postgres
