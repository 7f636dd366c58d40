"""The work of a member, recorded once and repeated: on a GPU one launch where there are hundreds.

A recording reads and writes the memory that it was made with. So what differs between members is put into memory that
stays where it is: seed and factors for each member, the parent and the cases when they change.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map

from spartan_ray.engine.strategies.requests import Members

# Runs before a recording, in which libraries choose what they do and take their memory.
WARM_UPS = 3
# Recordings, and tensors kept for them, at most: a run has a few kinds of requests, a population that lives on may see
# more.
MOST, MOST_KEPT = 16, 256

Work = Callable[[], torch.Tensor]


class Recorder:
    """Recordings of work on one device, by what they read. On a CPU to repeat is to call again. When there is one too
    many, all are forgotten."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seed_1 = torch.zeros(1, dtype=torch.int64, device=device)
        self.factor_2 = torch.zeros(2, device=device)
        # One for all recordings: libraries keep memory for each stream that they have worked on.
        self.beside = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._forget()

    def _forget(self) -> None:
        self.kept: dict[Hashable, torch.Tensor] = {}
        self.recorded: dict[Hashable, tuple[Work, Sequence[Any]]] = {}
        self.pool: Any = None

    def keep(self, name: Hashable, values: Any) -> Any:
        """Copies of tensors, or of those in what holds some, at an address that is the same for a name and a shape:
        the copy made last for that name and shape is overwritten."""
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
        """Have the seeds and factors of members on the device, with one wait for all."""
        self.seed_K = torch.tensor(members.seed_K.view(np.int64), device=self.device)
        self.factor_K2 = torch.from_numpy(np.stack([members.offset_K, members.gain_K], 1)).to(self.device)

    def repeat(self, read: Sequence[Any], work: Work, member: int) -> torch.Tensor:
        """The result of work for one of the uploaded members: by the recording of what it reads, tensors where they are
        and numbers as they are, which is made of this work where there is none."""
        self.seed_1.copy_(self.seed_K[member : member + 1])
        self.factor_2.copy_(self.factor_K2[member])
        key = tuple(value.data_ptr() if isinstance(value, torch.Tensor) else value for value in read)
        if key not in self.recorded:
            if len(self.recorded) >= MOST:
                self._forget()
            # With what it reads, whose memory must not become another tensor's while there is a recording of it.
            self.recorded[key] = self._recorded(work) if self.device.type == "cuda" else work, read
        return self.recorded[key][0]().clone()

    def _recorded(self, work: Work) -> Work:
        """Raises RuntimeError for work that cannot be recorded, or that gives something else when it is repeated."""
        beside, graph = self.beside, torch.cuda.CUDAGraph()
        assert beside
        with torch.cuda.device(self.device):
            here = torch.cuda.current_stream()
            beside.wait_stream(here)
            with torch.cuda.stream(beside):
                for _ in range(WARM_UPS):
                    expected = work()
            try:
                # What other threads do on the device does not concern this one.
                with torch.cuda.graph(graph, pool=self.pool, stream=beside, capture_error_mode="thread_local"):
                    result = work()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise RuntimeError(f"this fitness cannot be a CUDA graph (graphs = False): {error}") from error
            finally:
                torch.cuda.set_stream(here)
            here.wait_stream(beside)
            graph.replay()
            if not torch.allclose(result, expected, rtol=0, atol=0, equal_nan=True):
                raise RuntimeError("this fitness gives something else as a CUDA graph (graphs = False)")
        # One recording's results are taken before another one runs.
        self.pool = self.pool or graph.pool()

        def again() -> torch.Tensor:
            graph.replay()
            return result

        return again
