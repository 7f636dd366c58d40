"""The configuration: presets, files, flags, and one line for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from spartan_ray.cli import parse_config
from spartan_ray.config import Config, Evolution, InputError, dump_config, load_config, preset_names


@pytest.mark.parametrize("name", preset_names())
def test_presets_load_and_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(str(path)) == config
    assert load_config(str(tmp_path)) == config
    assert parse_config(["--config", name]) == config


def test_the_baselines_differ_from_article_es_in_what_they_say_alone() -> None:
    es, sgd, everything = (load_config(name) for name in ("article-es", "sgd", "sgd-all"))
    assert es.parent == sgd.parent == everything.parent
    assert es.run.epochs == sgd.run.epochs == everything.run.epochs == 50
    assert es.run.seed == sgd.run.seed == everything.run.seed
    assert (es.evolution.every, es.evolution.population) == (5, 50)
    assert sgd.data.sgd_on_evolution is False
    assert everything.data.sgd_on_evolution is True


def test_flags_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("evolution: {sigma: 2e-2, population: 8}\n")
    config = parse_config(["--config", str(path), "--evolution.population", "10", "--cluster.workers", "3"])
    assert (config.evolution.sigma, config.evolution.population, config.cluster.workers) == (0.02, 10, 3)
    assert config.evolution.every == Config().evolution.every
    assert parse_config([f"--config={path}", "--evolution.mirrored"]).evolution.mirrored


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--evolution.sigma", "-1"], "evolution.sigma: should be greater than 0 (got -1.0)"),
        (["--evolution.sigma", "nan"], "evolution.sigma: should be"),
        (["--evolution.population", "0"], "evolution.population: should be greater than or equal to 2 (got 0)"),
        (["--evolution.population", "1"], "evolution.population: should be greater than or equal to 2 (got 1)"),
        (["--evolution.every", "0"], "evolution.every: should be greater than 0 (got 0)"),
        (
            ["--evolution.mirrored", "--evolution.population", "33"],
            "evolution.population (33) must be even when mirrored",
        ),
        (
            ["--evolution.fitness-images", "20", "--data.evolution-images", "10"],
            "evolution.fitness_images (20) do not fit data.evolution_images (10)",
        ),
        (["--cluster.gpus-per-worker", "1.5"], "cluster.gpus_per_worker (1.5) must be a whole number above 1"),
        (["--data.name", "folder"], "data.root: the folder data set needs"),
        (["--run.name", "../up"], "run.name: String should match pattern"),
        (["--evolution.nonsense", "1"], "Unrecognized options: --evolution.nonsense"),
        (["--evolution.sigma", "much"], "Error parsing --evolution.sigma: could not convert"),
        (["--evolution.fitness", "beauty"], "invalid choice 'beauty'"),
        (["--config", "no-such-preset"], "--config no-such-preset: no such preset"),
        (["--config"], "--config: expected"),
        (["--run.epoch", "5"], "(perhaps --run.epochs?)"),
    ],
)
def test_a_bad_flag_is_one_line_that_names_it(arguments: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_config(arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("evolution: {sigmma: 1}", "evolution.sigmma: unknown field"),
        ("evolutions: {sigma: 1}", "evolutions: unknown section"),
        ("evolution: 5", "evolution: expected field: value lines"),
        ("evolution: {sigma: [1]}", "evolution.sigma: should be a valid number"),
        ("- 1", "expected sections, got list"),
        ("a: b: c", "not YAML"),
        ("run: {seed: -1}", "run.seed: should be greater than or equal to 0 (got -1)"),
    ],
)
def test_a_bad_file_is_one_line_that_names_the_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_config(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Evolution().sigma = 3
