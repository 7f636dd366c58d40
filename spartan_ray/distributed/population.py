"""`spartan_ray.Population`: scores members in this process, or on Ray workers."""

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
    """A parent network and its descendants, scored in this process or on Ray workers.

    `step` runs one evolve phase and changes the network in place. The result has the same bits whether this process
    or workers score the members. It is a context manager: leaving it calls `close`.

    Example::

        with Population(network, accuracy, cases=len(images), workers=2) as population:
            for _ in range(20):
                outcome = population.step(EvolutionStrategies(population=1000))
    """

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
        """Build the population and start its workers, if any.

        Args:
            network: The parent. Its parameters keep their memory, so that an optimizer of them stays valid. Those that
                evolution moves must be float32, bfloat16 or float16.
            fitness: A `Fitness`, or a function `fitness(network, case_N)` that returns one number per case, shape
                (N,), or M statistics per case, shape (N, M). With a function, the fitness of a network is the mean of
                the first statistic over the cases. Higher is better.
            cases: Number of cases. Required if `fitness` is a function; a `Fitness` has its own.
            workers: "local" scores in this process, without Ray. A number starts this number of Ray actors. "auto"
                starts one per free GPU, or one per `threads` free CPU cores if there are no GPUs. The workers run on
                the Ray that this process is connected to, else on that of `cluster.address` or RAY_ADDRESS, else on a
                new local Ray, which `close` shuts down.
            seed: Seed of the noise, and of the cases drawn for each generation: at least 0, less than 2**63.
            noise: Distribution of the noise: "uniform" in [-1, 1), "gaussian" (standard normal), or "rademacher"
                (-1 or 1).
            mutate: Parameters that evolution moves: "all", "batchnorm", "no-batchnorm", "classifier" (the last layer),
                "biases", a shell pattern of parameter names, or several of these separated by commas. The noise of a
                member has one element per parameter that is moved.
            subspace: Directions in which members differ: "none" (the whole space), "random:m" (m random directions),
                "trajectory:m" (the last m steps between calls of `remember`), or "guided:m" (m gradients, plus the
                whole space with half of the variance: Guided ES, Maheswaranathan et al., arXiv 1806.10230). Each
                direction takes 4 bytes per moved parameter on every node. A subspace cannot be combined with
                `RandomGradients` or with a relative sigma.
            fitness_cases: Number of cases that score a generation, drawn anew for each. None: an equal share of the
                cases that the other sets leave, so all cases if there is no other set.
            confirm_cases: Number of further cases for each of the sets "search" and "confirm", if the strategy uses
                them. None: an equal share, as for `fitness_cases`.
            gradient: A function `gradient(network, generation)` that calls `backward` on the loss whose gradient
                `RandomGradients` and the subspace "guided" use. None: `Fitness.loss` on `gradient_cases` of the fitness
                cases.
            gradient_cases: Number of cases of that default gradient, or all fitness cases if there are fewer.
            factory: A function that builds the network, with any parameters. Workers then receive this function
                instead of a copy of the network, which may be larger.
            threads: CPU threads of torch while a member is scored. The bits of the result depend on it.
            batch_members: Members scored per forward pass. More than 1 is faster for small networks and needs a fitness
                that `torch.func.vmap` can run. The bits of the result depend on it.
            cluster: Further settings of the workers: GPUs, timeouts, members per task, Ray's address. Its `workers` and
                `cpus_per_worker` must have their defaults or agree with `workers` and `threads`.
            note: A function that receives one-line messages. Default: warnings of the logger `spartan_ray`.

        Raises:
            InputError: A setting cannot be used, the network or the fitness cannot be sent to workers, or Ray does
                not answer. The message names the setting.
            RunError: The workers do not start.
        """
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
            # Ray's own message begins with the whole object that was to be sent.
            reason = one_line(str(error.__cause__ or error))[:300]
            raise InputError(f"the network or the fitness cannot be sent to workers: {reason}") from error
        pool = Pool(transport, resolved, spec.noise, note, lambda members, cases: None, spec.batch_members)
        pool.wait_until_joined()
        return pool

    def close(self) -> None:
        """Stop the workers. Shut Ray down if this population started it, or leave it if this population joined it.

        The network keeps its parameters."""
        super().close()
        self._end_ray()

    def _end_ray(self) -> None:
        if self.leave_ray:
            self.leave_ray()
            self.leave_ray = None
