"""What an admin is told to type works: the queries of deploy/README.md, the unit file, the settings in CONNECT.md."""

import re
import sqlite3
import subprocess
import tomllib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from dicom_node import worklist
from dicom_node.settings import Settings

DEPLOY = Path(__file__).parents[2] / "deploy"


def _blocks(page: str, language: str) -> list[str]:
    text = (DEPLOY / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def test_every_query_in_the_admins_page_runs_on_a_real_worklist(tmp_path: Path) -> None:
    engine = worklist.open_worklist(f"sqlite:///{tmp_path / 'worklist.db'}", busy_timeout_s=5)
    worklist.upgrade(engine)
    engine.dispose()
    queries = _blocks("README.md", "sql")
    assert queries
    with closing(sqlite3.connect(f"file:{tmp_path / 'worklist.db'}?mode=ro", uri=True)) as reader:
        for query in queries:
            assert reader.execute(query).fetchall() == []


def test_the_settings_in_the_connecting_page_are_settings() -> None:
    (example,) = _blocks("CONNECT.md", "toml")
    settings = Settings.model_validate(tomllib.loads(example))
    assert [source.ae_title for source in settings.sources] == ["CAMERA1"]
    assert settings.destinations[0].test


def test_every_log_event_in_the_admins_page_is_one_that_the_code_says() -> None:
    table = re.search(
        r"^\| event \|.*?\n\n", (DEPLOY / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert table is not None
    events = {name for row in table[0].strip().splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert len(events) > 10
    code = "".join(path.read_text(encoding="utf-8") for path in (DEPLOY.parent / "dicom_node").rglob("*.py"))
    assert {event for event in events if f'"{event}"' not in code} == set()


def test_systemd_understands_every_line_of_the_unit(tmp_path: Path, peer: Callable[[str], Path]) -> None:
    program = peer("/usr/bin/systemd-analyze")
    unit = (DEPLOY / "remnant.service").read_text(encoding="utf-8")
    # The program is not installed where the tests run; systemd-analyze would say only that.
    runnable = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", unit, flags=re.MULTILINE)
    path = tmp_path / "remnant.service"
    path.write_text(runnable, encoding="utf-8")
    done = subprocess.run(
        [program, "verify", "--man=no", path], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
