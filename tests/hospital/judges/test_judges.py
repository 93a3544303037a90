"""Every kind of object, outcome, shape of scan and character set: before the judges, and through two archives."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread, dcmwrite
from pydicom.dataset import Dataset

# Orthanc is started once for each process of a parallel run: keep its tests together.
pytestmark = pytest.mark.xdist_group("orthanc")


def test_an_object_is_right_by_every_judge_and_comes_back_from_every_archive_as_it_was_sent(
    row: Any, right_by_all: Callable[[Any], None]
) -> None:
    right_by_all(row)


def test_every_two_values_that_can_meet_do_meet_in_the_selection(
    every_row: Sequence[Any], chosen_rows: Sequence[Any]
) -> None:
    def pairs(rows: Sequence[Any]) -> set[Any]:
        values = [list(enumerate(astuple(row)[1:])) for row in rows]  # without the row's number
        return {pair for row in values for pair in itertools.combinations(row, 2)}

    assert pairs(chosen_rows) == pairs(every_row)
    assert len(chosen_rows) < len(every_row) / 10


def test_two_acquisitions_of_one_study_give_two_objects_in_it(
    chosen_rows: Sequence[Any], make: Callable[[Any], list[Any]]
) -> None:
    early, late = (
        dcmread(BytesIO(made.data))
        for made in make(next(row for row in chosen_rows if row.shape == "two_acquisitions"))
    )
    assert early.StudyInstanceUID == late.StudyInstanceUID
    assert early.SOPInstanceUID != late.SOPInstanceUID


def _probability(ds: Dataset) -> Dataset:
    groups = next(item for item in ds.ContentSequence if item.ConceptNameCodeSequence[0].CodeValue == "126010")
    figures = [item for item in groups.ContentSequence[0].ContentSequence if item.ValueType == "NUM"]
    found: Dataset = figures[0].MeasuredValueSequence[0]
    return found


def _of_another_type(ds: Dataset) -> None:
    del ds.ContentSequence[0].ValueType


@pytest.mark.parametrize(
    "spoil",
    [
        lambda ds: setattr(ds, "Modality", "XX"),  # dciodvfy
        _of_another_type,  # dsrdump
        lambda ds: setattr(_probability(ds), "NumericValue", "12.00"),  # tid1500reader
    ],
)
def test_the_judges_see_a_fault(
    spoil: Callable[[Dataset], None],
    every_row: Sequence[Any],
    make: Callable[[Any], list[Any]],
    judge: Callable[..., None],
    tmp_path: Path,
) -> None:
    row = next(row for row in every_row if (row.kind, row.outcome) == ("comprehensive_3d_sr", "present"))
    (made,) = make(row)
    ds = dcmread(BytesIO(made.data))
    spoil(ds)
    buffer = BytesIO()
    dcmwrite(buffer, ds)
    with pytest.raises(AssertionError):
        judge(row, replace(made, data=buffer.getvalue()), tmp_path)
