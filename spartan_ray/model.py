"""The networks, their initial weights, and FlatModel: one vector of parameters under a module."""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from spartan_ray.config import InputError, Parent
from spartan_ray.data import Splits
from spartan_ray.layers import FoldedBatchNorm2d, LiveConv2d
from spartan_ray.resnet import ResNet18

Call = tuple[nn.Module, torch.Tensor, torch.Tensor]


@torch.inference_mode()
def calls(module: nn.Module, image_NCHW: torch.Tensor) -> list[Call]:
    """The convolutions and BatchNorm layers of a network in the order in which they are used, with the input and the
    output of each."""
    found: list[Call] = []

    def note(layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        found.append((layer, inputs[0], output))

    kinds = (LiveConv2d, FoldedBatchNorm2d)
    hooks = [layer.register_forward_hook(note) for layer in module.modules() if isinstance(layer, kinds)]
    try:
        module.eval()(image_NCHW)
    finally:
        for hook in hooks:
            hook.remove()
    return found


class Folding:
    """Folds the BatchNorm layers of a network of `build_model` into their convolutions, for scoring.

    With its own statistics BatchNorm is a factor and a shift of each channel, which the convolution before it can do
    on the way: the same function to rounding, in a tenth less time. `with folding(dtype):` folds the weights as
    they are then. `image_NCHW` shows which convolution feeds which layer, and the sizes of the maps."""

    def __init__(self, module: nn.Module, image_NCHW: torch.Tensor) -> None:
        seen = calls(module, image_NCHW)
        self.pairs = [
            (conv, norm, input_NCHW.shape[2:])
            for conv, input_NCHW, output_NCHW in seen
            for norm, normalised_NCHW, _ in seen
            if isinstance(conv, LiveConv2d) and isinstance(norm, FoldedBatchNorm2d) and normalised_NCHW is output_NCHW
        ]

    @contextlib.contextmanager
    def __call__(self, dtype: torch.dtype) -> Iterator[None]:
        try:
            with torch.inference_mode():
                for conv, norm, size in self.pairs:
                    conv.folded, norm.folded = self._folded(conv, norm, size, dtype), True
            yield
        finally:
            for conv, norm, _ in self.pairs:
                conv.folded, norm.folded = None, False

    @staticmethod
    def _folded(
        conv: LiveConv2d, norm: FoldedBatchNorm2d, size: torch.Size, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The convolution's weight, arranged, and its bias with those of the layer after it."""
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert conv.bias is None, "one more would be nothing but a part of BatchNorm's mean"
        gain_O = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight = conv.arranged(size)
        gain_R = gain_O.repeat(len(weight) // len(gain_O)).view(-1, *[1] * (weight.dim() - 1))
        # A matrix of taps is a copy, and may be changed in place.
        weight = weight * gain_R if weight.dim() == 4 else weight.mul_(gain_R)
        return weight.to(dtype), (norm.bias - norm.running_mean * gain_O).to(dtype)


def build_model(config: Parent, classes: int) -> nn.Module:
    """The network of the configuration with torch's current random state as its initial weights."""
    return ResNet18(classes, config.stem) if config.model == "resnet18" else _convnet(classes)


def _convnet(classes: int) -> nn.Module:
    def block(channels_in: int, channels_out: int) -> list[nn.Module]:
        convolution = LiveConv2d(channels_in, channels_out, 3, stride=2, padding=1, bias=False)
        return [convolution, FoldedBatchNorm2d(channels_out), nn.ReLU()]

    return nn.Sequential(
        *block(3, 16), *block(16, 32), *block(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)
    )


def initial_model(config: Parent, classes: int, seed: int) -> tuple[nn.Module, list[str]]:
    """The parent at the start of a run, and what is to be said of its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_model(config, classes)
    if config.weights == "none":
        return network, []
    path = _imagenet_file(config) if config.weights == "imagenet" else Path(config.weights)
    return network, _load_weights(network, path, read_weights(path))


def _imagenet_file(config: Parent) -> Path:
    """torchvision's ImageNet weights of the model, from torch's cache or downloaded into it."""
    if config.model != "resnet18":
        raise InputError(f"parent.weights: there are no imagenet weights for parent.model {config.model}")
    from torchvision.models import ResNet18_Weights

    url: str = ResNet18_Weights.IMAGENET1K_V1.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[1], progress=False)
        except (URLError, OSError, RuntimeError) as error:
            raise InputError(
                f"parent.weights: cannot download the imagenet weights ({error}): fetch {url} and put it at {path}"
            ) from None
    return path


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """A state dict from a file. Nothing in the file is ever executed."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings(action="ignore"):  # it asks for a report of what it cannot read
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle make torch's reader raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        # torch's text for a pickle proposes to run the file's code.
        if not isinstance(error, (OSError, RuntimeError, EOFError, SafetensorError)):
            reason = "not a state dict as .pt, .pth or .safetensors, or one that needs to run code"
        raise InputError(f"parent.weights {path}: cannot be read as weights: {reason}") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"parent.weights {path}: holds no state dict (name: tensor)")
    return state


def _load_weights(network: nn.Module, path: Path, state: dict[str, torch.Tensor]) -> list[str]:
    """Copy a state dict into the network; only a classifier of another width may differ."""
    own = network.state_dict()
    classifier = [name for name, _ in network.named_parameters()][-2:]
    notes = []
    for name in sorted(own.keys() | state.keys()):
        if name not in own:
            raise InputError(f"parent.weights {path}: {name} is not in the network (parent.model)")
        if name not in state:
            raise InputError(f"parent.weights {path}: {name} is missing")
        if state[name].shape != own[name].shape:
            if name not in classifier or state[name].shape[1:] != own[name].shape[1:]:
                raise InputError(
                    f"parent.weights {path}: {name} is {tuple(state[name].shape)}, the network's is "
                    f"{tuple(own[name].shape)} (parent.model, parent.stem)"
                )
            notes.append(f"{name}: {len(state[name])} classes in {path}, {len(own[name])} here: re-initialised")
            state[name] = own[name]
    network.load_state_dict(state)
    return notes


def describe(config: Parent, splits: Splits) -> str:
    """What a file of weights says of itself, as JSON: how to build its network and to normalise its images."""
    about = {"model": config.model, "stem": config.stem, "classes": splits.classes}
    return json.dumps(about | {"mean": splits.mean_C, "std": splits.std_C})


class FlatModel:
    """A module whose parameters are views of one vector.

    theta_D holds the parameters in `named_parameters()` order, 4-D weights channels-last (O, H, W, I),
    which is how both the noise contract counts them and convolutions run fastest. Writing theta_D is
    writing the module. buffers are BatchNorm's statistics, in `named_buffers()` order. Shapes: T tensors.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module.to(device)
        self.shapes = [parameter.shape for parameter in module.parameters()]
        self.theta_D = torch.empty(sum(shape.numel() for shape in self.shapes), device=device)
        for parameter, view in zip(module.parameters(), self.views(self.theta_D), strict=True):
            view.copy_(parameter.detach())
            parameter.data = view

    def views(self, vector_D: torch.Tensor) -> list[torch.Tensor]:
        """A vector of theta_D's layout as a tensor a parameter, which share its memory."""
        views = []
        for part, shape in zip(vector_D.split([shape.numel() for shape in self.shapes]), self.shapes, strict=True):
            if len(shape) == 4:
                out_channels, in_channels, height, width = shape
                views.append(part.view(out_channels, height, width, in_channels).permute(0, 3, 1, 2))
            else:
                views.append(part.view(shape))
        return views

    def gradient(self) -> torch.Tensor:
        """The parameters' gradients in theta_D's layout."""
        gradient_D = torch.empty_like(self.theta_D)
        for view, parameter in zip(self.views(gradient_D), self.module.parameters(), strict=True):
            view.copy_(torch.zeros_like(view) if parameter.grad is None else parameter.grad)
        return gradient_D

    def spread(self, value_T: torch.Tensor) -> torch.Tensor:
        """A number a parameter tensor as a number an element of theta_D."""
        sizes_T = torch.tensor([shape.numel() for shape in self.shapes], device=value_T.device)
        return value_T.repeat_interleave(sizes_T)

    def mutated(self, which: str) -> torch.Tensor:
        """1 for the parameter tensors that evolution moves, 0 for the others.

        `which` is all, no-batchnorm, or a pattern of parameter names as in a shell.
        Raises InputError when it matches none."""
        names = [name for name, _ in self.module.named_parameters()]
        if which == "no-batchnorm":
            layers = [name for name, module in self.module.named_modules() if isinstance(module, nn.BatchNorm2d)]
            chosen = [name.rpartition(".")[0] not in layers for name in names]
        else:
            chosen = [which == "all" or fnmatchcase(name, which) for name in names]
        if not any(chosen):
            raise InputError(f"evolution.mutate {which!r}: matches no parameter (such as {names[0]} or {names[-1]})")
        return torch.tensor(chosen, dtype=torch.float32, device=self.theta_D.device)

    @property
    def buffers(self) -> list[torch.Tensor]:
        return list(self.module.buffers())

    def load_buffers(self, buffers: list[torch.Tensor]) -> None:
        for own, given in zip(self.buffers, buffers, strict=True):
            own.copy_(given)

    def is_finite(self) -> bool:
        """Whether all parameters and buffers are numbers."""
        return all(bool(values.isfinite().all()) for values in (self.theta_D, *self.buffers))

    def digest(self) -> str:
        """SHA-256 of parameters and buffers."""
        digest = hashlib.sha256(self.theta_D.cpu().numpy().data)
        for buffer in self.buffers:
            digest.update(buffer.cpu().numpy().data)
        return digest.hexdigest()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights as torchvision lays them out, on the CPU."""
        return {name: value.detach().cpu().contiguous() for name, value in self.module.state_dict().items()}


class Leaves:
    """What gradient descent moves: the parameters, but of a convolution with dead taps the part of its weight that
    holds the live ones. The others' gradients are zero, and to hold and to add them takes a tenth of a step.

    `with leaves():` makes the network compute with them; they share theta_D's memory. Dead taps stay as they are,
    under weight decay too. `image_NCHW` shows the sizes of the maps."""

    def __init__(self, model: FlatModel, image_NCHW: torch.Tensor) -> None:
        self.model = model
        self.live: dict[torch.Tensor, tuple[LiveConv2d, tuple[slice, slice]]] = {}
        for conv, input_NCHW, _ in calls(model.module, image_NCHW):
            if isinstance(conv, LiveConv2d):
                rows, columns = conv.live_taps(input_NCHW.shape[2:])
                if (rows.stop - rows.start, columns.stop - columns.start) != conv.kernel_size:
                    self.live[conv.weight] = conv, (rows, columns)
        parameters = list(model.module.parameters())
        self.tensors = [
            part.detach().requires_grad_() if parameter in self.live else parameter
            for parameter, part in zip(parameters, self.parts(model.theta_D), strict=True)
        ]

    def parts(self, vector_D: torch.Tensor) -> list[torch.Tensor]:
        """A vector of theta_D's layout as a tensor a leaf, which share its memory."""
        parts = []
        for parameter, view in zip(self.model.module.parameters(), self.model.views(vector_D), strict=True):
            if parameter in self.live:
                rows, columns = self.live[parameter][1]
                view = view.permute(0, 2, 3, 1)[:, rows, columns]
            parts.append(view)
        return parts

    def ranges(self) -> NDArray[np.int64]:
        """The elements of theta_D that reach the output, as R ranges [first, end)."""
        live_D = torch.zeros(len(self.model.theta_D) + 2, dtype=torch.int8)
        for part in self.parts(live_D[1:-1]):
            part.fill_(1)
        ends: NDArray[np.int64] = np.flatnonzero(np.diff(live_D.numpy())).reshape(-1, 2)
        return ends

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        for parameter, leaf in zip(self.model.module.parameters(), self.tensors, strict=True):
            if parameter in self.live:
                conv, (rows, columns) = self.live[parameter]
                conv.live = leaf, (rows.start, columns.start)
        try:
            yield
        finally:
            for conv, _ in self.live.values():
                conv.live = None
