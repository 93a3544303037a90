"""`remnant demo`: an empty machine sees the whole thing.

A real node (`remnant serve`, its own processes), the embedded archive and a simulated camera, all on loopback, in one
folder. The camera sends what cameras send: good scans in several shapes, an incomplete one, things that are not ours.
Each line of the printed table is one scan with what must come of it; the demo succeeds only if every line did.
Patients, scans and truth are simulated; the weights are trained on simulated scans.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from PIL import Image
from pydicom import Dataset, dcmread
from pydicom.uid import SecondaryCaptureImageStorage
from rich.console import Console
from sqlalchemy import Engine

from dicom_node import worklist
from dicom_node.archive import Archive
from dicom_node.errors import RemnantError
from dicom_node.sender import Parcel, Peer, send
from pipeline.camera import Shape, examination, expose, foreign
from pipeline.phantom import Phantom, phantom

READY_LIMIT_S = 120.0
SCAN_LIMIT_S = 120.0
VIEWS_TIMEOUT_S = 4
MARK = ".remnant-demo"
"""A file that says a folder is ours to empty."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What must become of one row: its state, its reason, what the finding may be, objects in the archive."""

    state: str
    reason: str | None = None
    finding: tuple[str, ...] | None = None
    results: int = 2


@dataclass(frozen=True, slots=True)
class Sending:
    """One line of the table: what the camera sends together, and what must become of it."""

    title: str
    truth: str
    objects: tuple[Dataset, ...]
    expected: Expected
    acquisition_of: tuple[Dataset, ...]


@dataclass(frozen=True, slots=True)
class Line:
    """What became of one sending."""

    sending: Sending
    row: dict[str, Any] | None
    in_archive: int
    seconds: float
    faults: tuple[str, ...]


def run(directory: Path, *, scans: int, seed: int, keep: bool, console: Console) -> bool:
    """Run the demo in `directory`; return whether every line is as it must be. Raises RemnantError."""
    _empty(directory)
    archive = Archive(directory / "archive")
    archive.start()
    config = _write_config(directory, archive.port)
    log_path = directory / "node.log"
    with log_path.open("wb") as log_file:
        node = subprocess.Popen(
            [sys.executable, "-m", "dicom_node.cli", "serve", "--config", str(config)],
            stderr=log_file,
            start_new_session=True,  # a Ctrl-C is for us; we then stop the node in order
        )
        try:
            port = _wait_until_ready(directory, node, log_path)
            _say(console, f"node on port {port}, archive on port {archive.port}, both on loopback; log in {log_path}")
            database = directory / "var" / "worklist.db"
            engine = worklist.open_worklist(f"sqlite:///{database}")
            camera = directory / "camera"
            camera.mkdir()
            lines = []
            heads = ("sent", "truth (simulated)", "state", "finding", "prob.", "reason", "objects", "seconds", "")
            _say(console, _COLUMNS.format(*heads), style="bold")
            for sending in _sendings(scans, seed):
                lines.append(_send_one(sending, camera, port, archive, engine))
                _print(console, lines[-1])
            engine.dispose()
            pictures, reports = _show(directory, archive)
            _say(console, f"pictures: {pictures}\nreports:  {reports}\nobjects:  {directory / 'archive'}")
            _say(console, f"worklist: remnant worklist list --config {config}, or the view worklist in {database}")
            if keep:
                _say(console, f"Node and archive go on: send to REMNANT at 127.0.0.1:{port}. Ctrl-C ends them.")
                _wait_for_interrupt(node)
        finally:
            _stop(node)
            archive.stop()
    good = all(not line.faults for line in lines)
    _say(console, "Every line is as it must be." if good else "Some lines are not as they must be.")
    return good


def _sendings(scans: int, seed: int) -> list[Sending]:
    """What the camera sends: the special cases first, then `scans` more of any kind."""
    number = iter(range(seed * 1000, (seed + 1) * 1000 + scans))
    found, free = ("present",), ("absent",)

    def residual() -> Phantom:
        """A remnant that is plain to see, so that a wrong answer would be the node's fault."""
        return phantom(next(number), residual=True, stratum="uptake_1_up")

    def clean() -> Phantom:
        return phantom(next(number), residual=False, stratum="plain")

    def scan(title: str, shape: Shape, seen: Phantom) -> Sending:
        objects = expose(seen, examination(next(number)), shape)
        truth, finding = ("residual", found) if seen.truth.residual else ("clean", free)
        return Sending(title, truth, objects, Expected("delivered", finding=finding), objects)

    sendings = [
        scan("one object, two frames", "two_frames", residual()),
        scan("one object, two frames", "two_frames", clean()),
        scan("six frames, triple energy window", "six_frames", residual()),
        scan("two objects, one series", "two_objects", residual()),
        scan("two objects, two series", "two_series", clean()),
    ]
    day = examination(next(number))
    later = replace(day, acquired_at=day.acquired_at + timedelta(hours=24))
    body = residual()
    for title, when in (("24 h scan, same study", day), ("48 h scan, same study", later)):
        objects = expose(body, when, "two_objects")
        sendings.append(Sending(title, "residual", objects, Expected("delivered", finding=found), objects))
    lonely = expose(residual(), examination(next(number)), "anterior_only")
    sendings.append(Sending("posterior view missing", "residual", lonely, Expected("declined", "view_missing"), lonely))
    technetium = (foreign("tc99m_thyroid", examination(next(number))),)
    sendings.append(
        Sending("99mTc thyroid", "not ours", technetium, Expected("declined", "not_131i", results=0), technetium)
    )
    who = examination(next(number))
    neck = expose(clean(), who, "two_frames")
    slices = tuple(_renumbered(foreign("ct_slice", who), index) for index in range(3))
    sendings.append(
        Sending("hybrid study: the neck", "clean", (*neck, *slices), Expected("delivered", finding=free), neck)
    )
    sendings.append(
        Sending("hybrid study: its CT slices", "not ours", (), Expected("declined", "wrong_class", results=0), slices)
    )
    first = sendings[0]
    sendings.append(replace(first, title="the first object once more"))
    for _ in range(scans):
        any_kind = phantom(next(number))
        objects = expose(any_kind, examination(next(number)), "two_frames")
        truth = f"{'residual' if any_kind.truth.residual else 'clean'} {any_kind.truth.stratum}"
        expected = Expected("delivered", finding=("present", "absent", "undetermined"))
        sendings.append(Sending("any kind", truth, objects, expected, objects))
    return sendings


def _renumbered(ds: Dataset, index: int) -> Dataset:
    """Another slice of the same CT: same content, an instance UID of its own."""
    ds.SOPInstanceUID = f"{ds.SOPInstanceUID}.{index + 1}"[:64]
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.InstanceNumber = index + 1
    return ds


def _send_one(sending: Sending, camera: Path, port: int, archive: Archive, engine: Engine) -> Line:
    faults: list[str] = []
    started = time.monotonic()
    parcels = []
    for index, ds in enumerate(sending.objects):
        path = camera / f"{ds.SOPInstanceUID}.dcm"
        ds.save_as(path, enforce_file_format=True)
        parcels.append(Parcel(index, path, str(ds.SOPClassUID), str(ds.SOPInstanceUID)))
    peer = Peer("node", "REMNANT", "127.0.0.1", port)
    for _, outcome in send(
        peer, parcels, calling_ae_title="OPTIMA1", connect_timeout_s=10, acse_timeout_s=10, dimse_timeout_s=30
    ):
        if outcome.kind != "acknowledged":
            faults.append(f"the node did not take it: {outcome.text}")
    wanted = sending.expected

    def look() -> tuple[dict[str, Any] | None, int]:
        row = _row_of(engine, str(sending.acquisition_of[0].SOPInstanceUID))
        if row is None:
            return None, 0
        uids = {result["sop_instance_uid"] for result in row["results"]}
        return row, sum(entry.sop_instance_uid in uids for entry in archive.objects())

    row, in_archive = _wait(look, lambda seen: seen[0] is not None and seen[0]["state"] in worklist.REST)
    seconds = time.monotonic() - started
    if row is None:
        return Line(sending, None, 0, seconds, (*faults, "no row"))
    for name, must, got in (
        ("state", wanted.state, row["state"]),
        ("reason", wanted.reason, row["reason"]),
        ("objects in the archive", wanted.results, in_archive),
    ):
        if must != got:
            faults.append(f"{name} {got}, must be {must}")
    if wanted.finding is not None and row["finding"] not in wanted.finding:
        faults.append(f"finding {row['finding']}, must be {' or '.join(wanted.finding)}")
    return Line(sending, row, in_archive, seconds, tuple(faults))


def _row_of(engine: Engine, sop_instance_uid: str) -> dict[str, Any] | None:
    scan_id = worklist.scan_of(engine, sop_instance_uid)
    return None if scan_id is None else worklist.row(engine, scan_id)


def _wait(look: Callable[[], Any], good: Callable[[Any], bool], limit_s: float = SCAN_LIMIT_S) -> Any:
    deadline = time.monotonic() + limit_s
    seen = look()
    while not good(seen) and time.monotonic() < deadline:
        time.sleep(0.02)
        seen = look()
    return seen


_COLUMNS = "{:<34} {:<26} {:<10} {:<13} {:>6}  {:<13} {:>7} {:>8}  {}"


def _print(console: Console, line: Line) -> None:
    row = line.row or {}
    probability = row.get("probability")
    _say(
        console,
        _COLUMNS.format(
            line.sending.title,
            line.sending.truth,
            str(row.get("state", "")),
            str(row.get("finding") or ""),
            "" if probability is None else f"{probability:.3f}",
            str(row.get("reason") or ""),
            line.in_archive,
            f"{line.seconds:.2f}",
            "NOT as it must be: " + "; ".join(line.faults) if line.faults else "as it must be",
        ),
        style="red" if line.faults else "",
    )


def _say(console: Console, text: str, style: str = "") -> None:
    """One line for one fact, however wide: a wrapped table cannot be read or searched."""
    console.print(text, style=style, soft_wrap=True, markup=False, highlight=False)


def _show(directory: Path, archive: Archive) -> tuple[Path, Path]:
    """Write each Secondary Capture as a PNG and each Structured Report as text, for people without a viewer."""
    pictures, reports = directory / "pictures", directory / "reports"
    pictures.mkdir()
    reports.mkdir()
    for entry in archive.objects():
        ds = dcmread(entry.path)
        if entry.sop_class_uid == SecondaryCaptureImageStorage:
            Image.fromarray(ds.pixel_array).save(pictures / f"{entry.sop_instance_uid}.png")
        elif "ContentSequence" in ds:
            text = "\n".join([str(ds.get("SeriesDescription", "")), *_tree(ds, 0)])
            (reports / f"{entry.sop_instance_uid}.txt").write_text(text + "\n", encoding="utf-8")
    return pictures, reports


def _tree(item: Dataset, depth: int) -> list[str]:
    """Return a content tree (PS3.3 C.17.3) as indented lines."""
    lines = []
    for child in item.get("ContentSequence", ()):
        names = child.get("ConceptNameCodeSequence")
        name = str(names[0].CodeMeaning) if names else str(child.ValueType)
        lines.append(f"{'  ' * depth}{name}: {_value(child)}".rstrip(": "))
        lines += _tree(child, depth + 1)
    return lines


def _value(item: Dataset) -> str:
    if item.ValueType == "NUM":
        measured = item.MeasuredValueSequence[0]
        return f"{measured.NumericValue} {measured.MeasurementUnitsCodeSequence[0].CodeValue}"
    if item.ValueType == "CODE":
        return str(item.ConceptCodeSequence[0].CodeMeaning)
    for keyword in ("TextValue", "UID", "PersonName", "DateTime", "Date", "GraphicType"):
        if keyword in item:
            return str(item[keyword].value)
    return ""


def _write_config(directory: Path, archive_port: int) -> Path:
    path = directory / "node.toml"
    path.write_text(
        f"""# Written by `remnant demo`.
[node]
host = "127.0.0.1"
port = 0                      # the system chooses; see var/run/receive.json
[storage]
directory = {json.dumps(str(directory / "var"))}
min_free = "64 MiB"
[[sources]]
ae_title = "OPTIMA1"
hosts = ["127.0.0.1"]
[[destinations]]
name = "archive"
ae_title = "ARCHIVE"
host = "127.0.0.1"
port = {archive_port}
test = true                   # the shipped weights are a demonstration
[analysis]
views_timeout_s = {VIEWS_TIMEOUT_S}           # an hour in a hospital; nobody waits that long for a demo
""",
        encoding="utf-8",
    )
    return path


def _empty(directory: Path) -> None:
    """Make an empty folder of ours; never remove one that a person filled."""
    if directory.exists():
        if any(directory.iterdir()) and not (directory / MARK).exists():
            raise RemnantError(f"{directory} is not empty and not a demo's folder.", hint="Give another one by --dir.")
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    (directory / MARK).touch()


def _wait_until_ready(directory: Path, node: "subprocess.Popen[bytes]", log_path: Path) -> int:
    """Wait until receiver, worker and sender are ready; return the receiver's port."""
    run_folder = directory / "var" / "run"
    names = ("receive.json", "work.json", "send.json")

    def ready() -> bool:
        return node.poll() is not None or all((run_folder / name).exists() for name in names)

    if not _wait(ready, bool, READY_LIMIT_S) or node.poll() is not None:
        raise RemnantError("The node did not start.", hint=f"See {log_path}.")
    return int(json.loads((run_folder / "receive.json").read_text(encoding="utf-8"))["port"])


def _wait_for_interrupt(node: "subprocess.Popen[bytes]") -> None:
    try:
        node.wait()
    except KeyboardInterrupt:
        return


def _stop(node: "subprocess.Popen[bytes]") -> None:
    if node.poll() is None:
        node.send_signal(signal.SIGTERM)
        try:
            node.wait(20)
        except subprocess.TimeoutExpired:
            node.kill()
            node.wait()
