"""A result is delivered when the archive has committed itself to keep it, and not before (PS3.4 annex J)."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from pydicom import Dataset
from pynetdicom import AE
from pynetdicom.sop_class import Verification

from pipeline.camera import examination, expose
from pipeline.phantom import phantom
from tests.hospital.end_to_end.committing import Archive, Transaction


def _scan(seed: int) -> tuple[Dataset, ...]:
    return expose(phantom(seed, residual=True, stratum="uptake_1_up"), examination(seed), "two_frames")


def _events(node: Any, name: str) -> list[str]:
    return [detail for event, detail in node.query("select event, detail from event order by id") if event == name]


def _delivered_to(node: Any) -> Any:
    return json.loads(node.rows()[0]["delivered_to"])["pacs0"]


def test_a_result_counts_as_delivered_when_orthanc_has_committed_itself(
    make_node: Callable[..., Any], start_orthanc: Callable[..., Any], camera: Callable[..., None]
) -> None:
    orthanc = start_orthanc(ae_title="KEEPER")
    orthanc.storage_commitment = True
    node = make_node(orthanc).start()
    orthanc.know("REMNANT", node.port)
    (ds,) = _scan(5100)
    camera(node.port, [ds])
    (row,) = node.wait_for_rows(1, ("delivered",))
    assert json.loads(row["delivered_to"]) == {"pacs0": "acknowledged"}
    assert row["last_error"] is None
    assert len(orthanc.find(str(ds.StudyInstanceUID))) == 2
    assert _events(node, "stored") == ["pacs0: status 0000"] * 2
    assert sorted(_events(node, "committed")) == ["pacs0: sc", "pacs0: sr"]
    asked = node.query("select count(*), count(reported_at), count(failure_reason) from commitment")
    assert asked == [(2, 2, 0)]


@pytest.mark.parametrize("reports", ["same", "new"])
def test_the_report_may_come_on_our_association_or_on_a_new_one(
    make_node: Callable[..., Any], make_archive: Callable[..., Archive], camera: Callable[..., None], reports: str
) -> None:
    archive = make_archive(reports)
    node = make_node(archive).start()
    archive.node_port = lambda: node.port
    camera(node.port, _scan(5101))
    node.wait_for_rows(1, ("delivered",))
    assert len(archive.stored) == 2
    kept = {uid for one in archive.asked for _, uid in one.references}
    assert kept == {uid for uid, _ in archive.stored} == set(node.results())


def test_what_the_archive_does_not_have_is_sent_again_and_asked_for_again(
    make_node: Callable[..., Any], make_archive: Callable[..., Archive], camera: Callable[..., None], wait: Any
) -> None:
    archive = make_archive("not")
    node = make_node(archive).start()
    archive.node_port = lambda: node.port
    camera(node.port, _scan(5102))
    wait(lambda: len({uid for one in archive.asked for _, uid in one.references}) == 2, "both were asked for")
    asked = {uid: one for one in archive.asked for _, uid in one.references}
    lost = archive.stored[0][0]
    assert archive.report(asked[lost], {lost}) == 0x0000
    archive.reports = "new"
    node.wait_for_rows(1, ("delivered",))
    twice = [data for uid, data in archive.stored if uid == lost]
    assert len(archive.stored) == 3
    assert twice[0] == twice[1], "a re-send has the same bytes"
    (why,) = _events(node, "not_committed")
    assert "it does not have the object (0112)" in why


def test_a_silent_archive_is_asked_again_and_its_late_report_on_the_first_asking_counts(
    make_node: Callable[..., Any], make_archive: Callable[..., Archive], camera: Callable[..., None], wait: Any
) -> None:
    archive = make_archive("not")
    node = make_node(archive).start()
    archive.node_port = lambda: node.port
    camera(node.port, _scan(5103))
    wait(lambda: len(archive.asked) >= 4, "asked again")
    (row,) = node.rows()
    assert (row["state"], _delivered_to(node)) == ("sending", "pending")
    assert len({one.uid for one in archive.asked}) == len(archive.asked), "each asking has a Transaction UID of its own"
    assert len(archive.stored) == 2, "what is stored is not sent again"
    first: dict[str, Transaction] = {}
    for one in archive.asked:
        for _, uid in one.references:
            first.setdefault(uid, one)
    for one in {one.uid: one for one in first.values()}.values():
        assert archive.report(one) == 0x0000
    node.wait_for_rows(1, ("delivered",))


def test_nobody_else_can_report_and_a_report_counts_once(
    make_node: Callable[..., Any], make_archive: Callable[..., Archive], camera: Callable[..., None], wait: Any
) -> None:
    archive = make_archive("not")
    node = make_node(archive).start()
    archive.node_port = lambda: node.port
    camera(node.port, _scan(5104))
    wait(lambda: len({uid for one in archive.asked for _, uid in one.references}) == 2, "both were asked for")
    ours = archive.asked[0]
    assert archive.report(ours, calling="STRANGER") is None, "an unknown AE title is refused"
    assert archive.report(ours, calling="OPTIMA1") is None, "a camera may not report"
    assert archive.report(Transaction("2.25.4711", ours.references)) == 0x0115
    assert archive.report(ours, event_type=3) == 0x0113
    assert _events(node, "committed") == []
    (row,) = node.rows()
    assert row["state"] == "sending"
    for one in archive.asked:
        assert archive.report(one) == 0x0000
    node.wait_for_rows(1, ("delivered",))
    told = _events(node, "committed")
    for one in archive.asked:
        assert archive.report(one, {uid for _, uid in one.references}) == 0x0000, "what was reported stays"
    (row,) = node.rows()
    assert row["state"] == "delivered"
    assert _events(node, "committed")[: len(told)] == told
    # The archive may report, and nothing else.
    ae = AE(ae_title=archive.ae_title)
    ae.add_requested_context(Verification)
    assoc = ae.associate("127.0.0.1", node.port, ae_title="REMNANT")
    assert not assoc.accepted_contexts
    assoc.abort()


def test_a_node_that_was_killed_after_asking_takes_the_report_when_it_is_back(
    make_node: Callable[..., Any], make_archive: Callable[..., Archive], camera: Callable[..., None], wait: Any
) -> None:
    archive = make_archive("not")
    node = make_node(archive).start()
    archive.node_port = lambda: node.port
    camera(node.port, _scan(5105))
    wait(lambda: len({uid for one in archive.asked for _, uid in one.references}) == 2, "both were asked for")
    before = {one.uid: one for one in archive.asked}
    for role in ("send", "receive"):
        node.kill(role)
    for role in ("send", "receive"):
        node.wait_until_ready(role)
    for one in before.values():
        assert archive.report(one) == 0x0000
    node.wait_for_rows(1, ("delivered",))
    assert len(archive.stored) == 2, "nothing was sent twice"


def test_an_archive_that_commits_itself_to_nothing_leaves_the_row_waiting_and_says_why(
    make_node: Callable[..., Any], start_storescp: Callable[..., Any], camera: Callable[..., None], wait: Any
) -> None:
    scp = start_storescp()
    node = make_node(SimpleNamespace(ae_title=scp.ae_title, port=scp.port, storage_commitment=True)).start()
    camera(node.port, _scan(5106))
    (row,) = wait(lambda: [row for row in node.rows() if row["last_error"]], "the row says why it waits")
    assert row["state"] == "sending"
    assert row["last_error"] == (
        "pacs0: stored, waits for Storage Commitment with status 0000: the archive does no Storage Commitment"
    )
    assert len(scp.files()) == 2
