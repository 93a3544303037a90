"""The report of an evaluation, for a physicist: one content, written as HTML (Jinja2) and as PDF (fpdf2).

Table 3, Table 4, Figure 9 and Figure 10 are called as in the paper and made from the runs given, nothing else; what was
not run or is not defined is said to be so. Simulated scans are called synthetic on the first line. The exclusions name
files of the hospital's folder, which may tell who a patient is; the report says so where it lists them.
"""

import base64
import io
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import matplotlib
from fpdf import FPDF
from fpdf.enums import TableBordersLayout
from fpdf.fonts import FontFace
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Plot

from models import metrics
from models.weights import WeightsRecord
from pipeline.acceptance import Acceptance
from pipeline.evaluation import (
    Area,
    Rate,
    Scored,
    area,
    by_stratum,
    figures,
    labels_of,
    probabilities,
    ranking_scores,
    roc_points,
    view_areas,
)
from pipeline.hospital_cohort import Excluded
from pipeline.protocol import MEASURES, Protocol, areas, performance, pooled, ranks

COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")
_NOT_DEFINED: Final = "not defined"
_CURVES_SHOWN: Final = 99


@dataclass(frozen=True, slots=True)
class Text:
    kind: Literal["heading", "paragraph", "banner"]
    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells; a cell that is exactly "pass" or "FAIL" is coloured."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    widths: tuple[int, ...] = ()
    kind: Literal["table"] = "table"


@dataclass(frozen=True, slots=True)
class Drawing:
    """`svg` for the page, `png` for the PDF."""

    caption: str
    svg: bytes
    png: bytes
    kind: Literal["figure"] = "figure"

    @property
    def svg_base64(self) -> str:
        return base64.b64encode(self.svg).decode()


Block = Text | Table | Drawing


@dataclass(frozen=True, slots=True, eq=False)
class ReportContent:
    """What the report is made of. `record` None: only the protocol is reported. `made_on`: a date, in words."""

    title: str
    made_on: str
    version: str
    cohort: str
    synthetic: bool
    record: WeightsRecord | None = None
    scored: tuple[Scored, ...] = ()
    excluded: tuple[Excluded, ...] = ()
    protocol: Protocol | None = None
    acceptance: Acceptance | None = None


def write_report(content: ReportContent, out: Path) -> tuple[Path, Path]:
    """Write report.html and report.pdf into `out`; returns both paths. Raises `OSError` where that cannot be."""
    blocks = report_blocks(content)
    subtitle = f"Remnant {content.version}, {content.made_on}. {content.cohort}."
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("evaluation_report.html.jinja")
    paths = out / "report.html", out / "report.pdf"
    out.mkdir(parents=True, exist_ok=True)
    html = page.render(title=content.title, subtitle=subtitle, blocks=blocks).encode()
    for path, data in zip(paths, (html, _pdf(content.title, subtitle, blocks)), strict=True):
        part = path.with_name(f".{path.name}.part")
        part.write_bytes(data)
        part.replace(path)
    return paths


def report_blocks(content: ReportContent) -> list[Block]:
    """The report, before it is written as anything."""
    blocks: list[Block] = []
    if content.synthetic:
        blocks.append(
            Text(
                "banner",
                "SYNTHETIC: scans in this report were simulated. Its figures say nothing about accuracy on patients.",
            )
        )
    blocks.append(Text("banner", "Not for diagnosis without review by a physician."))
    if content.record is not None:
        blocks += _about_weights(content.record)
    if content.acceptance is not None:
        blocks += _about_acceptance(content.acceptance)
    if content.scored:
        blocks += _about_scores(content.scored, content.record)
    if content.protocol is not None:
        blocks += protocol_blocks(content.protocol)
    blocks += _about_exclusions(content)
    blocks += _limits(content)
    return blocks


# The parts --------------------------------------------------------------------------------------------------------


def _about_weights(record: WeightsRecord) -> list[Block]:
    band = record.undetermined_band
    rows = (
        ("name, version", f"{record.name}, {record.version}"),
        ("release", record.release),
        ("network", record.architecture),
        ("sha256", record.sha256),
        ("preprocessing", f"{record.preprocessing}, version {record.preprocessing_version}"),
        ("trained on", record.trained_on),
        ("data", record.data),
        ("threshold", f"{record.threshold:.4g}: {record.operating_point}"),
        ("undetermined", "no band" if band is None else f"from {band[0]:.4g} to {band[1]:.4g}"),
        ("views joined by", record.fusion),
        ("temperature", "none" if record.temperature is None else f"{record.temperature:.3f}"),
        ("intended use", record.intended_use),
    )
    return [Text("heading", "The weights"), Table("What was measured", (), rows, widths=(22, 78))]


def _about_acceptance(acceptance: Acceptance) -> list[Block]:
    rows = tuple(
        (one.name, f"{'at least' if one.least else 'at most'} {one.limit:g}", _number(one.found), _verdict(one.passed))
        for one in acceptance.criteria
    )
    words = (
        "All criteria hold. The weights become active as `local` only by a named person's signature under this report."
        if acceptance.passed
        else "Not all criteria hold: these weights cannot be accepted on this report."
    )
    return [
        Text("heading", "Acceptance"),
        Table("Criteria stated by the physicist", ("criterion", "limit", "found", "verdict"), rows),
        Text("paragraph", words),
    ]


def _verdict(passed: bool) -> str:
    return "pass" if passed else "FAIL"


def _about_scores(scored: Sequence[Scored], record: WeightsRecord | None) -> list[Block]:
    found = figures(scored)
    rows = (
        ("accuracy", *_rate(found.accuracy)),
        ("sensitivity: residual called present", *_rate(found.sensitivity)),
        ("specificity: clean called absent", *_rate(found.specificity)),
        ("precision", *_rate(found.precision)),
        ("F1 score", _number(found.f1), "", ""),
        ("AUC, whoever got no answer as 0.5", *_area(found.auc)),
        ("AUC of the scans with a probability", *_area(found.auc_answered)),
        ("expected calibration error", _number(found.calibration_error), "", ""),
        ("undetermined", *_rate(found.undetermined)),
        ("declined", *_rate(found.declined)),
    )
    blocks: list[Block] = [
        Text("heading", "Figures over all scans"),
        Text(
            "paragraph",
            f"{found.scans} scans of {found.patients} patients, {found.residual} with residual tissue. Residual tissue "
            "is positive. Undetermined and declined scans are errors on either side; none is left out.",
        ),
        Table(
            "Figures with 95 % intervals (shares: Wilson; AUC: DeLong)",
            ("figure", "value", "95 % interval", "scans"),
            rows,
            widths=(46, 14, 24, 16),
        ),
        Table(
            "The same two figures under the paper's names",
            ("in the paper's section 2.4", "value", "95 % interval", "scans"),
            (
                ("sensitivity (non-residual called non-residual)", *_rate(found.sensitivity_as_in_paper)),
                ("specificity (residual called residual)", *_rate(found.specificity_as_in_paper)),
            ),
            "The paper's text exchanges the two names, and counts residual as positive in its precision. Its AUC with "
            "non-residual as positive equals ours: turning both labels and scores round changes no area.",
            widths=(46, 14, 24, 16),
        ),
    ]
    views = view_areas(scored)
    answered = [one for one in scored if one.probability is not None]
    whole = area(labels_of(answered), probabilities(answered))
    alone = tuple((f"{name} alone", *_area(views[name])) for name in sorted(views))
    blocks.append(
        Table(
            "Each view, and both together",
            ("what judges", "AUC", "95 % interval", ""),
            (*alone, ("fused", *_area(whole))),
            "Over the scans with a probability. Weights that take both views as one input know no single view: its row "
            "then repeats the fused one.",
        )
    )
    if found.auc is not None:
        blocks.append(_roc_drawing(scored, found.auc, record))
    blocks += _strata(scored)
    if answered:
        blocks += _calibration(answered)
    return blocks


def _strata(scored: Sequence[Scored]) -> list[Block]:
    rows = tuple(
        (
            row.name,
            str(row.scans),
            _short(row.sensitivity),
            _short(row.false_alarms),
            str(row.undetermined),
            str(row.declined),
        )
        for row in by_stratum(scored)
    )
    if not rows:
        return [
            Text("heading", "Strata"),
            Text("paragraph", "The labels name no strata (column `stratum`), and no scan has a known uptake or zoom."),
        ]
    head = ("stratum", "scans", "residual called present", "clean not called absent", "undetermined", "declined")
    return [
        Text("heading", "Strata"),
        Table("Every stratum; a scan stands in each of its own", head, rows, widths=(20, 8, 23, 23, 15, 11)),
    ]


def _calibration(answered: Sequence[Scored]) -> list[Block]:
    labels, scores = labels_of(answered), probabilities(answered)
    curve = metrics.reliability_curve(labels, scores)

    plot = Plot(figsize=(8.2, 3.9), layout="constrained")
    left, right = plot.subplots(1, 2)
    left.plot([0, 1], [0, 1], color="#8a96a3", linewidth=1, linestyle="--", label="perfect")
    left.plot(
        [part.mean_probability for part in curve],
        [part.residual_share for part in curve],
        marker="o",
        color=COLOURS[0],
        label="these weights",
    )
    for part in curve:
        left.annotate(
            str(part.count),
            (part.mean_probability, part.residual_share),
            textcoords="offset points",
            xytext=(6, -11),
            fontsize=8,
            color="#4a5663",
        )
    _axes(left, "mean probability of the bin", "share with residual tissue", "Reliability (number: scans)")
    left.legend(loc="upper left", frameon=False)
    thresholds = [step / 100 for step in range(1, 100)]
    decision = metrics.decision_curve(labels, scores, thresholds)
    right.plot(thresholds, [one.classifier for one in decision], color=COLOURS[0], label="these weights")
    right.plot(thresholds, [one.act_on_all for one in decision], color=COLOURS[1], linestyle="--", label="treat all")
    right.axhline(0, color="#8a96a3", linewidth=1, label="treat none")
    top = max(*(one.classifier for one in decision), float(labels.mean()), 0.01)
    right.set_ylim(-0.15 * top, 1.1 * top)
    right.set_xlim(0, 1)
    right.set_xlabel("threshold probability")
    right.set_ylabel("net benefit, true positives a scan")
    right.set_title("Decision curve", fontsize=10, loc="left")
    right.legend(frameon=False)
    _plain(right)
    return [
        Text("heading", "Calibration and decision curve"),
        _drawing(
            plot,
            f"Reliability in 10 bins and decision curve (Vickers and Elkin 2006), {len(answered)} scans with a "
            "probability.",
        ),
    ]


def protocol_blocks(protocol: Protocol) -> list[Block]:
    """What was run, from what, and what came out: Tables 3 and 4, Figures 9 and 10, the tests between networks."""
    settings = protocol.settings
    asked = len(settings["architectures"]) * settings["groupings"]
    starts = {name: protocol.of(name)[0] for name in protocol.architectures}
    begun = "; ".join(
        f"{name} from {run.start}, learning rate {run.learning_rate:g}"
        + ("" if run.pretrained else " (not pre-trained, so not the paper's 1e-05)")
        for name, run in starts.items()
    )
    seconds = sum(run.seconds for run in protocol.runs)
    devices = ", ".join(sorted({run.device for run in protocol.runs})) or "nothing yet"
    missing = (
        f" NOT RUN YET: {', '.join(f'{name} {number + 1}' for name, number in protocol.missing)}; the same command "
        "goes on with them."
        if protocol.missing
        else ""
    )
    said = (
        f"{len(protocol.runs)} of {asked} trainings were run, {settings['epochs']} epochs each, batches of "
        f"{settings['batch_size']}, Adam with weight decay 1e-05 and a WeightedRandomSampler, "
        f"{'only the head trained' if settings['frozen'] else 'all layers trained'}, seed {settings['seed']}; "
        f"{seconds / 60:.1f} minutes on {devices}. Data: {protocol.description}. Start: {begun}.{missing}"
    )
    blocks: list[Block] = [Text("heading", "The paper's protocol"), Text("paragraph", said)]
    if not protocol.runs:
        return blocks
    blocks += [_table_3(protocol), _figure_9(protocol), _table_4(protocol), *_comparisons(protocol)]
    blocks.append(_figure_10(protocol))
    return blocks


def _table_3(protocol: Protocol) -> Table:
    run = protocol.runs[0]
    tested = sum(run.labels)
    rows = (
        (
            "training",
            str(run.training_residual),
            str(len(run.training) - run.training_residual),
            str(len(run.training)),
        ),
        ("test", str(tested), str(len(run.testing) - tested), str(len(run.testing))),
    )
    sizes = {(len(one.training), len(one.testing)) for one in protocol.runs}
    note = (
        "By patient, stratified by label; the same groupings for every network."
        if len(sizes) == 1
        else "The first grouping; others differ by a few scans, because patients are drawn and not scans."
    )
    return Table("Table 3: scans in training and test set", ("set", "residual", "non-residual", "all"), rows, note)


def _table_4(protocol: Protocol) -> Table:
    rows = []
    for name in protocol.architectures:
        spread = performance(protocol, name)
        rows.append((name, *(_spread(spread[measure].mean, spread[measure].deviation) for measure in MEASURES)))
    groupings = max(len(protocol.of(name)) for name in protocol.architectures)
    return Table(
        f"Table 4: performance in {groupings} random grouping{'s' if groupings != 1 else ''}, mean ± SD",
        ("network", "accuracy", "sensitivity", "specificity", "precision", "F1", "AUC"),
        tuple(rows),
        "In percent, AUC too; accuracy to F1 at a Softmax output of one half. Residual tissue is positive: the paper "
        "calls our specificity sensitivity, and our sensitivity specificity.",
        widths=(22, 13, 13, 13, 13, 13, 13),
    )


def _spread(mean: float, deviation: float) -> str:
    if math.isnan(mean):
        return _NOT_DEFINED
    return f"{100 * mean:.2f}" + ("" if math.isnan(deviation) else f" ± {100 * deviation:.2f}")


def _comparisons(protocol: Protocol) -> list[Block]:
    rank_rows, area_rows = [], []
    for one, other in itertools.combinations(protocol.architectures, 2):
        pair = f"{one} / {other}"
        found = ranks(protocol, one, other)
        rank_rows.append((pair, *(_u(found[measure]) for measure in MEASURES)))
        compared = areas(protocol, one, other)
        known = [each.p_value for each in compared.each if each is not None]
        together = compared.together
        area_rows.append(
            (
                pair,
                _NOT_DEFINED if together is None else f"{together.first:.3f} / {together.second:.3f}",
                _NOT_DEFINED if together is None else f"{together.interval[0]:.3f} to {together.interval[1]:.3f}",
                _NOT_DEFINED if together is None else _p(together.p_value),
                f"{sum(value < 0.05 for value in known)} of {len(compared.each)}",  # not defined ones are not below
            )
        )
    if not rank_rows:
        return []
    return [
        Table(
            "Mann-Whitney U between networks over the groupings: U, p",
            ("networks", "accuracy", "sensitivity", "specificity", "precision", "F1", "AUC"),
            tuple(rank_rows),
            "Groupings of one cohort share scans, so p is too small: it tells how steady the order of two networks is "
            "in this cohort, not how it would be in another hospital.",
            widths=(22, 13, 13, 13, 13, 13, 13),
        ),
        Table(
            "DeLong's test between networks on the same test scans",
            ("networks", "AUC", "95 % interval of difference", "p", "groupings with p < 0.05"),
            tuple(area_rows),
            "On all tested scans, each once, with the mean of its logits over the groupings that tested it; last "
            "column: each grouping by itself.",
            widths=(30, 18, 24, 10, 18),
        ),
    ]


def _u(found: metrics.RankComparison | None) -> str:
    return _NOT_DEFINED if found is None else f"{found.u:g}, {_p(found.p_value)}"


def _p(value: float) -> str:
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def _figure_9(protocol: Protocol) -> Drawing:
    names = protocol.architectures
    plot = Plot(figsize=(8.2, 2.5 * len(names) + 0.3), layout="constrained")
    grid: Any = plot.subplots(len(names), 2, squeeze=False)
    for row, name in enumerate(names):
        runs = protocol.of(name)
        for column, kind in enumerate(("loss", "accuracy")):
            ax = grid[row][column]
            for side, colour in (("training", COLOURS[0]), ("test", COLOURS[1])):
                lines = [[getattr(point, f"{side}_{kind}") for point in run.curve] for run in runs[:_CURVES_SHOWN]]
                epochs = [point.epoch for point in runs[0].curve]
                for line in lines:
                    ax.plot(epochs, line, color=colour, linewidth=0.6, alpha=0.3)
                means = [math.fsum(values) / len(values) for values in zip(*lines, strict=True)]
                ax.plot(epochs, means, color=colour, linewidth=1.8, label=side, marker="o" if len(epochs) < 4 else None)
            ax.set_xlabel("epoch")
            ax.set_ylabel(kind)
            ax.set_title(f"{name}: {kind}", fontsize=10, loc="left")
            if kind == "accuracy":
                ax.set_ylim(top=1.02)
            ax.legend(frameon=False, fontsize=8)
            _plain(ax)
    return _drawing(
        plot,
        "Figure 9: loss and accuracy of training and test set by epoch. Thick: mean of the groupings; thin: each. "
        "Of single network inputs.",
    )


def _figure_10(protocol: Protocol) -> Drawing:
    plot = Plot(figsize=(5.4, 5.0), layout="constrained")
    ax = plot.subplots()
    for name, colour in zip(protocol.architectures, itertools.cycle(COLOURS), strict=False):
        labels, scores = pooled(protocol.of(name))
        found = area(labels, scores)
        told = _NOT_DEFINED if found is None else ", ".join(word for word in _area(found) if word)
        _curve(ax, roc_points(labels, scores), colour, f"{name}: {told}")
    _roc_axes(ax, "ROC of the networks")
    return _drawing(
        plot,
        "Figure 10: ROC curves, AUC with DeLong's 95 % interval. All tested scans, each once, scored by the mean of "
        "its logits over the groupings that tested it.",
    )


def _roc_drawing(scored: Sequence[Scored], found: Area, record: WeightsRecord | None) -> Drawing:
    plot = Plot(figsize=(5.4, 5.0), layout="constrained")
    ax = plot.subplots()
    points = roc_points(labels_of(scored), ranking_scores(scored))
    _curve(ax, points, COLOURS[0], f"AUC {', '.join(word for word in _area(found) if word)}")
    whole = figures(scored)
    called = sum(one.outcome == "present" for one in scored if not one.residual)
    if whole.sensitivity.share is not None and whole.specificity.of:
        x = called / whole.specificity.of
        told = "operating point" if record is None else f"operating point, threshold {record.threshold:.3g}"
        ax.plot([x], [whole.sensitivity.share], marker="o", linestyle="none", color=COLOURS[1], label=told)
    _roc_axes(ax, "ROC, all scans")
    return _drawing(plot, "ROC curve of the evaluated weights; undetermined and declined scans are scored 0.5.")


_VIEW_MISSING = "out_of_scope: view_missing"


def _why_left_out(one: Excluded) -> str:
    """The reason, and for what is out of scope the node's own reason behind it."""
    return f"{one.reason}: {one.detail.split(':')[0]}" if one.reason == "out_of_scope" else one.reason


def _about_exclusions(content: ReportContent) -> list[Block]:
    blocks: list[Block] = [Text("heading", "What is not in the figures, and what got no answer")]
    counts = Counter(_why_left_out(one) for one in content.excluded)
    alone = counts[_VIEW_MISSING]
    if alone:
        whole = alone + len(content.scored)
        blocks.append(
            Text(
                "paragraph",
                f"{alone} of {whole} labelled 131I neck scans ({alone / whole:.1%}) came with one view only. The node "
                "sends a note for such a scan, and no finding.",
            )
        )
    if counts:
        reasons = tuple((reason, str(count)) for reason, count in sorted(counts.items()))
        rows = tuple((one.what, one.reason, one.detail) for one in content.excluded)
        blocks += [
            Table("Files and lines left out, by reason", ("reason", "how many"), reasons),
            Table(
                "Each of them",
                ("what", "reason", "why"),
                rows,
                "Files are named as in the cohort's folder. Look whether their names tell who a patient is before this "
                "report is passed on.",
                widths=(40, 18, 42),
            ),
        ]
    else:
        blocks.append(Text("paragraph", "No file and no line of the labels was left out."))
    declined = Counter(one.reason for one in content.scored if one.outcome == "declined")
    if declined:
        rows_declined = tuple((reason, str(count)) for reason, count in sorted(declined.items()))
        blocks.append(
            Table("Scans that the node declined, in the figures as errors", ("reason", "scans"), rows_declined)
        )
    return blocks


def _limits(content: ReportContent) -> list[Block]:
    said = [
        "The figures hold for scans like these: this camera, protocol and mixture of patients. Intervals tell the "
        "chance of drawing these scans, not what another hospital would find.",
        "Intervals and tests take scans as independent; several scans of one patient make them too narrow.",
    ]
    if content.synthetic:
        said.append(
            "Simulated scans are planes and not Monte Carlo, without motion; a model that does well on them claims no "
            "clinical accuracy."
        )
    return [Text("heading", "Limits"), *(Text("paragraph", sentence) for sentence in said)]


# Words ------------------------------------------------------------------------------------------------------------


def _number(value: float | None) -> str:
    return _NOT_DEFINED if value is None else f"{value:.4f}"


def _rate(rate: Rate) -> tuple[str, str, str]:
    if rate.share is None or rate.interval is None:
        return _NOT_DEFINED, "", f"{rate.count} of {rate.of}"
    return f"{rate.share:.4f}", f"{rate.interval[0]:.4f} to {rate.interval[1]:.4f}", f"{rate.count} of {rate.of}"


def _short(rate: Rate) -> str:
    if rate.interval is None:
        return "-"
    return f"{rate.count} of {rate.of} ({rate.interval[0]:.2f} to {rate.interval[1]:.2f})"


def _area(found: Area | None) -> tuple[str, str, str]:
    if found is None:
        return _NOT_DEFINED, "", ""
    interval = "" if found.low is None or found.high is None else f"{found.low:.4f} to {found.high:.4f}"
    return f"{found.value:.4f}", interval, ""


# Drawing ----------------------------------------------------------------------------------------------------------


def _drawing(plot: Plot, caption: str) -> Drawing:
    svg, png = io.BytesIO(), io.BytesIO()
    # Without these a second report of the same runs would have other bytes.
    with matplotlib.rc_context({"svg.hashsalt": "remnant"}):
        plot.savefig(svg, format="svg", metadata={"Date": None})
    plot.savefig(png, format="png", dpi=200)
    return Drawing(caption, svg.getvalue(), png.getvalue())


def _curve(ax: Axes, points: Iterable[tuple[float, float]], colour: str, label: str) -> None:
    x, y = zip(*points, strict=True)
    ax.plot(x, y, color=colour, linewidth=1.8, label=label)


def _roc_axes(ax: Axes, title: str) -> None:
    ax.plot([0, 1], [0, 1], color="#8a96a3", linewidth=1, linestyle="--")
    _axes(ax, "false-positive rate (1 - specificity)", "true-positive rate (sensitivity)", title)
    ax.legend(loc="lower right", frameon=False, fontsize=9)


def _axes(ax: Axes, x: str, y: str, title: str) -> None:
    ax.set_xlim(-0.02, 1.02)
    ax.set_ylim(-0.02, 1.02)
    ax.set_aspect("equal")
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.set_title(title, fontsize=10, loc="left")
    _plain(ax)


def _plain(ax: Axes) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.grid(visible=True, color="#e3e8ee", linewidth=0.6)
    ax.set_axisbelow(True)


# PDF --------------------------------------------------------------------------------------------------------------


class _Page(FPDF):
    """A4 with a page number; the fonts are those that matplotlib brings, for they hold every character we print."""

    def __init__(self, title: str) -> None:
        super().__init__(format="A4")
        fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        self.add_font("body", "", fonts / "DejaVuSans.ttf")
        self.add_font("body", "B", fonts / "DejaVuSans-Bold.ttf")
        self.set_title(title)
        self.set_margins(18, 16, 18)
        self.set_auto_page_break(auto=True, margin=18)
        self._title = title

    def footer(self) -> None:
        self.set_y(-13)
        self.set_font("body", "", 7.5)
        self.set_text_color(90)
        self.cell(0, 5, self._title)
        self.set_x(self.l_margin)
        self.cell(0, 5, f"{self.page_no()} / {{nb}}", align="R")
        self.set_text_color(0)


def _pdf(title: str, subtitle: str, blocks: Sequence[Block]) -> bytes:
    pdf = _Page(title)
    pdf.add_page()
    pdf.set_font("body", "B", 17)
    pdf.multi_cell(0, 8, title, new_x="LMARGIN", new_y="NEXT", align="L")
    _paragraph(pdf, subtitle, size=8.5, grey=90)
    for block in blocks:
        if isinstance(block, Table):
            _pdf_table(pdf, block)
        elif isinstance(block, Drawing):
            _pdf_drawing(pdf, block)
        elif block.kind == "heading":
            if pdf.will_page_break(40):
                pdf.add_page()
            pdf.ln(4)
            pdf.start_section(block.text)
            pdf.set_font("body", "B", 12.5)
            pdf.multi_cell(0, 7, block.text, new_x="LMARGIN", new_y="NEXT", align="L")
            pdf.ln(1)
        elif block.kind == "banner":
            pdf.ln(1)
            pdf.set_fill_color(252, 239, 238)
            pdf.set_font("body", "B", 9)
            pdf.multi_cell(0, 6.5, block.text, new_x="LMARGIN", new_y="NEXT", fill=True, align="L", padding=(1, 2))
            pdf.set_fill_color(255)
            pdf.ln(1)
        else:
            _paragraph(pdf, block.text)
    return bytes(pdf.output())


def _paragraph(pdf: FPDF, text: str, *, size: float = 9, grey: int = 0) -> None:
    pdf.set_font("body", "", size)
    pdf.set_text_color(grey)
    pdf.multi_cell(0, size * 0.53, text, new_x="LMARGIN", new_y="NEXT", align="L")
    pdf.set_text_color(0)
    pdf.ln(1.5)


def _pdf_table(pdf: FPDF, block: Table) -> None:
    if pdf.will_page_break(24):
        pdf.add_page()
    pdf.ln(1)
    pdf.set_font("body", "B", 9)
    pdf.multi_cell(0, 5.5, block.caption, new_x="LMARGIN", new_y="NEXT", align="L")
    pdf.set_font("body", "", 7.5)
    pdf.set_draw_color(200, 208, 216)
    with pdf.table(
        width=int(pdf.epw),
        col_widths=block.widths or None,
        align="L",
        text_align="LEFT",
        line_height=4.2,
        padding=0.6,
        borders_layout=TableBordersLayout.HORIZONTAL_LINES,
        first_row_as_headings=bool(block.head),
        headings_style=FontFace(emphasis="BOLD"),
    ) as table:
        for cells in (block.head, *block.rows) if block.head else block.rows:
            row = table.row()
            for cell in cells:
                style = {"pass": FontFace(color=(17, 102, 58)), "FAIL": FontFace(color=(179, 38, 30))}.get(cell)
                row.cell(cell, style=style)
    if block.note:
        pdf.ln(1)
        _paragraph(pdf, block.note, size=7.5, grey=80)
    pdf.ln(2)


def _pdf_drawing(pdf: FPDF, block: Drawing) -> None:
    height_px, width_px = int.from_bytes(block.png[20:24]), int.from_bytes(block.png[16:20])  # PNG's IHDR
    width = min(pdf.epw, width_px / 200 * 25.4 * 0.85)
    height = width * height_px / width_px
    if height > pdf.eph - 20:
        width, height = width * (pdf.eph - 20) / height, pdf.eph - 20
    if pdf.will_page_break(height + 12):
        pdf.add_page()
    pdf.image(io.BytesIO(block.png), w=width, h=height, alt_text=block.caption)
    pdf.ln(1)
    _paragraph(pdf, block.caption, size=8, grey=60)
