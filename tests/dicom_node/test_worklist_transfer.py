"""Backup, restore and copy: the whole worklist or nothing, its history's chains unbroken, and nothing overwritten."""

import sqlite3
import stat
import threading
from contextlib import closing

import pytest
from sqlalchemy import text

from dicom_node import worklist
from dicom_node.errors import RemnantError
from dicom_node.worklist.tables import metadata


def lines(engine):
    """Everything in every table, but what the tool itself adds to the node's own history."""
    with engine.connect() as conn:
        held = {table.name: conn.execute(table.select().order_by(table.c.id)).all() for table in metadata.sorted_tables}
    held["event"] = [line for line in held["event"] if line.scan_id is not None]
    return held


@pytest.fixture
def busy(camera, worker):
    """A worklist with a bit of everything: delivered, sending, waiting, declined, a disputed version."""
    camera.send("delivered")
    worker.finish(worker.claim(), "pacs")
    worker.deliver()
    camera.send("sending", study_instance_uid="2.25.11")
    worker.finish(worker.claim(), "pacs")
    camera.send("waiting", "anterior", study_instance_uid="2.25.12", patient_name="Gao^Minghe=高^明河")
    camera.send("ct", sop_class_uid="1.2.840.10008.5.1.4.1.1.2", reason="wrong_class", frames=())
    camera.send("delivered", data="another identity", patient_id="RMN-2")
    return camera


@pytest.fixture
def opened():
    """Open databases that are closed again."""
    engines = []

    def open_one(url):
        engines.append(worklist.open_worklist(url))
        return engines[-1]

    yield open_one
    for engine in engines:
        engine.dispose()


def test_a_backup_is_one_sound_file_with_everything_and_for_its_user_only(busy, opened, tmp_path):
    path = tmp_path / "kept" / "backup.db"
    worklist.backup(busy.engine, path)

    assert [one.name for one in path.parent.iterdir()] == ["backup.db"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    copy = opened(f"sqlite:///{path}")
    assert lines(copy) == lines(busy.engine)
    assert worklist.check(copy) == worklist.verify_events(copy) == ()
    assert [one.detail for one in worklist.events(busy.engine, None)] == ["a backup was written"]


def test_a_backup_made_while_scans_come_in_is_one_moment(camera, opened, tmp_path):
    stop = threading.Event()
    sent = []

    def send():
        while not stop.is_set():
            sent.append(camera.send(f"s{len(sent)}", study_instance_uid=f"2.25.9{len(sent)}").scan_id)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        for number in range(3):
            before = len(sent)
            worklist.backup(camera.engine, tmp_path / f"{number}.db")
            copy = opened(f"sqlite:///{tmp_path / f'{number}.db'}")
            assert worklist.check(copy) == worklist.verify_events(copy) == ()
            assert len(worklist.rows(copy, limit=100_000)) >= before
    finally:
        stop.set()
        sender.join()
    assert len(sent) > 3


def test_a_backup_overwrites_nothing(busy, tmp_path):
    path = tmp_path / "backup.db"
    path.write_text("somebody's")
    with pytest.raises(worklist.WorklistFault, match="already"):
        worklist.backup(busy.engine, path)
    assert path.read_text() == "somebody's"
    assert [one.name for one in tmp_path.glob("*.part*")] == []


def test_a_restored_backup_is_the_worklist_and_what_was_there_stays_beside_it(sqlite_camera, opened, tmp_path):
    url = f"sqlite:///{tmp_path / 'worklist.db'}"
    sqlite_camera.send("before")
    worklist.backup(sqlite_camera.engine, tmp_path / "backup.db")
    sqlite_camera.send("after", study_instance_uid="2.25.3")
    # A reader that never closed leaves a log behind: it must not meet the new file.
    reader = sqlite3.connect(tmp_path / "worklist.db")
    reader.execute("select count(*) from scan").fetchone()
    sqlite_camera.engine.dispose()
    assert (tmp_path / "worklist.db-wal").stat().st_size > 0

    aside = worklist.restore(url, tmp_path / "backup.db")
    reader.close()

    again = opened(url)
    assert len(worklist.rows(again)) == 1
    assert worklist.check(again) == worklist.verify_events(again) == ()
    assert worklist.events(again, None)[-1].detail == "this database was restored from a backup"
    assert len(worklist.rows(opened(f"sqlite:///{aside}"))) == 2


@pytest.mark.parametrize("harm", ["no database", "another database", "damaged", "history edited", "newer", "gone"])
def test_what_is_no_sound_backup_is_refused_and_the_worklist_stays(sqlite_camera, opened, tmp_path, harm):
    path = tmp_path / "backup.db"
    for number in range(20):
        sqlite_camera.send(f"s{number}", study_instance_uid=f"2.25.9{number}")
    worklist.backup(sqlite_camera.engine, path)
    data = bytearray(path.read_bytes())
    if harm == "no database":
        path.write_bytes(b"not a database, but somebody's file " * 400)
    elif harm == "damaged":
        middle = len(data) // 2 // 4096 * 4096
        data[middle : middle + 4096] = b"\xa5" * 4096
        path.write_bytes(data)
    elif harm == "gone":
        path.unlink()
    else:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            for statement in {
                "another database": ["DROP TABLE alembic_version"],
                "history edited": ["DROP TRIGGER event_no_update", "UPDATE event SET detail = 'x' WHERE id = 2"],
                "newer": ["UPDATE alembic_version SET version_num = '9999'"],
            }[harm]:
                connection.execute(statement)
    before = lines(sqlite_camera.engine)
    sqlite_camera.engine.dispose()

    with pytest.raises(RemnantError) as refused:
        worklist.restore(f"sqlite:///{tmp_path / 'worklist.db'}", path)

    assert refused.value.hint
    assert "\n" not in str(refused.value)
    assert lines(opened(f"sqlite:///{tmp_path / 'worklist.db'}")) == before
    assert [one.name for one in tmp_path.glob("*.part*")] == [one.name for one in tmp_path.glob("*replaced*")] == []


def test_a_copy_to_the_other_kind_of_database_is_the_same_and_goes_on(busy, opened, postgresql_server, tmp_path):
    """SQLite to PostgreSQL and the other way round: `busy` is once on each."""
    sqlite = busy.engine.dialect.name == "sqlite"
    target = opened(postgresql_server() if sqlite else f"sqlite:///{tmp_path / 'copied.db'}")

    copied = worklist.copy(busy.engine, target)

    assert copied["scan"] == 4
    assert lines(target) == lines(busy.engine)
    assert worklist.check(target) == worklist.verify_events(target) == ()
    assert worklist.rows(target) == worklist.rows(busy.engine)
    # Ids go on where they were, so that no number names two scans.
    moved = type(busy)(target)
    assert moved.send("next", study_instance_uid="2.25.13").scan_id == 5
    assert moved.send("delivered").new is False
    with pytest.raises(worklist.WorklistFault, match="not empty"):
        worklist.copy(busy.engine, target)


def test_a_backup_of_one_kind_can_be_restored_into_the_other(busy, opened, postgresql_server, tmp_path):
    worklist.backup(busy.engine, tmp_path / "backup.db")
    sqlite = busy.engine.dialect.name == "sqlite"
    url = postgresql_server() if sqlite else f"sqlite:///{tmp_path / 'restored.db'}"
    assert worklist.restore(url, tmp_path / "backup.db") is None
    assert lines(opened(url)) == lines(busy.engine)


def test_a_database_of_another_version_is_not_copied(busy, opened, tmp_path):
    with busy.engine.begin() as conn:
        conn.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    with pytest.raises(worklist.WorklistFault, match="another version"):
        worklist.copy(busy.engine, opened(f"sqlite:///{tmp_path / 'copied.db'}"))
