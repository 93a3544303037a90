"""`make bench`: from the camera's last Success to the results in the PACS, beside a plain store of the same scan.

A benchmark, not a test: nothing fails here. The machine is shared, so look at the ratio and the minimum. Peer: DCMTK's
storescu sending the scan straight to the same Orthanc, that is the time a router without any work would need.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.camera import examination, expose
from pipeline.phantom import phantom

ROUNDS = 20


def test_scan_to_result(make_node: Callable[..., Any], orthanc: Any, camera: Callable[..., None]) -> None:
    node = make_node(orthanc).start()
    direct, through = [], []
    for number in range(ROUNDS):
        plain = expose(phantom(number), examination(9000 + number), "two_objects")
        started = time.monotonic()
        camera(orthanc.dicom_port, plain, called=orthanc.ae_title)
        direct.append(time.monotonic() - started)

        anterior, posterior = expose(phantom(number), examination(9500 + number), "two_objects")
        camera(node.port, (anterior,))
        camera(node.port, (posterior,))
        success = time.monotonic()
        while len(orthanc.find(str(anterior.StudyInstanceUID))) < 2:
            assert time.monotonic() - success < 60
        through.append(time.monotonic() - success)
    print(f"\nlast Success -> SR and SC in Orthanc, n = {ROUNDS}, seconds: median {statistics.median(through):.2f},"
          f" fastest {min(through):.2f}, slowest {max(through):.2f}")  # fmt: skip
    print(f"storescu of the same two objects straight to Orthanc: median {statistics.median(direct):.2f};"
          f" ratio of the medians {statistics.median(through) / statistics.median(direct):.1f}")  # fmt: skip
    child = next(line for line in node.log.splitlines() if "analyst_ready" in line).split("pid=")[1].split()[0]
    pids = {"serve": node.processes["serve"].pid, **{role: node.pid(role) for role in ("receive", "work", "send")}}
    for role, pid in {**pids, "analysis child": int(child)}.items():
        status = Path(f"/proc/{pid}/status").read_text()
        peak_kib = int(status.split("VmHWM:")[1].split()[0])
        print(f"peak memory of {role}: {peak_kib / 1024:.0f} MiB")
