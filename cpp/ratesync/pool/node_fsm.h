// The life of one pooled connection as a sans-io state machine.
//
// The pool keeps one per connection and feeds it what happened; the machine answers what to do
// next. It holds the rules that are easy to get wrong when callbacks cross: a connection that
// breaks while it is lent is closed when it comes back and not before; a connection that is being
// closed ignores what was already under way; every connection leaves by the same door, close then
// closed, so that nothing is counted out twice.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace ratesync::pool {

enum class State : std::uint8_t {
  absent,      // not made yet, or gone
  connecting,  // the glue is connecting
  setting_up,  // connected; the glue runs its set-up (schema check)
  idle,        // open, can be lent
  busy,        // lent to one waiter
  closing,     // the glue was told to close it; still counts against max_size
};
inline constexpr std::size_t kStates = 6;

enum class Event : std::uint8_t {
  connect_started,
  connected,
  setup_done,
  connect_failed,  // connecting or set-up failed
  lent,
  returned_open,
  returned_broken,
  broken,  // the server closed it, or a read failed, outside of the borrower's work
  close,   // the pool wants it gone
  closed,  // the glue has dropped it
};

enum class Action : std::uint8_t {
  none,
  connect,  // start connecting
  setup,    // run the set-up
  offer,    // it became idle: lend it or keep it
  close,    // drop the connection, then report closed
  forget,   // it is gone: the node can be erased
};

std::string_view to_string(State state);
std::string_view to_string(Event event);

class NodeFsm {
 public:
  // An event that no correct caller can produce in this state changes nothing, returns
  // Action::none and is counted; `error` names it.
  Action resume(Event event);

  [[nodiscard]] State state() const { return state_; }
  // Lent, and to be closed when it comes back (it broke, or the pool is closing).
  [[nodiscard]] bool doomed() const { return doomed_; }
  [[nodiscard]] std::uint32_t errors() const { return errors_; }
  [[nodiscard]] const std::string& error() const { return error_; }  // the latest, empty when none

 private:
  Action move(State next, Action action);
  Action illegal(Event event);

  Action from_absent(Event event);
  Action from_connecting(Event event);
  Action from_setting_up(Event event);
  Action from_idle(Event event);
  Action from_busy(Event event);
  Action from_closing(Event event);

  State state_ = State::absent;
  bool doomed_ = false;
  std::uint32_t errors_ = 0;
  std::string error_;
};

}  // namespace ratesync::pool
