"""The ticks and the guards of the service, on a real spool and a real database."""

import dataclasses
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text

from dicom_node import service, spool, worklist
from dicom_node.errors import RemnantError, SettingsError
from dicom_node.service import House
from dicom_node.settings import Settings
from pipeline.camera import examination, expose, foreign
from pipeline.phantom import phantom
from pipeline.views import facts_of


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    opened = service.open_house(Settings(storage={"directory": tmp_path / "var", "min_free": "1 MiB"}))
    yield opened
    opened.engine.dispose()


def _receive(house: House, ds: Any) -> worklist.Receipt:
    name, digest = spool.put_object(house.spool, b"", str(ds.SOPInstanceUID).encode())
    stored = worklist.Stored(spool_name=name, sha256=digest, size_bytes=64, transfer_syntax_uid="1.2.840.10008.1.2.1")
    rules = worklist.IntakeRules(
        require_views=("anterior", "posterior"), pair_window_s=3600, views_timeout_s=3600, timezone=house.settings.zone
    )
    return worklist.receive(house.engine, facts_of(ds), stored, source_aet="OPTIMA1", rules=rules)


def _kept(house: House) -> list[str]:
    return [file.file_name for file in worklist.kept_files(house.engine) if file.purged_at is None]


def _age(house: House, days: int) -> None:
    with house.engine.begin() as conn:
        conn.execute(
            text("UPDATE scan SET at_rest_since = strftime('%Y-%m-%dT%H:%M:%fZ', 'now', :ago)"),
            {"ago": f"-{days} days"},
        )


def test_the_purge_removes_bytes_that_are_due_and_a_resend_is_still_recognised(house: House) -> None:
    ct = foreign("ct_slice", examination(1))
    _receive(house, ct)
    (name,) = _kept(house)
    _age(house, 1)
    service._purge(house)
    assert (house.spool.objects / name).exists()
    _age(house, 3)
    service._purge(house)
    assert not (house.spool.objects / name).exists()
    assert not _receive(house, ct).new
    assert _kept(house) == []


def test_what_is_queued_is_never_purged_however_old(house: House) -> None:
    (scan,) = expose(phantom(1), examination(2), "two_frames")
    _receive(house, scan)
    with house.engine.begin() as conn:
        conn.execute(text("UPDATE scan SET received_at = '2001-01-01T00:00:00.000Z', updated_at = received_at"))
    service._purge(house)
    (name,) = _kept(house)
    assert (house.spool.objects / name).exists()


def test_a_lease_is_broken_only_when_its_counter_stood_still_for_our_own_time(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    (scan,) = expose(phantom(1), examination(3), "two_frames")
    _receive(house, scan)
    claim = worklist.claim(house.engine, "elsewhere:work", "boot-1")
    assert claim is not None
    clock = [100.0]
    monkeypatch.setattr(service.time, "monotonic", lambda: clock[0])
    observer = service._LeaseObserver(house.engine)
    for _ in range(5):
        clock[0] += service.LEASE_S - 1
        worklist.heartbeat(house.engine, claim)
        assert not observer.look()
    clock[0] += service.LEASE_S - 1
    assert not observer.look()
    clock[0] += 2
    assert observer.look()
    assert worklist.row(house.engine, claim.scan_id)["state"] == "queued"
    assert not worklist.heartbeat(house.engine, claim)


@pytest.mark.parametrize("jump_s", [3 * 86_400, -7_200])
def test_a_clock_that_jumps_gives_up_no_view_and_removes_no_bytes(
    house: House, monkeypatch: pytest.MonkeyPatch, jump_s: int
) -> None:
    passed_s, jumped_s = [0.0], [0]

    def strftime(shape: str, *rest: str) -> str:
        """SQLite's own, on a clock that we hold."""
        if rest[0] == "now":
            rest = ("now", f"{passed_s[0] + jumped_s[0]:.3f} seconds", *rest[1:])
        with closing(sqlite3.connect(":memory:")) as plain:
            marks = ", ".join("?" * (1 + len(rest)))
            return str(plain.execute(f"SELECT strftime({marks})", (shape, *rest)).fetchone()[0])

    event.listen(house.engine, "connect", lambda connection, _: connection.create_function("strftime", -1, strftime))
    house.engine.dispose()
    monkeypatch.setattr(service.time, "monotonic", lambda: passed_s[0])
    (view,) = expose(phantom(1), examination(4), "anterior_only")
    receipt = _receive(house, view)
    _receive(house, foreign("ct_slice", examination(5)))
    clock = service._ClockWatch(house.engine)
    assert not service._expire_views(house, clock)

    for jumped_s[0] in (jump_s, 0, jump_s):  # away, corrected, and away again, ten minutes apart
        passed_s[0] += 600
        assert not service._expire_views(house, clock)
        service._purge(house)

    assert worklist.row(house.engine, receipt.scan_id)["state"] == "receiving"
    assert len(_kept(house)) == 2
    assert [one.event for one in worklist.events(house.engine, None)] == ["clock_jumped"] * 3
    passed_s[0] += 1700
    assert not service._expire_views(house, clock)
    passed_s[0] += 200
    assert service._expire_views(house, clock), "an hour of true time is over"


def test_only_one_process_holds_a_role_and_the_other_is_told(house: House) -> None:
    path = house.spool.run / "work.lock"
    with (
        service._lock(path, wait_s=0, what="the role work"),
        pytest.raises(RemnantError, match="Another process holds the role work"),
        service._lock(path, wait_s=0, what="the role work"),
    ):
        pass
    with service._lock(path, wait_s=0, what="the role work"):
        pass


@pytest.mark.parametrize(("release", "test", "allowed"), [
    ("demonstration", True, True), ("demonstration", False, False), ("research", False, True), ("local", False, True),
])  # fmt: skip
def test_demonstration_weights_may_send_to_test_archives_only(release: str, test: bool, allowed: bool) -> None:
    settings = Settings(destinations=({"name": "pacs", "ae_title": "PACS", "host": "localhost", "test": test},))
    record = dataclasses.replace(service.load_record(settings), release=release)
    check: Callable[[], None] = lambda: service.check_release(settings, record)  # noqa: E731 - called in two ways below
    if allowed:
        check()
    else:
        with pytest.raises(SettingsError, match="pacs is not marked test = true"):
            check()


def test_weights_of_another_preprocessing_are_refused_by_the_key_that_is_wrong() -> None:
    with pytest.raises(SettingsError, match=r"analysis\.preprocessing"):
        service.load_record(Settings(analysis={"preprocessing": "paper"}))
