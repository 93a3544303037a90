"""The report says what the runs and scores say, what is missing, and nothing that a page would execute."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from models import weights
from pipeline.evaluation import Scored
from pipeline.evaluation_report import Drawing, ReportContent, Table, Text, report_blocks, write_report
from pipeline.hospital_cohort import Excluded
from pipeline.protocol import CurvePoint, Protocol, ProtocolSettings, Run

SCORES = {
    "resnet18": ([-2.0, -1.0, 1.0, 2.0], [-2.0, 0.5, 1.0, 2.0]),
    "squeezenet1_1": ([-2.0, 1.5, -1.0, 2.0], [2.0, 0.5, 1.0, -2.0]),
}


def _protocol(*, groupings: int = 2) -> Protocol:
    """Two networks on two groupings of four scans each, of which the first two are clean."""
    curve = tuple(CurvePoint(epoch, 1 / epoch, 0.5, 2 / epoch, 0.5) for epoch in (1, 2, 3))
    settings = dataclasses.asdict(ProtocolSettings(architectures=tuple(SCORES), groupings=groupings, epochs=3))
    runs = tuple(
        Run(
            architecture=name,
            grouping=number,
            start="random numbers, no pre-training",
            start_sha256="",
            pretrained=False,
            learning_rate=1e-3,
            training=tuple(range(8, 20)),
            testing=tuple(range(4 * number, 4 * number + 4)),
            training_residual=7,
            labels=(0, 0, 1, 1),
            logits=tuple((score,) for score in scores),
            curve=curve,
            seconds=60.0,
            device="CPU",
        )
        for name, each in SCORES.items()
        for number, scores in enumerate(each)
    )
    return Protocol(settings, "made up for a test", False, 20, 11, 20, runs)


def _content(**changed: object) -> ReportContent:
    content = ReportContent("A title", "2026-11-23", "0", "a cohort", False, protocol=_protocol())
    return dataclasses.replace(content, **changed)  # type: ignore[arg-type]  # fields by name


def _table(content: ReportContent, caption: str) -> Table:
    (found,) = [
        block for block in report_blocks(content) if isinstance(block, Table) and block.caption.startswith(caption)
    ]
    return found


def _words(content: ReportContent) -> str:
    return "\n".join(block.text for block in report_blocks(content) if isinstance(block, Text))


def test_table_3_and_table_4_are_made_from_the_runs() -> None:
    assert _table(_content(), "Table 3").rows == (("training", "7", "5", "12"), ("test", "2", "2", "4"))
    accuracy = [1.0, 0.75]
    row = _table(_content(), "Table 4").rows[0]
    assert row[0] == "resnet18"
    assert row[1] == f"{100 * np.mean(accuracy):.2f} ± {100 * np.std(accuracy, ddof=1):.2f}"
    assert row[2] == "100.00 ± 0.00"
    assert "2 random groupings" in _table(_content(), "Table 4").caption


def test_networks_are_compared_by_mann_whitney_and_delong() -> None:
    assert [row[0] for row in _table(_content(), "Mann-Whitney").rows] == ["resnet18 / squeezenet1_1"]
    (row,) = _table(_content(), "DeLong").rows
    assert re.fullmatch(r"\d\.\d{3} / \d\.\d{3}", row[1])
    assert row[4].endswith("of 2")


def test_trainings_that_were_not_run_and_learning_rates_that_are_not_the_papers_are_said() -> None:
    words = _words(_content(protocol=_protocol(groupings=3)))
    assert "4 of 6 trainings were run" in words
    assert "NOT RUN YET: resnet18 3, squeezenet1_1 3" in words
    assert "learning rate 0.001 (not pre-trained, so not the paper's 1e-05)" in words


def test_simulated_scans_are_called_synthetic_first_of_all_and_real_ones_are_not() -> None:
    first = report_blocks(_content(synthetic=True))[0]
    assert isinstance(first, Text)
    assert first.text.startswith("SYNTHETIC")
    assert "SYNTHETIC" not in _words(_content())


def test_scans_with_one_view_only_are_left_out_and_their_share_is_told() -> None:
    excluded = tuple(Excluded(f"{n}.dcm", "out_of_scope", "view_missing: posterior") for n in range(3))
    content = _content(excluded=(*excluded, Excluded("ct.dcm", "out_of_scope", "wrong_class: CT")))
    share = f"3 of {3 + len(content.scored)} labelled 131I neck scans ({3 / (3 + len(content.scored)):.1%})"
    assert share in _words(content)
    assert _table(content, "Files and lines left out").rows == (
        ("out_of_scope: view_missing", "3"),
        ("out_of_scope: wrong_class", "1"),
    )


def test_every_exclusion_and_every_declined_reason_is_listed() -> None:
    excluded = (Excluded("a/1.dcm", "duplicate", "twice"), Excluded("b", "unreadable", "no image"))
    scored = (
        Scored("1.1", "a", True, "present", 0.9),
        Scored("1.2", "b", False, "declined", None, "low_counts"),
    )
    content = _content(excluded=excluded, scored=scored, record=weights.find("remnant-resnet18-phantom").record)
    assert _table(content, "Each of them").rows == (
        ("a/1.dcm", "duplicate", "twice"),
        ("b", "unreadable", "no image"),
    )
    assert _table(content, "Scans that the node declined").rows == (("low_counts", "1"),)
    figures = {row[0]: row[1:] for row in _table(content, "Figures with").rows}
    assert figures["accuracy"][2] == "1 of 2"
    assert figures["declined"][2] == "1 of 2"


def test_both_files_hold_the_report_and_a_file_name_is_no_markup(tmp_path: Path) -> None:
    content = _content(excluded=(Excluded("<script>alert(1)</script>.dcm", "unreadable", "no image"),))
    page, pdf = write_report(content, tmp_path)
    html = page.read_text()
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;.dcm" in html
    assert "Figure 10" in html
    assert pdf.read_bytes().startswith(b"%PDF-")
    assert len(list(tmp_path.iterdir())) == 2


def test_the_same_runs_draw_the_same_pictures() -> None:
    def drawn() -> list[bytes]:
        return [block.svg for block in report_blocks(_content()) if isinstance(block, Drawing)]

    assert len(drawn()) == 2
    assert drawn() == drawn()


@pytest.mark.parametrize("runs", [(), "one"])
def test_a_protocol_that_has_hardly_begun_is_still_reported(runs: object) -> None:
    protocol = _protocol()
    begun = dataclasses.replace(protocol, runs=() if runs == () else protocol.runs[:1])
    assert f"{len(begun.runs)} of 4 trainings were run" in _words(_content(protocol=begun))
