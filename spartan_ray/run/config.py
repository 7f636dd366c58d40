"""The typed configuration of a run: the sections of its parts, and what must hold between them."""

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
    """Where the run is written, and how long it is."""

    prefix = "run"

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run folder; a number is added when it is taken."""
    out: Annotated[str, AfterValidator(place_of)] = "runs"
    """Folder that holds the run folders: a path, or a URL as s3://bucket/runs."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of splits, initial weights, data order and noise."""
    epochs: PositiveInt = 50
    """Epochs, evolve phases included: one phase counts as an epoch."""
    resume: Literal["never", "auto"] = "never"
    """auto: `out`/`name` is begun, or goes on where it was, or is finished: the same command again and again."""
    patience: PositiveInt | None = None
    """End after so many epochs without a better validation accuracy (default: never)."""
    keep_best: bool = False
    """Keep the network of the best epoch by validation accuracy too, as best.safetensors."""
    loggers: Annotated[str, AfterValidator(partial(checked_loggers, "run.loggers"))] = "tensorboard"
    """Where the numbers of each epoch go too: tensorboard, mlflow, wandb, package.module:Name; several with commas."""
    keep: PositiveInt = 3
    """Checkpoints kept, one an epoch; those that replay needs come on top."""
    keep_parents: bool = True
    """Keep the parent before each evolve phase too (ResNet18: 45 MB; esgd: all parents): `spartan replay` needs it."""


# A field that only one setting of another field uses: refused elsewhere, unless it has its default.
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
# All that evolutionary SGD uses, and what of the parent it draws itself or has no use for.
OF_ESGD = {"strategy", "every", "population", "fitness", "fitness_images", "batchnorm", "precision", "noise", "sigma"}
OF_ESGD |= {"graphs", "sigma_decay", "parents", "recombine", "elite", "optimizers"}
NOT_OF_ESGD = {"optimizer": ": evolution.optimizers says it", "lr": ": evolution.optimizers says it"}
NOT_OF_ESGD |= {"gradient_noise": "", "moments_after_evolution": "", "average": ""}
STRATEGIES = ("es", "random-gradients", "esgd", "none")
ACCEPT = {"es": ("always", "if-better"), "random-gradients": ("best", "chain")}
LR = {"es": 0.0005, "random-gradients": 0.01}


class Evolution(Section):
    """The evolve phases."""

    prefix = "evolution"

    strategy: Annotated[str, AfterValidator(partial(checked_name, "evolution.strategy", STRATEGIES))] = "es"
    """es, random-gradients: the article's; esgd: evolutionary SGD; none: SGD alone; package.module:Name, a class."""
    every: PositiveInt = 5
    """Each so-many-th epoch is an evolve phase."""
    population: Annotated[int, Field(ge=2)] = 50
    """Descendants a generation, K; esgd: its offspring, lambda."""
    parents: PositiveInt = 4
    """esgd: parents that are trained side by side, mu; each is a whole network with its optimizer."""
    recombine: PositiveInt = 2
    """esgd: parents whose mean an offspring is, rho, before its noise."""
    elite: PositiveInt | None = None
    """esgd: the best, m, that are sure to be the next parents (default: half of them); the others are drawn."""
    optimizers: Annotated[str, AfterValidator(partial(checked_ranges, "evolution.optimizers"))] = "sgd:0.003..0.03"
    """esgd: what a parent draws its optimizer and learning rate from after each phase: sgd:0.01..0.1,adam:1e-4..1e-3"""
    fitness: FitnessKind = "loss"
    """Fitness of a descendant: minus its mean cross-entropy, or its accuracy."""
    generations: PositiveInt = 1
    """es: generations of a phase, one after another; with `step` search each after the first tries two lengths."""
    fitness_images: Annotated[int, Field(ge=2)] | None = None
    """Evolution images that score a member, drawn anew (default: all, or a share beside confirm and search)."""
    cases: Literal["common", "own"] = "common"
    """es, mirrored: own lets each pair draw its fitness images from all that confirm and search leave."""
    accept: Literal["always", "if-better", "best", "chain"] | None = None
    """es: always (default) or if-better; random-gradients: best (default), or chain, each better one at once."""
    confirm: bool = False
    """Take what was chosen only if it is also better on evolution images that did not choose it."""
    confirm_images: Annotated[int, Field(ge=2)] | None = None
    """Images of `confirm`, and as many others of `step` search (default: equal shares of what is left)."""
    batchnorm: BatchNormKind = "running"
    """Statistics of a descendant: the parent's, the scored batch's, or its own on 512 fixed SGD images."""
    mutate: Annotated[str, Field(min_length=1)] = "all"
    """What evolution moves: all, batchnorm, no-batchnorm, classifier, biases, patterns of names: layer4.*,fc.*"""
    subspace: Annotated[str, AfterValidator(partial(checked_kind, "evolution.subspace", SUBSPACES, ()))] = "none"
    """es: members differ in random:m, trajectory:m (of the last epochs) or guided:m (gradients too) directions."""
    diagnostics: bool = False
    """es: record the update's cosine to the gradient of the fitness images, and what a phase is worth."""
    of: Literal["parent", "average"] = "parent"
    """What a phase starts from: the parent, or its average (parent.average), which replaces it if the phase moves."""
    noise: NoiseKind = "uniform"
    """es, esgd: distribution of the noise."""
    sigma: PositiveFloat = 0.01
    """es, esgd: scale of the noise, perturbation = sigma * noise."""
    sigma_scale: Literal["absolute", "relative"] = "absolute"
    """es: relative multiplies sigma by the RMS of each tensor, so that a tensor of zeros stays."""
    sigma_decay: Decay = 1.0
    """es, esgd: factor of sigma after each evolve phase."""
    lr: PositiveFloat | None = None
    """es: lr / (K sigma) * sum of weight * noise (default: 0.0005); random-gradients: lr * gradient * u (0.01)."""
    lr_decay: Decay = 1.0
    """Factor of evolution.lr after each evolve phase."""
    shaping: Literal["zscore", "centered-rank"] = "zscore"
    """es: fitness to weight."""
    mirrored: bool = False
    """es: members 2j and 2j+1 share a seed, with signs +1 and -1."""
    step: Literal["lr", "ratio", "search"] = "lr"
    """es: length of the update: by lr; else lr has no effect: by step_ratio, or search, the best of about ten."""
    step_ratio: PositiveFloat = 0.5
    """es with `step` ratio: norm of the update over that of one mutation."""
    adapt_sigma: bool = False
    """es with `step` search: sigma follows the length that a generation finds, to the next one of its phase."""
    precision: Literal["fp32", "tf32", "bf16"] = "tf32"
    """Arithmetic of the scoring: tf32 (fp32 but on GPUs), fp32, or bf16, fastest where there are units for it."""
    graphs: bool = False
    """A GPU repeats a member's work as a CUDA graph, with one launch for all of it; has not been measured yet."""
    optimizer: Literal["sgd", "momentum", "adam"] = "sgd"
    """es: makes the update of the estimated gradient (momentum and beta1 0.9, beta2 0.999)."""
    weight_decay: NonNegativeFloat = 0.0
    """es: L2 decay, added to the estimated gradient."""
    low: Finite = 0.0
    """random-gradients: u is uniform from this ..."""
    high: Finite = 1.0
    """random-gradients: ... to this."""
    temperature: Temperature = "none"
    """random-gradients: factor of the step: 1, the parent's error, or its loss over a uniform guess's."""
    gradient_images: Annotated[int, Field(ge=2)] | None = None
    """random-gradients: images of the gradient, drawn anew for each generation (default: 512 at most)."""
    gradient_split: Literal["sgd", "evolution"] = "sgd"
    """random-gradients: split of those images; of the evolution split they are fitness images."""
    wave: PositiveInt | None = None
    """random-gradients with `accept` chain: members scored at once (default: one a worker); changes no result."""
    racing: Annotated[int, Field(ge=0, le=8)] = 0
    """random-gradients with `accept` best: n halvings (8 at most), from all members on 1 / 2^n of the images."""
    early_rejection: bool = True
    """random-gradients: ask after each 256 images (GPU: 2,048) if a member can still win; changes no result."""

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
        """With the defaults that depend on the strategy and on the workers that there are."""
        if self.strategy not in LR:
            return self
        accept, lr = self.accept or ACCEPT[self.strategy][0], self.lr or LR[self.strategy]
        wave = self.wave or (workers if accept == "chain" else None)
        return self.model_copy(update={"accept": accept, "lr": lr, "wave": wave})

    def image_counts(self, available: int) -> dict[CaseSet, int]:
        """How many of the evolution images score a generation, search for its step, and confirm; disjoint.

        What is not given shares equally what the others leave. Raises ValueError when they do not fit."""
        if is_named(self.strategy):  # it says itself which sets it needs
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
                f"evolution.fitness_images ({shares['fitness']}) to the first round: 2 are the least"
            )
        return shares


class Config(Section):
    """A run. A preset or a file is the base, flags override it."""

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
                "parent.average (soup) chooses by images that SGD does not see, and data.sgd_on_evolution shows it all"
            )
        if evolution.strategy != "none":
            if data.evolution_images:
                evolution.image_counts(data.evolution_images)
            if data.sgd_on_evolution and (evolution.confirm or evolution.step == "search"):
                needs = "evolution.confirm" if evolution.confirm else "evolution.step search"
                raise ValueError(f"{needs} needs images that SGD does not see, and data.sgd_on_evolution shows it all")
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
