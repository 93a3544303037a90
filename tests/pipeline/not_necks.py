"""Pictures that are no judgeable necks, as pairs of views with a 131I header: what `pipeline.quality` has to decline.

Two makers. Sources and other bodies are drawn here, on a grid in mm, from sizes that every picture draws afresh, so
that no rule is fitted to one drawing: blurred as a camera blurs, with a broad tail of septal penetration and scatter,
cut by the detector, counted. Necks that are cut by the field are phantoms of `pipeline.phantom` whose pose is moved
before they are rendered, so that foci, tail and scatter lie as they would. Every zoom; 15,000 to 150,000 counts a view
where they are drawn here. Equal kind and seed give equal pixels. Drawings, not scans: they show that a rule works, not
how often a hospital's pictures would meet it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline import phantom as simulator
from pipeline.finding import SourceFrame, ViewImage

Plane = NDArray[np.float64]
Shape = Callable[[Plane, Plane, np.random.Generator], Plane]
"""How bright a thing is at x (to the right) and y (downwards), both mm from the detector's middle."""
Pair = tuple[NDArray[Any], NDArray[Any], float]
"""Anterior and posterior counts, and the pixel's edge in mm."""

FLOOD = frozenset({"flood"})
NOT_THE_NECK = frozenset({"neck_outside_field", "out_of_training_range"})
CUT = frozenset({"neck_outside_field"})


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of picture: its maker, the reasons that are right for it, and how often the rules alone shall see it.

    `by_rules`: the least share of a seeded sample that the rules decline with a right reason; 0 where none is promised.
    """

    make: Callable[[np.random.Generator], Pair]
    reasons: frozenset[str]
    by_rules: float


def draw(kind: str, seed: int) -> tuple[ViewImage, ViewImage]:
    """One picture of a kind in `KINDS`, both views."""
    number = list(KINDS).index(kind)
    anterior, posterior, pixel_mm = KINDS[kind].make(np.random.default_rng([135, number, seed]))
    return (
        ViewImage("anterior", anterior.astype(np.float32), (pixel_mm, pixel_mm), SourceFrame("", "", "", 1, 2)),
        ViewImage("posterior", posterior.astype(np.float32), (pixel_mm, pixel_mm), SourceFrame("", "", "", 2, 2)),
    )


def _counted(shape: Shape) -> Callable[[np.random.Generator], Pair]:
    """Both views of a shape, as a camera at any zoom counts it."""

    def make(rng: np.random.Generator) -> Pair:
        pixel_mm = simulator.PIXEL_MM / float(rng.choice(simulator.ZOOMS))
        axis = (np.arange(256) - 127.5) * pixel_mm
        x_mm, y_mm = np.meshgrid(axis, axis)
        tilt, (off_x, off_y) = np.deg2rad(rng.uniform(-8, 8)), rng.uniform(-25, 25, 2)
        fwhm_mm, tail, tail_mm = rng.uniform(8, 15), rng.uniform(0.1, 0.5), rng.uniform(25, 50)
        total, other = np.exp(rng.uniform(np.log(15_000), np.log(150_000))), rng.uniform(0.6, 1.2)
        seen_mm = rng.uniform(380, 410), rng.uniform(515, 545)
        field = (abs(y_mm) < seen_mm[0] / 2) & (abs(x_mm) < seen_mm[1] / 2)
        drawn = int(rng.integers(2**32))
        views = []
        for side, counts in ((1, total), (-1, total * other)):
            across, down = side * x_mm - off_x, y_mm - off_y
            turned = np.cos(tilt) * across + np.sin(tilt) * down, np.cos(tilt) * down - np.sin(tilt) * across
            bright = np.maximum(shape(*turned, np.random.default_rng(drawn)), 0)
            sharp, broad = (
                cv2.GaussianBlur(bright, (0, 0), sigma / pixel_mm, borderType=cv2.BORDER_REPLICATE)
                for sigma in (fwhm_mm / 2.3548, tail_mm)
            )
            expected = ((1 - tail) * sharp + tail * broad) * field
            views.append(rng.poisson(expected / expected.sum() * counts))
        return views[0], views[1], pixel_mm

    return make


# --- nothing, noise and sources ---


def _black(rng: np.random.Generator) -> Pair:
    empty = np.zeros((256, 256))
    return empty, empty, simulator.PIXEL_MM / float(rng.choice(simulator.ZOOMS))


def _uniform_noise(rng: np.random.Generator) -> Pair:
    """Every value up to a greatest one equally often, over the whole matrix."""
    greatest = int(rng.choice((1, 2, 4, 40, 255)))
    views = rng.integers(0, greatest + 1, (2, 256, 256))
    return views[0], views[1], simulator.PIXEL_MM / float(rng.choice(simulator.ZOOMS))


def _poisson_noise(rng: np.random.Generator) -> Pair:
    views = rng.poisson(rng.uniform(15_000, 150_000) / 256**2, (2, 256, 256))
    return views[0], views[1], simulator.PIXEL_MM / float(rng.choice(simulator.ZOOMS))


def _even(x_mm: Plane, y_mm: Plane, rng: np.random.Generator) -> Plane:
    return np.ones_like(x_mm)


def _uneven(x_mm: Plane, y_mm: Plane, rng: np.random.Generator) -> Plane:
    """A flood on a detector that is not tuned: a slope, the pattern of its tubes, and a brighter rim."""
    angle, pitch_mm = rng.uniform(0, 2 * np.pi), rng.uniform(50, 75)
    slope = rng.uniform(0, 0.06) * (x_mm * np.cos(angle) + y_mm * np.sin(angle)) / 250
    tubes = rng.uniform(0.01, 0.04) * np.cos(x_mm * 2 * np.pi / pitch_mm) * np.cos(y_mm * 2 * np.pi / pitch_mm)
    rim = rng.uniform(0, 0.1) * ((abs(x_mm) > 240) | (abs(y_mm) > 175))
    return 1 + slope + tubes + rim


def _bars(x_mm: Plane, y_mm: Plane, rng: np.random.Generator) -> Plane:
    """Four quadrants of lead bars, turned by a quarter from one to the next; as wide as the spaces between them."""
    bar_mm = np.sort(rng.uniform(3, 13, 4))
    quadrant = (x_mm > 0) + 2 * (y_mm > 0)
    along = np.where((quadrant == 0) | (quadrant == 3), x_mm, y_mm)
    open_ = np.mod(along / (2 * bar_mm[quadrant]), 1) < 0.5
    return np.where(open_, 1.0, rng.uniform(0.05, 0.4))


def _point(x_mm: Plane, y_mm: Plane, rng: np.random.Generator) -> Plane:
    at, wide = rng.uniform(-30, 30, 2), rng.uniform(1.5, 4)
    return np.exp(-((x_mm - at[0]) ** 2 + (y_mm - at[1]) ** 2) / (2 * wide**2)) + rng.uniform(0, 2e-5)


def _line(x_mm: Plane, y_mm: Plane, rng: np.random.Generator) -> Plane:
    angle, half_mm, wide = rng.uniform(0, np.pi), rng.uniform(125, 260), rng.uniform(1, 3)
    along, aside = x_mm * np.cos(angle) + y_mm * np.sin(angle), y_mm * np.cos(angle) - x_mm * np.sin(angle)
    return np.exp(-(aside**2) / (2 * wide**2)) * (abs(along) < half_mm) + rng.uniform(0, 1e-3)


# --- other bodies ---


def _waves(x_mm: Plane, y_mm: Plane, rng: np.random.Generator) -> Plane:
    """Soft tissue is nowhere even."""
    uneven = np.zeros_like(x_mm)
    for _ in range(4):
        length, angle, phase = rng.uniform(60, 200), rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
        uneven += np.cos((x_mm * np.cos(angle) + y_mm * np.sin(angle)) * 2 * np.pi / length + phase)
    return np.asarray(np.exp(rng.uniform(0.02, 0.12) * uneven))


def _round(aside: Plane, half_width: Plane | float) -> Plane:
    """The thickness of a round limb or trunk across, 1 in its middle."""
    return np.asarray(np.sqrt(np.maximum(1 - (aside / np.maximum(half_width, 1e-6)) ** 2, 0)))


def _blob(x_mm: Plane, y_mm: Plane, at: tuple[float, float], size: tuple[float, float]) -> Plane:
    return np.asarray(np.exp(-(((x_mm - at[0]) / size[0]) ** 2) - ((y_mm - at[1]) / size[1]) ** 2))


def _chest(x_mm: Plane, y_mm: Plane, rng: np.random.Generator) -> Plane:
    """Below the neck: its stump at the most at the top, lungs, a heart, perhaps arms and the liver's dome."""
    shoulders_mm, half = rng.uniform(-240, -140), rng.uniform(130, 185)
    neck = rng.uniform(48, 72)
    width = neck + (half + rng.uniform(-0.1, 0.15) * y_mm - neck) / (1 + np.exp(-(y_mm - shoulders_mm) / 13))
    trunk = _round(x_mm, width) ** rng.uniform(0.3, 1)
    for side in (-1, 1):
        trunk *= 1 - rng.uniform(0.1, 0.6) * _blob(x_mm, y_mm, (side * half * 0.5, 0), (half * 0.3, 110))
    trunk *= 1 + rng.uniform(0.2, 2) * _blob(x_mm, y_mm, (25, 30), (45, 50))
    trunk *= 1 + rng.uniform(0, 2) * _blob(x_mm, y_mm, (-half * 0.5, 180), (90, 60))
    if rng.random() < 0.5:
        trunk += rng.uniform(0.3, 0.7) * _round(abs(x_mm) - half - rng.uniform(45, 70), rng.uniform(30, 42))
    return trunk * _waves(x_mm, y_mm, rng)


def _two_legs(x_mm: Plane, y_mm: Plane, rng: np.random.Generator) -> Plane:
    half, taper, gap_mm = rng.uniform(42, 75), rng.uniform(-0.12, 0.12), rng.uniform(15, 120)
    joint = rng.uniform(0, 12) * np.exp(-((y_mm / 50) ** 2))
    aside = abs(x_mm) - half - gap_mm / 2
    return _round(aside, np.maximum(half + taper * y_mm + joint - 6, 20)) * _waves(x_mm, y_mm, rng)


def _knee(x_mm: Plane, y_mm: Plane, rng: np.random.Generator) -> Plane:
    """One leg, thigh above and calf below, wider at the joint or not."""
    above, below, joint = rng.uniform(55, 85), rng.uniform(45, 68), rng.uniform(-6, 12)
    width = below + (above - below) / (1 + np.exp((y_mm + rng.uniform(-40, 40)) / rng.uniform(25, 70)))
    width = width + joint * np.exp(-(((y_mm - rng.uniform(-20, 20)) / 45) ** 2))
    return _round(x_mm, width) * _waves(x_mm, y_mm, rng)


def _bone_trunk(x_mm: Plane, y_mm: Plane, rng: np.random.Generator) -> Plane:
    """A bone scan of the trunk: spine and ribs, perhaps breast bone, shoulder blades and kidneys."""
    half = rng.uniform(120, 170)
    body = rng.uniform(0.15, 0.5) * _round(x_mm, half) ** 0.5
    step_mm, rib_mm, slant = rng.uniform(24, 34), rng.uniform(4, 7), rng.uniform(-0.5, 0.5)
    from_rib = np.mod(y_mm + slant * abs(x_mm) + 0.0015 * x_mm**2, step_mm) - step_mm / 2
    ribs = np.exp(-0.5 * (from_rib / rib_mm) ** 2) * (abs(x_mm) < half * 0.9) * rng.uniform(0.4, 1.2)
    vertebra_mm = rng.uniform(22, 32)
    spine = np.exp(-0.5 * (x_mm / rng.uniform(9, 14)) ** 2) * (1 + 0.25 * np.cos(y_mm * 2 * np.pi / vertebra_mm))
    picture = body + ribs + rng.uniform(1.2, 4) * spine
    if rng.random() < 0.5:
        for side in (-1, 1):
            picture += rng.uniform(0.3, 1.5) * _blob(x_mm, y_mm, (side * 55, 110), (22, 38))
            picture += rng.uniform(0.2, 1.0) * _blob(x_mm, y_mm, (side * 85, -110), (25, 45))
    return picture


def _bone_skull(x_mm: Plane, y_mm: Plane, rng: np.random.Generator) -> Plane:
    """A bone scan of skull and neck: a bright rim, the face, the spine of the neck, collar bones and shoulders."""
    half, top, chin = rng.uniform(68, 82), rng.uniform(-215, -185), rng.uniform(-45, -20)
    middle, tall = (top + chin - 40) / 2, (chin - 40 - top) / 2
    from_centre = np.hypot(x_mm / half, (y_mm - middle) / tall)
    rim = np.exp(-0.5 * ((from_centre - 0.93) / rng.uniform(0.05, 0.09)) ** 2) * rng.uniform(0.8, 2)
    skull = rng.uniform(0.4, 1) * (from_centre < 1) + rim
    face = rng.uniform(0.5, 2) * _blob(x_mm, y_mm, (0, chin - 35), (38, 28))
    shoulders_mm = rng.uniform(65, 100)
    neck = rng.uniform(48, 66)
    width = neck + (rng.uniform(150, 200) - neck) / (1 + np.exp(-(y_mm - shoulders_mm) / 13))
    soft = rng.uniform(0.12, 0.35) * _round(x_mm, width) * (y_mm > chin - 30)
    spine = rng.uniform(0.8, 2.5) * np.exp(-0.5 * (x_mm / rng.uniform(9, 13)) ** 2) * (y_mm > chin - 30)
    from_collar = y_mm - shoulders_mm - 18 + rng.uniform(0.05, 0.3) * abs(x_mm)
    collar = rng.uniform(0.5, 1.5) * np.exp(-0.5 * (from_collar / 7) ** 2) * (abs(x_mm) < 150)
    joints = rng.uniform(0.8, 2.5) * _blob(abs(x_mm), y_mm, (155, shoulders_mm + 25), (22, 25))
    return skull + face + soft + spine + collar + joints


# --- necks that are not where they belong ---


def _moved(low: float, high: float, *, along: int = 0, turned: bool = False) -> Callable[[np.random.Generator], Pair]:
    """A phantom moved by a share of the field: across to either side, or along (1 down, -1 up)."""

    def make(rng: np.random.Generator) -> Pair:
        zoom = float(rng.choice(simulator.ZOOMS))
        share = rng.uniform(low, high) * (along or rng.choice((-1, 1)))
        matrix_mm = simulator.MATRIX * simulator.PIXEL_MM / zoom
        field_mm = min(402.0 if along else 540.0, matrix_mm)
        pose = simulator._draw_pose

        def elsewhere(draws: np.random.Generator, stratum: str | None) -> simulator._Pose:
            usual = pose(draws, stratum)
            return simulator._Pose(
                usual.shift_x_mm + (0 if along else share * field_mm),
                usual.shift_y_mm + (share * field_mm if along else 0),
                usual.tilt_rad + (np.pi if turned else 0),
            )

        with patch.object(simulator, "_draw_pose", elsewhere):
            scan = simulator.phantom(int(rng.integers(60_000_000, 70_000_000)), stratum=f"zoom_{zoom}")
        return scan.anterior, scan.posterior, scan.spacing_mm[0]

    return make


def _masked(sides: tuple[str, ...]) -> Callable[[np.random.Generator], Pair]:
    """A phantom of which the detector saw one part only: dark from 20 mm before the bed to 20 mm behind it."""

    def make(rng: np.random.Generator) -> Pair:
        zoom = float(rng.choice(simulator.ZOOMS))
        scan = simulator.phantom(int(rng.integers(60_000_000, 70_000_000)), stratum=f"zoom_{zoom}")
        pixel_mm = scan.spacing_mm[0]
        edge, side = round(128 + rng.uniform(-20, 20) / pixel_mm), str(rng.choice(sides))
        dark = np.zeros((256, 256), bool)
        if side in ("top", "bottom"):
            dark[(slice(None, edge) if side == "top" else slice(edge, None))] = True
        else:
            dark[:, (slice(None, edge) if side == "left" else slice(edge, None))] = True
        return np.where(dark, 0, scan.anterior), np.where(dark[:, ::-1], 0, scan.posterior), pixel_mm

    return make


def _slid(rng: np.random.Generator) -> Pair:
    """A phantom slid sideways in its matrix by .35 to .6 of it, what comes in from the side left dark."""
    zoom = float(rng.choice(simulator.ZOOMS))
    scan = simulator.phantom(int(rng.integers(60_000_000, 70_000_000)), stratum=f"zoom_{zoom}")
    off, left = round(256 * rng.uniform(0.35, 0.6)), bool(rng.random() < 0.5)
    views = []
    for counts, to_left in ((scan.anterior, left), (scan.posterior, not left)):
        slid = np.zeros_like(counts)
        if to_left:
            slid[:, :-off] = counts[:, off:]
        else:
            slid[:, off:] = counts[:, :-off]
        views.append(slid)
    return views[0], views[1], scan.spacing_mm[0]


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "black": Kind(_black, frozenset({"empty_frame"}), 1.0),
        "uniform noise": Kind(_uniform_noise, FLOOD | {"clipped"}, 1.0),
        "Poisson noise": Kind(_poisson_noise, FLOOD, 1.0),
        "flood": Kind(_counted(_even), FLOOD, 1.0),
        "flood of an untuned detector": Kind(_counted(_uneven), FLOOD, 1.0),
        "bars": Kind(_counted(_bars), FLOOD, 1.0),
        "point": Kind(_counted(_point), FLOOD | NOT_THE_NECK, 0.0),
        "line": Kind(_counted(_line), FLOOD | {"out_of_training_range"}, 1.0),
        "chest": Kind(_counted(_chest), NOT_THE_NECK, 0.9),
        "two legs": Kind(_counted(_two_legs), NOT_THE_NECK, 0.8),
        "single knee": Kind(_counted(_knee), NOT_THE_NECK, 0.0),
        "bone scan: spine and ribs": Kind(_counted(_bone_trunk), NOT_THE_NECK, 0.9),
        "bone scan: skull and neck": Kind(_counted(_bone_skull), NOT_THE_NECK, 0.0),
        "neck moved sideways by .35-.45": Kind(_moved(0.35, 0.45), CUT, 0.9),
        "neck moved sideways by .45-.6": Kind(_moved(0.45, 0.6), CUT, 0.9),
        "neck slid sideways, rest dark": Kind(_slid, CUT, 0.9),
        "neck moved down: the head alone": Kind(_moved(0.45, 0.6, along=1), CUT, 0.3),
        "neck moved up: the chest alone": Kind(_moved(0.45, 0.6, along=-1), CUT, 0.6),
        "left or right half dark": Kind(_masked(("left", "right")), CUT, 0.9),
        "upper half dark": Kind(_masked(("top",)), CUT, 0.9),
        "lower half dark": Kind(_masked(("bottom",)), CUT, 0.9),
        "neck upside down": Kind(_moved(0.0, 0.0, turned=True), NOT_THE_NECK, 0.5),
    }
)
"""In the order of the page's table. A new kind goes to the end: its place is in the seed."""
