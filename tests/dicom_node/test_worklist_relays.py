"""A camera's requests for Storage Commitment in the worklist, on both databases."""

import pytest
from sqlalchemy import text

from dicom_node import worklist
from dicom_node.worklist import (
    DueRelay,
    ask_relayed,
    decide_relay,
    due_relay,
    forget_relays,
    record_relayed,
    record_request,
    record_told,
    release_relays,
    wait_for_archives,
)
from dicom_node.worklist.clock import seconds_between

NM = "1.2.840.10008.5.1.4.1.1.20"
PACS, COPY = "pacs", "copy"


def request(engine, transaction="2.25.1", objects=("2.25.10", "2.25.11"), source="OPTIMA1"):
    references = [(NM, uid) for uid in objects]
    return record_request(
        engine, source=source, address="10.0.0.12", transaction_uid=transaction, references=references
    )


def due(engine, *, deciding=True, archives=(PACS, COPY), owner="us", hold_s=60) -> DueRelay | None:
    return due_relay(engine, archives, deciding=deciding, owner=owner, hold_s=hold_s)


def ask(engine, one, destination=PACS, transaction="2.25.100"):
    ask_relayed(
        engine, one.id, destination=destination, retrieve_ae_title=destination.upper(), transaction_uid=transaction
    )


def report(engine, transaction, committed=(), failed=None, destination=PACS):
    return record_relayed(engine, (destination,), transaction, set(committed), failed or {})


def told(engine, name):
    return [one.detail for one in worklist.events(engine, None) if one.event == name]


def test_a_request_is_asked_then_told_and_its_objects_name_the_archive_that_keeps_them(engine):
    assert request(engine) == "taken"
    one = due(engine)
    assert (one.source, one.address, one.transaction_uid) == ("OPTIMA1", "10.0.0.12", "2.25.1")
    assert [(o.sop_class_uid, o.sop_instance_uid, o.kept_by, o.nowhere) for o in one.objects] == [
        (NM, "2.25.10", "", False),
        (NM, "2.25.11", "", False),
    ]
    assert due(engine) is None, "whoever has taken it has it alone"
    ask(engine, one)
    wait_for_archives(engine, one.id, delay_s=60, error="")
    assert due(engine) is None
    assert report(engine, "2.25.100", ["2.25.10", "2.25.11", "2.25.99"])
    one = due(engine)
    assert [o.kept_by for o in one.objects] == ["PACS", "PACS"], "it is due at once when nothing is open"
    assert due(engine, deciding=False) is None
    decide_relay(engine, one.id)
    assert due(engine) is None
    one = due(engine, deciding=False)
    assert one.attempts == 0
    record_told(engine, one.id, state="reporting", error="no connection", delay_s=0)
    one = due(engine, deciding=False)
    assert one.attempts == 1
    record_told(engine, one.id, state="reported", error="", delay_s=0)
    assert due(engine, deciding=False) is None
    assert told(engine, "commitment_requested") == ["OPTIMA1: 2.25.1, 2 objects"]
    assert told(engine, "commitment_reported") == ["OPTIMA1: 2.25.1, 2 of 2 objects kept by an archive"]
    assert worklist.verify_events(engine) == ()


def test_a_report_that_comes_before_the_asking_has_ended_is_not_waited_for(engine):
    request(engine)
    one = due(engine)
    ask(engine, one)
    report(engine, "2.25.100", ["2.25.10", "2.25.11"])
    wait_for_archives(engine, one.id, delay_s=60, error="")
    assert due(engine) is not None


def test_only_a_unanimous_answer_says_that_an_object_is_nowhere(engine):
    request(engine, objects=("2.25.10",))
    one = due(engine, hold_s=0)
    ask(engine, one, PACS, "2.25.100")
    ask(engine, one, COPY, "2.25.101")
    report(engine, "2.25.100", (), {"2.25.10": 0x0112})
    assert not due(engine, hold_s=0).objects[0].nowhere, "the other has said nothing"
    assert due(engine, hold_s=0, archives=(PACS,)).objects[0].nowhere
    report(engine, "2.25.101", (), {"2.25.10": 0x0110}, destination=COPY)
    assert not due(engine, hold_s=0).objects[0].nowhere, "another failure is no statement about the object"
    ask(engine, one, COPY, "2.25.102")
    report(engine, "2.25.102", (), {"2.25.10": 0x0112}, destination=COPY)
    assert due(engine, hold_s=0).objects[0].nowhere, "what it said last counts"
    assert not due(engine, hold_s=0, archives=()).objects[0].nowhere


def test_a_report_counts_of_the_archive_that_was_asked_and_once(engine):
    request(engine)
    one = due(engine, hold_s=0)
    ask(engine, one)
    assert not report(engine, "2.25.100", ["2.25.10"], destination=COPY), "another archive was asked"
    assert not report(engine, "2.25.999", ["2.25.10"])
    assert report(engine, "2.25.100", ["2.25.10"], {"2.25.11": 0x0112})
    assert report(engine, "2.25.100", ["2.25.11"]), "known, and nothing new"
    assert [o.kept_by for o in due(engine, hold_s=0).objects] == ["PACS", ""]
    ask(engine, one, COPY, "2.25.101")
    report(engine, "2.25.101", ["2.25.10", "2.25.11"], destination=COPY)
    assert [o.kept_by for o in due(engine, hold_s=0).objects] == ["PACS", "COPY"], "the first archive keeps it"


def test_what_an_archive_commits_itself_to_late_changes_nothing_of_what_the_camera_heard(engine):
    request(engine)
    one = due(engine, hold_s=0)
    ask(engine, one)
    decide_relay(engine, one.id)
    again = due(engine, deciding=False)
    record_told(engine, again.id, state="reported", error="", delay_s=0)
    assert report(engine, "2.25.100", ["2.25.10", "2.25.11"])
    assert due(engine) is None
    assert due(engine, deciding=False) is None
    assert told(engine, "commitment_reported") == ["OPTIMA1: 2.25.1, 0 of 2 objects kept by an archive"]
    assert request(engine) == "taken", "asked again, it is told again, with what is known now"
    assert [o.kept_by for o in due(engine, deciding=False).objects] == ["PACS", "PACS"]


def test_a_transaction_uid_is_one_cameras_and_for_one_set_of_objects(engine):
    assert request(engine) == "taken"
    assert request(engine, objects=("2.25.11", "2.25.10")) == "taken"
    assert request(engine, objects=("2.25.10",)) == "reused"
    assert request(engine, source="OPTIMA2", objects=("2.25.10",)) == "taken"
    assert due(engine) is not None
    assert due(engine) is not None
    assert due(engine) is None


def test_a_camera_cannot_fill_the_database_with_requests(engine, monkeypatch):
    monkeypatch.setattr(worklist.relays, "MOST_OPEN", 2)
    assert [request(engine, f"2.25.{number}") for number in range(1, 4)] == ["taken", "taken", "too_many"]
    assert request(engine, "2.25.3", source="OPTIMA2") == "taken", "another camera is not held back by it"
    assert request(engine, "2.25.1") == "taken", "nor is what was taken before"


def test_what_a_killed_sender_had_taken_is_due_again_when_it_starts(engine):
    request(engine)
    assert due(engine, hold_s=300) is not None
    assert release_relays(engine, "somebody else") == 0
    assert due(engine) is None
    assert release_relays(engine, "us") == 1
    assert due(engine) is not None


@pytest.mark.parametrize("state", ["reported", "given_up"])
def test_what_was_told_goes_after_a_while_and_what_waits_stays(engine, state):
    request(engine)
    request(engine, "2.25.2")
    one = due(engine, hold_s=0)
    ask(engine, one)
    report(engine, "2.25.100", (), {"2.25.10": 0x0112})
    decide_relay(engine, one.id)
    record_told(engine, one.id, state=state, error="", delay_s=0)
    assert forget_relays(engine, 1) == 0
    assert forget_relays(engine, -1) == 1
    assert not report(engine, "2.25.100", ["2.25.10"])
    assert due(engine) is not None
    event = "commitment_reported" if state == "reported" else "commitment_not_reported"
    assert len(told(engine, event)) == 1


def test_a_clock_that_jumps_takes_the_deadlines_of_a_request_with_it(engine):
    request(engine)
    one = due(engine)
    wait_for_archives(engine, one.id, delay_s=4000, error="")
    assert worklist.follow_clock(engine, -3600) == 1
    with engine.connect() as conn:
        not_before, at = conn.execute(text("SELECT not_before, updated_at FROM relay")).one()
    assert 300 < seconds_between(at, not_before) < 500
