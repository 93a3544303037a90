"""The three networks, and the import of torchvision beside a CPU torch."""

import subprocess
import sys

import pytest
import torch

from models.architectures import ARCHITECTURES, UnknownArchitecture, build, head, judged


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_network_gives_two_logits_for_a_picture(architecture: str) -> None:
    torch.manual_seed(1)
    network = build(architecture).eval()
    with torch.inference_mode():
        output = network(torch.randn(2, 3, 224, 224))
    assert output.shape == (2, 2)
    assert bool(torch.isfinite(output).all())


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_one_pass_gives_the_logits_of_the_network_and_the_features_before_its_head(architecture: str) -> None:
    torch.manual_seed(4)
    network = build(architecture).eval()
    images = torch.randn(2, 3, 112, 112)
    with torch.inference_mode():
        seen = judged(architecture, network, images)
        assert torch.equal(seen.logits, network(images))
        assert seen.embedding.ndim == 2
        last = head(architecture, network)
        if architecture == "squeezenet1_1":
            assert seen.embedding.shape == (2, 512)
        else:
            assert torch.allclose(last(seen.embedding), seen.logits, atol=1e-5)
    assert {parameter.shape[0] for parameter in last.parameters()} == {2}


def test_an_unknown_architecture_is_named_with_the_known_ones() -> None:
    with pytest.raises(UnknownArchitecture, match=r"'vgg16'.*resnet18"):
        build("vgg16")


def test_torchvision_imports_in_a_fresh_process_without_a_warning_and_may_be_asked_twice() -> None:
    program = (
        "from models.torchvision_cpu import torchvision_models\n"
        "assert torchvision_models() is torchvision_models()\n"
        "import torchvision.transforms.v2\n"
        "print(torchvision_models().resnet18(weights=None, num_classes=2).fc.out_features)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2"
