"""The commands `remnant train`, `remnant evaluate` and `remnant models accept`: a hospital's own scans and weights.

Files go to one folder that the person names; nothing else is touched, and no node needs to run. Every file and line
that is not used is printed and written to `excluded.csv`, never dropped in silence. Faults of what a person gave end in
`WrongUse` with one sentence; a folder that cannot be written in `RemnantError`.
"""

import csv
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dicom_node.errors import RemnantError, WrongUse
from models import weights
from models.initial import InitialWeights, InitialWeightsError, initial_weights
from models.train import TrainingError
from pipeline import acceptance as accepting
from pipeline.analyse import WrongPreprocessing, check_preprocessing, load_model
from pipeline.evaluation import Figures, Scored, figures, score
from pipeline.evaluation_report import ReportContent, write_report
from pipeline.hospital_cohort import CohortError, Excluded, HospitalCohort, read_cohort
from pipeline.hospital_training import (
    CHECKPOINT,
    Trained,
    TrainingPlan,
    describe,
    not_trained_on,
    prepare_cohort,
    train_record,
)
from pipeline.protocol import Protocol, ProtocolError, ProtocolSettings, read_protocol, run_protocol

Tell = Callable[[str, int, int], None]
Say = Callable[[str], None]

NAMES_OF_SCORES = (
    "key", "label", "outcome", "probability", "reason", "strata", "uptake_percent", "spacing_mm", "total_counts",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CohortPlace:
    """What a person named: folder of DICOM objects, CSV of labels, folder for what is made."""

    cohort: Path
    labels: Path
    out: Path
    pair_window_s: float
    require_views: Sequence[str]


@dataclass(frozen=True, slots=True)
class Made:
    """What a command made. `trained`, `protocol`, `acceptance`: where it was asked for."""

    excluded: tuple[Excluded, ...]
    scored: tuple[Scored, ...]
    figures: Figures
    report: Path
    trained: Trained | None = None
    protocol: Protocol | None = None
    acceptance: accepting.Acceptance | None = None


def train(
    place: CohortPlace,
    settings: ProtocolSettings,
    plan: TrainingPlan,
    starts: Sequence[str],
    *,
    folder: Path | None,
    tell: Tell,
    say: Say,
) -> Made:
    """Make a record with the first network of `settings`, then run the protocol on all of them; report both.

    `starts`: "none", "imagenet", a path, or any of these behind "NETWORK=" for one network alone; `folder`: where the
    official ImageNet files lie. `settings.groupings` 0 leaves the protocol out.
    """
    with _told():
        begun = starts_of(settings, starts, folder)
        for name, start in begun.items():
            said = "" if start.pretrained else "; not pre-trained, so not the paper's 1e-05"
            say(f"{name} starts from {start.description}; learning rate {settings.rate_for(start):g}{said}")
        cohort = _read(place, tell)
        prepared = prepare_cohort(cohort, plan.preprocessing, tell=tell)
        excluded = (*cohort.excluded, *prepared.excluded)
        _write_excluded(place.out, excluded)
        first = settings.architectures[0]
        trained = train_record(prepared, settings, plan, first, begun[first], place.out, tell=tell)
        protocol = None
        if settings.groupings:
            protocol = run_protocol(prepared.data, settings, begun, place.out / "protocol", progress=tell)
        content = ReportContent(
            title=f"Training of {trained.record.name}",
            made_on=_today(),
            version=version("remnant-node"),
            cohort=f"{len(trained.scored)} test scans out of {prepared.data.description}",
            synthetic=prepared.data.synthetic,
            record=trained.record,
            scored=trained.scored,
            excluded=excluded,
            protocol=protocol,
        )
        made = _reported(content, place.out, trained.figures)
        (place.out / CHECKPOINT).unlink(missing_ok=True)
        return dataclasses.replace(made, trained=trained)


def evaluate(place: CohortPlace, source: str, *, protocol: Path | None, criteria: Path | None, tell: Tell) -> Made:
    """Measure weights (a shipped name or a record's path) on a cohort; hold them against criteria if there are any."""
    with _told():
        limits = None if criteria is None else accepting.read_criteria(criteria)
        runs = None if protocol is None else read_protocol(protocol)
        model = load_model(source)
        check_preprocessing(model.record, model.record.preprocessing)
        cohort = not_trained_on(_read(place, tell), weights.find(source).record_path)
        _write_excluded(place.out, cohort.excluded)
        if not cohort.scans:
            raise CohortError("no scan of this cohort can be measured; excluded.csv says why")
        scored = score(
            cohort.scans,
            model,
            preprocessing=model.record.preprocessing,
            progress=lambda done, whole: tell("measuring", done, whole),
        )
        synthetic = sum(scan.synthetic for scan in cohort.scans)
        told = describe(len(scored), len({one.group for one in scored}), synthetic)
        judged = None
        if limits is not None:
            judged = accepting.judge(
                scored,
                limits,
                model.record,
                on=_today(),
                version=version("remnant-node"),
                cohort=told,
                synthetic=bool(synthetic),
            )
            (place.out / "acceptance.json").write_text(accepting.to_json(judged), encoding="utf-8")
        content = ReportContent(
            title=f"Evaluation of {model.record.name}",
            made_on=_today(),
            version=version("remnant-node"),
            cohort=told,
            synthetic=bool(synthetic) or (runs is not None and runs.synthetic),
            record=model.record,
            scored=scored,
            excluded=cohort.excluded,
            protocol=runs,
            acceptance=judged,
        )
        return _reported(content, place.out, figures(scored))


def accept(record: Path, report: Path, *, signed_by: str, camera: str, name: str, out: Path) -> Path:
    """The path of a "local" record made from `record` and a passed acceptance report. See `pipeline.acceptance`."""
    return accepting.accept(
        record,
        accepting.read_acceptance(report),
        signed_by=signed_by,
        signed_on=_today(),
        camera=camera,
        name=name,
        out=out,
    )


def starts_of(settings: ProtocolSettings, asked: Sequence[str], folder: Path | None) -> dict[str, InitialWeights]:
    """For each network what it starts from; see `train`."""
    own = {
        name: word.removeprefix(f"{name}=")
        for word in asked
        for name in settings.architectures
        if word.startswith(f"{name}=")
    }
    shared = [word for word in asked if word.partition("=")[0] not in settings.architectures]
    if len(shared) > 1:
        raise WrongUse("--weights: one start for all networks, or NETWORK=START for each")
    found = {}
    for name in settings.architectures:
        source = own.get(name) or (shared[0] if shared else "none")
        found[name] = initial_weights(name, source, folder=folder, seed=settings.seed)
    return found


def figures_as_json(found: Figures) -> dict[str, Any]:
    """Flat: each figure's value, interval ends with _low and _high, counts of shares with _count and _of."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(found):
        value = getattr(found, field.name)
        if hasattr(value, "share"):
            low, high = value.interval or (None, None)
            flat |= {
                field.name: value.share,
                f"{field.name}_low": low,
                f"{field.name}_high": high,
                f"{field.name}_count": value.count,
                f"{field.name}_of": value.of,
            }
        elif hasattr(value, "low"):
            flat |= {field.name: value.value, f"{field.name}_low": value.low, f"{field.name}_high": value.high}
        else:
            flat[field.name] = value
    flat["sensitivity_as_in_paper"] = found.sensitivity_as_in_paper.share
    flat["specificity_as_in_paper"] = found.specificity_as_in_paper.share
    return flat


def scored_as_json(one: Scored) -> dict[str, Any]:
    """One scan: which by its UIDs, never whose."""
    return {
        "key": one.key,
        "label": "residual" if one.residual else "clean",
        "outcome": one.outcome,
        "probability": one.probability,
        "reason": one.reason or None,
        "strata": list(one.strata),
        "uptake_percent": one.uptake_percent,
        "spacing_mm": one.spacing_mm,
        "total_counts": one.total_counts,
    }


def _read(place: CohortPlace, tell: Tell) -> HospitalCohort:
    if place.out.resolve().is_relative_to(place.cohort.resolve()):
        raise WrongUse("--out must lie outside the cohort's folder, which is read whole.")
    place.out.mkdir(parents=True, exist_ok=True)
    return read_cohort(
        place.cohort,
        place.labels,
        pair_window_s=place.pair_window_s,
        require_views=place.require_views,
        progress=lambda done, whole: tell("reading files", done, whole),
    )


def _reported(content: ReportContent, out: Path, found: Figures) -> Made:
    with (out / "scores.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, NAMES_OF_SCORES)
        writer.writeheader()
        for one in content.scored:
            writer.writerow(scored_as_json(one) | {"strata": "|".join(one.strata)})
    page, _ = write_report(content, out)
    return Made(content.excluded, content.scored, found, page, protocol=content.protocol, acceptance=content.acceptance)


def _write_excluded(out: Path, excluded: Iterable[Excluded]) -> None:
    with (out / "excluded.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("what", "reason", "detail"))
        writer.writerows((one.what, one.reason, one.detail) for one in excluded)


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


@contextmanager
def _told() -> Iterator[None]:
    """Our packages' own exceptions as those that a command turns into a sentence and an exit code."""
    try:
        yield
    except (
        CohortError,
        InitialWeightsError,
        ProtocolError,
        TrainingError,
        WrongPreprocessing,
        accepting.AcceptanceError,
        weights.WeightsError,
    ) as error:
        raise WrongUse(f"{error}.") from error
    except OSError as error:
        raise RemnantError(f"{error.filename or 'a file'} cannot be written or read: {error.strerror}.") from error


def excluded_as_json(one: Excluded) -> Mapping[str, str]:
    return dataclasses.asdict(one)
