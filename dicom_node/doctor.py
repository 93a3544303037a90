"""`remnant doctor`: is this node fit to work? Each check is one function, one line, and one thing to do."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path

from dicom_node import worklist
from dicom_node.errors import RemnantError
from dicom_node.sender import Peer, echo
from dicom_node.service import check_release, load_record
from dicom_node.settings import Settings

ECHO_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, whether it is well, and what was seen."""

    name: str
    ok: bool
    detail: str


def examine(settings: Settings) -> Iterator[Check]:
    """Yield every check, in the order in which a person would look."""
    yield Check("settings", True, f"AE title {settings.node.ae_title}, {len(settings.sources)} sources")
    for name, look in _LOOKS:
        try:
            ok, detail = look(settings)
        except RemnantError as error:
            ok, detail = False, str(error)
        yield Check(name, ok, detail)
    for destination in settings.destinations:
        peer = Peer(destination.name, destination.ae_title, destination.host, destination.port)
        outcome = echo(
            peer,
            calling_ae_title=settings.node.ae_title,
            connect_timeout_s=ECHO_TIMEOUT_S,
            acse_timeout_s=ECHO_TIMEOUT_S,
            dimse_timeout_s=ECHO_TIMEOUT_S,
        )
        yield Check(
            f"destination {destination.name}",
            outcome.kind == "acknowledged",
            "answers C-ECHO" if outcome.kind == "acknowledged" else outcome.text,
        )
    if not settings.destinations:
        yield Check("destinations", False, "none is configured: results stay in the storage folder")


def check_packages(owners: "dict[str, list[str]] | None" = None) -> tuple[bool, str]:
    """Say whether the packages `dicom_node`, `pipeline` and `models` are ours alone.

    They have plain names: in an environment shared with another project, `import models` could load somebody else's
    code. That is why Remnant is installed in an environment of its own.
    """
    found = packages_distributions() if owners is None else owners
    foreign = {
        package: sorted(set(found.get(package, ())) - {"remnant-node"})
        for package in ("dicom_node", "pipeline", "models")
    }
    bad = [f"{package} belongs also to {', '.join(names)}" for package, names in foreign.items() if names]
    if bad:
        return False, "; ".join(bad) + ". Install remnant-node in an environment of its own."
    return True, "dicom_node, pipeline and models are ours alone"


def _packages(_settings: Settings) -> tuple[bool, str]:
    return check_packages()


def _disk(settings: Settings) -> tuple[bool, str]:
    directory = settings.storage.directory
    existing = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if not os.access(existing, os.W_OK):
        return False, f"{existing} cannot be written by this user"
    text = f"{free / 2**30:.1f} GiB free in {directory}, reserve {int(settings.storage.min_free) / 2**30:.1f} GiB"
    return free > int(settings.storage.min_free), text


def _database(settings: Settings) -> tuple[bool, str]:
    url = settings.database_url
    if url.startswith("sqlite:///") and not Path(url.removeprefix("sqlite:///")).exists():
        return True, "not made yet; `remnant serve` makes it"
    engine = worklist.open_worklist(url, busy_timeout_s=settings.database.busy_timeout_s)
    try:
        if not worklist.schema_is_current(engine):
            return False, "its schema is not this version's; run `remnant db upgrade`"
        faults = worklist.check(engine)
        counts = worklist.counts_by_state(engine)
    finally:
        engine.dispose()
    if faults:
        return False, "; ".join(faults)
    return True, ", ".join(f"{count} {state}" for state, count in counts.items()) or "empty"


def _weights(settings: Settings) -> tuple[bool, str]:
    from models.weights import WeightsError, verify

    record = load_record(settings)
    try:
        verify(settings.model.weights)
    except WeightsError as error:
        return False, str(error)
    return True, f"{record.name} {record.version}, {record.architecture}, digest {record.sha256[:12]} fits its record"


def _release(settings: Settings) -> tuple[bool, str]:
    record = load_record(settings)
    check_release(settings, record)
    return True, f"{record.release}, trained on {record.trained_on}"


_LOOKS: tuple[tuple[str, Callable[[Settings], tuple[bool, str]]], ...] = (
    ("packages", _packages),
    ("disk", _disk),
    ("database", _database),
    ("weights", _weights),
    ("release", _release),
)
