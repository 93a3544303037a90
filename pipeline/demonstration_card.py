"""The card of the shipped weights, written from what was measured: `models/cards/remnant-resnet18-phantom.md`.

Every figure on the page comes from the record and from `figures.json` of `pipeline.train_demonstration`, so that no
page can claim what was not measured.
"""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from models.weights import WeightsRecord

_LEARNT = "one in three natural, two of the strata; other uptake three times as frequent"
_HARDER = {"training_harder": _LEARNT.replace("three times as", "six times as")}
_SETS = {
    "stress": "every stratum in turn, faint and deceptive ones several times; other uptake eight times as frequent",
    "population": "the natural population, one half with residual tissue",
    "other_camera": "the natural population before a camera whose physics no training scan had",
}


def card(record: WeightsRecord, report: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    """Markdown. `report`: what `train_demonstration` measured; `sources`: set -> size and seeds, in words."""
    band = record.undetermined_band
    between = (
        f"Between {band[0]:.4f} and {band[1]:.4f} it is undetermined." if band else "There is no undetermined band."
    )
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False).from_string(  # noqa: S701  Markdown, no HTML
        files("pipeline").joinpath("demonstration_card.md.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        record=record,
        between=between,
        sets=_rows([(name, size, (_SETS | _HARDER).get(name, _LEARNT)) for name, size in sources.items()]),
        header=" | ".join(name.replace("_", " ") for name in _measured(report)),
        rule=" --- |" * len(_measured(report)),
        figures=_rows(_figures(report)),
        strata=_rows(_strata(report["stress"]["strata"])),
        areas=_areas(report["validation_auc"]),
        spacing=record.training_range.spacing_mm,
        counts=record.training_range.total_counts,
    )


def _measured(report: Mapping[str, Any]) -> list[str]:
    return [name for name in _SETS if name in report]


def _rows(rows: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _figures(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    found = [report[name] for name in _measured(report)]
    rows: list[tuple[str, ...]] = [("pairs", *(f"{one['figures']['pairs']:.0f}" for one in found))]
    rows.append(
        (
            "AUC (95 % interval, DeLong)",
            *(
                f"{one['figures']['auc']:.4f} ({one['figures']['auc_low']:.4f}-{one['figures']['auc_high']:.4f})"
                for one in found
            ),
        )
    )
    rows.append(("AUC of the baseline", *(f"{one['baseline_auc']:.4f}" for one in found)))
    rows.append(("AUC of the total counts", *(f"{one['total_counts_auc']:.3f}" for one in found)))
    for key, said in (
        ("accuracy", "accuracy"),
        ("sensitivity", "sensitivity (residual called present)"),
        ("specificity", "specificity (without, called absent)"),
        ("undetermined", "undetermined"),
        ("declined", "declined"),
        ("calibration_error", "expected calibration error, 10 bins"),
    ):
        rows.append((said, *(f"{one['figures'][key]:.4f}" for one in found)))
    for view in ("anterior", "posterior"):
        rows.append((f"AUC, {view} view alone", *(f"{one['views_alone'][view]:.4f}" for one in found)))
    return rows


def _strata(strata: list[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    def of(pair: list[int]) -> str:
        return f"{pair[0]} of {pair[1]}" if pair[1] else ""

    return [
        (
            row["stratum"],
            str(row["scans"]),
            of(row["called_present_of_residual"]),
            of(row["not_absent_of_clean"]),
            str(row["undetermined"]),
            str(row["declined"]),
        )
        for row in strata
    ]


def _areas(areas: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {area:.4f}" for name, area in areas.items())
