"""Thousands of objects through a whole node, their results sent on: does anything grow that should not?

Run by `make soak`. SOAK_OBJECTS objects (10,000 by default) of single views, two to a scan, or as many as fit into
SOAK_MINUTES. The camera goes on only while few scans are under way, so that what grows is the node and not a queue.
Memory, threads and descriptors are looked at once in a while, for each process; lines through the second half of what
was seen must be flat.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from pydicom import Dataset
from pydicom.uid import NuclearMedicineImageStorage, generate_uid
from pynetdicom import AE

from dicom_node.contexts import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME, accepted_contexts
from dicom_node.transport import C_STORE_RQ, Door, Limits, Request, Service, listen
from pipeline.camera import examination, expose
from pipeline.phantom import phantom

OBJECTS = int(os.environ.get("SOAK_OBJECTS", "10000"))
LIMIT_S = 60 * float(os.environ.get("SOAK_MINUTES", "240"))
SCANS_A_ROUND, NECKS = 10, 20
LOOK_EVERY = 100  # objects
MEMORY_SLOPE_MIB = 1.0  # for 1,000 objects
WAL_MIB = 64.0
FINISH_S = 120.0


class CountingArchive:
    """An archive that keeps nothing but the UIDs of what it took."""

    ae_title = "SOAK"

    def __init__(self) -> None:
        self.times: dict[str, int] = {}
        service = Service(
            contexts=accepted_contexts(()),
            implementation_class_uid=IMPLEMENTATION_CLASS_UID,
            implementation_version_name=IMPLEMENTATION_VERSION_NAME,
            limits=Limits(idle_s=30, associations=10, associations_per_peer=10),
            admit=lambda _: None,
            handlers={C_STORE_RQ: self._store},
        )
        self._server = listen([Door(("127.0.0.1", 0))], service)
        self.port = self._server.address[1]

    def _store(self, request: Request) -> int:
        self.times[request.sop_instance_uid] = self.times.get(request.sop_instance_uid, 0) + 1
        return 0x0000

    def stop(self) -> None:
        self._server.stop(2)


def test_nothing_grows_with_the_number_of_objects(make_node: Callable[..., Any]) -> None:
    archive = CountingArchive()
    node = make_node(archive, timing="").start()
    storage = node.directory / "var"
    necks = [expose(phantom(seed, residual=bool(seed % 2)), examination(seed), "two_objects") for seed in range(NECKS)]
    seen: list[tuple[int, dict[str, float]]] = []
    began = time.monotonic()
    sent = refused = 0
    pause = threading.Event()
    try:
        while sent < OBJECTS and time.monotonic() - began < LIMIT_S:
            scans = [_anew(necks[(sent // 2 + number) % NECKS]) for number in range(SCANS_A_ROUND)]
            refused += _send(node.port, [ds for scan in scans for ds in scan])
            sent += 2 * SCANS_A_ROUND
            while len(archive.times) < sent - 4 * SCANS_A_ROUND and time.monotonic() - began < LIMIT_S:
                pause.wait(0.05)
            if not sent % LOOK_EVERY:
                seen.append((sent, look(storage, node)))
                print(f"{sent} objects, {time.monotonic() - began:.0f} s: {_shown(seen[-1][1])}", flush=True)
        deadline = time.monotonic() + FINISH_S
        while len(archive.times) < sent and time.monotonic() < deadline:
            pause.wait(0.1)
        took_s = time.monotonic() - began
        rows = node.query("select state, count(*) from worklist group by state")
        seen.append((sent, look(storage, node)))
    finally:
        archive.stop()
    print(f"{sent} objects, {sent // 2} scans, {len(archive.times)} results in {took_s / 60:.1f} min; rows: {rows}")
    faults = [] if not refused else [f"{refused} objects were not acknowledged"]
    if len(archive.times) != sent:
        faults.append(f"{len(archive.times)} results arrived, {sent} were due")
    if more := sum(times > 1 for times in archive.times.values()):
        faults.append(f"{more} results were sent more than once")
    later = seen[len(seen) // 2 :]
    for key in sorted(later[-1][1]):
        line = [(count, facts[key]) for count, facts in later if key in facts]
        slope = _slope(line) if len(line) > 2 else 0.0
        print(f"{key}: {line[0][1]:.1f} to {line[-1][1]:.1f}, {1000 * slope:+.2f} for 1,000 objects")
        if key.endswith("memory_mib") and 1000 * slope > MEMORY_SLOPE_MIB:
            faults.append(f"{key} grows by {1000 * slope:.2f} MiB for 1,000 objects")
        before = [value for _, value in seen_of(seen, key)]
        if key.endswith(("threads", "descriptors")) and line[-1][1] > max(before, default=1e9) + 4:
            faults.append(f"{key} grew from {line[0][1]:.0f} to {line[-1][1]:.0f}")
    if (wal := max(facts["wal_mib"] for _, facts in seen)) > WAL_MIB:
        faults.append(f"the WAL had {wal:.0f} MiB")
    last = seen[-1][1]
    if last["unfinished_files"] or last["objects"] != sent or last["results"] != sent:
        faults.append(f"files at the end: {_shown(last)}")
    assert not faults, "; ".join(faults)


def seen_of(seen: list[tuple[int, dict[str, float]]], key: str) -> list[tuple[int, float]]:
    """What was seen of one figure in the first half."""
    return [(count, facts[key]) for count, facts in seen[: max(1, len(seen) // 2)] if key in facts]


def look(storage: Path, node: Any) -> dict[str, float]:
    """What the node holds now: by process memory, threads and descriptors; files and the WAL."""
    facts: dict[str, float] = {}
    for role in ("receive", "work", "send"):
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(node.pid(role))
            for name, one in [(role, process), *((f"{role}_child", child) for child in process.children())]:
                memory_mib = one.memory_info().rss / 2**20
                if name in ("work_child",) and memory_mib < 50:
                    continue  # multiprocessing's resource tracker
                facts[f"{name}_memory_mib"] = memory_mib
                facts[f"{name}_threads"] = one.num_threads()
                facts[f"{name}_descriptors"] = one.num_fds()
    spool, results = storage / "spool", storage / "results"
    facts["objects"] = sum(1 for _ in (spool / "objects").glob("*/*"))
    facts["results"] = sum(1 for _ in results.glob("[0-9a-f][0-9a-f]/*"))
    facts["unfinished_files"] = sum(
        1 for folder in (spool / "incoming", results / "rendering") for _ in folder.iterdir()
    )
    wal = storage / "worklist.db-wal"
    facts["wal_mib"] = wal.stat().st_size / 2**20 if wal.exists() else 0.0
    facts["database_mib"] = (storage / "worklist.db").stat().st_size / 2**20
    return facts


def _anew(scan: tuple[Dataset, ...]) -> tuple[Dataset, ...]:
    """The same pixels as another examination of another invented patient."""
    study, series, patient = generate_uid(), generate_uid(), f"SOAK-{generate_uid()[-12:]}"
    for ds in scan:
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.PatientID = study, series, patient
    return scan


def _send(port: int, objects: list[Dataset]) -> int:
    """Send as a camera does; return how many were not acknowledged."""
    ae = AE(ae_title="OPTIMA1")
    ae.add_requested_context(NuclearMedicineImageStorage)
    assoc = ae.associate("127.0.0.1", port, ae_title="REMNANT")
    assert assoc.is_established
    statuses = [assoc.send_c_store(ds).get("Status") for ds in objects]
    assoc.release()
    return sum(status != 0x0000 for status in statuses)


def _slope(line: list[tuple[int, float]]) -> float:
    return float(np.polyfit([count for count, _ in line], [value for _, value in line], 1)[0])


def _shown(facts: dict[str, float]) -> str:
    return ", ".join(
        f"{key} {value:.0f}" for key, value in facts.items() if not key.endswith(("threads", "descriptors"))
    )
