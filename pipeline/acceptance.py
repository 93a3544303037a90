"""A physicist's acceptance: criteria stated beforehand, held against an evaluation, and signed by name.

`judge` compares figures with criteria; the outcome is kept as JSON beside the report. `accept` makes a "local"
record from it, and refuses unless every criterion holds, the evaluation was of these very weights and this
preprocessing, and its scans were real ones: figures of simulated scans release nothing for patients. What is read back
is judged anew from its own numbers, so that a word "passed" alone is worth nothing. The signature is a name and not
cryptography: it says who answers for it.
"""

import dataclasses
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from models import weights
from pipeline.evaluation import Figures, Rate, Scored, StratumRow, by_stratum, figures

SCHEMA: Final = 1

CRITERIA: Final = MappingProxyType(
    {
        "min_auc": "area under the ROC curve, whoever got no answer as 0.5",
        "min_auc_low": "lower end of its 95 % interval",
        "min_accuracy": "share of right answers among all scans",
        "min_sensitivity": "share of residual scans called present",
        "min_sensitivity_low": "lower end of its 95 % interval",
        "min_specificity": "share of clean scans called absent",
        "min_specificity_low": "lower end of its 95 % interval",
        "min_precision": "share of residual scans among those called present",
        "max_ece": "expected calibration error in 10 bins",
        "max_undetermined": "share of scans in the undetermined band",
        "max_declined": "share of scans that the node declined",
        "min_scans": "scans in the evaluation",
        "min_residual": "residual scans in the evaluation",
        "min_clean": "clean scans in the evaluation",
    }
)
"""What can be asked of an evaluation, by the key in criteria.toml."""
STRATUM_CRITERIA: Final = MappingProxyType(
    {
        "min_sensitivity": "share of its residual scans called present",
        "max_false_alarms": "share of its clean scans that were not called absent",
        "min_scans": "its scans in the evaluation",
    }
)
"""What can be asked of a stratum, in a table [strata.NAME]."""
NEEDED: Final = ("min_sensitivity", "min_specificity")
_COUNTS: Final = ("min_scans", "min_residual", "min_clean")
_MAX_BYTES: Final = 1 << 20


class AcceptanceError(Exception):
    """Criteria that cannot be used, or weights that cannot be accepted; one sentence that says why."""


@dataclass(frozen=True, slots=True)
class Criterion:
    """`name`: key, with the stratum before it; `least`: whether `limit` is the least or the most allowed; `found`: None
    where the scans do not define it, which does not pass."""

    name: str
    least: bool
    limit: float
    found: float | None

    @property
    def passed(self) -> bool:
        if self.found is None:
            return False
        return self.found >= self.limit if self.least else self.found <= self.limit


@dataclass(frozen=True, slots=True)
class Acceptance:
    """An evaluation held against criteria. `evaluated_on`: date, ISO 8601; `cohort`: in words."""

    weights: str
    sha256: str
    preprocessing: str
    preprocessing_version: str
    evaluated_on: str
    software_version: str
    cohort: str
    synthetic: bool
    criteria: tuple[Criterion, ...]

    @property
    def passed(self) -> bool:
        return bool(self.criteria) and all(one.passed for one in self.criteria)


Limits = Mapping[str, float]
"""Criterion -> limit; those of a stratum are called "strata.NAME.KEY"."""


def read_criteria(path: Path) -> Limits:
    """The limits of a criteria.toml. Every key must be known, and sensitivity and specificity must be asked for."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AcceptanceError(f"the criteria {path.name!r} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise AcceptanceError(f"the criteria {path.name!r} are not TOML: {error}") from error
    limits: dict[str, float] = {}
    strata = data.pop("strata", {})
    if not isinstance(strata, dict) or not all(isinstance(table, dict) for table in strata.values()):
        raise AcceptanceError(f"{path.name}: write a stratum's criteria into a table, such as [strata.star]")
    tables = [("", CRITERIA, data), *((f"strata.{name}.", STRATUM_CRITERIA, table) for name, table in strata.items())]
    for prefix, known, table in tables:
        for key, value in table.items():
            if key not in known:
                raise AcceptanceError(f"{path.name}: {prefix}{key} is no criterion; known: {', '.join(known)}")
            most = math.inf if key in _COUNTS else 1
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                raise AcceptanceError(
                    f"{path.name}: {prefix}{key} must be a number from 0 {'up' if key in _COUNTS else 'to 1'}"
                )
            limits[prefix + key] = float(value)
    if lacking := [key for key in NEEDED if key not in limits]:
        raise AcceptanceError(f"{path.name} must state {' and '.join(lacking)}: an acceptance answers for both errors")
    return limits


def judge(
    scored: Sequence[Scored],
    limits: Limits,
    record: weights.WeightsRecord,
    *,
    on: str,
    version: str,
    cohort: str,
    synthetic: bool,
) -> Acceptance:
    """Hold the figures of these scans against the limits."""
    found, rows = figures(scored), {row.name: row for row in by_stratum(scored)}
    return Acceptance(
        weights=record.name,
        sha256=record.sha256,
        preprocessing=record.preprocessing,
        preprocessing_version=record.preprocessing_version,
        evaluated_on=on,
        software_version=version,
        cohort=cohort,
        synthetic=synthetic,
        criteria=tuple(
            Criterion(name, name.rpartition(".")[2].startswith("min_"), limit, _found(name, found, rows))
            for name, limit in limits.items()
        ),
    )


def _found(name: str, found: Figures, rows: Mapping[str, StratumRow]) -> float | None:
    if name.startswith("strata."):
        _, _, rest = name.partition(".")
        stratum, _, key = rest.rpartition(".")
        row = rows.get(stratum)
        if row is None:
            return None
        return {
            "min_sensitivity": row.sensitivity.share,
            "max_false_alarms": row.false_alarms.share,
            "min_scans": float(row.scans),
        }[key]
    return {
        "min_auc": None if found.auc is None else found.auc.value,
        "min_auc_low": None if found.auc is None else found.auc.low,
        "min_accuracy": found.accuracy.share,
        "min_sensitivity": found.sensitivity.share,
        "min_sensitivity_low": _low(found.sensitivity),
        "min_specificity": found.specificity.share,
        "min_specificity_low": _low(found.specificity),
        "min_precision": found.precision.share,
        "max_ece": found.calibration_error,
        "max_undetermined": found.undetermined.share,
        "max_declined": found.declined.share,
        "min_scans": float(found.scans),
        "min_residual": float(found.residual),
        "min_clean": float(found.scans - found.residual),
    }[name]


def _low(rate: Rate) -> float | None:
    return None if rate.interval is None else rate.interval[0]


def to_json(acceptance: Acceptance) -> str:
    """With `passed` beside each criterion and for all, for people; `read_acceptance` goes by the numbers."""
    data = dataclasses.asdict(acceptance)
    for one, criterion in zip(data["criteria"], acceptance.criteria, strict=True):
        one["passed"] = criterion.passed
    return json.dumps({"schema": SCHEMA, "passed": acceptance.passed} | data, indent=2, allow_nan=False) + "\n"


def read_acceptance(path: Path) -> Acceptance:
    """The acceptance that a file holds; `AcceptanceError` for anything missing, mistyped or contradictory."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise AcceptanceError(f"{path.name!r} is too large for an acceptance report")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AcceptanceError(f"the acceptance report {path.name!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise AcceptanceError(f"the acceptance report {path.name!r} is not JSON in UTF-8") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise AcceptanceError(f"{path.name!r} is not an acceptance report of this version; run the evaluation again")
    try:
        criteria = tuple(_criterion(one) for one in data["criteria"])
        words = {
            field.name: data[field.name]
            for field in dataclasses.fields(Acceptance)
            if field.name not in ("criteria", "synthetic")
        }
        synthetic, passed = data["synthetic"], data["passed"]
    except (KeyError, TypeError) as error:
        raise AcceptanceError(f"{path.name!r} is not a whole acceptance report; run the evaluation again") from error
    if not all(isinstance(word, str) for word in words.values()) or not isinstance(synthetic, bool):
        raise AcceptanceError(f"{path.name!r} is not a whole acceptance report; run the evaluation again")
    acceptance = Acceptance(**words, synthetic=synthetic, criteria=criteria)
    told = [one["passed"] for one in data["criteria"]]
    if told != [one.passed for one in criteria] or passed is not acceptance.passed:
        raise AcceptanceError(f"{path.name!r} contradicts itself: its verdicts are not those of its numbers")
    return acceptance


def _criterion(data: Mapping[str, Any]) -> Criterion:
    name, limit, found = data["name"], data["limit"], data["found"]
    key = str(name).rpartition(".")[2]
    known = STRATUM_CRITERIA if str(name).startswith("strata.") else CRITERIA
    numbers = [limit] if found is None else [limit, found]
    if key not in known or any(isinstance(value, bool) or not isinstance(value, int | float) for value in numbers):
        raise TypeError("not a criterion")
    return Criterion(str(name), key.startswith("min_"), float(limit), None if found is None else float(found))


def accept(
    record_path: Path, acceptance: Acceptance, *, signed_by: str, signed_on: str, camera: str, name: str, out: Path
) -> Path:
    """Write these weights into `out` as a record of release "local" called `name`; returns the record's path.

    `camera`: which one they were accepted for, in words. Raises `AcceptanceError`, or `models.weights.WeightsError` for
    weights that are not whole.
    """
    place = weights.verify(str(record_path))
    record = place.record
    for holds, sentence in (
        (bool(signed_by.strip() and camera.strip()), "an acceptance needs the name of who signs it, and of the camera"),
        (acceptance.sha256 == record.sha256, "the report is of other weights (digest differs); evaluate these"),
        (
            (acceptance.preprocessing, acceptance.preprocessing_version)
            == (record.preprocessing, record.preprocessing_version),
            "the report is of other preprocessing; evaluate these weights with it again",
        ),
        (
            all(key in {one.name for one in acceptance.criteria} for key in NEEDED),
            f"the report does not judge {' and '.join(NEEDED)}",
        ),
        (
            acceptance.passed,
            "not all criteria hold: " + ", ".join(one.name for one in acceptance.criteria if not one.passed),
        ),
        (not acceptance.synthetic, "the report is of simulated scans, which release nothing for patients"),
        (name != record.name, "the accepted weights need a name of their own, for results already name the old one"),
    ):
        if not holds:
            raise AcceptanceError(sentence)
    judged = "; ".join(
        f"{one.name} {one.found:.4g} ({'at least' if one.least else 'at most'} {one.limit:g})"
        for one in acceptance.criteria
        if one.found is not None
    )
    accepted = dataclasses.replace(
        record,
        name=name,
        file=f"{name}.safetensors",
        release="local",
        intended_use=f"reading of 131I neck scans of {camera.strip()}; not for diagnosis without review",
        acceptance=weights.AcceptanceReport(
            signed_by=signed_by.strip(),
            signed_on=signed_on,
            camera=camera.strip(),
            accepted_sha256=acceptance.sha256,
            accepted_preprocessing_version=acceptance.preprocessing_version,
            summary=f"{acceptance.cohort}, evaluated on {acceptance.evaluated_on}: {judged}",
        ),
    )
    text = weights.to_json(accepted)
    weights.checked(text)
    path = out / f"{name}.json"
    if path.exists():
        raise AcceptanceError(f"{path} exists already; choose another name or folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for target, content in ((out / accepted.file, place.weights_path.read_bytes()), (path, text.encode())):
            part = target.with_name(f".{target.name}.part")
            part.write_bytes(content)
            part.replace(target)
    except OSError as error:
        raise AcceptanceError(f"{out} cannot be written: {error.strerror}") from error
    return weights.verify(str(path)).record_path
