"""The typed configuration of a run. Frozen; an unknown name or a value out of bounds is an InputError
that names the field as the flags do, `section.field`."""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from collections.abc import Iterable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

NoiseKind = Literal["uniform", "gaussian", "rademacher"]
FitnessKind = Literal["loss", "accuracy"]
BatchNormKind = Literal["running", "batch", "recalibrate"]
Temperature = Literal["none", "error", "loss"]
# fitness: the images that score the generation; the others choose nothing before they are asked.
ImageSet = Literal["fitness", "search", "confirm"]
Moments = Literal["keep", "reset", "rescale"]


def one_line(text: str) -> str:
    """A text in one line that can be printed, whatever it quotes."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


class OneLineError(Exception):
    """A message of one line, whatever of the user's input it quotes."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class InputError(OneLineError):
    """What the user gave cannot be used. The message names the field or the path."""


class RunError(OneLineError):
    """A run cannot go on, and why. What it had is in its last checkpoint."""


class Diverged(RunError):
    """What a run computes is not finite any more; to go on would do the same again."""


PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Decay = Annotated[float, Field(gt=0, le=1)]


def no_url(name: str, path: str) -> str:
    """The path that was given as `name`. Raises InputError for a URL: as a path it is a folder `s3:`."""
    if re.match(r"[a-z][a-z0-9+.-]*://", path, re.IGNORECASE):
        raise InputError(f"{name} ({path}) is a URL: give the path where it is mounted")
    return path


def _perhaps(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f" (perhaps {near[0]}?)" if near else ""


def _one_line(section: type[Section], error: ValidationError) -> str:
    problem = error.errors()[0]
    name = "".join(str(part) for part in problem["loc"][:1])[:80]
    path = f"{section.prefix}.{name}".strip(".")
    if problem["type"] == "extra_forbidden":
        return f"{path}: unknown field{_perhaps(name, section.model_fields)}"
    if problem["type"] == "value_error":
        return problem["msg"].removeprefix("Value error, ")
    # Shortened: a few lines of YAML can stand for gigabytes.
    if problem["type"] == "string_pattern_mismatch":
        return f"{path}: letters, digits, '.', '_' and '-' only (got {reprlib.repr(problem['input'])})"
    return f"{path}: {problem['msg'].removeprefix('Input ')} (got {reprlib.repr(problem['input'])})"


class Section(BaseModel):
    """One section of the configuration; `prefix` is its name in messages."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    prefix: ClassVar[str]

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(_one_line(type(self), error)) from None


class Run(Section):
    """Where the run is written, and how long it is."""

    prefix = "run"

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    """Name of the run folder; a number is added when it is taken."""
    out: Annotated[str, AfterValidator(partial(no_url, "run.out"))] = "runs"
    """Folder that holds the run folders."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of splits, initial weights, data order and noise."""
    epochs: PositiveInt = 50
    """Epochs, evolve phases included: one phase counts as an epoch."""
    keep: PositiveInt = 3
    """Checkpoints kept, one an epoch; those that replay needs come on top."""
    keep_parents: bool = True
    """Keep the parent before each evolve phase too (ResNet18: 45 MB each): `spartan replay` needs it."""


class Data(Section):
    """The images and how they are split."""

    prefix = "data"

    name: Literal["cifar10", "fashion-mnist", "digits", "folder"] = "cifar10"
    """Data set; `folder` reads train/<class>/* and test/<class>/* under data.root."""
    root: Annotated[str, AfterValidator(partial(no_url, "data.root"))] | None = None
    """Where the data set lies or is downloaded to (default: data/NAME; `digits` needs none)."""
    download: bool = True
    """Download a torchvision data set that is not under data.root."""
    sgd_images: PositiveInt | None = None
    """Training images that the gradient sees (default: 80 % of the training part)."""
    evolution_images: PositiveInt | None = None
    """Training images that score descendants (default: 10 %)."""
    validation_images: PositiveInt | None = None
    """Training images that only watch (default: 10 %)."""
    sgd_on_evolution: bool = False
    """Let SGD train on the evolution split too: the baseline that sees as many images as SGD + evolution."""
    augment: bool = False
    """Random flips and 4-pixel shifts of the SGD images (do not use flips for digits)."""


class Parent(Section):
    """The parent network and its gradient training."""

    prefix = "parent"

    model: Literal["resnet18", "convnet"] = "resnet18"
    """resnet18, or convnet: 24 thousand parameters, to try the machinery in seconds."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """First layers of resnet18: imagenet (7x7 stride 2, pooling) or cifar (3x3, 16 times the work)."""
    weights: Annotated[str, AfterValidator(partial(no_url, "parent.weights"))] = "none"
    """none, imagenet (torchvision's), or a FILE: a state dict as .pt, .pth or .safetensors."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """Optimizer of the SGD epochs."""
    lr: PositiveFloat = 0.01
    """Learning rate, constant as in the article."""
    momentum: Fraction = 0.9
    """Momentum of sgd; adam and adamw take it as beta1."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay: L2 for sgd and adam, decoupled for adamw."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """Images a gradient step."""
    gradient_noise: PositiveFloat | None = None
    """Gaussian noise on gradients: eta of its variance eta / (1 + step)^0.55, 0.01 to 1 in the paper (default: off)."""
    moments_after_evolution: Moments = "keep"
    """Optimizer's moments after a phase that moved the parent; rescale fits them to the new gradient's norm."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the SGD epochs; bf16 is autocast."""
    threads: PositiveInt | None = None
    """CPU threads of the driver (default: cluster.driver_cpus, else all cores). The bits depend on it."""


# A field that only one setting of another field uses: refused elsewhere, unless it has its default.
ONLY_WITH: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("sigma", "sigma_scale", "sigma_decay", "shaping", "mirrored", "noise"), ("strategy", "es")),
    **dict.fromkeys(("step", "optimizer", "weight_decay"), ("strategy", "es")),
    "step_ratio": ("step", "ratio"),
    "lr_decay": ("step", "lr"),
    **dict.fromkeys(("low", "high", "temperature", "gradient_images"), ("strategy", "random-gradients")),
    **dict.fromkeys(("gradient_split", "early_rejection"), ("strategy", "random-gradients")),
    "wave": ("accept", "chain"),
    "racing": ("accept", "best"),
}
ACCEPT = {"es": ("always", "if-better"), "random-gradients": ("best", "chain")}
LR = {"es": 0.0005, "random-gradients": 0.01}


class Evolution(Section):
    """The evolve phases."""

    prefix = "evolution"

    strategy: Literal["es", "random-gradients", "none"] = "es"
    """es: the article's evolution strategies; random-gradients: its other method; none: every epoch is SGD."""
    every: PositiveInt = 5
    """Each so-many-th epoch is an evolve phase."""
    population: Annotated[int, Field(ge=2)] = 50
    """Descendants a generation, K."""
    fitness: FitnessKind = "loss"
    """Fitness of a descendant: minus its mean cross-entropy, or its accuracy."""
    fitness_images: Annotated[int, Field(ge=2)] | None = None
    """Evolution images of a generation's scores, drawn anew (default: all, or a share beside confirm and search)."""
    accept: Literal["always", "if-better", "best", "chain"] | None = None
    """es: always (default) or if-better; random-gradients: best (default), or chain, each better one at once."""
    confirm: bool = False
    """Take what was chosen only if it is also better on evolution images that did not choose it."""
    confirm_images: Annotated[int, Field(ge=2)] | None = None
    """Images of `confirm`, and as many others of `step` search (default: equal shares of what is left)."""
    batchnorm: BatchNormKind = "running"
    """Statistics of a descendant: the parent's, the scored batch's, or its own on 512 fixed SGD images."""
    mutate: Annotated[str, Field(min_length=1)] = "all"
    """What evolution moves: all, no-batchnorm (not its affine parameters), or a pattern of names: layer4.*"""
    noise: NoiseKind = "uniform"
    """es: distribution of the noise."""
    sigma: PositiveFloat = 0.01
    """es: scale of the noise, perturbation = sigma * noise."""
    sigma_scale: Literal["absolute", "relative"] = "absolute"
    """es: relative multiplies sigma by the RMS of each tensor, so that a tensor of zeros stays."""
    sigma_decay: Decay = 1.0
    """es: factor of sigma after each evolve phase."""
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
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the scoring; bf16 is faster where the processor or GPU has units for it. Noise is fp32."""
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
        if self.strategy == "none":
            return self
        chosen = self.resolved()
        for name, (switch, wanted) in ONLY_WITH.items():
            if switch == "accept" and wanted not in ACCEPT[self.strategy]:
                switch, wanted = "strategy", "random-gradients"
            value, setting = getattr(self, name), getattr(chosen, switch)
            if value != type(self).model_fields[name].default and setting != wanted:
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
        if self.fitness_images:
            self.image_counts(2**53)
        if self.low >= self.high:
            raise ValueError(f"evolution.low ({self.low:g}) must be below evolution.high ({self.high:g})")
        return self

    def resolved(self, workers: int = 1) -> Evolution:
        """With the defaults that depend on the strategy and on the workers that there are."""
        if self.strategy == "none":
            return self
        accept, lr = self.accept or ACCEPT[self.strategy][0], self.lr or LR[self.strategy]
        wave = self.wave or (workers if accept == "chain" else None)
        return self.model_copy(update={"accept": accept, "lr": lr, "wave": wave})

    def image_counts(self, available: int) -> dict[ImageSet, int]:
        """How many of the evolution images score a generation, search for its step, and confirm; disjoint.

        What is not given shares equally what the others leave. Raises ValueError when they do not fit."""
        counts: dict[ImageSet, int | None] = {"fitness": self.fitness_images}
        if self.step == "search":
            counts["search"] = self.confirm_images
        if self.confirm:
            counts["confirm"] = self.confirm_images
        given = sum(count or 0 for count in counts.values())
        missing = sum(count is None for count in counts.values())
        share = (available - given) // max(missing, 1)
        if given > available or (missing and share < 2):
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


class Cluster(Section):
    """What Ray gives to the driver and the workers."""

    prefix = "cluster"

    address: str | None = None
    """Ray cluster to join (default: RAY_ADDRESS, which a Ray job sets, else a new local Ray)."""
    workers: PositiveInt | Literal["auto"] = "auto"
    """Workers; auto: one a GPU, or one a core where there is no GPU, more and fewer as nodes come and go."""
    gpus_per_worker: NonNegativeFloat | None = None
    """GPUs of a worker, fractions allowed (default: 0.9 where there are GPUs, which leaves room for the driver)."""
    cpus_per_worker: PositiveInt = 1
    """CPU cores, and threads, of a worker. The bits of the scores depend on it."""
    driver_gpus: NonNegativeFloat | None = None
    """GPUs of the driver (default: 0.1 where there are GPUs)."""
    driver_cpus: Annotated[int, Field(ge=0)] = 0
    """CPU cores kept for the driver; 0 shares the workers' cores, since the phases alternate."""
    chunk: PositiveInt | Literal["auto"] = "auto"
    """Members sent to a worker at once; auto: about two seconds of work."""
    worker_timeout: PositiveFloat = 600.0
    """Seconds to wait for a worker when there is none, or none gets anything done, before the run stops."""
    task_timeout: PositiveFloat = 600.0
    """Seconds, and ten times the usual, that a worker with work may be silent before it is replaced."""
    on_member_error: Literal["worst", "stop"] = "worst"
    """A member that fails on three workers: it is scored worst, or the run stops."""
    driver_restarts: NonNegativeInt = 3
    """Times that a driver that was lost is started again from the last checkpoint."""

    @model_validator(mode="after")
    def _whole_gpus(self) -> Cluster:
        for name in ("gpus_per_worker", "driver_gpus"):
            gpus = getattr(self, name)
            if gpus and gpus > 1 and gpus != int(gpus):
                raise ValueError(f"cluster.{name} ({gpus:g}) must be a whole number above 1")
        return self


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


def preset_names() -> list[str]:
    """The presets that come with the package."""
    folder = resources.files("spartan_ray") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(name_or_file: str) -> Config:
    """The configuration of a preset, of a YAML file, or of a run folder."""
    if name_or_file in preset_names():
        text = (resources.files("spartan_ray") / "presets" / f"{name_or_file}.yaml").read_text()
    elif Path(name_or_file).is_dir():
        return load_run_config(Path(name_or_file))
    else:
        try:
            text = Path(name_or_file).read_text()
        except (OSError, UnicodeDecodeError, ValueError) as error:
            presets = ", ".join(preset_names())
            raise InputError(f"--config {name_or_file}: no such preset ({presets}) or readable file: {error}") from None
    return _parse(text, name_or_file)


def load_run_config(folder: Path) -> Config:
    """The configuration of a run folder, but for `cluster.address`: a folder that came from elsewhere must not
    say which Ray is given the token and trusted with what it answers."""
    try:
        text = (folder / "config.yaml").read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{folder}: not a run folder: {error}") from None
    config = _parse(text, str(folder / "config.yaml"))
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"address": None})})


def _parse(text: str, source: str) -> Config:
    """The configuration of YAML. Raises InputError that begins with the name of its source."""
    try:
        sections = yaml.safe_load(text) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as a date that there is not
        raise InputError(f"{source}: not YAML: {error}") from None
    try:
        return _configuration(sections)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def _configuration(sections: Any) -> Config:
    if not isinstance(sections, dict):
        raise InputError(f"expected sections, got {type(sections).__name__}")
    values: dict[str, Any] = {}
    defaults = Config()
    for section, fields in sections.items():
        if section not in Config.model_fields:
            name = str(section)[:80]
            near = _perhaps(name, Config.model_fields) or f" (one of {', '.join(Config.model_fields)})"
            raise InputError(f"{name}: unknown section{near}")
        if not isinstance(fields, dict) or not all(isinstance(field, str) for field in fields):
            raise InputError(f"{section}: expected field: value lines, got {reprlib.repr(fields)}")
        values[section] = type(getattr(defaults, section))(**fields)
    return Config(**values)


def dump_config(config: Config) -> str:
    """YAML that `load_config` reads back to the same configuration."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def refuse_links(folder: Path) -> None:
    """Raises InputError for what does not belong in a run folder: a link that leads out of it, as what is
    written there would be elsewhere, and pipes and devices, which may never end."""
    for entry in folder.rglob("*"):
        target = Path(os.path.realpath(entry))
        if entry.is_symlink() and not target.is_relative_to(os.path.realpath(folder)):
            raise InputError(f"{entry}: a link out of the run folder")
        if not target.is_file() and not target.is_dir():
            raise InputError(f"{entry}: neither a file nor a folder")


def differences(before: Config, now: Config) -> list[str]:
    """The fields that change what a run computes and differ: all but `cluster` and `run.keep`."""
    found = []
    for section in ("run", "data", "parent", "evolution"):
        values, others = (getattr(config, section).model_dump(exclude={"keep"}) for config in (before, now))
        found += [
            f"{section}.{name} was {value} and is {others[name]}"
            for name, value in values.items()
            if value != others[name]
        ]
    return found
