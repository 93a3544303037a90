"""Databases for the tests of the node: SQLite files and a PostgreSQL cluster of our own, both real."""

import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, text

from dicom_node.worklist import open_worklist, upgrade


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
