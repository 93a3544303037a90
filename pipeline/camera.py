"""The simulated camera's DICOM: NM STATIC objects from phantoms, and objects that a camera sends but nobody analyses.

Writes Nuclear Medicine Image IOD instances (PS3.3 A.5) that a strict validator accepts, in every shape in which real
cameras send one examination. Everything is invented and says so in SeriesDescription and Manufacturer. Equal arguments
give equal bytes: UIDs, times and identities derive from seeds. A folder that already holds a cohort is never mixed
with another one.
"""

import csv
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, Literal
from uuid import UUID, uuid5

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    NuclearMedicineImageStorage,
    SecondaryCaptureImageStorage,
)

from pipeline.phantom import Phantom, phantom, scatter_windows

Shape = Literal["two_frames", "six_frames", "two_objects", "two_series", "anterior_only"]
SHAPES: Final[tuple[Shape, ...]] = ("two_frames", "six_frames", "two_objects", "two_series", "anterior_only")
"""How one examination arrives: one object with the photopeak pair; the same with scatter windows; one object a view,
in one series or two; the anterior view alone."""

Foreign = Literal[
    "tc99m_thyroid", "i123_thyroid", "whole_body", "dynamic", "tomo", "flood", "ct_slice", "secondary_capture"
]
FOREIGN: Final[tuple[Foreign, ...]] = (
    "tc99m_thyroid",
    "i123_thyroid",
    "whole_body",
    "dynamic",
    "tomo",
    "flood",
    "ct_slice",
    "secondary_capture",
)
"""What else a camera sends."""

_NAMESPACE = UUID("6f1c3c0e-58b1-5f5e-9a63-5a1d3f0b7c31")
_IMPLEMENTATION_UID = f"2.25.{uuid5(_NAMESPACE, 'implementation').int}"
_PHOTOPEAK = ("I131_EM", 327.6, 400.4)
_LOWER = ("I131_SC_LOWER", 305.8, 327.6)
_UPPER = ("I131_SC_UPPER", 400.4, 422.2)
_Window = tuple[str, float, float]

_PEOPLE: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("ISO_IR 100",), "Lindqvist^Åse", "F"),
    (("ISO_IR 192",), "Shen^Yulan=沈^玉兰", "F"),
    (("GB18030",), "Gao^Minghe=高^明河", "M"),
    (("", "ISO 2022 IR 87"), "Morino^Haru=森野^晴=もりの^はる", "F"),
    (("", "ISO 2022 IR 149"), "Baek^Haneul=백^하늘", "M"),
    (("ISO_IR 144",), "Берегова^Злата", "F"),
    (("ISO_IR 100",), "Quellmalz^Jörg", "M"),
)
"""Character set, name, sex. All invented."""

SIMULATED_ISSUER: Final = "REMNANT-SIMULATED"
"""IssuerOfPatientID of every invented patient: how figures of simulated scans are told from those of patients."""


@dataclass(frozen=True, slots=True)
class Examination:
    """Who was examined, and when; `examination(seed)` invents one.

    `acquired_at` is naive local time; `specific_character_set` the values of that element, ("",) for ASCII;
    `timezone_offset_from_utc` like "+0100", "" to leave it out. Two acquisitions of one study share
    `study_instance_uid` and differ in `acquired_at`.
    """

    patient_name: str
    patient_id: str
    issuer_of_patient_id: str
    patient_birth_date: str
    patient_sex: str
    accession_number: str
    study_id: str
    study_instance_uid: str
    acquired_at: datetime
    specific_character_set: tuple[str, ...] = ("ISO_IR 192",)
    timezone_offset_from_utc: str = ""


@dataclass(frozen=True, slots=True)
class TruthRow:
    """One line of `truth.csv`: one written file, and what is known of it. `file` is relative to the folder."""

    file: str
    study_instance_uid: str
    sop_instance_uid: str
    patient_id: str
    residual: int
    stratum: str
    uptake_percent: float
    shape: str
    views: str
    zoom: float
    activity_mbq: float
    delay_h: float
    duration_s: float
    seed: int


class CohortExistsError(Exception):
    """The folder holds a cohort already; writing another one into it would leave files without truth."""


def examination(seed: int) -> Examination:
    """An invented patient and study; equal seeds give equal examinations."""
    rng = np.random.default_rng([133, seed])
    characters, name, sex = _PEOPLE[seed % len(_PEOPLE)]
    day = datetime(2025, 1, 6) + timedelta(days=int(rng.integers(0, 300)))  # noqa: DTZ001 - cameras write naive local time
    return Examination(
        patient_name=name,
        patient_id=f"SIM{seed:07d}",
        issuer_of_patient_id=SIMULATED_ISSUER,
        patient_birth_date=f"{int(rng.integers(1940, 2004)):04d}{int(rng.integers(1, 13)):02d}15",
        patient_sex=sex,
        accession_number=f"SIMA{seed:07d}",
        study_id=f"S{seed:07d}",
        study_instance_uid=_uid("study", seed),
        acquired_at=day + timedelta(minutes=int(rng.integers(8 * 60, 16 * 60)), seconds=int(rng.integers(0, 60))),
        specific_character_set=characters,
    )


def expose(
    phantom: Phantom, examination: Examination, shape: Shape, *, posterior_delay_s: float = 0.0
) -> tuple[Dataset, ...]:
    """The objects that a camera sends for one acquisition, each ready for `save_as(path, enforce_file_format=True)`.

    `posterior_delay_s` is how much later the posterior view starts where it is an object of its own: 0 on a camera with
    two heads. The posterior frame stays mirrored.
    """
    views: dict[str, NDArray[np.uint16]] = {"anterior": phantom.anterior, "posterior": phantom.posterior}
    both = ("anterior", "posterior")
    duration_s, spacing_mm = phantom.truth.duration_s, phantom.spacing_mm
    key = f"{examination.study_instance_uid}|{examination.acquired_at.isoformat()}|{phantom.truth.seed}|{shape}"

    def one(names: tuple[str, ...], frames: list[NDArray[np.uint16]], windows: list[_Window], number: int) -> Dataset:
        delay = timedelta(seconds=posterior_delay_s if names == ("posterior",) else 0.0)
        series = number if shape == "two_series" else 1
        ds = _nm(examination, key, number, series, examination.acquired_at + delay, "STATIC")
        ds.SeriesDescription = "Neck 131I simulated"
        # A single view names it as cameras do, in a place where ours does not look first.
        ds.ImageID = "NECK" if len(names) > 1 else f"NECK {names[0][:4].upper()}"
        _add_windows(ds, windows, phantom)
        _add_detectors(ds, names)
        window_count, detector_count = len(windows), len(names)
        ds.EnergyWindowVector = [w + 1 for w in range(window_count) for _ in range(detector_count)]
        ds.DetectorVector = [d + 1 for _ in range(window_count) for d in range(detector_count)]
        ds.FrameIncrementPointer = [0x00540010, 0x00540020]
        _add_pixels(ds, np.stack(frames), spacing_mm, duration_s)
        return ds

    if shape == "two_frames":
        return (one(both, [views[name] for name in both], [_PHOTOPEAK], 1),)
    if shape == "six_frames":
        lower, upper = scatter_windows(phantom)
        return (one(both, [phantom.anterior, phantom.posterior, *lower, *upper], [_PHOTOPEAK, _LOWER, _UPPER], 1),)
    if shape in ("two_objects", "two_series"):
        return tuple(one((name,), [views[name]], [_PHOTOPEAK], number) for number, name in enumerate(both, start=1))
    if shape == "anterior_only":
        return (one(("anterior",), [phantom.anterior], [_PHOTOPEAK], 1),)
    raise ValueError(f"unknown shape {shape!r}; known are {', '.join(SHAPES)}")


def foreign(kind: Foreign, examination: Examination) -> Dataset:
    """An object of the same study that is not an 131I planar neck scan, with real pixels."""
    if kind not in FOREIGN:
        raise ValueError(f"unknown kind {kind!r}; known are {', '.join(FOREIGN)}")
    key = f"{examination.study_instance_uid}|{examination.acquired_at.isoformat()}|{kind}"
    rng = np.random.default_rng([134, *uuid5(_NAMESPACE, key).bytes])
    if kind in ("ct_slice", "secondary_capture"):
        return _ct(examination, key, rng) if kind == "ct_slice" else _secondary_capture(examination, key, rng)

    image_type = {"whole_body": "WHOLE BODY", "dynamic": "DYNAMIC", "tomo": "TOMO"}.get(kind, "STATIC")
    ds = _nm(examination, key, 1, 9, examination.acquired_at, image_type)
    ds.SeriesDescription = {"flood": "Extrinsic flood QC simulated"}.get(kind, f"{kind.replace('_', ' ')} simulated")
    window: _Window = {
        "tc99m_thyroid": ("Tc99m_EM", 126.45, 154.55),
        "i123_thyroid": ("I123_EM", 143.1, 174.9),
    }.get(kind, _PHOTOPEAK)
    _add_windows(ds, [window], None)
    if kind in ("tc99m_thyroid", "i123_thyroid"):
        code = ("72454007", "Technetium Tc^99m^") if kind == "tc99m_thyroid" else ("68630002", "Iodine 123")
        ds.RadiopharmaceuticalInformationSequence[0].RadionuclideCodeSequence = _code(*code)
    else:
        ds.RadiopharmaceuticalInformationSequence[0].RadionuclideCodeSequence = _code("1368003", "Iodine 131")
    names = ("anterior",) if kind in ("flood", "tomo", "dynamic") else ("anterior", "posterior")
    _add_detectors(ds, names)
    rows, columns = (1024, 256) if kind == "whole_body" else (64, 64) if kind in ("dynamic", "tomo") else (256, 256)
    count = {"dynamic": 6, "tomo": 12}.get(kind, len(names))
    y, x = np.mgrid[-1 : 1 : rows * 1j, -1 : 1 : columns * 1j]
    shape_of_it = np.full((rows, columns), 40.0) if kind == "flood" else 1 + 30 * np.exp(-(x**2 + y**2) * 6)
    frames = rng.poisson(shape_of_it, size=(count, rows, columns)).astype(np.uint16)
    pixel_mm = 565.5 / columns
    ds.EnergyWindowVector = [1] * count
    ds.DetectorVector = list(range(1, count + 1)) if len(names) == count else [1] * count
    ds.FrameIncrementPointer = [0x00540010, 0x00540020]
    if kind == "dynamic":
        ds.FrameIncrementPointer = [0x00540010, 0x00540020, 0x00540030, 0x00540100]
        ds.PhaseVector, ds.NumberOfPhases = [1] * count, 1
        ds.TimeSliceVector = list(range(1, count + 1))
        phase = Dataset()
        phase.PhaseDelay, phase.ActualFrameDuration, phase.PauseBetweenFrames = 0, 10000, 0
        phase.NumberOfFramesInPhase = count
        ds.PhaseInformationSequence = Items([phase])
    if kind == "tomo":
        ds.FrameIncrementPointer = [0x00540010, 0x00540020, 0x00540050, 0x00540090]
        ds.RotationVector, ds.NumberOfRotations = [1] * count, 1
        ds.AngularViewVector = list(range(1, count + 1))
        rotation = Dataset()
        rotation.TableHeight, rotation.TableTraverse = 0, 0
        rotation.RotationDirection, rotation.RadialPosition = "CW", [250.0] * count
        rotation.ScanArc, rotation.ActualFrameDuration = 360, 20000
        rotation.AngularStep, rotation.StartAngle, rotation.NumberOfFramesInRotation = 30, 0, count
        ds.RotationInformationSequence = Items([rotation])
        ds.TypeOfDetectorMotion = "STEP AND SHOOT"
    if kind == "whole_body":
        ds.ScanVelocity, ds.ScanLength = 2.0, 2000
    _add_pixels(ds, frames, (pixel_mm, pixel_mm), 600.0)
    if kind in ("dynamic", "tomo"):
        del ds.ActualFrameDuration  # stands in the phase or the rotation
    return ds


def simulate(
    out: Path,
    count: int,
    seed: int,
    shapes: Sequence[Shape] = SHAPES,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[TruthRow]:
    """Writes `count` examinations into the folder `out`, one file an object, and `truth.csv` with what is in them.

    Cycles through the shapes and both classes so that neither tells the other. Files are named by SOP Instance UID.
    `progress(done, count)` is called after each examination. `truth.csv` is written last: a folder without one is
    unfinished.

    Raises
    ------
    CohortExistsError: `out` holds a `truth.csv` already.
    ValueError: no examination asked for, no shape, or an unknown one.
    """
    if count < 1 or not shapes or seed < 0:
        raise ValueError("simulate needs a count of 1 or more, a seed of 0 or more, and at least one shape")
    for shape in shapes:
        if shape not in SHAPES:
            raise ValueError(f"unknown shape {shape!r}; known are {', '.join(SHAPES)}")
    truth_file = out / "truth.csv"
    if truth_file.exists():
        raise CohortExistsError(f"{truth_file} exists already; choose an empty folder or remove that cohort")
    out.mkdir(parents=True, exist_ok=True)
    rows: list[TruthRow] = []
    for index in range(count):
        shape = shapes[index % len(shapes)]
        # With an even number of shapes the class would follow from the shape, were the order not turned each round.
        turn = index // len(shapes) if len(shapes) % 2 == 0 else 0
        one_seed = seed * 1_000_003 + index
        scan = phantom(
            one_seed,
            residual=(index + turn) % 2 == 1,
            stratum="view_missing" if shape == "anterior_only" else None,
        )
        person = examination(one_seed)
        for ds in expose(scan, person, shape):
            name = f"{ds.SOPInstanceUID}.dcm"
            ds.save_as(out / name, enforce_file_format=True)
            rows.append(
                TruthRow(
                    file=name,
                    study_instance_uid=str(ds.StudyInstanceUID),
                    sop_instance_uid=str(ds.SOPInstanceUID),
                    patient_id=person.patient_id,
                    residual=int(scan.truth.residual),
                    stratum=scan.truth.stratum,
                    uptake_percent=round(scan.truth.uptake_percent, 4),
                    shape=shape,
                    views=",".join(
                        "anterior" if item.StartAngle == 180 else "posterior" for item in ds.DetectorInformationSequence
                    ),
                    zoom=scan.truth.zoom,
                    activity_mbq=scan.truth.activity_mbq,
                    delay_h=scan.truth.delay_h,
                    duration_s=scan.truth.duration_s,
                    seed=one_seed,
                )
            )
        if progress is not None:
            progress(index + 1, count)
    unfinished = out / "truth.csv.part"
    with unfinished.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, [field.name for field in fields(TruthRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
        handle.flush()
        os.fsync(handle.fileno())
    unfinished.replace(truth_file)
    return rows


def _uid(*parts: object) -> str:
    return f"2.25.{uuid5(_NAMESPACE, '|'.join(str(part) for part in parts)).int}"


def _code(value: str, meaning: str, scheme: str = "SCT") -> Items:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return Items([item])


def _common(examination: Examination, key: str, number: int, series: int, at: datetime, sop_class: str) -> Dataset:
    """Patient, General Study, General Series, General Equipment, General Image, SOP Common; with file meta."""
    ds = Dataset()
    if examination.specific_character_set != ("",):
        characters = examination.specific_character_set
        ds.SpecificCharacterSet = characters[0] if len(characters) == 1 else list(characters)
    ds.SOPClassUID = sop_class
    ds.SOPInstanceUID = _uid(key, "instance", number)
    ds.PatientName = examination.patient_name
    ds.PatientID = examination.patient_id
    if examination.issuer_of_patient_id:
        ds.IssuerOfPatientID = examination.issuer_of_patient_id
    ds.PatientBirthDate = examination.patient_birth_date
    ds.PatientSex = examination.patient_sex
    ds.StudyInstanceUID = examination.study_instance_uid
    # One study, one date and time, whatever is acquired when: its day stands for it.
    ds.StudyDate, ds.StudyTime = f"{examination.acquired_at:%Y%m%d}", "070000"
    ds.AccessionNumber = examination.accession_number
    ds.ReferringPhysicianName = ""
    ds.StudyID = examination.study_id
    ds.SeriesInstanceUID = _uid(key, "series", series)
    ds.SeriesNumber = series
    ds.InstanceNumber = number
    ds.AcquisitionDate = ds.ContentDate = f"{at:%Y%m%d}"
    ds.AcquisitionTime = ds.ContentTime = f"{at:%H%M%S.%f}"
    if examination.timezone_offset_from_utc:
        ds.TimezoneOffsetFromUTC = examination.timezone_offset_from_utc
    ds.Manufacturer = "Remnant simulated camera"
    ds.ManufacturerModelName = "Phantom"
    ds.DeviceSerialNumber = "0"
    ds.SoftwareVersions = "1"
    meta = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\x00\x01"
    meta.MediaStorageSOPClassUID = UID(sop_class)
    meta.MediaStorageSOPInstanceUID = UID(ds.SOPInstanceUID)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = UID(_IMPLEMENTATION_UID)
    ds.file_meta = meta
    return ds


def _nm(examination: Examination, key: str, number: int, series: int, at: datetime, image_type: str) -> Dataset:
    ds = _common(examination, key, number, series, at, NuclearMedicineImageStorage)
    ds.Modality = "NM"
    ds.BodyPartExamined = "NECK"
    ds.ImageType = ["ORIGINAL", "PRIMARY", image_type, "EMISSION"]
    ds.PatientOrientationCodeSequence = _code("102538003", "recumbent")
    ds.PatientOrientationCodeSequence[0].PatientOrientationModifierCodeSequence = _code("40199007", "supine")
    ds.PatientGantryRelationshipCodeSequence = _code("102540008", "headfirst")
    return ds


def _add_windows(ds: Dataset, windows: list[_Window], phantom: Phantom | None) -> None:
    ds.NumberOfEnergyWindows = len(windows)
    items = []
    for name, lower_kev, upper_kev in windows:
        limits = Dataset()
        limits.EnergyWindowLowerLimit, limits.EnergyWindowUpperLimit = lower_kev, upper_kev
        item = Dataset()
        item.EnergyWindowName, item.EnergyWindowRangeSequence = name, Items([limits])
        items.append(item)
    ds.EnergyWindowInformationSequence = Items(items)
    drug = Dataset()
    drug.RadionuclideCodeSequence = _code("1368003", "Iodine 131")
    if phantom is not None:
        drug.RadiopharmaceuticalCodeSequence = _code("111160004", "Sodium Iodide I^131^")
        drug.RadionuclideTotalDose = phantom.truth.activity_mbq  # MBq in NM (PS3.3 C.8.4.10), not Bq as in PET
    ds.RadiopharmaceuticalInformationSequence = Items([drug])


def _add_detectors(ds: Dataset, names: tuple[str, ...]) -> None:
    ds.NumberOfDetectors = len(names)
    items = []
    for name in names:
        front = name == "anterior"
        item = Dataset()
        item.CollimatorGridName = "HEGP"
        item.CollimatorType = "PARA"
        item.FocalDistance = 0
        item.StartAngle = 180 if front else 0
        item.ViewCodeSequence = _code("399321004", "Anterior") if front else _code("399001007", "Posterior")
        item.ImagePositionPatient = [-282.75 if front else 282.75, -150.0 if front else 150.0, 282.75]
        item.ImageOrientationPatient = [1, 0, 0, 0, 0, -1] if front else [-1, 0, 0, 0, 0, -1]
        items.append(item)
    ds.DetectorInformationSequence = Items(items)


def _add_pixels(
    ds: Dataset, frames: NDArray[np.uint16], spacing_mm: tuple[float, float], frame_duration_s: float
) -> None:
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.NumberOfFrames, ds.Rows, ds.Columns = (int(size) for size in frames.shape)
    ds.PixelSpacing = [f"{size:.6g}" for size in spacing_mm]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
    ds.CountsAccumulated = int(frames.sum(dtype=np.int64))
    ds.ActualFrameDuration = round(frame_duration_s * 1000)
    ds.PixelData = frames.astype("<u2").tobytes()


def _ct(examination: Examination, key: str, rng: np.random.Generator) -> Dataset:
    ds = _common(examination, key, 1, 8, examination.acquired_at + timedelta(minutes=12), CTImageStorage)
    ds.Modality = "CT"
    ds.BodyPartExamined = "NECK"
    ds.SeriesDescription = "CT of the hybrid scan, simulated"
    ds.PatientPosition = "HFS"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.FrameOfReferenceUID, ds.PositionReferenceIndicator = _uid(key, "frame of reference"), ""
    ds.ImagePositionPatient, ds.ImageOrientationPatient = [-250, -250, 0], [1, 0, 0, 0, 1, 0]
    ds.SliceThickness, ds.PixelSpacing, ds.KVP, ds.AcquisitionNumber = 5, [7.8125, 7.8125], 120, 1
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    slice_hu = np.where(x**2 + (y * 1.2) ** 2 < 0.4, 40, -1000) + rng.normal(0, 8, (64, 64))
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.Rows, ds.Columns = 1, "MONOCHROME2", 64, 64
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = 0, 1, "HU"
    ds.PixelData = slice_hu.astype("<i2").tobytes()
    return ds


def _secondary_capture(examination: Examination, key: str, rng: np.random.Generator) -> Dataset:
    at = examination.acquired_at + timedelta(minutes=20)
    ds = _common(examination, key, 1, 99, at, SecondaryCaptureImageStorage)
    ds.Modality, ds.ConversionType = "OT", "WSD"
    ds.BodyPartExamined = "NECK"
    ds.SeriesDescription = "Screen of the workstation, simulated"
    ds.ImageType = ["DERIVED", "SECONDARY"]
    ds.PatientOrientation = ""
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
    ds.Rows = ds.Columns = 64
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.PixelData = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8).tobytes()
    return ds
