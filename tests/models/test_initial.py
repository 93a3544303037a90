"""What a training starts from: only files that are what they say, and nothing that is executed."""

import hashlib
from pathlib import Path

import pytest
import safetensors.torch
import torch

from models.architectures import ARCHITECTURES, build
from models.initial import InitialWeightsError, initial_weights
from models.torchvision_cpu import torchvision_models


def _official(folder: Path, stem: str, content: object) -> Path:
    """A file as torchvision publishes it: the first 8 digits of its digest in its name."""
    plain = folder / "plain"
    torch.save(content, plain)
    path = folder / f"{stem}-{hashlib.sha256(plain.read_bytes()).hexdigest()[:8]}.pth"
    plain.rename(path)
    return path


@pytest.fixture(scope="module")
def imagenet() -> dict[str, torch.Tensor]:
    """A SqueezeNet with a head of 1000 classes, as torchvision's own code builds it."""
    torch.manual_seed(9)
    state: dict[str, torch.Tensor] = torchvision_models().squeezenet1_1(weights=None).state_dict()
    return state


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_official_file_gives_every_tensor_but_the_head_which_is_new_and_repeatable(
    tmp_path: Path, architecture: str
) -> None:
    stem = {"shufflenet_v2_x1_0": "shufflenetv2_x1"}.get(architecture, architecture)
    torch.manual_seed(3)
    whole = getattr(torchvision_models(), architecture)(weights=None).state_dict()
    path = _official(tmp_path, stem, whole)
    start = initial_weights(architecture, "imagenet", folder=tmp_path, seed=4)
    assert start.pretrained
    assert start.description == f"ImageNet ({path.name})"
    assert start.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    new = {key for key, tensor in start.state.items() if not torch.equal(tensor, whole[key])}
    assert new == {key for key in whole if start.state[key].shape != whole[key].shape}
    assert len(new) == 2
    again, other = (initial_weights(architecture, str(path), seed=seed).state for seed in (4, 5))
    assert all(torch.equal(start.state[key], again[key]) for key in new)
    assert any(not torch.equal(start.state[key], other[key]) for key in new)
    build(architecture).load_state_dict(start.state)


def test_a_head_of_two_classes_is_kept(tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = build("squeezenet1_1").state_dict()
    safetensors.torch.save_file(state, tmp_path / "ours.safetensors")
    start = initial_weights("squeezenet1_1", str(tmp_path / "ours.safetensors"))
    assert all(torch.equal(start.state[key], tensor) for key, tensor in state.items())


def test_random_numbers_are_told_as_what_they_are() -> None:
    start = initial_weights("resnet18", "none")
    assert (start.state, start.pretrained) == (None, False)
    assert "no pre-training" in start.description


def test_our_own_record_is_a_start_and_only_for_its_own_network() -> None:
    record = Path(__file__).parents[2] / "models" / "cards" / "remnant-resnet18-phantom.json"
    start = initial_weights("resnet18", str(record))
    assert start.pretrained
    assert "simulated" in start.description
    with pytest.raises(InitialWeightsError, match="not a squeezenet1_1"):
        initial_weights("squeezenet1_1", str(record))


def test_an_official_file_whose_bytes_differ_from_its_name_is_refused(
    tmp_path: Path, imagenet: dict[str, torch.Tensor]
) -> None:
    path = _official(tmp_path, "squeezenet1_1", imagenet)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InitialWeightsError, match="digest differs"):
        initial_weights("squeezenet1_1", "imagenet", folder=tmp_path)
    bare = path.rename(tmp_path / "squeezenet.pth")
    with pytest.raises(InitialWeightsError, match="no digest in its name"):
        initial_weights("squeezenet1_1", str(bare))


class _Trap:
    """Unpickled plainly, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (self.path, "executed")


def test_a_pickle_with_code_in_it_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    path = _official(tmp_path, "resnet18", {"conv1.weight": _Trap(trap)})
    with pytest.raises(InitialWeightsError, match="plain tensors"):
        initial_weights("resnet18", str(path))
    assert not trap.exists()


def test_missing_folders_files_and_other_networks_are_told(tmp_path: Path, imagenet: dict[str, torch.Tensor]) -> None:
    with pytest.raises(InitialWeightsError, match=r"resnet18-f37072fd\.pth; it is not fetched"):
        initial_weights("resnet18", "imagenet")
    with pytest.raises(InitialWeightsError, match="found: none"):
        initial_weights("resnet18", "imagenet", folder=tmp_path)
    with pytest.raises(InitialWeightsError, match="cannot be read"):
        initial_weights("resnet18", str(tmp_path / "no.safetensors"))
    (tmp_path / "words.txt").write_text("no")
    with pytest.raises(InitialWeightsError, match="no weights record"):
        initial_weights("resnet18", str(tmp_path / "words.txt"))
    path = _official(tmp_path, "squeezenet1_1", imagenet)
    with pytest.raises(InitialWeightsError, match="is not a resnet18"):
        initial_weights("resnet18", str(path))
    broken = imagenet | {"classifier.1.bias": torch.full_like(imagenet["classifier.1.bias"], torch.nan)[:2]}
    safetensors.torch.save_file(broken, tmp_path / "nan.safetensors")
    with pytest.raises(InitialWeightsError, match="not finite"):
        initial_weights("squeezenet1_1", str(tmp_path / "nan.safetensors"))
    with pytest.raises(InitialWeightsError, match="no architecture"):
        initial_weights("vgg", "none")
