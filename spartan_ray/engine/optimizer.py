"""Evolution as a part of a gradient optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch.optim import Optimizer

from spartan_ray.engine.moments import rescale_moments
from spartan_ray.engine.population import Population
from spartan_ray.engine.strategies.requests import Outcome, Strategy, refuse


class EvolutionOptimizer(Optimizer):
    """A torch optimizer that evolves the network now and then.

        base = torch.optim.SGD(network.parameters(), lr=0.01)
        optimizer = EvolutionOptimizer(base, population, strategy, every=500)

    `step` is the base optimizer's; after each `every`-th one a phase of the strategy moves the network of the
    population. The two share their param_groups and state, so that schedulers and scalers work as on the base."""

    def __init__(
        self,
        base: Optimizer,
        population: Population,
        strategy: Strategy,
        *,
        every: int | None = None,
        moments: Literal["keep", "reset", "rescale"] = "keep",
    ) -> None:
        """With `every` None only `evolve` runs a phase. `moments` says what becomes of the base's moments when a phase
        moved the network: they are kept, reset, or rescaled to its new gradient, for which the fitness needs a loss.

        Raises InputError for a setting that cannot be used."""
        refuse(every is not None and every < 1, f"every ({every}) must be at least 1")
        refuse(moments not in ("keep", "reset", "rescale"), f"moments ({moments!r}) must be keep, reset or rescale")
        trained = {id(parameter) for group in base.param_groups for parameter in group["params"]}
        other = not any(id(parameter) in trained for parameter in population.model.module.parameters())
        refuse(other, "the optimizer has none of the parameters of the population's network")
        self.base, self.population, self.strategy = base, population, strategy
        self.every, self.moments = every, moments
        self.steps = 0
        self.outcome: Outcome | None = None
        # What torch's own constructor does beside adding parameters, which are the base's.
        self.__setstate__({"defaults": base.defaults})

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.base.state

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("an EvolutionOptimizer cannot be copied or pickled: copy its state_dict")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The base's."""
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base's."""
        self.base.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of the base, and a phase when it is time for one; what the closure returned."""
        loss = self.base.step(closure)
        self.steps += 1
        if self.every and self.steps % self.every == 0:
            self.evolve()
        return loss

    def evolve(self) -> Outcome:
        """One phase, now. The outcome is kept as `outcome`."""
        before_T = self.population.gradient_norms() if self.moments == "rescale" else None
        self.outcome = outcome = self.population.step(self.strategy)
        if outcome.accepted and self.moments == "reset":
            self.base.state.clear()
        elif outcome.accepted and before_T is not None:
            parameters = list(self.population.model.module.parameters())
            rescale_moments(self.base, parameters, before_T, self.population.gradient_norms())
        return outcome

    def state_dict(self) -> dict[str, Any]:
        """The base's, with how far evolution is under `evolution`. Saved beside the network's, it resumes exactly."""
        return self.base.state_dict() | {"evolution": {"steps": self.steps, "population": self.population.state_dict()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, with the network that was saved beside it. For a state of the base alone
        load that into the base."""
        refuse("evolution" not in state_dict, "the state is not of an EvolutionOptimizer: it has no 'evolution'")
        evolution = state_dict["evolution"]
        self.base.load_state_dict({name: value for name, value in state_dict.items() if name != "evolution"})
        self.steps = evolution["steps"]
        self.population.load_state_dict(evolution["population"])
