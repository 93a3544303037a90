"""Bringing a database to this version's tables, by Alembic, in one transaction.

An upgrade either happens as a whole or not at all, and two processes that start together wait for each other. A
database of a newer version is left alone.
"""

from typing import TYPE_CHECKING

from sqlalchemy import Engine, inspect, text

from dicom_node.worklist.engine import SCHEMA_LOCK, WorklistFault, lock, reading, writing

if TYPE_CHECKING:
    from alembic.config import Config

REVISION = "0004"
"""The newest migration, said here once more so that asking for it loads no Alembic: the receiver starts in a second."""


def upgrade(engine: Engine) -> None:
    """Make the tables, or bring them up to date; does nothing where they are.

    Raises
    ------
    WorklistFault: the database was written by a newer version.
    DatabaseUnavailable: it cannot be reached or is locked; nothing was changed.
    """
    from alembic import command
    from alembic.util import CommandError

    config = alembic_config()
    with writing(engine) as conn:
        lock(conn, SCHEMA_LOCK)
        config.attributes["connection"] = conn
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise WorklistFault(
                f"the worklist's database cannot be brought to this version: {error}",
                hint="was it written by a newer version? then run that version; otherwise restore a backup",
            ) from error


def schema_is_current(engine: Engine) -> bool:
    """Say whether the database has exactly this version's tables."""
    with reading(engine) as conn:
        if not inspect(conn).has_table("alembic_version"):
            return False
        return list(conn.scalars(text("SELECT version_num FROM alembic_version"))) == [REVISION]


def alembic_config() -> "Config":
    """Where Alembic finds the migrations."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "dicom_node.worklist:migrations")
    config.set_main_option("path_separator", "os")
    return config
