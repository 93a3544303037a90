"""`remnant doctor` asks each destination what it takes, and says what it would get before the first scan comes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pynetdicom import AE
from pynetdicom.transport import ThreadedAssociationServer

from dicom_node.contexts import REPORT_CHAIN, RESULT_CLASSES
from dicom_node.doctor import Check, examine, what_it_gets
from dicom_node.settings import Settings

SC, SEG = RESULT_CLASSES["sc"].uid, RESULT_CLASSES["seg"].uid
THREE_D, COMPREHENSIVE, ENHANCED, BASIC_TEXT = (one.uid for one in REPORT_CHAIN)
EVERY = (THREE_D, COMPREHENSIVE, ENHANCED, BASIC_TEXT, SC, SEG)


@pytest.fixture
def archive() -> Iterator[Callable[..., int]]:
    """`archive(class, ...)`: the port of an archive that takes these classes and answers C-ECHO."""
    servers: list[ThreadedAssociationServer] = []

    def start(*takes: str) -> int:
        ae = AE(ae_title="ARCHIVE")
        for uid in ("1.2.840.10008.1.1", *takes):
            ae.add_supported_context(uid)
        server = ae.start_server(("127.0.0.1", 0), block=False)
        assert server is not None
        servers.append(server)
        return int(server.server_address[1])

    yield start
    for server in servers:
        server.shutdown()


def looked_at(tmp_path: Path, port: int, results: tuple[str, ...] = ("sr", "sc")) -> dict[str, Check]:
    settings = Settings.model_validate(
        {
            "storage": {"directory": str(tmp_path / "var")},
            "database": {"url": f"sqlite:///{tmp_path / 'worklist.db'}"},
            "destinations": [
                {
                    "name": "pacs",
                    "ae_title": "ARCHIVE",
                    "host": "127.0.0.1",
                    "port": port,
                    "test": True,
                    "results": results,
                }
            ],
        }
    )
    return {check.name: check for check in examine(settings)}


def test_the_doctor_says_which_report_an_archive_would_get(tmp_path: Path, archive: Callable[..., int]) -> None:
    checks = looked_at(tmp_path, archive(ENHANCED, BASIC_TEXT, SC))
    assert checks["destination pacs"].ok
    assert checks["results to pacs"] == Check(
        "results to pacs", True, "sr: Enhanced SR (refuses Comprehensive 3D SR, Comprehensive SR); sc: yes"
    )


def test_an_archive_that_takes_nothing_of_what_it_is_to_get_is_unhealthy(
    tmp_path: Path, archive: Callable[..., int]
) -> None:
    check = looked_at(tmp_path, archive(SEG))["results to pacs"]
    assert not check.ok
    assert check.detail.startswith(
        "sr: nothing (refuses Comprehensive 3D SR, Comprehensive SR, Enhanced SR, Basic Text"
    )


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # pynetdicom, after a failed connection
def test_an_archive_that_is_away_is_not_asked_what_it_takes(tmp_path: Path) -> None:
    checks = looked_at(tmp_path, 9)
    assert not checks["destination pacs"].ok
    assert "results to pacs" not in checks


@pytest.mark.parametrize(
    ("results", "taken", "drawn", "ok", "said"),
    [
        (("sr", "sc"), EVERY, True, True, "sr: Comprehensive 3D SR; sc: yes"),
        (("sr", "sc"), (SC,), True, True, "sr: the Secondary Capture alone (refuses"),
        (("sr",), (SC,), True, True, "sr: the Secondary Capture alone (refuses"),
        (("sr",), (SC,), False, False, 'give it "sc"'),
        (("sc",), (THREE_D,), True, False, 'sc: refused; remove "sc"'),
        (("sr", "sc", "seg"), (THREE_D, SC), True, False, 'seg: refused; remove "seg"'),
        (("sr", "seg-posterior"), EVERY, False, True, "seg-posterior: yes"),
    ],
)
def test_what_a_destination_gets_follows_from_what_it_takes(
    results: tuple[str, ...], taken: tuple[str, ...], drawn: bool, ok: bool, said: str
) -> None:
    well, detail = what_it_gets(results, {uid: uid in taken for uid in EVERY}, drawn=drawn)
    assert well is ok
    assert said in detail
