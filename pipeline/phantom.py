"""A simulated iodine-131 camera: neck phantoms with known truth, as pairs of anterior and posterior counts.

Planes, not Monte Carlo: every source is a Gaussian at a depth, attenuated in water, blurred by the collimator at its
distance, with a septal tail, a six-armed star and scatter of one width; no dead time. What is learned on it shows that
a method works, never how well it works on people. Equal arguments give equal pixels.

A network learns the quirks of the camera that it was shown, so the physics of every phantom is drawn anew and widely
(`Physics`), and `physics="other"` draws a camera whose ranges do not touch the usual ones: a held-out machine for
measuring what carries over, and a start for training that has seen nothing of the usual one.

Sources of the figures: activity, delay, uptake, number and site of foci, attenuation, resolution, sensitivity and
retention are literature values for high-energy general-purpose collimators and post-thyroidectomy scans; those of
physiologic uptake are assumed, for no 24-72 h fractions were found in print.
"""

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

MATRIX: Final = 256
PIXEL_MM: Final = 2.20903
"""Pixel spacing at zoom 1.0: 256 pixels over a field of 565.5 mm."""
ZOOMS: Final = (1.0, 1.28, 1.5, 2.0)
HALF_LIFE_H: Final = 8.02 * 24

THYROID_SITES: Final = (
    "berry_left",
    "berry_right",
    "superior_pole_left",
    "superior_pole_right",
    "paratracheal_left",
    "paratracheal_right",
    "isthmus",
    "pyramidal",
    "thyroglossal",
)
"""Uptake here is residual thyroid tissue. Everything else, a lateral node included, is "other uptake"."""

STRATA: Final = (
    "plain",
    "uptake_0.03_0.1",
    "uptake_0.1_0.3",
    "uptake_0.3_1",
    "uptake_1_up",
    "thyroglossal_only",
    "star",
    "salivary_only",
    "lateral_node",
    "oesophagus",
    "thymus",
    "contamination",
    "high_background",
    "low_dose",
    "view_missing",
    "shifted",
    "motion",
    "other_camera",
    "zoom_1.0",
    "zoom_1.28",
    "zoom_1.5",
    "zoom_2.0",
)
"""What an evaluation reports apart. Pixels of `view_missing` are ordinary; its camera sends no posterior view."""

RESIDUAL_STRATA: Final = frozenset(
    {"uptake_0.03_0.1", "uptake_0.1_0.3", "uptake_0.3_1", "uptake_1_up", "thyroglossal_only", "star"}
)
NEGATIVE_STRATA: Final = frozenset({"salivary_only", "lateral_node"})

PhysicsName = Literal["varied", "this", "other"]

_SENSITIVITY_IN_AIR = 35.0  # cps/MBq; behind 5 cm of water the 19.7 cps/MBq that this camera was measured with
_DETECTOR_MM = (402.0, 540.0)  # rows, columns: smaller than the matrix at zoom 1.0
_OTHER_PIXEL_MM = 2.3976
_MARGIN = 72  # pixels rendered around the matrix, so that sources beside the field shine into it
_GRID = MATRIX + 2 * _MARGIN
_UPTAKE_BANDS = {
    "uptake_0.03_0.1": (0.03, 0.1),
    "uptake_0.1_0.3": (0.1, 0.3),
    "uptake_0.3_1": (0.3, 1.0),
    "uptake_1_up": (1.0, 15.0),
    "star": (5.0, 15.0),
}


@dataclass(frozen=True, slots=True)
class Focus:
    """A source of uptake.

    Attributes
    ----------
    site: one of `THYROID_SITES`, or parotid_left, submandibular_left, nasal, oral, oesophagus, thymus, contamination,
        lateral_node_left and the like ("left" is the patient's left, on the right of the anterior image).
    uptake_percent: of the administered activity, corrected for decay.
    depth_mm: under the anterior skin.
    sigma_mm: its own extent (across, along the neck), before the camera blurs it.
    position: (x, y) in pixels of the anterior frame; pixel centres at whole numbers; may lie outside the field.
    """

    site: str
    uptake_percent: float
    depth_mm: float
    sigma_mm: tuple[float, float]
    position: tuple[float, float]

    @property
    def is_thyroid(self) -> bool:
        return self.site in THYROID_SITES


@dataclass(frozen=True, slots=True)
class Truth:
    """What the phantom is. `residual` means thyroid tissue in the bed, pyramidal lobe or thyroglossal tract.

    `uptake_percent` is that of thyroid tissue alone, 0.0 without; `stratum` a name of `STRATA`: the requested one, else
    the uptake band of a residual, or the most confusing physiologic focus of a phantom without.
    """

    residual: bool
    stratum: str
    uptake_percent: float
    foci: tuple[Focus, ...]
    activity_mbq: float
    delay_h: float
    duration_s: float
    zoom: float
    seed: int
    physics: PhysicsName = "varied"


@dataclass(frozen=True, slots=True)
class Physics:
    """A camera as it was on that day.

    Attributes
    ----------
    pixel_mm: at zoom 1.0.
    detector_mm: height and width of what it sees.
    sensitivity: cps/MBq in air; `attenuation_per_mm` in tissue (narrow beam .0110; less where scatter is counted too).
    fwhm_mm, fwhm_slope: resolution 50 mm before the collimator, and what it grows by for each mm further.
    geometric, star: shares of counts that came through the holes and through the septa along six arms; the rest is a
        broad tail of `tail_mm`. star_mm, arm_rad, angle: reach, width and direction of the arms.
    scatter, scatter_mm: counts in the photopeak that were scattered, as a share of the others, and their sigma.
    drift_mm: how far the patient slid while it counted, (x, y); sudden: at once, leaving two images, or steadily.
    """

    pixel_mm: float
    detector_mm: tuple[float, float]
    sensitivity: float
    attenuation_per_mm: float
    fwhm_mm: float
    fwhm_slope: float
    geometric: float
    star: float
    star_mm: float
    arm_rad: float
    angle: float
    tail_mm: float
    scatter: float
    scatter_mm: float
    drift_mm: tuple[float, float]
    sudden: bool


@dataclass(frozen=True, slots=True, eq=False)
class Phantom:
    """A neck as the camera counted it.

    `anterior`, `posterior`: photopeak counts (327.6-400.4 keV), shape (256, 256), uint16; the posterior one mirrored
    left-right against the anterior, as a camera shows it. `spacing_mm` is (row, column).
    """

    anterior: NDArray[np.uint16]
    posterior: NDArray[np.uint16]
    spacing_mm: tuple[float, float]
    truth: Truth


@dataclass(frozen=True, slots=True)
class _Source:
    """A focus in patient coordinates: mm from the thyroid bed's centre, x to the patient's left, y downwards."""

    site: str
    uptake_percent: float
    x_mm: float
    y_mm: float
    depth_mm: float
    sigma_mm: tuple[float, float]


@dataclass(frozen=True, slots=True)
class _Pose:
    """How the neck lies in the field: image = rotate(tilt) @ patient + shift, in mm from the field's centre."""

    shift_x_mm: float
    shift_y_mm: float
    tilt_rad: float

    def place(self, x_mm: float, y_mm: float) -> tuple[float, float]:
        cosine, sine = np.cos(self.tilt_rad), np.sin(self.tilt_rad)
        return (
            float(cosine * x_mm - sine * y_mm + self.shift_x_mm),
            float(sine * x_mm + cosine * y_mm + self.shift_y_mm),
        )


@dataclass(frozen=True, slots=True)
class _Body:
    """Sizes of the outline in mm."""

    neck_thickness: float
    neck_half_width: float
    head_half_width: float
    shoulder_half_width: float
    shoulder_y: float
    trachea: float
    vessels: float
    mediastinum: float


# Mean position (x, y, depth), half-range of each, range of sigma; mm. x is mirrored for the right side.
_Place = tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float]]
_THYROID_PLACES: dict[str, _Place] = {
    "berry": ((12.0, 2.0, 28.0), (3.0, 4.0, 4.0), (2.5, 5.0)),
    "superior_pole": ((17.0, -21.0, 23.0), (4.0, 5.0, 5.0), (2.5, 6.0)),
    "paratracheal": ((17.0, 3.0, 23.0), (4.0, 10.0, 6.0), (2.5, 8.0)),
    "isthmus": ((0.0, 8.0, 17.0), (5.0, 4.0, 2.0), (2.5, 6.0)),
    "pyramidal": ((0.0, -15.0, 18.0), (6.0, 7.0, 3.0), (2.5, 6.0)),
    "thyroglossal": ((0.0, -42.0, 20.0), (4.0, 14.0, 5.0), (2.5, 6.0)),
}
_SITE_WEIGHTS = np.array([0.435, 0.435, 0.395, 0.395, 0.335, 0.335, 0.54, 0.46, 0.5])  # shares of patients, by side
_PHYSIOLOGIC_PLACES: dict[str, _Place] = {
    "parotid": ((56.0, -92.0, 30.0), (6.0, 12.0, 8.0), (9.0, 14.0)),
    "submandibular": ((29.0, -68.0, 25.0), (4.0, 8.0, 5.0), (6.0, 10.0)),
    "nasal": ((0.0, -140.0, 18.0), (4.0, 10.0, 8.0), (7.0, 13.0)),
    "oral": ((0.0, -98.0, 32.0), (8.0, 8.0, 12.0), (9.0, 16.0)),
    "oesophagus": ((3.0, 40.0, 57.0), (7.0, 42.0, 8.0), (3.0, 5.0)),  # reaches up behind the bed
    "thymus": ((0.0, 90.0, 40.0), (8.0, 14.0, 10.0), (10.0, 18.0)),
    "contamination": ((0.0, 10.0, 0.0), (60.0, 80.0, 0.0), (2.5, 8.0)),
    "lateral_node": ((37.0, -5.0, 30.0), (12.0, 42.0, 9.0), (3.0, 7.0)),
}
# Median in % and geometric spread: 90 % between .02 and .1 % but for these, which are several foci or hotter. Assumed.
_PHYSIOLOGIC_UPTAKE = {"lateral_node": (0.12, 2.5), "contamination": (0.08, 2.2), "oesophagus": (0.08, 2.0)}
_DRIBBLE: _Place = ((0.0, 0.0, 0.0), (25.0, 30.0, 0.0), (2.5, 8.0))
_CONFUSERS = ("oesophagus", "thymus", "contamination", "lateral_node")
_PHYSIOLOGIC_CHANCES = (
    ("parotid_left", 0.6),
    ("parotid_right", 0.6),
    ("submandibular_left", 0.5),
    ("submandibular_right", 0.5),
    ("nasal", 0.7),
    ("oral", 0.6),
    ("oesophagus", 0.12),
    ("thymus", 0.06),
    ("contamination", 0.05),
    ("lateral_node_left", 0.03),
    ("lateral_node_right", 0.03),
)


def phantom(
    seed: int,
    *,
    residual: bool | None = None,
    stratum: str | None = None,
    physics: PhysicsName = "varied",
    confusers: float = 1.0,
) -> Phantom:
    """Simulates one neck.

    Parameters
    ----------
    seed: any whole number >= 0; equal arguments give equal pixels.
    residual: whether there is residual thyroid tissue; None draws it with probability one half.
    stratum: a name of `STRATA` to simulate; None draws from the whole population.
    physics: "varied" draws the camera around that of the paper, widely; "this" is that camera as it was measured;
        "other" another one, outside of all the usual ranges, as the stratum `other_camera` is too.
    confusers: how many times as often as in the population oesophagus, thymus, contamination and nodes take up iodine,
        with and without residual tissue alike; at most three times in five.

    Raises
    ------
    ValueError: an unknown stratum, or one that contradicts `residual` (a faint remnant without a remnant).
    """
    if seed < 0:
        raise ValueError(f"the seed of a phantom is {seed}; give a whole number from 0 up")
    if stratum is not None and stratum not in STRATA:
        raise ValueError(f"unknown stratum {stratum!r}; known are {', '.join(STRATA)}")
    rng = np.random.default_rng([131, seed])
    coin = bool(rng.random() < 0.5)
    fixed = True if stratum in RESIDUAL_STRATA else False if stratum in NEGATIVE_STRATA else None
    if residual is None:
        residual = coin if fixed is None else fixed
    elif fixed is not None and fixed is not residual:
        raise ValueError(f"stratum {stratum!r} exists only {'with' if fixed else 'without'} residual tissue")

    if stratum == "other_camera":
        physics = "other"
    camera = _draw_physics(np.random.default_rng([133, seed]), physics, moves=stratum == "motion")
    zoom = _draw_zoom(rng, stratum)
    pixel_mm = camera.pixel_mm / zoom
    pose = _draw_pose(rng, stratum)
    body = _Body(
        neck_thickness=rng.uniform(105, 140),
        neck_half_width=rng.uniform(48, 72),
        head_half_width=rng.uniform(62, 88),
        shoulder_half_width=rng.uniform(150, 220),
        shoulder_y=rng.uniform(60, 110),
        trachea=rng.uniform(0.0, 0.3),
        vessels=rng.uniform(0.0, 0.35),
        mediastinum=rng.uniform(0.0, 0.6),
    )
    sources = (_draw_thyroid(rng, stratum) if residual else []) + _draw_physiologic(rng, stratum, confusers)

    gaps_mm = rng.uniform(20, 60), rng.uniform(20, 50)
    background = _background(rng, body, pose, camera, pixel_mm)
    field = _field(camera, pixel_mm)
    septa = _penetration(camera, pixel_mm)
    views = []
    for mirrored, gap_mm in zip((False, True), gaps_mm, strict=True):
        transfer = septa * _motion(camera, pixel_mm, mirrored=mirrored)
        # A source carries the blur of its own depth; the body, which lies at all depths, that of its middle.
        whole = transfer * _gaussian(resolution_mm(camera, gap_mm + body.neck_thickness / 2) / 2.3548, pixel_mm)
        foci_image = _render(sources, pose, camera, pixel_mm, body.neck_thickness, gap_mm, posterior=mirrored)
        diffuse = background[:, ::-1] if mirrored else background
        views.append([_spread(foci_image, transfer) * field, _spread(diffuse, whole) * field])

    activity_mbq, delay_h, duration_s, retention = _draw_exposure(
        rng,
        stratum,
        camera.sensitivity,
        foci_sum=sum(float(foci.sum()) for foci, _ in views),
        background_sum=sum(float(diffuse.sum()) for _, diffuse in views),
    )
    exposure = activity_mbq * _counts_per_mbq(camera.sensitivity, delay_h, duration_s) * rng.lognormal(0.0, 0.08)
    counts = [
        np.minimum(rng.poisson(exposure * (foci + retention * diffuse)), 65535).astype(np.uint16)
        for foci, diffuse in views
    ]
    centre = (MATRIX - 1) / 2
    foci_truth = tuple(
        Focus(
            site=source.site,
            uptake_percent=source.uptake_percent,
            depth_mm=source.depth_mm,
            sigma_mm=source.sigma_mm,
            position=(centre + at[0] / pixel_mm, centre + at[1] / pixel_mm),
        )
        for source in sources
        for at in (pose.place(source.x_mm, source.y_mm),)
    )
    uptake_percent = sum(focus.uptake_percent for focus in foci_truth if focus.is_thyroid)
    truth = Truth(
        residual=residual,
        stratum=stratum or _natural_stratum(residual, uptake_percent, foci_truth),
        uptake_percent=float(uptake_percent),
        foci=foci_truth,
        activity_mbq=activity_mbq,
        delay_h=delay_h,
        duration_s=duration_s,
        zoom=zoom,
        seed=seed,
        physics=physics,
    )
    return Phantom(anterior=counts[0], posterior=counts[1], spacing_mm=(pixel_mm, pixel_mm), truth=truth)


def scatter_windows(
    phantom: Phantom,
) -> tuple[tuple[NDArray[np.uint16], NDArray[np.uint16]], tuple[NDArray[np.uint16], NDArray[np.uint16]]]:
    """The 6 % windows below and above the photopeak: (lower anterior, posterior), (upper anterior, posterior).

    Same shape, type and mirroring as the photopeak frames. Scattered photons have lost the sharp edges: the windows are
    the photopeak blurred by 20 mm, 13 % and 6 % of its counts (the upper one from the 637 and 723 keV lines), with
    counting noise of their own.
    """
    rng = np.random.default_rng([132, phantom.truth.seed])
    pixel_mm = phantom.spacing_mm[0]
    transfer = _gaussian(20.0, pixel_mm)
    blurred = []
    for counts in (phantom.anterior, phantom.posterior):
        field = np.outer(counts.any(axis=1), counts.any(axis=0))
        padded = np.pad(counts.astype(np.float64), _MARGIN)
        smooth = np.fft.irfft2(np.fft.rfft2(padded) * transfer, s=padded.shape)
        blurred.append(np.maximum(smooth[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN], 0.0) * field)
    anterior, posterior = blurred
    noisy = [
        (rng.poisson(share * anterior).astype(np.uint16), rng.poisson(share * posterior).astype(np.uint16))
        for share in (0.13, 0.06)
    ]
    return noisy[0], noisy[1]


def _draw_physics(rng: np.random.Generator, name: PhysicsName, *, moves: bool) -> Physics:
    """Ranges: in the sources, this camera's figures; around them what its siblings and other days would show."""
    drift = (0.0, 0.0)
    if moves or (name == "varied" and rng.random() < 0.15):
        length, angle = rng.uniform(5, 14) if moves else rng.uniform(2, 8), rng.uniform(0, 2 * np.pi)
        drift = (float(length * np.cos(angle)), float(length * np.sin(angle)))

    def between(this: tuple[float, float], varied: tuple[float, float], other: tuple[float, float]) -> float:
        return float(rng.uniform(*{"this": this, "varied": varied, "other": other}[name]))

    return Physics(
        pixel_mm=_OTHER_PIXEL_MM if name == "other" else PIXEL_MM,
        detector_mm=(
            between((402, 402), (380, 410), (385, 390)),
            between((540, 540), (515, 545), (530, 535)),
        ),
        sensitivity=between((33, 37), (28, 60), (62, 80)),
        attenuation_per_mm=between((0.0110, 0.0110), (0.0098, 0.0115), (0.0090, 0.0096)),
        fwhm_mm=between((8.4, 8.6), (7.4, 10.2), (10.6, 12.0)),
        fwhm_slope=between((0.062, 0.064), (0.052, 0.075), (0.078, 0.090)),
        geometric=between((0.40, 0.65), (0.40, 0.75), (0.28, 0.38)),
        star=between((0.12, 0.25), (0.08, 0.25), (0.27, 0.36)),
        star_mm=between((25, 45), (22, 50), (52, 60)),
        arm_rad=float(np.deg2rad(between((5, 9), (4, 10), (11, 13)))),
        angle=float(rng.uniform(0, np.pi / 3)),
        tail_mm=between((50, 80), (40, 90), (92, 110)),
        scatter=between((0.10, 0.20), (0.05, 0.35), (0.38, 0.55)),
        scatter_mm=between((28, 36), (22, 45), (46, 55)),
        drift_mm=drift,
        sudden=bool(rng.random() < 0.5),
    )


def _draw_zoom(rng: np.random.Generator, stratum: str | None) -> float:
    drawn = float(rng.choice(ZOOMS, p=(0.55, 0.2, 0.15, 0.1)))
    if stratum is not None and stratum.startswith("zoom_"):
        return float(stratum.removeprefix("zoom_"))
    return drawn


def _draw_pose(rng: np.random.Generator, stratum: str | None) -> _Pose:
    if stratum == "shifted":
        radius, angle = rng.uniform(15, 30), rng.uniform(0, 2 * np.pi)
        return _Pose(float(radius * np.cos(angle)), float(radius * np.sin(angle)), np.deg2rad(rng.uniform(-12, 12)))
    x_mm, y_mm = np.clip(rng.normal(0.0, (9.0, 14.0)), -30, 30)
    return _Pose(float(x_mm), float(y_mm), np.deg2rad(np.clip(rng.normal(0.0, 3.0), -10, 10)))


def _draw_source(rng: np.random.Generator, site: str, place: _Place, uptake_percent: float) -> _Source:
    (x_mm, y_mm, depth_mm), ranges, (smallest, largest) = place
    dx, dy, dz = rng.uniform(-1, 1, 3) * ranges
    sigma = rng.uniform(smallest, largest)
    along = sigma * (rng.uniform(3.5, 6.0) if site == "oesophagus" else rng.uniform(0.85, 1.3))
    return _Source(
        site=site,
        uptake_percent=float(uptake_percent),
        x_mm=float((x_mm + dx) * (-1 if site.endswith("_right") else 1)),
        y_mm=float(y_mm + dy),
        depth_mm=float(depth_mm + dz),
        sigma_mm=(float(sigma), float(along)),
    )


def _draw_thyroid(rng: np.random.Generator, stratum: str | None) -> list[_Source]:
    total = float(np.clip(0.6 * np.exp(np.log(3.5) * rng.normal()), 0.03, 15.0))
    if stratum in _UPTAKE_BANDS:
        low, high = _UPTAKE_BANDS[stratum]
        total = float(np.exp(rng.uniform(np.log(low), np.log(high))))
        total = min(max(total, low), np.nextafter(high, 0.0))
    count = 1 + min(int(rng.poisson(1.0)), 4)
    if stratum == "thyroglossal_only":
        sites = ["thyroglossal"] * min(count, 2)
    else:
        weights = _SITE_WEIGHTS / _SITE_WEIGHTS.sum()
        sites = [str(site) for site in rng.choice(THYROID_SITES, size=count, replace=False, p=weights)]
    shares = rng.dirichlet(np.full(len(sites), 1.5))
    return [
        _draw_source(rng, site, _THYROID_PLACES[_sideless(site)], total * share)
        for site, share in zip(sites, shares, strict=True)
    ]


def _draw_physiologic(rng: np.random.Generator, stratum: str | None, confusers: float) -> list[_Source]:
    forced: dict[str, bool] = {}
    if stratum in ("plain", "salivary_only"):
        # The stratum has to mean its name.
        forced = {site: False for site, _ in _PHYSIOLOGIC_CHANCES if _sideless(site) in _CONFUSERS}
    if stratum == "salivary_only":
        forced[str(rng.choice(["parotid_left", "parotid_right", "submandibular_left", "submandibular_right"]))] = True
    if stratum == "lateral_node":
        forced[str(rng.choice(["lateral_node_left", "lateral_node_right"]))] = True
    if stratum in ("oesophagus", "thymus", "contamination"):
        forced[stratum] = True
    sources = []
    for site, chance in _PHYSIOLOGIC_CHANCES:
        more = confusers if _sideless(site) in _CONFUSERS else 1.0
        present = bool(rng.random() < min(chance * more, max(chance, 0.6)))
        if not forced.get(site, present):
            continue
        median, spread = _PHYSIOLOGIC_UPTAKE.get(_sideless(site), (0.045, 1.63))
        uptake_percent = median * np.exp(np.log(spread) * rng.normal())
        several = _sideless(site) in ("lateral_node", "contamination", "oesophagus")
        for share in rng.dirichlet(np.full(1 + int(rng.poisson(0.7)), 2.0)) if several else (1.0,):
            place = _PHYSIOLOGIC_PLACES[_sideless(site)]
            if site == "contamination" and rng.random() < 0.5:
                place = _DRIBBLE  # half of it where it deceives: on the skin before the bed
            sources.append(_draw_source(rng, site, place, uptake_percent * share))
    return sources


def _sideless(site: str) -> str:
    return site.removesuffix("_left").removesuffix("_right")


def _draw_exposure(
    rng: np.random.Generator, stratum: str | None, sensitivity: float, *, foci_sum: float, background_sum: float
) -> tuple[float, float, float, float]:
    """Draws activity (MBq), delay (h), duration (s) and the share of the activity retained in the field.

    A remnant adds counts, and a class that is told by its total counts teaches a network nothing. So several
    examinations are drawn, and the one is taken whose total comes nearest to a target that knows nothing of the class.
    """
    count = 48
    activity = rng.choice((74.0, 111.0, 148.0, 185.0), size=count, p=(0.1, 0.15, 0.15, 0.6))
    delay = rng.choice((24.0, 48.0, 72.0), size=count, p=(0.3, 0.5, 0.2))
    duration = rng.choice((300.0, 360.0, 420.0, 480.0, 540.0, 600.0), size=count)
    whole_body = np.select([delay == 24.0, delay == 48.0], [0.20, 0.135], 0.065) * rng.lognormal(0.0, 0.35, count)
    retention = whole_body * rng.uniform(0.18, 0.32, count)
    target_spread = rng.lognormal(0.0, 0.55)
    if stratum == "high_background":
        retention *= rng.uniform(2.0, 3.5)
    if stratum == "low_dose":
        if rng.random() < 0.5:
            activity = np.full(count, rng.uniform(15.0, 45.0))
        else:
            duration = np.full(count, rng.uniform(45.0, 120.0))
    if stratum in ("high_background", "low_dose", "star"):
        pick = 0  # these are defined by their counts; nothing to balance
    else:
        typical = 185.0 * _counts_per_mbq(_SENSITIVITY_IN_AIR, 48.0, 450.0)
        target = typical * (0.027 * background_sum + 0.0042) * target_spread
        total = activity * _counts_per_mbq(sensitivity, delay, duration) * (foci_sum + retention * background_sum)
        pick = int(np.argmin(np.abs(np.log(total / target))))
    return float(activity[pick]), float(delay[pick]), float(duration[pick]), float(retention[pick])


def _counts_per_mbq(
    sensitivity: float, delay_h: float | NDArray[np.float64], duration_s: float | NDArray[np.float64]
) -> NDArray[np.float64]:
    """Counts in air for each MBq administered, were all of it in front of the camera at that time."""
    return np.asarray(sensitivity * np.exp2(-np.asarray(delay_h) / HALF_LIFE_H) * duration_s)


def _natural_stratum(residual: bool, uptake_percent: float, foci: tuple[Focus, ...]) -> str:
    sites = {_sideless(focus.site) for focus in foci}
    if residual:
        if sites.intersection(_THYROID_PLACES) == {"thyroglossal"}:
            return "thyroglossal_only"
        if uptake_percent > 5.0:
            return "star"
        bands = ("uptake_0.03_0.1", "uptake_0.1_0.3", "uptake_0.3_1")
        return next((band for band in bands if uptake_percent < _UPTAKE_BANDS[band][1]), "uptake_1_up")
    for name in ("lateral_node", "contamination", "oesophagus", "thymus"):
        if name in sites:
            return name
    return "salivary_only" if sites.intersection({"parotid", "submandibular"}) else "plain"


def _axis_mm(pixel_mm: float) -> NDArray[np.float64]:
    """Pixel centres of the rendered grid, mm from the field's centre."""
    return np.asarray((np.arange(_GRID) - (_GRID - 1) / 2) * pixel_mm, dtype=np.float64)


def _field(camera: Physics, pixel_mm: float) -> NDArray[np.float64]:
    """1 where the detector sees, 0 in the matrix beyond its edge; shape (256, 256)."""
    axis = np.abs((np.arange(MATRIX) - (MATRIX - 1) / 2) * pixel_mm)
    rows, columns = (axis <= extent / 2 for extent in camera.detector_mm)
    return np.outer(rows, columns).astype(np.float64)


def _render(
    sources: list[_Source],
    pose: _Pose,
    camera: Physics,
    pixel_mm: float,
    thickness_mm: float,
    gap_mm: float,
    *,
    posterior: bool,
) -> NDArray[np.float64]:
    """Fractions of the administered activity as they are counted in each pixel, behind tissue and collimator holes."""
    axis = _axis_mm(pixel_mm)
    image = np.zeros((_GRID, _GRID))
    for source in sources:
        if posterior and source.site == "contamination":
            continue  # saliva on the skin: the neck hides it from behind
        tissue_mm = thickness_mm - source.depth_mm if posterior else source.depth_mm
        hole = resolution_mm(camera, gap_mm + tissue_mm) / 2.3548
        across, along = (float(np.hypot(sigma, hole)) for sigma in source.sigma_mm)
        x_mm, y_mm = pose.place(source.x_mm, source.y_mm)
        if posterior:
            x_mm = -x_mm
        profile_x = np.exp(-0.5 * ((axis - x_mm) / across) ** 2)
        profile_y = np.exp(-0.5 * ((axis - y_mm) / along) ** 2)
        weight = source.uptake_percent / 100 * np.exp(-camera.attenuation_per_mm * tissue_mm)
        image += np.outer(profile_y * (weight * pixel_mm**2 / (2 * np.pi * across * along)), profile_x)
    return image


def resolution_mm(camera: Physics, distance_mm: float) -> float:
    """FWHM through the holes at a distance from the collimator's face; 8.5 / 11.6 / 14.8 mm at 5 / 10 / 15 cm here."""
    return camera.fwhm_mm + (distance_mm - 50.0) * camera.fwhm_slope


def _background(
    rng: np.random.Generator, body: _Body, pose: _Pose, camera: Physics, pixel_mm: float
) -> NDArray[np.float64]:
    """Activity in blood and soft tissue, per unit of it in the field; the same from both sides.

    A chord of uniform activity of thickness T is seen as (1 - exp(-mu T)) / mu, whichever side looks at it.
    """
    axis = _axis_mm(pixel_mm)
    x_image, y_image = np.meshgrid(axis - pose.shift_x_mm, axis - pose.shift_y_mm)
    cosine, sine = np.cos(pose.tilt_rad), np.sin(pose.tilt_rad)
    x_mm, y_mm = cosine * x_image + sine * y_image, -sine * x_image + cosine * y_image
    chord_mm = _chord_mm(body, x_mm, y_mm)
    seen = (1 - np.exp(-camera.attenuation_per_mm * chord_mm)) / camera.attenuation_per_mm
    # Air in the windpipe, blood in the great vessels beside it and in the upper chest.
    seen *= 1 - body.trachea * np.exp(-0.5 * (x_mm / 9.0) ** 2) * (y_mm > -40)
    seen *= 1 + body.vessels * np.exp(-0.5 * ((np.abs(x_mm) - 24.0) / 7.0) ** 2)
    seen *= 1 + body.mediastinum * np.exp(-0.5 * (x_mm / 45.0) ** 2 - 0.5 * ((y_mm - 130.0) / 35.0) ** 2)

    uneven = np.zeros_like(seen)
    for _ in range(6):
        wave_mm, angle, phase = rng.uniform(60, 200), rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
        uneven += np.cos((x_mm * np.cos(angle) + y_mm * np.sin(angle)) * 2 * np.pi / wave_mm + phase)
    seen *= np.exp(rng.uniform(0.03, 0.15) * uneven)
    # The retained share is that of the whole unzoomed field: what a zoom cuts off is lost, not concentrated.
    step_mm = 6.0
    y_whole, x_whole = (np.arange(-extent / 2, extent / 2, step_mm) for extent in _DETECTOR_MM)
    volume_mm3 = _chord_mm(body, *np.meshgrid(x_whole, y_whole)).sum() * step_mm**2
    return np.asarray(seen * pixel_mm**2 / volume_mm3)


def _chord_mm(body: _Body, x_mm: NDArray[np.float64], y_mm: NDArray[np.float64]) -> NDArray[np.float64]:
    """How much body a ray from front to back crosses at (x, y)."""
    head = np.sqrt(np.maximum(1 - ((y_mm + 155) / 115) ** 2, 0.0)) * body.head_half_width
    shoulders = 1 / (1 + np.exp(-(y_mm - body.shoulder_y) / 13.0))
    trunk = np.where(
        y_mm < -115, 0.0, body.neck_half_width + shoulders * (body.shoulder_half_width - body.neck_half_width)
    )
    half_width = np.maximum(head, trunk)
    middle_mm = body.neck_thickness * (1 + 0.45 * shoulders + 0.35 * (head > trunk)) * (half_width > 1)
    return np.asarray(middle_mm * np.sqrt(np.maximum(1 - (x_mm / np.maximum(half_width, 1.0)) ** 2, 0.0)))


def _penetration(camera: Physics, pixel_mm: float) -> NDArray[np.complex128]:
    """Transfer function of collimator septa, scatter and motion.

    Holes (a point), a six-armed star and a broad tail sum to 1; scattered counts come on top, as they do in a window.
    """
    axis = np.fft.fftfreq(_GRID, 1 / _GRID) * pixel_mm
    x_mm, y_mm = np.meshgrid(axis, axis)
    radius_mm = np.hypot(x_mm, y_mm)
    reach = radius_mm <= _MARGIN * 2 * pixel_mm  # further out it would come back in on the other side
    from_arm = np.mod(np.arctan2(y_mm, x_mm) - camera.angle + np.pi / 6, np.pi / 3) - np.pi / 6
    arms = np.exp(-0.5 * (from_arm / camera.arm_rad) ** 2 - radius_mm / camera.star_mm)
    arms *= reach / np.maximum(radius_mm, 2.0)
    tail = np.exp(-radius_mm / camera.tail_mm) / np.maximum(radius_mm, 10.0) * reach
    scattered = np.exp(-0.5 * (radius_mm / camera.scatter_mm) ** 2)
    kernel = camera.star * arms / arms.sum() + (1 - camera.geometric - camera.star) * tail / tail.sum()
    kernel += camera.scatter * scattered / scattered.sum()
    kernel[0, 0] += camera.geometric
    return np.asarray(np.fft.rfft2(kernel), dtype=np.complex128)


def _motion(camera: Physics, pixel_mm: float, *, mirrored: bool) -> NDArray[np.float64]:
    """Transfer function of a patient who slid: a steady drift is a line, a sudden one two images."""
    x_mm, y_mm = camera.drift_mm[0] * (-1 if mirrored else 1), camera.drift_mm[1]
    phase = (np.fft.rfftfreq(_GRID)[None, :] * x_mm + np.fft.fftfreq(_GRID)[:, None] * y_mm) / pixel_mm
    return np.asarray(np.cos(np.pi * phase) if camera.sudden else np.sinc(phase), dtype=np.float64)


def _gaussian(sigma_mm: float, pixel_mm: float) -> NDArray[np.float64]:
    """Transfer function of a Gaussian blur."""
    down, across = (
        np.exp(-2 * (np.pi * sigma_mm / pixel_mm * frequency) ** 2)
        for frequency in (np.fft.fftfreq(_GRID), np.fft.rfftfreq(_GRID))
    )
    return np.asarray(np.outer(down, across), dtype=np.float64)


def _spread(image: NDArray[np.float64], transfer: NDArray[np.complex128]) -> NDArray[np.float64]:
    """The image behind the septa, cut to the matrix: shape (256, 256), >= 0."""
    spread = np.asarray(np.fft.irfft2(np.fft.rfft2(image) * transfer, s=image.shape), dtype=np.float64)
    return np.asarray(np.maximum(spread[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN], 0.0))
