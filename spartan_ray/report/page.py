"""The report: pictures, report.md and report.html."""

from __future__ import annotations

import base64
from importlib import resources
from pathlib import Path

from spartan_ray.errors import InputError
from spartan_ray.report.reading import RunRecord, unique_frames
from spartan_ray.report.tables import evolve_table, final_table, markdown
from spartan_ray.section import Section

PICTURES = {
    "train_loss": "train loss",
    "validation_accuracy": "validation accuracy",
    "test_accuracy": "test accuracy",
}


SEARCH_CAPTION = "gain in fitness along the update"
PARENTS_CAPTION = "fitness of the parents: the best, their mean, and from the worst to the best"


def write_report(runs: list[RunRecord], folder: Path) -> list[Path]:
    """Write the pictures, report.md and report.html (self-contained); returns their paths."""
    import jinja2

    from spartan_ray.report.plots import draw_measure, draw_parents, draw_search

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"-o {folder}: not a folder to write to: {error.strerror}") from None
    frames = unique_frames(runs)
    pictures = {measure: folder / f"{measure}.png" for measure in PICTURES}
    for measure, path in pictures.items():
        draw_measure(frames, measure, PICTURES[measure], path)
    more: dict[str, Path] = {}  # by their captions
    for column, caption, draw, name in (
        ("search_ratios", SEARCH_CAPTION, draw_search, "step_search.png"),
        ("parents", PARENTS_CAPTION, draw_parents, "parents.png"),
    ):
        if any(column in frame and frame[column].notna().any() for frame in frames.values()):
            more[caption] = folder / name
            draw(frames, caption, more[caption])
    final, phases = final_table(frames), evolve_table(frames)

    text = f"# {', '.join(frames)}\n\n{markdown(final)}\n"
    text += "\n".join(f"![{PICTURES[measure]}]({path.name})" for measure, path in pictures.items())
    if len(phases):
        text += f"\n\n## Evolve phases\n\n{markdown(phases)}"
    text += "".join(f"\n![{caption}]({path.name})" for caption, path in more.items())
    report = folder / "report.md"
    report.write_text(text + "\n")

    template = (resources.files("spartan_ray.report") / "page.html.j2").read_text()
    page = folder / "report.html"
    page.write_text(
        jinja2.Template(template, autoescape=True).render(
            names=list(frames),
            setups=[(name, _setup(run)) for name, run in zip(frames, runs, strict=True)],
            pictures=[(PICTURES[measure], _inline(path)) for measure, path in pictures.items()],
            final=final.to_html(index=False, border=0),
            phases=phases.to_html(index=False, border=0) if len(phases) else "",
            more=[(caption, _inline(path)) for caption, path in more.items()],
        )
    )
    return [*pictures.values(), *more.values(), report, page]


def _inline(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _setup(run: RunRecord) -> str:
    """The run in a line."""
    data, parent, evolution = run.config.data, run.config.parent, run.config.evolution.resolved()
    text = f"{data.name}{_changed(data, exclude={'name', 'root', 'download'})}; seed {run.config.run.seed}; "
    esgd = evolution.strategy == "esgd"
    text += f"{parent.model}" + ("" if esgd else f", {parent.optimizer} at lr {parent.lr:g}")
    text += _changed(parent, exclude={"model", "optimizer", "lr", "threads"})
    if evolution.strategy != "none":
        text += f"; {evolution.strategy} every {evolution.every} epochs: {evolution.population} members"
        text += f" of {evolution.parents} parents" * esgd
        text += f" by {evolution.fitness}" + f", accept {evolution.accept}" * bool(evolution.accept)
        text += f", lr {evolution.lr:g}" if evolution.lr and evolution.step == "lr" else ""
        text += _changed(
            evolution, exclude={"strategy", "every", "population", "fitness", "accept", "lr", "wave", "parents"}
        )
    return f"{text}; {run.environment.processor}, torch {run.environment.versions.get('torch')}"


def _changed(section: Section, exclude: set[str]) -> str:
    """The fields of a section that do not have their default, but for some."""
    default = type(section)().model_dump(exclude=exclude)
    values = section.model_dump(exclude=exclude)
    return "".join(f", {name} {value}" for name, value in values.items() if value != default[name])
