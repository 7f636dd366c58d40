"""Context managers that restore the modes and the gradients of a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def keeping_modes(module: nn.Module) -> Iterator[None]:
    """Restore the training or evaluation mode of each layer on exit."""
    modes = [(layer, layer.training) for layer in module.modules()]
    try:
        yield
    finally:
        for layer, training in modes:
            layer.training = training


@contextmanager
def keeping_gradients(module: nn.Module) -> Iterator[None]:
    """Clear the gradients of all parameters on entry, and restore the former ones on exit."""
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
