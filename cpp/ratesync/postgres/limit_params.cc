#include "ratesync/postgres/limit_params.h"

#include <charconv>

#include "ratesync/base/format.h"

namespace ratesync::postgres {

void ArrayWriter::separate() {
  if (text_.size() > 1) text_ += ',';
}
void ArrayWriter::add(std::int64_t value) {
  separate();
  char digits[20];  // of the least, with its sign
  text_.append(digits, std::to_chars(digits, digits + sizeof digits, value).ptr);
}
void ArrayWriter::add(double value) {
  separate();
  text_ += formatted("{}", value);
}
void ArrayWriter::add_null() {
  separate();
  text_ += "NULL";
}
Param ArrayWriter::take() {
  text_ += '}';
  return Param::text(std::move(text_));
}

std::vector<Param> run_params(const Layer& layer) {
  std::vector<std::string_view> groups;
  groups.reserve(layer.size());
  ArrayWriter n, each, room, step;
  for (const Run& run : layer) {
    const MicroRate rate(run.group->params);
    groups.push_back(run.id());
    n.add(run.n());
    if (rate.interval <= 0) {
      each.add_null();
      room.add_null();
      step.add_null();
      continue;
    }
    each.add(rate.interval * static_cast<double>(run.cost));
    if (run.patience == kForever)
      room.add_null();
    else
      room.add(run.patience / kMicro + rate.margin + rate.burst_span);
    step.add(rate.step);
  }
  std::vector<Param> out;
  out.reserve(11);
  out.push_back(Param::text(array_of_text(groups)));
  for (ArrayWriter* array : {&n, &each, &room, &step}) out.push_back(array->take());
  return out;
}

void add_window_params(const Layer& layer, std::vector<Param>& out) {
  ArrayWriter algo, cost, limit, window, patience;
  for (const Run& run : layer) {
    const limits::Params& params = run.group->params;
    algo.add(static_cast<std::int64_t>(params.algorithm));
    if (!params.is_window()) {
      for (ArrayWriter* array : {&cost, &limit, &window, &patience}) array->add_null();
      continue;
    }
    cost.add(run.cost);
    limit.add(params.limit);
    window.add(params.window / kMicro);
    if (run.patience == kForever)
      patience.add_null();
    else
      patience.add(run.patience / kMicro);
  }
  for (ArrayWriter* array : {&algo, &cost, &limit, &window, &patience}) out.push_back(array->take());
}

std::vector<Param> adjust_params(const std::vector<const Adjustment*>& adjustments) {
  std::vector<std::string_view> groups;
  ArrayWriter shift, stamp, mode, step;
  for (const Adjustment* adjustment : adjustments) {
    groups.push_back(adjustment->group->id);
    shift.add(adjustment->shift);
    if (adjustment->stamp)
      stamp.add(*adjustment->stamp);
    else
      stamp.add_null();
    mode.add(static_cast<std::int64_t>(adjustment->mode));
    step.add(MicroRate(adjustment->group->params).step);
  }
  return {Param::text(array_of_text(groups)), shift.take(), stamp.take(), mode.take(), step.take()};
}

std::vector<Param> adjust_windows_params(const std::vector<const Adjustment*>& adjustments) {
  std::vector<std::string_view> groups;
  ArrayWriter mode, units, stamp, algo, window, limit;
  for (const Adjustment* adjustment : adjustments) {
    const limits::Params& params = adjustment->group->params;
    groups.push_back(adjustment->group->id);
    mode.add(static_cast<std::int64_t>(adjustment->mode));
    units.add(adjustment->shift);
    if (adjustment->stamp)
      stamp.add(*adjustment->stamp);
    else
      stamp.add_null();
    algo.add(static_cast<std::int64_t>(params.algorithm));
    if (params.is_window()) {
      window.add(params.window / kMicro);
      limit.add(params.limit);
    } else {
      window.add_null();
      limit.add_null();
    }
  }
  return {Param::text(array_of_text(groups)),
          mode.take(),
          units.take(),
          stamp.take(),
          algo.take(),
          window.take(),
          limit.take()};
}

std::vector<Param> peek_params(const OpList& peeks) {
  std::vector<std::string_view> groups;
  ArrayWriter step;
  for (const QueuedOp* op : peeks) {
    groups.push_back(op->group->id);
    step.add(MicroRate(op->group->params).step);
  }
  return {Param::text(array_of_text(groups)), step.take()};
}

std::vector<Param> peek_windows_params(const OpList& peeks) {
  std::vector<std::string_view> groups;
  ArrayWriter algo, limit, window;
  for (const QueuedOp* op : peeks) {
    const limits::Params& params = op->group->params;
    groups.push_back(op->group->id);
    algo.add(static_cast<std::int64_t>(params.algorithm));
    limit.add(params.limit);
    window.add(params.window / kMicro);
  }
  return {Param::text(array_of_text(groups)), algo.take(), limit.take(), window.take()};
}

std::vector<std::int64_t> integers(std::string_view array) {
  std::vector<std::int64_t> out;
  const char* at = array.data();
  const char* const end = at + array.size();
  while (at != end) {
    std::int64_t value = 0;
    const auto [next, error] = std::from_chars(at, end, value);
    if (error == std::errc()) out.push_back(value);
    at = next == at ? at + 1 : next;
  }
  return out;
}

}  // namespace ratesync::postgres
