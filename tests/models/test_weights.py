"""Weights records: what is refused, and that nothing is parsed before its digest was compared."""

import hashlib
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from models import embedding, weights
from models.architectures import build
from models.weights import WeightsError

Record = Callable[..., weights.WeightsRecord]


@pytest.fixture
def record_path(tmp_path: Path, untrained_record: Record) -> Path:
    torch.manual_seed(3)
    return weights.save(tmp_path, untrained_record(), build("squeezenet1_1"))


def _edit(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    data |= changes
    path.write_text(json.dumps(data))


def _replace_tensors(path: Path, content: bytes) -> None:
    """Put other bytes in place of the tensors and make the record agree, as a mistaken or hostile author would."""
    (path.parent / "untrained.safetensors").write_bytes(content)
    _edit(path, sha256=hashlib.sha256(content).hexdigest())


def test_what_was_saved_loads_in_eval_mode_with_float16_precision(record_path: Path) -> None:
    loaded = weights.load(str(record_path))
    torch.manual_seed(3)
    original = build("squeezenet1_1").eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        assert torch.allclose(loaded.network(images), original(images), atol=1e-2)
    assert not loaded.network.training
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())
    assert {parameter.dtype for parameter in loaded.network.parameters()} == {torch.float32}
    assert loaded.record == weights.find(str(record_path)).record
    assert weights.verify(str(record_path)).record == loaded.record


def test_batch_normalisation_survives_without_its_counters(tmp_path: Path, untrained_record: Record) -> None:
    path = weights.save(tmp_path, untrained_record(architecture="resnet18"), build("resnet18"))
    tensors = safetensors.torch.load((tmp_path / "untrained.safetensors").read_bytes())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert weights.load(str(path)).network(torch.zeros(1, 3, 224, 224)).shape == (1, 2)


def test_one_changed_byte_is_refused_by_its_digest(record_path: Path) -> None:
    file = record_path.parent / "untrained.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for use in (weights.verify, weights.load):
        with pytest.raises(WeightsError, match="digest differs"):
            use(str(record_path))


def test_a_truncated_file_is_refused(record_path: Path) -> None:
    file = record_path.parent / "untrained.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match="digest differs"):
        weights.load(str(record_path))
    _replace_tensors(record_path, content[: len(content) // 2])
    with pytest.raises(WeightsError, match="not a safetensors file"):
        weights.load(str(record_path))


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (Path("exploded"), "a pickle ran"))


def test_a_pickle_is_refused_and_never_run(record_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _replace_tensors(record_path, pickle.dumps(_Bomb()))
    with pytest.raises(WeightsError, match="not a safetensors file"):
        weights.load(str(record_path))
    assert not Path("exploded").exists()


def test_tensors_of_another_network_type_or_shape_are_refused(record_path: Path) -> None:
    tensors = {key: value.half() for key, value in build("squeezenet1_1").state_dict().items()}
    _replace_tensors(record_path, safetensors.torch.save(tensors | {"extra.weight": torch.zeros(1).half()}))
    with pytest.raises(WeightsError, match="not those of a squeezenet1_1"):
        weights.load(str(record_path))
    _replace_tensors(record_path, safetensors.torch.save(tensors | {"classifier.1.bias": torch.zeros(3).half()}))
    with pytest.raises(WeightsError, match="not those of a squeezenet1_1"):
        weights.load(str(record_path))
    _replace_tensors(record_path, safetensors.torch.save({key: value.float() for key, value in tensors.items()}))
    with pytest.raises(WeightsError, match="float16"):
        weights.load(str(record_path))
    broken = tensors | {"classifier.1.bias": torch.full((2,), torch.nan).half()}
    _replace_tensors(record_path, safetensors.torch.save(broken))
    with pytest.raises(WeightsError, match="not finite"):
        weights.load(str(record_path))
    _edit(record_path, architecture="vgg16")
    _replace_tensors(record_path, safetensors.torch.save(tensors))
    with pytest.raises(WeightsError, match="vgg16"):
        weights.load(str(record_path))


def _acceptance(record: weights.WeightsRecord, **changes: str) -> dict[str, str]:
    return {
        "signed_by": "A. Physicist",
        "signed_on": "2030-01-01",
        "camera": "Camera 1",
        "accepted_sha256": record.sha256,
        "accepted_preprocessing_version": record.preprocessing_version,
        "summary": "accepted",
    } | changes


def test_local_weights_need_an_acceptance_report_for_exactly_these_weights(record_path: Path) -> None:
    record = weights.find(str(record_path)).record
    _edit(record_path, release="local")
    with pytest.raises(WeightsError, match="without an acceptance report"):
        weights.find(str(record_path))
    for changes in ({"accepted_sha256": "1" * 64}, {"accepted_preprocessing_version": "0"}):
        _edit(record_path, acceptance=_acceptance(record, **changes))
        with pytest.raises(WeightsError, match="for other weights or preprocessing"):
            weights.find(str(record_path))
    _edit(record_path, acceptance=_acceptance(record, signed_by=" "))
    with pytest.raises(WeightsError, match="name signer"):
        weights.find(str(record_path))
    _edit(record_path, acceptance=_acceptance(record))
    assert weights.load(str(record_path)).record.release == "local"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"unknown_key": 1}, "unknown"),
        ({"threshold": "0.5"}, "finite number"),
        ({"threshold": 1.5}, "threshold"),
        ({"threshold": True}, "finite number"),
        ({"schema": 1}, "schema"),
        ({"name": "../../etc"}, "name"),
        ({"file": "../secret.safetensors"}, "bare name"),
        ({"file": "weights.pkl"}, "bare name"),
        ({"sha256": "ABC"}, "sha256"),
        ({"release": "clinical"}, "release"),
        ({"fusion": "max"}, "fusion"),
        ({"temperature": 0}, "temperature"),
        ({"undetermined_band": [0.6, 0.9]}, "enclose"),
        ({"undetermined_band": [0.6]}, "list of 2"),
        ({"input": {"size": 224}}, "missing"),
        ({"metrics": {"auc": "high"}}, "finite number"),
        (
            {"training_range": {"spacing_mm": [2.0, 1.0], "total_counts": [1, 2], "embedding_distance": None}},
            "low, high",
        ),
        ({"training_range": {"spacing_mm": [1.0, 2.0], "total_counts": [1, 2]}}, "missing"),
        ({"intended_use": ""}, "intended_use"),
    ],
)
def test_a_record_with_anything_wrong_is_refused_by_name(record_path: Path, changes: dict[str, Any], word: str) -> None:
    _edit(record_path, **changes)
    with pytest.raises(WeightsError, match=word):
        weights.find(str(record_path))


def test_a_missing_key_is_refused(record_path: Path) -> None:
    data = json.loads(record_path.read_text())
    del data["trained_on"]
    record_path.write_text(json.dumps(data))
    with pytest.raises(WeightsError, match=r"missing in record: trained_on"):
        weights.find(str(record_path))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"NaN"])
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(WeightsError):
        weights.find(str(path))


@pytest.mark.parametrize("name", ["no-such-weights", "/no/such/record.json", "weights.safetensors", "../x"])
def test_a_name_or_path_that_leads_nowhere_is_one_sentence(name: str) -> None:
    with pytest.raises(WeightsError) as caught:
        weights.find(name)
    assert "\n" not in str(caught.value)


def test_reading_and_verifying_a_record_imports_no_torch(record_path: Path) -> None:
    program = (
        "import sys\nfrom models import weights\n"
        f"weights.verify({str(record_path)!r})\n"
        "print(sorted({'torch', 'torchvision', 'cv2', 'safetensors'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def _accepted(path: Path, **changes: str) -> None:
    data = json.loads(path.read_text())
    report = {
        "signed_by": "A. Physicist",
        "signed_on": "2026-01-31",
        "camera": "a simulated camera",
        "accepted_sha256": data["sha256"],
        "accepted_preprocessing_version": data["preprocessing_version"],
        "summary": "invented for a test",
    }
    _edit(path, release="local", acceptance=report | changes)


def test_installed_weights_are_a_checked_copy_under_their_name(record_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "var" / "models"
    assert weights.installed(folder) == ()
    place = weights.install(record_path, folder)
    assert place.record_path == weights.installed_path("untrained-test-fixture", folder)
    assert weights.installed(folder) == ("untrained-test-fixture",)
    record_path.unlink()
    (record_path.parent / "untrained.safetensors").unlink()
    assert weights.load(str(place.record_path)).record == place.record
    assert not list(folder.glob(".*"))


def test_a_name_stands_for_one_set_of_weights(record_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    assert weights.install(record_path, folder) == weights.install(record_path, folder)
    _edit(record_path, threshold=0.4)
    with pytest.raises(WeightsError, match="give the new ones another"):
        weights.install(record_path, folder)
    _edit(record_path, name="remnant-resnet18-phantom")
    with pytest.raises(WeightsError, match="come with this version"):
        weights.install(record_path, folder)
    with pytest.raises(WeightsError, match="needs no installation"):
        weights.install(weights.CARDS / "remnant-resnet18-phantom.json", folder)
    assert weights.installed(folder) == ("untrained-test-fixture",)


def test_local_weights_are_installed_only_with_a_report_signed_for_them(record_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    _edit(record_path, release="local")
    with pytest.raises(WeightsError, match="without an acceptance report"):
        weights.install(record_path, folder)
    for changes, told in (({"signed_by": " "}, "signer"), ({"accepted_sha256": "1" * 64}, "other weights")):
        _accepted(record_path, **changes)
        with pytest.raises(WeightsError, match=told):
            weights.install(record_path, folder)
    assert weights.installed(folder) == ()
    _accepted(record_path)
    assert weights.install(record_path, folder).record.release == "local"


def test_nothing_of_a_refused_file_is_run_or_left_behind(
    record_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "models"
    with pytest.raises(WeightsError, match="not a weights record"):
        weights.install(record_path.parent / "untrained.safetensors", folder)
    _replace_tensors(record_path, pickle.dumps(_Bomb()))
    with pytest.raises(WeightsError, match="not a safetensors file"):
        weights.install(record_path, folder)
    _edit(record_path, sha256="0" * 64)
    with pytest.raises(WeightsError, match="digest differs"):
        weights.install(record_path, folder)
    assert not Path("exploded").exists()
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_is_one_sentence(record_path: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where a folder should be")
    with pytest.raises(WeightsError, match="cannot be installed into"):
        weights.install(record_path, tmp_path / "taken")


def _limited(tmp_path: Path, untrained_record: Record, **changes: Any) -> tuple[Path, embedding.EmbeddingRange]:
    known = embedding.fit(np.random.default_rng(1).normal(0, 1, (40, 512)).astype(np.float32))
    reach = weights.TrainingRange((1.0, 2.5), (500.0, 1e6), 3.0)
    record = untrained_record(training_range=reach)
    return weights.save(tmp_path / "limited", record, build("squeezenet1_1"), embedding=known, **changes), known


def test_the_range_of_the_embedding_travels_with_the_weights(tmp_path: Path, untrained_record: Record) -> None:
    path, known = _limited(tmp_path, untrained_record)
    loaded = weights.load(str(path))
    assert loaded.embedding is not None
    row = np.random.default_rng(2).normal(0, 1, 512).astype(np.float32)
    assert embedding.distance(row, loaded.embedding) == pytest.approx(embedding.distance(row, known), rel=0.01)
    assert loaded.record.training_range.embedding_distance == 3.0
    with torch.inference_mode():
        assert loaded.network(torch.zeros(1, 3, 64, 64)).shape == (1, 2)


def test_weights_without_a_range_have_none_and_ask_for_none(record_path: Path) -> None:
    assert weights.load(str(record_path)).embedding is None


@pytest.mark.parametrize("lost", ["mean", "basis", "spread", "rest", "all"])
def test_a_limit_without_its_range_is_refused_for_a_check_that_cannot_be_made_must_not_pass(
    tmp_path: Path, lost: str, untrained_record: Record
) -> None:
    path, _ = _limited(tmp_path, untrained_record)
    tensors = safetensors.torch.load((path.parent / "untrained.safetensors").read_bytes())
    kept = {key: value for key, value in tensors.items() if not key.startswith("embedding_range.")}
    if lost != "all":
        kept = {key: value for key, value in tensors.items() if key != f"embedding_range.{lost}"}
    assert len(kept) < len(tensors)
    _replace_tensors(path, safetensors.torch.save(kept))
    with pytest.raises(WeightsError, match="range of the embedding"):
        weights.load(str(path))
