"""The state of a gradient optimizer: saved as tensors, and rescaled after evolution has moved the parameters.

Shapes: T parameter tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from spartan_ray.errors import InputError

TensorDict = dict[str, torch.Tensor]
# State tensors of torch's optimizers that are proportional to a power of the gradient, with the power.
MOMENT_POWERS = {"momentum_buffer": 1, "exp_avg": 1, "exp_inf": 1, "grad_avg": 1}
MOMENT_POWERS |= {"exp_avg_sq": 2, "max_exp_avg_sq": 2, "square_avg": 2, "sum": 2}


def rescale_moments(
    optimizer: Optimizer, parameters: Sequence[torch.Tensor], before_T: torch.Tensor, after_T: torch.Tensor
) -> None:
    """Rescale the moments of an optimizer after evolution has moved the parameters.

    First moments of a parameter tensor are multiplied by the ratio of its gradient norm after the move to the norm
    before, second moments by the square of the ratio. Otherwise Adam would divide the larger gradients of the new
    parent by the root of the smaller squares of the old one. A ratio is 1 if one of the norms is 0.

    Args:
        optimizer: The optimizer. Its state is changed in place.
        parameters: The T parameter tensors of the network.
        before_T: Gradient norm of each parameter tensor before the move, shape (T,).
        after_T: Gradient norm of each parameter tensor after the move, shape (T,).
    """
    ratio_T = torch.where((before_T > 0) & (after_T > 0), after_T / before_T, torch.ones_like(after_T))
    for parameter, ratio in zip(parameters, ratio_T.tolist(), strict=True):
        state = optimizer.state.get(parameter, {})  # empty for a parameter that it does not train
        for name in MOMENT_POWERS.keys() & state.keys():
            if state[name] is not None:
                state[name] *= ratio ** MOMENT_POWERS[name]


def optimizer_state(optimizer: Optimizer) -> tuple[TensorDict, dict[str, Any]]:
    """Return the state dict of an optimizer in two parts: its tensors, and the rest, which JSON can store.

    The tensors are named by parameter, such as `3.exp_avg` for parameter number 3."""
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
    """Load a state that `optimizer_state` returned.

    Tensors with the shape of their parameter also get its memory layout, because torch rounds differently in another
    layout. Raises InputError if the state belongs to another optimizer."""
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
