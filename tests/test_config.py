"""Tests of the configuration: presets, files, flags, and a one-line message for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
from whole_runs import parse_config

from spartan_ray.cli.flags import with_absolute_paths
from spartan_ray.errors import InputError
from spartan_ray.run.config import Config, Evolution, Run
from spartan_ray.run.loading import dump_config, load_config, preset_names
from spartan_ray.section import is_url

RANDOM_GRADIENTS = ["--evolution.strategy", "random-gradients"]


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
        (["--evolution.sigma", "-1"], "evolution.sigma: should be greater than 0 (got '-1')"),
        (["--evolution.sigma", "nan"], "evolution.sigma: should be"),
        (["--evolution.population", "0"], "evolution.population: should be greater than or equal to 2 (got '0')"),
        (["--evolution.population", "1"], "evolution.population: should be greater than or equal to 2 (got '1')"),
        (["--evolution.every", "0"], "evolution.every: should be greater than 0 (got '0')"),
        (
            ["--evolution.mirrored", "--evolution.population", "33"],
            "evolution.population (33) must be even when mirrored",
        ),
        (
            ["--evolution.fitness-images", "20", "--data.evolution-images", "10"],
            "evolution.fitness_images (20) do not fit data.evolution_images (10)",
        ),
        (
            [
                "--evolution.fitness-images",
                "600",
                "--data.evolution-images",
                "1000",
                "--evolution.confirm",
                "--evolution.confirm-images",
                "500",
            ],
            "evolution.fitness_images (600) and evolution.confirm_images (500) to confirm do not fit "
            "data.evolution_images (1000)",
        ),
        (
            [*RANDOM_GRADIENTS, "--evolution.gradient-images", "20", "--data.sgd-images", "10"],
            "evolution.gradient_images (20) is larger than data.sgd_images (10)",
        ),
        (
            [
                *RANDOM_GRADIENTS,
                "--evolution.gradient-images",
                "20",
                "--evolution.gradient-split",
                "evolution",
                "--evolution.fitness-images",
                "10",
            ],
            "evolution.gradient_images (20) is larger than evolution.fitness_images (10)",
        ),
        (
            [*RANDOM_GRADIENTS, "--evolution.low", "1"],
            "evolution.low (1) must be below evolution.high (1)",
        ),
        (
            ["--evolution.confirm-images", "100"],
            "evolution.confirm_images (100) has no effect without evolution.confirm or evolution.step search",
        ),
        (
            ["--data.sgd-on-evolution", "--evolution.confirm"],
            "evolution.confirm needs images that SGD does not see, and data.sgd_on_evolution trains on them all",
        ),
        (
            [*RANDOM_GRADIENTS, "--evolution.gradient-images", "1"],
            "evolution.gradient_images: should be greater than or equal to 2 (got '1')",
        ),
        (["--evolution.accept", "chain"], "evolution.accept (chain) does not go with evolution.strategy es: always or"),
        (
            [*RANDOM_GRADIENTS, "--evolution.accept", "always"],
            "evolution.accept (always) does not go with evolution.strategy random-gradients: best or chain",
        ),
        (
            ["--evolution.racing", "2"],
            "evolution.racing (2) has no effect with evolution.strategy es: it needs random-",
        ),
        (
            [*RANDOM_GRADIENTS, "--evolution.accept", "chain", "--evolution.racing", "2"],
            "evolution.racing (2) has no effect with evolution.accept chain: it needs best",
        ),
        (
            ["--evolution.strategy", "random-gradients", "--evolution.racing", "3", "--evolution.fitness-images", "15"],
            "evolution.racing (3) leaves 1 of evolution.fitness_images (15) to the first round: at least 2 are needed",
        ),
        (["--evolution.wave", "4"], "evolution.wave (4) has no effect with evolution.strategy es: it needs random-"),
        (
            ["--evolution.step-ratio", "1"],
            "evolution.step_ratio (1.0) has no effect with evolution.step lr: it needs ratio",
        ),
        (
            ["--evolution.step", "search", "--evolution.lr-decay", "0.9"],
            "evolution.lr_decay (0.9) has no effect with evolution.step search: it needs lr",
        ),
        *[
            (
                [*RANDOM_GRADIENTS, f"--evolution.{flag}", *value],
                f"evolution.{flag.replace('-', '_')} ({shown}) has no effect with evolution.strategy random-gradients: "
                "it needs es",
            )
            for flag, value, shown in (
                ("sigma", ["0.1"], "0.1"),
                ("sigma-scale", ["relative"], "relative"),
                ("sigma-decay", ["0.5"], "0.5"),
                ("shaping", ["centered-rank"], "centered-rank"),
                ("mirrored", [], "True"),
                ("noise", ["gaussian"], "gaussian"),
                ("step", ["search"], "search"),
                ("optimizer", ["adam"], "adam"),
                ("weight-decay", ["0.1"], "0.1"),
            )
        ],
        *[
            (
                [f"--evolution.{flag}", *value],
                f"evolution.{flag.removeprefix('no-').replace('-', '_')} ({shown}) has no effect with "
                "evolution.strategy es: it needs random-gradients",
            )
            for flag, value, shown in (
                ("low", ["-1"], "-1.0"),
                ("high", ["2"], "2.0"),
                ("temperature", ["loss"], "loss"),
                ("gradient-images", ["64"], "64"),
                ("gradient-split", ["evolution"], "evolution"),
                ("no-early-rejection", [], "False"),
            )
        ],
        (["--evolution.sigma-decay", "1.1"], "evolution.sigma_decay: should be less than or equal to 1 (got '1.1')"),
        (["--evolution.lr-decay", "0"], "evolution.lr_decay: should be greater than 0 (got '0')"),
        (["--evolution.step-ratio", "0"], "evolution.step_ratio: should be greater than 0 (got '0')"),
        (["--evolution.weight-decay", "-1"], "evolution.weight_decay: should be greater than or equal to 0 (got '-1')"),
        (["--evolution.wave", "0"], "evolution.wave: should be greater than 0 (got '0')"),
        (
            ["--evolution.confirm-images", "1"],
            "evolution.confirm_images: should be greater than or equal to 2 (got '1')",
        ),
        (["--evolution.high", "inf"], "evolution.high: should be a finite number (got 'inf')"),
        (["--evolution.mutate", ""], "evolution.mutate: String should have at least 1 character (got '')"),
        (
            ["--evolution.batchnorm", "never"],
            "evolution.batchnorm: should be 'running', 'batch' or 'recalibrate' (got 'never')",
        ),
        (["--parent.gradient-noise", "-1"], "parent.gradient_noise: should be greater than 0 (got '-1')"),
        (["--parent.gradient-noise", "abc"], "parent.gradient_noise: should be a valid number (got 'abc')"),
        (["--parent.moments-after-evolution", "halve"], "should be 'keep', 'reset' or 'rescale' (got 'halve')"),
        (["--cluster.gpus-per-worker", "2"], "cluster.gpus_per_worker: should be less than or equal to 1 (got '2')"),
        (["--data.name", "folder"], "data.root: the folder data set needs"),
        (["--run.name", "../up"], "run.name: letters, digits, '.', '_' and '-' only (got '../up')"),
        (["--evolution.nonsense", "1"], "unknown option --evolution.nonsense"),
        (["--evolution.sigma", "much"], "evolution.sigma: should be a valid number (got 'much')"),
        (["--evolution.fitness", "beauty"], "evolution.fitness: should be 'loss' or 'accuracy' (got 'beauty')"),
        (["--config", "no-such-preset"], "--config no-such-preset: no such preset"),
        (["--config"], "argument --config: expected one argument"),
        (["--run.epoch", "5"], "(perhaps --run.epochs?)"),
        (["article-es"], "unknown argument article-es (perhaps --config article-es?)"),
        (["--evolution.mirrored", "sgd"], "unknown argument sgd (perhaps --config sgd?)"),
        (["--data.root", "FILE:///x"], "data.root (FILE:///x) is a URL"),
        (["--parent.weights", "hdfs://x/w.pt"], "parent.weights (hdfs://x/w.pt) is a URL"),
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
        ("evolution: {sigmma: 1}", "evolution.sigmma: unknown field (perhaps sigma?)"),
        ("evolution: {fitness-images: 9}", "evolution.fitness-images: unknown field (perhaps fitness_images?)"),
        ("evolution: {zzz: 1}", "evolution.zzz: unknown field"),
        ("evolutions: {sigma: 1}", "evolutions: unknown section (perhaps evolution?)"),
        ("zzz: {sigma: 1}", "zzz: unknown section (one of run, data, parent, evolution, cluster)"),
        ("evolution: {mirrored: true, population: 33}", "evolution.population (33) must be even when mirrored"),
        ("evolution: 5", "evolution: expected field: value lines"),
        ("evolution: {sigma: [1]}", "evolution.sigma: should be a valid number"),
        ("- 1", "expected sections, got list"),
        ("a: b: c", "not YAML"),
        ("run: {seed: -1}", "run.seed: should be greater than or equal to 0 (got -1)"),
    ],
)
def test_a_bad_file_is_one_line_that_names_the_file_and_the_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    for given in (path, tmp_path):  # a file and a run folder
        with pytest.raises(InputError) as caught:
            load_config(str(given))
        assert str(caught.value).startswith(f"{path}: {message}")
        assert "\n" not in str(caught.value)


def test_a_file_in_the_place_of_a_flag_is_proposed_as_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("")
    with pytest.raises(InputError, match=r"mine\.yaml \(perhaps --config mine\.yaml\?\)"):
        parse_config(["mine.yaml"])
    with pytest.raises(InputError, match=r"unknown argument yours\.yaml$"):
        parse_config(["yours.yaml"])


def test_what_has_a_colon_is_not_yet_a_url() -> None:
    for path in ("a/b://c", "s3:/x", "C:x", "/mnt/s3://x"):
        assert Run(out=path).out == path
        assert not is_url(path)


def test_a_run_is_written_to_a_path_or_a_url() -> None:
    assert Run(out="s3://bucket/runs/").out == "s3://bucket/runs"
    assert Run(out="file:///shared/runs").out == "/shared/runs"
    assert Run(out="FILE://localhost/shared/runs").out == "/shared/runs"
    config = parse_config(["--run.out", "gs://bucket/runs"])
    assert with_absolute_paths(config).run.out == "gs://bucket/runs"


def test_the_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Evolution().sigma = 3


def test_options_that_have_no_effect_are_let_through_where_there_is_no_evolution() -> None:
    flags = ["--evolution.strategy", "none", "--evolution.wave", "4", "--evolution.temperature", "loss"]
    assert parse_config(["--config", "article-random-gradients", *flags]).evolution.strategy == "none"


def test_what_depends_on_the_strategy_and_the_workers_is_resolved() -> None:
    chosen = Evolution(strategy="random-gradients", accept="chain").resolved(workers=6)
    assert (chosen.accept, chosen.lr, chosen.wave) == ("chain", 0.01, 6)
    chosen = Evolution().resolved(workers=6)
    assert (chosen.accept, chosen.lr, chosen.wave) == ("always", 0.0005, None)
    assert Evolution(**chosen.model_dump()) == chosen
    assert Evolution(strategy="random-gradients", lr=0.3).resolved() == Evolution(
        strategy="random-gradients", lr=0.3, accept="best"
    )


def test_images_that_are_not_given_share_what_the_others_leave() -> None:
    assert Evolution().image_counts(100) == {"fitness": 100}
    assert Evolution(confirm=True).image_counts(101) == {"fitness": 50, "confirm": 50}
    both = Evolution(confirm=True, step="search", fitness_images=40)
    assert both.image_counts(100) == {"fitness": 40, "search": 30, "confirm": 30}


def test_the_help_has_every_option_of_evolution(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--help"])
    text = "".join(capsys.readouterr().out.split())
    for name, field in Evolution.model_fields.items():
        assert f"--evolution.{name.replace('_', '-')}" in text
        assert field.description
        assert "".join(field.description.split()).rstrip(".")[:40] in text
