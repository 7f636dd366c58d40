"""FlatModel: one vector of parameters under a network. Shapes: D parameters, T parameter tensors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import nn

from spartan_ray.engine.mutate import moved_parameters
from spartan_ray.errors import InputError

# Their weights are stored channels-last (O, H, W, I), which is how they run fastest.
CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


class FlatModel:
    """A network and one float32 vector of its trainable parameters, theta_D, or of some of them.

    The parameters come in `named_parameters()` order, tied ones once and those that require no gradient, or that
    `mutate` does not name, not at all; the weights of 2-D convolutions are stored channels-last, which is how the noise
    contract counts them. With `views` the parameters are views of theta_D, so that to write one is to write the other.
    Without, and where they are in half precision, they keep their memory: `read` and `write` copy."""

    def __init__(self, module: nn.Module, device: torch.device, views: bool = True, mutate: str = "all") -> None:
        """Raises InputError for a network without a parameter to move, or with parameters that are not real numbers."""
        self.module = module.to(device)
        named = moved_parameters(module, mutate)
        for name, parameter in named.items():
            if not parameter.is_floating_point() or parameter.itemsize > 4:
                raise InputError(f"the network's {name} is {parameter.dtype}: expected float32, bfloat16 or float16")
        self.names, self.parameters = list(named), list(named.values())
        self.shapes = [parameter.shape for parameter in self.parameters]
        self.layout = _layout(named)
        weights = [layer.weight for layer in module.modules() if isinstance(layer, CONVOLUTIONS)]
        self.channels_last = [any(parameter is weight for weight in weights) for parameter in self.parameters]
        self.theta_D = torch.empty(sum(shape.numel() for shape in self.shapes), dtype=torch.float32, device=device)
        self.half = any(parameter.dtype != torch.float32 for parameter in self.parameters)
        self.copied = [not views or parameter.dtype != torch.float32 for parameter in self.parameters]
        for parameter, view, copied in zip(self.parameters, self.views(self.theta_D), self.copied, strict=True):
            view.copy_(parameter.detach())
            if not copied:
                parameter.data = view
        for weight in weights if views else ():  # those that are not moved run fastest so too
            if not any(weight is parameter for parameter in self.parameters):
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    def _parts(self, vector_D: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts: tuple[torch.Tensor, ...] = vector_D.split([shape.numel() for shape in self.shapes], dim=-1)
        return parts

    def views(self, vector_D: torch.Tensor) -> list[torch.Tensor]:
        """A vector of theta_D's layout, or several in rows, as a tensor a parameter, which share its memory."""
        views, rows = [], vector_D.shape[:-1]
        for part, shape, channels_last in zip(self._parts(vector_D), self.shapes, self.channels_last, strict=True):
            if channels_last:
                out_channels, in_channels, height, width = shape
                views.append(part.view(*rows, out_channels, height, width, in_channels).movedim(-1, -3))
            else:
                views.append(part.view(*rows, *shape))
        return views

    @torch.no_grad()
    def write(self) -> None:
        """Make the parameters that keep their memory those of theta_D; the others are by themselves."""
        if any(self.copied):
            for parameter, view, copied in zip(self.parameters, self.views(self.theta_D), self.copied, strict=True):
                if copied:
                    parameter.copy_(view)

    @torch.no_grad()
    def read(self) -> None:
        """Take over what others did to the network, as training and `load_state_dict` do, also by other objects.

        Raises InputError for a network whose trainable parameters are others, or elsewhere."""
        named = {name: p for name, p in self.module.named_parameters() if name in self.layout and p.requires_grad}
        self.refuse_other(_layout(named))
        self.parameters = list(named.values())
        for parameter, view, copied in zip(self.parameters, self.views(self.theta_D), self.copied, strict=True):
            if copied and parameter.dtype != torch.float32:
                changed = view.to(parameter.dtype) != parameter
                view.copy_(torch.where(changed, parameter.float(), view))
            elif copied:
                view.copy_(parameter)
            elif parameter.data_ptr() != view.data_ptr():
                view.copy_(parameter.detach())
                parameter.data = view

    def refuse_other(self, layout: dict[str, str]) -> None:
        """Raises InputError when a layout is not this network's."""
        if layout != self.layout:
            names = [*self.layout, *(layout.keys() - self.layout.keys())]
            name = next((name for name in names if layout.get(name) != self.layout.get(name)), names[0])
            was, now = (found.get(name, "not trained, or not there") for found in (self.layout, layout))
            raise InputError(f"the network's {name} is {now}; when the population was made it was {was}")

    def gradient(self) -> torch.Tensor:
        """The parameters' gradients in theta_D's layout."""
        gradient_D = torch.zeros_like(self.theta_D)
        for view, parameter in zip(self.views(gradient_D), self.parameters, strict=True):
            if parameter.grad is not None:
                view.copy_(parameter.grad)
        return gradient_D

    def spread(self, value_T: torch.Tensor) -> torch.Tensor:
        """A number a parameter tensor as a number an element of theta_D."""
        value_D = torch.empty_like(self.theta_D)
        for part, value in zip(self._parts(value_D), value_T, strict=True):
            part.fill_(value)
        return value_D

    def multiply(self, vector_D: torch.Tensor, value_T: torch.Tensor) -> None:
        """Multiply a vector of theta_D's layout, in place, by a number a parameter tensor."""
        for part, value in zip(self._parts(vector_D), value_T, strict=True):
            part.mul_(value)

    def scale_norm(self, scale: torch.Tensor | None) -> float:
        """The norm of a scale as a vector of theta_D's layout: None is 1 everywhere, T numbers are one a tensor."""
        if scale is None:
            return math.sqrt(self.theta_D.numel())
        if len(scale) == self.theta_D.numel():
            return norm(scale)
        size_T = [shape.numel() for shape in self.shapes]
        return math.sqrt(sum(size * value**2 for size, value in zip(size_T, scale.tolist(), strict=True)))

    def rms(self) -> torch.Tensor:
        """The root mean square of each parameter tensor, T."""
        views = self.views(self.theta_D)
        return torch.stack([norm_tensor(view) / math.sqrt(view.numel()) for view in views]).float()

    @property
    def buffers(self) -> list[torch.Tensor]:
        """What goes along: the network's buffers, and its parameters that are not in theta_D."""
        others = [parameter for name, parameter in self.module.named_parameters() if name not in self.layout]
        return [*self.module.buffers(), *others]

    @torch.no_grad()
    def load_buffers(self, buffers: Sequence[torch.Tensor]) -> None:
        for own, given in zip(self.buffers, buffers, strict=True):
            own.copy_(given)

    def is_finite(self) -> bool:
        """Whether all parameters and buffers are numbers."""
        return all(bool(values.isfinite().all()) for values in (self.theta_D, *self.buffers))

    def digest(self) -> str:
        """SHA-256 of parameters and buffers."""
        digest = hashlib.sha256(self.theta_D.cpu().numpy().data)
        for buffer in self.buffers:
            digest.update(buffer.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights as torchvision lays them out, on the CPU, and each in memory of its own."""
        own: dict[str, torch.Tensor] = {}
        taken = set()
        for name, value in self.module.state_dict().items():
            value = value.detach().cpu().contiguous()
            own[name] = value.clone() if value.data_ptr() in taken else value  # tied
            taken.add(value.data_ptr())
        return own


def _layout(named: dict[str, nn.Parameter]) -> dict[str, str]:
    """What each parameter is, by its name and in their order."""
    return {name: f"{tuple(p.shape)} of {p.dtype} on {p.device}" for name, p in named.items()}


def mean(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of tensors of one shape, added in their order; of whole numbers, which count something, the largest."""
    if not tensors[0].is_floating_point():
        return torch.stack(list(tensors)).amax(0)
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total.div_(len(tensors))


def norm_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The Euclidean norm, summed in float64."""
    root: torch.Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float64)
    return root


def norm(tensor: torch.Tensor) -> float:
    """The Euclidean norm, summed in float64."""
    return float(norm_tensor(tensor))


def dot(one_D: torch.Tensor, other_D: torch.Tensor) -> float:
    """The inner product, summed in float64 in blocks."""
    blocks = zip(one_D.split(1 << 20), other_D.split(1 << 20), strict=True)
    return float(sum(torch.dot(one.double(), other.double()) for one, other in blocks))
