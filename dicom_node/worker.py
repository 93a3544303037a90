"""One acquisition, once: claim, have it analysed, make the results durable, finish.

The worker itself parses nothing from the wire and loads no model; that happens in the child of `analyst.py`. Killing it
at any instruction costs nothing: results are durable before the transaction that names them, a lease without a living
owner goes back to the queue, and `analysed_at`, set by the first claim of a revision, makes a second run render the
same bytes under the same UIDs.
"""

import hashlib
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

from sqlalchemy import Engine

from dicom_node import log, spool, worklist
from dicom_node.analyst import Analyst
from dicom_node.audit import Recorder
from dicom_node.messages import Abandoned, Answer, Comparison, Ended, Provenance, Rendered, Setup, Task, Wanted
from dicom_node.settings import Destination, Settings
from dicom_node.spool import Spool
from dicom_node.wake import Bell

RETRY_AFTER_S = (0.0, 5.0, 30.0)
"""Pauses after the first, second and every further end of the analysis child."""

POLL_S = 1.0
"""Longest sleep between two looks into the worklist: another machine's receiver cannot ring our bell."""

_log = log.get("worker")


class Worker:
    """Claims and finishes acquisitions until it is stopped."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        store: Spool,
        *,
        owner: str,
        boot: str,
        recorder: Recorder | None = None,
    ) -> None:
        self._settings = settings
        self._recorder = recorder or Recorder(settings, "remnant work")
        self._engine = engine
        self._spool = store
        self._owner = owner
        self._boot = boot
        self._bell = Bell(store.run / "worker.bell")
        self._sender_bell = Bell(store.run / "sender.bell")
        self._analyst = Analyst(setup_of(settings))
        self._wanted = wanted_by(settings.destinations)
        self._fingerprint = fingerprint_of(settings)

    def run(self, stop: threading.Event, ready: Callable[[], None]) -> None:
        """Work until `stop` is set; `wake` ends a sleep at once; `ready` is called once the model is loaded."""
        self._analyst.start()
        ready()
        freed = worklist.release_owner(self._engine, self._owner, except_boot=self._boot)
        if freed:
            _log.warning("leases_released", count=freed, why="their worker ended without finishing")
        while not stop.is_set():
            try:
                if self._compare_versions() or self._work_once():
                    continue
                due_s = worklist.next_work_in_s(self._engine)
            except worklist.DatabaseUnavailable as error:
                _log.error("database_unavailable", error=str(error))
                due_s = None
            self._bell.wait(POLL_S if due_s is None else min(POLL_S, due_s))

    def wake(self) -> None:
        """End the sleep of `run`."""
        self._bell.ring()

    def close(self) -> None:
        self._analyst.end()

    def _work_once(self) -> bool:
        claim = worklist.claim(self._engine, self._owner, self._boot)
        if claim is None:
            return False
        started = time.monotonic()
        bound = _log.bind(scan=claim.scan_id, revision=claim.revision)
        try:
            reply = self._bytes_lost(claim, bound) or self._ask(claim, claim.reason)
            told = self._after_failure(claim, reply, bound) if isinstance(reply, Ended) else reply
            state = None if told is None or isinstance(told, Abandoned) else self._finish(claim, told)
        except worklist.LeaseLost:
            told, state = Abandoned(), None
        if isinstance(told, Abandoned):
            bound.info("abandoned", why="a new view arrived or the lease went to somebody else")
        if told is None or isinstance(told, Abandoned):
            return True
        bound.info(
            "finished",
            state=state,
            outcome=told.outcome,
            reason=told.reason,
            finding=told.finding,
            took_ms=round(1000 * (time.monotonic() - started)),
        )
        self._sender_bell.ring()
        return True

    def _bytes_lost(self, claim: worklist.Claim, bound: log.Log) -> Answer | None:
        """Compare every object with the digest it was received under; say what to do where one does not hold.

        Pixels that a disk has changed would give an answer like any other, and nobody would see it. No note is sent:
        what the bytes say about the patient is no longer to be trusted either.
        """
        lost = []
        for one in claim.instances:
            path = self._spool.objects / one.spool_name
            if spool.dataset_digest(path) != one.sha256:
                event: worklist.Loss = "bytes_damaged" if path.exists() else "bytes_missing"
                kept = worklist.KeptFile(
                    "instance", one.instance_id, claim.scan_id, one.spool_name, one.sha256, None, None
                )
                worklist.note_lost(self._engine, kept, event)
                lost.append(one.sop_instance_uid)
                bound.error("alarm", what=event, sop_instance_uid=one.sop_instance_uid)
        if not lost:
            return None
        return Answer(
            outcome="failed",
            reason="unreadable",
            detail=f"the stored bytes of {len(lost)} of {len(claim.instances)} objects are missing or damaged:"
            f" check the disk, send the scan again, then `remnant worklist retry {claim.scan_id}`",
            finding=None,
            probability=None,
            views=(),
            model=None,
            model_sha256=None,
            results=(),
        )

    def _ask(self, claim: worklist.Claim, reason: str | None) -> Answer | Ended | Abandoned:
        task = Task(
            paths=tuple(self._spool.objects / instance.spool_name for instance in claim.instances),
            reason=reason,
            provenance=Provenance(
                revision=claim.revision,
                source_digests={instance.sop_instance_uid: instance.sha256 for instance in claim.instances},
                analysed_at=datetime.fromisoformat(claim.analysed_at),
                timezone=self._settings.zone.key,
                ae_title=self._settings.node.ae_title,
                codes=self._settings.codes,
                settings_fingerprint=self._fingerprint,
                sensitivity_cps_per_mbq=self._settings.analysis.sensitivity_cps_per_mbq or None,
                accepted=claim.accepted,
                predecessors=tuple(
                    (
                        result.sop_class_uid,
                        result.sop_instance_uid,
                        result.series_instance_uid,
                        result.study_instance_uid,
                    )
                    for result in claim.predecessors
                    if result.kind == "sr"
                ),
            ),
            wanted=self._wanted,
        )
        return self._analyst.answer(
            task, self._settings.analysis.timeout_s, lambda: worklist.heartbeat(self._engine, claim)
        )

    def _after_failure(self, claim: worklist.Claim, ended: Ended, bound: log.Log) -> Answer | Abandoned | None:
        """Put the scan back, or, after the last attempt, make its note; None where there is nothing left to finish."""
        attempts = self._settings.analysis.attempts
        bound.error("analysis_ended", why=ended.why, attempt=claim.attempts + 1, of=attempts)
        if claim.attempts + 1 < attempts:
            delay_s = RETRY_AFTER_S[min(claim.attempts, len(RETRY_AFTER_S) - 1)]
            worklist.try_again(self._engine, claim, error=ended.why, delay_s=delay_s, max_attempts=attempts)
            return None
        reply = self._ask(claim, "analysis_failed")
        if isinstance(reply, Abandoned):
            return reply
        if isinstance(reply, Answer):
            return replace(reply, detail=ended.why)
        # Not even a note could be made: the row itself has to call a person.
        return Answer(
            outcome="failed",
            reason="analysis_failed",
            detail=ended.why,
            finding=None,
            probability=None,
            views=(),
            model=None,
            model_sha256=None,
            results=(),
        )

    def _finish(self, claim: worklist.Claim, reply: Answer) -> str:
        stored = [self._store(rendered) for rendered in reply.results]
        return worklist.finish(
            self._engine,
            claim,
            outcome=reply.outcome,
            reason=reply.reason,
            finding=reply.finding,
            probability=reply.probability,
            model=f"{reply.model} {reply.model_sha256}" if reply.model else None,
            results=stored,
            deliveries=deliveries(reply.results, self._settings.destinations),
            last_error=reply.detail or None,
        )

    def _store(self, rendered: Rendered) -> worklist.NewResult:
        name, digest = spool.put_result(self._spool, rendered.data)
        return worklist.NewResult(
            kind=rendered.kind,
            variant=rendered.variant,
            sop_class_uid=rendered.sop_class_uid,
            sop_instance_uid=rendered.sop_instance_uid,
            series_instance_uid=rendered.series_instance_uid,
            sha256=digest,
            file_name=name,
        )

    def _compare_versions(self) -> bool:
        """Judge other bytes that came under a known SOP Instance UID; True where there were some."""
        pending = worklist.pending_versions(self._engine)
        for version in pending:
            if version.known_purged:
                # Nothing is left to compare with, so nothing may be called equal.
                worklist.judge_version(self._engine, version.instance_id, "other_pixels")
                continue
            comparison = Comparison(
                first=self._spool.objects / version.known_spool_name, second=self._spool.objects / version.spool_name
            )
            reply = self._analyst.compare(comparison, self._settings.analysis.timeout_s)
            if isinstance(reply, Ended):
                # What cannot be compared cannot be called equal: kept, quarantined, and a person is told.
                _log.error("comparison_ended", sop_instance_uid=version.sop_instance_uid, why=reply.why)
                reply = "other_pixels"
            worklist.judge_version(self._engine, version.instance_id, reply)
            if reply == "identity_changed":
                self._note_identity(version.sop_instance_uid)
            speak = _log.info if reply == "same_content" else _log.warning
            speak("version_judged", sop_instance_uid=version.sop_instance_uid, verdict=reply)
        return bool(pending)

    def _note_identity(self, sop_instance_uid: str) -> None:
        scan_id = worklist.scan_of(self._engine, sop_instance_uid)
        if scan_id is not None:
            text = "the same image arrived with another identity"
            self._recorder.identity_changed(text, worklist.whose(self._engine, scan_id), "remnant work")


def setup_of(settings: Settings) -> Setup:
    """Return what the analysis child needs to know of the settings."""
    return Setup(
        weights=settings.weights,
        preprocessing=settings.analysis.preprocessing,
        require_views=settings.analysis.require_views,
        log_json=settings.log.json_lines,
    )


def wanted_by(destinations: tuple[Destination, ...]) -> tuple[Wanted, ...]:
    """Return which results have to be rendered; without any destination both, for whoever looks into the storage."""
    wanted = [one for destination in destinations for one in _wanted_at(destination)]
    return tuple(dict.fromkeys(wanted)) or (Wanted("sr"), Wanted("sc", "colour"))


def _wanted_at(destination: Destination) -> tuple[Wanted, ...]:
    meant = {
        "sr": Wanted("sr"),
        "sc": Wanted("sc", destination.sc),
        "seg": Wanted("seg", "anterior"),
        "seg-posterior": Wanted("seg", "posterior"),
    }
    return tuple(meant[name] for name in destination.results)


def deliveries(results: tuple[Rendered, ...], destinations: tuple[Destination, ...]) -> list[tuple[str, str]]:
    """Return (SOPInstanceUID, destination) of everything that has to be sent."""
    return [
        (result.sop_instance_uid, destination.name)
        for destination in destinations
        for result in results
        if (result.kind, result.variant) in {(want.kind, want.variant) for want in _wanted_at(destination)}
    ]


def fingerprint_of(settings: Settings) -> str:
    """Return the digest of every setting that enters a result's bytes, so that other settings give other UIDs."""
    facts = {
        "ae_title": settings.node.ae_title,
        "timezone": settings.zone.key,
        "codes": settings.codes,
        "require_views": settings.analysis.require_views,
        "preprocessing": settings.analysis.preprocessing,
        "sensitivity_cps_per_mbq": settings.analysis.sensitivity_cps_per_mbq,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
