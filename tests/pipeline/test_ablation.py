"""The comparison of the image processing's steps, small: every variant runs; no figure of it means anything."""

import dataclasses
import json
from pathlib import Path

from pipeline.ablation import SETS, SETTINGS, TESTED, TOLD, VARIANTS, run


def test_every_variant_is_trained_measured_and_told_on_a_page(tmp_path: Path) -> None:
    plans = {name: dataclasses.replace(plan, pairs=12) for name, plan in SETS.items()}
    how = dataclasses.replace(SETTINGS, stages=((1, 28),), batch_size=8)
    said: list[str] = []
    path = run(tmp_path, 1, said.append, plans=plans, how=how)
    rows = json.loads(path.read_text(encoding="utf-8"))
    assert set(rows) == {"mask_kept_or_not", *VARIANTS}
    assert set(TOLD) == set(VARIANTS)
    for variant in VARIANTS:
        assert all(0 <= rows[variant][name]["low"] <= rows[variant][name]["auc"] <= 1 for name in TESTED), variant
    page = (tmp_path / "ablation.md").read_text(encoding="utf-8")
    assert "SYNTHETIC" in page
    assert all(told in page for told in TOLD.values())

    assert len(said) == len(VARIANTS)
    run(tmp_path, 1, said.append, plans=plans, how=how)
    assert len(said) == len(VARIANTS), "a row that stands was made again"


def test_the_sets_share_no_seed_and_the_other_camera_is_in_no_training() -> None:
    seeds = [set(range(plan.first_seed, plan.first_seed + plan.pairs)) for plan in SETS.values()]
    assert len(set.union(*seeds)) == sum(map(len, seeds))
    assert [name for name, plan in SETS.items() if plan.physics == "other"] == ["other_camera"]
