"""Many cameras send at the same moment: each is told Success, or to come again; what was told Success is there."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from pydicom.uid import generate_uid

from pipeline.camera import examination, expose
from pipeline.phantom import phantom

SENDERS, PLACES = 40, 30


def test_of_forty_senders_at_once_each_is_stored_or_told_to_come_again(
    make_node: Callable[..., Any], all_at_once: Callable[..., Any]
) -> None:
    node = make_node(timing=f"[receiver]\nmax_associations = {PLACES}\n").start("receive")
    objects = []
    for _ in range(SENDERS):
        (ds,) = expose(phantom(1), examination(1), "two_frames")
        ds.SOPInstanceUID, ds.StudyInstanceUID = generate_uid(), generate_uid()
        objects.append(ds)
    outcomes = Counter(call.outcome for call in all_at_once(node.port, objects))
    assert set(outcomes) <= {"status 0000", "transient rejection"}
    assert outcomes["status 0000"] >= PLACES
    assert len(node.rows()) == outcomes["status 0000"]
