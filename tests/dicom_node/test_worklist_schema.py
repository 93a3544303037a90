"""The tables, the view that people script against, and the history that nobody can edit unseen."""

import json
import re
import subprocess

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, text
from sqlalchemy.exc import DBAPIError

from dicom_node import worklist
from dicom_node.worklist import schema
from dicom_node.worklist.tables import VIEW_COLUMNS, metadata

# SQLite appends a column that was added later without a new line.
_BETWEEN = r",\s*\n|,\s+(?=\w+ (?:TEXT|INTEGER|BIGINT|FLOAT)\b)"


def structure(engine):
    """Everything that makes a schema, as comparable text, without Alembic's own table."""
    with engine.connect() as conn:
        if engine.dialect.name == "sqlite":
            query = "SELECT type, name, sql FROM sqlite_master WHERE name NOT LIKE '%alembic%'"
            # The order of constraints within a table says nothing, nor where a column that was added later stands.
            return {
                (kind, name): sorted(part.strip() for part in re.split(_BETWEEN, re.sub(r"\)\s*$", "", sql or "")))
                for kind, name, sql in conn.execute(text(query))
            }
        queries = {
            "columns": "SELECT table_name, column_name, data_type, is_nullable, column_default, ordinal_position"
            " FROM information_schema.columns WHERE table_schema = 'public'",
            "constraints": "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint"
            " WHERE connamespace = 'public'::regnamespace",
            "indexes": "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'",
            "views": "SELECT viewname, definition FROM pg_views WHERE schemaname = 'public'",
            "triggers": "SELECT tgname, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal",
            "functions": "SELECT proname, prosrc FROM pg_proc WHERE pronamespace = 'public'::regnamespace",
        }
        return {
            name: sorted(str(row) for row in conn.execute(text(query)) if "alembic" not in str(row))
            for name, query in queries.items()
        }


def test_a_migrated_database_equals_a_fresh_one(engine, tmp_path, request):
    if engine.dialect.name == "sqlite":
        url = f"sqlite:///{tmp_path / 'fresh.db'}"
    else:
        url = request.getfixturevalue("postgresql_server")()
    fresh = worklist.open_worklist(url)
    metadata.create_all(fresh)
    try:
        made, migrated = structure(fresh), structure(engine)
        assert made == migrated
        assert len(made) >= 6
    finally:
        fresh.dispose()


def test_upgrading_twice_does_nothing_and_an_empty_file_is_not_current(worklist_url):
    engine = worklist.open_worklist(worklist_url)
    try:
        assert worklist.schema_is_current(engine) is False
        with pytest.raises(worklist.DatabaseUnavailable, match="tables are not there"):
            worklist.rows(engine)
        assert worklist.check(engine)
        worklist.upgrade(engine)
        before = structure(engine)
        worklist.upgrade(engine)
        assert worklist.schema_is_current(engine) is True
        assert structure(engine) == before
        assert worklist.check(engine) == ()
    finally:
        engine.dispose()


def test_the_revision_we_name_is_the_newest_migration():
    assert ScriptDirectory.from_config(schema.alembic_config()).get_heads() == [schema.REVISION]


def test_a_database_of_a_newer_version_is_left_alone(engine):
    with engine.begin() as conn:
        conn.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    assert worklist.schema_is_current(engine) is False
    with pytest.raises(worklist.WorklistFault, match="newer version"):
        worklist.upgrade(engine)


def test_the_columns_of_the_view_are_a_contract(engine):
    assert " ".join(VIEW_COLUMNS) == (
        "id state outcome reason accession_number patient_id study_instance_uid acquired_at source_aet received_at"
        " updated_at views finding probability model results delivered_to revision attempts not_before last_error"
    )
    assert tuple(column["name"] for column in inspect(engine).get_columns("worklist")) == VIEW_COLUMNS


def test_the_formats_of_the_view_are_a_contract(camera, worker):
    camera.send("scan")
    held = worker.claim()
    worker.finish(held, "pacs", "ris")
    with camera.engine.connect() as conn:
        row = conn.execute(text("SELECT * FROM worklist")).mappings().one()
    results = worker.results(held, "sr", "sc")
    assert json.loads(row["results"]) == [
        {"kind": one.kind, "sop_class_uid": one.sop_class_uid, "sop_instance_uid": one.sop_instance_uid}
        for one in results
    ]
    assert json.loads(row["delivered_to"]) == {"pacs": "pending", "ris": "pending"}
    for name in ("acquired_at", "received_at", "updated_at"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", row[name]), name
    assert (row["views"], row["finding"], row["probability"]) == ("anterior,posterior", "present", 0.875)


def test_an_empty_row_shows_empty_lists_and_not_nothing(camera):
    camera.send("a", "anterior")
    with camera.engine.connect() as conn:
        row = conn.execute(text("SELECT results, delivered_to FROM worklist")).one()
    assert (row.results, row.delivered_to) == ("[]", "{}")


@pytest.mark.parametrize(
    "edit", ["UPDATE event SET detail = 'nothing happened'", "DELETE FROM event", "DELETE FROM event WHERE id = 1"]
)
def test_the_history_cannot_be_changed_by_sql(camera, edit):
    scan_id = camera.send("scan").scan_id
    before = worklist.events(camera.engine, scan_id)
    with pytest.raises(DBAPIError, match="append-only"), camera.engine.begin() as conn:
        conn.execute(text(edit))
    assert worklist.events(camera.engine, scan_id) == before


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ("UPDATE event SET detail = 'edited' WHERE sequence = 2", "event 2 in the history of scan 1 was changed"),
        ("DELETE FROM event WHERE sequence = 1", "the history of scan 1 lacks event 1"),
        ("UPDATE event SET at = '2020-01-01T00:00:00.000Z' WHERE sequence = 3", "event 3"),
    ],
)
def test_an_edit_behind_the_triggers_shows_in_the_chain(sqlite_camera, edit, says):
    sqlite_camera.send("scan")
    assert worklist.verify_events(sqlite_camera.engine) == ()
    with sqlite_camera.engine.begin() as conn:
        conn.execute(text("DROP TRIGGER event_no_update"))
        conn.execute(text("DROP TRIGGER event_no_delete"))
        conn.execute(text(edit))
    (fault,) = worklist.verify_events(sqlite_camera.engine, 1)
    assert says in fault
    assert worklist.verify_events(sqlite_camera.engine) == (fault,)


def test_the_nodes_own_history_is_a_chain_of_its_own(engine):
    for number in range(3):
        worklist.record_event(engine, "node", f"started {number}")
    lines = worklist.events(engine, None)
    assert [(line.sequence, line.detail) for line in lines] == [(1, "started 0"), (2, "started 1"), (3, "started 2")]
    assert worklist.changes_since(engine, lines[0].id) == lines[1:]
    assert worklist.last_event_id(engine) == lines[-1].id
    with pytest.raises(KeyError):
        worklist.record_event(engine, "invented")


def test_lists_of_rows_page_both_ways(camera):
    ids = [camera.send(f"s{n}", study_instance_uid=f"2.25.6{n}").scan_id for n in range(5)]
    assert [row["id"] for row in worklist.rows(camera.engine, limit=2)] == [ids[4], ids[3]]
    assert [row["id"] for row in worklist.rows(camera.engine, limit=2, after=ids[1])] == ids[2:4]
    assert worklist.rows(camera.engine, state="failed") == []
    assert worklist.counts_by_state(camera.engine) | {"queued": 5} == worklist.counts_by_state(camera.engine)


def test_plain_sqlite3_reads_the_view_while_the_node_writes(sqlite_camera, peer, tmp_path):
    sqlite3 = peer("sqlite3")
    scan_id = sqlite_camera.send("scan").scan_id
    with sqlite_camera.engine.connect().execution_options(remnant_writes=True) as conn, conn.begin():
        conn.execute(text("UPDATE scan SET last_error = 'not committed'"))
        shown = subprocess.run(
            [
                sqlite3,
                "-header",
                tmp_path / "worklist.db",
                "SELECT id, state, views, last_error FROM worklist",
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
        conn.rollback()
    assert shown.stdout.splitlines() == ["id|state|views|last_error", f"{scan_id}|queued|anterior,posterior|"]
