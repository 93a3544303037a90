"""The sentences on foci, uptake and flags that stand beside the verdict, once: picture, report and checks share them.

Plain ASCII, as everything of `pipeline.wording`, which puts them in their place. A sentence about a focus never says
what it is, only where it lies and how bright it is: the verdict is the network's, the rest is for a person.
"""

from collections.abc import Mapping

from pipeline.finding import Finding, Focus, FocusDepth, FocusSite, FocusView, Uptake, ViewName

SITES: Mapping[FocusSite, str] = {
    "bed_left": "bed left",
    "bed_right": "bed right",
    "bed_midline": "bed midline",
    "above_bed": "midline above bed",
    "below_bed": "midline below bed",
    "lateral_left": "side of neck left",
    "lateral_right": "side of neck right",
    "salivary_left": "salivary region left",
    "salivary_right": "salivary region right",
    "mouth_or_nose": "mouth or nose region",
    "elsewhere": "elsewhere",
}
_DEPTHS: Mapping[FocusDepth, str] = {"surface": "not seen from behind, skin?", "deep": "deep", "neck": "", "": ""}
_FLAGS = {
    "star_artefact": "star artefact",
    "low_counts": "few counts",
    "other_uptake": "other uptake outside of the thyroid bed",
    "focus_in_bed": "REVIEW: focus in or above the thyroid bed, which the model did not take for thyroid tissue",
}
_ON_THE_PICTURE = 5


def flag_words(flag: str) -> str:
    """Return a flag in words; one that is not known here as it is called."""
    return _FLAGS.get(flag, flag.replace("_", " "))


def foci_in(finding: Finding, view: ViewName) -> tuple[tuple[Focus, FocusView], ...]:
    """Return the foci with what this view shows of each."""
    return tuple((focus, seen) for focus in finding.foci or () for seen in focus.views if seen.view == view)


def foci_line(finding: Finding) -> str:
    """Return how many foci there are and where, short enough for the picture; "" where none were searched."""
    if finding.foci is None:
        return ""
    if not finding.foci:
        return "Foci of uptake: none stands out."
    shown = [f"{focus.number} {SITES[focus.site]}" + _in_brackets(focus) for focus in finding.foci[:_ON_THE_PICTURE]]
    more = len(finding.foci) - _ON_THE_PICTURE
    return f"Foci of uptake: {', '.join(shown)}{f', {more} more in the report' if more > 0 else ''}."


def uptake_figure(uptake: Uptake) -> str:
    """Return the percentage with digits that its error carries."""
    return f"{uptake.percent:.2f}"


def uptake_line(finding: Finding) -> str:
    """Return the uptake with its error, "" where it cannot be given."""
    if finding.uptake is None:
        return ""
    return f"Uptake in thyroid bed: {uptake_figure(finding.uptake)} +/- {finding.uptake.percent_sd:.2f} %."


def details(finding: Finding) -> tuple[str, ...]:
    """Return everything on foci and uptake, a sentence each, for the report."""
    lines = []
    for focus in finding.foci or ():
        seen = "; ".join(
            f"{one.view} {one.counts:.0f} +/- {one.counts_sd:.0f} counts"
            + ("" if one.seen else " (does not stand out)")
            for one in focus.views
        )
        ratio = focus.posterior_to_anterior
        behind = f"; posterior to anterior {ratio:.2f}" if ratio is not None else ""
        lines.append(f"Focus {focus.number}: {SITES[focus.site]}{_in_brackets(focus)}; {seen}{behind}.")
    if finding.foci is not None:
        lines.append(
            "Foci are found from the counts alone, by place and brightness, and do not change the verdict. Sites are "
            "distances from where the thyroid bed is expected. Counts are within 12 mm above the surroundings."
        )
    if finding.foci is not None and "other_uptake" in finding.flags:
        lines.append("A focus at the side of the neck or below the bed alone is other uptake, not residual tissue.")
    if finding.uptake is not None:
        lines.append(finding.uptake.method)
    return tuple(lines)


def _in_brackets(focus: Focus) -> str:
    return f" ({_DEPTHS[focus.depth]})" if _DEPTHS[focus.depth] else ""
