"""The state table is the standard's, held to pynetdicom's copy of PS3.8 table 9-10, and everything else is refused."""

import itertools

import pytest
from pynetdicom.fsm import TRANSITION_TABLE

from dicom_node.transport.states import TABLE, Action, Event, Refused, State, step

# Events that only a calling side has, or one that asks for release itself; and what we drop unread in state 13.
NOT_OURS = {"Evt1", "Evt2", "Evt11"}
DROPPED = {(f"Evt{number}", "Sta13") for number in (3, 4, 6, 10, 12, 13, 16, 19)}
# A release is answered at once, without leaving a moment in which data could be asked to be sent.
NEVER_ASKED = {("Evt9", "Sta8")}


def test_every_pair_of_the_standard_that_a_called_side_meets_is_in_the_table_with_its_action() -> None:
    theirs = {
        pair: action
        for pair, action in TRANSITION_TABLE.items()
        if pair[0] not in NOT_OURS and pair[1] in set(State) and pair not in DROPPED | NEVER_ASKED
    }
    assert {(str(event), str(state)): str(action) for (event, state), (action, _) in TABLE.items()} == theirs


@pytest.mark.parametrize(
    ("event", "state"), [pair for pair in itertools.product(Event, State) if pair not in TABLE], ids=str
)
def test_a_pair_that_is_not_in_the_table_is_refused(event: Event, state: State) -> None:
    with pytest.raises(Refused, match=str(state)):
        step(state, event)


@pytest.mark.parametrize("action", [Action.SEND_REJECT, Action.SEND_RELEASED, Action.SEND_ABORT])
def test_whoever_was_told_the_end_is_given_time_to_close(action: Action) -> None:
    assert {following for done, following in TABLE.values() if done is action} == {State.AWAIT_CLOSE}


def test_every_state_leads_to_the_end_of_the_connection() -> None:
    for state in State:
        reached, before = {state}, set[State]()
        while reached != before:
            before = set(reached)
            reached |= {following for (_, at), (_, following) in TABLE.items() if at in before}
        assert State.IDLE in reached
