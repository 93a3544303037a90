"""The one entry, from real DICOM objects to a finding or a reason, with an untrained network made for these tests."""

import copy
import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from pydicom import Dataset

from models import embedding, weights
from models.architectures import build
from models.weights import LoadedModel
from pipeline.analyse import (
    WrongPreprocessing,
    analyse,
    analyse_views,
    fused_logit,
    judge,
    load_model,
    sigmoid,
    verdict_of,
)
from pipeline.camera import examination, expose, foreign
from pipeline.finding import Declined, Finding
from pipeline.phantom import Phantom, phantom
from pipeline.preprocess import GRID, PREPROCESSING_VERSION, ROOT_COUNTS, prepare_scan
from pipeline.quantify import box_outline
from pipeline.reasons import REASONS
from pipeline.train_demonstration import images_of


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Beside other busy processes two threads of torch wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(
    tmp_path_factory: pytest.TempPathFactory, untrained_record: Callable[..., weights.WeightsRecord]
) -> LoadedModel:
    """Random numbers, marked as such: these tests are about the way, not about the answer."""
    torch.manual_seed(11)
    record = untrained_record(
        architecture="resnet18",
        preprocessing_version=PREPROCESSING_VERSION,
        input=weights.InputFormat(GRID, ROOT_COUNTS.scale, ROOT_COUNTS.mean, ROOT_COUNTS.std),
        temperature=2.0,
        fusion="views_as_channels",
        training_range=weights.TrainingRange((1.0, 2.64), (400.0, 5e6), None),
    )
    folder: Path = tmp_path_factory.mktemp("weights")
    return load_model(str(weights.save(folder, record, build("resnet18"))))


@pytest.fixture(scope="module")
def remnant() -> Phantom:
    return phantom(950_001, stratum="uptake_0.3_1")


def _bytes_and_back(datasets: Sequence[Dataset]) -> list[Dataset]:
    """As a node meets them: written to a file and read again."""
    back = []
    for ds in datasets:
        buffer = io.BytesIO()
        ds.save_as(buffer, enforce_file_format=True)
        buffer.seek(0)
        back.append(pydicom.dcmread(buffer))
    return back


def _with_threshold(model: LoadedModel, threshold: float) -> LoadedModel:
    return dataclasses.replace(model, record=dataclasses.replace(model.record, threshold=threshold))


def _found(outcome: Finding | Declined) -> Finding:
    assert isinstance(outcome, Finding), outcome
    return outcome


def _declined(outcome: Finding | Declined) -> Declined:
    assert isinstance(outcome, Declined), outcome
    assert outcome.reason in REASONS
    return outcome


@pytest.mark.parametrize("shape", ["two_frames", "six_frames", "two_objects", "two_series"])
def test_every_shape_of_one_examination_gives_the_same_probability_bit_for_bit(
    model: LoadedModel, remnant: Phantom, shape: str
) -> None:
    reference = _found(analyse(_bytes_and_back(expose(remnant, examination(1), "two_frames")), model))
    datasets = _bytes_and_back(expose(remnant, examination(1), shape))
    finding = _found(analyse(datasets[::-1], model))
    assert finding.probability == reference.probability
    assert [view.probability for view in finding.views] == [view.probability for view in reference.views]
    assert [view.image.view for view in finding.views] == ["anterior", "posterior"]


def test_a_finding_says_what_was_seen_by_what(model: LoadedModel, remnant: Phantom) -> None:
    finding = _found(analyse(expose(remnant, examination(1), "two_frames"), model))
    assert finding.model.sha256 == model.record.sha256
    assert (finding.model.release, finding.preprocessing) == ("demonstration", "native")
    assert finding.finding == ("present" if finding.probability >= finding.threshold else "absent")
    assert set(finding.timings_ms) == {"decode", "quality", "preprocess", "network", "quantify", "total"}
    assert sum(finding.timings_ms.values()) - finding.timings_ms["total"] <= finding.timings_ms["total"]
    for view, counts in zip(finding.views, (remnant.anterior, remnant.posterior), strict=True):
        assert view.total_counts == int(counts.sum())
        assert view.maximum_counts == int(counts.max())
        assert view.mask.shape == counts.shape
        if finding.finding == "absent":
            assert view.activation is None
        else:
            assert view.activation is not None
            assert view.activation.shape == counts.shape


def test_present_outlines_the_tissue_and_absent_the_analysed_region(model: LoadedModel, remnant: Phantom) -> None:
    datasets = expose(remnant, examination(1), "two_frames")
    present = _found(analyse(datasets, _with_threshold(model, 1e-9)))
    absent = _found(analyse(datasets, _with_threshold(model, 1 - 1e-9)))
    assert (present.finding, absent.finding) == ("present", "absent")
    assert present.probability == absent.probability
    for seen, not_seen in zip(present.views, absent.views, strict=True):
        assert seen.mask_rule == "grabcut"
        assert seen.remnant_to_background is not None
        assert seen.remnant_to_background > 1.5
        assert seen.outline[0] == seen.outline[-1]
        assert 0 < seen.outline_area_mm2 < not_seen.outline_area_mm2
        assert not_seen.outline == box_outline(not_seen.crop)
        assert not_seen.remnant_to_background is None


def test_the_network_is_asked_about_both_views_at_once(model: LoadedModel, remnant: Phantom) -> None:
    finding = _found(analyse(expose(remnant, examination(1), "two_frames"), model))
    counts = {view.image.view: (view.image.counts, view.image.spacing_mm) for view in finding.views}
    assert np.array_equal(counts["posterior"][0], remnant.posterior)
    (both,) = prepare_scan(counts).inputs
    with torch.inference_mode():
        output = model.network(torch.from_numpy(both)[None])[0]
    assert finding.probability == pytest.approx(sigmoid(float(output[1] - output[0]) / 2), rel=1e-5)
    # A view's own probability is what the network says when that view alone came.
    for view in finding.views:
        (alone,) = prepare_scan({view.image.view: counts[view.image.view]}).inputs
        assert view.probability == sigmoid(judge(model, alone).logit / 2)
    assert len({finding.probability, *(view.probability for view in finding.views)}) == 3


def test_the_decision_without_outlines_is_the_same(model: LoadedModel, remnant: Phantom) -> None:
    whole = _found(analyse(expose(remnant, examination(1), "two_frames"), model))
    quick = _found(analyse_views([view.image for view in whole.views], model, outlined=False))
    assert quick.probability == whole.probability
    assert [view.probability for view in quick.views] == [view.probability for view in whole.views]
    assert whole.views[0].mask.any()
    assert not any(view.mask.any() for view in quick.views)


def test_the_evidence_for_a_remnant_lies_on_it_in_the_anterior_view_and_mostly_in_the_posterior_one() -> None:
    """The network sees the posterior view turned; a map that was not turned back would point beside the tissue."""
    shipped = load_model("remnant-resnet18-phantom")
    on_it = {"anterior": 0, "posterior": 0, "posterior, not turned": 0}
    for seed in range(7_100, 7_112):
        scan = phantom(seed, stratum="uptake_1_up")
        finding = _found(
            analyse_views(images_of(scan.anterior, scan.posterior, scan.spacing_mm), shipped, outlined=False)
        )
        assert finding.finding == "present"
        for view in finding.views:
            assert view.activation is not None
            row, column = np.unravel_index(int(view.activation.argmax()), view.activation.shape)
            places = {view.image.view: column}
            if view.image.view == "posterior":
                places = {"posterior": 255 - column, "posterior, not turned": column}
            for name, x in places.items():
                away = [
                    np.hypot(x - focus.position[0], row - focus.position[1]) * scan.spacing_mm[0]
                    for focus in scan.truth.foci
                    if focus.is_thyroid
                ]
                on_it[name] += min(away) < 15
    assert on_it["anterior"] == 12
    assert on_it["posterior"] >= 9
    assert on_it["posterior, not turned"] < on_it["posterior"]


def test_a_scan_far_from_the_training_in_the_networks_features_is_declined_and_one_within_is_answered(
    model: LoadedModel, remnant: Phantom, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    known = embedding.fit(rng.normal(0.5, 0.2, (50, 512)).astype(np.float32))
    datasets = expose(remnant, examination(1), "two_frames")
    answers = []
    for limit in (1e-3, 1e6):
        reach = dataclasses.replace(model.record.training_range, embedding_distance=limit)
        record = dataclasses.replace(model.record, training_range=reach)
        limited = load_model(str(weights.save(tmp_path / str(limit), record, model.network, embedding=known)))
        answers.append(analyse(datasets, limited))
    far, near = answers
    assert _declined(far).reason == "out_of_training_range"
    assert "features" in _declined(far).detail
    assert _declined(far).ours
    assert [image.view for image in _declined(far).images] == ["anterior", "posterior"]
    assert _found(near).probability == _found(analyse(datasets, model)).probability


def test_the_fusion_is_the_one_that_the_record_names() -> None:
    assert fused_logit([1.5], "views_as_channels", 2.0) == pytest.approx(0.75)
    assert fused_logit([2.0, -1.0], "mean_logit", 2.0) == pytest.approx(0.25)
    mean = (sigmoid(2.0) + sigmoid(-1.0)) / 2
    assert sigmoid(fused_logit([2.0, -1.0], "mean_probability", None)) == pytest.approx(mean)
    assert (sigmoid(-800), sigmoid(800)) == (0, 1)


def test_a_band_around_the_threshold_is_undetermined(model: LoadedModel) -> None:
    record = dataclasses.replace(model.record, undetermined_band=(0.4, 0.6))
    assert [verdict_of(p, record) for p in (0.39, 0.4, 0.5, 0.6, 0.61)] == [
        "absent",
        "undetermined",
        "undetermined",
        "undetermined",
        "present",
    ]
    assert [verdict_of(p, model.record) for p in (0.4999, 0.5)] == ["absent", "present"]


def test_a_missing_view_is_a_reason_and_shows_the_view_that_came(model: LoadedModel, remnant: Phantom) -> None:
    datasets = expose(remnant, examination(1), "anterior_only")
    outcome = _declined(analyse(datasets, model))
    assert (outcome.reason, outcome.ours) == ("view_missing", True)
    assert [image.view for image in outcome.images] == ["anterior"]
    alone = _found(analyse(datasets, model, require_views=("anterior",)))
    assert len(alone.views) == 1
    assert alone.probability == pytest.approx(alone.views[0].probability)


@pytest.mark.parametrize(
    ("kind", "reason"), [("tc99m_thyroid", "not_131i"), ("whole_body", "whole_body"), ("ct_slice", "wrong_class")]
)
def test_what_is_not_ours_is_declined_without_a_note(model: LoadedModel, kind: str, reason: str) -> None:
    outcome = _declined(analyse([foreign(kind, examination(2))], model))
    assert (outcome.reason, outcome.ours) == (reason, False)


def _both(remnant: Phantom) -> Dataset:
    return copy.deepcopy(expose(remnant, examination(3), "two_frames")[0])


def test_a_scan_of_ours_without_counts_is_declined_with_a_note(model: LoadedModel, remnant: Phantom) -> None:
    ds = _both(remnant)
    ds.PixelData = bytes(len(ds.PixelData))
    outcome = _declined(analyse([ds], model))
    assert (outcome.reason, outcome.ours) == ("empty_frame", True)
    assert len(outcome.images) == 2
    assert "total" in outcome.timings_ms


def test_damaged_objects_end_in_a_reason_and_never_raise(model: LoadedModel, remnant: Phantom) -> None:
    short, long, empty = _both(remnant), _both(remnant), _both(remnant)
    short.PixelData = short.PixelData[:1000]
    long.PixelData = long.PixelData + long.PixelData
    del empty.PixelData
    for ds in (short, long):
        assert _declined(analyse([ds], model)).reason == "bad_pixel_length"
    assert _declined(analyse([empty], model)).reason in ("bad_pixel_length", "unreadable")
    assert _declined(analyse([Dataset()], model)).reason in ("unreadable", "wrong_class")


def test_views_of_two_patients_are_never_judged_together(model: LoadedModel, remnant: Phantom) -> None:
    anterior, posterior = (copy.deepcopy(ds) for ds in expose(remnant, examination(4), "two_objects"))
    posterior.PatientID = "SOMEBODY-ELSE"
    outcome = _declined(analyse([anterior, posterior], model))
    assert outcome.reason == "ambiguous_views"
    assert "SOMEBODY" not in outcome.detail
    assert _declined(analyse([anterior, anterior], model)).reason == "ambiguous_views"


def test_frames_whose_view_codes_and_angles_contradict_each_other_are_declined(
    model: LoadedModel, remnant: Phantom
) -> None:
    ds = _both(remnant)
    first, second = ds.DetectorInformationSequence
    first.ViewCodeSequence, second.ViewCodeSequence = second.ViewCodeSequence, first.ViewCodeSequence
    outcome = _declined(analyse([ds], model))
    assert (outcome.reason, outcome.ours) == ("ambiguous_views", True)


def test_a_matrix_beyond_the_training_is_declined(model: LoadedModel, remnant: Phantom) -> None:
    ds = _both(remnant)
    ds.PixelSpacing = [4.418, 4.418]
    assert _declined(analyse([ds], model)).reason == "out_of_training_range"


def test_weights_of_other_preprocessing_are_refused_before_a_pixel_is_read(
    model: LoadedModel, remnant: Phantom
) -> None:
    datasets = expose(remnant, examination(1), "two_frames")
    with pytest.raises(WrongPreprocessing, match=r"'native'.*'paper'"):
        analyse(datasets, model, preprocessing="paper")
    with pytest.raises(WrongPreprocessing, match="known: native, paper"):
        analyse(datasets, model, preprocessing="other")
    stale = dataclasses.replace(model, record=dataclasses.replace(model.record, preprocessing_version="0"))
    with pytest.raises(WrongPreprocessing, match="version 0"):
        analyse(datasets, stale)
