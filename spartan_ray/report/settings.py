"""The settings of runs as a report shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spartan_ray.report.reading import RunRecord
from spartan_ray.run.config import Config

# Fields that say where a run is and what it is called, not what it does.
PLACES = {"run.name", "run.out", "run.resume", "data.root"}


def settings(config: Config) -> dict[str, Any]:
    """Return all fields of a configuration by name, with the defaults that depend on other fields filled in."""
    sections = {name: getattr(config, name) for name in Config.model_fields}
    sections["evolution"] = sections["evolution"].resolved()
    found = {f"{section}.{name}": value for section, values in sections.items() for name, value in values}
    return {name: value for name, value in found.items() if name not in PLACES}


def changed(run: RunRecord) -> dict[str, str]:
    """Return the fields of a run that do not have their default."""
    default = settings(Config())
    return {name: _text(value) for name, value in settings(run.config).items() if value != default[name]}


def differing(runs: Mapping[str, RunRecord]) -> dict[str, list[str]]:
    """Return the fields whose values differ between runs, each with its values in the runs' order."""
    each = [settings(run.config) for run in runs.values()]
    return {
        name: [_text(one[name]) for one in each] for name in each[0] if any(one[name] != each[0][name] for one in each)
    }


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)
