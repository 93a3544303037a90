"""The picture a doctor sees."""

import inspect
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import ImageFont

from pipeline import overlay, wording
from pipeline.camera import examination
from pipeline.finding import Declined, Finding, ModelFacts


def test_the_picture_is_drawn_from_an_outcome_alone_so_that_no_identity_can_stand_in_it():
    taken = {name: parameter.annotation for name, parameter in inspect.signature(overlay.draw).parameters.items()}
    assert taken == {"outcome": Finding | Declined, "model": ModelFacts | None, "colour": bool}


@pytest.mark.parametrize("colour", ["colour", "grey"])
@pytest.mark.parametrize("outcome", ["present", "low_counts"])
def test_two_patients_with_the_same_counts_get_the_same_picture(case, outcome, colour):
    pictures = set()
    for seed in (1, 2):
        who = examination(seed)
        made = case(outcome, who=who, sc=colour, software_version="0.1.0")
        ds = made.read("sc")
        assert str(ds.PatientName) == who.patient_name
        pictures.add(ds.PixelData)
    assert len(pictures) == 1


def test_the_font_has_a_glyph_of_its_own_for_every_character_we_write():
    font = ImageFont.load_default(24)
    missing = bytes(font.getmask("\ue000"))  # of the private use area: no font of ours has it
    glyphs = {character: bytes(font.getmask(character)) for character in map(chr, range(0x21, 0x7F))}
    assert missing not in glyphs.values()
    assert len(set(glyphs.values())) > 90


def test_text_is_drawn_at_the_size_it_is_shown_and_reads_in_grey(case):
    """Black beside full white: strokes of text that was scaled afterwards would be grey all over."""
    for outcome in ("present", "absent", "undetermined", "low_counts"):
        made = case(outcome)
        line = overlay.draw(made.outcome, made.context.model, colour=False)[120:170, 30:-30].astype(int)
        background = int(np.median(line))
        assert background in ({255} if outcome == "present" else {0, 70})
        strokes = np.abs(line - background) >= 178
        between = (np.abs(line - background) > 8) & ~strokes
        assert between.sum() < strokes.sum()


def test_the_verdicts_differ_in_grey_too(case):
    outcome = case("present").outcome
    words = {
        overlay.draw(replace(outcome, finding=word), colour=False)[116:175].tobytes()
        for word in ("present", "absent", "undetermined")
    }
    assert len(words) == 3
    # By shape as well: full, framed, and a broken frame.
    drawn = {
        word: overlay.draw(replace(outcome, finding=word), colour=False)[overlay.HEAD + 34 : overlay.HEAD + 97, 20:-19]
        for word in ("present", "absent", "undetermined")
    }
    assert (drawn["present"] > 250).mean() > 0.7
    assert (drawn["absent"] > 250).mean() < 0.3
    assert (drawn["absent"][0] > 250).all()
    assert 0.3 < (drawn["undetermined"][0] > 250).mean() < 0.7


def test_only_tissue_that_was_found_is_drawn_like_tissue(case):
    red = np.array(overlay._COLOUR.outline)
    for outcome, has in (("present", True), ("absent", False), ("undetermined", False)):
        picture = overlay.draw(case(outcome).outcome)
        assert bool((picture == red).all(axis=2).any()) is has, outcome


def test_the_undetermined_band_is_marked_below_the_scale(case):
    outcome = case("absent").outcome
    band = replace(outcome, undetermined_band=(0.25, 0.5))
    changed = (overlay.draw(band) != overlay.draw(replace(outcome, undetermined_band=None))).any(axis=2)
    columns = np.flatnonzero(changed[overlay.HEAD + 164 : overlay.HEAD + 170].any(axis=0))
    assert (columns.min(), columns.max()) == (212 + 150, 212 + 300)


@pytest.mark.parametrize("outcome", ["present", "absent", "undetermined", "low_counts"])
def test_the_top_and_the_bottom_are_left_to_the_viewers_own_text(case, outcome):
    made = case(outcome)
    for colour in (True, False):
        picture = overlay.draw(made.outcome, made.context.model, colour=colour)
        assert picture.shape == ((800, 1024, 3) if colour else (800, 1024))
        assert picture.dtype == np.uint8
        assert not picture[: overlay.HEAD].any()
        assert not picture[-overlay.FOOT :].any()
        assert picture.any()


@pytest.mark.parametrize("reason", ["low_counts", "view_missing", "analysis_failed"])
def test_a_scan_not_analysed_is_red_and_white_and_nowhere_green(case, reason):
    made = case(reason)
    for images in (made.outcome.images, made.outcome.images[:1], ()):
        picture = overlay.draw(replace(made.outcome, images=images), None).astype(int)
        red, green, blue = picture[..., 0], picture[..., 1], picture[..., 2]
        assert not ((green > red + 8) & (green > blue + 8)).any()
        assert ((red > 150) & (green < 60)).sum() > 50_000


def test_each_verdict_gives_another_picture_of_the_same_scan(case):
    outcome = case("present").outcome
    pictures = {
        overlay.draw(replace(outcome, finding=word)).tobytes() for word in ("present", "absent", "undetermined")
    }
    assert len(pictures) == 3


def test_the_outline_lies_on_the_tissue_it_was_drawn_around(case):
    outcome = case("present").outcome
    corner = ((0.0, 0.0),) * 4  # lies outside of the panel and is kept at its edge
    elsewhere = replace(outcome, views=tuple(replace(view, outline=corner) for view in outcome.views))
    with_outline, without = overlay.draw(outcome).astype(int), overlay.draw(elsewhere).astype(int)
    changed = np.abs(with_outline - without).sum(axis=2) > 0
    view = outcome.views[0]
    panel = changed[287 : 286 + 329, 15 : 14 + 329]
    rows, columns = np.nonzero(panel)
    side_mm = 1.3 * max(view.crop.height * view.image.spacing_mm[0], view.crop.width * view.image.spacing_mm[1])
    scale = 330 * view.image.spacing_mm[1] / side_mm
    centre = view.crop.left + view.crop.width / 2
    xs = [point[0] + 0.5 for point in view.outline]
    middle = 165 + ((max(xs) + min(xs)) / 2 - centre) * scale
    assert (columns.min() + columns.max()) / 2 == pytest.approx(middle, abs=4)
    assert rows.size > 100


@pytest.mark.parametrize(
    ("probability", "threshold", "text"),
    [
        (0.021, 0.5, "2.10"),
        (0.49999, 0.5, "49.99"),
        (0.99999, 0.5, "99.99"),
        (0.00001, 0.5, "0.01"),
        (0.5, 0.5, "50.00"),
        (0.50001, 0.5, "50.00"),
        (0.12344999, 0.5, "12.34"),
        (0.99999, 0.99999, "99.99"),
        (1.0, 0.5, "100.00"),
        (0.0, 0.5, "0.00"),
    ],
)
def test_a_probability_is_never_rounded_across_the_threshold(probability, threshold, text):
    assert wording.percent(probability, threshold) == text


def test_words_are_plain_ascii_whatever_the_weights_record_says():
    said = wording.ascii_text("Müller\\Ångström ~ 研究\n2")
    assert said.isascii()
    assert said == "Muller/Angstrom - ?? 2"


def test_an_empty_view_is_drawn_without_a_division_by_zero(case):
    outcome = case("low_counts").outcome
    empty = tuple(replace(image, counts=np.zeros_like(image.counts)) for image in outcome.images)
    picture = overlay.draw(replace(outcome, images=empty))
    assert math.isfinite(float(picture.mean()))
