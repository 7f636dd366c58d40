"""The `spartan` command line: parses the arguments and runs the command.

Exit codes: 0 success, 2 invalid configuration or input, 130 stopped by the user, 141 the reader of the output is gone,
1 any other failure."""

from __future__ import annotations

import argparse
import math
import os
import re
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from spartan_ray import __version__
from spartan_ray.cli.flags import Parser, add_config, add_fields, refuse_unknown, take_config, with_absolute_paths
from spartan_ray.cli.train import begun, resume_run, run
from spartan_ray.errors import InputError, RunError
from spartan_ray.section import is_url, no_url, perhaps, place_of

DESCRIPTION = """Spartan training alternates SGD with evolution; Ray workers score the population."""
CODE = "import and run the user code (package.module:Name) that the run's configuration names"
RUN = "run folder, or its URL"
# The file descriptor of standard output.
STDOUT = 1


def main() -> None:
    """Run the command line and exit with the command's exit code."""
    code: int | str | None
    if os.getcwd() not in sys.path:  # to import user modules; last, so that files here do not hide installed modules
        sys.path.append(os.getcwd())
    try:
        try:
            code = _command()
        except SystemExit as end:  # raised by argparse, for example after --help
            code = end.code
        except InputError as error:
            print(f"spartan: {error}", file=sys.stderr)
            code = 2
        except RunError as error:
            print(f"spartan: {error}", file=sys.stderr)
            code = 1
        except KeyboardInterrupt:  # before a run has started or after it has ended
            print("stopped")
            code = 130
        print(end="", flush=True)
    except BrokenPipeError:
        if not _is_unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)  # for Python's final flush
        code = 128 + signal.SIGPIPE
    sys.exit(code)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line. Raises InputError for invalid arguments."""
    parser = Parser(prog="spartan", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"spartan {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    train = commands.add_parser(
        "train",
        help="train a network",
        description="Train a network. --config is the base; flags override it.",
        usage="spartan train [--config NAME|FILE] [--SECTION.FIELD VALUE ...]",
    )
    add_config(train)
    resume = commands.add_parser(
        "resume",
        help="continue a stopped or lost run, to the same result as without the stop",
        description="Continue a run from its last checkpoint. Only the options below can change.",
        usage="spartan resume RUN [--code] [--run.epochs INT] [--run.keep INT] [--cluster.FIELD VALUE ...]",
    )
    resume.add_argument("run", type=place_of, metavar="RUN", help=RUN)
    resume.add_argument("--code", action="store_true", help=CODE)
    shown = [f"run.{name}" for name in ("epochs", "patience", "keep", "keep_best", "loggers")]
    add_fields(resume, shown=(*shown, "data.root", "cluster"))
    submit = commands.add_parser(
        "submit",
        help="train as a job on a running Ray cluster",
        description="Submit `spartan train` with the same flags as a Ray job. The package is sent with the job; its "
        "dependencies must be installed on every node. --run.out must be an absolute path on the cluster or a URL, and "
        "--data.root an absolute path there.",
        usage="spartan submit [--address URL] [--code DIR] [--follow] [--config NAME|FILE] [--SECTION.FIELD VALUE ...]",
    )
    submit.add_argument(
        "--address", metavar="URL", help="Ray's dashboard (default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265)"
    )
    submit.add_argument(
        "--code", type=_path("--code"), metavar="DIR", help="folder with your own modules, sent with the job"
    )
    submit.add_argument("--follow", action="store_true", help="show the job's output, and exit with its exit code")
    add_config(submit)
    doctor = commands.add_parser(
        "doctor",
        help="check whether a run would start: nodes, devices, versions, noise, paths",
        description="Check whether `spartan train` with the same flags would start, and show what it would run on. "
        "Exit code 0 if it would start, 1 if not.",
        usage="spartan doctor [--config NAME|FILE] [--SECTION.FIELD VALUE ...]",
    )
    add_config(doctor)
    watch = commands.add_parser(
        "watch",
        help="show a run while it goes on",
        description="Show progress, the last epochs and the log of a run until it ends; without a terminal, print a "
        "line per epoch. Only reads the run folder: Ctrl-C ends the view, not the run. Exit code 1 if the run failed.",
    )
    watch.add_argument("run", type=place_of, metavar="RUN", help=RUN)
    report = commands.add_parser(
        "report",
        help="write tables and pictures of a run, or compare several runs",
        description="Write report.html (one file, to open or send), report.md and pictures of a run, or of several "
        "runs in comparison, and print their table.",
    )
    report.add_argument("runs", nargs="+", type=place_of, metavar="RUN", help=RUN)
    report.add_argument(
        "-o",
        dest="folder",
        type=_path("-o"),
        metavar="DIR",
        help="output folder (default: RUN/report; ./report for several runs or a URL)",
    )
    study = commands.add_parser(
        "study",
        help="run every cell of a grid with several seeds and compare the results",
        description="Do the missing runs of a study, several at a time, and write rows.csv, README.md and pictures. "
        "Repeat the command to continue an interrupted study. Flags of `spartan train` override the fields of every "
        "cell.",
        usage="spartan study FILE [-o DIR] [--tables] [--SECTION.FIELD VALUE ...]",
    )
    study.add_argument("file", type=_path("FILE"), metavar="FILE", help="YAML file with base, grid, seeds, claims, ...")
    study.add_argument(
        "-o", dest="folder", type=_path("-o"), metavar="DIR", help="output folder (default: FILE without its suffix)"
    )
    study.add_argument("--tables", action="store_true", help="start no runs: only write tables and pictures")
    add_fields(study, shown=("data.root", "cluster"))
    scale = commands.add_parser(
        "scale",
        help="measure how much larger populations improve trained networks",
        description="Score descendants of the last network of each run once. Then make the update of every "
        "population size from subsets of them, and write tables and pictures of the changes in accuracy and loss. "
        "Repeat the command to continue after an interrupt.",
    )
    scale.add_argument(
        "runs", nargs="*", type=_path("RUN"), metavar="RUN", help="run folder; its last network is the parent"
    )
    scale.add_argument(
        "--levels",
        nargs="+",
        type=_path("--levels"),
        metavar="RUN",
        default=[],
        help="run folders to show beside the parents of the same seed, such as SGD on both splits",
    )
    scale.add_argument(
        "--populations",
        nargs="+",
        type=int,
        metavar="K",
        default=[50, 200, 1000, 5000, 20000],
        help="population sizes, even numbers (default: 50 200 1000 5000 20000)",
    )
    scale.add_argument(
        "--draws", type=int, metavar="N", default=3, help="disjoint draws per size, if they fit (default: 3)"
    )
    ways = "all-common-512, all-own-128, batchnorm-common-512, batchnorm-own-128, trajectory-common-512"
    scale.add_argument(
        "--ways",
        nargs="+",
        metavar="WAY",
        help="what to mutate, and on how many images to score a member; common: the same images for all members, own: "
        f"new images for each mirrored pair, average: start from the average of the last epochs. Choices: {ways}, "
        "average-own-128 (default: all of them)",
    )
    scale.add_argument(
        "--workers", type=_workers, metavar="N", default="auto", help="number of Ray workers (default: auto)"
    )
    scale.add_argument("--threads", type=int, metavar="N", default=1, help="CPU threads of this process (default: 1)")
    scale.add_argument("--address", metavar="ADDRESS", help="Ray to join (default: RAY_ADDRESS, else a new local Ray)")
    scale.add_argument("--tables", action="store_true", help="score nothing: only write tables and pictures")
    scale.add_argument(
        "-o",
        dest="folder",
        type=_path("-o"),
        metavar="DIR",
        default=Path("scale"),
        help="output folder (default: scale)",
    )
    replay = commands.add_parser(
        "replay", help="rebuild any descendant that a run scored, or verify the run's updates from its journal"
    )
    replay.add_argument("run", type=place_of, metavar="RUN", help=RUN)
    replay.add_argument(
        "--verify",
        action="store_true",
        help="recompute every update and compare the new parent with its recorded digest",
    )
    replay.add_argument("--code", action="store_true", help=CODE)
    replay.add_argument("--generation", type=int, metavar="G", help="epoch of the evolve phase")
    replay.add_argument("--member", type=int, metavar="K", help="index of the member, from 0")
    replay.add_argument(
        "-o",
        dest="file",
        type=_path("-o"),
        metavar="FILE",
        help="file for the descendant's weights (default: descendant-G-K.safetensors)",
    )
    if not arguments:
        arguments = ["--help"]
    if not arguments[0].startswith("-") and arguments[0] not in commands.choices:
        raise InputError(f"unknown command {arguments[0]}{perhaps(arguments[0], commands.choices)}")
    parsed, unknown = parser.parse_known_args([_with_hyphens(argument) for argument in arguments])
    refuse_unknown(commands.choices[parsed.command], unknown)
    if parsed.command == "replay" and parsed.verify == (parsed.generation is not None):
        raise InputError("either --verify, or --generation G and --member K")
    if parsed.command == "replay" and (parsed.generation is None) != (parsed.member is None):
        raise InputError("--generation and --member go together")
    return parsed


def _command() -> int:
    """Run the command given on the command line and return the exit code."""
    arguments = parse(sys.argv[1:])
    match arguments.command:
        case "train":
            config = with_absolute_paths(take_config(arguments))
            place, finished = begun(config)
            return 0 if finished else run(config, place)
        case "submit":
            from spartan_ray.cli.submit import submit

            return submit(take_config(arguments), arguments.address, arguments.code, arguments.follow)
        case "doctor":
            from spartan_ray.cli.doctor import diagnose

            return 0 if diagnose(with_absolute_paths(take_config(arguments))) else 1
        case "resume":
            return resume_run(arguments)
        case "study":
            from spartan_ray.cli.study import run_study

            return run_study(arguments)
        case "scale":
            from spartan_ray.cli.scale import scale

            return scale(arguments)
        case "watch":
            from spartan_ray.cli.watch import watch

            return watch(arguments.run)
        case "report":
            return write_report(arguments.runs, arguments.folder)
        case _:
            from spartan_ray.run.place import reading

            with reading(arguments.run, lambda name: not name.startswith("tensorboard/")) as folder:
                return replay_run(arguments, folder)


def _path(name: str) -> Callable[[str], Path]:
    """Return an argument type that makes a Path and refuses a URL."""
    return lambda text: Path(no_url(name, text))


def _with_hyphens(argument: str) -> str:
    """Turn a flag that is spelled like a field, --cluster.gpus_per_worker, into its form with hyphens."""
    name, equals, value = argument.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if re.fullmatch(r"--[a-z]+\.[a-z_-]+", name) else argument


def _workers(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _is_unread() -> bool:
    """Return whether standard output is a pipe that nobody reads any more."""
    output = select.poll()
    output.register(STDOUT, 0)  # poll reports errors even if no event is requested
    return any(event & select.POLLERR for _, event in output.poll(0))


def write_report(places: list[str], out: Path | None) -> int:
    """`spartan report`: write tables and pictures of runs, and return the exit code."""
    from spartan_ray.report import page
    from spartan_ray.report.reading import read_run, unique_frames
    from spartan_ray.report.tables import SHORT, SINGLE, final_table, markdown
    from spartan_ray.run.place import in_report, reading

    runs = []
    for place in places:
        with reading(place, in_report) as folder:
            runs.append(read_run(folder, journals=True))
    inside = len(places) == 1 and not is_url(places[0])
    out = out or (Path(places[0]) / "report" if inside else Path("report"))
    paths = page.write_report(runs, out)
    print(markdown(final_table(unique_frames(runs))[SHORT]))
    if len(runs) > 1:
        print(f"{SINGLE}\n")
    for path in paths:
        print(path)
    return 0


def replay_run(arguments: argparse.Namespace, folder: Path) -> int:
    """`spartan replay`: rebuild a descendant, or verify all updates of the run in `folder`. Return the exit code."""
    import torch

    from spartan_ray.engine.process import set_up
    from spartan_ray.run.loading import load_run_config, refuse_code
    from spartan_ray.run.recorded import ran_on_gpu
    from spartan_ray.run.replay import Replay
    from spartan_ray.run.replay_esgd import EsgdReplay

    config = load_run_config(folder)
    if not arguments.code:
        refuse_code(folder, config, "add --code if you trust it")
    device = set_up(gpu=ran_on_gpu(folder) and torch.cuda.is_available())
    kind = EsgdReplay if config.evolution.strategy == "esgd" else Replay
    replay = kind(folder, print, device)
    if arguments.verify:
        agree = []
        for generation in replay.generations:
            try:
                agree.append(replay.verify(generation))
            except InputError as error:
                print(f"generation {generation}: {error}")
                agree.append(False)
        print(f"{sum(agree)} of {len(agree)} updates agree with the recorded parents")
        return 0 if all(agree) else 1
    generation, member = arguments.generation, arguments.member
    file = arguments.file or Path(f"descendant-{generation}-{member}.safetensors")
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise InputError(f"-o {file}: {'is a folder' if file.is_dir() else 'there is no such folder'}")
    recorded, scored = replay.descendant(generation, member, file)
    print(f"{file}: member {member} of generation {generation}; fitness {recorded!r} recorded, {scored!r} here")
    same = recorded == scored or math.isnan(recorded)
    reason = "it was not finite in the run, or no worker could score it" if math.isnan(recorded) else "identical bits"
    print(reason if same else "they differ: are the versions or the device different from the run's?")
    return 0 if same else 1
