"""A hospital's own cohort: what comes in, what stays out and why, and that no patient is on both sides."""

import csv
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import generate_uid

from pipeline.camera import Examination, examination, expose, foreign, simulate
from pipeline.hospital_cohort import (
    WHY,
    CohortError,
    Excluded,
    HospitalCohort,
    LabelledScan,
    divide,
    groupings,
    read_cohort,
)
from pipeline.phantom import phantom

SEEDS = range(980_000, 980_003)


def _write(folder: Path, objects: Iterable[Dataset], name: str) -> list[Path]:
    paths = []
    for number, ds in enumerate(objects, start=1):
        path = folder / f"{name}-{number}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        ds.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def _labels(folder: Path, rows: Iterable[tuple[str, str, str]], separator: str = ",") -> Path:
    path = folder.parent / "labels.csv"
    lines = [("StudyInstanceUID", "SOPInstanceUID", "label"), *rows]
    path.write_text("".join(separator.join(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _scan(seed: int, *, shape: str = "two_objects", at: Examination | None = None) -> tuple[Dataset, ...]:
    return expose(phantom(seed), at or examination(seed), shape)  # type: ignore[arg-type]  # a word of Shape


def _reasons(cohort: HospitalCohort) -> dict[str, str]:
    assert all(item.reason in WHY and item.detail for item in cohort.excluded)
    return {item.what: item.reason for item in cohort.excluded}


@pytest.fixture(scope="module")
def scans() -> dict[int, tuple[Dataset, ...]]:
    """Three simulated scans of three patients, two objects each."""
    return {seed: _scan(seed) for seed in SEEDS}


@pytest.fixture
def folder(tmp_path: Path, scans: dict[int, tuple[Dataset, ...]]) -> Path:
    for seed, objects in scans.items():
        _write(tmp_path / "dicom", objects, str(seed))
    return tmp_path / "dicom"


def _study(seed: int) -> str:
    return examination(seed).study_instance_uid


def _each(folder: Path, *rows: tuple[str, str, str]) -> Path:
    """Labels for the three studies in turn residual, clean, residual, and further lines."""
    words = ("residual", "0", "1")
    return _labels(folder, [*((_study(seed), "", word) for seed, word in zip(SEEDS, words, strict=True)), *rows])


def test_a_simulated_cohort_comes_back_with_its_truth_and_every_file_accounted_for(tmp_path: Path) -> None:
    rows = simulate(tmp_path / "scans", 6, 981_000)
    truth = {row.sop_instance_uid: row for row in rows}
    labels = _labels(
        tmp_path / "scans",
        [("", row.sop_instance_uid, "residual" if row.residual else "clean") for row in rows],
        separator=";",
    )
    seen: list[tuple[int, int]] = []
    cohort = read_cohort(tmp_path / "scans", labels, progress=lambda done, whole: seen.append((done, whole)))
    files = {path for path in (tmp_path / "scans").rglob("*") if path.is_file()}
    assert seen[-1] == (len(files), len(files))
    for scan in cohort.scans:
        assert {truth[uid].residual for uid in scan.sop_instance_uids} == {int(scan.residual)}
        assert [str(dcmread(path).SOPInstanceUID) for path in scan.files] == list(scan.sop_instance_uids)
    used = {path for scan in cohort.scans for path in scan.files}
    out = {tmp_path / "scans" / item.what for item in cohort.excluded}
    assert used | out == files
    assert not used & out
    reasons = _reasons(cohort)
    assert reasons["truth.csv"] == "unreadable"
    half = {row.file for row in rows if row.shape == "anterior_only"}
    assert {what for what, reason in reasons.items() if reason == "out_of_scope"} == half
    assert len(cohort.scans) == len({row.study_instance_uid for row in rows if row.shape != "anterior_only"})


def test_study_labels_hold_for_the_only_scan_of_their_study(folder: Path) -> None:
    cohort = read_cohort(folder, _each(folder))
    assert not cohort.excluded
    assert {scan.study_instance_uid: scan.residual for scan in cohort.scans} == {
        _study(seed): residual for seed, residual in zip(SEEDS, (True, False, True), strict=True)
    }
    assert all(len(scan.files) == 2 for scan in cohort.scans)
    assert len({scan.patient for scan in cohort.scans}) == 3
    told = {examination(seed).patient_id for seed in SEEDS}
    assert not any(identity in repr(scan.patient) for scan in cohort.scans for identity in told)


def test_what_is_no_scan_of_ours_is_listed_with_its_reason(folder: Path) -> None:
    _write(folder, [foreign("tc99m_thyroid", examination(SEEDS[0]))], "tc99m")
    (folder / "notes.txt").write_text("not an image")
    good = folder / f"{SEEDS[2]}-1.dcm"
    good.write_bytes(good.read_bytes()[:-100])
    cohort = read_cohort(folder, _each(folder, ("1.2.3", "", "1"), ("", "", "1"), (_study(SEEDS[0]), "", "maybe")))
    assert _reasons(cohort) == {
        "tc99m-1.dcm": "out_of_scope",
        "notes.txt": "unreadable",
        f"{SEEDS[2]}-1.dcm": "unreadable",
        f"{SEEDS[2]}-2.dcm": "unreadable",
        "labels line 5": "label_without_scan",
        "labels line 6": "bad_label",
        "labels line 7": "bad_label",
    }
    assert "not_131i" in next(item.detail for item in cohort.excluded if item.what == "tc99m-1.dcm")
    assert len(cohort.scans) == 2


def test_copies_are_read_once_and_copies_that_differ_not_at_all(folder: Path) -> None:
    shutil.copy(folder / f"{SEEDS[0]}-1.dcm", folder / "z-copy.dcm")
    other = dcmread(folder / f"{SEEDS[1]}-2.dcm")
    other.PatientID = "SIM-ANOTHER"
    other.save_as(folder / "z-other.dcm")
    cohort = read_cohort(folder, _each(folder))
    assert _reasons(cohort) == {
        "z-copy.dcm": "duplicate",
        "z-other.dcm": "conflicting_copy",
        f"{SEEDS[1]}-2.dcm": "conflicting_copy",
        f"{SEEDS[1]}-1.dcm": "out_of_scope",  # without its posterior view
    }
    assert len(cohort.scans) == 2


def test_one_scan_exported_under_two_identities_is_in_once_or_not_at_all(folder: Path) -> None:
    study = generate_uid()
    for view in (1, 2):
        ds = dcmread(folder / f"{SEEDS[0]}-{view}.dcm")
        ds.PatientID, ds.StudyInstanceUID = "SIM-ALIAS", study
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"2.25.99999{view}"
        ds.save_as(folder / f"alias-{view}.dcm", enforce_file_format=True)
    agreeing = read_cohort(folder, _each(folder, (study, "", "residual")))
    assert len(agreeing.scans) == 3
    assert Counter(_reasons(agreeing).values()) == {"duplicate": 2}
    contradicting = read_cohort(folder, _each(folder, (study, "", "clean")))
    assert len(contradicting.scans) == 2
    assert Counter(_reasons(contradicting).values()) == {"conflicting_label": 4}


def test_a_study_of_several_scans_needs_labels_by_object(folder: Path) -> None:
    seed = SEEDS[0]
    later = _scan(seed + 50, at=examination(seed))
    _write(folder, later, "later")
    cohort = read_cohort(folder, _each(folder))
    assert Counter(_reasons(cohort).values()) == {"ambiguous_label": 4}
    first = str(dcmread(folder / f"{seed}-1.dcm").SOPInstanceUID)
    rows = [("", first, "1"), ("", str(later[0].SOPInstanceUID), "0"), (_study(SEEDS[1]), "", "0")]
    cohort = read_cohort(folder, _labels(folder, [*rows, (_study(seed + 1), str(later[1].SOPInstanceUID), "0")]))
    assert sorted(scan.residual for scan in cohort.scans if scan.study_instance_uid == _study(seed)) == [False, True]
    assert _reasons(cohort) == {
        "labels line 5": "bad_label",  # the object is not of the study that stands beside it
        **{f"{SEEDS[2]}-{view}.dcm": "unlabelled" for view in (1, 2)},
    }


def test_contradicting_labels_put_the_scan_out_and_a_repeated_line_does_not(folder: Path) -> None:
    cohort = read_cohort(folder, _each(folder, (_study(SEEDS[0]), "", "clean"), (_study(SEEDS[1]), "", "clean")))
    assert _reasons(cohort) == {
        **{f"{SEEDS[0]}-{view}.dcm": "conflicting_label" for view in (1, 2)},
        "labels line 6": "duplicate",
    }
    assert "labels line 2, labels line 5" in cohort.excluded[0].detail


def test_a_scan_without_patient_id_cannot_be_split_and_stays_out(folder: Path) -> None:
    for view in (1, 2):
        ds = dcmread(folder / f"{SEEDS[0]}-{view}.dcm")
        ds.PatientID = ""
        ds.save_as(folder / f"{SEEDS[0]}-{view}.dcm")
    cohort = read_cohort(folder, _each(folder))
    assert Counter(_reasons(cohort).values()) == {"no_patient_id": 2}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"scan,label\n1.2.3,1\n", "columns label and StudyInstanceUID"),
        (b"", "columns label and StudyInstanceUID"),
        (b"StudyInstanceUID,label\n1.2.3,r\xe9siduel\n", "UTF-8"),
    ],
)
def test_labels_that_cannot_be_used_are_refused_with_what_to_do(folder: Path, content: bytes, told: str) -> None:
    labels = folder.parent / "labels.csv"
    labels.write_bytes(content)
    with pytest.raises(CohortError, match=told):
        read_cohort(folder, labels)
    with pytest.raises(CohortError, match="cannot be read"):
        read_cohort(folder, folder.parent / "none.csv")
    with pytest.raises(CohortError, match="not a folder"):
        read_cohort(folder.parent / "nowhere", _each(folder))


def test_labels_written_by_a_spreadsheet_with_a_mark_at_the_front_are_read(folder: Path) -> None:
    path = folder.parent / "labels.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as handle:
        writer = csv.writer(handle, delimiter="\t")
        writer.writerows([("reader", "label", "StudyInstanceUID"), ("A, B", " Residual ", _study(SEEDS[0]))])
    cohort = read_cohort(folder, path)
    assert [scan.residual for scan in cohort.scans] == [True]
    assert Counter(_reasons(cohort).values()) == {"unlabelled": 4}


def _patients(residual: int, clean: int, both: int) -> list[LabelledScan]:
    plan = [(True,)] * residual + [(False,)] * clean + [(True, False)] * both
    return [
        LabelledScan((), (f"1.{number}.{place}",), f"1.{number}", f"patient {number}", label)
        for number, labels in enumerate(plan)
        for place, label in enumerate(labels)
    ]


def test_groupings_never_share_a_patient_and_keep_the_papers_proportions() -> None:
    scans = _patients(160, 40, 20)
    found = groupings(scans, count=10, seed=5)
    for one in found:
        assert sorted(one.training + one.testing) == list(range(len(scans)))
        assert not {scans[i].patient for i in one.training} & {scans[i].patient for i in one.testing}
        residual = sum(scans[i].residual for i in one.testing)
        assert (residual, len(one.testing) - residual) == (45, 15)
    assert len(set(found)) == 10
    assert groupings(scans, count=10, seed=5) == found
    assert groupings(scans, count=10, seed=6) != found


def test_the_papers_446_scans_divide_into_the_papers_numbers() -> None:
    """Table 3 of the paper: 260 and 75 for training, 86 and 25 for testing."""
    (one,) = divide([True] * 346 + [False] * 100, [str(number) for number in range(446)], 1, 0)
    assert (sum(place < 346 for place in one.training), len(one.training)) == (260, 335)
    assert (sum(place < 346 for place in one.testing), len(one.testing)) == (86, 111)


def test_the_truth_of_a_simulated_cohort_serves_as_its_labels_with_strata_and_uptake(tmp_path: Path) -> None:
    rows = {row.sop_instance_uid: row for row in simulate(tmp_path, 4, 982_000)}
    cohort = read_cohort(tmp_path, tmp_path / "truth.csv", require_views=())
    assert len(cohort.scans) == 4
    for scan in cohort.scans:
        row = rows[scan.sop_instance_uids[0]]
        assert (scan.residual, scan.strata, scan.uptake_percent) == (
            bool(row.residual),
            (row.stratum,),
            row.uptake_percent,
        )


def test_strata_and_uptake_of_a_line_are_read_and_a_word_for_a_number_is_told(folder: Path) -> None:
    path = folder.parent / "labels.csv"
    path.write_text(
        "StudyInstanceUID;label;stratum;uptake_percent\n"
        f"{_study(SEEDS[0])};residual;tilted | star;0.4\n"
        f"{_study(SEEDS[1])};clean;;\n"
        f"{_study(SEEDS[2])};residual;;much\n"
    )
    cohort = read_cohort(folder, path)
    assert sorted((scan.strata, scan.uptake_percent) for scan in cohort.scans) == [
        ((), None),
        (("tilted", "star"), 0.4),
    ]
    assert _reasons(cohort)["labels line 4"] == "bad_label"


def test_groupings_do_not_depend_on_the_order_of_the_scans() -> None:
    scans = _patients(12, 8, 0)
    turned = scans[::-1]
    held_out = {scans[i].patient for i in groupings(scans, count=1)[0].testing}
    assert {turned[i].patient for i in groupings(turned, count=1)[0].testing} == held_out


def test_a_cohort_too_small_to_test_on_is_refused() -> None:
    with pytest.raises(CohortError, match="add patients"):
        groupings(_patients(8, 1, 0))
    with pytest.raises(CohortError, match="test share"):
        groupings(_patients(8, 8, 0), test_share=1.0)


def test_exclusions_come_in_a_stable_order(folder: Path) -> None:
    for name in ("b.txt", "a.txt"):
        (folder / name).write_text("no image")
    cohort = read_cohort(folder, _each(folder))
    assert [item.what for item in cohort.excluded] == ["a.txt", "b.txt"]
    assert cohort.excluded[0] == Excluded("a.txt", "unreadable", WHY["unreadable"])
