"""`remnant worklist prove`: the chain from what was received to what an archive acknowledged, link by link.

Every link is checked against the bytes and the history as they are now, not repeated from the row: a changed file, a
missing result or an edited history shows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine

from dicom_node import spool, worklist
from dicom_node.spool import Spool


@dataclass(frozen=True, slots=True)
class Link:
    """One link: what it is, whether it holds, what was seen."""

    what: str
    ok: bool
    detail: str


def prove(engine: Engine, store: Spool, scan_id: int) -> list[Link]:
    """Return every link of a row's chain, in the order in which it came about."""
    details = worklist.details(engine, scan_id)
    links = [_received(store, instance) for instance in details["instances"]]
    links += [_rendered(store, result) for result in details["results"]]
    results = {result["id"]: result["sop_instance_uid"] for result in details["results"]}
    links += [
        Link(
            f"delivery to {delivery['destination']}",
            delivery["state"] in ("acknowledged", "cancelled"),
            f"{results[delivery['result_id']]} {delivery['state']}"
            + (f", status {delivery['last_status']}" if delivery["last_status"] is not None else ""),
        )
        for delivery in details["deliveries"]
    ]
    faults = worklist.verify_events(engine)
    links.append(
        Link(
            "history",
            not faults,
            "; ".join(str(fault) for fault in faults) or "every event follows from the one before",
        )
    )
    return links


def _received(store: Spool, instance: dict[str, object]) -> Link:
    path = store.objects / str(instance["spool_name"])
    return _kept(f"received {instance['sop_instance_uid']}", instance, path, spool.dataset_digest)


def _rendered(store: Spool, result: dict[str, object]) -> Link:
    path = store.results / str(result["file_name"])
    return _kept(f"result {result['kind']} {result['sop_instance_uid']}", result, path, spool.file_digest)


def _kept(what: str, item: dict[str, object], path: Path, digest: Callable[[Path], str | None]) -> Link:
    """Compare the bytes on the disk with the digest in the worklist."""
    if item["purged_at"]:
        return Link(what, True, f"sha256 {item['sha256']}, bytes purged {item['purged_at']}")
    if not path.is_file():
        return Link(what, False, f"the file {path} is missing")
    found = digest(path)
    if found is None:
        return Link(what, False, f"the file {path} cannot be read")
    return Link(what, found == item["sha256"], f"sha256 {found}" + _against(found, item["sha256"]))


def _against(found: str, recorded: object) -> str:
    return "" if found == recorded else f", but the worklist says {recorded}"
