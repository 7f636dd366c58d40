"""What a gradient optimizer remembers: as tensors that can be kept, and fitted to parameters that evolution moved.
Shapes: T parameter tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from spartan_ray.errors import InputError

TensorDict = dict[str, torch.Tensor]
# State tensors of torch's optimizers that go with a power of the gradient.
MOMENT_POWERS = {"momentum_buffer": 1, "exp_avg": 1, "exp_inf": 1, "grad_avg": 1}
MOMENT_POWERS |= {"exp_avg_sq": 2, "max_exp_avg_sq": 2, "square_avg": 2, "sum": 2}


def rescale_moments(
    optimizer: Optimizer, parameters: Sequence[torch.Tensor], before_T: torch.Tensor, after_T: torch.Tensor
) -> None:
    """Fit the moments to parameters that evolution moved: the first moment of a tensor by the ratio of its gradient's
    norm after to before, the second by the ratio's square. Without it Adam divides the new parent's larger gradients
    by the root of the old one's smaller squares."""
    ratio_T = torch.where((before_T > 0) & (after_T > 0), after_T / before_T, torch.ones_like(after_T))
    for parameter, ratio in zip(parameters, ratio_T.tolist(), strict=True):
        state = optimizer.state.get(parameter, {})  # none of what it does not train
        for name in MOMENT_POWERS.keys() & state.keys():
            if state[name] is not None:
                state[name] *= ratio ** MOMENT_POWERS[name]


def optimizer_state(optimizer: Optimizer) -> tuple[TensorDict, dict[str, Any]]:
    """The state dict of an optimizer in two parts: its tensors, named `3.exp_avg` for the parameter number 3, and the
    rest, which JSON can hold."""
    state, tensors = optimizer.state_dict(), {}
    rest: dict[str, Any] = {"param_groups": state["param_groups"], "state": {}}
    for number, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{number}.{name}"] = value.contiguous()
            else:
                rest["state"].setdefault(str(number), {})[name] = value
    return tensors, rest


def load_optimizer(optimizer: Optimizer, tensors: TensorDict, rest: dict[str, Any]) -> None:
    """Give an optimizer the state that `optimizer_state` took. What has the shape of its parameter gets its layout in
    memory too, since torch rounds differently in another. Raises InputError for another optimizer's."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        state: dict[int, dict[str, Any]] = {int(number): dict(values) for number, values in rest["state"].items()}
        for key, value in tensors.items():
            number, name = key.split(".")
            parameter = parameters[int(number)]
            if value.ndim and value.shape != parameter.shape:
                raise ValueError(f"{key} is {tuple(value.shape)}")
            laid_out = torch.empty_like(parameter).copy_(value) if value.ndim else value.clone()
            state.setdefault(int(number), {})[name] = laid_out.detach()
        optimizer.load_state_dict({"state": state, "param_groups": rest["param_groups"]})
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the checkpoint is of another optimizer: {error}") from None
