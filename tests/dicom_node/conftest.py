"""Databases for the tests of the node: SQLite files and a PostgreSQL cluster of our own, both real."""

import hashlib
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, text

from dicom_node.worklist import (
    Claim,
    IntakeRules,
    NewResult,
    Receipt,
    Stored,
    claim,
    due_deliveries,
    finish,
    open_worklist,
    receive,
    record_delivery,
    upgrade,
)
from pipeline.views import FrameFacts, HeaderFacts


@pytest.fixture(scope="session")
def postgresql_server(peer: Callable[[str], Path]) -> Iterator[Callable[[], str]]:
    """A cluster on a Unix socket, for this session; call it for the URL of a new empty database."""
    initdb, pg_ctl = (str(peer(f"/usr/lib/postgresql/15/bin/{name}")) for name in ("initdb", "pg_ctl"))
    folder = Path(tempfile.mkdtemp(prefix="remnant-pg-"))
    # PostgreSQL refuses to run as root.
    account = pwd.getpwnam("postgres") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    if os.geteuid() == 0:
        os.chown(folder, account.pw_uid, account.pw_gid)

    def run(*arguments: str) -> None:
        who = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}
        with (folder / "commands.log").open("a") as log:
            done = subprocess.run(arguments, cwd=folder, stdout=log, stderr=log, check=False, **who)
        assert done.returncode == 0, (folder / "commands.log").read_text()

    data = folder / "data"
    run(initdb, "-D", str(data), "-U", "remnant", "-A", "trust", "-E", "UTF8", "--no-sync")
    settings = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off -c max_connections=60"
    run(pg_ctl, "-D", str(data), "-w", "-l", str(folder / "server.log"), "-o", settings, "start")
    numbers = itertools.count()
    admin = create_engine(
        f"postgresql+psycopg://remnant@/postgres?host={folder}", isolation_level="AUTOCOMMIT", pool_size=1
    )

    def new_database() -> str:
        name = f"worklist_{next(numbers)}"
        with admin.connect() as conn:
            conn.execute(text(f"CREATE DATABASE {name}"))
        return f"postgresql+psycopg://remnant@/{name}?host={folder}"

    try:
        yield new_database
    finally:
        admin.dispose()
        run(pg_ctl, "-D", str(data), "-w", "-m", "immediate", "stop")
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def worklist_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database; the test runs once on each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'worklist.db'}"
    return str(request.getfixturevalue("postgresql_server")())


@pytest.fixture
def engine(worklist_url: str) -> Iterator[Engine]:
    """A worklist of this version, empty."""
    opened = open_worklist(worklist_url)
    upgrade(opened)
    yield opened
    opened.dispose()


@pytest.fixture
def sqlite_engine(tmp_path: Path) -> Iterator[Engine]:
    """As `engine`, for what only SQLite has."""
    opened = open_worklist(f"sqlite:///{tmp_path / 'worklist.db'}")
    upgrade(opened)
    yield opened
    opened.dispose()


STUDY = "1.2.826.0.1.3680043.10.1.77"
NM = "1.2.840.10008.5.1.4.1.1.20"
CT = "1.2.840.10008.5.1.4.1.1.2"
RULES = IntakeRules(require_views=("anterior", "posterior"), pair_window_s=3600, views_timeout_s=3600, timezone=UTC)


@dataclass(frozen=True, slots=True)
class Camera:
    """Sends header facts of invented objects to a worklist, as the receiver would after storing their bytes."""

    engine: Engine
    rules: IntakeRules = RULES

    def facts(self, name: str, view: str = "both", minute: float = 0, **changed: Any) -> HeaderFacts:
        """An 131I neck object called `name` (its UID ends so): "anterior", "posterior", or "both" views in one."""
        views = ("anterior", "posterior") if view == "both" else (view,)
        facts = HeaderFacts(
            sop_class_uid=NM,
            sop_instance_uid=f"2.25.{int.from_bytes(name.encode(), 'big')}",
            study_instance_uid=STUDY,
            series_instance_uid=f"{STUDY}.1",
            patient_id="RMN-1",
            issuer_of_patient_id="HOSPITAL",
            patient_name="Invented^Iris",
            accession_number="A-1",
            acquired_at=datetime(2026, 11, 23, 17, 0) + timedelta(minutes=minute),  # noqa: DTZ001 - as a header has it
            timezone_offset_from_utc="",
            rows=256,
            columns=256,
            number_of_frames=len(views),
            spacing_mm=(2.209, 2.209),
            energy_window_kev=(327.6, 400.4),
            frames=tuple(FrameFacts(one, number) for number, one in enumerate(views, start=1)),
            reason=None,
            ours=True,
        )
        return replace(facts, **changed)

    def send(self, name: str, view: str = "both", minute: float = 0, *, data: str = "", **changed: Any) -> Receipt:
        """Enter one object; `data` stands for its bytes."""
        digest = hashlib.sha256(f"{name}{data}".encode()).hexdigest()
        stored = Stored(f"{digest[:2]}/{digest}.dcm", digest, 131_072, "1.2.840.10008.1.2.1")
        facts = self.facts(name, view, minute, **changed)
        return receive(self.engine, facts, stored, source_aet="OPTIMA1", rules=self.rules)


@pytest.fixture
def camera(engine: Engine) -> Camera:
    """A camera in front of an empty worklist, once for each kind of database."""
    return Camera(engine)


@pytest.fixture
def sqlite_camera(sqlite_engine: Engine) -> Camera:
    """A camera in front of an empty SQLite worklist."""
    return Camera(sqlite_engine)


@dataclass(frozen=True, slots=True)
class Worker:
    """Claims and finishes rows with results whose UIDs follow from row and revision, as the real ones do."""

    engine: Engine
    owner: str = "host:work"
    boot: str = "boot-1"

    def claim(self) -> Claim:
        claimed = claim(self.engine, self.owner, self.boot)
        assert claimed is not None, "nothing was due"
        return claimed

    def results(self, held: Claim, *kinds: str) -> list[NewResult]:
        return [
            NewResult(
                kind=kind,
                variant="",
                sop_class_uid=f"1.2.840.10008.5.1.4.1.1.88.{number}",
                sop_instance_uid=f"2.25.{held.scan_id}{held.revision:03}{number}",
                series_instance_uid=f"2.25.{held.scan_id}{held.revision:03}",
                sha256=hashlib.sha256(f"{held.scan_id} {held.revision} {kind}".encode()).hexdigest(),
                file_name=f"{held.scan_id}-{held.revision}-{kind}.dcm",
            )
            for number, kind in enumerate(kinds, start=1)
        ]

    def finish(self, held: Claim, *destinations: str, kinds: tuple[str, ...] = ("sr", "sc"), **changed: Any) -> str:
        """Finish with a finding for these destinations, or with what `changed` says."""
        results = self.results(held, *kinds)
        answer = {"outcome": "analysed", "finding": "present", "probability": 0.875, "model": "net 1"} | changed
        pairs = [(one.sop_instance_uid, name) for one in results for name in destinations]
        return finish(self.engine, held, results=results, deliveries=pairs, **answer)

    def deliver(self, destination: str = "pacs", state: str = "acknowledged") -> int:
        """Let everything that is due at a destination end so; returns how many."""
        due = due_deliveries(self.engine, destination, owner="sender", limit=100, hold_s=60)
        for one in due:
            record_delivery(self.engine, one.id, state=state, status=0 if state == "acknowledged" else 0xA900)
        return len(due)


@pytest.fixture
def worker(engine: Engine) -> Worker:
    """A worker at the worklist of `camera`."""
    return Worker(engine)
