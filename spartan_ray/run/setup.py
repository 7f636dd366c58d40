"""Builds the parts of a run from its configuration, for the driver and for replay alike."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from spartan_ray.engine.breeding import BreederSpec
from spartan_ray.engine.draws import draw_cases, gradient_cases, share_cases
from spartan_ray.engine.evaluator import EvaluatorSpec, packed
from spartan_ray.engine.executor import Executor
from spartan_ray.engine.flat import FlatModel
from spartan_ray.engine.population import GRADIENT_CASES, Population
from spartan_ray.engine.strategies.es import EvolutionStrategies
from spartan_ray.engine.strategies.esgd import EvolutionarySGD
from spartan_ray.engine.strategies.random_gradients import RandomGradients
from spartan_ray.engine.strategies.requests import CaseSet, Strategy
from spartan_ray.errors import InputError, one_line
from spartan_ray.naming import SUBSPACES, imported, is_named, kind_and_number, optimizer_ranges
from spartan_ray.run.config import Config, Evolution
from spartan_ray.vision.averaging import Average
from spartan_ray.vision.classification import (
    BatchNormKind,
    Classification,
    Normaliser,
    RelativeLoss,
    error,
    mean_gradient,
    recalibrate,
    score,
)
from spartan_ray.vision.config import AVERAGES
from spartan_ray.vision.data import Splits
from spartan_ray.vision.models import build_model
from spartan_ray.vision.training import Course

# Number of SGD images that recalibrate BatchNorm: the first ones of the split, the same in the whole run.
REFERENCE_IMAGES = 512


def make_strategy(config: Evolution, classes: int) -> Strategy | None:
    """Return the strategy that the configuration names, or None for none and for esgd. esgd has several parents and is
    made by `make_breeder`. Raises InputError if a strategy of the user's own cannot be made."""
    config = config.resolved()
    if config.strategy in ("none", "esgd"):
        return None
    if is_named(config.strategy):
        return _strategy_of_name(config)
    strategy = EvolutionStrategies if config.strategy == "es" else RandomGradients
    # The parameters of a strategy are named as the configuration fields.
    given = {name: getattr(config, name) for name in inspect.signature(strategy).parameters if hasattr(config, name)}
    if strategy is EvolutionStrategies:
        given["own_cases"] = config.fitness_images if config.cases == "own" else None
    else:
        given["temperature"] = {"none": None, "error": error, "loss": RelativeLoss(classes)}[config.temperature]
        given["wave"] = config.wave or 1
    return strategy(**given)


# Fields that apply around a strategy of the user's own, whether or not it takes them as parameters.
AROUND = {
    "strategy",
    "every",
    "fitness",
    "fitness_images",
    "confirm_images",
    "batchnorm",
    "mutate",
    "noise",
    "precision",
}
AROUND |= {"graphs", "gradient_split", "gradient_images", "subspace", "of"}


def _strategy_of_name(config: Evolution) -> Strategy:
    """Make a strategy of the user's own. Each of its parameters named as a configuration field gets that field's value,
    unless the value is None. Raises InputError for a field that was set but has no effect."""
    said = f"evolution.strategy ({config.strategy})"
    make = imported("evolution.strategy", config.strategy)
    try:
        taken = inspect.signature(make).parameters
    except (TypeError, ValueError) as error:
        raise InputError(f"{said}: {error}") from None
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        if value != info.default and name not in AROUND | taken.keys():
            raise InputError(f"evolution.{name} ({value}) has no effect: {config.strategy} takes {', '.join(taken)}")
    values = {name: getattr(config, name) for name in taken if name in type(config).model_fields}
    try:
        strategy = make(**{name: value for name, value in values.items() if value is not None})
    except Exception as error:
        raise InputError(f"{said}: {one_line(f'{type(error).__name__}: {error}')}") from error
    if not isinstance(strategy, Strategy):
        raise InputError(f"{said}: expected population, case_sets and generation(seed, number)")
    return strategy


def refuse_sets(config: Config, strategy: Strategy, evolution_images: int) -> None:
    """Raise InputError if a strategy of the user's own asks for sets of images that it cannot have."""
    evolution, sets = config.evolution, strategy.case_sets
    if not is_named(evolution.strategy):
        return
    share_cases(sets, evolution.fitness_images, evolution.confirm_images, evolution_images)
    if config.data.sgd_on_evolution and len(sets) > 1:
        needs = f"evolution.strategy ({evolution.strategy})"
        raise InputError(f"{needs} needs images that SGD does not see, and data.sgd_on_evolution trains on them all")


def make_fitness(config: Evolution, splits: Splits) -> Classification:
    """Return the fitness that scores the descendants of a run on the images of its evolution split."""
    reference = splits.sgd[slice(0, REFERENCE_IMAGES)]
    by, statistics, precision = config.fitness, config.batchnorm, config.precision
    return Classification(
        splits.evolution, reference, splits.mean_C, splits.std_C, by, statistics, precision, config.graphs
    )


def make_population(
    config: Config,
    splits: Splits,
    model: FlatModel,
    note: Callable[[str], None],
    executor: Callable[[EvaluatorSpec], Executor] | None = None,
) -> Population:
    """Make the population of a run around its parent. Raises InputError if there are too few images.

    `executor` makes what evaluates the members; by default they are evaluated in this process."""
    evolution, seed = config.evolution, config.run.seed
    counts = image_counts(evolution, len(splits.evolution), len(splits.sgd))
    named = is_named(evolution.strategy)
    fitness = make_fitness(evolution, splits)
    device = model.theta_D.device
    sgd, normalise = splits.sgd.to(device), Normaliser(splits.mean_C, splits.std_C, device)
    kind: BatchNormKind = "running" if evolution.batchnorm == "running" else "batch"

    def gradient(network: nn.Module, generation: int) -> None:
        """Add the gradient of SGD images that are drawn anew for each generation."""
        count = evolution.gradient_images or GRADIENT_CASES
        index_N = torch.from_numpy(gradient_cases(np.arange(len(sgd)), count, seed, generation))
        mean_gradient(network, sgd[index_N], normalise, kind)

    return Population(
        model,
        fitness,
        seed=seed,
        noise=evolution.noise,
        mutate=evolution.mutate,
        subspace=evolution.subspace,
        fitness_cases=evolution.fitness_images if named else counts["fitness"],
        confirm_cases=evolution.confirm_images if named else counts.get("search", counts.get("confirm")),
        gradient=gradient if evolution.gradient_split == "sgd" else None,
        gradient_cases=evolution.gradient_images or GRADIENT_CASES,
        factory=functools.partial(build_model, config.parent, len(splits.classes)),
        threads=config.cluster.cpus_per_worker,
        executor=executor,
        note=note,
    )


def make_breeder(config: Config, splits: Splits) -> tuple[EvolutionarySGD, BreederSpec]:
    """Make the strategy of an esgd run, and the specification of its breeders, which train and score networks. Raises
    InputError if there are too few images."""
    evolution, seed = config.evolution, config.run.seed
    count = image_counts(evolution, len(splits.evolution), len(splits.sgd))["fitness"]
    images = packed(splits.sgd.pixels_NHWC), packed(splits.sgd.labels_N)
    strategy = EvolutionarySGD(
        evolution.population,
        parents=evolution.parents,
        recombine=evolution.recombine,
        elite=evolution.elite,
        sigma=evolution.sigma,
        sigma_decay=evolution.sigma_decay,
        every=evolution.every,
        optimizers=optimizer_ranges("evolution.optimizers", evolution.optimizers),
    )
    return strategy, BreederSpec(
        functools.partial(build_model, config.parent, len(splits.classes)),
        make_fitness(evolution, splits),
        evolution.noise,
        config.cluster.cpus_per_worker,
        course=Course(config.parent, images, splits.mean_C, splits.std_C, config.data.augment, config.run.epochs),
        # The same in the whole run: an individual is compared with its fitness of earlier epochs.
        case_N=draw_cases({"fitness": count}, len(splits.evolution), seed, 0)["fitness"],
    )


def make_average(
    config: Config, model: FlatModel, splits: Splits, normalise: Normaliser, look: Callable[[], None] = lambda: None
) -> Average | None:
    """Make the average of the parent that the configuration names, or None. The evolution split chooses the networks of
    a soup. `look` is called before each scoring and may raise to stop it."""
    found = kind_and_number("parent.average", config.parent.average, AVERAGES, ("ema",))
    if found is None:
        return None
    reference_NCHW = normalise(splits.sgd[slice(0, REFERENCE_IMAGES)].pixels_NHWC)

    def accuracy() -> float:
        look()
        return score(model.module, splits.evolution, normalise).accuracy

    return Average(*found, model, lambda: recalibrate(model.module, reference_NCHW), accuracy)


def epochs_behind(config: Config) -> tuple[int, int]:
    """Return the number of latest epochs whose networks a run needs to continue, and the number that a replay of the
    next phase needs."""
    average = kind_and_number("parent.average", config.parent.average, AVERAGES, ("ema",))
    subspace = kind_and_number("evolution.subspace", config.evolution.subspace, SUBSPACES)
    averaged = int(average[1]) if average and average[0] != "ema" else 0
    steps = int(subspace[1]) + 1 if subspace and subspace[0] == "trajectory" else 0
    return max(averaged, steps), max(1, steps, averaged if config.evolution.of == "average" else 0)


def image_counts(config: Evolution, evolution_images: int, sgd_images: int) -> dict[CaseSet, int]:
    """Return the number of images in each set of a generation. Raises InputError if there are too few."""
    try:
        counts = config.image_counts(evolution_images)
    except ValueError as error:
        raise InputError(str(error)) from None
    in_fitness = config.gradient_split == "evolution"
    name, available = ("fitness images", counts["fitness"]) if in_fitness else ("SGD split", sgd_images)
    if config.gradient_images and config.gradient_images > available:
        raise InputError(
            f"evolution.gradient_images ({config.gradient_images}) is larger than the {name} ({available})"
        )
    return counts
