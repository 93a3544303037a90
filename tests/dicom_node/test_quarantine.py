"""Quarantine: what is not used can be seen, used after all, or given up, and nobody's identity shows unasked."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from pydicom import Dataset

from dicom_node import quarantine, reconcile, service, spool, worklist
from dicom_node.service import House
from dicom_node.settings import Settings, load
from pipeline.camera import examination, expose
from pipeline.phantom import phantom
from pipeline.views import facts_of


def disputed(camera, verdict="other_pixels", **changed):
    """A finished scan and other bytes under its UID, compared; returns (row, number of the other bytes)."""
    scan_id = camera.send("scan").scan_id
    camera.send("scan", data="again", **changed)
    (pending,) = worklist.pending_versions(camera.engine)
    if verdict != "pending":
        worklist.judge_version(camera.engine, pending.instance_id, verdict)
    return scan_id, pending.instance_id


def used(worker):
    return [one.sha256 for one in worker.claim().instances]


def test_a_released_version_is_analysed_instead_of_the_first_which_is_quarantined_then(camera, worker):
    scan_id, number = disputed(camera)
    first, second = worklist.details(camera.engine, scan_id)["instances"]
    worker.finish(worker.claim(), "pacs")
    worker.deliver()

    receipt = worklist.release_version(camera.engine, number, camera.facts("scan"), camera.rules)

    assert (receipt.scan_id, receipt.state, receipt.queued) == (scan_id, "queued", True)
    assert worklist.row(camera.engine, scan_id)["revision"] == 2
    (now_held,) = worklist.quarantined(camera.engine)
    assert (now_held["sha256"], now_held["verdict"]) == (first["sha256"], "other_pixels")
    held = worker.claim()
    assert [one.sha256 for one in held.instances] == [second["sha256"]]
    assert [one.kind for one in held.predecessors] == ["sr", "sc"], "what was sent is named by what follows"
    worker.finish(held, "pacs")
    # And back again: nothing is lost by a release.
    worklist.release_version(camera.engine, now_held["id"], camera.facts("scan"), camera.rules)
    assert used(worker) == [first["sha256"]]
    assert [one.event for one in worklist.events(camera.engine, scan_id)].count("released") == 2
    assert worklist.verify_history(camera.engine) == worklist.check(camera.engine) == ()


def test_a_released_view_keeps_its_partner(camera, worker):
    scan_id = camera.send("a", "anterior").scan_id
    camera.send("p", "posterior")
    camera.send("p", "posterior", data="again")
    (pending,) = worklist.pending_versions(camera.engine)
    worklist.judge_version(camera.engine, pending.instance_id, "other_pixels")

    receipt = worklist.release_version(camera.engine, pending.instance_id, camera.facts("p", "posterior"), camera.rules)

    assert (receipt.scan_id, receipt.state) == (scan_id, "queued")
    assert sorted(used(worker)) == sorted(
        one["sha256"] for one in worklist.details(camera.engine, scan_id)["instances"] if one["verdict"] is None
    )
    assert worklist.row(camera.engine, scan_id)["views"] == "anterior,posterior"


def test_what_names_another_patient_is_never_released_into_this_ones_row(camera, worker):
    scan_id, number = disputed(camera, patient_id="RMN-2")
    with pytest.raises(worklist.TransitionRefused, match="another patient") as refused:
        worklist.release_version(camera.engine, number, camera.facts("scan", patient_id="RMN-2"), camera.rules)
    assert "RMN-2" not in str(refused.value)
    assert worklist.row(camera.engine, scan_id)["revision"] == 1
    assert used(worker) == [worklist.details(camera.engine, scan_id)["instances"][0]["sha256"]]


@pytest.mark.parametrize(("verdict", "says"), [("pending", "pending"), ("identity_changed", "accept-identity")])
def test_what_was_not_compared_or_not_decided_is_neither_released_nor_discarded(camera, verdict, says):
    _, number = disputed(camera, verdict, patient_id="RMN-2")
    with pytest.raises(worklist.TransitionRefused, match=says):
        worklist.release_version(camera.engine, number, camera.facts("scan"), camera.rules)
    with pytest.raises(worklist.TransitionRefused):
        worklist.discard_version(camera.engine, number, "not needed")
    assert len(worklist.quarantined(camera.engine)) == 1


def test_a_discarded_version_is_gone_and_its_reason_stays(camera, worker):
    scan_id, number = disputed(camera)
    name = worklist.discard_version(camera.engine, number, "the camera sent a test image")
    assert worklist.quarantined(camera.engine) == []
    (file,) = [one for one in worklist.kept_files(camera.engine) if one.purged_at is not None]
    assert file.file_name == name
    (event,) = [one for one in worklist.events(camera.engine, scan_id) if one.event == "discarded"]
    assert event.detail.endswith("the camera sent a test image")
    assert len(used(worker)) == 1
    with pytest.raises(worklist.TransitionRefused, match="no object"):
        worklist.discard_version(camera.engine, number, "again")


# --- on real files, as an admin types it -----------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "node.toml"
    path.write_text(f'[storage]\ndirectory = "{tmp_path / "var"}"\nmin_free = "1 MiB"\n')
    return path


@pytest.fixture
def settings(config: Path) -> Settings:
    return load(config)


@pytest.fixture
def house(settings: Settings) -> Iterator[House]:
    opened = service.open_house(settings)
    yield opened
    opened.engine.dispose()


def scan(seed: int) -> Dataset:
    (ds,) = expose(phantom(seed), examination(seed), "two_frames")
    return ds


def receive(house: House, ds: Dataset) -> worklist.Receipt:
    buffer = BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    data = buffer.getvalue()
    start = 144 + int.from_bytes(data[140:144], "little")
    name, digest = spool.put_object(house.spool, data[:start], data[start:])
    stored = worklist.Stored(name, digest, len(data) - start, "1.2.840.10008.1.2.1")
    return worklist.receive(
        house.engine, facts_of(ds), stored, source_aet="OPTIMA1", rules=reconcile.rules_of(house.settings)
    )


def other_image(house: House) -> str:
    ds = scan(1)
    receive(house, ds)
    pixels = bytearray(ds.PixelData)
    pixels[5000] ^= 1
    ds.PixelData = bytes(pixels)
    receive(house, ds)
    (pending,) = worklist.pending_versions(house.engine)
    worklist.judge_version(house.engine, pending.instance_id, "other_pixels")
    return str(pending.instance_id)


def remnant(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dicom_node.cli", "quarantine", *arguments, "--config", str(config)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_an_admin_lists_shows_and_releases_and_sees_whose_it_is_only_when_he_asks(house: House, config: Path) -> None:
    number = other_image(house)
    ds = scan(1)

    listed = remnant(config, "list", "--json")
    (line,) = [json.loads(one) for one in listed.stdout.splitlines()]
    assert (line["id"], line["why"], line["sop_instance_uid"]) == (number, "other_pixels", ds.SOPInstanceUID)
    unasked = remnant(config, "show", number)
    asked = remnant(config, "show", number, "--identity", "--json")
    assert ds.PatientID not in listed.stdout + unasked.stdout
    assert json.loads(asked.stdout)["patient_id"] == ds.PatientID
    assert Path(json.loads(asked.stdout)["path"]).is_file()

    released = remnant(config, "release", number)

    assert released.returncode == 0, released.stderr
    assert worklist.rows(house.engine, state="queued")[0]["revision"] == 2
    assert remnant(config, "release", "77").returncode == 1
    assert remnant(config, "discard", "77", "--reason", " ").returncode == 2


def test_a_file_in_quarantine_is_entered_once_it_can_be_and_otherwise_only_discarded(
    house: House, settings: Settings
) -> None:
    ds = scan(2)
    receive(house, ds)
    (file,) = worklist.kept_files(house.engine)
    spool.set_apart(house.spool, file.file_name)
    junk = house.spool.quarantine / f"{'ab' * 32}.dcm"
    junk.write_bytes(b"no DICOM at all")
    other, ours = sorted(quarantine.held(house.engine, house.spool), key=lambda one: one.why, reverse=True)
    assert ours.why.endswith("can be released")

    receipt = quarantine.release(house.engine, house.spool, settings, ours.id)
    with pytest.raises(worklist.TransitionRefused, match="no DICOM file"):
        quarantine.release(house.engine, house.spool, settings, other.id)
    quarantine.discard(house.engine, house.spool, other.id, "left by a test")

    assert receipt.new is False
    assert spool.dataset_digest(house.spool.objects / file.file_name) == file.sha256
    assert list(house.spool.quarantine.iterdir()) == []
    assert worklist.events(house.engine, None)[-1].detail.endswith("discarded: left by a test")


def test_a_discarded_object_leaves_no_bytes(house: House) -> None:
    number = other_image(house)
    quarantine.discard(house.engine, house.spool, number, "a test image")
    assert len(list(spool.shelved(house.spool.objects))) == 1
    assert str(reconcile.reconcile(house.engine, house.spool, reconcile.rules_of(house.settings))) == ""


def test_a_file_nobody_looked_at_goes_after_ninety_days_with_a_warning_two_weeks_before(house: House) -> None:
    path = house.spool.quarantine / f"{'ab' * 32}.dcm"
    path.write_bytes(b"no DICOM at all")
    removed = []
    for days in (75, 77, 78, 91):
        then = time.time() - days * 86_400
        os.utime(path, (then, then))
        removed.append(quarantine.expire_files(house.engine, house.spool))
    assert removed == [0, 0, 0, 1]
    assert [one.event for one in worklist.events(house.engine, None)] == ["purge_near", "purged"]
    assert not path.exists()
