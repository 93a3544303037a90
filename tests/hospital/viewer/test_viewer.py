"""What a doctor sees: source, picture and report of a present and of an absent scan in OHIF."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dicom_node import offline
from dicom_node.settings import Settings
from pipeline.analyse import load_model
from pipeline.camera import examination, expose
from pipeline.phantom import phantom

_THUMBNAILS = "[...document.querySelectorAll('[data-cy^=study-browser-thumbnail]')]"
_LABEL = "Probability of residual thyroid tissue: "


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

        browser.call("Page.navigate", url="about:blank")
        browser.call("Page.navigate", url=f"{viewer.url}/viewer?StudyInstanceUIDs={views[0].StudyInstanceUID}")
        browser.wait(
            f"{_THUMBNAILS}.length == 3 && !!document.querySelector('.cornerstone-canvas')"
            " && document.querySelector('[data-cy=viewport-grid]').innerText.includes('I:')",
            "the study opened",
        )
        nm = _viewport(browser, tmp_path / f"{finding}-nm.png")
        _open(browser, "OT", "Remnant I-131 neck AI result")
        seen[finding] = _viewport(browser, tmp_path / f"{finding}-sc.png")
        _open(browser, "SR", f"{_LABEL}{100 * probability:.2f} %")
        report = _viewport(browser, tmp_path / f"{finding}-sr.png")
        for what, pixels in (("NM", nm), ("SC", seen[finding]), ("SR", report)):
            assert (pixels.max(axis=2) > 100).sum() > 200, f"{what} of {finding} is black"
        # The outline is drawn over the image: green, which a grey image cannot be.
        red, green, _ = (report[..., channel].astype(int) for channel in range(3))
        assert (green - red > 100).sum() > 50
    different = np.abs(seen["present"].astype(int) - seen["absent"].astype(int)).max(axis=2) > 50
    assert different.mean() > 0.01
