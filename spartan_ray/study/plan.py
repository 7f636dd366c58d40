"""The plan of a study, read from its file: the runs of every cell of a grid, and the comparisons to report."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PositiveInt, model_validator

from spartan_ray.errors import InputError
from spartan_ray.run.config import Config
from spartan_ray.run.loading import load_config, override
from spartan_ray.section import Section, perhaps

# Fields that change no number of a run.
NO_RESULT: dict[str, Any] = {
    "run": {"name", "out", "seed", "resume", "loggers", "keep", "keep_parents", "keep_best"},
    "data": {"root", "download"},
    "cluster": set(type(Config().cluster).model_fields) - {"cpus_per_worker"},
}
# Fields of the `run` section that the study sets for each run.
OF_STUDY = {"seed", "name", "out", "resume"}
Measure = Literal[
    "test_accuracy",
    "late_test_accuracy",
    "test_loss",
    "validation_accuracy",
    "train_loss",
    "overfitting",
    "phase_train_loss",
    "phase_validation_accuracy",
    "turn_of_validation_accuracy",
]


# A way is a method at its last epoch, or with one of these suffixes the average of its weights, or stopped early.
AVERAGE, STOPPED = ", average", ", stopped early"


class Claim(Section):
    """A claim about a way, which the seeds confirm or contradict."""

    prefix = "claims"

    says: str
    by: str = ""
    """Who makes the claim."""
    group: str
    way: str
    """A method, or one of its other ways: `METHOD, average`, or for the first baseline `METHOD, stopped early`."""
    over: list[str] = Field(default_factory=list)
    """Ways to compare with, seed by seed; the claim must hold against each (default: compare the measure with 0)."""
    measure: Measure = "test_accuracy"
    expects: Literal["higher", "lower", "not higher"] = "higher"
    """What the claim says about the measure, or about its difference to each way of `over`."""


class Picture(Section):
    """A plot of a measure over the epochs: means over the seeds, with their intervals."""

    prefix = "pictures"

    name: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
    group: str
    methods: list[str]
    measure: Literal["test_accuracy", "validation_accuracy", "train_loss", "test_loss"]


class Study(Section):
    """A grid of configurations, each run with several seeds, and the comparisons to report."""

    prefix = "study"

    about: str = ""
    base: dict[str, Any] = Field(default_factory=dict)
    """Sections of every run. `config` names the preset or file that they override."""
    grid: Annotated[list[dict[str, dict[str, dict[str, Any]]]], Field(min_length=1)]
    """List of grids. A grid has axes by name, each with its settings by name; every combination is a cell. The last
    axis is the method, the others make up the group. Methods are compared within a group."""
    seeds: PositiveInt | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = 5
    """Seeds of each cell: a list, or their number, from 0."""
    at_once: PositiveInt = 1
    """Number of runs at the same time."""
    baselines: list[str] = Field(default_factory=list)
    """Ways that all others are compared with, seed by seed."""
    claims: list[Claim] = Field(default_factory=list)
    pictures: list[Picture] = Field(default_factory=list)

    @model_validator(mode="after")
    def _names(self) -> Study:
        if isinstance(self.seeds, list) and len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"study.seeds: {self.seeds} has a duplicate")
        every = [self.base, *(settings for axes in self.grid for axis in axes.values() for settings in axis.values())]
        for sections in every:
            run = sections.get("run")
            if isinstance(run, dict) and (names := OF_STUDY & run.keys()):
                raise ValueError(f"study: run.{min(names)}: a study gives each run its own")
        for axes in self.grid:
            if not axes or not all(axes.values()):
                raise ValueError("study.grid: an axis without settings")
            for name in itertools.chain(*axes.values()):
                if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                    raise ValueError(f"study.grid: {name!r}: letters, digits, '_' and '-' only")
        return self


@dataclass(frozen=True)
class Planned:
    """A planned run of a study."""

    group: str
    method: str
    seed: int
    config: Config

    @property
    def key(self) -> str:
        return key_of(self.config)

    @property
    def name(self) -> str:
        return f"{self.group}.{self.method}-{self.seed}-{self.key}"


def key_of(config: Config) -> str:
    """Return a key of all that a run's numbers depend on, except the seed, the machine and the versions."""
    values = config.model_dump(exclude=NO_RESULT, exclude_defaults=True)
    if weights := values.get("parent", {}).get("weights"):  # the folder too: all runs name the file alike
        values["parent"]["weights"] = "/".join(Path(weights).absolute().parts[-2:])
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def load_study(path: Path) -> Study:
    """Read a study from a YAML file. Raises InputError, which begins with the name of the file."""
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not YAML: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected fields, got {type(values).__name__}")
    try:
        return Study(**{str(name): value for name, value in values.items()})
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def planned_runs(study: Study, given: dict[str, dict[str, Any]]) -> list[Planned]:
    """Return the runs of a study, all cells of the first seed first. The fields in `given` override those of every
    cell.

    Raises InputError, which begins with the name of the cell."""
    cells: dict[tuple[str, str], Config] = {}
    base = {name: sections for name, sections in study.base.items() if name != "config"}
    for axes in study.grid:
        for settings in itertools.product(*(axis.items() for axis in axes.values())):
            names = [str(name) for name, _ in settings]
            cell = ".".join(names[:-1]) or "all", names[-1]
            if cell in cells:
                raise InputError(f"{'.'.join(names)}: appears twice in the grid")
            try:
                config = load_config(str(study.base["config"])) if "config" in study.base else Config()
                cells[cell] = override(config, _merged(base, *(sections for _, sections in settings), given))
            except InputError as error:
                raise InputError(f"{'.'.join(names)}: {error}") from None
    # One Ray does all runs.
    if len(addresses := {config.cluster.address for config in cells.values()}) > 1:
        raise InputError(f"cluster.address: differs between the cells: {', '.join(map(str, addresses))}")
    _refuse_names(study, cells)
    seeds = range(study.seeds) if isinstance(study.seeds, int) else study.seeds
    return [
        Planned(group, method, seed, override(config, {"run": {"seed": seed, "resume": "auto"}}))
        for seed in seeds
        for (group, method), config in cells.items()
    ]


def _refuse_names(study: Study, cells: dict[tuple[str, str], Config]) -> None:
    """Raises InputError if a way to compare, or a method to draw, does not exist."""
    methods: dict[str, list[str]] = {}
    ways: dict[str, list[str]] = {}
    for (group, method), config in cells.items():
        methods.setdefault(group, []).append(method)
        averaged = config.parent.average != "none"
        stopped = [method] == study.baselines[:1]
        ends = [""] + [AVERAGE] * averaged + [STOPPED] * stopped
        ways.setdefault(group, []).extend(f"{method}{end}" for end in ends)
    asked = [("baselines", group, way, ways) for way in study.baselines for group in ways]
    asked += [("claims", claim.group, way, ways) for claim in study.claims for way in (claim.way, *claim.over)]
    asked += [("pictures", picture.group, name, methods) for picture in study.pictures for name in picture.methods]
    for where, group, way, there in asked:
        if group not in there:
            raise InputError(f"{where}: {group}: no such group{perhaps(group, there)}")
        if way not in there[group]:
            what = "method" if there is methods else "way"
            raise InputError(f"{where}: {way}: no such {what} in {group}{perhaps(way, there[group])}")


def _merged(*all_sections: dict[str, Any]) -> dict[str, Any]:
    """Merge sections of fields; later ones override earlier ones."""
    merged: dict[str, Any] = {}
    for sections in all_sections:
        for name, fields in sections.items():
            if not isinstance(fields, dict):
                raise InputError(f"{name}: expected fields and their values, got {reprlib.repr(fields)}")
            merged[str(name)] = merged.get(str(name), {}) | fields
    return merged
