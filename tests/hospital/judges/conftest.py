"""Every object the node can write, combined with what varies in a hospital, and the judges that look at it.

`test_judges.py` takes a pairwise selection of the combinations, `full_matrix.py` (`make judges`) all of them.
"""

import hashlib
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import BasicTextSRStorage, ComprehensiveSRStorage, EnhancedSRStorage

from dicom_node.report import Predecessor, key_object
from dicom_node.report.fallback import derive
from dicom_node.sender import Parcel, Peer, send
from pipeline.camera import SHAPES, examination

_BEFORE = Predecessor("1.2.840.10008.5.1.4.1.1.88.34", "2.25.1", "2.25.2")

_PEOPLE: Mapping[str, tuple[tuple[str, ...], str]] = {
    "none": (("",), "Feldkamp^Ida"),
    "ISO_IR 100": (("ISO_IR 100",), "Søgaard^Åshild"),
    "GB18030": (("GB18030",), "Tan^Yiwen=谭^忆雯"),
    "ISO_IR 192": (("ISO_IR 192",), "Ωmega^Ζωή=ω^ζωή"),
    "ISO 2022 IR 87": (("", "ISO 2022 IR 87"), "Kitami^Sora=北見^空=きたみ^そら"),
    "ISO 2022 IR 149": (("", "ISO 2022 IR 149"), "Nam^Garam=남^가람"),
}
"""Character set -> its element, and a name that needs it. All invented."""

_OUTCOMES = ("present", "absent", "undetermined", "not_analysed", "revision")
_WITH_TISSUE = ("present", "revision")
_FALLBACKS = {
    "comprehensive_sr": str(ComprehensiveSRStorage),
    "enhanced_sr": str(EnhancedSRStorage),
    "basic_text_sr": str(BasicTextSRStorage),
}
_KINDS = ("comprehensive_3d_sr", *_FALLBACKS, "sc_colour", "sc_grey", "seg_anterior", "seg_posterior", "key_object")
_AXES: Mapping[str, Sequence[str]] = {
    "kind": _KINDS,
    "outcome": _OUTCOMES,
    "shape": (*SHAPES, "two_acquisitions"),
    "characters": tuple(_PEOPLE),
}


@dataclass(frozen=True)
class Row:
    """One combination; `number` gives it a patient and a study of its own."""

    number: int
    kind: str
    outcome: str
    shape: str
    characters: str

    @property
    def name(self) -> str:
        return "-".join((self.kind, self.outcome, self.shape, self.characters.replace(" ", "_")))


def _exists(combination: Mapping[str, str]) -> bool:
    """Only tissue has a mask, and only a view that was taken."""
    if not combination["kind"].startswith("seg"):
        return True
    if combination["kind"] == "seg_posterior" and combination["shape"] == "anterior_only":
        return False
    return combination["outcome"] in _WITH_TISSUE


def _all_rows() -> list[Row]:
    combined = (dict(zip(_AXES, values, strict=True)) for values in itertools.product(*_AXES.values()))
    return [Row(number, **one) for number, one in enumerate(filter(_exists, combined))]


def _pairs_of(row: Row) -> set[frozenset[tuple[str, str]]]:
    """Every two values that meet in a row."""
    return {frozenset(two) for two in itertools.combinations(((axis, getattr(row, axis)) for axis in _AXES), 2)}


def _selection(rows: Sequence[Row]) -> list[Row]:
    """Few rows in which every two values meet that meet anywhere: always the row with the most new pairs."""
    open_pairs = set().union(*(_pairs_of(row) for row in rows))
    chosen = []
    while open_pairs:
        best = max(rows, key=lambda row: len(_pairs_of(row) & open_pairs))
        chosen.append(best)
        open_pairs -= _pairs_of(best)
    return chosen


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" in metafunc.fixturenames:
        rows = _all_rows()
        chosen = rows if metafunc.module.__name__.endswith("full_matrix") else _selection(rows)
        metafunc.parametrize("row", chosen, ids=lambda row: row.name)


@pytest.fixture(scope="session")
def every_row() -> list[Row]:
    return _all_rows()


@pytest.fixture(scope="session")
def chosen_rows(every_row: list[Row]) -> list[Row]:
    return _selection(every_row)


@dataclass(frozen=True)
class Made:
    """A case of the report's tests, and the object of a row's kind that was made of it (a complete file)."""

    case: Any
    data: bytes
    patient_name: str


@pytest.fixture(scope="session")
def make(cases: ModuleType) -> Callable[[Row], list[Made]]:
    """Make the objects of a row: one, or one for each of two acquisitions (24 h and 48 h) in one study."""

    def made(row: Row) -> list[Made]:
        characters, name = _PEOPLE[row.characters]
        who = replace(examination(10_000 + row.number), patient_name=name, specific_character_set=characters)
        visits = [who]
        if row.shape == "two_acquisitions":
            visits.append(replace(who, acquired_at=who.acquired_at + timedelta(hours=24)))
        return [Made(case, _data_of(case, row.kind), name) for case in (_case(cases, row, visit) for visit in visits)]

    return made


def _case(cases: ModuleType, row: Row, who: Any) -> Any:
    options: dict[str, Any] = {"predecessors": (_BEFORE,), "revision": 2} if row.outcome == "revision" else {}
    if row.kind == "sc_grey":
        options["sc"] = "grey"
    if row.kind == "seg_posterior":
        options["seg"] = "posterior"
    outcome = {"revision": "present", "not_analysed": "low_counts"}.get(row.outcome, row.outcome)
    shape = "two_frames" if row.shape == "two_acquisitions" else row.shape
    return cases.make_case(outcome, shape=shape, who=who, **options)


def _data_of(case: Any, kind: str) -> bytes:
    if kind == "key_object":
        return _withdrawal_of(case)
    data: bytes = case.render({"sc": "sc", "se": "seg"}.get(kind[:2], "sr")).data
    return derive(data, _FALLBACKS[kind]).data if kind in _FALLBACKS else data


def _withdrawal_of(case: Any) -> bytes:
    """The Key Object Selection that withdraws the report and the picture of a case."""
    withdrawn = key_object.render(
        [case.read("sr"), case.read("sc")],
        why="quality",
        reason="sent in error",
        at=case.context.analysed_at,
        timezone=case.context.timezone,
        ae_title="REMNANT",
        version="0.1.0",
    )
    return withdrawn.data


# --- The judges ------------------------------------------------------------------------------------------------------

_TOOLS = Path(sys.executable).parent
_TID_1500 = ("comprehensive_3d_sr", "comprehensive_sr", "enhanced_sr")
_OF_A_TOOL = (
    # dciodvfy: a private coding scheme cannot be in its list; DeviceUID in Contributing Equipment (PS3.3 C.12.1) is
    # younger than its tables.
    "99REMNANT",
    "CodingSchemeUID",
    "DeviceUID",
)
_NOT_KNOWN_TO_DSRDUMP = {
    # It knows ISO_IR 100; of others its checker of values says that it cannot look, and for code extensions that it
    # shows bytes as they are. Neither is a fault of the object: the names are compared after both archives.
    "ISO_IR 192": ("W: The VR checker does not support this Specific Character Set",),
    "GB18030": ("W: The VR checker does not support this Specific Character Set",),
    "ISO 2022 IR 87": (
        "W: The VR checker does not support this Specific Character Set",
        "W: Reading unknown/unsupported SpecificCharacterSet",
    ),
    "ISO 2022 IR 149": (
        "W: The VR checker does not support this Specific Character Set",
        "W: Reading unknown/unsupported SpecificCharacterSet",
    ),
}


@pytest.fixture(scope="session")
def judge(peer: Callable[[str], Path]) -> Callable[[Row, Made, Path], None]:
    """Ask every judge of a kind about an object; a failed assertion says what one of them said."""

    def ask(row: Row, made: Made, folder: Path) -> None:
        path = folder / f"{row.kind}.dcm"
        path.write_bytes(made.data)
        _dciodvfy(peer, path)
        if row.kind.endswith(("_sr", "key_object")):
            _dsrdump(peer, path, row)
        if row.kind in _TID_1500:
            _tid1500reader(peer, path, made)

    return ask


def _run(program: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, errors="replace")


def _dciodvfy(peer: Callable[[str], Path], path: Path) -> None:
    judged = _run(peer(str(_TOOLS / "dciodvfy")), "-new", path)
    said = [line for line in judged.stderr.splitlines() if line.startswith(("Error", "Warning"))]
    assert judged.returncode == 0, said
    assert not [line for line in said if not any(known in line for known in _OF_A_TOOL)]


def _dsrdump(peer: Callable[[str], Path], path: Path, row: Row) -> None:
    judged = _run(peer("/usr/bin/dsrdump"), path)
    assert judged.returncode == 0
    known = _NOT_KNOWN_TO_DSRDUMP.get(row.characters, ())
    if row.kind == "key_object":
        known += ("W: Check for template constraints not yet supported",)  # of TID 2010: it says so of every one
    said = (judged.stdout + judged.stderr).splitlines()
    assert not [line for line in said if line.startswith(("E:", "W:")) and not line.startswith(known or ("never",))]


def _tid1500reader(peer: Callable[[str], Path], path: Path, made: Made) -> None:
    """Compare what a foreign reader understands with what the outcome meant, all of it."""
    out = path.with_suffix(".json")
    judged = _run(peer(str(_TOOLS / "tid1500reader")), "--inputDICOM", path, "--outputMetadata", out)
    assert "rror" not in judged.stdout + judged.stderr
    read = json.loads(out.read_text())
    assert (read["CompletionFlag"], read["VerificationFlag"]) == ("COMPLETE", "UNVERIFIED")
    assert sorted(read["imageLibrary"]) == sorted(str(ds.SOPInstanceUID) for ds in made.case.sources)
    assert read["procedureReported"]["CodeValue"] == "49118-3"
    assert [_group_read(group) for group in read["Measurements"]] == _groups_meant(made.case)


def _group_read(group: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "tracked": group["TrackingIdentifier"],
        "finding": group["Finding"]["CodeMeaning"],
        "site": group["FindingSite"]["CodeMeaning"],
        "figures": [
            (item["quantity"]["CodeMeaning"], item["value"], item["units"]["CodeValue"])
            for item in group["measurementItems"]
        ],
        "answers": [
            (one["conceptCode"]["CodeMeaning"], one["conceptValue"]["CodeMeaning"])
            for one in group.get("qualitativeEvaluations", ())
        ],
        "algorithms": [
            (named["AlgorithmName"], named["AlgorithmVersion"])
            for item in group["measurementItems"]
            if (named := item.get("measurementAlgorithmIdentification"))
        ],
    }


def _groups_meant(case: Any) -> list[dict[str, Any]]:
    """What the outcome means, in words of the report's readers: the decision in the first group and nowhere else."""
    outcome = case.outcome
    groups = []
    for index, view in enumerate(getattr(outcome, "views", ())):
        first, found = index == 0, outcome.finding == "present"
        figures = [("Probability of residual thyroid tissue", f"{100 * outcome.probability:.2f}", "%")] if first else []
        figures += [("Area", f"{view.outline_area_mm2:.1f}", "mm2")] if found else []
        figures += [("Maximum", str(view.maximum_counts), "{counts}")]
        figures += [("Remnant to background ratio", f"{view.remnant_to_background:.2f}", "1")] if found else []
        if first and outcome.uptake is not None:
            figures += [("Uptake in thyroid bed", f"{outcome.uptake.percent:.2f}", "%")]
        figures += [("Number of foci of uptake", str(len(outcome.foci)), "1")] if first else []
        for focus in outcome.foci:
            for seen in focus.views:
                if seen.view == view.image.view:
                    figures += [("Counts of focus above its surroundings", f"{seen.counts:.0f}", "{counts}")]
                    if seen.seen:
                        figures += [("Area of focus at half its height", f"{seen.area_mm2:.0f}", "mm2")]
        tissue, region = "Residual thyroid tissue after thyroidectomy", "Region analysed for residual thyroid tissue"
        model = outcome.model
        groups.append(
            {
                "tracked": f"{'Residual thyroid tissue' if found else 'Analysed region'}, {view.image.view} view",
                "finding": tissue if first or found else region,
                "site": "Thyroid",
                "figures": figures,
                "answers": [(tissue, outcome.finding.capitalize())] if first else [],
                "algorithms": [(model.name, f"{model.version} sha256:{model.sha256}")] if first else [],
            }
        )
    return groups


# --- The archives ----------------------------------------------------------------------------------------------------

_NETWORK: dict[str, Any] = {
    "calling_ae_title": "REMNANT",
    "connect_timeout_s": 10,
    "acse_timeout_s": 10,
    "dimse_timeout_s": 20,
}


@pytest.fixture(scope="session")
def archived(orthanc: Any, dcmqrscp: Any) -> Callable[[Sequence[Made], Path], None]:
    """Send objects with the node's own sender to Orthanc and to dcmqrscp, and hold what lies there against them."""
    known: dict[str, Path] = {}

    def in_orthanc(uid: str, study: str) -> Dataset:
        held = [dcmread(BytesIO(orthanc.file(identifier))) for identifier in orthanc.find(study)]
        return next(ds for ds in held if uid == ds.SOPInstanceUID)

    def in_dcmqrscp(uid: str, study: str) -> Dataset:
        for path in set(dcmqrscp.stored()) - set(known.values()):
            known[str(dcmread(path, specific_tags=["SOPInstanceUID"]).SOPInstanceUID)] = path
        return dcmread(known[uid])

    def send_and_compare(objects: Sequence[Made], folder: Path) -> None:
        parcels = []
        for number, made in enumerate(objects):
            sent = dcmread(BytesIO(made.data))
            path = folder / f"{number}.dcm"
            path.write_bytes(made.data)
            digest = hashlib.sha256(made.data).hexdigest()
            parcels.append(Parcel(number, path, str(sent.SOPClassUID), str(sent.SOPInstanceUID), sha256=digest))
        for archive, port, fetch in (
            (orthanc, orthanc.dicom_port, in_orthanc),
            (dcmqrscp, dcmqrscp.port, in_dcmqrscp),
        ):
            outcomes = list(send(Peer("archive", archive.ae_title, archive.host, port), parcels, **_NETWORK))
            assert [(outcome.kind, outcome.status) for _, outcome in outcomes] == [("acknowledged", 0)] * len(parcels)
            for parcel, made in zip(parcels, objects, strict=True):
                sent = dcmread(parcel.path)
                held = fetch(parcel.sop_instance_uid, str(sent.StudyInstanceUID))
                assert [element.tag for element in held] == [element.tag for element in sent]
                assert [element.keyword for element in sent if held[element.tag] != element] == []
                assert str(held.PatientName) == made.patient_name

    return send_and_compare


@pytest.fixture
def right_by_all(
    make: Callable[[Row], list[Made]],
    judge: Callable[[Row, Made, Path], None],
    archived: Callable[[Sequence[Made], Path], None],
    tmp_path: Path,
) -> Callable[[Row], None]:
    """Make the objects of a row, ask every judge about each, and send them through both archives."""

    def hold(row: Row) -> None:
        objects = make(row)
        for made in objects:
            judge(row, made, tmp_path)
        archived(objects, tmp_path)

    return hold
