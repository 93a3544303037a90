"""The comparison of the image processing's steps, small: every variant runs; no figure of it means anything."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from pipeline.ablation import LARGE, SETS, SMALL, TESTED, TOLD, VARIANTS, Scale, run


def _tiny(scale: Scale) -> Scale:
    return dataclasses.replace(
        scale,
        plans={name: dataclasses.replace(plan, pairs=12) for name, plan in scale.plans.items()},
        settings=dataclasses.replace(scale.settings, stages=((1, 28),), batch_size=8),
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
    ]
    assert ["seed 131" in row for row in lines] == [True, False] * 3
    assert "GrabCut" not in page
    rows = json.loads(path.read_text(encoding="utf-8"))
    trained = {"plain", "plain-2", "equalized", "equalized-2", "plain_hazed", "plain_hazed-2"}
    assert set(rows) == trained | {LARGE.beside}
    assert f"the shipped weights (`{LARGE.beside}`" in page
    first, second = (np.load(tmp_path / f"{name}.other_camera.npy") for name in ("plain", "plain-2"))
    assert not np.array_equal(first, second), "another training starts from other random numbers"


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
    plans = [*SETS.values(), *LARGE.plans.values()]
    seeds = [set(range(plan.first_seed, plan.first_seed + plan.pairs)) for plan in plans]
    assert len(set.union(*seeds)) == sum(map(len, seeds))
    assert [name for name, plan in SETS.items() if plan.physics == "other"] == ["other_camera"]
