"""What a doctor sees in OHIF: scan, picture and report of a present, an absent and a not analysed scan, and a mask."""

import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dicom_node import offline
from dicom_node.settings import Settings
from pipeline import wording
from pipeline.analyse import load_model
from pipeline.camera import examination, expose
from pipeline.phantom import phantom

_THUMBNAILS = "[...document.querySelectorAll('[data-cy^=study-browser-thumbnail]')]"
_LABEL = "Probability of residual thyroid tissue: "


def _open_study(viewer: Any, browser: Any, study_instance_uid: str, series: int) -> None:
    browser.call("Page.navigate", url="about:blank")
    browser.call("Page.navigate", url=f"{viewer.url}/viewer?StudyInstanceUIDs={study_instance_uid}")
    browser.wait(
        f"{_THUMBNAILS}.length == {series} && !!document.querySelector('.cornerstone-canvas')"
        " && document.querySelector('[data-cy=viewport-grid]').innerText.includes('W:')",
        "the study opened",
    )


def _open(browser: Any, modality: str, says: str) -> None:
    """Open a series as a doctor does, by a double click on its thumbnail, and wait for what it says."""
    place = browser.evaluate(
        f"(() => {{ const box = {_THUMBNAILS}.find(one => one.innerText.split('\\n').map(part => part.trim())"
        f".includes('{modality}')).getBoundingClientRect();"
        " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
    )
    browser.double_click(*place)
    browser.wait(
        f"document.querySelector('[data-cy=viewport-grid]').innerText.includes({says!r})", f"{modality}: {says}"
    )


def _viewport(browser: Any, path: Path) -> NDArray[np.uint8]:
    left, top, width, height = browser.evaluate(
        "(() => { const box = document.querySelector('.cornerstone-canvas').getBoundingClientRect();"
        " return [box.x, box.y, box.width, box.height].map(Math.round); })()"
    )
    # Text of the viewer itself stands along the edges.
    return browser.screenshot(path)[top + 80 : top + height - 80, left + 20 : left + width - 40]


def test_ohif_shows_scan_picture_and_probability_and_tells_present_from_absent(
    viewer: Any, browser: Any, tmp_path: Path
) -> None:
    settings = Settings()
    model = load_model(settings.model.weights)
    seen: dict[str, NDArray[np.uint8]] = {}
    for seed, residual in ((2, True), (3, False)):
        views = expose(
            phantom(seed, residual=residual, stratum="uptake_1_up" if residual else None),
            examination(seed),
            "two_frames",
        )
        source = tmp_path / f"{seed}.dcm"
        views[0].save_as(source, enforce_file_format=True)
        (verdict,) = offline.analyse_files([source], model, settings, tmp_path / "results")
        assert isinstance(verdict, offline.Verdict)
        finding, probability = verdict.answer.finding, verdict.answer.probability
        assert probability is not None
        assert finding == ("present" if residual else "absent")
        for path in (source, *verdict.files):
            viewer.archive.store(path.read_bytes())

        _open_study(viewer, browser, views[0].StudyInstanceUID, 3)
        nm = _viewport(browser, tmp_path / f"{finding}-nm.png")
        _open(browser, "OT", "Remnant I-131 neck AI result")
        seen[finding] = _viewport(browser, tmp_path / f"{finding}-sc.png")
        _open(browser, "SR", f"{_LABEL}{wording.percent(probability)} %")
        assert not re.search(r"\b(100|0)(\.0+)? %", browser.text())
        report = _viewport(browser, tmp_path / f"{finding}-sr.png")
        for what, pixels in (("NM", nm), ("SC", seen[finding]), ("SR", report)):
            assert (pixels.max(axis=2) > 100).sum() > 200, f"{what} of {finding} is black"
        # The outline is drawn over the image: green, which a grey image cannot be.
        red, green, _ = (report[..., channel].astype(int) for channel in range(3))
        assert (green - red > 100).sum() > 50
    different = np.abs(seen["present"].astype(int) - seen["absent"].astype(int)).max(axis=2) > 50
    assert different.mean() > 0.01


def test_ohif_shows_why_a_scan_was_not_analysed_in_words_and_nothing_that_reads_as_negative(
    viewer: Any, browser: Any, tmp_path: Path
) -> None:
    settings = Settings()
    (view,) = expose(phantom(4), examination(4), "anterior_only")
    source = tmp_path / "scan.dcm"
    view.save_as(source, enforce_file_format=True)
    (verdict,) = offline.analyse_files([source], load_model(settings.model.weights), settings, tmp_path / "results")
    assert isinstance(verdict, offline.Verdict)
    assert verdict.answer.reason == "view_missing"
    for path in (source, *verdict.files):
        viewer.archive.store(path.read_bytes())

    _open_study(viewer, browser, view.StudyInstanceUID, 3)
    _open(browser, "OT", "NOT ANALYSED")
    picture = _viewport(browser, tmp_path / "note-sc.png").astype(int)
    red = (picture[..., 0] > 150) & (picture[..., 1:].max(axis=2) < 80)
    assert red.mean() > 0.05, "the banner of a scan not analysed is not there"
    _open(browser, "SR", "No result: scan not analysed for residual thyroid tissue")
    browser.screenshot(tmp_path / "note-sr.png")
    said = browser.evaluate("document.querySelector('[data-cy=viewport-grid]').innerText")
    for sentence in (
        "No algorithms succeeded; without findings",
        "Not analysed: a required view was not received.",
        "This is not a negative result.",
        "Not for diagnosis without review by a physician.",
    ):
        assert sentence in said
    assert not re.search(r"\b(absent|present|undetermined|probability)\b|%", said, re.IGNORECASE)
    assert "Something went wrong" not in browser.text()


def test_ohif_shows_the_mask_of_the_anterior_view_on_its_own_pixels_and_not_mirrored(
    viewer: Any, browser: Any, cases: ModuleType, tmp_path: Path
) -> None:
    made = cases.make_case("present", who=examination(20))
    view = next(one for one in made.outcome.views if one.image.view == "anterior")
    mask = np.zeros_like(view.mask)
    mask[100:120, 60:80] = True
    mask[112:120, 50:60] = True  # a foot, so that no mirror image of it is the same
    moved = replace(view, mask=mask, activation=None)
    views = tuple(moved if one is view else one for one in made.outcome.views)
    made = replace(made, outcome=replace(made.outcome, views=views))
    for ds in made.sources:
        buffer = BytesIO()
        ds.save_as(buffer, enforce_file_format=True)
        viewer.archive.store(buffer.getvalue())
    viewer.archive.store(made.render("seg").data)

    _open_study(viewer, browser, made.sources[0].StudyInstanceUID, 2)
    _open(browser, "SEG", "Do you want to open this Segmentation?")
    left, top, width, height = browser.evaluate(
        "(() => { const box = document.querySelector('.cornerstone-canvas').getBoundingClientRect();"
        " return [box.x, box.y, box.width, box.height]; })()"
    )
    # The viewer fits the view into its canvas: where each native pixel lies on the screen, by its centre.
    rows, columns = mask.shape
    scale = min(width / columns, height / rows)
    x = np.rint(left + width / 2 + (np.arange(columns) + 0.5 - columns / 2) * scale).astype(int)
    y = np.rint(top + height / 2 + (np.arange(rows) + 0.5 - rows / 2) * scale).astype(int)

    def shown() -> NDArray[np.bool_]:
        screen = browser.screenshot(tmp_path / "seg.png").astype(int)
        seen = screen[np.clip(y, 0, len(screen) - 1)[:, None], np.clip(x, 0, screen.shape[1] - 1)[None, :]]
        red = np.asarray(seen[..., 0] - seen[..., 1:].max(axis=2) > 50)
        red[: rows // 5] = red[-rows // 5 :] = False  # the viewer's own bars
        return red

    def overlap(red: NDArray[np.bool_], expected: NDArray[np.bool_]) -> float:
        return float((red & expected).sum() / (red | expected).sum())

    # The viewer asks whether to open the mask before it has drawn it.
    red = browser.until(shown, lambda red: overlap(red, mask) > 0.85, "the mask lies on its own pixels")
    assert overlap(red, mask[:, ::-1]) == 0
