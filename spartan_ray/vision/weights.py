"""Reads initial weights from files, without ever running code from them."""

from __future__ import annotations

import warnings
from pathlib import Path
from urllib.error import URLError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from spartan_ray.errors import InputError
from spartan_ray.vision.config import Parent


def imagenet_file(config: Parent) -> Path:
    """Return the file of torchvision's ImageNet weights for the model, in torch's cache. Download it if needed.

    Raises InputError if there are no such weights or the download fails."""
    module, _, name = config.model.rpartition(":")
    if module != "torchvision.models" and name != "resnet18":
        raise InputError(f"parent.weights: there are no imagenet weights for parent.model {config.model}")
    from torchvision.models import get_model_weights

    try:
        weights = get_model_weights(name)
    except ValueError as error:
        raise InputError(f"parent.weights: there are no imagenet weights for {config.model}: {error}") from None
    url: str = getattr(weights, "IMAGENET1K_V1", weights.DEFAULT).url
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
    """Read a state dict from a file without executing anything in it. Raises InputError for a file that holds none."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings(action="ignore"):  # torch asks users to report files that it cannot read
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # for bytes that are no pickle, torch raises any exception
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        # torch's message for a pickle suggests to run the file's code.
        if not isinstance(error, (OSError, RuntimeError, EOFError, SafetensorError)):
            reason = "not a state dict as .pt, .pth or .safetensors, or one that needs to run code"
        raise InputError(f"parent.weights {path}: cannot be read as weights: {reason}") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):  # the format of many training scripts
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"parent.weights {path}: holds no state dict (name: tensor)")
    return state


def load_weights(network: nn.Module, path: Path, state: dict[str, torch.Tensor]) -> list[str]:
    """Copy a state dict into the network. Only the classifier may have another number of classes; it is then
    initialised anew, which the returned notes say. Raises InputError for any other difference."""
    own = network.state_dict()
    classifier = [name for name, _ in network.named_parameters()][-2:]
    notes = []
    for name in sorted(own.keys() | state.keys()):
        if name not in own:
            raise InputError(f"parent.weights {path}: {name} is not in the network (parent.model)")
        if name not in state:
            raise InputError(f"parent.weights {path}: {name} is missing: are the weights of another parent.model?")
        if state[name].shape != own[name].shape:
            if name not in classifier or state[name].shape[1:] != own[name].shape[1:]:
                raise InputError(
                    f"parent.weights {path}: {name} is {tuple(state[name].shape)}, the network's is "
                    f"{tuple(own[name].shape)} (parent.model, parent.stem, parent.width)"
                )
            notes.append(f"{name}: {len(state[name])} classes in {path}, {len(own[name])} here: re-initialised")
            state[name] = own[name]
    network.load_state_dict(state)
    return notes
