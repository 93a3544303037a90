"""The pages say what the code does: commands, exit codes, columns, reasons, states. A stale page fails here."""

import re
import subprocess
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from dicom_node import cli, demo, errors
from dicom_node.receiver import Receiver
from dicom_node.worklist import DELIVERY_STATES, STATES, TRANSITIONS, VIEW_COLUMNS
from pipeline.reasons import REASONS

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(r"(?:^|&& |/)remnant ((?:worklist|db|models|audit|quarantine) [a-z-]+|[a-z]+)")


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def table(name: str, heading: str) -> list[list[str]]:
    """The cells of the table whose first column is called so; without its two header lines."""
    found = re.search(rf"^\| {heading} \|.*\n\|[-| ]+\n((?:\|.*\n)+)", page(name), re.MULTILINE)
    assert found, f"{name} has no table with the column {heading}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]


def commands() -> Iterator[tuple[str, typer.core.TyperCommand]]:
    """Every command by what a person types after `remnant`."""
    for name, command in get_command(cli.app).commands.items():
        below = getattr(command, "commands", None)
        if below is None:
            yield name, command
        else:
            for second, subcommand in below.items():
                yield f"{name} {second}", subcommand


def test_every_command_stands_in_the_readme_with_what_it_does() -> None:
    listed = [name for row in table("README.md", "command") for name in re.findall(r"`remnant ([^`]*)`", row[0])]
    typed = {COMMAND.match(f"remnant {name}")[1] for name in listed}
    assert typed == {name for name, _ in commands()}


def test_every_command_and_every_option_explains_itself() -> None:
    for name, command in commands():
        assert command.help, name
        for parameter in command.params:
            if not parameter.hidden:
                assert parameter.help, f"{name} {parameter.name}"


def test_every_command_but_those_without_a_node_takes_a_config() -> None:
    without = {name for name, command in commands() if "config" not in {one.name for one in command.params}}
    assert without == {"demo", "simulate"}


def tracked(*suffixes: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    return [path for path in paths if path.is_file() and (not suffixes or path.suffix in suffixes)]


def test_no_page_and_no_hint_names_a_command_that_does_not_exist() -> None:
    known = {name for name, _ in commands()}
    told: list[tuple[str, str]] = []
    for path in tracked(".md", ".py", ".toml"):
        if ROOT / "tests" in path.parents:
            continue
        text = path.read_text(encoding="utf-8")
        # What is typed stands in backticks or in a shell block.
        typed = re.findall(r"`([^`\n]*)`", text)
        typed += [
            line for block in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.M) for line in block.splitlines()
        ]
        told += [(path.name, name) for one in typed for name in COMMAND.findall(one.split("#")[0])]
    assert len(told) > 20
    assert [(where, name) for where, name in told if name not in known] == []


def test_every_exit_code_is_explained_to_the_admin() -> None:
    codes = {errors.DONE, errors.ANSWER_IS_NO, errors.WRONG_USE, errors.ENVIRONMENT}
    assert {int(row[0]) for row in table("deploy/README.md", "exit code")} == codes


def test_every_column_of_the_worklist_is_explained_in_order() -> None:
    assert [row[0].strip("`") for row in table("deploy/README.md", "column")] == list(VIEW_COLUMNS)


def test_every_reason_is_explained_with_its_code_its_note_and_its_hint() -> None:
    explained = table("deploy/README.md", "reason")
    assert explained == [
        [f"`{reason.token}`", reason.code_value, "yes" if reason.ours else "no", reason.sentence, reason.hint]
        for reason in REASONS.values()
    ]


def test_the_states_that_the_columns_page_names_are_the_states() -> None:
    rows = {row[0]: row[1] for row in table("deploy/README.md", "column")}
    assert re.findall(r"`(\w+)`", rows["`state`"]) == list(STATES)
    assert set(re.findall(r"`(\w+)`", rows["`delivered_to`"])) == {
        "kind",
        "sop_class_uid",
        "sop_instance_uid",
        *DELIVERY_STATES,
    } - {"kind", "sop_class_uid", "sop_instance_uid"}


def test_every_state_and_every_change_stands_in_the_architecture_page() -> None:
    assert [row[0].strip("`") for row in table("dicom_node/README.md", "state")] == list(STATES)
    drawn = {}
    for before, after, when in table("dicom_node/README.md", "from"):
        for pair in product(re.findall(r"`(\w+)`", before), re.findall(r"`(\w+)`", after)):
            assert pair not in drawn, pair
            drawn[pair] = when
    assert drawn == dict(TRANSITIONS)


def test_every_module_of_the_node_is_named_in_the_architecture_page() -> None:
    text = page("dicom_node/README.md")
    told_by_design = {
        "__init__",
        "cli",
        "settings",
        "contexts",
        "spool",
        "receiver",
        "worker",
        "service",
        "errors",
        "log",
    }
    modules = {path.stem for path in (ROOT / "dicom_node").glob("*.py")}
    assert {name for name in modules - told_by_design if f"`{name}.py`" not in text} == set()


def test_every_link_between_pages_leads_somewhere() -> None:
    dead = []
    for path in tracked(".md"):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
            if not target.startswith(("http:", "https:")) and not (path.parent / target).exists():
                dead.append((path.name, target))
    assert dead == []


def test_every_folder_has_the_page_that_its_reader_needs() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "LICENSE"):
        assert page(name).strip(), name
    for name in ("deploy/README.md", "deploy/CONNECT.md"):
        assert page(name).strip(), name
    for name in ("deploy/CONFORMANCE.md", "pipeline/README.md", "dicom_node/README.md"):
        assert page(name).strip(), name


def test_the_security_page_speaks_of_settings_and_commands_that_there_are() -> None:
    text = page("SECURITY.md")
    settings = {row[0].strip("`") for row in table("deploy/CONFORMANCE.md", "key")}
    named = set(re.findall(r"`((?:node|receiver|storage|sources|destinations)\.\w+)`", text))
    assert len(named) > 6
    assert named <= settings
    said = {" ".join(words.split()[1:3]) for words in re.findall(r"`(remnant [a-z ]+)", text)}
    known = {name for name, _ in commands()}
    assert len(said) > 3
    assert {one for one in said if one not in known and one.split()[0] not in known} == set()


# Written apart, so that this file does not name them itself.
OF_A_MACHINE = re.compile("|".join(["/" + "home/", "/" + "work/", "/" + "root/", "/" + "Users/", "tmp" + "/venv"]))


def test_no_file_names_a_path_of_the_machine_it_was_written_on() -> None:
    named = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights and pictures
        named += [(str(path.relative_to(ROOT)), found) for found in OF_A_MACHINE.findall(text)]
    assert named == []


def test_the_order_in_which_success_comes_true_is_the_order_in_the_code() -> None:
    """The page promises bytes, then row, then status; the method that does it must read that way."""
    code = Path(ROOT / "dicom_node" / "receiver.py").read_text(encoding="utf-8")
    take = code[code.index(f"def {Receiver._take.__name__}") :]
    steps = [
        "header_facts(",
        "spool.placing(",
        "worklist.receive(",
        "settle=placed.settle",
        "_worker_bell.ring()",
        "return SUCCESS",
    ]
    places = [take.index(step) for step in steps]
    assert places == sorted(places)


@pytest.mark.parametrize("name", ["README.md", "deploy/CONNECT.md"])
def test_whoever_reads_about_results_reads_that_they_need_review(name: str) -> None:
    assert "not for diagnosis without review" in " ".join(page(name).lower().split())


def test_the_demo_in_the_readme_is_the_demo_that_runs() -> None:
    """Its lines name the scans that `remnant demo` sends by default, in order, with what must become of each."""
    shown = [line for line in page("README.md").splitlines() if line.endswith("as it must be")]
    sendings = demo._sendings(4, 1)
    assert len(shown) == len(sendings)
    for line, sending in zip(shown, sendings, strict=True):
        begin = demo._COLUMNS.format(sending.title, sending.truth, sending.expected.state, *[""] * 6).rstrip()
        assert line.startswith(begin)
        assert (sending.expected.reason or "") in line
