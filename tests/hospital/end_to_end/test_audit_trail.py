"""The audit trail of a whole node: what its three processes did reaches the repository, also what it did meanwhile."""

import stat
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pynetdicom import AE
from pynetdicom.sop_class import Verification

from pipeline.camera import examination, expose
from pipeline.phantom import phantom
from tests.dicom_node.test_audit import Listener, event_of, read

STARTED, STOPPED = ("110100", "110120", "0"), ("110100", "110121", "0")
TRANSFERRED = ("110104", "0")
ALERT = ("110113", "110126", "4")


@pytest.fixture
def repositories() -> Iterator[Callable[..., Listener]]:
    made: list[Listener] = []

    def make(port: int = 0) -> Listener:
        made.append(Listener(port=port))
        return made[-1]

    yield make
    for one in made:
        one.close()


def _patients(root: ET.Element) -> set[str]:
    return {
        one.attrib["ParticipantObjectID"]
        for one in root.findall("ParticipantObjectIdentification")
        if one.attrib["ParticipantObjectTypeCodeRole"] == "1"
    }


def _when(root: ET.Element) -> str:
    return root.find("EventIdentification").attrib["EventDateTime"]  # type: ignore[union-attr]  # `read` has seen it


def test_what_a_node_did_while_the_repository_was_away_and_it_was_killed_is_told_in_order_when_it_is_back(
    make_node: Callable[..., Any],
    start_storescp: Callable[..., Any],
    camera: Callable[..., None],
    repositories: Callable[..., Listener],
    wait: Any,
) -> None:
    first = repositories()
    audit = f'[audit]\nhost = "127.0.0.1"\nport = {first.port}\ntransport = "tcp"\n'
    node = make_node(start_storescp(), source=audit).start()
    wait(lambda: [event_of(read(one)) for one in first.taken].count(STARTED) == 3, "three roles are told to have begun")
    first.close()

    ds = expose(phantom(5300, residual=True, stratum="uptake_1_up"), examination(5300), "two_frames")
    camera(node.port, ds)
    node.wait_for_rows(1, ("delivered",))
    stranger = AE(ae_title="STRANGER")
    stranger.add_requested_context(Verification)
    assert not stranger.associate("127.0.0.1", node.port, ae_title="REMNANT").is_established
    for role in ("send", "receive"):
        node.kill(role)
    spool = node.directory / "var" / "audit"
    assert stat.S_IMODE(spool.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in spool.iterdir()} == {0o600}
    for role in ("send", "receive"):
        node.wait_until_ready(role)

    second = repositories(first.port)
    # What one role does stands in its order; the alert may come before or after what another role sent meanwhile.
    wanted = [TRANSFERRED] * 3 + [ALERT] + [STARTED] * 2
    wait(
        lambda: sorted(event_of(read(one)) for one in second.taken) == sorted(wanted),
        "all that happened meanwhile is told once",
    )
    roots = [read(one) for one in second.taken]
    transfers = [one for one in roots if event_of(one) == TRANSFERRED]
    assert [_patients(one) for one in transfers] == [{ds[0].PatientID}] * 3
    times = [_when(one) for one in transfers]
    assert times == sorted(times)
    users = [{one.attrib["UserID"] for one in root.findall("ActiveParticipant")} for root in transfers]
    assert "OPTIMA1" in users[0], "first it was received, then sent"
    assert all("OPTIMA1" not in one for one in users[1:])
    node.stop()
    said = [event_of(read(one)) for one in second.taken[len(wanted) :]]
    lines = [line for path in sorted(spool.glob("*.messages")) for line in path.read_bytes().splitlines()]
    left = [event_of(read(line)) for line in lines if line]
    assert said + left == [STOPPED] * 3, "what the sender could not tell any more waits on the disk"
