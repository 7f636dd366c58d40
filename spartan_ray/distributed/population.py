"""A population in this process, or on the workers of a Ray."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from spartan_ray.distributed.config import Cluster
from spartan_ray.distributed.placement import resolve_cluster
from spartan_ray.distributed.pool import Pool
from spartan_ray.distributed.start import join_ray
from spartan_ray.engine import population
from spartan_ray.engine.evaluator import EvaluatorSpec
from spartan_ray.engine.fitness import Fitness
from spartan_ray.engine.phase import Gradient
from spartan_ray.engine.strategies.requests import refuse
from spartan_ray.errors import InputError, one_line
from spartan_ray.noise.contract import NoiseKind


class Population(population.Population):
    """A parent network and its descendants, which this process scores or the workers of a Ray.

        with Population(network, accuracy, cases=len(images), workers=2) as population:
            for _ in range(20):
                outcome = population.step(EvolutionStrategies(population=1000))

    `step` runs one evolve phase and moves the network in place, to the same bits wherever it is scored."""

    def __init__(
        self,
        network: nn.Module,
        fitness: Fitness | Callable[[nn.Module, torch.Tensor], torch.Tensor],
        *,
        cases: int | None = None,
        workers: int | Literal["local", "auto"] = "local",
        seed: int = 0,
        noise: NoiseKind = "uniform",
        mutate: str = "all",
        subspace: str = "none",
        fitness_cases: int | None = None,
        confirm_cases: int | None = None,
        gradient: Gradient | None = None,
        gradient_cases: int = population.GRADIENT_CASES,
        factory: Callable[[], nn.Module] | None = None,
        threads: int = 1,
        batch_members: int = 1,
        cluster: Cluster | None = None,
        note: Callable[[str], None] = population.LOG.warning,
    ) -> None:
        """`fitness` is a Fitness, or a function of a network and case numbers (N) that returns one number a case (N)
        or M statistics a case (N x M), with `cases` the number of cases. Higher is better.

        workers          "local": this process, without Ray; a number, or "auto" (one a GPU, or one a CPU core): Ray
                         actors, of the Ray that this process is connected to, else of the one that RAY_ADDRESS names,
                         else of a new one on this machine, which ends with `close`
        seed             of the noise, and of the cases that a generation draws
        noise            uniform, gaussian, rademacher
        mutate           what evolution moves: all, batchnorm, no-batchnorm, classifier, biases, a pattern of
                         parameter names, or several of these with commas between them; the noise of a member is as
                         long as what is moved
        subspace         directions that members differ in: none, the whole space; random:m; trajectory:m, the steps
                         between the parents that `remember` was called for; guided:m, gradients and the whole space in
                         equal parts (Guided ES). Each is a vector as long as what is moved in the memory of a node
        fitness_cases    how many cases score a generation, and `confirm_cases` how many others choose a length or
                         confirm; by default all cases, in equal shares
        gradient         `gradient(network, generation)` calls backward on the loss that random gradients descend; by
                         default that of the fitness on `gradient_cases` of the cases that score the generation
        factory          makes the network anew, with any parameters, where a copy of it would be larger
        threads          torch's CPU threads while a descendant is scored; the bits depend on it
        batch_members    descendants of a pass: faster for small networks, where `torch.func.vmap` can run the fitness;
                         the bits depend on it
        cluster          more settings of the workers: GPUs, timeouts, chunks, address
        note             takes one-line messages; by default they are warnings of the logger `spartan_ray`

        Raises InputError for what cannot be used, by its name."""
        settings: dict[str, Any] = {
            "cases": cases, "seed": seed, "noise": noise, "mutate": mutate, "subspace": subspace,
            "fitness_cases": fitness_cases, "confirm_cases": confirm_cases,
            "gradient": gradient, "gradient_cases": gradient_cases,
            "factory": factory, "threads": threads, "batch_members": batch_members, "note": note,
        }  # fmt: skip
        refuse(
            cluster is not None and cluster.workers not in ("auto", workers),
            f"workers ({workers}) and cluster.workers ({cluster and cluster.workers}) differ",
        )
        refuse(
            cluster is not None and cluster.cpus_per_worker not in (1, threads),
            f"threads ({threads}) and cluster.cpus_per_worker ({cluster and cluster.cpus_per_worker}) differ",
        )
        self.leave_ray: Callable[[], None] | None = None

        def pool(spec: EvaluatorSpec) -> Pool:
            values = (cluster or Cluster()).model_dump() | {"workers": workers, "cpus_per_worker": threads}
            return self._start(spec, Cluster(**values), note)

        try:
            super().__init__(network, fitness, executor=None if workers == "local" else pool, **settings)
        except BaseException:
            self._end_ray()
            raise

    def _start(self, spec: EvaluatorSpec, cluster: Cluster, note: Callable[[str], None]) -> Pool:
        import ray

        if not ray.is_initialized():
            self.leave_ray = join_ray(cluster.address)
        from spartan_ray.distributed.nodes import grows, nodes_here_first
        from spartan_ray.distributed.relayed import RelayTransport

        nodes = [node["Resources"] for node in nodes_here_first()]
        resolved = resolve_cluster(cluster, nodes, grows())
        try:
            transport = RelayTransport(spec, resolved)
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            # Ray's own text begins with all that was to be sent.
            reason = one_line(str(error.__cause__ or error))[:300]
            raise InputError(f"the network or the fitness cannot be sent to workers: {reason}") from error
        pool = Pool(transport, resolved, spec.noise, note, lambda members, cases: None, spec.batch_members)
        pool.wait_until_joined()
        return pool

    def close(self) -> None:
        """End the workers, and the Ray if it was started for them. The network keeps its parameters."""
        super().close()
        self._end_ray()

    def _end_ray(self) -> None:
        if self.leave_ray:
            self.leave_ray()
            self.leave_ray = None
