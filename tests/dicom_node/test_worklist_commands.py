"""What an admin reads on a terminal."""

from typing import Any

import pytest

from dicom_node import cli

ROW: dict[str, Any] = dict.fromkeys(cli._LISTED) | {
    "id": 7,
    "state": "delivered",
    "finding": "undetermined",
    "probability": 0.6971,
    "views": "anterior,posterior",
    "source_aet": "OPTIMA1",
    "delivered_to": {"pacs": "acknowledged", "ris": "cancelled"},
    "last_error": "ris knows this study with another PatientID",
}


@pytest.mark.parametrize("columns", [80, 200])
def test_no_word_of_the_worklist_is_cut_on_a_narrow_or_a_wide_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    cli._print_rows([ROW], as_json=False)
    text = capsys.readouterr().out
    assert "…" not in text
    for word in ("delivered", "undetermined", "69.71 %", "acknowledged", "cancelled"):
        assert word in text
    assert ("OPTIMA1" in text) is (columns == 200)
    assert max(map(len, text.splitlines())) <= columns
