"""The typed configuration of a run: its sections, and the checks between fields."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from spartan_ray.distributed.config import Cluster
from spartan_ray.engine.strategies.requests import CaseSet
from spartan_ray.naming import SUBSPACES, checked_kind, checked_loggers, checked_name, checked_ranges, is_named
from spartan_ray.noise.contract import NoiseKind
from spartan_ray.section import Decay, Finite, NonNegativeFloat, PositiveFloat, Section, place_of
from spartan_ray.vision.config import Data, Parent

Temperature = Literal["none", "error", "loss"]
FitnessKind = Literal["loss", "accuracy"]
BatchNormKind = Literal["running", "batch", "recalibrate"]


class Run(Section):
    """Where the run is written, how long it is, and what it keeps."""

    prefix = "run"

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run folder. A number is added if the name is taken."""
    out: Annotated[str, AfterValidator(place_of)] = "runs"
    """Folder that holds the run folders: a path, or a URL such as s3://bucket/runs."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the splits, the initial weights, the order of the data and the noise."""
    epochs: PositiveInt = 50
    """Total number of epochs. An evolve phase counts as an epoch."""
    resume: Literal["never", "auto"] = "never"
    """never: start a new run. auto: start `out`/`name` if it does not exist, continue it if it is unfinished, and do
    nothing if it is finished, so that the same command can be repeated."""
    patience: PositiveInt | None = None
    """Stop after this number of epochs without a better validation accuracy (default: never)."""
    keep_best: bool = False
    """Also keep the network of the epoch with the best validation accuracy, as best.safetensors."""
    loggers: Annotated[str, AfterValidator(partial(checked_loggers, "run.loggers"))] = "tensorboard"
    """Loggers of each epoch's metrics, in addition to metrics.jsonl: tensorboard, mlflow, wandb, package.module:Name,
    several separated by commas, or none."""
    keep: PositiveInt = 3
    """Number of latest checkpoints to keep, one per epoch. Checkpoints that `spartan replay` needs are kept in
    addition."""
    keep_parents: bool = True
    """Also keep the parent before each evolve phase, which `spartan replay` needs: 45 MB each for ResNet18. esgd keeps
    all parents."""


# Fields that have an effect only with certain settings of another field. With other settings, only their default is
# accepted.
ONLY_WITH: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("sigma", "sigma_decay", "noise"), ("strategy", "es or esgd")),
    **dict.fromkeys(("sigma_scale", "shaping", "mirrored"), ("strategy", "es")),
    **dict.fromkeys(
        ("step", "optimizer", "weight_decay", "cases", "generations", "subspace", "diagnostics"), ("strategy", "es")
    ),
    **dict.fromkeys(("parents", "recombine", "elite", "optimizers"), ("strategy", "esgd")),
    "adapt_sigma": ("step", "search"),
    "step_ratio": ("step", "ratio"),
    "lr_decay": ("step", "lr"),
    **dict.fromkeys(("low", "high", "temperature", "gradient_images"), ("strategy", "random-gradients")),
    **dict.fromkeys(("gradient_split", "early_rejection"), ("strategy", "random-gradients")),
    "wave": ("accept", "chain"),
    "racing": ("accept", "best"),
}
# The evolution fields that evolutionary SGD uses, and the parent fields that it draws itself or does not use.
OF_ESGD = {"strategy", "every", "population", "fitness", "fitness_images", "batchnorm", "precision", "noise", "sigma"}
OF_ESGD |= {"graphs", "sigma_decay", "parents", "recombine", "elite", "optimizers"}
NOT_OF_ESGD = {"optimizer": ": evolution.optimizers says it", "lr": ": evolution.optimizers says it"}
NOT_OF_ESGD |= {"gradient_noise": "", "moments_after_evolution": "", "average": ""}
STRATEGIES = ("es", "random-gradients", "esgd", "none")
ACCEPT = {"es": ("always", "if-better"), "random-gradients": ("best", "chain")}
LR = {"es": 0.0005, "random-gradients": 0.01}


class Evolution(Section):
    """The evolve phases: when they run, how members are made and scored, and how the parent moves."""

    prefix = "evolution"

    strategy: Annotated[str, AfterValidator(partial(checked_name, "evolution.strategy", STRATEGIES))] = "es"
    """Strategy: es (evolution strategies) or random-gradients (random multiples of the gradient), both as in the
    article, esgd (evolutionary SGD), none (SGD alone), or package.module:Name (a class of your own)."""
    every: PositiveInt = 5
    """Run an evolve phase every N epochs."""
    population: Annotated[int, Field(ge=2)] = 50
    """Number of descendants per generation, K; for esgd the number of offspring, lambda."""
    parents: PositiveInt = 4
    """esgd: number of parents trained side by side, mu. Each is a whole network with its own optimizer."""
    recombine: PositiveInt = 2
    """esgd: number of parents per offspring, rho. An offspring is their mean plus noise."""
    elite: PositiveInt | None = None
    """esgd: number of the best candidates, m, that always become parents (default: half of evolution.parents). The
    other parents are drawn from the remaining candidates."""
    optimizers: Annotated[str, AfterValidator(partial(checked_ranges, "evolution.optimizers"))] = "sgd:0.003..0.03"
    """esgd: optimizers, each with a range of learning rates: sgd:0.01..0.1,adam:1e-4..1e-3. Each parent draws one
    at the start and after every phase, with a rate log-uniform in its range."""
    fitness: FitnessKind = "loss"
    """Fitness of a descendant: loss (minus its mean cross-entropy) or accuracy."""
    generations: PositiveInt = 1
    """es: number of generations per phase, one after another. With evolution.step search, a generation tries only two
    lengths around the last one found, if there is one."""
    fitness_images: Annotated[int, Field(ge=2)] | None = None
    """Number of evolution images that score a member, drawn anew for each generation (default: all, or an equal share
    if confirm or search need images too)."""
    cases: Literal["common", "own"] = "common"
    """es with mirrored: common scores all members on the same images; own lets each pair draw its own fitness_images
    from all images that confirm and search leave."""
    accept: Literal["always", "if-better", "best", "chain"] | None = None
    """What replaces the parent. es: the update, always or only if-better than the parent; random-gradients: best (the
    best member, if it is better than the parent) or chain (each better member, at once) (default: always for es, best
    for random-gradients)."""
    confirm: bool = False
    """Accept the chosen update or member only if it is also better on evolution images that did not choose it."""
    confirm_images: Annotated[int, Field(ge=2)] | None = None
    """Number of evolution images for evolution.confirm, and of other images for evolution.step search (default: equal
    shares of what fitness_images leaves)."""
    batchnorm: BatchNormKind = "running"
    """BatchNorm statistics of a descendant: running (the parent's), batch (those of the scored batch), or recalibrate
    (its own, on 512 fixed SGD images)."""
    mutate: Annotated[str, Field(min_length=1)] = "all"
    """Parameters that evolution moves: all, batchnorm, no-batchnorm, classifier (the last layer), biases, or patterns
    of parameter names such as layer4.*,fc.*"""
    subspace: Annotated[str, AfterValidator(partial(checked_kind, "evolution.subspace", SUBSPACES, ()))] = "none"
    """es: directions in which members differ: none (the whole space), random:m (m random directions), trajectory:m
    (the parent's steps over the last m epochs), or guided:m (m gradients, plus the whole space)."""
    diagnostics: bool = False
    """es: record the cosine between the update and the gradient of the fitness images, and measures of the gain of
    each phase."""
    of: Literal["parent", "average"] = "parent"
    """Network that a phase starts from: parent, or average (see parent.average). If the phase moves the average, the
    result becomes the parent; if not, the parent stays as it was."""
    noise: NoiseKind = "uniform"
    """es, esgd: distribution of the noise: uniform in [-1, 1), gaussian (standard normal), or rademacher (-1 or 1)."""
    sigma: PositiveFloat = 0.01
    """es, esgd: scale of the noise: perturbation = sigma * noise."""
    sigma_scale: Literal["absolute", "relative"] = "absolute"
    """es: absolute uses sigma as it is; relative multiplies it by the RMS of each parameter tensor, so that a tensor
    of zeros does not move."""
    sigma_decay: Decay = 1.0
    """es, esgd: multiply sigma by this factor after each evolve phase."""
    lr: PositiveFloat | None = None
    """Learning rate of evolution. es: update = lr / (K sigma) * sum of weight * noise; random-gradients: step = lr *
    temperature * gradient * u (default: 0.0005 for es, 0.01 for random-gradients)."""
    lr_decay: Decay = 1.0
    """Multiply evolution.lr by this factor after each evolve phase."""
    shaping: Literal["zscore", "centered-rank"] = "zscore"
    """es: how fitness becomes a weight: zscore (subtract the mean, divide by the standard deviation) or centered-rank
    (rank, scaled to [-0.5, 0.5])."""
    mirrored: bool = False
    """es: use mirrored pairs: members 2j and 2j+1 share a seed and have the perturbations +sigma * noise and -sigma *
    noise."""
    step: Literal["lr", "ratio", "search"] = "lr"
    """es: length of the update: lr (given by evolution.lr), ratio (evolution.step_ratio), or search (the best of
    about ten lengths on images that did not choose the direction). lr has no effect with ratio and search."""
    step_ratio: PositiveFloat = 0.5
    """es with evolution.step ratio: length of the update divided by the length of one perturbation."""
    adapt_sigma: bool = False
    """es with evolution.step search: after each generation of a phase, adapt sigma to the length that it found."""
    precision: Literal["fp32", "tf32", "bf16"] = "tf32"
    """Arithmetic of the scoring: fp32, tf32 (TF32 products on GPUs that have them, else fp32), or bf16 (fastest on
    hardware with bf16 units)."""
    graphs: bool = False
    """Score members on a GPU by replaying a CUDA graph: one launch per member instead of hundreds. Not measured yet."""
    optimizer: Literal["sgd", "momentum", "adam"] = "sgd"
    """es: optimizer that turns the estimated gradient into the update: sgd, momentum (0.9), or adam (beta1 0.9, beta2
    0.999)."""
    weight_decay: NonNegativeFloat = 0.0
    """es: L2 weight decay of the parent, added to the estimated gradient."""
    low: Finite = 0.0
    """random-gradients: lower bound of the uniform random factor u of each gradient element."""
    high: Finite = 1.0
    """random-gradients: upper bound of the uniform random factor u of each gradient element."""
    temperature: Temperature = "none"
    """random-gradients: factor of the step: none (1), error (share of fitness images the parent gets wrong), or loss
    (the parent's loss divided by that of a uniform guess)."""
    gradient_images: Annotated[int, Field(ge=2)] | None = None
    """random-gradients: number of images of the gradient, drawn anew for each generation (default: 512, or all if
    there are fewer)."""
    gradient_split: Literal["sgd", "evolution"] = "sgd"
    """random-gradients: split that the images of the gradient come from: sgd, or evolution (then from the fitness
    images)."""
    wave: PositiveInt | None = None
    """random-gradients with evolution.accept chain: number of members scored at once (default: one per worker). Does
    not change the result."""
    racing: Annotated[int, Field(ge=0, le=8)] = 0
    """random-gradients with evolution.accept best: number n of successive halvings, 0 to 8. All members are scored on
    1/2^n of the images, the better half on twice as many, and so on."""
    early_rejection: bool = True
    """random-gradients: check after every 256 images (2,048 on a GPU) whether a member can still win, and stop
    scoring it if not. Does not change the result."""

    @model_validator(mode="after")
    def _together(self) -> Evolution:
        without = {"batchnorm": self.batchnorm == "recalibrate", "subspace": self.subspace != "none"}
        without["early_rejection"] = self.strategy == "random-gradients" and self.early_rejection
        for name in (name for name, has_none in without.items() if self.graphs and has_none):
            raise ValueError(f"evolution.graphs has no effect with evolution.{name} {getattr(self, name)}")
        if self.strategy == "none" or is_named(self.strategy):
            return self
        if self.strategy == "esgd":
            return self._as_esgd()
        chosen = self.resolved()
        for name, (switch, wanted) in ONLY_WITH.items():
            if switch == "accept" and wanted not in ACCEPT[self.strategy]:
                switch, wanted = "strategy", "random-gradients"
            value, setting = getattr(self, name), getattr(chosen, switch)
            if value != type(self).model_fields[name].default and setting not in wanted.split(" or "):
                raise ValueError(
                    f"evolution.{name} ({value}) has no effect with evolution.{switch} {setting}: it needs {wanted}"
                )
        if chosen.accept not in ACCEPT[self.strategy]:
            wanted = " or ".join(ACCEPT[self.strategy])
            raise ValueError(
                f"evolution.accept ({self.accept}) does not go with evolution.strategy {self.strategy}: {wanted}"
            )
        if self.confirm_images and not self.confirm and self.step != "search":
            raise ValueError(
                f"evolution.confirm_images ({self.confirm_images}) has no effect without evolution.confirm "
                "or evolution.step search"
            )
        if self.mirrored and self.population % 2:
            raise ValueError(f"evolution.population ({self.population}) must be even when mirrored")
        if self.subspace.startswith("trajectory") and self.every < 2:
            raise ValueError("evolution.subspace (trajectory) needs epochs between the phases: evolution.every above 1")
        if self.subspace != "none" and self.sigma_scale == "relative":
            raise ValueError("evolution.sigma_scale (relative) has no meaning in a subspace (evolution.subspace)")
        if self.cases == "own" and not (self.mirrored and self.fitness_images):
            needs = "evolution.fitness_images, how many each pair draws" if self.mirrored else "evolution.mirrored"
            raise ValueError(f"evolution.cases (own) needs {needs}")
        if self.fitness_images:
            self.image_counts(2**53)
        if self.low >= self.high:
            raise ValueError(f"evolution.low ({self.low:g}) must be below evolution.high ({self.high:g})")
        return self

    def _as_esgd(self) -> Evolution:
        for name, info in type(self).model_fields.items():
            if name not in OF_ESGD and getattr(self, name) != info.default:
                raise ValueError(f"evolution.{name} ({getattr(self, name)}) has no effect with evolution.strategy esgd")
        for name in ("recombine", "elite"):
            if (getattr(self, name) or 1) > self.parents:
                raise ValueError(
                    f"evolution.{name} ({getattr(self, name)}) is larger than evolution.parents ({self.parents})"
                )
        if self.every < 2:
            raise ValueError("evolution.strategy (esgd) needs epochs between the phases: evolution.every above 1")
        return self

    def resolved(self, workers: int = 1) -> Evolution:
        """Return a copy with the defaults filled in that depend on the strategy and the number of workers."""
        if self.strategy not in LR:
            return self
        accept, lr = self.accept or ACCEPT[self.strategy][0], self.lr or LR[self.strategy]
        wave = self.wave or (workers if accept == "chain" else None)
        return self.model_copy(update={"accept": accept, "lr": lr, "wave": wave})

    def image_counts(self, available: int) -> dict[CaseSet, int]:
        """Return the sizes of the disjoint sets of evolution images that score a generation, search for its step and
        confirm it.

        Sets without a given size share the remaining images equally. Raises ValueError if the sets do not fit."""
        if is_named(self.strategy):  # the strategy itself states the sets it needs
            return {"fitness": self.fitness_images or available}
        own = self.fitness_images if self.cases == "own" else None
        counts: dict[CaseSet, int | None] = {"fitness": None if own else self.fitness_images}
        if self.step == "search":
            counts["search"] = self.confirm_images
        if self.confirm:
            counts["confirm"] = self.confirm_images
        given = sum(count or 0 for count in counts.values())
        missing = sum(count is None for count in counts.values())
        share = (available - given) // max(missing, 1)
        if given > available or (missing and share < (own or 2)):
            wanted = f"evolution.fitness_images ({self.fitness_images or 'the rest'})"
            if len(counts) > 1:
                purposes = " and ".join(name for name in counts if name != "fitness")
                wanted += f" and evolution.confirm_images ({self.confirm_images or 'the rest'}) to {purposes}"
            raise ValueError(f"{wanted} do not fit data.evolution_images ({available})")
        shares = {name: count or share for name, count in counts.items()}
        if shares["fitness"] >> self.racing < 2:
            raise ValueError(
                f"evolution.racing ({self.racing}) leaves {shares['fitness'] >> self.racing} of "
                f"evolution.fitness_images ({shares['fitness']}) to the first round: at least 2 are needed"
            )
        return shares


class Config(Section):
    """The configuration of a run. A preset or a file is the base; flags override it."""

    prefix = ""

    run: Run = Run()
    data: Data = Data()
    parent: Parent = Parent()
    evolution: Evolution = Evolution()
    cluster: Cluster = Cluster()

    @model_validator(mode="after")
    def _splits(self) -> Config:
        evolution, data = self.evolution, self.data
        for name, instead in NOT_OF_ESGD.items() if evolution.strategy == "esgd" else ():
            value = getattr(self.parent, name)
            if value != Parent.model_fields[name].default:
                raise ValueError(f"parent.{name} ({value}) has no effect with evolution.strategy esgd{instead}")
        if evolution.of == "average" and evolution.strategy == "none":
            raise ValueError("evolution.of (average) has no effect with evolution.strategy none")
        if evolution.of == "average" and self.parent.average == "none":
            raise ValueError("evolution.of (average) needs parent.average")
        if evolution.of == "average" and evolution.every < 2:
            raise ValueError("evolution.of (average) needs epochs between the phases: evolution.every above 1")
        if data.sgd_on_evolution and self.parent.average.startswith("soup"):
            raise ValueError(
                "parent.average (soup) needs images that SGD does not see, and data.sgd_on_evolution trains on them all"
            )
        if evolution.strategy != "none":
            if data.evolution_images:
                evolution.image_counts(data.evolution_images)
            if data.sgd_on_evolution and (evolution.confirm or evolution.step == "search"):
                needs = "evolution.confirm" if evolution.confirm else "evolution.step search"
                raise ValueError(
                    f"{needs} needs images that SGD does not see, and data.sgd_on_evolution trains on them all"
                )
        if evolution.strategy == "random-gradients":
            name = "data.sgd_images" if evolution.gradient_split == "sgd" else "evolution.fitness_images"
            given = data.sgd_images if evolution.gradient_split == "sgd" else evolution.fitness_images
            if given and evolution.gradient_images and evolution.gradient_images > given:
                raise ValueError(
                    f"evolution.gradient_images ({evolution.gradient_images}) is larger than {name} ({given})"
                )
        if self.data.name == "folder" and self.data.root is None:
            raise ValueError("data.root: the folder data set needs the path of its folder")
        return self
