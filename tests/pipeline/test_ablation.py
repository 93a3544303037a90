"""The comparison of the image processing's steps, small: every variant runs; no figure of it means anything."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from models import metrics
from pipeline.ablation import LARGE, ONWARD, SETS, SMALL, TESTED, TOLD, VARIANTS, Scale, page, run
from pipeline.train_demonstration import PLANS as SHIPPED_PLANS

ONWARD_ROWS = tuple(f"shipped_on_{variant}" for variant in ONWARD)


def _tiny(scale: Scale) -> Scale:
    return dataclasses.replace(
        scale,
        plans={name: dataclasses.replace(plan, pairs=12) for name, plan in scale.plans.items()},
        settings=dataclasses.replace(scale.settings, stages=((1, 28),), batch_size=8),
        onward=None if scale.onward is None else dataclasses.replace(scale.onward, stages=((1, 28),), batch_size=8),
    )


def test_the_larger_comparison_needs_no_mask_and_says_what_it_compares(tmp_path: Path) -> None:
    path = run(tmp_path, 1, lambda line: None, _tiny(LARGE))
    page = (tmp_path / "ablation-large.md").read_text(encoding="utf-8")
    assert "SYNTHETIC" in page
    lines = [row for row in page.splitlines() if row.startswith("| `")]
    assert [row.split("`")[1] for row in lines] == [
        *("plain", "plain"),
        *("equalized", "equalized"),
        *("plain_hazed", "plain_hazed"),
        *ONWARD_ROWS,
    ]
    assert ["seed 131" in row for row in lines[:6]] == [True, False] * 3
    assert "GrabCut" not in page
    rows = json.loads(path.read_text(encoding="utf-8"))
    trained = {"plain", "plain-2", "equalized", "equalized-2", "plain_hazed", "plain_hazed-2"}
    assert set(rows) == trained | {LARGE.beside, *ONWARD_ROWS}
    assert f"the shipped weights (`{LARGE.beside}`" in page
    first, second = (np.load(tmp_path / f"{name}.other_camera.npy") for name in ("plain", "plain-2"))
    assert not np.array_equal(first, second), "another training starts from other random numbers"


def test_the_shipped_weights_are_trained_on_alike_and_compared_with_themselves_and_each_other(tmp_path: Path) -> None:
    scale = _tiny(LARGE)
    path = run(tmp_path, 1, lambda line: None, scale, only=ONWARD_ROWS[:1])
    assert set(json.loads(path.read_text(encoding="utf-8"))) == {LARGE.beside, ONWARD_ROWS[0]}
    page = (tmp_path / "ablation-large.md").read_text(encoding="utf-8")
    assert [row.split("`")[1] for row in page.splitlines() if "not run yet" in row] == [
        *("plain", "plain", "equalized", "equalized", "plain_hazed", "plain_hazed"),
        ONWARD_ROWS[1],
    ]
    assert "At p < .05" not in page, "nothing is concluded from one half"

    rows = json.loads(run(tmp_path, 1, lambda line: None, scale, only=ONWARD_ROWS).read_text(encoding="utf-8"))
    page = (tmp_path / "ablation-large.md").read_text(encoding="utf-8")
    assert "favours plain counts" in page
    assert "At p < .05" in page
    labels = {name: np.load(tmp_path / f"{name}.npz")["labels"] for name in TESTED}
    scores = {
        (row, name): np.load(tmp_path / f"{row}.{name}.npy") for row in (LARGE.beside, *ONWARD_ROWS) for name in TESTED
    }
    for name in TESTED:
        plain, equalized = (rows[row][name] for row in ONWARD_ROWS)
        assert "p" not in plain
        for found, key, one, other in (
            (plain, "p_untouched", "shipped_on_plain", LARGE.beside),
            (equalized, "p_untouched", "shipped_on_equalized", LARGE.beside),
            (equalized, "p", "shipped_on_equalized", "shipped_on_plain"),
        ):
            pair = scores[other, name], scores[one, name]
            assert found[key] == metrics.compare_areas(labels[name], *pair).p_value
            assert not np.array_equal(*pair)
    plain, equalized = (row for row in LARGE.rows() if row.onward)
    assert plain.settings == equalized.settings
    assert (plain.settings.haze, plain.settings.brightness) == (0, 1)


def test_the_page_says_which_weights_are_better_and_only_where_it_is_clear() -> None:
    def told(plain: float, equalized: float, p_value: float) -> str:
        area = {"low": 0.5, "high": 1.0}
        rows = {
            "shipped_on_plain": {name: {"auc": plain, **area} for name in TESTED},
            LARGE.beside: {name: {"auc": 0.98, **area} for name in TESTED},
            "shipped_on_equalized": {
                name: {"auc": equalized, **area, "p": p_value, "p_untouched": 0.001} for name in TESTED
            },
        }
        for row in rows.values():
            row |= {"version": "3", "pairs": 16_000, "seconds": 60}
        return page(rows, {"training": np.zeros(8_000, np.uint8), **dict.fromkeys(TESTED, np.zeros(2_000))}, LARGE)

    better = told(0.97, 0.99, 0.01)
    those = "those trained on with plain counts"
    assert f"better than {those} and better than the shipped weights untouched (same cameras)" in better
    assert "clearly better than both" in better
    unclear = told(0.97, 0.99, 0.06)
    assert f"not told apart from {those} and better than the shipped weights untouched (same cameras)" in unclear
    assert not any(words in unclear for words in ("clearly better", "lead of equalized"))
    worse = told(0.99, 0.97, 0.01)
    assert f"worse than {those} and worse than the shipped weights untouched (same cameras)" in worse
    assert "lead of equalized pictures was not seen" in worse


def test_every_variant_is_trained_measured_and_told_on_a_page(tmp_path: Path) -> None:
    scale = _tiny(SMALL)
    said: list[str] = []
    path = run(tmp_path, 1, said.append, scale)
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert set(rows) == {"mask_kept_or_not", *scale.variants}
    assert set(TOLD) == set(VARIANTS) == {*SMALL.variants, *LARGE.variants}
    for variant in scale.variants:
        assert all(0 <= rows[variant][name]["low"] <= rows[variant][name]["auc"] <= 1 for name in TESTED), variant
    page = (tmp_path / "ablation.md").read_text(encoding="utf-8")
    assert "SYNTHETIC" in page
    assert all(TOLD[variant] in page for variant in scale.variants)

    assert len(said) == len(scale.variants)
    run(tmp_path, 1, said.append, scale)
    assert len(said) == len(scale.variants), "a row that stands was made again"


def test_the_sets_share_no_seed_and_the_other_camera_is_in_no_training() -> None:
    plans = [*SETS.values(), *LARGE.plans.values(), *SHIPPED_PLANS.values()]
    seeds = [set(range(plan.first_seed, plan.first_seed + plan.pairs)) for plan in plans]
    assert len(set.union(*seeds)) == sum(map(len, seeds))
    assert [name for name, plan in SETS.items() if plan.physics == "other"] == ["other_camera"]
