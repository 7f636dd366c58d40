"""Writes the pages that follow from the code and the results: `python docs/generate.py`. A test compares them."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

import pandas as pd

from spartan_ray.cli.flags import metavar, off
from spartan_ray.report.tables import markdown
from spartan_ray.run.config import Config
from spartan_ray.run.loading import PRESETS, preset_names
from spartan_ray.section import Section
from spartan_ray.study.plan import load_study, planned_runs
from spartan_ray.study.rows import Rows
from spartan_ray.study.scale import ScaleRows
from spartan_ray.study.scale_tables import changes, latest
from spartan_ray.study.statistics import differences, ends, interval
from spartan_ray.study.tables import group_table

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "spartan_ray"

CONFIGURATION = """# Configuration

A run is configured by five sections. Each field is a flag of `spartan train`, `--section.field VALUE`. `--config` names
a base (a preset, a YAML file, or a run folder) and flags override it:

```console
$ spartan train --config article-es --evolution.population 1000 --run.seed 1
```

The same in a file, for `spartan train --config my.yaml`:

```yaml
run: {seed: 1}
evolution: {strategy: es, population: 1000}
```

From Python: `sr.train("article-es", evolution={"population": 1000}, run={"seed": 1})`. An unknown name or a value out
of bounds is refused in one line that names the field.

This page is generated from the code.
"""


def configuration() -> str:
    """The page of all fields, from the models."""
    lines, config = [CONFIGURATION], Config()
    for section in Config.model_fields:
        values: Section = getattr(config, section)
        lines += [f"## {section}\n", f"{(type(values).__doc__ or '').strip()}\n"]
        lines += ["| flag | values | default | meaning |", "| --- | --- | --- | --- |"]
        for name, info in type(values).model_fields.items():
            text, value = " ".join((info.description or "").split()), getattr(values, name)
            said = re.search(r" ?\(default: ([^)]*)\)", text)
            default = said[1] if said else "none" if value is None else f"`{value}`"
            kind = (
                metavar(info)
                .replace("|", ", ")
                .replace("INT", "integer")
                .replace("FLOAT", "number")
                .replace("TEXT", "text")
            )
            flag = f"{section}.{name}".replace("_", "-")
            if isinstance(value, bool):
                kind, default = "flag", f"on; `--{off(flag)}`" if value else "off"
            meaning = text.replace(said[0], "") if said else text
            lines.append(f"| `--{flag}` | {kind} | {default} | {meaning.replace('|', ' or ').replace('<', '&lt;')} |")
        lines.append("")
    lines += ["## Presets\n"]
    for preset in preset_names():
        lines += [f"### {preset}\n", f"```yaml\n{(PRESETS / f'{preset}.yaml').read_text().strip()}\n```\n"]
    return "\n".join(lines).rstrip() + "\n"


# The rooms of the package, on the floors of the picture: a room uses those below it.
FLOORS = [["cli"], ["study", "report", "run"], ["distributed", "vision"], ["engine"], ["noise"]]
WIDTH, HEIGHT, BOX = 760, 500, (150, 56)


def job(path: Path) -> str:
    """The first sentence of a module's docstring."""
    text = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
    return re.split(r"(?<=[a-z)`\"])\. (?=[A-Z])", " ".join(text.split()))[0].rstrip(".")


def imports() -> dict[str, set[str]]:
    """The rooms that each room imports."""
    rooms = {room for floor in FLOORS for room in floor}
    found: dict[str, set[str]] = {room: set() for room in rooms}
    for room in rooms:
        for path in (PACKAGE / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                found[room] |= {name.split(".")[1] for name in names if name.startswith("spartan_ray.")} & rooms
    return {room: used - {room} for room, used in found.items()}


def arrows() -> list[tuple[str, str]]:
    """The imports between rooms, without those that follow from others."""
    found = imports()
    reached: dict[str, set[str]] = {}
    for room in (room for floor in reversed(FLOORS) for room in reversed(floor)):  # what a room uses comes before it
        reached[room] = found[room].union(*(reached[other] for other in found[room]))
    return [
        (room, other)
        for room, used in sorted(found.items())
        for other in sorted(used)
        if not any(other in reached[between] for between in used - {other})
    ]


def picture() -> str:
    """The imports between rooms as an SVG."""
    place = {}
    for row, floor in enumerate(FLOORS):
        for column, room in enumerate(floor):
            place[room] = (WIDTH * (column + 1) // (len(floor) + 1), 46 + row * (HEIGHT - 92) // (len(FLOORS) - 1))
    half_width, half_height = BOX[0] // 2, BOX[1] // 2
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        "<title>Imports between the packages of spartan_ray; arrows point to what is used</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#666"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#fff"/>',
    ]
    for room, other in arrows():
        (x, y), (to_x, to_y) = place[room], place[other]
        if y == to_y:
            path = f"M{x + half_width} {y}L{to_x - half_width} {y}"
        else:
            start, end = y + half_height, to_y - half_height
            path = f"M{x} {start}C{x} {(start + end) // 2} {to_x} {(start + end) // 2} {to_x} {end}"
        lines.append(f'<path d="{path}" fill="none" stroke="#666" stroke-width="1.2" marker-end="url(#head)"/>')
    for room, (x, y) in place.items():
        count = sum(path.name != "__init__.py" for path in (PACKAGE / room).rglob("*.py"))
        lines += [
            f'<rect x="{x - half_width}" y="{y - half_height}" width="{BOX[0]}" height="{BOX[1]}" rx="6" '
            'fill="#e8f1f8" stroke="#0072B2"/>',
            f'<text x="{x}" y="{y - 2}" text-anchor="middle" font-size="17" font-weight="600">{room}</text>',
            f'<text x="{x}" y="{y + 17}" text-anchor="middle" font-size="12" fill="#444">{count} modules</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def modules() -> str:
    """The map of the package: the rooms and the job of each module."""
    rooms = ["", "noise", "engine", "engine/strategies", "vision", "distributed", "run", "report", "study", "cli"]
    about = "A package imports only what is below it. Arrows that follow from others are left out."
    lines = ["# Module map", "", about, "", "![imports between packages](modules.svg)", ""]
    for room in rooms:
        lines += [f"## spartan_ray/{room}".rstrip("/"), ""]
        about = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
        lines += [about, ""] if room else []
        lines += ["| module | job |", "| --- | --- |"]
        paths = sorted(path for path in (PACKAGE / room).glob("*.py") if path.name != "__init__.py" or not room)
        lines += [f"| `{path.name}` | {job(path)} |" for path in paths] + [""]
    return "\n".join(lines).rstrip() + "\n"


# The ways that README shows, and their names there.
SHOWN = {
    "sgd": "SGD",
    "sgd, average": "SGD, average of its last 5 epochs",
    "sgd-cosine": "SGD, rate falling to 0",
    "sgd-all": "SGD on both splits",
    "sgd-all, average": "SGD on both splits, average",
    "gradient-noise": "SGD with gradient noise",
    "esgd": "evolutionary SGD, 4 parents",
    "pure-noise": "pure noise instead of evolution",
    "es-loss": "the article's evolution strategies, 50 descendants",
    "gradients-chain-loss": "the article's random gradients, 50 descendants",
    "es-own-50": "one update of 50",
    "es-own-2000": "one update of 2,000",
    "es-own-8x50": "8 updates of 50",
    "es-own-8x500": "8 updates of 500",
    "es-own-8x500, average": "8 updates of 500, average",
}
# The columns of the study's table that README shows, and their names there.
COLUMNS = {
    "test accuracy, %": "test accuracy, %",
    "over sgd": "over SGD",
    "late, over sgd": "late, over SGD",
    "over sgd-all, average": "over the average of SGD on both splits",
    "trained": "million images trained",
    "scored": "million images scored",
}


# What README says below the table. Braces hold what it claims, and become the figure: one way is ahead of another (>),
# behind it (<) or neither, measurably (~), in test accuracy, in late accuracy, or from the parents of results/scale by
# the number of descendants. It is an error if the rows do not bear a claim out.
ANSWER = """**Does a larger population help, and when?** For an epoch, yes: right after a phase of eight updates by
accuracy, each on images of its own, 500 descendants are ahead of 50 by {es-own-8x500 > es-own-8x50} points and of SGD
by {es-own-8x500 > sgd}. Lasting, not measurably: while SGD goes on, 500 differ from 50 by
{late es-own-8x500 ~ es-own-8x50} and from SGD by {late es-own-8x500 ~ sgd}; averaged, from SGD's average, which is
free, by {es-own-8x500, average ~ sgd, average}; with a rate that falls to 0, from SGD with that rate by
{es-own-8x500-cosine ~ sgd-cosine}; and SGD on the same images stays ahead
({es-own-8x500, average < sgd-all, average}, both averaged).

In a single update 2,000 are not measurably ahead of 50 ({es-own-2000 ~ es-own-50}). From the picture's parents
5,000 are ahead of 50 by {scale all-common-512 5000 > 50} on the same 512 images, not measurably on 128 own ones
per pair ({scale all-own-128 5000 ~ 50}), and 20,000 not measurably of 5,000
({scale all-common-512 20000 ~ 5000}, {scale all-own-128 20000 ~ 5000})."""


def answer(ended: pd.DataFrame, scaled: pd.DataFrame, text: str = ANSWER) -> str:
    """The text with its figures filled in. Raises ValueError if the rows do not bear out a claim of the text."""

    def gain(way: str, population: str) -> pd.Series[float]:
        """The change of each parent."""
        mine = (scaled["fitness"] == "accuracy") & (scaled["way"] == way) & (scaled["population"] == int(population))
        return scaled[mine].set_index("weights")["test accuracy"]

    def figure(found: re.Match[str]) -> str:
        of, way, claim, other = found.groups()
        if of == "scale ":
            way, population = way.split()
            values = (gain(way, population) - gain(way, other)).dropna()
        else:
            values = differences(ended, "scratch", way, other, "late_test_accuracy" if of else "test_accuracy")
        difference = interval(values)
        shown = difference.text(2, 100.0, sign=True)
        if claim != ("~" if not difference.excludes_zero else ">" if difference.mean > 0 else "<"):
            raise ValueError(f"README claims {found[0]}, but the rows say {shown}")
        return shown

    return re.sub(r"\{(late |scale )?([^{}<>~]*) ([<>~]) ([^{}]*)\}", figure, text)


def readme() -> str:
    """README.md with its table of the study and the answer, made from the study's rows."""
    study = load_study(DOCS.parent / "results" / "article-small.yaml")
    runs = planned_runs(study, {})
    rows = Rows(DOCS.parent / "results" / "article-small" / "rows.csv").of(runs)
    seeds, ended = len({run.seed for run in runs}), ends(rows, study.baselines[0])
    table = group_table(ended, "scratch", study.baselines, seeds).set_index("way")
    there = [way for way in SHOWN if way in table.index]  # not all have a run yet
    found = table.loc[there, list(COLUMNS)].rename(columns=COLUMNS)
    found.insert(0, "", [SHOWN[way] for way in there])
    done = rows.groupby(["group", "method", "seed"]).ngroups
    so_far = "" if done == len(runs) else f" So far: {done} of the {len(runs)} runs."
    before, rest = (DOCS.parent / "README.md").read_text().split("<!-- study -->\n")
    scale = ScaleRows(DOCS.parent / "results" / "scale" / "rows.jsonl")
    scale.read()
    scaled = changes(latest(pd.DataFrame(scale.rows)))
    said = [textwrap.fill(paragraph, 150) for paragraph in (answer(ended, scaled) + so_far).split("\n\n")]
    shown = "\n".join([markdown(found), "\n\n".join(said), ""])
    return f"{before}<!-- study -->\n{shown}<!-- end -->{rest.split('<!-- end -->')[1]}"


PAGES = {"configuration.md": configuration, "modules.md": modules, "modules.svg": picture, "../README.md": readme}

if __name__ == "__main__":
    for name, text in PAGES.items():
        (DOCS / name).write_text(text())
