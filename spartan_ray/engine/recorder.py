"""Recordings of the work of a member as CUDA graphs: a replay is one launch instead of hundreds.

A recording reads and writes the memory with which it was made. Whatever changes is therefore copied to fixed addresses:
the seed and the factors for each member, the parent and the cases when they change.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map

from spartan_ray.engine.strategies.requests import Members

# Number of runs before a recording, in which libraries choose algorithms and allocate memory.
WARM_UPS = 3
# Maximum numbers of recordings, and of tensors kept for them. A run has a few kinds of requests; a population that is
# used for long may see more.
MOST, MOST_KEPT = 16, 256

Work = Callable[[], torch.Tensor]


class Recorder:
    """Records and replays work on one device. Recordings are found by the values that they read.

    On a CPU, the work is called again instead. If there is one recording too many, all are discarded."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seed_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self.factor_2 = torch.zeros(2, device=device)
        # One stream for all recordings, because libraries keep memory for each stream that they have used.
        self.beside = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._forget()

    def _forget(self) -> None:
        self.kept: dict[Hashable, torch.Tensor] = {}
        self.recorded: dict[Hashable, tuple[Work, Sequence[Any]]] = {}
        self.pool: Any = None

    def keep(self, name: Hashable, values: Any) -> Any:
        """Copy the tensors in a structure to fixed addresses, one per name, position, shape and type.

        Return the structure with the copies. They overwrite the last ones of the same name, position, shape and type.
        """
        number = 0

        def kept(tensor: Any) -> Any:
            nonlocal number
            if not isinstance(tensor, torch.Tensor):
                return tensor
            key, number = (name, number, tensor.shape, tensor.stride(), tensor.dtype), number + 1
            if key not in self.kept:
                if len(self.kept) >= MOST_KEPT:
                    self._forget()
                self.kept[key] = torch.empty_like(tensor)
            return self.kept[key].copy_(tensor)

        return tree_map(kept, values)

    def upload(self, members: Members) -> None:
        """Copy the seeds, offsets and gains of all members to the device, waiting for it only once."""
        self.seed_K = torch.tensor(members.seed_K.view(np.int64), device=self.device)
        self.factor_K2 = torch.from_numpy(np.stack([members.offset_K, members.gain_K], 1)).to(self.device)

    def repeat(self, read: Sequence[Any], work: Work, member: int) -> torch.Tensor:
        """Return the result of the work for one of the uploaded members, by replaying its recording.

        The recording is found by `read`, the values that the work reads: tensors by address, numbers by value. If there
        is none, the work is recorded first."""
        self.seed_1.copy_(self.seed_K[member : member + 1])
        self.factor_2.copy_(self.factor_K2[member])
        key = tuple(value.data_ptr() if isinstance(value, torch.Tensor) else value for value in read)
        if key not in self.recorded:
            if len(self.recorded) >= MOST:
                self._forget()
            # Also store `read`: no other tensor may get its memory as long as the recording exists.
            self.recorded[key] = self._recorded(work) if self.device.type == "cuda" else work, read
        return self.recorded[key][0]().clone()

    def _recorded(self, work: Work) -> Work:
        """Record the work. Raises RuntimeError if it cannot be recorded, or if a replay gives another result."""
        beside, graph = self.beside, torch.cuda.CUDAGraph()
        assert beside
        with torch.cuda.device(self.device):
            here = torch.cuda.current_stream()
            beside.wait_stream(here)
            with torch.cuda.stream(beside):
                for _ in range(WARM_UPS):
                    expected = work()
            try:
                # Other threads may use the device during the recording.
                with torch.cuda.graph(graph, pool=self.pool, stream=beside, capture_error_mode="thread_local"):
                    result = work()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise RuntimeError(f"this fitness cannot be a CUDA graph; set graphs = False: {error}") from error
            finally:
                torch.cuda.set_stream(here)
            here.wait_stream(beside)
            graph.replay()
            if not torch.allclose(result, expected, rtol=0, atol=0, equal_nan=True):
                raise RuntimeError("this fitness gives another result as a CUDA graph; set graphs = False")
        # Recordings may share memory: the result of one is copied before another one runs.
        self.pool = self.pool or graph.pool()

        def again() -> torch.Tensor:
            graph.replay()
            return result

        return again
