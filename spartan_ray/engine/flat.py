"""`FlatModel`: a network whose parameters form one vector. Shapes: D parameters, T parameter tensors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import nn

from spartan_ray.engine.mutate import moved_parameters
from spartan_ray.errors import InputError

# Layers whose weights are stored channels-last (O, H, W, I), the fastest layout.
CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


class FlatModel:
    """A network and theta_D, one float32 vector of its trainable parameters or of some of them.

    Parameters are in `named_parameters()` order. Tied ones appear once. Those that require no gradient, or that
    `mutate` does not name, are left out. The weights of 2-D convolutions are stored channels-last, as the noise
    contract numbers them. With `views`, the parameters are views of theta_D, and share its memory. Without `views`, and
    in half precision, they keep their own memory, and `read` and `write` copy."""

    def __init__(self, module: nn.Module, device: torch.device, views: bool = True, mutate: str = "all") -> None:
        """Raise InputError if there is no parameter to move, or one that is not float32, bfloat16 or float16."""
        self.module = module.to(device)
        named = moved_parameters(module, mutate)
        for name, parameter in named.items():
            if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
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
        for weight in weights if views else ():  # also fastest for weights that are not moved
            if not any(weight is parameter for parameter in self.parameters):
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    def _parts(self, vector_D: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts: tuple[torch.Tensor, ...] = vector_D.split([shape.numel() for shape in self.shapes], dim=-1)
        return parts

    def views(self, vector_D: torch.Tensor) -> list[torch.Tensor]:
        """Return views of a vector in theta_D's layout, one per parameter, each in the shape of the parameter.

        The vector may have leading dimensions, such as one row per member; the views then have them too."""
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
        """Copy theta_D to the parameters that keep their own memory. The others are views of it."""
        if any(self.copied):
            for parameter, view, copied in zip(self.parameters, self.views(self.theta_D), self.copied, strict=True):
                if copied:
                    parameter.copy_(view)

    @torch.no_grad()
    def read(self) -> None:
        """Copy to theta_D the changes that others made to the network, as training and `load_state_dict` do.

        Parameters that were replaced by other `Parameter` objects are taken over. Raises InputError if the shapes,
        types or devices of the trainable parameters changed."""
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
        """Raise InputError if a layout differs from the layout of this network."""
        if layout != self.layout:
            names = [*self.layout, *(layout.keys() - self.layout.keys())]
            name = next((name for name in names if layout.get(name) != self.layout.get(name)), names[0])
            was, now = (found.get(name, "not trained, or not there") for found in (self.layout, layout))
            raise InputError(f"the network's {name} is {now}; when the population was made it was {was}")

    def gradient(self) -> torch.Tensor:
        """Return the gradients of the parameters in theta_D's layout. Missing gradients are 0."""
        gradient_D = torch.zeros_like(self.theta_D)
        for view, parameter in zip(self.views(gradient_D), self.parameters, strict=True):
            if parameter.grad is not None:
                view.copy_(parameter.grad)
        return gradient_D

    def spread(self, value_T: torch.Tensor) -> torch.Tensor:
        """Expand one value per parameter tensor to one value per element of theta_D."""
        value_D = torch.empty_like(self.theta_D)
        for part, value in zip(self._parts(value_D), value_T, strict=True):
            part.fill_(value)
        return value_D

    def multiply(self, vector_D: torch.Tensor, value_T: torch.Tensor) -> None:
        """Multiply a vector in theta_D's layout in place, by one value per parameter tensor."""
        for part, value in zip(self._parts(vector_D), value_T, strict=True):
            part.mul_(value)

    def scale_norm(self, scale: torch.Tensor | None) -> float:
        """Return the norm of a scale, expanded to theta_D's layout.

        None is 1 everywhere. T values are one per parameter tensor, D values one per element."""
        if scale is None:
            return math.sqrt(self.theta_D.numel())
        if len(scale) == self.theta_D.numel():
            return norm(scale)
        size_T = [shape.numel() for shape in self.shapes]
        return math.sqrt(sum(size * value**2 for size, value in zip(size_T, scale.tolist(), strict=True)))

    def rms(self) -> torch.Tensor:
        """Return the root mean square of each parameter tensor, shape (T,)."""
        views = self.views(self.theta_D)
        return torch.stack([norm_tensor(view) / math.sqrt(view.numel()) for view in views]).float()

    @property
    def buffers(self) -> list[torch.Tensor]:
        """The rest of the network's state: its buffers, then its parameters that are not in theta_D."""
        others = [parameter for name, parameter in self.module.named_parameters() if name not in self.layout]
        return [*self.module.buffers(), *others]

    @torch.no_grad()
    def load_buffers(self, buffers: Sequence[torch.Tensor]) -> None:
        for own, given in zip(self.buffers, buffers, strict=True):
            own.copy_(given)

    def is_finite(self) -> bool:
        """Return whether all parameters and buffers are finite."""
        return all(bool(values.isfinite().all()) for values in (self.theta_D, *self.buffers))

    def digest(self) -> str:
        """Return the SHA-256 of the parameters and buffers."""
        digest = hashlib.sha256(self.theta_D.cpu().numpy().data)
        for buffer in self.buffers:
            digest.update(buffer.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the state dict of the network in torchvision's layout, on the CPU. No two tensors share memory."""
        own: dict[str, torch.Tensor] = {}
        taken = set()
        for name, value in self.module.state_dict().items():
            value = value.detach().cpu().contiguous()
            own[name] = value.clone() if value.data_ptr() in taken else value  # tied
            taken.add(value.data_ptr())
        return own


def _layout(named: dict[str, nn.Parameter]) -> dict[str, str]:
    """Return a description of each parameter by name, in the order of the parameters."""
    return {name: f"{tuple(p.shape)} of {p.dtype} on {p.device}" for name, p in named.items()}


def mean(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean of tensors of one shape, added in their order.

    For integer tensors, which are counters, return the elementwise maximum."""
    if not tensors[0].is_floating_point():
        return torch.stack(list(tensors)).amax(0)
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total.div_(len(tensors))


def norm_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean norm, summed in float64, as a tensor on the same device."""
    root: torch.Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float64)
    return root


def norm(tensor: torch.Tensor) -> float:
    """Return the Euclidean norm, summed in float64."""
    return float(norm_tensor(tensor))


def dot(one_D: torch.Tensor, other_D: torch.Tensor) -> float:
    """Return the inner product, summed in float64 in blocks."""
    blocks = zip(one_D.split(1 << 20), other_D.split(1 << 20), strict=True)
    return float(sum(torch.dot(one.double(), other.double()) for one, other in blocks))
