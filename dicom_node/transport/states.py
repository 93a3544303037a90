"""The upper layer's state machine as data: PS3.8 9.2, for a side that is called and never calls.

`TABLE` holds every pair of event and state that such a side can meet, with the action and the state that follows, named
as in the standard's tables 9-1 to 9-10. A pair that is not in it raises `Refused`: it would be an error of ours.

Left out: states of the calling side (4, 5), and those of a side that asks for release itself (7, 9 to 12). We end an
association by A-ABORT, so a release collision cannot come about: an A-RELEASE-RP that nobody asked for is a violation.
In state 13 only the end of the connection and the timer count; everything else is dropped unread, so that a stream of
rubbish is answered by one A-ABORT and not by thousands (AA-7).
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType


class State(StrEnum):
    """Tables 9-1 to 9-5."""

    IDLE = "Sta1"
    AWAIT_REQUEST = "Sta2"
    AWAIT_DECISION = "Sta3"
    TRANSFER = "Sta6"
    AWAIT_RELEASE = "Sta8"
    AWAIT_CLOSE = "Sta13"


class Event(StrEnum):
    """Table 9-10's rows. `*_PDU` came from the peer; the others are ours."""

    ACCEPT_PDU = "Evt3"
    REJECT_PDU = "Evt4"
    CONNECTED = "Evt5"
    REQUEST_PDU = "Evt6"
    ACCEPT = "Evt7"
    REJECT = "Evt8"
    SEND = "Evt9"
    DATA_PDU = "Evt10"
    RELEASE_PDU = "Evt12"
    RELEASED_PDU = "Evt13"
    RELEASE = "Evt14"
    ABORT = "Evt15"
    ABORT_PDU = "Evt16"
    CLOSED = "Evt17"
    TIMER = "Evt18"
    INVALID_PDU = "Evt19"


class Action(StrEnum):
    """Tables 9-6 to 9-9."""

    AWAIT_REQUEST = "AE-5"
    DECIDE = "AE-6"
    SEND_ACCEPT = "AE-7"
    SEND_REJECT = "AE-8"
    SEND_DATA = "DT-1"
    TAKE_DATA = "DT-2"
    TAKE_RELEASE = "AR-2"
    SEND_RELEASED = "AR-4"
    NOTE_CLOSED = "AR-5"
    SEND_ABORT = "AA-1"
    CLOSE = "AA-2"
    TAKE_ABORT = "AA-3"
    NOTE_LOST = "AA-4"
    NOTE_GONE = "AA-5"
    SEND_PROVIDER_ABORT = "AA-8"


class Refused(ValueError):  # noqa: N818 - the word of PS3.8 for it
    """An event that cannot happen in a state."""


_VIOLATIONS = (
    Event.ACCEPT_PDU,
    Event.REJECT_PDU,
    Event.DATA_PDU,
    Event.RELEASE_PDU,
    Event.RELEASED_PDU,
    Event.REQUEST_PDU,
    Event.INVALID_PDU,
)


def _table() -> dict[tuple[Event, State], tuple[Action, State]]:
    violated = (Action.SEND_PROVIDER_ABORT, State.AWAIT_CLOSE)
    table = {(Event.CONNECTED, State.IDLE): (Action.AWAIT_REQUEST, State.AWAIT_REQUEST)}
    # Before an association there is no service provider yet, so that the abort names the user as its source.
    table |= {(event, State.AWAIT_REQUEST): (Action.SEND_ABORT, State.AWAIT_CLOSE) for event in _VIOLATIONS}
    for state in (State.AWAIT_DECISION, State.TRANSFER, State.AWAIT_RELEASE):
        table |= {(event, state): violated for event in _VIOLATIONS}
        table[Event.ABORT, state] = (Action.SEND_ABORT, State.AWAIT_CLOSE)
        table[Event.ABORT_PDU, state] = (Action.TAKE_ABORT, State.IDLE)
        table[Event.CLOSED, state] = (Action.NOTE_LOST, State.IDLE)
    return table | {
        (Event.REQUEST_PDU, State.AWAIT_REQUEST): (Action.DECIDE, State.AWAIT_DECISION),
        (Event.ABORT_PDU, State.AWAIT_REQUEST): (Action.CLOSE, State.IDLE),
        (Event.CLOSED, State.AWAIT_REQUEST): (Action.NOTE_GONE, State.IDLE),
        (Event.TIMER, State.AWAIT_REQUEST): (Action.CLOSE, State.IDLE),
        (Event.ACCEPT, State.AWAIT_DECISION): (Action.SEND_ACCEPT, State.TRANSFER),
        (Event.REJECT, State.AWAIT_DECISION): (Action.SEND_REJECT, State.AWAIT_CLOSE),
        (Event.SEND, State.TRANSFER): (Action.SEND_DATA, State.TRANSFER),
        (Event.DATA_PDU, State.TRANSFER): (Action.TAKE_DATA, State.TRANSFER),
        (Event.RELEASE_PDU, State.TRANSFER): (Action.TAKE_RELEASE, State.AWAIT_RELEASE),
        (Event.RELEASE, State.AWAIT_RELEASE): (Action.SEND_RELEASED, State.AWAIT_CLOSE),
        (Event.CLOSED, State.AWAIT_CLOSE): (Action.NOTE_CLOSED, State.IDLE),
        (Event.TIMER, State.AWAIT_CLOSE): (Action.CLOSE, State.IDLE),
    }


TABLE: Mapping[tuple[Event, State], tuple[Action, State]] = MappingProxyType(_table())


def step(state: State, event: Event) -> tuple[Action, State]:
    """Return what to do and where it leads. Raises Refused for a pair that is not in the table."""
    try:
        return TABLE[event, state]
    except KeyError as error:
        raise Refused(f"{event.name} ({event}) cannot happen in {state.name} ({state})") from error
