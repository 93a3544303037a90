"""Weights that are not what their record says, under a running node: nothing is judged, and nothing is lost."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pynetdicom import AE
from pynetdicom.sop_class import Verification

from models.weights import find
from pipeline.camera import examination, expose
from pipeline.phantom import phantom


class _Marked:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def _echoed(port: int) -> bool:
    ae = AE("OPTIMA1")
    ae.add_requested_context(Verification)
    association = ae.associate("127.0.0.1", port, ae_title="REMNANT")
    assert association.is_established
    status = association.send_c_echo().Status
    association.release()
    return bool(status == 0)


def test_scans_are_received_while_the_weights_are_damaged_and_judged_once_they_are_whole_again(
    make_node: Callable[..., Any], camera: Callable[..., None], wait: Callable[..., Any], tmp_path: Path
) -> None:
    shipped = find("remnant-resnet18-phantom")
    record, tensors = tmp_path / "ours.json", tmp_path / shipped.record.file
    shutil.copy(shipped.record_path, record)
    whole = shipped.weights_path.read_bytes()
    tensors.write_bytes(whole)
    marker = tmp_path / "executed"
    middle = len(whole) // 2
    damage = {
        "one byte": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "truncated": whole[:middle],
        "a pickle": pickle.dumps(_Marked(marker)),
    }
    node = make_node()
    node.config.write_text(node.config.read_text() + f"[model]\nweights = {json.dumps(str(record))}\n")
    node.start()
    for number, (kind, content) in enumerate(damage.items(), 1):
        tensors.write_bytes(content)
        seen = node.log.count("The analysis cannot start")
        if number == 1:
            node.kill("work")  # from now on it is started again and again
        wait(lambda seen=seen: node.log.count("The analysis cannot start") > seen, f"refusal of {kind}")
        camera(node.port, expose(phantom(990 + number), examination(990 + number), "two_frames"))
        assert _echoed(node.port)
        assert [row["state"] for row in node.rows()] == ["queued"] * number
        said = [line for line in node.log.splitlines() if "The analysis cannot start" in line][-1]
        assert shipped.record.file in said, said
    assert not marker.exists()

    tensors.write_bytes(whole)
    rows = node.wait_for_rows(len(damage))
    assert {row["outcome"] for row in rows} == {"analysed"}
    assert all(shipped.record.sha256 in row["model"] for row in rows)
    assert "Traceback" not in node.log
