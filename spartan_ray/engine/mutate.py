"""The choice of the parameters that evolution moves."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from spartan_ray.errors import InputError

BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
GROUPS = ("all", "batchnorm", "no-batchnorm", "classifier", "biases")


def moved_parameters(module: nn.Module, mutate: str = "all") -> dict[str, nn.Parameter]:
    """Return the parameters that evolution moves, by name, in `named_parameters()` order.

    Tied parameters appear once. Parameters that require no gradient are left out. `mutate` is a group, a shell pattern
    of parameter names such as `layer4.*`, or several of these separated by commas. The groups are:

        all             all parameters
        batchnorm       scale and shift of the BatchNorm layers
        no-batchnorm    all other parameters
        classifier      parameters of the last layer that has trainable ones
        biases          parameters named `bias`

    Raises InputError if the network has no trainable parameter, or if an item of `mutate` matches none."""
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not trained:
        raise InputError("the network has no parameter that requires a gradient: there is nothing to evolve")
    chosen: set[str] = set()
    for item in mutate.split(","):
        names = _matching(module, list(trained), item.strip())
        if not names:
            example = f"{next(iter(trained))} or {list(trained)[-1]}"
            raise InputError(
                f"evolution.mutate {item.strip()!r}: matches no parameter (such as {example}); the groups are "
                f"{', '.join(GROUPS)}"
            )
        chosen |= names
    return {name: parameter for name, parameter in trained.items() if name in chosen}


def _matching(module: nn.Module, names: list[str], item: str) -> set[str]:
    def layer(name: str) -> str:
        return name.rpartition(".")[0]

    if item in ("batchnorm", "no-batchnorm"):
        batchnorms = {name for name, part in module.named_modules() if isinstance(part, BATCHNORMS)}
        return {name for name in names if (layer(name) in batchnorms) == (item == "batchnorm")}
    if item == "classifier":
        return {name for name in names if layer(name) == layer(names[-1])}
    if item == "biases":
        return {name for name in names if name.rpartition(".")[2] == "bias"}
    return {name for name in names if item == "all" or fnmatchcase(name, item)}
