"""The narrative that an integrator reads names what this code would send, and samples really come out as it says."""

from pathlib import Path

from typer.testing import CliRunner

from dicom_node.cli import app
from dicom_node.contexts import RECALL_CLASS, REPORT_CHAIN, RESULT_CLASSES
from dicom_node.ihe_narrative import narrative
from dicom_node.report import codes, key_object
from dicom_node.settings import Settings
from models import weights
from pipeline.reasons import REASONS

_DEPLOY = Path(__file__).parents[2] / "deploy"


def _record() -> weights.WeightsRecord:
    return weights.find(Settings().model.weights).record


def test_the_committed_narrative_is_not_stale() -> None:
    written = (_DEPLOY / "IHE-AI-RESULTS.md").read_text(encoding="utf-8")
    assert written == narrative(_record()), "run `remnant conformance --ihe`"


def test_the_command_writes_the_narrative(tmp_path: Path) -> None:
    out = tmp_path / "ihe.md"
    told = CliRunner().invoke(app, ["conformance", "--ihe", "--out", str(out)])
    assert told.exit_code == 0, told.output
    assert out.read_text(encoding="utf-8") == narrative(_record())


def test_it_names_every_class_code_and_reason_that_a_result_can_carry() -> None:
    text = " ".join(narrative(_record()).split())
    for sent in (*RESULT_CLASSES.values(), *REPORT_CHAIN, RECALL_CLASS):
        assert f"| {sent.name} | `{sent.uid}` |" in text
    for code in (*codes.OURS, *codes.VERDICTS.values(), codes.NONE_SUCCEEDED, *key_object.TITLES.values()):
        assert code.value in text
        assert code.meaning in text
    for token, reason in REASONS.items():
        assert (f"| `{token}` |" in text) == reason.ours
    assert _record().sha256 in text


def test_the_sample_of_the_rendering_that_it_points_to_is_there() -> None:
    assert "(example-secondary-capture.png)" in narrative(_record())
    assert (_DEPLOY / "example-secondary-capture.png").read_bytes().startswith(b"\x89PNG")
