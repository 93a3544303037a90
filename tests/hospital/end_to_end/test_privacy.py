"""What a header says of a person stands in the database, the spool and the results, and nowhere else."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydicom import Dataset, config
from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dsutils import encode
from pynetdicom.sop_class import NuclearMedicineImageStorage

from pipeline.camera import examination, expose
from pipeline.phantom import phantom

# PS3.15 table E.1-1: what identifies a person or leads to one, as far as it is text of a C-STORE's data set.
IDENTIFYING = (
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "OtherPatientIDs",
    "OtherPatientNames",
    "PatientBirthName",
    "PatientMotherBirthName",
    "PatientAddress",
    "PatientTelephoneNumbers",
    "PatientComments",
    "AdditionalPatientHistory",
    "MilitaryRank",
    "Occupation",
    "EthnicGroup",
    "AccessionNumber",
    "StudyID",
    "StudyDescription",
    "SeriesDescription",
    "ProtocolName",
    "ImageComments",
    "InstitutionName",
    "InstitutionAddress",
    "InstitutionalDepartmentName",
    "StationName",
    "DeviceSerialNumber",
    "ReferringPhysicianName",
    "ReferringPhysicianAddress",
    "PerformingPhysicianName",
    "NameOfPhysiciansReadingStudy",
    "PhysiciansOfRecord",
    "RequestingPhysician",
    "OperatorsName",
    "AdmissionID",
    "AdmittingDiagnosesDescription",
    "RequestedProcedureID",
    "RequestedProcedureDescription",
    "PerformedProcedureStepID",
    "PerformedProcedureStepDescription",
    "MedicalAlerts",
    "Allergies",
    "PatientInsurancePlanCodeSequence",
    "CurrentPatientLocation",
    "RegionOfResidence",
    "PatientReligiousPreference",
)
BIRTH_DATE = "19070813"


def _marked(seed: int, person: str, *, control: bool = False) -> Dataset:
    """A scan whose every identifying element says ZQ<person><number>QZ."""
    (ds,) = expose(phantom(seed, residual=True, stratum="uptake_1_up"), examination(seed), "two_frames")
    ds.SpecificCharacterSet = "ISO_IR 192"
    for number, keyword in enumerate(IDENTIFYING):
        tag = tag_for_keyword(keyword)
        assert tag is not None
        if dictionary_VR(tag) == "SQ":
            item = Dataset()
            item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = (
                f"ZQ{person}{number}QZ",
                "99ZQ",
                "ZQmeaningQZ",
            )
            ds[tag] = DataElement(tag, "SQ", [item])
            continue
        value = f"ZQ{person}{number}QZ"
        if control and dictionary_VR(tag) in ("LO", "LT", "ST", "PN", "SH"):
            value = f"ZQ\x1b[31m{number}\r\nQZ"
        ds[tag] = DataElement(tag, dictionary_VR(tag), value, validation_mode=config.IGNORE)
    ds.PatientBirthDate = BIRTH_DATE
    other = Dataset()
    other.PatientID, other.IssuerOfPatientID = f"ZQ{person}otherQZ", f"ZQ{person}issuerQZ"
    ds.OtherPatientIDsSequence = [other]
    block = ds.private_block(0x0009, "ZQCREATORQZ", create=True)
    block.add_new(0x01, "LO", f"ZQ{person}privateQZ")
    return ds


def _send(port: int, ds: Dataset) -> int:
    return _send_bytes(port, _encoded(ds), str(ds.SOPInstanceUID))


def _files(root: Path) -> Iterator[Path]:
    yield from (path for path in root.rglob("*") if path.is_file())


def _hits(text: bytes) -> list[bytes]:
    """Markers in a text, each with what stands around it."""
    found = []
    for marker in (b"ZQ", BIRTH_DATE.encode()):
        start = text.find(marker)
        while start >= 0:
            found.append(text[max(0, start - 60) : start + 40])
            start = text.find(marker, start + 1)
    return found


@pytest.mark.filterwarnings("ignore:Invalid value for VR", "ignore:The value length", "ignore:Value '")
def test_nothing_that_names_a_person_leaves_the_database_the_spool_and_the_results(
    make_node: Callable[..., Any],
    start_orthanc: Callable[..., Any],
    wait: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    archive = start_orthanc(DicomAlwaysAllowFind=True, DefaultEncoding="Utf8")
    closed = SimpleNamespace(ae_title="AWAY", port=1)  # nobody listens: deliveries there fail
    node = make_node(archive, closed, timing="give_up_after_days = 0.00005\n")
    node.config.write_text(node.config.read_text().replace('name = "pacs0"', 'name = "pacs0"\nquery = true'))
    node.start()

    # Analysed, and sent to one archive while the other is away.
    analysed = _marked(6200, "a")
    assert _send(node.port, analysed) == 0x0000
    # Ours and not judged: no counts. Not ours: another nuclide.
    dark = _marked(6201, "b")
    dark.PixelData = np.zeros((2, 256, 256), np.uint16).tobytes()
    assert _send(node.port, dark) == 0x0000
    bone = _marked(6202, "c")
    bone.EnergyWindowInformationSequence[0].EnergyWindowRangeSequence[0].EnergyWindowLowerLimit = 126
    bone.EnergyWindowInformationSequence[0].EnergyWindowRangeSequence[0].EnergyWindowUpperLimit = 154
    del bone.RadiopharmaceuticalInformationSequence
    assert _send(node.port, bone) == 0x0000
    # Control characters in every text.
    assert _send(node.port, _marked(6203, "d", control=True)) == 0x0000
    wait(
        lambda: sum(row["state"] in ("sending", "delivered", "declined", "failed") for row in node.rows()) == 4,
        "judged",
    )

    # The same object with other pixels, and the same pixels as somebody else.
    other_pixels = _marked(6200, "a")
    other_pixels.PixelData = bytes(reversed(other_pixels.PixelData))
    assert _send(node.port, other_pixels) == 0x0000
    other_person = _marked(6200, "e")
    assert _send(node.port, other_person) == 0x0000
    # Another patient in a study that is known.
    stranger = _marked(6204, "f")
    stranger.StudyInstanceUID = analysed.StudyInstanceUID
    assert _send(node.port, stranger) == 0x0000
    # Refused: command and data set disagree; a UID that is none; cut off in the middle of the header.
    wrong = _marked(6205, "g")
    assert _send_bytes(node.port, _encoded(wrong), "2.25.4711") == 0xA900
    no_uid = _marked(6206, "h")
    no_uid[0x00080018] = DataElement(0x00080018, "UI", "ZQhuidQZ", validation_mode=config.IGNORE)
    assert _send_bytes(node.port, _encoded(no_uid), "2.25.4712") in (0xA900, 0xC000)
    assert _send_bytes(node.port, _encoded(_marked(6207, "i"))[:700], "2.25.4713") == 0xC000
    # Pixels that lie about their length: the child meets them.
    short = _marked(6208, "j")
    short.NumberOfFrames = 2
    short.PixelData = short.PixelData[:1000]
    assert _send(node.port, short) == 0x0000
    # The analysis is killed over a scan, and stored bytes are damaged.
    assert _send(node.port, _marked(6209, "k")) == 0x0000
    for child in _children(node.pid("work")):
        os.kill(child, signal.SIGKILL)
    wait(lambda: all(row["state"] not in ("queued", "analysing", "receiving") for row in node.rows()), "all judged")
    wait(lambda: "identity_changed" in str(node.query("select event from event")), "the other person was noticed")
    wait(lambda: node.query("select 1 from delivery where destination = 'pacs1' and attempts >= 2"), "tries in vain")
    given_up = [("failed", None)]
    wait(lambda: [row for row in node.rows() if (row["state"], row["reason"]) in given_up], "given up")
    scan_id = next(row["id"] for row in node.rows() if (row["state"], row["reason"]) in given_up)
    names = dict(node.query("select scan_id, spool_name from instance"))
    (stored,) = (path for path in _files(node.directory / "var" / "spool") if path.name == Path(names[scan_id]).name)
    stored.write_bytes(stored.read_bytes()[:-5000])
    for command in (("worklist", "retry", str(scan_id)), ("db", "check"), ("audit", "verify")):
        subprocess.run(
            [sys.executable, "-m", "dicom_node.cli", *command, "--config", str(node.config)],
            cwd=node.directory,
            capture_output=True,
            timeout=120,
            check=False,
        )
    wait(lambda: "bytes_damaged" in str(node.query("select event from event")), "the damaged bytes were noticed")

    # A search that finds nothing must be able to find something.
    assert any(_hits(path.read_bytes()) for path in node.directory.glob("var/worklist.db*"))
    assert any(_hits(path.read_bytes()) for path in _files(node.directory / "var" / "spool"))
    assert any(_hits(path.read_bytes()) for path in _files(node.directory / "var" / "results"))

    assert _hits(node.log.encode()) == []
    assert "\x1b" not in node.log
    for pid in _processes(node):
        for what in ("cmdline", "environ", "comm"):
            assert _hits(Path(f"/proc/{pid}/{what}").read_bytes()) == []
    kept = ("worklist.db", "spool", "results")
    for root in (node.directory, temporary):
        for path in root.rglob("*"):
            assert _hits(str(path.relative_to(tmp_path)).encode("utf-8", "replace")) == [], "in a file's name"
            inside = path.relative_to(root).parts
            if path.is_file() and not any(part.startswith(kept) for part in inside):
                assert _hits(path.read_bytes()) == [], path
    # What outlives the forgetting of a person names nobody either.
    assert _hits(repr(node.query("select * from event")).encode()) == []
    assert _hits(repr(node.query("select last_error, reason from worklist")).encode()) == []


def _encoded(ds: Dataset) -> bytes:
    data = encode(ds, is_implicit_vr=False, is_little_endian=True)
    assert data is not None
    return data


def _send_bytes(port: int, data: bytes, sop_instance_uid: str) -> int:
    """C-STORE of any bytes under an instance UID of one's own."""
    ae = AE(ae_title="OPTIMA1")
    ae.add_requested_context(NuclearMedicineImageStorage, ExplicitVRLittleEndian)
    assoc = ae.associate("127.0.0.1", port, ae_title="REMNANT")
    assert assoc.is_established
    request = C_STORE()
    request.MessageID = 1
    request.AffectedSOPClassUID = NuclearMedicineImageStorage
    request.AffectedSOPInstanceUID = sop_instance_uid
    request.Priority = 0
    request.DataSet = BytesIO(data)
    context = assoc.accepted_contexts[0].context_id
    assoc._reactor_checkpoint.clear()
    assoc.dimse.send_msg(request, context)
    _, answer = assoc.dimse.get_msg(block=True)
    assoc._reactor_checkpoint.set()
    assoc.release()
    assert answer is not None
    return int(answer.Status)


def _children(pid: int | None) -> list[int]:
    return [int(one) for task in Path(f"/proc/{pid}/task").iterdir() for one in (task / "children").read_text().split()]


def _processes(node: Any) -> list[int]:
    (serve,) = (process.pid for process in node.processes.values())
    found = [serve]
    for pid in found:
        found += _children(pid)
    return found


def test_every_identifying_element_is_one_that_the_standard_knows() -> None:
    assert all(keyword_for_tag(tag_for_keyword(keyword) or 0) == keyword for keyword in IDENTIFYING)
