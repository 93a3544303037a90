"""The statement that a hospital reads is the one this code would write."""

from pathlib import Path

import pytest

from dicom_node import contexts, receiver, sender
from dicom_node.conformance import statement
from dicom_node.report import secondary_capture, segmentation, structured_report
from dicom_node.settings import Settings, keys

COMMITTED = Path(__file__).parents[2] / "deploy" / "CONFORMANCE.md"


@pytest.fixture
def default_settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.delenv("REMNANT_NODE__PORT", raising=False)
    return Settings()


def test_the_committed_statement_is_not_stale(default_settings: Settings) -> None:
    assert COMMITTED.read_text(encoding="utf-8") == statement(default_settings), "run `remnant conformance`"


def test_it_names_every_class_syntax_status_and_setting(default_settings: Settings) -> None:
    text = " ".join(statement(default_settings).split())  # a paragraph may wrap within a name
    for cx in contexts.accepted_contexts([]):
        assert f"`{cx.abstract_syntax}`" in text
    for syntax in (*contexts.DEFAULT_SYNTAXES, *contexts.OPTIONAL_SYNTAXES):
        assert syntax.name in text
    for row in sender.STATUS_TABLE:
        assert f"| {row.text} |" in text
    for status in (receiver.SUCCESS, receiver.OUT_OF_RESOURCES, receiver.DOES_NOT_MATCH, receiver.CANNOT_UNDERSTAND):
        assert f"| `{status:04X}` |" in text
    for name, _, _ in keys():
        assert f"| `{name}` |" in text


def test_it_follows_the_settings_of_the_site() -> None:
    text = statement(
        Settings.model_validate(
            {
                "node": {"ae_title": "SITE7"},
                "receiver": {
                    "extra_classes": ["PositronEmissionTomographyImageStorage"],
                    "extra_syntaxes": ["RLELossless"],
                },
            }
        )
    )
    assert "| Positron Emission Tomography Image Storage | `1.2.840.10008.5.1.4.1.1.128` | kept, not analysed |" in text
    assert "RLE Lossless (`1.2.840.10008.1.2.5`)" in text
    assert "`SITE7`" in text


def test_the_classes_it_says_we_send_are_those_that_are_rendered() -> None:
    assert {kind: sent.uid for kind, sent in contexts.RESULT_CLASSES.items()} == {
        "sr": structured_report.SOP_CLASS_UID,
        "sc": secondary_capture.SOP_CLASS_UID,
        "seg": segmentation.SOP_CLASS_UID,
    }


def test_no_table_is_broken_by_a_bar_in_a_cell(default_settings: Settings) -> None:
    widths: list[int] = []
    for line in statement(default_settings).splitlines():
        if line.startswith("|"):
            widths.append(line.replace("\\|", "").count("|"))
            assert widths[-1] == widths[0], line
        else:
            widths = []
