"""What is installed is what is in the tree, at the versions that were tested."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {canonical(name): pinned for name, pinned in (line.split("==") for line in lines if line.strip())}


def requirements() -> list[str]:
    project = PROJECT["project"]
    asked = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    return [canonical(re.match(r"[A-Za-z0-9._-]+", one)[0]) for one in asked]


def test_the_list_of_packages_is_every_package_of_the_tree() -> None:
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("dicom_node", "pipeline", "models")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(found)


def test_every_module_of_the_tree_is_in_a_package() -> None:
    packages = {ROOT.joinpath(*name.split(".")) for name in PROJECT["tool"]["setuptools"]["packages"]}
    modules = [path for top in ("dicom_node", "pipeline", "models") for path in (ROOT / top).rglob("*.py")]
    assert [path for path in modules if path.parent not in packages] == []


def test_weights_and_cards_travel_with_the_package() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["models"]
    assert patterns == ["cards/*.md", "cards/*.json", "shipped/*.safetensors"]


def test_every_requirement_is_pinned_to_one_version() -> None:
    assert [name for name in requirements() if name not in pins()] == []
    assert all(re.fullmatch(r"[0-9][0-9A-Za-z.]*", pinned) for pinned in pins().values())


@pytest.mark.parametrize("name", sorted(set(requirements())))
def test_what_runs_here_is_the_pinned_version(name: str) -> None:
    """Otherwise the suite passes for versions that nobody installs."""
    assert version(name).split("+")[0] == pins()[name]


def test_torch_and_its_partner_are_pinned_where_pip_reads_first() -> None:
    """A range pulls gigabytes of CUDA; CONTRIBUTING.md says why."""
    assert f"torch=={pins()['torch']}" in PROJECT["project"]["dependencies"]
    assert f"torchvision=={pins()['torchvision']}" in PROJECT["project"]["dependencies"]


def test_the_command_is_where_the_script_says() -> None:
    assert PROJECT["project"]["scripts"] == {"remnant": "dicom_node.cli:main"}
    assert version("remnant-node") == PROJECT["project"]["version"]
