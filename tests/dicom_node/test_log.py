"""Log lines: one event a line, whatever a peer puts into a field."""

import io
import json
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
import structlog

from dicom_node import log

FORGED = "CAMERA\n2026-01-01 [info] stored sop_instance_uid=1.2.3\x1b[31m\x00"


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], Callable[[], list[str]]]]:
    """Set logging up, as JSON or as text; then read the lines that were written."""
    levels = {
        name: logging.getLogger(name).level for name in ("pynetdicom", "pydicom", "apscheduler", "alembic", "highdicom")
    }

    def set_up(as_json: bool) -> Callable[[], list[str]]:
        stream = io.StringIO()
        monkeypatch.setattr(sys, "stderr", stream)
        log.set_up(as_json=as_json, role="receive")
        return lambda: stream.getvalue().splitlines()

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back what `set_up` changes
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    yield set_up
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_json_is_one_object_a_line_with_role_part_event_and_fields(lines) -> None:
    written = lines(True)
    log.get("receiver").info("stored", scan=7, took_ms=1.5)
    log.get("receiver").warning("store_refused", status="A700")
    first, second = (json.loads(line) for line in written())
    assert (
        first.items() >= {"event": "stored", "role": "receive", "part": "receiver", "level": "info", "scan": 7}.items()
    )
    assert first["timestamp"].endswith("Z")
    assert (second["event"], second["level"], second["status"]) == ("store_refused", "warning", "A700")


@pytest.mark.parametrize("as_json", [True, False])
def test_a_peer_cannot_forge_a_line(lines, as_json: bool) -> None:
    written = lines(as_json)
    log.get("receiver").info("association_refused", calling=FORGED)
    assert len(written()) == 1
    assert all(character.isprintable() for character in written()[0])


def test_what_was_escaped_can_still_be_read(lines) -> None:
    written = lines(True)
    log.get("receiver").info("association_refused", calling=FORGED)
    assert json.loads(written()[0])["calling"].startswith("CAMERA\\n2026")


def test_a_peer_cannot_fill_the_disk_with_one_field(lines) -> None:
    written = lines(True)
    log.get("receiver").info("association_refused", calling="A" * 100_000)
    assert json.loads(written()[0])["calling"] == "A" * 500


def test_words_of_every_script_stay_as_they_are(lines) -> None:
    written = lines(True)
    log.get("receiver").info("stored", why="größer als 2 µs")
    assert json.loads(written()[0])["why"] == "größer als 2 µs"


@pytest.mark.parametrize("as_json", [True, False])
def test_an_exception_is_one_line_that_says_where_and_quotes_nothing(lines, as_json: bool) -> None:
    written = lines(as_json)
    try:
        try:
            int("Erfunden^Anna\n2026-01-01 [info] stored")
        except ValueError as error:
            raise RuntimeError("of Erfunden^Anna") from error
    except RuntimeError:
        log.get("receiver").exception("store_failed")
    (line,) = written()
    assert "RuntimeError at test_log.py:" in line
    assert "after ValueError at test_log.py:" in line
    assert "Erfunden" not in line


def test_an_error_that_nobody_caught_is_one_line_too(lines) -> None:
    written = lines(True)

    def fail() -> None:
        raise ValueError("of Erfunden^Anna")

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    try:
        fail()
    except ValueError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    first, second = (json.loads(line) for line in written())
    assert (first["event"], second["event"]) == ("thread_ended_by_error", "ended_by_error")
    assert first["trace"].startswith("ValueError at test_log.py:")
    assert "Erfunden" not in str((first, second))


def test_what_is_left_out_is_counted_and_told_with_the_next_that_is_said() -> None:
    pace = log.Pace(at_once=2, per_s=0)
    assert [pace.admit() for _ in range(5)] == [0, 0, None, None, None]
    assert (pace.rest(), pace.rest()) == (3, 0)
    quick = log.Pace(at_once=1, per_s=1e9)
    assert [quick.admit() for _ in range(3)] == [0, 0, 0]


def test_warnings_of_libraries_that_quote_elements_are_silent(lines) -> None:
    written = lines(False)
    warnings.warn("Invalid value for VR DA: '19x50101'", UserWarning, stacklevel=1)
    assert written() == []


def test_libraries_that_log_elements_are_silent(lines, caplog: pytest.LogCaptureFixture) -> None:
    lines(True)
    logging.getLogger("pydicom").error("PatientName is Erfunden^Anna")
    logging.getLogger("pynetdicom").error("PatientName is Erfunden^Anna")
    assert caplog.text == ""
