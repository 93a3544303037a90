"""The sentences a doctor reads, once: the picture, the Structured Report and the checks before sending share them.

Everything here is plain ASCII without backslash or tilde, so that it reads the same in every character set a source may
have brought along (PS3.3 C.12.1.1.2). Knows nothing of patients: it is given an outcome, never an identity.
"""

import unicodedata

from pipeline import foci_wording
from pipeline.finding import Declined, Finding, ModelFacts
from pipeline.reasons import REASONS

REVIEW = "Not for diagnosis without review by a physician."
"""Stands in every result."""

RELEASES = {
    "demonstration": "DEMONSTRATION ONLY: for demonstration and tests, without clinical meaning.",
    "research": "RESEARCH ONLY: not released for clinical use.",
    "local": "Released for local use on the strength of a local acceptance report.",
}
"""What the release of the weights means for the reader (`ModelFacts.release`)."""

VERDICTS = {"present": "PRESENT", "absent": "ABSENT", "undetermined": "UNDETERMINED"}

VIEW_TITLES = {"anterior": "ANTERIOR", "posterior": "POSTERIOR"}

_MAX_DECIMALS = 6


def ascii_text(text: str) -> str:
    """Return `text` in the characters that every DICOM character set shares.

    Accents are dropped, anything else becomes "?"; backslash and tilde are replaced because they mean other characters
    in ISO_IR 13 (PS3.3 C.12.1.1.2), and the backslash separates values (PS3.5 6.2).
    """
    apart = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    plain = apart.encode("ascii", "replace").decode("ascii").replace("\\", "/").replace("~", "-")
    return " ".join("".join(c if c.isprintable() else " " for c in plain).split())


def percent(value: float, *limits: float) -> str:
    """Return `value` (0 to 1) in percent as text: the nearest two decimals that lie on its side of `limits`.

    A probability of 0.49999 is "absent" at a threshold of 0.5, and must not be shown as "50.00" but as "49.99"; nor one
    of 0.99999 as "100.00", which would read as certainty, but as "99.99". Two decimals, because viewers cut or round to
    them. So the text is at most 0.015 away from the value.
    """
    shown_limits = [float(percent(limit)) for limit in limits]
    for decimals in range(2, _MAX_DECIMALS + 1):
        nearest = round(100 * value, decimals)
        for shown in (nearest, nearest - 10**-decimals, nearest + 10**-decimals):
            text = f"{shown:.{decimals}f}"
            certain = (float(text) >= 100) == (value >= 1) and (float(text) <= 0) == (value <= 0)
            sides = zip(limits, shown_limits, strict=True)
            if certain and all((float(text) >= as_shown) == (value >= limit) for limit, as_shown in sides):
                return text
    return text


def decision_limits(finding: Finding) -> tuple[float, ...]:
    """Return the probabilities at which the verdict changes: the threshold, and the edges of the undetermined band."""
    return (finding.threshold, *(finding.undetermined_band or ()))


def verdict_line(outcome: Finding | Declined) -> str:
    """Return the verdict in words: the largest text on the picture."""
    if isinstance(outcome, Declined):
        return "NOT ANALYSED"
    return f"Residual thyroid tissue: {VERDICTS[outcome.finding]}"


def probability_line(finding: Finding) -> str:
    """Return the probability against the limits it was judged by."""
    probability = percent(finding.probability, *decision_limits(finding))
    line = f"Probability {probability} % (threshold {percent(finding.threshold)} %"
    if finding.undetermined_band:
        low, high = finding.undetermined_band
        line += f"; undetermined from {percent(low)} to {percent(high)} %"
    return line + ")"


def reason_line(declined: Declined) -> str:
    """Return why there is no finding, as a sentence."""
    return f"Not analysed: {ascii_text(REASONS[declined.reason].sentence)}."


def model_lines(model: ModelFacts) -> tuple[str, ...]:
    """Return which model judged, by which digest, trained on what, and what its release allows."""
    lines = [
        RELEASES[model.release],
        ascii_text(f"Model {model.name} {model.version} ({model.architecture}), weights SHA-256 {model.sha256}."),
        ascii_text(f"Trained on {model.trained_on.rstrip('.')}."),
    ]
    if model.intended_use:
        lines.append(ascii_text(f"Intended use: {model.intended_use.rstrip('.')}."))
    return tuple(lines)


def flag_line(flags: tuple[str, ...]) -> str:
    """Return the flags as one line, "" where there are none."""
    return ascii_text("Flags: " + ", ".join(foci_wording.flag_words(flag) for flag in flags)) if flags else ""


def missing_view_line(finding: Finding) -> str:
    """Say which view the finding had to do without, "" where both were there."""
    seen = {view.image.view for view in finding.views}
    missing = [view for view in VIEW_TITLES if view not in seen]
    return f"No {' and no '.join(missing)} view: judged from the other view alone." if missing else ""


def summary(outcome: Finding | Declined, model: ModelFacts | None) -> tuple[str, ...]:
    """Return everything a result has to say in words, in reading order. A Finding brings its own `model`."""
    if isinstance(outcome, Declined):
        lines = [verdict_line(outcome), reason_line(outcome), "This is not a negative result."]
        lines += [REVIEW, *(model_lines(model) if model else ())]
    else:
        lines = [verdict_line(outcome), probability_line(outcome), missing_view_line(outcome), flag_line(outcome.flags)]
        lines += [foci_wording.foci_line(outcome), foci_wording.uptake_line(outcome), *foci_wording.details(outcome)]
        lines += [REVIEW, *model_lines(outcome.model)]
    return tuple(line for line in lines if line)
