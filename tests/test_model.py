"""Tests of FlatModel, dead taps, folding, and weights from files."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18

from spartan_ray.engine.flat import FlatModel
from spartan_ray.errors import InputError
from spartan_ray.vision.config import Parent
from spartan_ray.vision.folding import Folding
from spartan_ray.vision.layers import FoldedBatchNorm2d, LiveConv2d
from spartan_ray.vision.leaves import Leaves
from spartan_ray.vision.models import build_model, initial_model

CPU = torch.device("cpu")


@example(size=(1, 4), kernel=1, stride=2, padding=1)  # no tap of the first axis ever overlaps the map
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.sampled_from([1, 2, 3, 5, 7]),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
)
def test_live_taps_are_the_whole_convolution(size: tuple[int, int], kernel: int, stride: int, padding: int) -> None:
    """The output and the gradients equal those of nn.Conv2d for every map, kernel, stride and padding."""
    if min(size) + 2 * padding < kernel:
        return
    torch.manual_seed(0)
    whole = nn.Conv2d(2, 3, kernel, stride, padding).double()
    live = LiveConv2d(2, 3, kernel, stride, padding).double()
    live.load_state_dict(whole.state_dict())
    x_whole = torch.randn(2, 2, *size, dtype=torch.float64, requires_grad=True)
    x_live = x_whole.detach().clone().requires_grad_()
    out_whole, out_live = whole(x_whole), live(x_live)
    torch.testing.assert_close(out_live, out_whole)
    for out in (out_whole, out_live):
        (out * torch.arange(out.numel(), dtype=torch.float64).reshape(out.shape)).sum().backward()
    torch.testing.assert_close(x_live.grad, x_whole.grad)
    torch.testing.assert_close(live.weight.grad, whole.weight.grad)
    assert live.bias is not None
    assert whole.bias is not None
    torch.testing.assert_close(live.bias.grad, whole.bias.grad)


def test_most_of_resnet18_s_taps_are_dead_on_32_by_32_images() -> None:
    network, _ = initial_model(Parent(), 10, 0)
    loss = network.train()(torch.randn(4, 3, 32, 32)).square().sum()
    loss.backward()
    total = sum(p.numel() for p in network.parameters())
    dead = sum(int((p.grad == 0).sum()) for p in network.parameters() if p.grad is not None and p.dim() == 4)
    assert total == 11_181_642
    assert dead > 6_800_000


def test_leaves_are_what_has_a_gradient() -> None:
    """A step of the leaves equals a step of all parameters, and changes theta_D as well."""
    x, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    whole, live = (FlatModel(initial_model(Parent(), 10, 0)[0], CPU) for _ in range(2))
    leaves = Leaves(live, x[:1])
    assert sum(leaf.numel() for leaf in leaves.tensors) < 4_300_000
    F.cross_entropy(whole.module.train()(x), labels).backward()
    with leaves():
        F.cross_entropy(live.module.train()(x), labels).backward()
    gradient_D, moved_D = whole.gradient(), live.theta_D.clone()
    for part, leaf in zip(leaves.parts(moved_D), leaves.tensors, strict=True):
        assert leaf.grad is not None
        part -= 0.1 * leaf.grad
    torch.testing.assert_close(moved_D, whole.theta_D - 0.1 * gradient_D)
    with torch.no_grad():
        for leaf in leaves.tensors:
            leaf -= 0.1 * leaf.grad  # type: ignore[operator]
    assert torch.equal(live.theta_D, moved_D)
    for conv in live.module.modules():
        assert not isinstance(conv, LiveConv2d) or conv.live is None


def test_resnet18_begins_as_torchvision_s() -> None:
    torch.manual_seed(3)
    ours = build_model(Parent(), 10).state_dict()
    torch.manual_seed(3)
    theirs = resnet18(num_classes=10).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_resnet18_is_torchvision_s_function(stem: str) -> None:
    network, _ = initial_model(Parent(stem=stem), 10, 0)  # type: ignore[arg-type]
    model = FlatModel(network, CPU)
    reference = resnet18(num_classes=10)
    if stem == "cifar":
        reference.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        reference.maxpool = nn.Identity()
    reference.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(model.module.eval()(x), reference.eval()(x), rtol=1e-4, atol=1e-4)
    network, reference, x = model.module.double().train(), reference.double().train(), x.double()
    loss, expected = (module(x).square().sum() for module in (network, reference))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for own, theirs in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(own.grad, theirs.grad, check_stride=False)


def test_parameters_are_views_of_theta_in_order_and_channels_last() -> None:
    network, _ = initial_model(Parent(model="convnet"), 10, 0)
    expected = np.concatenate(
        [
            (p.permute(0, 2, 3, 1) if p.dim() == 4 else p).detach().numpy().reshape(-1)
            for _, p in network.named_parameters()
        ]
    )
    model = FlatModel(network, CPU)
    np.testing.assert_array_equal(model.theta_D.numpy(), expected)
    model.theta_D.fill_(0.5)
    assert all((p == 0.5).all() for p in model.module.parameters())
    first = next(model.module.parameters())
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert all(value.is_contiguous() for value in model.state_dict().values())


def test_initial_weights_are_a_function_of_the_seed_and_leave_torch_s_generator() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second, other = (initial_model(Parent(model="convnet"), 10, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first[0].weight, second[0].weight)  # type: ignore[index]
    assert not torch.equal(first[0].weight, other[0].weight)  # type: ignore[index]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_of_another_width_keep_all_but_the_classifier(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(1)
    state = resnet18(num_classes=1000).state_dict()
    path = tmp_path / f"weights{suffix}"
    torch.save(state, path) if suffix == ".pt" else save_file(state, path)
    network, notes = initial_model(Parent(weights=str(path)), 10, 0)
    assert torch.equal(network.state_dict()["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])
    assert network.state_dict()["fc.weight"].shape == (10, 512)
    assert [note.split(":")[0] for note in notes] == ["fc.bias", "fc.weight"]
    assert all("1000 classes" in note for note in notes)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path(EVIL_FILE),)  # type: ignore[return-value]


EVIL_FILE = "evil-was-here"


def test_weights_that_cannot_be_used_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, "evil.pt")
    torch.save([1, 2], "list.pt")
    torch.save({"a": 1}, "numbers.pt")
    Path("torn.pt").write_bytes(Path("list.pt").read_bytes()[:100])
    Path("torn.safetensors").write_bytes(b"\xff" * 50)
    Path("text.pt").write_text("root:x:0:0\n")
    Path("bytes.pt").write_bytes(b"\x80o.")
    state = resnet18(num_classes=10).state_dict()
    torch.save({k: v for k, v in state.items() if k != "bn1.bias"}, "short.pt")
    torch.save(state | {"extra": torch.zeros(1)}, "long.pt")
    cifar = state | {"conv1.weight": torch.zeros(64, 3, 3, 3)}
    torch.save(cifar, "cifar.pt")
    for name, message in (
        ("absent.pt", "cannot be read as weights"),
        ("evil.pt", "cannot be read as weights"),
        ("list.pt", "holds no state dict"),
        ("numbers.pt", "holds no state dict"),
        ("torn.pt", "cannot be read as weights"),
        ("torn.safetensors", "cannot be read as weights"),
        ("text.pt", "cannot be read as weights: not a state dict as .pt, .pth or .safetensors"),
        ("bytes.pt", "cannot be read as weights: not a state dict as .pt, .pth or .safetensors"),
        ("short.pt", "bn1.bias is missing"),
        ("long.pt", "extra is not in the network"),
        ("cifar.pt", "conv1.weight is (64, 3, 3, 3), the network's is (64, 3, 7, 7)"),
    ):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            with pytest.raises(InputError, match=re.escape(f"parent.weights {name}: {message}")) as caught:
                initial_model(Parent(weights=name), 10, 0)
        assert "\n" not in str(caught.value)
        assert not warned
    assert not Path(EVIL_FILE).exists()


def test_imagenet_weights_offline_name_the_file_and_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    place = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    with pytest.raises(InputError, match=rf"fetch https://.*resnet18-f37072fd.pth and put it at {place}"):
        initial_model(Parent(weights="imagenet"), 10, 0)
    torch.save(resnet18().state_dict(), place)
    assert len(initial_model(Parent(weights="imagenet"), 10, 0)[1]) == 2
    with pytest.raises(InputError, match=r"no imagenet weights for parent\.model convnet"):
        initial_model(Parent(model="convnet", weights="imagenet"), 10, 0)


@pytest.mark.parametrize("config", [Parent(), Parent(stem="cifar"), Parent(model="convnet"), Parent(width=8)])
def test_folding_leaves_the_function_and_afterwards_no_trace(config: Parent) -> None:
    """Every BatchNorm layer is folded. Its statistics and affine parameters differ from the initial ones."""
    network = initial_model(config, 10, 0)[0].eval()
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        for value, (low, high) in ((norm.weight, (-1, 2)), (norm.bias, (-1, 1)), (norm.running_mean, (-1, 1))):
            assert value is not None
            value.data.uniform_(low, high)
        assert norm.running_var is not None
        norm.running_var.uniform_(0.5, 2)
    x = torch.randn(4, 3, 32, 32)
    folding = Folding(network, x[:1])
    with torch.inference_mode():
        whole = network(x)
        with folding(torch.float32):
            folded = network(x)
            assert sum(layer.folded for layer in norms if isinstance(layer, FoldedBatchNorm2d)) == len(norms)
        again = network(x)
    torch.testing.assert_close(folded, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))
    assert not torch.equal(folded, whole)
    assert torch.equal(again, whole)
