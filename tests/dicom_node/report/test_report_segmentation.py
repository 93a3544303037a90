"""The outlined tissue as Segmentation: on the right frame, on the right side, under the report's tracking UID."""

import os
import subprocess
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest

from dicom_node.report import check, codes, render
from dicom_node.report.segmentation import pixels

_HERE = Path(sys.executable).parent


def _view(made, name):
    return next(view for view in made.outcome.views if view.image.view == name)


def _tracking_uids(ds):
    for item in ds.get("ContentSequence") or ():
        if item.ConceptNameCodeSequence[0].CodeValue == codes.TRACKING_UID.value:
            yield item.UID
        yield from _tracking_uids(item)


def _patient_point(ds, row, column):
    """Where the centre of a pixel lies in the patient, mm (PS3.3 C.7.6.2.1.1), by the object's own geometry."""
    shared = ds.SharedFunctionalGroupsSequence[0]
    axes = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float).reshape(2, 3)
    row_mm, column_mm = (float(mm) for mm in shared.PixelMeasuresSequence[0].PixelSpacing)
    corner = np.array(ds.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient, float)
    return corner + axes[0] * column * column_mm + axes[1] * row * row_mm


def _one_sided(made, name, columns):
    """The case with its tissue moved to `columns` of one view, so that a mirrored mask cannot look right."""
    view = _view(made, name)
    mask = np.zeros_like(view.mask)
    mask[110:120, columns] = True
    mask[118:120, columns.start - 4 : columns.start] = True  # a foot, so that no axis of symmetry is left
    moved = replace(view, mask=mask, activation=None)
    views = tuple(moved if one is view else one for one in made.outcome.views)
    return replace(made, outcome=replace(made.outcome, views=views))


@pytest.mark.parametrize("view", ["anterior", "posterior"])
@pytest.mark.parametrize("shape", ["two_frames", "six_frames", "two_objects", "two_series"])
def test_the_mask_stands_on_the_pixels_of_its_own_frame_and_is_never_mirrored(case, view, shape):
    made = _one_sided(case("present", shape=shape, seg=view), view, slice(112, 121))
    ds = made.read("seg")
    seen = _view(made, view)
    assert ds.pixel_array.astype(bool).reshape(seen.mask.shape).tolist() == seen.mask.tolist()
    assert ds.pixel_array.sum() == 98
    reference = ds.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0].SourceImageSequence[0]
    source = seen.image.source
    assert reference.ReferencedSOPInstanceUID == source.sop_instance_uid
    assert reference.get("ReferencedFrameNumber") == (source.frame_number if source.number_of_frames > 1 else None)
    received = next(one for one in made.sources if one.SOPInstanceUID == source.sop_instance_uid)
    frames = received.pixel_array.reshape(-1, received.Rows, received.Columns)
    assert np.array_equal(frames[source.frame_number - 1], seen.image.counts)
    assert check(made.render("seg"), made.sources, made.outcome, made.context) == ()


def test_both_views_put_the_same_tissue_on_the_same_side_of_the_patient(case):
    """A spot on the patient's right is left in the anterior frame and, mirrored by the camera, right in the other."""
    columns = case("present").sources[0].Columns
    front = _one_sided(case("present", seg="anterior"), "anterior", slice(108, 112)).read("seg")
    back = _one_sided(case("present", seg="posterior"), "posterior", slice(columns - 112, columns - 108)).read("seg")
    centres = []
    for ds in (front, back):
        rows, places = np.nonzero(ds.pixel_array[110:118])  # without the foot
        centres.append(_patient_point(ds, 110 + rows.mean(), places.mean()))
    assert centres[0][0] < -30  # x grows towards the patient's left (LPS)
    assert centres[0][0] == pytest.approx(centres[1][0], abs=2.3)
    assert centres[0][2] == pytest.approx(centres[1][2], abs=0.01)


def test_report_and_mask_name_the_same_tissue(case):
    made = case("present", shape="two_objects")
    reported = list(_tracking_uids(made.read("sr")))
    for view, uid in zip(("anterior", "posterior"), reported, strict=True):
        ds = replace(made, context=replace(made.context, seg=view)).read("seg")
        assert ds.SegmentSequence[0].TrackingUID == uid
        assert ds.StudyInstanceUID == made.sources[0].StudyInstanceUID


@pytest.mark.parametrize("outcome", ["absent", "undetermined", "low_counts", "view_missing"])
def test_there_is_no_mask_where_no_tissue_was_outlined(case, outcome):
    made = case(outcome)
    assert [one.kind for one in render(made.outcome, made.sources, made.context, ("sr", "sc", "seg"))] == ["sr", "sc"]


def test_there_is_no_mask_of_a_view_that_is_missing_or_holds_no_tissue(case):
    single = case("present", shape="anterior_only", seg="posterior")
    assert render(single.outcome, single.sources, single.context, ("seg",)) == ()
    made = case("present")
    empty = tuple(replace(view, mask=np.zeros_like(view.mask)) for view in made.outcome.views)
    assert render(replace(made.outcome, views=empty), made.sources, made.context, ("seg",)) == ()


def test_only_the_tissue_that_the_report_outlines_is_in_the_mask(case):
    made = _one_sided(case("present"), "anterior", slice(112, 121))
    view = _view(made, "anterior")
    speck = view.mask.copy()
    speck[20:22, 20:22] = True
    both = replace(view, mask=speck)
    assert not pixels(both)[20:22, 20:22].any()
    assert pixels(both).sum() == view.mask.sum()


def test_a_camera_without_geometry_gets_the_nominal_one_of_the_view(case):
    def strip(ds):
        for item in ds.DetectorInformationSequence:
            del item.ImageOrientationPatient, item.ImagePositionPatient

    for view, axes in (("anterior", [1, 0, 0, 0, 0, -1]), ("posterior", [-1, 0, 0, 0, 0, -1])):
        made = case("present", change=strip, seg=view)
        ds = made.read("seg")
        assert list(ds.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient) == axes
        assert check(made.render("seg"), made.sources, made.outcome, made.context) == ()


@pytest.mark.parametrize("broken", [[0, 0, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0], [5, 0, 0, 0, 5, 0]])
def test_a_geometry_that_is_none_is_not_copied(case, broken):
    def spoil(ds):
        for item in ds.DetectorInformationSequence:
            item.ImageOrientationPatient = broken

    ds = case("present", change=spoil).read("seg")
    axes = ds.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient
    assert list(axes) == [1, 0, 0, 0, 0, -1]


def test_the_cameras_frame_of_reference_is_kept_where_it_names_one(case):
    made = case("present", change=lambda ds: setattr(ds, "FrameOfReferenceUID", "2.25.77"))
    assert made.read("seg").FrameOfReferenceUID == "2.25.77"
    own = case("present", shape="two_objects")
    back = replace(own, context=replace(own.context, seg="posterior"))
    front, rear = own.read("seg"), back.read("seg")
    assert front.FrameOfReferenceUID != rear.FrameOfReferenceUID
    assert front.SeriesInstanceUID != rear.SeriesInstanceUID  # a series has one frame of reference


def test_a_mask_names_the_series_that_its_scan_has_under_an_accepted_identity(case):
    made = case("present")
    moved = made.sources[0]
    moved.StudyInstanceUID, moved.SeriesInstanceUID = "2.25.81", "2.25.82"
    ds = made.read("seg")
    assert (ds.StudyInstanceUID, ds.ReferencedSeriesSequence[0].SeriesInstanceUID) == ("2.25.81", "2.25.82")
    assert check(made.render("seg"), made.sources, made.outcome, made.context) == ()


def test_foreign_readers_find_the_mask_and_its_scan(case, peer, tmp_path):
    made = _one_sided(case("present"), "anterior", slice(112, 121))
    data = made.render("seg").data
    path = tmp_path / "seg.dcm"
    path.write_bytes(data)
    judged = subprocess.run(
        [peer(str(_HERE / "dciodvfy")), "-new", path], capture_output=True, text=True, errors="replace"
    )
    assert judged.returncode == 0, judged.stderr
    assert "Error" not in judged.stderr
    subprocess.run(
        [
            peer(str(_HERE / "segimage2itkimage")),
            *("--inputDICOM", path, "--outputDirectory", tmp_path, "--outputType", "nrrd", "--prefix", "mask"),
        ],
        check=True,
        capture_output=True,
    )
    voxels = (tmp_path / "mask-1.nrrd").read_bytes()
    assert b"sizes: 256 256 1" in voxels
    read = hd.seg.segread(BytesIO(data))
    assert read.segmented_property_types[0].meaning == codes.RESIDUAL_TISSUE.meaning
    frame = read.get_pixels_by_source_frame(made.sources[0].SOPInstanceUID, [1])
    assert np.array_equal(frame[0, :, :, 0].astype(bool), _view(made, "anterior").mask)


_PROGRAM = """
import hashlib, importlib.util, sys
spec = importlib.util.spec_from_file_location("cases", sys.argv[1])
cases = importlib.util.module_from_spec(spec)
sys.modules["cases"] = cases
spec.loader.exec_module(cases)
for view in ("anterior", "posterior"):
    print(hashlib.sha256(cases.make_case("present", seg=view).render("seg").data).hexdigest())
"""


def test_the_same_finding_gives_the_same_bytes_in_another_process(case):
    program = [sys.executable, "-c", _PROGRAM, str(Path(__file__).with_name("conftest.py"))]
    first, second = (
        subprocess.run(
            program, check=True, capture_output=True, text=True, env={**os.environ, "TZ": zone, "PYTHONHASHSEED": seed}
        ).stdout.split()
        for zone, seed in (("UTC", "1"), ("Asia/Tokyo", "2"))
    )
    assert first == second
    assert len(set(first)) == 2


def _rewritten(result, change):
    ds = pydicom.dcmread(BytesIO(result.data))
    change(ds)
    buffer = BytesIO()
    pydicom.dcmwrite(buffer, ds)
    return replace(result, data=buffer.getvalue())


def _reference(ds):
    return ds.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0].SourceImageSequence[0]


def _mirror(ds):
    flipped = np.fliplr(ds.pixel_array.reshape(ds.Rows, ds.Columns))
    ds.PixelData = np.packbits(flipped.ravel(), bitorder="little").tobytes()


def _set(item, **values):
    for keyword, value in values.items():
        setattr(item, keyword, value)


_FAULTS = {
    "mirrored": (_mirror, "not the tissue that was outlined"),
    "empty": (lambda ds: _set(ds, PixelData=bytes(len(ds.PixelData))), "not the tissue that was outlined"),
    "another size": (lambda ds: _set(ds, Rows=128, Columns=512), "another size than its view"),
    "another frame": (lambda ds: _set(_reference(ds), ReferencedFrameNumber=2), "not on the frame"),
    "frame 3 of 2": (lambda ds: _set(_reference(ds), ReferencedFrameNumber=3), "frame does not exist"),
    "another object": (lambda ds: _set(_reference(ds), ReferencedSOPInstanceUID="1.2.3"), "not one of the sources"),
    "another series": (
        lambda ds: _set(ds.ReferencedSeriesSequence[0], SeriesInstanceUID="1.2.3"),
        "does not name the series",
    ),
    "another frame of reference": (lambda ds: _set(ds, FrameOfReferenceUID="1.2.3"), "FrameOfReferenceUID is not"),
    "no frame of reference": (lambda ds: ds.pop("FrameOfReferenceUID"), "FrameOfReferenceUID is not"),
    "no pixel measures": (
        lambda ds: ds.SharedFunctionalGroupsSequence[0].pop("PixelMeasuresSequence"),
        "PixelSpacing is not that of the view",
    ),
    "turned to the other side": (
        lambda ds: _set(
            ds.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0],
            ImageOrientationPatient=[-1, 0, 0, 0, 0, -1],
        ),
        "ImageOrientationPatient is not",
    ),
    "moved": (
        lambda ds: _set(
            ds.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0], ImagePositionPatient=[0, 0, 0]
        ),
        "ImagePositionPatient is not",
    ),
    "no tracking UID": (lambda ds: ds.SegmentSequence[0].pop("TrackingUID"), "TrackingUID of the segment"),
    "another tracking UID": (
        lambda ds: _set(ds.SegmentSequence[0], TrackingUID="2.25.5"),
        "TrackingUID of the segment",
    ),
    "another tissue": (
        lambda ds: _set(
            ds.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0], CodeValue="RMN006", CodeMeaning="Region"
        ),
        "SegmentedPropertyTypeCodeSequence of the segment",
    ),
    "another organ": (
        lambda ds: _set(ds.SegmentSequence[0].AnatomicRegionSequence[0], CodeValue="1234"),
        "AnatomicRegionSequence of the segment",
    ),
    "drawn by hand": (lambda ds: _set(ds.SegmentSequence[0], SegmentAlgorithmType="MANUAL"), "SegmentAlgorithmType"),
    "no segment": (lambda ds: _set(ds, SegmentSequence=[]), "not exactly one segment"),
    "another patient": (lambda ds: _set(ds, PatientID="X"), "PatientID is not the source's"),
    "no disclaimer": (lambda ds: _set(ds, ImageComments="-"), "the disclaimer is missing"),
}


@pytest.mark.parametrize("fault", _FAULTS)
def test_a_faulty_mask_does_not_leave(case, fault):
    made = case("present")
    change, said = _FAULTS[fault]
    faults = check(_rewritten(made.render("seg"), change), made.sources, made.outcome, made.context)
    assert any(said in one for one in faults), faults


def test_a_mask_that_was_only_rewritten_may_leave_but_not_for_a_scan_without_tissue(case):
    made = case("present")
    result = _rewritten(made.render("seg"), lambda ds: None)
    assert check(result, made.sources, made.outcome, made.context) == ()
    absent = replace(made.outcome, finding="absent", probability=0.02)
    assert any("without outlined tissue" in one for one in check(result, made.sources, absent, made.context))
