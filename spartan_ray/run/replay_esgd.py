"""Rebuilds the offspring and the selected parents of an esgd run from its journal and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from spartan_ray.engine.breeding import LocalBreeders
from spartan_ray.engine.strategies.esgd import Offspring
from spartan_ray.errors import InputError
from spartan_ray.run.checkpoint import save_weights
from spartan_ray.run.esgd import Parents
from spartan_ray.run.journal import Journal
from spartan_ray.run.recorded import CPU, Recorded
from spartan_ray.run.setup import make_breeder


class EsgdReplay(Recorded):
    """Replays the evolve phases of an esgd run folder in this process. Members are the offspring of a phase."""

    def __init__(self, run: Path, note: Callable[[str], None], device: torch.device = CPU) -> None:
        super().__init__(run, note, device)
        strategy, spec = make_breeder(self.config, self.splits)
        breeders, seed = LocalBreeders(spec, device, note), self.config.run.seed
        self.parents = Parents(strategy, breeders, seed, self.model, len(spec.case_N), len(self.splits.sgd))

    def descendant(self, generation: int, member: int, file: Path) -> tuple[float, float]:
        """Write the weights of an offspring to a file. Return its recorded fitness and the one it gets now."""
        journal = self._begin(generation)
        self.refuse_member(member, generation, journal)
        breeders, row = self.parents.breeding.breeders, _offspring(journal).rows([member])
        (scored,) = breeders.each("score", row, self.parents.breeding.individuals)
        (made,) = breeders.each("make", row, self.parents.breeding.individuals)
        made.become(self.model)
        save_weights(file, self.model.state_dict(), self.description)
        return float(journal["fitness"][member]), float(scored.fitness)

    def verify(self, generation: int) -> bool:
        """Rebuild the next parents of a phase from its journal. Return whether their bits match the recorded ones."""
        journal = self._begin(generation)
        breeding, order_P = self.parents.breeding, journal["order"]
        breeding.become(_offspring(journal), journal["fitness"], order_P)
        agrees = breeding.digest() == str(journal["next_parent"])
        count = int((order_P >= len(order_P)).sum())
        moves = f"{count} of {len(journal['member'])} offspring are parents"
        self.note(f"generation {generation}: {moves}; {'agrees' if agrees else 'DIFFERS from the recorded parents'}")
        return agrees

    def _begin(self, generation: int) -> Journal:
        """Load the parents before a phase. Return the journal. Raises InputError if they do not fit together."""
        path, journal, checkpoint = self.read(generation)
        self.parents.load(checkpoint.tensors["evolution"], None, checkpoint.loop.optimizers.get("evolution", {}))
        breeding = self.parents.breeding
        if breeding.digest() != str(journal["parent"]):
            raise InputError(f"{path}: the journal of other parents than the checkpoint's")
        parents, count = len(breeding.individuals), len(journal["member"])
        _check(path, journal, "parents", (count, breeding.strategy.recombine), parents)
        _check(path, journal, "order", (parents,), parents + count)
        if len(set(journal["order"].tolist())) < parents:
            raise InputError(f"{path}: not a journal: order has one candidate twice")
        return journal


def _check(path: Path, journal: Journal, name: str, shape: tuple[int, ...], below: int) -> None:
    """Raise InputError unless a journal column has this shape and holds integers from 0 to `below` - 1."""
    found = journal.get(name)
    whole = found is not None and found.dtype.kind == "i" and found.shape == shape and found.size
    if found is None or not whole or found.min() < 0 or found.max() >= below:
        raise InputError(f"{path}: not a journal: {name} is missing or of another kind")


def _offspring(journal: Journal) -> Offspring:
    return Offspring(journal["parents"], journal["seed"], journal["gain"])
