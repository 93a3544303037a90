"""The picture a doctor sees: the verdict in words, both views with their outlines, and what judged.

`draw` is a pure function of the outcome: same input, same pixels. It is given no identity, so none can stand in the
pixels (BurnedInAnnotation NO of the Secondary Capture rests on this). Nuclear medicine's habit is followed: counts are
dark on white, on a square-root scale so that faint uptake beside a hot remnant stays visible. The posterior view is
shown as received. A scan that was not analysed gets a picture that cannot be taken for a negative one.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cache
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline import foci_wording, wording
from pipeline.finding import Box, Declined, Finding, ModelFacts, ViewFinding, ViewImage

WIDTH, HEIGHT = 1024, 800
HEAD, FOOT = 80, 50
"""Pixels left free at the top and the bottom: viewers put text of their own there, at the top also a bar."""

_MAIN, _SMALL, _GAP = 330, 150, 8
_DASH = 9
_CONTEXT = 1.3  # how much of the neck around the analysed box the main panel shows
_TOP = HEAD + 206  # first row of the panels

_Colour = tuple[int, int, int]
_WHITE: _Colour = (255, 255, 255)
_GREY: _Colour = (170, 170, 170)
_LIGHT: _Colour = (215, 215, 215)
_BLACK: _Colour = (0, 0, 0)


@dataclass(frozen=True, slots=True)
class _Palette:
    """Colours by meaning. No green anywhere: nothing here means "all is well"."""

    present: _Colour
    absent: _Colour
    undetermined: _Colour
    declined: _Colour
    release: _Colour
    outline: _Colour
    box: _Colour


_COLOUR = _Palette(
    (255, 176, 64), (150, 200, 255), (216, 180, 255), (200, 30, 30), (255, 224, 102), (224, 32, 32), (40, 110, 220)
)
_GREYS = _Palette(_WHITE, _WHITE, _WHITE, (70, 70, 70), _WHITE, _BLACK, (120, 120, 120))


@dataclass(frozen=True, slots=True)
class _Region:
    """A rectangle in native pixel edges (the centre of the first pixel lies at 0.5)."""

    left: float
    top: float
    width: float
    height: float


def draw(outcome: Finding | Declined, model: ModelFacts | None = None, *, colour: bool = True) -> NDArray[np.uint8]:
    """Return the picture: shape (800, 1024, 3), RGB; or (800, 1024), grey levels, where `colour` is False.

    `model` names the weights on the picture of a Declined; a Finding brings its own.
    """
    palette = _COLOUR if colour else _GREYS
    picture = Image.new("RGB", (WIDTH, HEIGHT), _BLACK)
    pen = ImageDraw.Draw(picture)
    facts = outcome.model if isinstance(outcome, Finding) else model
    _draw_release(pen, facts, palette)
    if isinstance(outcome, Finding):
        _draw_verdict(pen, outcome, palette)
        for place, view in zip(_places(len(outcome.views)), outcome.views, strict=True):
            _draw_view(picture, pen, place, view, outcome, palette)
    else:
        _draw_refusal(pen, outcome, palette)
        for place, image in zip(_places(len(outcome.images)), outcome.images, strict=True):
            _draw_unread_view(picture, pen, place, image)
    _draw_foot(pen, outcome, facts)
    return np.asarray(picture if colour else picture.convert("L"), dtype=np.uint8).copy()


def _places(count: int) -> tuple[int, ...]:
    """Return the first column of each view's half; a single view stands in the middle."""
    return (270,) if count == 1 else tuple(14 + 512 * index for index in range(count))


def _draw_release(pen: ImageDraw.ImageDraw, model: ModelFacts | None, palette: _Palette) -> None:
    if model is not None and model.release != "local":
        _line(pen, HEAD + 4, wording.RELEASES[model.release], 22, palette.release, WIDTH - 40)
    else:
        _line(pen, HEAD + 4, "Remnant: iodine-131 neck scan", 22, _GREY, WIDTH - 40)


def _draw_verdict(pen: ImageDraw.ImageDraw, finding: Finding, palette: _Palette) -> None:
    shade = {"present": palette.present, "absent": palette.absent, "undetermined": palette.undetermined}[
        finding.finding
    ]
    # Also told by shape, for a grey display and for eyes that do not tell colours: full, framed, broken frame.
    box = (20, HEAD + 34, WIDTH - 20, HEAD + 96)
    if finding.finding == "present":
        pen.rectangle(box, fill=shade)
    elif finding.finding == "absent":
        pen.rectangle(box, outline=shade, width=2)
    else:
        left, top, right, bottom = box
        _dashed(pen, [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)], shade, 3)
    words = _BLACK if finding.finding == "present" else shade
    _line(pen, HEAD + 38, wording.verdict_line(finding), 50, words, WIDTH - 60)
    _line(pen, HEAD + 102, wording.probability_line(finding), 27, _WHITE, WIDTH - 40)
    _draw_scale(pen, finding, shade, palette)


def _draw_scale(pen: ImageDraw.ImageDraw, finding: Finding, shade: _Colour, palette: _Palette) -> None:
    """Draw 0 to 100 % as a bar: filled up to the probability, a mark at the threshold, the undetermined band below."""
    left, right, top, bottom = 212, 812, HEAD + 142, HEAD + 158
    pen.rectangle((left, top, right, bottom), outline=_GREY, width=1)
    reach = left + (right - left) * finding.probability
    pen.rectangle((left, top, reach, bottom), fill=shade)
    mark = left + (right - left) * finding.threshold
    pen.line((mark, top - 5, mark, bottom + 5), fill=_BLACK, width=5)
    pen.line((mark, top - 5, mark, bottom + 5), fill=_WHITE, width=3)
    if finding.undetermined_band:
        low, high = (left + (right - left) * edge for edge in finding.undetermined_band)
        pen.rectangle((low, bottom + 8, max(high, low + 2), bottom + 11), fill=palette.undetermined)
    pen.text((left - 10, HEAD + 150), "0 %", font=_font(16), fill=_WHITE, anchor="rm")
    pen.text((right + 10, HEAD + 150), "100 %", font=_font(16), fill=_WHITE, anchor="lm")


def _draw_refusal(pen: ImageDraw.ImageDraw, declined: Declined, palette: _Palette) -> None:
    pen.rectangle((20, HEAD + 34, WIDTH - 20, HEAD + 170), fill=palette.declined, outline=_WHITE, width=3)
    _line(pen, HEAD + 38, wording.verdict_line(declined), 56, _WHITE, WIDTH - 60)
    reason = wording.reason_line(declined).removeprefix("Not analysed: ")
    _line(pen, HEAD + 104, reason[:1].upper() + reason[1:], 26, _WHITE, WIDTH - 60)
    _line(pen, HEAD + 137, "There is no result for this scan. This is NOT a negative result.", 22, _WHITE, WIDTH - 60)


def _draw_view(
    picture: Image.Image, pen: ImageDraw.ImageDraw, left: int, view: ViewFinding, finding: Finding, palette: _Palette
) -> None:
    """Draw one view: the neck with the outline, and beside it the whole view and the activation map."""
    image = view.image
    region = _around(view.crop, image)
    picture.paste(_grey(image.counts, region, _MAIN), (left, _TOP))
    line = [_onto(point, region, left, _TOP, _MAIN) for point in view.outline]
    if finding.finding == "present":
        where = "outline: tissue found"
        # A light line under the dark one, so that the outline is seen on black and on white alike.
        pen.line(line, fill=_WHITE, width=5, joint="curve")
        pen.line(line, fill=palette.outline, width=2, joint="curve")
    else:
        # Neither the colour nor the line of tissue: only where was looked.
        where = "dashes: region analysed"
        _dashed(pen, line, palette.box, 2)
    _foci(pen, finding, image, region, left)
    _frame(pen, left, _TOP, _MAIN)
    _sides(pen, image, left, _TOP, _MAIN)
    pen.text((left, _TOP - 4), wording.VIEW_TITLES[image.view], font=_font(22), fill=_WHITE, anchor="ld")
    pen.text((left + _MAIN, _TOP - 5), where, font=_font(15), fill=_WHITE, anchor="rd")
    caption = f"inverse square-root grey scale, 0 to {round(_top(image.counts, region))} counts"
    pen.text((left, _TOP + _MAIN + 4), caption, font=_font(15), fill=_WHITE)

    beside = left + _MAIN + _GAP
    whole = _whole(image)
    picture.paste(_grey(image.counts, whole, _SMALL), (beside, _TOP))
    corners = _corners(view.crop)
    pen.line([_onto(point, whole, beside, _TOP, _SMALL) for point in corners], fill=palette.box, width=2)
    _frame(pen, beside, _TOP, _SMALL)
    # At the right, or it would read as one phrase with the label of the panel beside it.
    pen.text((beside + _SMALL, _TOP - 5), "whole view", font=_font(15), fill=_WHITE, anchor="rd")
    if view.activation is not None:
        below = _TOP + _MAIN - _SMALL
        picture.paste(_heat(view.activation, region, _SMALL), (beside, below))
        _frame(pen, beside, below, _SMALL)
        pen.text((beside, below - 4), "evidence map", font=_font(15), fill=_WHITE, anchor="ld")


def _foci(pen: ImageDraw.ImageDraw, finding: Finding, image: ViewImage, region: _Region, left: int) -> None:
    """Number each focus beside its place, by two short lines that leave the focus itself to be seen."""
    for focus, seen in foci_wording.foci_in(finding, image.view):
        x, y = _on_panel(seen.position, region, left, _TOP, _MAIN)
        if not (left + 12 <= x < left + _MAIN - 30 and _TOP + 22 <= y < _TOP + _MAIN - 12):
            continue  # outside of what the panel shows; the line below the panels names it
        line = (x + 7, y - 7, x + 15, y - 15)
        pen.line(line, fill=_WHITE, width=4)
        pen.line(line, fill=_BLACK, width=2)
        # Where only the other view shows it, a question mark: its place here is derived.
        text = str(focus.number) if seen.seen else f"{focus.number}?"
        pen.text((x + 16, y - 15), text, font=_font(20), fill=_BLACK, anchor="lm", stroke_width=2, stroke_fill=_WHITE)


def _draw_unread_view(picture: Image.Image, pen: ImageDraw.ImageDraw, left: int, image: ViewImage) -> None:
    """Draw a view that was received but not judged, crossed by what it lacks."""
    whole = _whole(image)
    at = left + (512 - 28 - _MAIN) // 2
    picture.paste(_grey(image.counts, whole, _MAIN), (at, _TOP))
    _frame(pen, at, _TOP, _MAIN)
    _sides(pen, image, at, _TOP, _MAIN)
    pen.text((at, _TOP - 4), wording.VIEW_TITLES[image.view], font=_font(22), fill=_WHITE, anchor="ld")
    pen.text((at + _MAIN, _TOP - 5), "as received, not analysed", font=_font(15), fill=_WHITE, anchor="rd")


def _draw_foot(pen: ImageDraw.ImageDraw, outcome: Finding | Declined, model: ModelFacts | None) -> None:
    lines: list[tuple[str, int, _Colour]] = []
    if isinstance(outcome, Finding):
        beside = [foci_wording.uptake_line(outcome), foci_wording.foci_line(outcome)]
        notes = [wording.missing_view_line(outcome), wording.flag_line(outcome.flags)]
        for parts in (beside, notes):
            lines += [(" ".join(part for part in parts if part), 17, _WHITE)] if any(parts) else []
    lines.append((wording.REVIEW.upper().rstrip("."), 20, _WHITE))
    if model is not None:
        _, which, trained, *_ = wording.model_lines(model)
        lines += [(trained, 17, _WHITE), (which, 15, _LIGHT)]
    height = sum(size + 5 for _, size, _ in lines)
    y = HEIGHT - FOOT - height
    for text, size, shade in lines:
        _line(pen, y, text, size, shade, WIDTH - 28)
        y += size + 5


def _around(crop: Box, image: ViewImage) -> _Region:
    """Return a region, square in mm, that holds `crop` and some of the neck around it."""
    row_mm, column_mm = image.spacing_mm
    side_mm = _CONTEXT * max(crop.height * row_mm, crop.width * column_mm)
    height, width = side_mm / row_mm, side_mm / column_mm
    return _Region(crop.left + crop.width / 2 - width / 2, crop.top + crop.height / 2 - height / 2, width, height)


def _whole(image: ViewImage) -> _Region:
    """Return a region, square in mm, that holds the whole view."""
    rows, columns = image.counts.shape
    row_mm, column_mm = image.spacing_mm
    side_mm = max(rows * row_mm, columns * column_mm)
    height, width = side_mm / row_mm, side_mm / column_mm
    return _Region(columns / 2 - width / 2, rows / 2 - height / 2, width, height)


def _sample(values: NDArray[np.float32], region: _Region, side: int) -> NDArray[np.float32]:
    """Return `values` within `region`, bilinear, shape (side, side); outside of the frame 0."""
    rows, columns = values.shape
    x = region.left + (np.arange(side) + 0.5) * region.width / side - 0.5
    y = region.top + (np.arange(side) + 0.5) * region.height / side - 0.5
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    wx, wy = (x - x0).astype(np.float32), (y - y0).astype(np.float32)

    def at(row: NDArray[np.int_], column: NDArray[np.int_]) -> NDArray[np.float32]:
        inside = ((row >= 0) & (row < rows))[:, None] & ((column >= 0) & (column < columns))[None, :]
        taken = values[np.clip(row, 0, rows - 1)[:, None], np.clip(column, 0, columns - 1)[None, :]]
        return np.where(inside, taken, np.float32(0))

    upper = at(y0, x0) * (1 - wx) + at(y0, x0 + 1) * wx
    lower = at(y0 + 1, x0) * (1 - wx) + at(y0 + 1, x0 + 1) * wx
    return np.asarray(upper * (1 - wy)[:, None] + lower * wy[:, None], dtype=np.float32)


def _top(counts: NDArray[np.float32], region: _Region) -> float:
    """Return the counts shown black: the maximum within the region, but so many that mere noise does not look hot."""
    rows, columns = counts.shape
    top, left = max(0, int(region.top)), max(0, int(region.left))
    bottom, right = min(rows, int(region.top + region.height) + 1), min(columns, int(region.left + region.width) + 1)
    shown = counts[top:bottom, left:right]
    mean = float(shown.mean()) if shown.size else 0.0
    return max(1.0, float(shown.max(initial=0.0)), mean + 12 * math.sqrt(mean))


def _grey(counts: NDArray[np.float32], region: _Region, side: int) -> Image.Image:
    """Return the region as nuclear medicine reads it: square root of counts, dark on white."""
    level = np.sqrt(np.clip(_sample(counts, region, side) / _top(counts, region), 0, 1))
    return Image.fromarray((255 - np.rint(255 * level)).astype(np.uint8)).convert("RGB")


def _heat(activation: NDArray[np.float32], region: _Region, side: int) -> Image.Image:
    """Return class activation from black over red and yellow to white."""
    level = np.clip(_sample(activation.astype(np.float32), region, side), 0, 1)
    ramp = np.stack([3 * level, 3 * level - 1, 3 * level - 2], axis=-1)
    return Image.fromarray(np.rint(255 * np.clip(ramp, 0, 1)).astype(np.uint8))


def _onto(point: tuple[float, float], region: _Region, left: int, top: int, side: int) -> tuple[float, float]:
    """Return where a native pixel position (centres at whole numbers) lies on the picture, kept within its panel."""
    x, y = _on_panel(point, region, left, top, side)
    return min(max(x, left), left + side - 1), min(max(y, top), top + side - 1)


def _on_panel(point: tuple[float, float], region: _Region, left: int, top: int, side: int) -> tuple[float, float]:
    """Return where a native pixel position lies on the picture, also where that is outside of its panel."""
    x = (point[0] + 0.5 - region.left) / region.width * side
    y = (point[1] + 0.5 - region.top) / region.height * side
    return left + x, top + y


def _corners(crop: Box) -> tuple[tuple[float, float], ...]:
    left, top = crop.left - 0.5, crop.top - 0.5
    right, bottom = left + crop.width, top + crop.height
    return (left, top), (right, top), (right, bottom), (left, bottom), (left, top)


def _frame(pen: ImageDraw.ImageDraw, left: int, top: int, side: int) -> None:
    pen.rectangle((left - 1, top - 1, left + side, top + side), outline=_GREY, width=1)


def _sides(pen: ImageDraw.ImageDraw, image: ViewImage, left: int, top: int, side: int) -> None:
    """Mark the patient's right and left: the camera behind the patient sees them swapped, and we do not mirror."""
    first, second = ("R", "L") if image.view == "anterior" else ("L", "R")
    for text, x, anchor in ((first, left + 6, "lm"), (second, left + side - 6, "rm")):
        pen.text(
            (x, top + side / 2), text, font=_font(24), fill=_BLACK, anchor=anchor, stroke_width=2, stroke_fill=_WHITE
        )


def _dashed(pen: ImageDraw.ImageDraw, line: list[tuple[float, float]], shade: _Colour, width: int) -> None:
    """Draw a line of dashes as long as the gaps between them, which run on around its corners."""
    gone = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        length = math.hypot(x1 - x0, y1 - y0)
        start = -(gone % (2 * _DASH))
        while start < length:
            a, b = max(start, 0.0), min(start + _DASH, length)
            if b > a:
                along = ((x1 - x0) / length, (y1 - y0) / length)
                ends = (x0 + along[0] * a, y0 + along[1] * a, x0 + along[0] * b, y0 + along[1] * b)
                pen.line(ends, fill=shade, width=width)
            start += 2 * _DASH
        gone += length


def _line(pen: ImageDraw.ImageDraw, y: int, text: str, size: int, shade: _Colour, room: int) -> None:
    """Write one centred line, smaller where it would not fit into `room` pixels."""
    while size > 11 and pen.textlength(text, font=_font(size)) > room:
        size -= 1
    pen.text((WIDTH // 2, y), text, font=_font(size), fill=shade, anchor="ma")


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Return the font that travels with Pillow, Aileron Regular (CC0): the same on every host, so the same pixels.

    Pillow's copy is cut down to basic Latin. That is enough, so the package brings no font of its own: `wording` writes
    plain ASCII only, and a picture has no names to show. A test holds every printable ASCII character to a glyph.
    """
    # With a size, Pillow answers with a FreeType font or raises ImportError itself.
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size))
