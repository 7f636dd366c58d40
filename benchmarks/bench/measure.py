"""Measures the evaluator on real Ray workers, together with the machine's limit in the same repeat."""

from __future__ import annotations

import functools
import gc
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import ray
import torch

from bench.bare import BATCHES, KINDS, MEAN_C, PARENT, STD_C, Bare, forward, noise, random_images, sgd, sgemm
from bench.figures import Results, spread
from bench.model import GPUS_A_NODE
from spartan_ray.distributed.config import Cluster
from spartan_ray.distributed.placement import resolve_cluster
from spartan_ray.distributed.pool import Pool
from spartan_ray.distributed.relayed import RELAYED_NODES, RelayTransport
from spartan_ray.distributed.worker import Worker
from spartan_ray.engine.evaluator import EvaluatorSpec, ParentState, Scale, packed
from spartan_ray.engine.flat import FlatModel
from spartan_ray.engine.population import Population
from spartan_ray.engine.strategies.requests import CaseSet, Members, Part, Scores, Strategy, noisy
from spartan_ray.engine.subspace import Basis
from spartan_ray.run.config import Config, Evolution
from spartan_ray.run.record import Row, phase_row
from spartan_ray.run.setup import make_fitness, make_population, make_strategy
from spartan_ray.vision.config import Parent
from spartan_ray.vision.data import Splits
from spartan_ray.vision.models import build_model, initial_model

CPU = torch.device("cpu")
SMALL = Parent(model="convnet", threads=1)
MEGABYTE = 10**6
SAMPLE_SECONDS = 0.1


class FreeWorker(Worker):
    """A worker that scores members without computing anything."""

    def evaluate(
        self,
        keys: tuple[int, int, int],
        parent: ParentState,
        scale: Scale,
        basis: Basis | None,
        members: Members,
        cases: CaseSet,
        threshold: float,
        part: Part,
        own: int | None,
    ) -> tuple[Scores, dict[int, str], float, float]:
        zero_K = np.zeros(len(members))
        return Scores(zero_K[:, None], zero_K, np.ones(len(members), np.int64)), {}, 0.0, 1e-9


class Generation:
    """The network, images and settings of a measured generation."""

    def __init__(self, parent: Parent, images: int, precision: str = "fp32", noise: str = "uniform") -> None:
        # Tiny steps keep the parent sound: a NaN score would be computed again by a second worker.
        self.evolution = Evolution.model_validate(
            {"every": 1, "lr": 1e-6, "fitness_images": images, "precision": precision, "noise": noise}
        )
        all_images = random_images(images)
        self.splits = Splits(all_images, all_images, all_images, all_images, tuple("0123456789"), MEAN_C, STD_C)
        self.parent, fitness = parent, make_fitness(self.evolution, self.splits)
        make_network = functools.partial(build_model, parent, 10)
        self.spec = EvaluatorSpec(make_network, fitness, self.evolution.noise, threads=1)
        self.model = FlatModel(initial_model(parent, 10, 0)[0], CPU)

    def state(self, images: int) -> ParentState:
        buffers = [packed(buffer) for buffer in self.model.buffers]
        return ParentState(self.model.theta_D.numpy(), buffers, {"fitness": np.arange(images)})

    def pool(self, workers: int, kind: type[Worker] = Worker, least_nodes: int = RELAYED_NODES) -> Pool:
        cluster = resolve_cluster(Cluster(workers=workers), [node["Resources"] for node in ray.nodes()])
        transport = RelayTransport(self.spec, cluster, kind, least_nodes)
        pool = Pool(transport, cluster, self.evolution.noise, print, lambda members, images: None)
        pool.wait_until_joined()
        return pool

    def score(self, pool: Pool, population: int, images: int) -> float:
        """Return the seconds that scoring a population takes, from the broadcast to the last score."""
        members = noisy(np.arange(population, dtype=np.uint64), 0.0, 0.01)
        started = time.perf_counter()
        pool.broadcast(self.state(images))
        pool.broadcast_scale(None)
        pool.evaluate(members)
        return time.perf_counter() - started

    def update(self, pool: Pool, population: int) -> float:
        """Return the seconds that the update of a population takes."""
        seed_K, weight_K = np.arange(population, dtype=np.uint64), np.ones(population, np.float32)
        started = time.perf_counter()
        pool.weighted_sum(seed_K, weight_K, 0, self.model.theta_D.numel())
        return time.perf_counter() - started

    def phases(self, pool: Pool, population: int) -> Phases:
        """Return an object that runs whole evolve phases of evolution strategies on a pool."""
        evolution = self.evolution.model_copy(update={"population": population})
        config = Config(parent=self.parent, evolution=evolution)
        strategy = make_strategy(evolution, 10)
        assert strategy
        around = make_population(config, self.splits, self.model, print, lambda spec: pool)
        return Phases(around, strategy)

    def evolve(self, pool: Pool, population: int) -> Row:
        """Run one phase and return its row of the record."""
        return self.phases(pool, population).evolve(1)


@dataclass
class Phases:
    """Evolve phases of a population on a pool."""

    population: Population
    strategy: Strategy

    def evolve(self, generation: int) -> Row:
        """Run one phase and return its row of the record."""
        return phase_row(self.population.step(self.strategy, generation))


def worker_processes(pool: Pool) -> list[psutil.Process]:
    """Return the living processes of the pool's workers; a worker that just ended is being replaced."""
    found = []
    for info in pool.infos:
        with suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(info.pid))
    return found


def close(pool: Pool) -> None:
    """End the workers of a pool and wait until they are gone: shared memory is divided among the living processes."""
    ended = worker_processes(pool)
    pool.close()
    psutil.wait_procs(ended)


def stored_bytes() -> int:
    """Return the bytes put into this Ray's object stores since its start. Ray has no public function for it."""
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    return int(get_memory_info_reply(state).store_stats.cumulative_created_bytes)


def pss(process: psutil.Process) -> float:
    """Return the memory of a process in megabytes (PSS: shared pages are divided equally). 0 if it has ended."""
    with suppress(psutil.NoSuchProcess):
        return float(process.memory_full_info().pss) / MEGABYTE
    return 0.0


@contextmanager
def peak_memory(*groups: list[psutil.Process]) -> Iterator[list[float]]:
    """Yield a list that receives the peak memory of each group of processes, in megabytes, until the block ends."""
    gc.collect()
    peaks, ended = [0.0] * len(groups), threading.Event()

    def look() -> None:
        peaks[:] = [max(peak, sum(map(pss, group))) for peak, group in zip(peaks, groups, strict=True)]

    def watch() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            look()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peaks
    finally:
        ended.set()
        watcher.join()
        look()


# Pairs of fitness images and members. A repeat takes minutes if the product is large.
SCORING = ((256, 16), (512, 16), (512, 64), (2048, 16))
FULL_SCORING = ((256, 16), (256, 64), (512, 16), (512, 64), (512, 256), (512, 1024), (2048, 16), (2048, 64))
REPEATS, LONG_REPEATS, LONG_IMAGES = 5, 3, 100_000
LIMIT_IMAGES = 8192
UPDATE_MEMBERS = 1000
FREE_MEMBERS, FREE_CHUNK, FREE_TASKS = 100_000, 200, 2000
MEMORY_POPULATIONS = (16, 1000, 10_000, 100_000)
MEMORY_IMAGES = 2
PHASES, PHASE_MEMBERS, PHASE_IMAGES = 5, 16, 2048
SGD_IMAGES = 2560

Said = Callable[[str], None]


def ratios(over: list[float], under: list[float]) -> list[float]:
    """Return the ratios of two measurements, repeat by repeat."""
    return [one / other for one, other in zip(over, under, strict=True)]


def measure_scoring(workers: int, grid: tuple[tuple[int, int], ...], say: Said) -> Results:
    """Measure scoring over images, population and workers, in alternation with the bare forward pass."""
    resnet = Generation(PARENT, max(images for images, _ in grid))
    sizes = sorted({1, min(2, workers), workers})
    pools, bares = {size: resnet.pool(size) for size in sizes}, {size: Bare(size) for size in sizes}
    whole, bare = pools[workers], bares[workers]
    low = Generation(PARENT, max(images for images, _ in grid), "bf16")
    low_pool = low.pool(workers)
    batch_of = {
        kind: max(BATCHES, key=lambda size: bare.run(forward, LIMIT_IMAGES, size, kind)["images"]) for kind in KINDS
    }
    batch = batch_of["ours"]
    say(f"the fastest batches of the bare forward passes: {batch_of}")
    for pool in (*pools.values(), low_pool):
        resnet.score(pool, 2 * workers, 256)  # a warm-up
    rates, efficiencies, limits = defaultdict(list), defaultdict(list), []
    theirs, folded, gflops, lows = [], [], [], []
    alone: dict[int, list[float]] = defaultdict(list)
    bare_alone: dict[int, list[float]] = defaultdict(list)

    def limit() -> float:
        limits.append(bare.run(forward, LIMIT_IMAGES, batch, "ours")["images"])
        return limits[-1]

    for repeat in range(REPEATS):
        before = limit()
        for images, population in grid:
            if images * population > LONG_IMAGES and repeat >= LONG_REPEATS:
                continue
            rate = images * population / resnet.score(whole, population, images)
            after = limit()
            rates[images, population].append(rate)
            share = 2 * rate / (before + after)
            efficiencies[images, population].append(share)
            say(
                f"scoring {repeat + 1}/{REPEATS}: {population} members on {images} images, {rate:.0f} images/s, "
                f"{share:.2f} of the bare pass"
            )
            before = after
        for size in sizes:
            alone[size].append(16 * size * 2048 / resnet.score(pools[size], 16 * size, 2048))
            bare_alone[size].append(bares[size].run(forward, LIMIT_IMAGES, batch, "ours")["images"])
        folded.append(bare.run(forward, LIMIT_IMAGES, batch_of["folded"], "folded")["images"])
        theirs.append(bare.run(forward, LIMIT_IMAGES, batch_of["torchvision"], "torchvision")["images"])
        gflops.append(bare.run(sgemm)["gflops"])
        lows.append(16 * 2048 / low.score(low_pool, 16, 2048))
        by_size = ", ".join(f"{size}: {alone[size][-1]:.0f}" for size in sizes)
        say(f"scoring {repeat + 1}/{REPEATS}: images/s by workers, {by_size}; bf16 {lows[-1]:.0f}")
    for one in bares.values():
        one.close()
    for pool in (*pools.values(), low_pool):
        close(pool)
    return {
        "limit": {
            "images_per_second": spread(limits),
            "batch": batch,
            "folded_images_per_second": spread(folded),
            "torchvision_images_per_second": spread(theirs),
            "sgemm_gflops": spread(gflops),
        },
        "scoring": [
            {
                "fitness_images": images,
                "population": population,
                "workers": workers,
                "members_per_second": spread(rate / images for rate in rates[images, population]),
                "images_per_second": spread(rates[images, population]),
                "efficiency": spread(efficiencies[images, population]),
            }
            for images, population in grid
        ],
        "over_torchvision": spread(ratios(alone[workers], theirs)),
        "over_folded": spread(ratios(alone[workers], folded)),
        "bf16": {"images_per_second": spread(lows)},
        "scaling": [
            {
                "workers": size,
                "images_per_second": spread(alone[size]),
                "speedup": spread(ratios(alone[size], alone[1])),
                "bare_speedup": spread(ratios(bare_alone[size], bare_alone[1])),
                "of_the_bare_speedup": spread(
                    ratios(ratios(alone[size], alone[1]), ratios(bare_alone[size], bare_alone[1]))
                ),
            }
            for size in sizes
        ],
    }


def measure_phases(workers: int, say: Said) -> Results:
    """Measure what whole evolve phases of ResNet18, one after another as in a run, send and need in memory."""
    resnet = Generation(PARENT, PHASE_IMAGES)
    pool = resnet.pool(workers)
    phases, seconds, traffic, worker_mb = resnet.phases(pool, PHASE_MEMBERS), [], [], []
    for phase in range(1, PHASES + 1):
        stored = stored_bytes()
        row = phases.evolve(2 * phase)
        assert row["accepted"], row["note"]
        seconds.append(row["broadcast_seconds"])
        traffic.append(stored_bytes() - stored)
        with peak_memory(*([worker] for worker in worker_processes(pool))) as peaks:  # apart: it takes time
            phases.evolve(2 * phase + 1)
        worker_mb.append(max(peaks))
        say(f"phases {phase}/{PHASES}: a worker {worker_mb[-1]:.0f} MB, sent {traffic[-1] / 1e6:.1f} MB")
    close(pool)
    return {
        "broadcast": {
            "seconds": spread(seconds),
            "bytes_per_generation": spread(traffic),
            "parents_per_generation": spread(bytes_sent / resnet.model.theta_D.nbytes for bytes_sent in traffic),
        },
        "resnet18_worker_mb": spread(worker_mb),
    }


def measure_update(workers: int, say: Said) -> Results:
    """Measure the sharded update in comparison with noise alone, and SGD in comparison with torchvision's module."""
    resnet = Generation(PARENT, 256)
    sizes = sorted({1, min(2, workers), workers})
    pools, bare, trainer = {size: resnet.pool(size) for size in sizes}, Bare(workers), Bare(1, threads=workers)
    seconds: dict[int, list[float]] = defaultdict(list)
    alone, with_axpy = [], []
    ours, theirs = [], []
    elements = resnet.model.theta_D.numel()
    for repeat in range(REPEATS + 1):
        rates = bare.run(noise, 100, elements)
        epoch = trainer.run(sgd, SGD_IMAGES)
        for size in sizes:
            once = resnet.update(pools[size], UPDATE_MEMBERS)
            if repeat:  # the first is a warm-up
                seconds[size].append(once)
        if repeat:
            alone.append(1000 / rates["noise"])
            with_axpy.append(1000 / rates["accumulate"])
            ours.append(epoch["ours"])
            theirs.append(max(epoch["torchvision"], epoch["torchvision_channels_last"]))
            by_size = ", ".join(f"{size}: {seconds[size][-1]:.2f}" for size in sizes)
            images = f"{ours[-1]:.0f} and torchvision's {theirs[-1]:.0f} images/s"
            say(f"update {repeat}/{REPEATS}: seconds by workers, {by_size}; SGD {images}")
    trainer.close()
    bare.close()
    for pool in pools.values():
        close(pool)
    return {
        "update": [{"workers": size, "seconds_per_1000_members": spread(seconds[size])} for size in sizes],
        "update_limit": {
            "workers": workers,
            "noise_seconds_per_1000_members": spread(alone),
            "noise_and_axpy_seconds_per_1000_members": spread(with_axpy),
        },
        "sgd": {
            "images_per_second": spread(ours),
            "torchvision_images_per_second": spread(theirs),
            "ratio": spread(ratios(ours, theirs)),
        },
    }


def measure_dispatch(workers: int, say: Said) -> Results:
    """Measure the overhead of Ray and the dispatcher with members that cost nothing, in chunks of two hundred and of
    one. Measure the part of the driver's main thread, with relays between it and the workers of a node and without."""
    small = Generation(SMALL, MEMORY_IMAGES)
    pool = small.pool(workers, FreeWorker)
    members, answers = [], []
    small.score(pool, FREE_TASKS, MEMORY_IMAGES)
    for _ in range(REPEATS):
        pool.cluster = pool.cluster.model_copy(update={"chunk": FREE_CHUNK})
        members.append(FREE_MEMBERS / small.score(pool, FREE_MEMBERS, MEMORY_IMAGES))
        pool.cluster = pool.cluster.model_copy(update={"chunk": 1})
        answers.append(FREE_TASKS / small.score(pool, FREE_TASKS, MEMORY_IMAGES))
        say(f"dispatch: {members[-1]:.0f} free members/s; with one per task {answers[-1]:.0f} tasks/s")
    close(pool)
    pool = small.pool(GPUS_A_NODE, FreeWorker, least_nodes=1)
    pool.cluster = pool.cluster.model_copy(update={"chunk": 1})
    transport: Any = pool.transport
    while not all(node.up for node in transport.nodes.values()):
        transport.wait([], 1.0)
    driver: dict[bool, list[float]] = {True: [], False: []}
    for relayed in [True, False] * REPEATS:
        for node in transport.nodes.values():
            node.up = relayed
        before = time.thread_time()
        small.score(pool, FREE_TASKS, MEMORY_IMAGES)
        driver[relayed].append((time.thread_time() - before) / FREE_TASKS)
        say(f"dispatch: {1e3 * driver[relayed][-1]:.3f} ms of the driver per task, {'' if relayed else 'not '}relayed")
    close(pool)
    found = {"members_per_second": members, "tasks_per_second": answers}
    found |= {"driver_seconds": driver[False], "relayed_driver_seconds": driver[True]}
    return {"dispatch": {name: spread(values) for name, values in found.items()}}


def measure_memory(workers: int, populations: tuple[int, ...], say: Said) -> list[Results]:
    """Measure the peak memory of whole evolve phases of the small network over the population."""
    small = Generation(SMALL, MEMORY_IMAGES)
    pool = small.pool(workers)

    def evolve(population: int) -> None:
        row = small.evolve(pool, population)
        assert row["accepted"], row["note"]

    evolve(populations[0])  # a warm-up
    found = []
    for population in populations:
        with peak_memory([psutil.Process()], *([worker] for worker in worker_processes(pool))) as peaks:
            evolve(population)
        driver_mb, *worker_mb = peaks
        found.append({"population": population, "driver_mb": driver_mb, "worker_mb": max(worker_mb)})
        say(f"memory: {population} members, driver {driver_mb:.0f} MB, a worker {max(worker_mb):.0f} MB")
    close(pool)
    return found
