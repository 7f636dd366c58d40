"""The machine's limits: processes that do only one part of the work, in the fastest known way."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.connection import Connection

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18

from spartan_ray.engine.flat import FlatModel
from spartan_ray.engine.process import set_up
from spartan_ray.noise.cpu import TILE, CpuKernel, _fill_noise
from spartan_ray.vision.classification import Normaliser
from spartan_ray.vision.config import Parent
from spartan_ray.vision.data import Images
from spartan_ray.vision.folding import Folding
from spartan_ray.vision.models import initial_model
from spartan_ray.vision.training import Trainer, make_optimizer

Rates = dict[str, float]
BATCHES = (128, 256, 512)
KINDS = ("ours", "folded", "torchvision")
SGEMM_SIDE = 1024
PARENT = Parent(lr=0.01, momentum=0.9)
MEAN_C, STD_C = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def random_images(count: int) -> Images:
    """Return the same random images in every process; the speed does not depend on their content."""
    random = torch.Generator().manual_seed(0)
    pixels_NHWC = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=random)
    return Images(pixels_NHWC, torch.randint(0, 10, (count,), generator=random))


class Bare:
    """Processes that do a task at the same time, on command, each with `threads` threads (default: 1)."""

    def __init__(self, processes: int, threads: int = 1) -> None:
        context = multiprocessing.get_context("spawn")
        self.ends, self.processes = [], []
        for _ in range(processes):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, threads), daemon=True)
            process.start()
            self.ends.append(here)
            self.processes.append(process)

    def run(self, task: Callable[..., Callable[[], Rates]], *arguments: object) -> Rates:
        """Run a task in all processes at once. Return the sums of their rates."""
        for end in self.ends:
            end.send((task, arguments))
        for end in self.ends:
            assert end.recv() == "ready"
        for end in self.ends:
            end.send("go")
        results: list[Rates] = [end.recv() for end in self.ends]
        return {name: sum(result[name] for result in results) for name in results[0]}

    def close(self) -> None:
        for end, process in zip(self.ends, self.processes, strict=True):
            end.close()
            process.join()


def _serve(end: Connection, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # handled by the parent process
    set_up(threads)
    while True:
        try:
            task, arguments = end.recv()
        except EOFError:
            return
        work = task(*arguments)
        end.send("ready")
        end.recv()
        end.send(work())


def _rate(amount: float, work: Callable[[], object], times: int) -> float:
    started = time.perf_counter()
    for _ in range(times):
        work()
    return amount * times / (time.perf_counter() - started)


def forward(images: int, batch: int, kind: str) -> Callable[[], Rates]:
    """Measure images per second through the network in evaluation mode, channels-last. `kind` is ours, folded (ours
    with BatchNorm folded in beforehand) or torchvision."""
    images_NCHW = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    module: nn.Module
    if kind == "torchvision":
        module = resnet18(num_classes=10).eval().to(memory_format=torch.channels_last)
    else:
        module = FlatModel(initial_model(PARENT, 10, 0)[0], torch.device("cpu")).module.eval()
    folding = Folding(module, images_NCHW[:1])(torch.float32) if kind == "folded" else nullcontext()

    @torch.inference_mode()
    def work() -> Rates:
        with folding:
            module(images_NCHW)
            return {"images": _rate(batch, lambda: module(images_NCHW), max(1, images // batch))}

    with torch.inference_mode():
        module(images_NCHW)
    return work


def sgemm() -> Callable[[], Rates]:
    """Measure the GFLOP/s of a product of two matrices that fit the cache."""
    a, b = torch.randn(SGEMM_SIDE, SGEMM_SIDE), torch.randn(SGEMM_SIDE, SGEMM_SIDE)
    torch.mm(a, b)
    return lambda: {"gflops": _rate(2 * SGEMM_SIDE**3 / 1e9, lambda: torch.mm(a, b), 60)}


def noise(members: int, elements: int) -> Callable[[], Rates]:
    """Measure noise vectors of this size per second: noise alone, and noise added to an update."""
    kernel, seed_K, weight_K = CpuKernel("uniform"), np.arange(members, dtype=np.uint64), np.ones(members, np.float32)
    _noise_alone(seed_K[:1], TILE)
    kernel.accumulate(seed_K[:1], weight_K[:1], 0, TILE)
    return lambda: {
        "noise": _rate(members, lambda: _noise_alone(seed_K, elements), 1),
        "accumulate": _rate(members, lambda: kernel.accumulate(seed_K, weight_K, 0, elements), 1),
    }


@numba.njit(error_model="numpy")
def _noise_alone(seed_K, elements):  # type: ignore[no-untyped-def]
    pair_P, radius_P, noise_T = np.empty(TILE // 2, np.uint64), np.empty(TILE // 2), np.empty(TILE, np.float32)
    for start in range(0, elements, TILE):
        for k in range(seed_K.size):
            _fill_noise(0, pair_P, radius_P, noise_T, start // 4, seed_K[k])


def sgd(images: int) -> Callable[[], Rates]:
    """Measure images per second of gradient descent: ours, and torchvision's module trained in the same way, in the
    default and in the channels-last layout."""
    device = torch.device("cpu")
    training, normalise = random_images(images), Normaliser(MEAN_C, STD_C, device)
    model = FlatModel(initial_model(PARENT, 10, 0)[0], device)
    trainer = Trainer(PARENT, model, training, normalise, 0, augment=False)

    def epoch_of(layout: torch.memory_format) -> Callable[[], None]:
        theirs = resnet18(num_classes=10).train().to(memory_format=layout)
        optimizer = make_optimizer(PARENT, list(theirs.parameters()))

        def epoch() -> None:
            for index_N in torch.randperm(images).split(PARENT.batch_size):
                batch = training[index_N]
                images_NCHW = normalise(batch.pixels_NHWC).contiguous(memory_format=layout)
                loss = F.cross_entropy(theirs(images_NCHW), batch.labels_N)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()

        return epoch

    default, channels_last = epoch_of(torch.contiguous_format), epoch_of(torch.channels_last)
    return lambda: {
        "ours": _rate(images, lambda: trainer.train_epoch(1, lambda count: None), 1),
        "torchvision": _rate(images, default, 1),
        "torchvision_channels_last": _rate(images, channels_last, 1),
    }
