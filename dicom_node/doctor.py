"""`remnant doctor`: is this node fit to work? Each check is one function, one line, and one thing to do."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import packages_distributions
from pathlib import Path

from dicom_node import tls, worklist
from dicom_node.audit import spool_of
from dicom_node.audit.repository import reach
from dicom_node.contexts import REPORT_CHAIN, RESULT_CLASSES, STORAGE_COMMITMENT
from dicom_node.delivery import peer_of
from dicom_node.errors import RemnantError, SettingsError
from dicom_node.sender import accepted_classes, echo
from dicom_node.service import check_release, load_record
from dicom_node.settings import Destination, Settings
from dicom_node.transport.secure import why

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
        yield from ask_destination(settings, destination)
    if not settings.destinations:
        yield Check("destinations", False, "none is configured: results stay in the storage folder")


def ask_destination(settings: Settings, destination: Destination) -> Iterator[Check]:
    """Ask a destination whether it is there, and, where it is, which results it takes."""
    try:
        peer = peer_of(settings, destination)
    except SettingsError as error:
        yield Check(f"destination {destination.name}", False, str(error))
        return
    outcome = echo(
        peer,
        calling_ae_title=settings.node.ae_title,
        connect_timeout_s=ECHO_TIMEOUT_S,
        acse_timeout_s=ECHO_TIMEOUT_S,
        dimse_timeout_s=ECHO_TIMEOUT_S,
    )
    there = outcome.kind == "acknowledged"
    yield Check(f"destination {destination.name}", there, "answers C-ECHO" if there else outcome.text)
    if not there:
        return
    try:
        takes = accepted_classes(
            peer,
            [*dict.fromkeys(one.uid for one in (*REPORT_CHAIN, *RESULT_CLASSES.values())), STORAGE_COMMITMENT],
            calling_ae_title=settings.node.ae_title,
            connect_timeout_s=ECHO_TIMEOUT_S,
            acse_timeout_s=ECHO_TIMEOUT_S,
            dimse_timeout_s=ECHO_TIMEOUT_S,
        )
    except RemnantError as error:
        yield Check(f"results to {destination.name}", False, str(error))
        return
    drawn = any("sc" in one.results for one in settings.destinations)
    ok, detail = what_it_gets(destination.results, takes, drawn=drawn)
    yield Check(f"results to {destination.name}", ok, detail)
    if destination.storage_commitment:
        can = takes[STORAGE_COMMITMENT]
        how = "does Storage Commitment" if can else "does no Storage Commitment: results would never count as delivered"
        yield Check(f"commitment of {destination.name}", can, how)


def what_it_gets(results: tuple[str, ...], takes: Mapping[str, bool], *, drawn: bool) -> tuple[bool, str]:
    """Say which object a destination would get for each of its `results`, and whether that is well.

    `takes`: SOP class -> whether the destination accepts it. `drawn`: some destination gets the Secondary Capture, so
    that each scan has one to fall back to.
    """
    ok, said = True, []
    for kind in results:
        if kind != "sr":
            taken = takes[RESULT_CLASSES["sc" if kind == "sc" else "seg"].uid]
            ok = ok and taken
            said.append(
                f"{kind}: " + ("yes" if taken else f'refused; remove "{kind}" from its results, or allow it there')
            )
            continue
        first = next((one for one in REPORT_CHAIN if takes[one.uid]), None)
        refused = ", ".join(_short(one.name) for one in REPORT_CHAIN[: REPORT_CHAIN.index(first) if first else None])
        if first is not None:
            said.append(f"sr: {_short(first.name)}" + (f" (refuses {refused})" if refused else ""))
        elif takes[RESULT_CLASSES["sc"].uid] and drawn:
            said.append(f"sr: the Secondary Capture alone (refuses {refused})")
        else:
            ok = False
            said.append(f'sr: nothing (refuses {refused}); give it "sc", or allow one of them there')
    return ok, "; ".join(said)


def _short(name: str) -> str:
    return name.removesuffix(" Storage")


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


def check_tls(settings: Settings) -> tuple[bool, str]:
    """Say whose our certificate is and how long it lasts. Raises SettingsError where no peer would take it."""
    if not settings.tls.on:
        return True, "off: whoever listens on the network reads patients' names"
    now = datetime.now(UTC)
    tls.refuse_unfit(settings, now)
    own = tls.own_certificate(settings.tls)
    text = f"{own.subject}, valid until {own.valid_until:%Y-%m-%d}, in {(own.valid_until - now).days} days"
    if own.ends_soon(now):
        return False, f"{text}: renew it, or callers will refuse it"
    return True, text + ("" if settings.tls.plain else "; no plain port")


def check_audit(settings: Settings) -> tuple[bool, str]:
    """Say whether the audit record repository can be reached, and what waits for it. Raises SettingsError."""
    if not settings.audit.on:
        return True, "off: nobody is told who sent or read what"
    held = spool_of(settings)
    left, waiting = held.left_out(), held.bytes_waiting()
    text = f"{waiting / 2**20:.1f} of {int(settings.audit.max_spool) / 2**20:.0f} MiB wait"
    if left is not None:
        return False, f"{text}; {left.count} messages were left out since {left.since}: {left.why}"
    try:
        reach(settings)
    except OSError as error:
        return False, f"{text}; {settings.audit.host} port {settings.audit.port}: {why(error)}"
    return True, f"{text}; " + ("sent by UDP, which nobody confirms" if settings.audit.transport == "udp" else
                                "the repository answers")  # fmt: skip


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
        verify(settings.weights)
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
    ("TLS", check_tls),
    ("audit", check_audit),
    ("weights", _weights),
    ("release", _release),
)
