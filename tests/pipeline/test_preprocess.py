"""The steps of the preprocessing one by one, the two orders, and the traps that were measured."""

import dataclasses
import threading

import cv2
import numpy as np
import pytest

from models.train import single_view
from pipeline import preprocess as pp
from pipeline.finding import Box
from pipeline.phantom import Phantom, phantom

SPACING = (2.20903, 2.20903)


def _neck(*, focus: float = 0.0, off: int = 0, seed: int = 1) -> np.ndarray:
    """A strip of neck in noise, (256, 256) float32, with empty rows at top and bottom and perhaps a hot focus."""
    rows, columns = np.mgrid[:256, :256]
    expected = np.where(abs(columns - 127.5 - off) < 28, 6.0, 0.4)
    expected = expected + focus * np.exp(-((rows - 130) ** 2 + (columns - 120 - off) ** 2) / (2 * 3.0**2))
    counts = np.random.default_rng(seed).poisson(expected).astype(np.float32)
    counts[:37] = counts[-37:] = 0
    return counts


def test_the_bands_outside_the_detector_are_found_and_a_zero_between_counts_is_kept() -> None:
    counts = np.ones((8, 8), np.float32)
    counts[:2] = counts[:, 7] = 0
    counts[4, 3] = 0
    field = pp.field_of_view(counts)
    assert field.sum() == 6 * 7
    assert field[4, 3]
    assert not pp.field_of_view(np.zeros((8, 8), np.float32)).any()


def test_empty_rows_do_not_enter_the_histogram() -> None:
    rng = np.random.default_rng(2)
    inside = rng.integers(20, 60, (64, 64), dtype=np.uint8)
    padded = np.zeros((128, 64), np.uint8)
    padded[32:96] = inside
    field = np.zeros(padded.shape, bool)
    field[32:96] = True
    equalized = pp.equalize(padded, field)
    assert np.array_equal(equalized[32:96], cv2.equalizeHist(inside))
    assert not equalized[:32].any()
    assert not np.array_equal(cv2.equalizeHist(padded)[32:96], equalized[32:96])  # what a blind one does


def test_a_picture_of_8_bits_loses_a_faint_focus_beside_a_hot_one_and_the_root_of_counts_keeps_it() -> None:
    counts = np.array([[0, 4, 8, 4000]], np.float32)
    assert pp.window(counts).tolist() == [[0, 0, 1, 255]]
    assert not pp.window(np.zeros((2, 2), np.float32)).any()
    strip = np.repeat(np.repeat(counts, pp.GRID // 4, axis=1), pp.GRID, axis=0)
    root = pp.root_counts(strip, (pp.GRID_MM, pp.GRID_MM))
    assert root[0, :: pp.GRID // 4] == pytest.approx(np.sqrt(counts[0]))


def test_at_the_grids_own_pixels_the_plane_is_the_root_of_the_counts_bit_for_bit() -> None:
    counts = _neck(focus=60.0)
    prepared = pp.prepare(counts, (pp.GRID_MM, pp.GRID_MM))
    box = prepared.crop
    inside = counts[box.top : box.top + box.height, box.left : box.left + box.width]
    assert (box.height, box.width) == (pp.GRID, pp.GRID)
    assert np.array_equal(prepared.planes, np.sqrt(inside)[None])
    assert prepared.planes.dtype == np.float32


@pytest.mark.parametrize("zoom", [1.28, 1.5, 2.0])
def test_the_pixels_of_a_zoom_are_summed_to_the_grid_and_no_count_is_lost(zoom: float) -> None:
    spacing = pp.GRID_MM / zoom
    edge = round(pp.GRID * zoom)
    counts = np.random.default_rng(5).poisson(3.0, (edge, edge)).astype(np.float32)
    density = pp.root_counts(counts, (spacing, spacing)) ** 2
    assert density.shape == (pp.GRID, pp.GRID)
    assert density.sum() == pytest.approx(counts.sum(), rel=0.01)
    assert density.mean() == pytest.approx(3.0 * zoom**2, rel=0.02)
    if zoom == 2.0:
        assert np.allclose(density, counts.reshape(pp.GRID, 2, pp.GRID, 2).sum(axis=(1, 3)), atol=1e-3)


def test_coarser_pixels_of_another_camera_are_spread_onto_the_grid_at_the_same_counts() -> None:
    spacing = 2.3976
    edge = round(pp.GRID * pp.GRID_MM / spacing)
    rows, columns = np.mgrid[:edge, :edge]
    counts = (20 + 10 * np.sin(rows / 9) * np.cos(columns / 11)).astype(np.float32)
    density = pp.root_counts(counts, (spacing, spacing)) ** 2
    assert density.sum() == pytest.approx(counts.sum(), rel=0.01)


def test_a_crop_at_the_end_of_the_matrix_stands_in_the_middle_between_zeros() -> None:
    counts = np.full((100, 112), 4.0, np.float32)
    plane = pp.root_counts(counts, (pp.GRID_MM, pp.GRID_MM))
    assert plane.shape == (pp.GRID, pp.GRID)
    assert not plane[:6].any()
    assert not plane[-6:].any()
    assert (plane[6:-6] == 2).all()


def test_smoothing_keeps_the_level_at_the_edge_of_the_detector() -> None:
    counts = np.full((32, 32), 5, np.float32)
    counts[:8] = 0
    smooth = pp.smooth(counts, pp.field_of_view(counts), SPACING, 3.0)
    assert np.allclose(smooth[8:], 5, atol=1e-4)
    assert not smooth[:8].any()


@pytest.mark.parametrize("off", [-12, 0, 12])
def test_the_box_follows_a_shifted_neck_but_not_a_hot_focus(off: int) -> None:
    def middle(counts: np.ndarray) -> float:
        box = pp.thyroid_box(counts, pp.field_of_view(counts), SPACING)
        assert box.height == round(pp.CROP_MM[0] / SPACING[0])
        assert box.width == round(pp.CROP_MM[1] / SPACING[1])
        return box.left + (box.width - 1) / 2

    plain = middle(_neck(off=off))
    assert abs(plain - 127.5 - off) <= 2
    assert abs(middle(_neck(off=off, focus=900.0)) - plain) <= 1


@pytest.mark.parametrize("seed", range(6))
def test_the_box_holds_every_remnant_of_shifted_phantoms(seed: int) -> None:
    simulated = phantom(910_000 + seed, residual=True, stratum="shifted")
    for mirrored, counts in ((False, simulated.anterior), (True, simulated.posterior)):
        image = counts.astype(np.float32)
        box = pp.thyroid_box(image, pp.field_of_view(image), simulated.spacing_mm)
        for focus in (focus for focus in simulated.truth.foci if focus.is_thyroid):
            x = 255 - focus.position[0] if mirrored else focus.position[0]
            assert box.left + 5 < x < box.left + box.width - 5
            assert box.top + 5 < focus.position[1] < box.top + box.height - 5


def test_a_box_never_leaves_the_matrix_even_where_the_field_is_small() -> None:
    counts = _neck()[60:188, 60:188]
    assert pp.thyroid_box(counts, pp.field_of_view(counts), (1.1, 1.1)) == Box(0, 0, 128, 128)
    assert pp.thyroid_box(np.zeros((64, 64), np.float32), np.zeros((64, 64), bool), SPACING) == Box(0, 0, 64, 64)


def test_grabcut_outlines_the_focus_and_nothing_in_a_flat_picture() -> None:
    prepared = pp.prepare(_neck(focus=60.0), SPACING)
    assert prepared.mask_rule == "grabcut"
    assert prepared.mask[130, 120]
    assert 100 < prepared.mask_area_mm2 < 3000
    assert prepared.mask_area_mm2 == pytest.approx(prepared.mask.sum() * SPACING[0] ** 2)
    flat = pp.grabcut(np.full((64, 64), 7, np.uint8), np.ones((64, 64), bool), 1)
    assert not flat.any()


def test_the_mask_is_the_same_in_every_call_and_thread_whatever_was_drawn_before() -> None:
    counts = phantom(920_001, residual=True).anterior.astype(np.float32)
    masks = [pp.prepare(counts, SPACING).mask]
    cv2.setRNGSeed(99)
    cv2.randu(np.zeros((50, 50), np.uint8), 0, 255)
    masks.append(pp.prepare(counts, SPACING).mask)
    thread = threading.Thread(target=lambda: masks.append(pp.prepare(counts, SPACING).mask))
    thread.start()
    thread.join(timeout=60)
    assert len(masks) == 3
    assert np.array_equal(masks[0], masks[1])
    assert np.array_equal(masks[0], masks[2])


def _disc(radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:100, :100]
    return np.asarray((rows - 50) ** 2 + (columns - 50) ** 2 < radius**2)


def test_an_empty_tiny_or_huge_mask_falls_back_by_name() -> None:
    assert pp.mask_rule(_disc(8), 4.0, flat=False) == "grabcut"
    assert pp.mask_rule(_disc(0), 4.0, flat=False) == "unmasked_empty"
    assert pp.mask_rule(_disc(2), 4.0, flat=False) == "unmasked_tiny"
    assert pp.mask_rule(_disc(49), 4.0, flat=False) == "unmasked_huge"
    assert pp.mask_rule(_disc(8), 4.0, flat=True) == "unmasked_flat"
    specks = np.zeros((100, 100), bool)
    specks[::10, ::10] = True
    assert pp.mask_rule(specks, 4.0, flat=False) == "unmasked_tiny"  # a hundred specks are no tissue
    assert not pp.without_specks(specks, 4.0).any()
    assert np.array_equal(pp.without_specks(specks | _disc(8), 4.0) & _disc(8), _disc(8))


def test_without_a_usable_mask_there_is_no_mask_and_the_rule_says_so() -> None:
    prepared = pp.prepare(_neck(), SPACING)
    assert prepared.mask_rule.startswith("unmasked_")
    assert not prepared.mask.any()
    assert prepared.mask_area_mm2 == 0


def test_what_grabcut_cuts_away_is_not_hidden_from_the_network() -> None:
    counts = _neck(focus=60.0)
    outlined = pp.prepare(counts, SPACING)
    plain = pp.prepare(counts, SPACING, pp.ORDERS["native"].without_outline())
    assert outlined.mask.any()
    assert not plain.mask.any()
    assert plain.mask_rule == "not_outlined"
    assert np.array_equal(outlined.planes, plain.planes)


def test_the_paper_needs_its_outline_for_the_network_and_native_does_not() -> None:
    native, paper = pp.ORDERS["native"], pp.ORDERS["paper"]
    assert not {"grabcut", "mask", "smooth_for_grabcut"} & set(native.without_outline().steps)
    assert native.without_outline().steps[-1] == "root_plane"
    assert paper.without_outline() == paper


@pytest.fixture(scope="module")
def both() -> Phantom:
    return phantom(920_002, residual=True, stratum="zoom_1.0")


def _scan(simulated: Phantom, *names: str) -> pp.PreparedScan:
    views = {"anterior": simulated.anterior, "posterior": simulated.posterior}
    return pp.prepare_scan(
        {name: (views[name].astype(np.float32), simulated.spacing_mm) for name in names},
        pp.ORDERS["native"].without_outline(),
    )


def test_both_views_are_channels_on_the_same_sides_and_the_third_is_what_their_detectors_saw(both: Phantom) -> None:
    scan = _scan(both, "anterior", "posterior")
    anterior, posterior = scan.views
    assert scan.planes.shape == (1, 3, pp.GRID, pp.GRID)
    assert np.array_equal(scan.planes[0, 0], anterior.planes[0])
    assert np.array_equal(scan.planes[0, 1], posterior.planes[0][:, ::-1])
    assert (scan.planes[0, 2] == 1).all()
    # A focus lies on one side of the neck in both channels, as it does in the patient.
    focus = max((focus for focus in both.truth.foci if focus.is_thyroid), key=lambda focus: focus.uptake_percent)
    x = focus.position[0]
    for view, mirrored in ((anterior, False), (posterior, True)):
        column = (255 - x if mirrored else x) - view.crop.left
        seen = pp.GRID - 1 - column if mirrored else column
        assert abs(seen - (x - anterior.crop.left)) <= 4


def test_the_inputs_are_the_standardized_planes(both: Phantom) -> None:
    scan = _scan(both, "anterior", "posterior")
    assert scan.inputs.shape == (1, 3, 112, 112)
    assert scan.inputs.dtype == np.float32
    back = scan.inputs[0] * np.array([2.0, 2.0, 0.5])[:, None, None] + np.array([1.5, 1.5, 0.5])[:, None, None]
    assert np.allclose(back, scan.planes[0], atol=1e-5)
    other = pp.Standard(255.0, (0.1, 0.2, 0.3), (1.0, 2.0, 4.0))
    restated = pp.standardize(scan.planes, other)[0]
    expected = (scan.planes[0] / 255 - np.array([0.1, 0.2, 0.3])[:, None, None]) / np.array([1, 2, 4])[:, None, None]
    assert np.allclose(restated, expected, atol=1e-6)


@pytest.mark.parametrize(("view", "name"), [(0, "anterior"), (1, "posterior")])
def test_a_scan_of_one_view_a_view_left_out_and_a_view_dropped_in_training_are_the_same_picture(
    both: Phantom, view: int, name: str
) -> None:
    whole = _scan(both, "anterior", "posterior").planes
    came_alone = _scan(both, name).planes
    assert np.array_equal(pp.without_view(whole[0], name), came_alone[0])
    assert np.array_equal(single_view(whole, view), came_alone)
    assert not came_alone[0, 1 - view].any()
    assert (came_alone[0, 2] == 0.5).all()
    assert whole[0, 1 - view].any()  # what was given is left as it was


def test_an_order_is_executed_as_the_data_say(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def spy(name: str, step: object) -> object:
        def run(work: object) -> object:
            seen.append(name)
            return step(work)  # type: ignore[operator]  # a step as it stands

        return run

    monkeypatch.setattr(pp, "STEPS", {name: spy(name, step) for name, step in pp.STEPS.items()})
    pp.prepare(_neck(), SPACING)
    assert tuple(seen) == pp.ORDERS["native"].steps
    seen.clear()
    turned = dataclasses.replace(pp.ORDERS["native"], steps=("bin", "crop", "field_of_view", "root_plane"))
    pp.prepare(_neck(), SPACING, turned)
    assert tuple(seen) == turned.steps


def test_a_finer_matrix_is_binned_counts_kept_and_comes_back_in_its_own_pixels() -> None:
    coarse = _neck(focus=60.0)
    fine = np.kron(coarse, np.ones((2, 2), np.float32)) / 4
    one, two = pp.prepare(coarse, (1.2, 1.2)), pp.prepare(fine, (0.6, 0.6))
    assert two.resampled
    assert not one.resampled
    assert two.spacing_mm == pytest.approx((1.2, 1.2))
    assert np.array_equal(one.planes, two.planes)
    assert two.mask.shape == (512, 512)
    assert two.mask.sum() == 4 * one.mask.sum()
    assert two.mask_area_mm2 == pytest.approx(one.mask_area_mm2)
    assert (two.crop.top, two.crop.width) == (2 * one.crop.top, 2 * one.crop.width)


def test_what_is_no_image_is_refused() -> None:
    for counts in (np.zeros((2, 64, 64), np.float32), np.zeros((4, 4), np.float32), np.full((64, 64), np.nan, "f4")):
        with pytest.raises(ValueError, match="counts"):
            pp.prepare(counts, SPACING)
    with pytest.raises(KeyError):
        pp.prepare(_neck(), SPACING, "photoshop")
    with pytest.raises(ValueError, match="no view"):
        pp.prepare_scan({})


@pytest.mark.parametrize("level", [0.0, 3.0])
def test_a_picture_without_contrast_passes_through_by_a_named_rule(level: float) -> None:
    prepared = pp.prepare(np.full((256, 256), level, np.float32), SPACING)
    assert prepared.mask_rule == "unmasked_flat"
    assert np.isfinite(prepared.planes).all()
    assert (prepared.planes == np.sqrt(np.float32(level))).all()


def test_the_order_of_the_paper_runs_on_a_real_view() -> None:
    """One view only: GrabCut on 800 x 750 equalized pixels takes many seconds, as the paper reports."""
    steps = pp.ORDERS["paper"].steps
    assert steps.index("enlarge") < steps.index("equalize") < steps.index("grabcut") < steps.index("masked_plane")
    scan = pp.prepare_scan({"anterior": (_neck(focus=60.0), SPACING)}, "paper")
    (prepared,) = scan.views
    assert scan.inputs.shape == (1, 3, 224, 224)
    assert np.array_equal(scan.planes[0, 0], scan.planes[0, 1])
    assert np.array_equal(scan.planes[0, 0], scan.planes[0, 2])
    assert np.array_equal(scan.planes, np.round(scan.planes))
    assert 0 <= scan.planes.min() < scan.planes.max() <= 255
    back = scan.inputs[0] * np.array([0.229, 0.224, 0.225])[:, None, None]
    back = (back + np.array([0.485, 0.456, 0.406])[:, None, None]) * 255
    assert np.allclose(back, scan.planes[0], atol=1e-3)
    assert (prepared.crop.height, prepared.crop.width) == (round(225 / SPACING[0]), round(240 / SPACING[1]))
    assert prepared.mask.shape == (256, 256)
    assert (prepared.mask_rule == "grabcut") == bool(prepared.mask.any())
