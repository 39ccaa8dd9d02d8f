// Every (state, event) pair of the connection's state machine, and the paths that callbacks take when
// they cross.
#include "ratesync/pool/node_fsm.h"

#include <gtest/gtest.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

namespace ratesync::pool {
namespace {

using enum Event;

const std::vector<Event> kEvents = {connect_started, connected,       setup_done, connect_failed, lent,
                                    returned_open,   returned_broken, broken,     close,          closed};

const std::map<State, std::vector<Event>> kPathTo = {
    {State::absent, {}},
    {State::connecting, {connect_started}},
    {State::setting_up, {connect_started, connected}},
    {State::idle, {connect_started, connected, setup_done}},
    {State::busy, {connect_started, connected, setup_done, lent}},
    {State::closing, {connect_started, close}},
};

NodeFsm reach(State state) {
  NodeFsm fsm;
  for (const Event event : kPathTo.at(state)) fsm.resume(event);
  EXPECT_EQ(fsm.state(), state);
  EXPECT_EQ(fsm.errors(), 0u);
  return fsm;
}

struct Outcome {
  State state;
  Action action;
};

TEST(NodeFsm, EveryPairOfStateAndEventIsDecided) {
  const std::map<std::pair<State, Event>, Outcome> legal = {
      {{State::absent, connect_started}, {State::connecting, Action::connect}},
      {{State::absent, connected}, {State::absent, Action::none}},
      {{State::absent, setup_done}, {State::absent, Action::none}},
      {{State::absent, connect_failed}, {State::absent, Action::none}},
      {{State::absent, broken}, {State::absent, Action::none}},
      {{State::connecting, connected}, {State::setting_up, Action::setup}},
      {{State::connecting, connect_failed}, {State::closing, Action::close}},
      {{State::connecting, broken}, {State::closing, Action::close}},
      {{State::connecting, close}, {State::closing, Action::close}},
      {{State::setting_up, setup_done}, {State::idle, Action::offer}},
      {{State::setting_up, connect_failed}, {State::closing, Action::close}},
      {{State::setting_up, broken}, {State::closing, Action::close}},
      {{State::setting_up, close}, {State::closing, Action::close}},
      {{State::idle, lent}, {State::busy, Action::none}},
      {{State::idle, broken}, {State::closing, Action::close}},
      {{State::idle, close}, {State::closing, Action::close}},
      {{State::busy, returned_open}, {State::idle, Action::offer}},
      {{State::busy, returned_broken}, {State::closing, Action::close}},
      {{State::busy, broken}, {State::busy, Action::none}},
      {{State::busy, close}, {State::busy, Action::none}},
      {{State::closing, connected}, {State::closing, Action::none}},
      {{State::closing, setup_done}, {State::closing, Action::none}},
      {{State::closing, connect_failed}, {State::closing, Action::none}},
      {{State::closing, broken}, {State::closing, Action::none}},
      {{State::closing, close}, {State::closing, Action::none}},
      {{State::closing, closed}, {State::absent, Action::forget}},
  };
  for (const auto& [state, path] : kPathTo) {
    for (const Event event : kEvents) {
      SCOPED_TRACE(std::string(to_string(event)) + " while " + std::string(to_string(state)));
      NodeFsm fsm = reach(state);
      const Action action = fsm.resume(event);
      const auto found = legal.find({state, event});
      if (found == legal.end()) {
        EXPECT_EQ(action, Action::none);
        EXPECT_EQ(fsm.state(), state) << "an illegal event changes nothing";
        EXPECT_EQ(fsm.errors(), 1u);
        EXPECT_EQ(fsm.error(), std::string(to_string(event)) + " while " + std::string(to_string(state)));
      } else {
        EXPECT_EQ(action, found->second.action);
        EXPECT_EQ(fsm.state(), found->second.state);
        EXPECT_EQ(fsm.errors(), 0u);
      }
    }
  }
}

TEST(NodeFsm, AConnectionThatBreaksWhileLentIsClosedWhenItComesBack) {
  for (const Event fate : {broken, close}) {
    for (const Event back : {returned_open, returned_broken}) {
      NodeFsm fsm = reach(State::busy);
      EXPECT_EQ(fsm.resume(fate), Action::none);
      EXPECT_TRUE(fsm.doomed());
      EXPECT_EQ(fsm.resume(fate), Action::none) << "told twice";
      EXPECT_EQ(fsm.resume(back), Action::close);
      EXPECT_EQ(fsm.state(), State::closing);
      EXPECT_FALSE(fsm.doomed());
      EXPECT_EQ(fsm.resume(closed), Action::forget);
      EXPECT_EQ(fsm.errors(), 0u);
    }
  }
}

TEST(NodeFsm, AConnectionIsLentAgainAndAgain) {
  NodeFsm fsm = reach(State::idle);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(fsm.resume(lent), Action::none);
    EXPECT_EQ(fsm.resume(returned_open), Action::offer);
  }
  EXPECT_EQ(fsm.resume(returned_open), Action::none) << "given back twice";
  EXPECT_EQ(fsm.errors(), 1u);
  EXPECT_EQ(fsm.state(), State::idle);
}

}  // namespace
}  // namespace ratesync::pool
