"""What goes to an archive that does not take the class of a report: the next object of `contexts.REPORT_CHAIN`.

Made of the report as it is stored, checked, and durable before the worklist hears of it, so that a sender killed in
between makes the same object again, under the same UID. Once made it serves every destination. Behind the last report
stands the Secondary Capture, where the scan has one: drawing it needs the analysis, which is over.
"""

import hashlib

from sqlalchemy import Engine

from dicom_node import contexts, spool, worklist
from dicom_node.errors import RemnantError
from dicom_node.spool import Spool


class ChainError(RemnantError):
    """What should go in the place of a refused report cannot be made truthfully; a person has to look."""


def next_object(engine: Engine, store: Spool, delivery: worklist.DueDelivery, *, sc: str) -> worklist.NewResult | None:
    """Return the object behind `delivery`'s in the chain, durable; None where nothing is left.

    `sc` is the destination's variant of the Secondary Capture.

    Raises
    ------
    ChainError: the stored report is damaged, or what was made of it did not pass its checks. OSError: it
    cannot be read. StorageError: what was made cannot be stored.
    """
    stored = worklist.stored_results(engine, delivery.scan_id, delivery.revision)
    wanted = contexts.next_report_class(delivery.sop_class_uid)
    if wanted is None:
        pictures = [one for one in stored if one.kind == "sc"]
        return min(pictures, key=lambda one: one.variant != sc, default=None)
    for one in stored:
        if one.kind == "sr" and one.sop_class_uid == wanted:
            return one  # another destination needed it before
    first = next((one for one in stored if one.sop_class_uid == contexts.REPORT_CHAIN[0].uid), None)
    if first is None:
        raise ChainError("the report that a simpler one is made of is no longer stored.")
    original = (store.results / first.file_name).read_bytes()
    if hashlib.sha256(original).hexdigest() != first.sha256:
        raise ChainError("the stored report is damaged: its digest differs.")
    # Only here: the reports' libraries cost 20 MB that a sender without such an archive never needs.
    from dicom_node import report

    try:
        made = report.derive(original, wanted)
    except report.RenderError as error:
        raise ChainError(str(error)) from error
    faults = report.check_fallback(made.data, original)
    if faults:
        raise ChainError(f"the simpler report did not pass its checks: {'; '.join(faults)}.")
    name, digest = spool.put_result(store, made.data)
    return worklist.NewResult(
        kind="sr",
        variant=made.variant,
        sop_class_uid=made.sop_class_uid,
        sop_instance_uid=made.sop_instance_uid,
        series_instance_uid=made.series_instance_uid,
        sha256=digest,
        file_name=name,
    )
