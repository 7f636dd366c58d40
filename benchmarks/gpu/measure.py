"""Measures one phase of `scripts/gpu`, with its figures as JSON: `python -m gpu.measure PHASE FILE [--rehearse]`.

It needs torch, numba and torchvision, and only the scoring parts of this package: no Ray and no configuration. Times
are medians of repeats; each repeat waits for the device. Shapes: K members, D parameters, N images."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from spartan_ray.engine.evaluator import Evaluator, ParentState
from spartan_ray.engine.flat import FlatModel
from spartan_ray.engine.process import float32_products, set_up
from spartan_ray.engine.strategies.requests import WHOLE, Members, noisy
from spartan_ray.noise.contract import RMS, member_seeds
from spartan_ray.noise.kernels import kernel_for
from spartan_ray.vision.classification import Classification, Normaliser, Precision
from spartan_ray.vision.data import Images
from spartan_ray.vision.fold import fold_for
from spartan_ray.vision.folding import Folding
from spartan_ray.vision.resnet import ResNet18
from spartan_ray.vision.training import Trainer

MEAN, DEVIATION = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "bf16")
Figures = list[dict[str, Any]]


class Sizes:
    """The sizes to measure: full on a GPU, and small in a rehearsal, which only shows that the program runs."""

    def __init__(self, rehearse: bool) -> None:
        self.width = 8 if rehearse else 64
        # The largest first: the estimates are for it.
        self.cases = (96, 32) if rehearse else (10_000, 2048, 512, 256)
        self.members = (2, 4) if rehearse else (16, 128, 1024)
        self.compiled = () if rehearse else (256, 2048)
        self.seconds = 0.1 if rehearse else 0.6  # estimated upper limit for the members of one row
        self.repeats = 2 if rehearse else 5
        self.update_members = 20 if rehearse else 10_000
        self.elements = 100_000 if rehearse else 11_181_642
        self.copied = 1_000_000 if rehearse else 1 << 30
        self.side = 128 if rehearse else 8192
        self.sgd_images = 128 if rehearse else 12_800
        self.batches = (32,) if rehearse else (128, 512)


class Bench:
    """Measures on one device and writes each row of figures to `out` as it is found."""

    def __init__(self, rehearse: bool, out: Path) -> None:
        self.sizes = Sizes(rehearse)
        self.out, self.rows = out, Figures()
        gpu = torch.cuda.is_available() and not rehearse
        self.device = set_up(None if gpu else 1, gpu=gpu)
        torch.manual_seed(0)

    def add(self, row: dict[str, Any]) -> None:
        """Add a row and write the file atomically."""
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        half = self.out.with_suffix(".half")
        half.write_text(json.dumps(self.rows))
        half.replace(self.out)

    @contextlib.contextmanager
    def failing(self, row: dict[str, Any], name: str = "failed") -> Iterator[None]:
        """Record a RuntimeError in the row instead of raising it, so that other measurements go on."""
        try:
            yield
        except RuntimeError as error:
            row[name] = f"{type(error).__name__}: {error}"[:300]

    def done(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object], calls: int = 1) -> float:
        """Return the seconds of one call of `work`, as the median of the repeats."""
        work()
        self.done()
        found = []
        for _ in range(self.sizes.repeats):
            started = time.perf_counter()
            for _ in range(calls):
                work()
            self.done()
            found.append((time.perf_counter() - started) / calls)
        return statistics.median(found)

    def images(self, count: int) -> Images:
        return Images(torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8), torch.randint(0, 10, (count,)))

    def evaluator(self, cases: int, precision: Precision, graphs: bool = False) -> Evaluator:
        """Return an evaluator of one network that scores `cases` images."""
        torch.manual_seed(0)
        network, images = ResNet18(10, "imagenet", self.sizes.width), self.images(cases)
        reference = images[slice(0, 16)]
        fitness = Classification(images, reference, MEAN, DEVIATION, precision=precision, graphs=graphs)
        evaluator = Evaluator(network, fitness, "uniform", self.device)
        model = evaluator.model
        buffers = [buffer.cpu().numpy().copy() for buffer in model.buffers]
        evaluator.load(ParentState(model.theta_D.cpu().numpy().copy(), buffers, {"fitness": np.arange(cases)}))
        return evaluator

    def bits(self) -> None:
        """Compare the kernels' results with those of a CPU: equal bytes, or a small difference for gaussian noise."""
        count = 100_003
        theta, scale, out = torch.linspace(-2, 2, count), torch.linspace(3, -1, count), torch.empty(count)
        weight_K = np.random.default_rng(0).normal(size=40).astype(np.float32)
        seed_K = member_seeds(3, 5, 40)

        def add(name: str, expected: torch.Tensor, found: torch.Tensor, allowed: float = 0.0) -> None:
            most = float((found.cpu().double() - expected.double()).abs().max())
            self.add({"name": name, "difference": most, "agrees": most <= allowed})

        for kind in RMS:
            cpu, here = kernel_for(kind, torch.device("cpu")), kernel_for(kind, self.device)
            expected, found = (kernel.accumulate(seed_K, weight_K, 5, 5 + count) for kernel in (cpu, here))
            add(f"accumulate {kind}", expected, found, 1e-4 if kind == "gaussian" else 0.0)
            factors: list[Any] = [7, 0.3, -0.7]
            in_memory = [torch.tensor([value], device=self.device) for value in factors]
            for name, (seed, offset, gain) in {"descend": factors, "descend from memory": in_memory}.items():
                cpu.descend(theta, scale, 7, 0.3, -0.7, out, 5)
                moved = theta.to(self.device)
                here.descend(moved, scale.to(self.device), seed, offset, gain, moved, 5)
                add(f"{name} {kind}", out, moved, 1e-5 if kind == "gaussian" else 0.0)
        channel_G = torch.arange(count // 1000)
        run_G4 = torch.stack([channel_G * 1000 + 3, channel_G * 1000, 900 + channel_G, channel_G], 1)
        for dtype in (torch.float32, torch.bfloat16):
            folded, there = (torch.zeros(count, dtype=dtype, device=device) for device in ("cpu", self.device))
            fold_for(torch.device("cpu"))(theta, scale, run_G4, folded)
            fold_for(self.device)(theta.to(self.device), scale.to(self.device), run_G4.to(self.device), there)
            add(f"fold to {dtype}", folded, there)

    def kernels(self) -> None:
        """Measure noise and folding in comparison with the device's memory bandwidth and arithmetic."""
        sizes, device = self.sizes, self.device
        evaluator = self.evaluator(sizes.cases[0], "bf16")
        kernel, theta_D = evaluator.kernel, torch.randn(sizes.elements, device=device)
        out_D = torch.empty_like(theta_D)

        def add(name: str, seconds: float, gigabytes: float, operations: float = 0.0) -> None:
            rates = {"gigabytes_per_second": gigabytes / seconds, "teraflops": operations / seconds / 1e12}
            self.add({"name": name, "microseconds": seconds * 1e6} | {key: rate for key, rate in rates.items() if rate})

        source = torch.randn(sizes.copied // 4, device=device)
        copy = partial(torch.empty_like(source).copy_, source)
        add("copy, the memory's roof", self.seconds(copy, 5), 2 * sizes.copied / 1e9)
        del source, copy
        one = torch.randn(sizes.side, sizes.side, device=device, dtype=torch.bfloat16)
        add("bf16 product, the roof of arithmetic", self.seconds(lambda: one @ one, 3), 0, 2 * sizes.side**3)
        for name, scale_D, vectors in (("descend", None, 2), ("descend, scaled", torch.rand_like(theta_D), 3)):
            descend = partial(kernel.descend, theta_D, scale_D, 7, 0.0, 0.01, out_D)
            add(name, self.seconds(descend, 20), vectors * 4 * sizes.elements / 1e9)
        evaluator.evaluate(pairs(2), "fitness", -math.inf)
        folding: Folding = evaluator.fitness.folding  # type: ignore[attr-defined]
        weights = sum(int(run_G4[:, 2].sum()) for run_G4 in folding.runs)
        weight_F, gain_C = folding.memories[torch.bfloat16].weight_F, torch.rand_like(folding.eps_C)
        (theta,) = folding._sources()
        fold = partial(folding.fold, theta.weight_S, gain_C, theta.run_G4, weight_F)
        add("fold", self.seconds(fold, 20), weights * 6 / 1e9)
        add("fold, with all that prepares it", self.seconds(partial(folding._folded, torch.bfloat16), 20), 0)
        count = sizes.update_members
        seed_K, weight_K = member_seeds(0, 1, count), np.ones(count, np.float32)
        seconds = self.seconds(partial(kernel.accumulate, seed_K, weight_K, 0, sizes.elements))
        self.add({
            "name": f"update of {count:,} members", "microseconds": seconds * 1e6,
            "elements_per_second": count * sizes.elements / seconds,
        })  # fmt: skip

    def scoring(self) -> None:
        """Measure scoring in comparison with bare passes of the same folded module and of torchvision's module."""
        for cases in self.sizes.cases:
            for precision in PRECISIONS:
                self._scored(cases, precision)

    def _scored(self, cases: int, precision: Precision) -> None:
        about: dict[str, Any] = {"cases": cases, "precision": precision}
        rows = {members: about | {"members": members} for members in self.sizes.members}
        answers: dict[int, set[bytes]] = {members: set() for members in rows}
        bare: dict[str, float] = {}
        for way in ("plain", "graphs"):
            gc.collect()  # hold one network at a time, to measure its memory
            self._memory()
            with self.failing(about, f"{way} failed"):
                evaluator = self.evaluator(cases, precision, way == "graphs")
                if not bare:
                    bare = self._bare(evaluator, cases, precision, about)
                estimate = 0.0
                for members in self.sizes.members:
                    if members * estimate > self.sizes.seconds:
                        continue
                    population = pairs(members)
                    seconds = self.seconds(partial(evaluator.evaluate, population, "fitness", -math.inf))
                    estimate = seconds / members
                    rates = {f"over_{name}": members * cases / seconds / rate for name, rate in bare.items()}
                    rows[members][way] = {
                        "members_per_second": members / seconds,
                        "milliseconds": 1e3 * estimate,
                    } | rates
                    answers[members].add(evaluator.evaluate(population, "fitness", -math.inf)[0].mean_KM.tobytes())
                about[way] = self._launches(evaluator) | self._memory()
                del evaluator
        for members, row in rows.items():
            if "plain" in row or "graphs" in row:
                both = {"same_bits": len(answers[members]) == 1} if "plain" in row and "graphs" in row else {}
                self.add(row | both | {f"bare_{name}": rate for name, rate in bare.items()})
        self.add(about)

    def _bare(self, evaluator: Evaluator, cases: int, precision: Precision, about: dict[str, Any]) -> dict[str, float]:
        """Measure images per second of bare passes of our module and of torchvision's."""
        bare: dict[str, float] = {}
        network, batches = evaluator.model.module, evaluator.cases.of("fitness", WHOLE)
        with torch.inference_mode(), evaluator.fitness.ready(network):
            bare["ours"] = cases / self.seconds(lambda: [network(batch[0]) for _, batch in batches])
        for name in ("torchvision", *["compiled"] * (cases in self.sizes.compiled and precision == "bf16")):
            with self.failing(about, f"{name} failed"):
                bare[name] = cases / self._torchvision(batches, precision, name == "compiled")
        return bare

    def _torchvision(self, batches: Any, precision: Precision, compiled: bool) -> float:
        """Return the seconds of torchvision's module on the same images, channels-last."""
        from torchvision.models import resnet18

        module: Any = resnet18(num_classes=10).eval().to(self.device, memory_format=torch.channels_last)
        if precision == "bf16":
            module = module.to(torch.bfloat16)
        if compiled:
            module = _compiled(module)
        products: Literal["ieee", "tf32"] = "tf32" if precision == "tf32" else "ieee"
        with torch.inference_mode(), float32_products(products):
            return self.seconds(lambda: [module(batch[0]) for _, batch in batches])

    def _memory(self) -> dict[str, float]:
        """Return the peak of reserved GPU memory since the last call, in megabytes."""
        if self.device.type != "cuda":
            return {}
        most = torch.cuda.max_memory_reserved(self.device) / 1e6
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return {"megabytes": most}

    def _launches(self, evaluator: Evaluator) -> dict[str, float]:
        """Return the kernels launched per member, and the share of time in which none runs, under the profiler. On a
        CPU count operations."""
        members, on_gpu = 8, self.device.type == "cuda"
        activities = [torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profile:
            evaluator.evaluate(pairs(members), "fitness", -math.inf)
            self.done()
        kind = "CUDA" if on_gpu else "CPU"
        events = [event.time_range for event in profile.events() if event.device_type.name == kind]
        spans = sorted((span.start, span.end) for span in events)
        if not spans:
            return {}
        busy, last = 0.0, spans[0][0]
        for start, end in spans:
            busy, last = busy + max(0.0, end - max(start, last)), max(end, last)
        return {"launches": len(spans) / members, "idle": 1 - busy / (last - spans[0][0])}

    def training(self) -> None:
        """Measure SGD in comparison with torchvision's module, both with the same optimizer."""
        images = self.images(self.sizes.sgd_images).to(self.device)
        normalise = Normaliser(MEAN, DEVIATION, self.device)
        for batch in self.sizes.batches:
            for precision in PRECISIONS:
                config: Any = SimpleNamespace(
                    optimizer="sgd", lr=0.01, momentum=0.9, weight_decay=0.0, batch_size=batch, schedule="constant",
                    gradient_noise=None, precision=precision,
                )  # fmt: skip
                row: dict[str, Any] = {"batch": batch, "precision": precision}
                with self.failing(row):
                    model = FlatModel(ResNet18(10, "imagenet", self.sizes.width), self.device)
                    trainer = Trainer(config, model, images, normalise, 0, augment=False)
                    row["ours"] = len(images) / self.seconds(partial(trainer.train_epoch, 1, lambda count: None))
                for name in ("torchvision", *["compiled"] * (bool(self.sizes.compiled) and precision == "bf16")):
                    with self.failing(row, f"{name} failed"):
                        row[name] = len(images) / self._sgd(images, normalise, batch, precision, name == "compiled")
                self.add(row)

    def _sgd(self, images: Images, normalise: Normaliser, batch: int, precision: Precision, compiled: bool) -> float:
        """Return the seconds of an SGD epoch with torchvision's module."""
        from torchvision.models import resnet18

        module: Any = resnet18(num_classes=10).train().to(self.device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
        forward: Callable[[torch.Tensor], torch.Tensor] = _compiled(module) if compiled else module

        def epoch() -> None:
            for index_N in torch.randperm(len(images), device=self.device).split(batch):
                part = images[index_N]
                with arithmetic(self.device, precision):
                    logits_NC = forward(normalise(part.pixels_NHWC))
                loss = F.cross_entropy(logits_NC.float(), part.labels_N)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()

        with float32_products("tf32" if precision == "tf32" else "ieee"):
            return self.seconds(epoch)


def _compiled(module: Any) -> Any:
    """Compile for the batch size of the next call. Without the reset, a second size would be compiled as dynamic."""
    torch._dynamo.reset()
    return torch.compile(module, dynamic=False)


@contextlib.contextmanager
def arithmetic(device: torch.device, precision: Precision) -> Iterator[None]:
    """Set the arithmetic of a precision, as a fitness does."""
    products: Literal["ieee", "tf32"] = "tf32" if precision == "tf32" else "ieee"
    half = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    with half, float32_products(products):
        yield


def pairs(members: int) -> Members:
    return noisy(member_seeds(0, 1, members), 0.0, 0.01)


def card() -> dict[str, Any]:
    """Return the facts about the device and the software on it."""
    # Triton compiles its launchers with it.
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or "none"
    versions = {"torch": torch.__version__, "numpy": np.__version__, "C compiler": compiler}
    with contextlib.suppress(ImportError):
        import triton

        versions["triton"] = triton.__version__
    if not torch.cuda.is_available():
        return {"device": "cpu"} | versions
    about = torch.cuda.get_device_properties(0)
    return {
        "device": about.name, "multiprocessors": about.multi_processor_count, "memory_gb": about.total_memory / 1e9,
        "cuda": torch.version.cuda,
    } | versions  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="gpu.measure", description=__doc__)
    parser.add_argument("phase", choices=("card", "bits", "kernels", "scoring", "training"))
    parser.add_argument("out", type=Path, help="file for the figures")
    parser.add_argument("--rehearse", action="store_true", help="at a small size")
    arguments = parser.parse_args()
    if arguments.phase == "card":
        arguments.out.write_text(json.dumps(card()))
        return
    bench = Bench(arguments.rehearse, arguments.out)
    getattr(bench, arguments.phase)()
    wrong = [row for row in bench.rows if _is_wrong(row)]
    if wrong:
        sys.exit(f"wrong: {wrong}")


def _is_wrong(row: dict[str, Any]) -> bool:
    """Return whether our own code failed or differs. Failures of what it is compared with do not count."""
    return any(row.get(name) is False for name in ("agrees", "same_bits")) or any(
        name in row for name in ("failed", "plain failed", "graphs failed")
    )


if __name__ == "__main__":
    main()
