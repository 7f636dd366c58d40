"""`EvolutionOptimizer`: a torch optimizer that also runs evolve phases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch.optim import Optimizer

from spartan_ray.engine.moments import rescale_moments
from spartan_ray.engine.population import Population
from spartan_ray.engine.strategies.requests import Outcome, Strategy, refuse


class EvolutionOptimizer(Optimizer):
    """A torch optimizer that runs an evolve phase every N steps.

    `step` calls the base optimizer. After every N steps, with N = `every`, a phase of the strategy moves the network of
    the population. `param_groups` and `state` are those of the base optimizer, so that learning rate schedulers and
    gradient scalers work as they do with the base.

    Example::

        base = torch.optim.SGD(network.parameters(), lr=0.01)
        optimizer = EvolutionOptimizer(base, population, strategy, every=500)

    Attributes:
        base: The base optimizer.
        population: The population.
        strategy: The strategy.
        every: Number of steps between phases, or None.
        moments: What happens to the base optimizer's moments after a phase: "keep", "reset" or "rescale".
        steps: Number of steps so far.
        outcome: Outcome of the last phase; None before the first.
    """

    def __init__(
        self,
        base: Optimizer,
        population: Population,
        strategy: Strategy,
        *,
        every: int | None = None,
        moments: Literal["keep", "reset", "rescale"] = "keep",
    ) -> None:
        """Check and store the settings.

        Args:
            base: Optimizer of the network's parameters, or of some of them.
            population: Population whose parent is the network.
            strategy: Strategy of the phases.
            every: Run a phase after every N steps. None: only `evolve` runs one.
            moments: What to do with the base optimizer's moments after a phase that moved the network. "keep" leaves
                them as they are. "reset" clears the base optimizer's state. "rescale" multiplies them by the ratio of
                each parameter tensor's gradient norm after the phase to the norm before (second moments by its square).
                It needs a `gradient` of the population or a fitness with a `loss`.

        Raises:
            InputError: A setting cannot be used, or the base optimizer has none of the network's parameters.
        """
        refuse(every is not None and every < 1, f"every ({every}) must be at least 1")
        refuse(moments not in ("keep", "reset", "rescale"), f"moments ({moments!r}) must be keep, reset or rescale")
        trained = {id(parameter) for group in base.param_groups for parameter in group["params"]}
        other = not any(id(parameter) in trained for parameter in population.model.module.parameters())
        refuse(other, "the optimizer has none of the parameters of the population's network")
        self.base, self.population, self.strategy = base, population, strategy
        self.every, self.moments = every, moments
        self.steps = 0
        self.outcome: Outcome | None = None
        # Torch's constructor does this too. It also adds parameters, which this class leaves to the base.
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
        """Add a parameter group to the base optimizer.

        Args:
            param_group: The group, as for the base optimizer.
        """
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of the base optimizer's parameters.

        Args:
            set_to_none: Set the gradients to None instead of zeros.
        """
        self.base.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do a step of the base optimizer, and run a phase if one is due.

        Args:
            closure: A function that computes the loss again, as for the base optimizer.

        Returns:
            The result of the base optimizer's `step`, which is the loss of the closure if there is one.
        """
        loss = self.base.step(closure)
        self.steps += 1
        if self.every and self.steps % self.every == 0:
            self.evolve()
        return loss

    def evolve(self) -> Outcome:
        """Run a phase now, whatever the number of steps.

        Returns:
            The outcome, which is also stored in `outcome`.
        """
        before_T = self.population.gradient_norms() if self.moments == "rescale" else None
        self.outcome = outcome = self.population.step(self.strategy)
        if outcome.accepted and self.moments == "reset":
            self.base.state.clear()
        elif outcome.accepted and before_T is not None:
            parameters = list(self.population.model.module.parameters())
            rescale_moments(self.base, parameters, before_T, self.population.gradient_norms())
        return outcome

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the base optimizer and of evolution. Save the network's `state_dict` with it.

        Returns:
            The `state_dict` of the base optimizer, with the steps and the population's state under "evolution".
        """
        return self.base.state_dict() | {"evolution": {"steps": self.steps, "population": self.population.state_dict()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue exactly from a saved state. Restore the network that was saved with it before this call.

        To load a state of the base optimizer alone, call `load_state_dict` of the base.

        Args:
            state_dict: The result of `state_dict`.

        Raises:
            InputError: The state has no "evolution" entry.
        """
        refuse("evolution" not in state_dict, "the state is not of an EvolutionOptimizer: it has no 'evolution'")
        evolution = state_dict["evolution"]
        self.base.load_state_dict({name: value for name, value in state_dict.items() if name != "evolution"})
        self.steps = evolution["steps"]
        self.population.load_state_dict(evolution["population"])
