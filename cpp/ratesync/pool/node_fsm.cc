// Transitions of one pooled connection, state by state; see node_fsm.h for the rules.
#include "ratesync/pool/node_fsm.h"

namespace ratesync::pool {

std::string_view to_string(State state) {
  switch (state) {
    case State::absent: return "absent";
    case State::connecting: return "connecting";
    case State::setting_up: return "setting_up";
    case State::idle: return "idle";
    case State::busy: return "busy";
    case State::closing: return "closing";
  }
  return "?";
}

std::string_view to_string(Event event) {
  switch (event) {
    case Event::connect_started: return "connect_started";
    case Event::connected: return "connected";
    case Event::setup_done: return "setup_done";
    case Event::connect_failed: return "connect_failed";
    case Event::lent: return "lent";
    case Event::returned_open: return "returned_open";
    case Event::returned_broken: return "returned_broken";
    case Event::broken: return "broken";
    case Event::close: return "close";
    case Event::closed: return "closed";
  }
  return "?";
}

Action NodeFsm::resume(Event event) {
  switch (state_) {
    case State::absent: return from_absent(event);
    case State::connecting: return from_connecting(event);
    case State::setting_up: return from_setting_up(event);
    case State::idle: return from_idle(event);
    case State::busy: return from_busy(event);
    case State::closing: return from_closing(event);
  }
  return illegal(event);
}

Action NodeFsm::move(State next, Action action) {
  state_ = next;
  return action;
}

Action NodeFsm::illegal(Event event) {
  ++errors_;
  error_ = std::string(to_string(event)) + " while " + std::string(to_string(state_));
  return Action::none;
}

Action NodeFsm::from_absent(Event event) {
  switch (event) {
    case Event::connect_started: return move(State::connecting, Action::connect);
    // Callbacks of a connection that is gone may still arrive.
    case Event::connected:
    case Event::setup_done:
    case Event::connect_failed:
    case Event::broken: return Action::none;
    case Event::lent:
    case Event::returned_open:
    case Event::returned_broken:
    case Event::close:
    case Event::closed: return illegal(event);
  }
  return illegal(event);
}

Action NodeFsm::from_connecting(Event event) {
  switch (event) {
    case Event::connected: return move(State::setting_up, Action::setup);
    case Event::connect_failed:
    case Event::broken:
    case Event::close: return move(State::closing, Action::close);
    case Event::connect_started:
    case Event::setup_done:
    case Event::lent:
    case Event::returned_open:
    case Event::returned_broken:
    case Event::closed: return illegal(event);
  }
  return illegal(event);
}

Action NodeFsm::from_setting_up(Event event) {
  switch (event) {
    case Event::setup_done: return move(State::idle, Action::offer);
    case Event::connect_failed:
    case Event::broken:
    case Event::close: return move(State::closing, Action::close);
    case Event::connect_started:
    case Event::connected:
    case Event::lent:
    case Event::returned_open:
    case Event::returned_broken:
    case Event::closed: return illegal(event);
  }
  return illegal(event);
}

Action NodeFsm::from_idle(Event event) {
  switch (event) {
    case Event::lent: return move(State::busy, Action::none);
    case Event::broken:
    case Event::close: return move(State::closing, Action::close);
    case Event::connect_started:
    case Event::connected:
    case Event::setup_done:
    case Event::connect_failed:
    case Event::returned_open:
    case Event::returned_broken:
    case Event::closed: return illegal(event);
  }
  return illegal(event);
}

Action NodeFsm::from_busy(Event event) {
  switch (event) {
    case Event::returned_open: {
      const bool keep = !doomed_;
      doomed_ = false;
      return keep ? move(State::idle, Action::offer) : move(State::closing, Action::close);
    }
    case Event::returned_broken: doomed_ = false; return move(State::closing, Action::close);
    // The borrower still holds it: dropping it now would pull it away from under a pipeline.
    case Event::broken:
    case Event::close: doomed_ = true; return Action::none;
    case Event::connect_started:
    case Event::connected:
    case Event::setup_done:
    case Event::connect_failed:
    case Event::lent:
    case Event::closed: return illegal(event);
  }
  return illegal(event);
}

Action NodeFsm::from_closing(Event event) {
  switch (event) {
    case Event::closed: return move(State::absent, Action::forget);
    // Under way when the close was decided.
    case Event::connected:
    case Event::setup_done:
    case Event::connect_failed:
    case Event::broken:
    case Event::close: return Action::none;
    case Event::connect_started:
    case Event::lent:
    case Event::returned_open:
    case Event::returned_broken: return illegal(event);
  }
  return illegal(event);
}

}  // namespace ratesync::pool
