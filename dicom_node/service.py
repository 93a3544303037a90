"""The only place where things are put together, started and stopped: roles, processes, ticks, signals.

`serve` runs three roles as processes of their own and starts one again when it ends: `receive`, `work`, `send`. They
meet only in the spool and the worklist. Each role can also be started by itself, on several machines, over one
PostgreSQL. A role holds a lock file, so that no two of the same name work in one storage folder.

APScheduler keeps no job store: its jobs are ticks over the worklist, in the process of `work`, and every change they
make is guarded there, so that two nodes which tick at the same time do no harm.
"""

import fcntl
import json
import os
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sqlalchemy import Engine

from dicom_node import audit, log, quarantine, reconcile, spool, tls, worklist
from dicom_node.audit.repository import Repository
from dicom_node.errors import RemnantError, SettingsError
from dicom_node.role import command
from dicom_node.settings import Settings
from dicom_node.spool import Spool

if TYPE_CHECKING:
    from apscheduler.schedulers.background import BackgroundScheduler

    from models.weights import WeightsRecord

Role = Literal["receive", "work", "send"]
ROLES: tuple[Role, ...] = ("receive", "work", "send")

LEASE_S = 15.0
"""Seconds of our own monotonic time without a heartbeat after which a lease on another machine is broken."""

_JUMP_S = 30.0
"""What the clock may differ from monotonic time between two looks: far above a slow query or a slewed clock."""

_LOCK_WAIT_S = 20.0
_RESTART_FIRST_S, _RESTART_MAX_S = 0.2, 30.0
_STEADY_S = 30.0  # a role that ran this long has recovered: its next end is restarted at once again
_STOP_LIMIT_S = 12.0

_log = log.get("service")


@dataclass(frozen=True, slots=True)
class House:
    """What every role needs."""

    settings: Settings
    engine: Engine
    spool: Spool
    recorder: audit.Recorder


def open_house(settings: Settings, what: str = "remnant serve") -> House:
    """Open spool and worklist, bringing the schema up to date. Raises RemnantError."""
    store = spool.open_spool(settings.storage.directory, int(settings.storage.min_free))
    engine = worklist.open_worklist(settings.database_url, busy_timeout_s=settings.database.busy_timeout_s)
    if not worklist.schema_is_current(engine):
        with _lock(store.run / "upgrade.lock", wait_s=_LOCK_WAIT_S, what="the database upgrade"):
            worklist.upgrade(engine)
    return House(settings=settings, engine=engine, spool=store, recorder=audit.Recorder(settings, what))


def refuse_damage(engine: Engine) -> None:
    """Refuse to work on a damaged database: what it says about a patient could be anybody's. Raises RemnantError."""
    faults = worklist.damage(engine)
    if faults:
        raise RemnantError(f"The worklist's database is damaged: {' '.join(faults[0].split())}.", hint=worklist.DAMAGED)


def check_release(settings: Settings, record: "WeightsRecord") -> None:
    """Refuse to send results of demonstration weights to a real archive. Raises SettingsError, one sentence."""
    if record.release != "demonstration":
        return
    real = [destination.name for destination in settings.destinations if not destination.test]
    if real:
        raise SettingsError(
            f"The weights {record.name} are a demonstration, trained on {record.trained_on}, and destination"
            f" {', '.join(real)} is not marked test = true: such results must not reach patients' records."
        )


def load_record(settings: Settings) -> "WeightsRecord":
    """Read the record of the configured weights, without torch, and check that it fits. Raises SettingsError."""
    from models.weights import WeightsError, find

    try:
        record = find(settings.weights).record
    except WeightsError as error:
        raise SettingsError(f"model.weights: {error}") from error
    if record.preprocessing != settings.analysis.preprocessing:
        raise SettingsError(
            f'analysis.preprocessing is "{settings.analysis.preprocessing}", but the weights {record.name} were trained'
            f' on "{record.preprocessing}" and may judge nothing else.'
        )
    return record


def run_receiver(settings: Settings, *, supervised: bool) -> None:
    """Run the role `receive` until a signal."""
    from dicom_node.receiver import Receiver
    from dicom_node.wake import Bell

    if not supervised:  # what ran must not stay down because a certificate has expired: plain sources may still call
        tls.refuse_unfit(settings)
    with _role("receive", settings, supervised=supervised) as (house, stop):
        spool.restore(house.spool)  # once more: a predecessor may have died since the spool was opened
        _clear_unfinished(house, house.spool.incoming)
        receiver = Receiver(settings, house.engine, house.spool, Bell(house.spool.run / "worker.bell"), house.recorder)
        host, port = receiver.start()
        secured = {"tls_port": receiver.tls_port} if settings.tls.on else {}
        _announce(house.spool, "receive", host=host, port=port, **secured)
        _wait(stop)
        receiver.stop()


def run_worker(settings: Settings, *, supervised: bool) -> None:
    """Run the role `work`, and the ticks, until a signal."""
    from dicom_node.worker import Worker

    check_release(settings, load_record(settings))
    with _role("work", settings, supervised=supervised) as (house, stop):
        _clear_unfinished(house, house.spool.rendering)
        worker = Worker(
            settings,
            house.engine,
            house.spool,
            owner=_owner("work", settings),
            boot=secrets.token_hex(8),
            recorder=house.recorder,
        )
        ticks = _ticks(house, worker.wake)
        ticks.start()
        try:
            worker.run(stop, lambda: _announce(house.spool, "work"))
        finally:
            ticks.shutdown(wait=False)
            worker.close()


def _clear_unfinished(house: House, folder: Path) -> None:
    """Remove what our predecessor left half written: nobody had an answer for it."""
    count = spool.clear_unfinished(folder)
    if count:
        worklist.record_event(house.engine, "node", f"removed {count} half written files of an ended process")
        _log.warning("unfinished_removed", count=count, where=folder.name)


def run_sender(settings: Settings, *, supervised: bool) -> None:
    """Run the role `send` until a signal."""
    from dicom_node.delivery import Sender

    check_release(settings, load_record(settings))
    if not supervised:
        tls.refuse_unfit(settings)
    with _role("send", settings, supervised=supervised) as (house, stop):
        sender = Sender(
            settings, house.engine, house.spool, owner=_owner("send", settings), recorder=house.recorder
        )  # fmt: skip
        with _to_repository(settings, stop):
            _announce(house.spool, "send")
            sender.run(stop)


@contextmanager
def _to_repository(settings: Settings, stop: threading.Event) -> Iterator[None]:
    """Take audit messages to their repository meanwhile, in a thread of its own: no archive waits for it."""
    if not settings.audit.on:
        yield
        return
    repository = Repository(settings, audit.spool_of(settings))
    thread = threading.Thread(target=repository.run, args=(stop,), name="audit")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


RUN: dict[Role, Callable[..., None]] = {"receive": run_receiver, "work": run_worker, "send": run_sender}


def serve(settings: Settings, config: Path | None) -> None:
    """Run the node: all three roles as processes, each started again when it ends, until a signal."""
    check_release(settings, load_record(settings))
    tls.refuse_unfit(settings)
    house = open_house(settings)  # once, so that three roles do not race to upgrade the schema, and faults show here
    refuse_damage(house.engine)
    house.engine.dispose()
    stop = threading.Event()
    _stop_on_signals(stop)
    watchers = [
        threading.Thread(target=_keep_running, args=(role, config, stop), name=f"keep-{role}") for role in ROLES
    ]
    for watcher in watchers:
        watcher.start()
    _log.info("serving", roles=" ".join(ROLES))
    _wait(stop)
    for watcher in watchers:
        watcher.join()
    _log.info("stopped")


def _keep_running(role: Role, config: Path | None, stop: threading.Event) -> None:
    pause_s = _RESTART_FIRST_S
    while not stop.is_set():
        started = time.monotonic()
        # The child reads our pipe: when we die, however suddenly, it reads the end of it and stops too.
        child = subprocess.Popen(command(role, config, supervised=True), stdin=subprocess.PIPE)
        while child.poll() is None and not stop.wait(0.1):
            pass
        if stop.is_set():
            _end(child, role)
            return
        if time.monotonic() - started > _STEADY_S:
            pause_s = _RESTART_FIRST_S
        _log.error("role_ended", role_name=role, exit_code=child.returncode, restart_in_s=pause_s)
        stop.wait(pause_s)
        pause_s = min(_RESTART_MAX_S, 2 * pause_s)


def _end(child: "subprocess.Popen[bytes]", role: Role) -> None:
    child.terminate()
    try:
        child.wait(_STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        _log.error("role_killed", role_name=role, why=f"it did not stop within {_STOP_LIMIT_S:g} s")
        child.kill()
        child.wait()


@contextmanager
def _role(role: Role, settings: Settings, *, supervised: bool) -> Iterator[tuple[House, threading.Event]]:
    stop = threading.Event()
    _stop_on_signals(stop)
    if supervised:
        threading.Thread(target=_stop_with_supervisor, args=(stop,), name="supervisor", daemon=True).start()
    house = open_house(settings, f"remnant {role}")
    if not supervised:
        refuse_damage(house.engine)
    with _lock(house.spool.run / f"{role}.lock", wait_s=_LOCK_WAIT_S, what=f"the role {role} of this storage folder"):
        house.recorder.started()
        yield house, stop
        house.recorder.stopped()
        (house.spool.run / f"{role}.json").unlink(missing_ok=True)
    house.engine.dispose()


def _stop_on_signals(stop: threading.Event) -> None:
    def ask(_number: int, _frame: object) -> None:
        if stop.is_set():
            os._exit(3)  # asked twice: at once, which the node survives by design
        stop.set()

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, ask)


def _wait(stop: threading.Event) -> None:
    # In pieces: a signal that comes just before a wait begins does not interrupt it, and its handler runs only when
    # this thread does something again. On a busy machine one wait for ever never saw the SIGTERM.
    while not stop.wait(0.5):
        pass


def _stop_with_supervisor(stop: threading.Event) -> None:
    # Not through sys.stdin: its lock, held by this thread for ever, would crash the interpreter's shutdown.
    while os.read(0, 4096):
        pass
    stop.set()


@contextmanager
def _lock(path: Path, *, wait_s: float, what: str) -> Iterator[None]:
    """Hold a lock that ends with this process, however it ends. Raises RemnantError when another holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise RemnantError(
                        f"Another process holds {what}.",
                        hint="Stop the other node, or use another [storage] directory.",
                    ) from error
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def stopped(store: Spool) -> Iterator[None]:
    """Hold every role of this storage folder, so that none can start. Raises RemnantError where one runs."""
    with ExitStack() as held:
        for role in ROLES:
            held.enter_context(
                _lock(store.run / f"{role}.lock", wait_s=0, what=f"the role {role} of this storage folder")
            )
        yield


def _announce(store: Spool, role: Role, **facts: object) -> None:
    """Say that a role is ready, in a file that tools and tests can wait for."""
    path = store.run / f"{role}.json"
    fresh = path.with_suffix(".fresh")
    with fresh.open("w", encoding="utf-8") as file:
        json.dump({"pid": os.getpid(), **facts}, file)
        file.flush()
        os.fsync(file.fileno())  # else a power cut leaves the name and nothing in it
    fresh.rename(path)


def _owner(role: Role, settings: Settings) -> str:
    """The name a role signs leases with: the same after a restart, so that it finds what its predecessor held."""
    return f"{socket.gethostname()}:{role}:{settings.storage.directory.resolve()}"


def _ticks(house: House, wake: Callable[[], None]) -> "BackgroundScheduler":
    from apscheduler.executors.pool import ThreadPoolExecutor
    from apscheduler.schedulers.background import BackgroundScheduler

    scheduler = BackgroundScheduler(
        executors={"default": ThreadPoolExecutor(1)},
        job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None},
        timezone="UTC",
    )
    observer, clock = _LeaseObserver(house.engine), _ClockWatch(house.engine)
    jobs: tuple[tuple[str, Callable[[], bool], float], ...] = (
        ("views timeout", lambda: _expire_views(house, clock), 1.0),
        ("expired leases", observer.look, LEASE_S / 5),
        ("reconcile", lambda: _reconcile(house), 3600.0),
        ("purge", lambda: _purge(house), 3600.0),
        ("checkpoint", lambda: _checkpoint(house), 3600.0),
        ("health", lambda: _health(house), 60.0),
        ("certificate", lambda: warn_of_certificate(house.settings), 86_400.0),
    )
    for name, job, every_s in jobs:
        scheduler.add_job(_tick, "interval", (name, job, wake), seconds=every_s, id=name)
    # At once as well: after a kill or an old backup, objects may wait in the spool that the worklist does not know.
    scheduler.add_job(_tick, args=("start", lambda: _reconcile(house), wake), id="start")
    scheduler.add_job(_tick, args=("certificate", lambda: warn_of_certificate(house.settings), wake), id="own")
    return scheduler


def _tick(name: str, job: Callable[[], bool], wake: Callable[[], None]) -> None:
    try:
        if job():
            wake()
    except RemnantError as error:
        _log.error("tick_failed", tick=name, error=str(error))


class _ClockWatch:
    """Notices that the database's clock jumped: it then went on by more or less than our monotonic time.

    A jump across a restart is not noticed. It then costs a wait, or a note for a view that was still to come, which
    the view replaces when it comes; nothing is lost by it.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._seen: tuple[float, float] | None = None

    def look(self) -> None:
        before_s, wall_s = time.monotonic(), worklist.clock_s(self._engine)
        if self._seen is not None:
            jumped_s = (wall_s - self._seen[1]) - (before_s - self._seen[0])
            if abs(jumped_s) > _JUMP_S:
                moved = worklist.follow_clock(self._engine, jumped_s)
                _log.error("alarm", what="clock_jumped", by_s=round(jumped_s), times_moved=moved)
        self._seen = (before_s, wall_s)


def _expire_views(house: House, clock: _ClockWatch) -> bool:
    # In this order: a clock that jumped ahead must not give up views that still have their hour.
    clock.look()
    return bool(worklist.expire_views(house.engine))


class _LeaseObserver:
    """Breaks a lease whose counter has not moved for LEASE_S of our own monotonic time.

    Wall clocks of two machines may differ, and one may jump; a counter that stands still needs no clock but ours.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._seen: dict[int, tuple[object, float]] = {}

    def look(self) -> bool:
        now = time.monotonic()
        seen: dict[int, tuple[object, float]] = {}
        broken = False
        for lease in worklist.observe_leases(self._engine):
            mark = (lease.owner, lease.boot, lease.counter)
            before, since = self._seen.get(lease.scan_id, (mark, now))
            seen[lease.scan_id] = (mark, since if before == mark else now)
            if before == mark and now - since > LEASE_S and worklist.break_lease(self._engine, lease):
                _log.warning("lease_broken", scan=lease.scan_id, owner=lease.owner)
                broken = True
        self._seen = seen
        return broken


def _reconcile(house: House) -> bool:
    """Bring spool and worklist together; True where the worker may have something to do."""
    return reconcile.reconcile(house.engine, house.spool, reconcile.rules_of(house.settings)).adopted > 0


def _checkpoint(house: House) -> bool:
    """Once a day, fix the ends of all histories; the log carries the digest out of the house."""
    made = worklist.checkpoint(house.engine)
    if made is not None:
        _log.info("checkpoint", last_event=made.last, histories=made.histories, sha256=made.sha256)
    return False


def _purge(house: House) -> bool:
    """Remove the bytes whose retention is over; facts stay, so that a resend is still recognised."""
    storage = house.settings.storage
    for scan_id in worklist.warn_before_purge(house.engine, storage.retention_days):
        _log.warning("alarm", what="purge_near", scan=scan_id)
    purged = quarantine.expire_files(house.engine, house.spool)
    for item in worklist.purgeable(house.engine, retention_days=storage.retention_days):
        folder = house.spool.objects if item.kind == "instance" else house.spool.results
        # Marked first: a row that is retried at this moment keeps its bytes.
        if worklist.mark_purged(house.engine, item):
            spool.remove(folder / item.file_name)
            purged += 1
    worklist.forget_relays(house.engine, storage.retention_days)
    forgotten = worklist.forget(house.engine, storage.forget_days)
    if purged or forgotten:
        _log.info("purged", objects=purged, rows_forgotten=forgotten)
    return False


def warn_of_certificate(settings: Settings) -> bool:
    """Alarm while there is time: a certificate that ends unseen stops reception and sending on one morning."""
    if settings.tls.on:
        own, now = tls.own_certificate(settings.tls), datetime.now(UTC)
        if own.ends_soon(now):
            left = (own.valid_until - now).days
            _log.error("alarm", what="certificate_ends", at=own.valid_until.isoformat(), in_days=left)
    return False


def _health(house: House) -> bool:
    counts = worklist.counts_by_state(house.engine)
    _log.info("health", **{f"rows_{state}": count for state, count in counts.items()})
    try:
        spool.check_room(house.spool, 0)
    except RemnantError as error:
        _log.error("disk_low", error=str(error))
    return False
