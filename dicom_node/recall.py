"""Withdrawing results: what was sent is named in a Key Object Selection, which goes wherever the results went.

The order is that of every result: rendered, checked, durable, then one transaction that names the bytes, the
deliveries and the row's new state. Killed in between, nothing is withdrawn and the command can be given again.
"""

import hashlib
from datetime import UTC, datetime

from pydicom import Dataset, dcmread
from sqlalchemy import Engine

from dicom_node import __version__, spool, worklist
from dicom_node.errors import RemnantError
from dicom_node.report import key_object
from dicom_node.report.identity import IDENTIFYING, text_of
from dicom_node.settings import Settings
from dicom_node.spool import Spool


def recall(
    engine: Engine, store: Spool, settings: Settings, scan_id: int, *, why: key_object.Why, reason: str
) -> tuple[str, ...]:
    """Withdraw what was sent of a row; returns the destinations that will be told.

    Raises
    ------
    TransitionRefused: nothing was sent that is not withdrawn already, or the row is just being worked on.
    RemnantError: the bytes of a result are gone or damaged, or the withdrawal cannot be written truthfully.
    """
    at = datetime.now(UTC).replace(microsecond=0)
    sent = worklist.sent_results(engine, scan_id)
    # Results of one row may have been sent under two identities, where a person accepted another one in between.
    groups: dict[tuple[str, ...], list[tuple[Dataset, worklist.SentResult]]] = {}
    for one in sent:
        ds = _read(store, one, scan_id)
        groups.setdefault(tuple(text_of(ds, keyword) for keyword in IDENTIFYING), []).append((ds, one))
    key_objects = []
    for members in groups.values():
        made = key_object.render(
            [ds for ds, _ in members],
            why=why,
            reason=reason,
            at=at,
            timezone=settings.zone,
            ae_title=settings.node.ae_title,
            version=__version__,
        )
        name, digest = spool.put_result(store, made.data)
        document = worklist.NewResult(
            kind="kos",
            variant="",
            sop_class_uid=key_object.SOP_CLASS_UID,
            sop_instance_uid=made.sop_instance_uid,
            series_instance_uid=made.series_instance_uid,
            sha256=digest,
            file_name=name,
        )
        key_objects.append((document, sorted({name for _, one in members for name in one.destinations})))
    worklist.recall(
        engine,
        scan_id,
        withdrawn=[one.sop_instance_uid for one in sent],
        key_objects=key_objects,
        detail=f"{key_object.TITLES[why].meaning}: {reason}",
    )
    return tuple(sorted({name for _, names in key_objects for name in names}))


def _read(store: Spool, one: worklist.SentResult, scan_id: int) -> Dataset:
    path = store.results / one.file_name
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise RemnantError(
            f"scan {scan_id}: a result that was sent is no longer in the storage, so that nobody can say whose it was",
            hint="reject it in the archive by hand",
        ) from error
    except OSError as error:
        raise RemnantError(f"{path} cannot be read: {error.strerror or error}", retry=True) from error
    if hashlib.sha256(data).hexdigest() != one.sha256:
        raise RemnantError(
            f"scan {scan_id}: the stored bytes of a result differ from those sent", hint="see `remnant worklist prove`"
        )
    return dcmread(path)
