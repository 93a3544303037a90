"""Storage Commitment for a camera, by proxy (PS3.4 annex J): archives are asked, and the camera is told.

A camera that hears "committed" may delete its copy. We purge what we receive, so that our own spool is worth nothing
here: an object is reported as committed only when an archive has committed itself to that very object, and the report
names the archive to retrieve it from. What no archive has committed itself to within `commitment_wait_s` is reported as
failed; the camera keeps it, and may ask again.

Two threads, one that asks and one that tells, so that an archive that is away delays no report and a camera that is
switched off delays no asking. All of it stands in the worklist: a kill costs nothing but the try it interrupted.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from sqlalchemy import Engine

from dicom_node import commitment, log, worklist
from dicom_node.errors import SettingsError
from dicom_node.sender import Outcome, Peer, back_off_s, report_commitment, request_commitment
from dicom_node.settings import Destination, Settings, Source
from dicom_node.tls import encryption_to, encryption_to_source

HOLD_S = 300.0
"""Seconds that a taken request is kept from other senders; one that died gives back its own at its next start."""

POLL_S = 2.0

_ASK_AGAIN_S, _ASK_AGAIN_MOST_S = 5.0, 60.0
_TIMEOUT_S = 10.0
"""Longest wait for a connection or an answer: others wait behind it, and everything here is tried again."""

_log = log.get("relay")


class Relay:
    """Passes cameras' requests on until it is stopped."""

    def __init__(self, settings: Settings, engine: Engine, *, owner: str, report_wait_s: float) -> None:
        self._settings = settings
        self._engine = engine
        self._owner = f"{owner}:relay"
        self._report_wait_s = report_wait_s
        self._archives = tuple(one for one in settings.destinations if one.storage_commitment)
        self._timeout_s = min(_TIMEOUT_S, settings.delivery.timeout_s)
        self._rung = (threading.Event(), threading.Event())

    def parts(self, stop: threading.Event) -> dict[str, Callable[[], None]]:
        """Return what does the work, each to run in a thread; it ends soon after `stop` is set.

        Raises
        ------
        DatabaseUnavailable: what an earlier life of ours had taken could not be given back.
        """
        freed = worklist.release_relays(self._engine, self._owner)
        if freed:
            _log.warning("relays_released", count=freed, why="their sender ended before it knew the outcome")
        ask, tell = self._rung
        return {
            "relay-ask": partial(self._serve, True, self._ask, ask, stop),
            "relay-tell": partial(self._serve, False, self._tell, tell, stop),
        }

    def wake(self) -> None:
        """Look at once: something may have come."""
        for rung in self._rung:
            rung.set()

    def _serve(
        self, deciding: bool, work: Callable[[worklist.DueRelay], None], rung: threading.Event, stop: threading.Event
    ) -> None:
        names = [one.name for one in self._archives]
        while not stop.is_set():
            rung.clear()
            try:
                due = worklist.due_relay(self._engine, names, deciding=deciding, owner=self._owner, hold_s=HOLD_S)
                if due is not None:
                    work(due)
                    continue
            except worklist.DatabaseUnavailable as error:
                _log.error("database_unavailable", error=str(error))
            rung.wait(POLL_S)

    def _ask(self, relay: worklist.DueRelay) -> None:
        """Ask every archive for what none keeps yet, or decide."""
        wanted = [one for one in relay.objects if not one.kept_by]
        source = self._source_of(relay)
        left_s = 0.0 if source is None else source.commitment_wait_s - relay.age_s
        if not wanted or left_s <= 0 or not self._archives:
            worklist.decide_relay(self._engine, relay.id)
            self._rung[1].set()
            return
        references = [(one.sop_class_uid, one.sop_instance_uid) for one in wanted]
        with ThreadPoolExecutor(len(self._archives)) as threads:  # none waits for another that is away
            outcomes = list(threads.map(lambda one: self._ask_one(one, relay, references), self._archives))
        unasked = [
            f"{archive.name}: {outcome.text}"
            for archive, outcome in zip(self._archives, outcomes, strict=True)
            if outcome.kind != "acknowledged"
        ]
        again_s = back_off_s(relay.attempts + 1, first_s=_ASK_AGAIN_S, max_s=_ASK_AGAIN_MOST_S, jitter=0.5)
        worklist.wait_for_archives(self._engine, relay.id, delay_s=min(again_s, left_s), error="; ".join(unasked))
        (_log.warning if unasked else _log.info)(
            "commitment_passed_on",
            source_aet=relay.source,
            objects=len(wanted),
            asked=len(self._archives) - len(unasked),
            outcome="; ".join(unasked) or "asked",
        )

    def _ask_one(
        self, archive: Destination, relay: worklist.DueRelay, references: Sequence[tuple[str, str]]
    ) -> Outcome:
        try:
            peer = Peer(
                archive.name, archive.ae_title, archive.host, archive.port, encryption_to(self._settings, archive)
            )
        except SettingsError as error:  # somebody changes its files just now; in clear nothing goes
            return Outcome("later", None, str(error), alarm=True)
        transaction_uid = commitment.new_transaction_uid()
        # Before the archive hears of it: its report may be faster than we are.
        worklist.ask_relayed(
            self._engine,
            relay.id,
            destination=archive.name,
            retrieve_ae_title=archive.ae_title,
            transaction_uid=transaction_uid,
        )
        return request_commitment(
            peer,
            commitment.request(transaction_uid, references),
            heed=lambda ds, event_type_id: commitment.take_report(
                self._engine, self._settings.delivery, (archive.name,), commitment.report_of(ds), event_type_id
            ),
            report_wait_s=self._report_wait_s,
            calling_ae_title=self._settings.node.ae_title,
            connect_timeout_s=self._timeout_s,
            acse_timeout_s=self._timeout_s,
            dimse_timeout_s=self._timeout_s,
        )

    def _tell(self, relay: worklist.DueRelay) -> None:
        """Tell the camera, or note when it is to be told again."""
        started = time.monotonic()
        outcome = self._report(relay)
        rules = self._settings.delivery
        over = relay.waited_s > rules.give_up_after_days * 86_400
        told = outcome.kind == "acknowledged"
        delay_s = 0.0 if told or over else commitment.pause_s(rules, relay.attempts + 1)
        worklist.record_told(
            self._engine,
            relay.id,
            state="reported" if told else "given_up" if over else "reporting",
            error="" if told else outcome.text,
            delay_s=delay_s,
        )
        kept = sum(1 for one in relay.objects if one.kept_by)
        speak = _log.info if told and kept == len(relay.objects) else _log.error if over else _log.warning
        speak(
            "commitment_reported" if told else "commitment_not_reported",
            source_aet=relay.source,
            objects=len(relay.objects),
            kept=kept,
            outcome=outcome.text,
            retry_in_s=None if told or over else round(delay_s, 1),
            took_ms=round(1000 * (time.monotonic() - started), 1),
        )

    def _report(self, relay: worklist.DueRelay) -> Outcome:
        source = self._source_of(relay)
        if source is None:
            return Outcome("later", None, f'{relay.source} is no longer a source with commitment = "proxy"')
        try:
            peer = Peer(
                source.ae_title,
                source.ae_title,
                relay.address,
                source.port,
                encryption_to_source(self._settings, source),
            )
        except SettingsError as error:
            return Outcome("later", None, str(error), alarm=True)
        information, event_type_id = commitment.answer(relay)
        return report_commitment(
            peer,
            information,
            event_type_id,
            calling_ae_title=self._settings.node.ae_title,
            connect_timeout_s=self._timeout_s,
            acse_timeout_s=self._timeout_s,
            dimse_timeout_s=self._timeout_s,
        )

    def _source_of(self, relay: worklist.DueRelay) -> Source | None:
        return next(
            (
                one
                for one in self._settings.sources
                if one.commitment == "proxy" and one.ae_title == relay.source and one.is_at(relay.address)
            ),
            None,
        )
