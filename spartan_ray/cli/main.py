"""The command line, `spartan`. Exit codes: 0 done, 2 bad configuration or input, 130 stopped by the
user, 141 nobody reads the output, 1 anything else."""

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
from spartan_ray.section import is_url, no_url, place_of

DESCRIPTION = """Spartan training: SGD alternated with evolution, the population scored on Ray."""
CODE = "run the package.module:Name that the run's configuration names"
RUN = "a run folder, or its URL"
# The file descriptor of standard output.
STDOUT = 1


def main() -> None:
    """Run the command line and exit with its code."""
    code: int | str | None
    if os.getcwd() not in sys.path:  # for modules of the user's own; last, since one may stand in a folder of others
        sys.path.append(os.getcwd())
    try:
        try:
            code = _command()
        except SystemExit as end:  # of --help, and what argparse refuses
            code = end.code
        except InputError as error:
            print(f"spartan: {error}", file=sys.stderr)
            code = 2
        except RunError as error:
            print(f"spartan: {error}", file=sys.stderr)
            code = 1
        except KeyboardInterrupt:  # before there was a run to stop, or after its end
            print("stopped")
            code = 130
        print(end="", flush=True)
    except BrokenPipeError:
        if not _is_unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)  # for what Python still writes when it ends
        code = 128 + signal.SIGPIPE
    sys.exit(code)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The parsed command line. Raises InputError for what is not understood."""
    parser = Parser(prog="spartan", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"spartan {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    train = commands.add_parser(
        "train", help="train a network", description="Train a network. --config is the base, flags override it."
    )
    add_config(train)
    resume = commands.add_parser(
        "resume",
        help="go on with a run that was stopped or lost, to the same result",
        description="Go on with a run from its last checkpoint. Nothing but what follows can change.",
        usage="spartan resume RUN [--code] [--run.epochs INT] [--run.keep INT] [--cluster.FIELD VALUE ...]",
    )
    resume.add_argument("run", type=place_of, metavar="RUN", help=RUN)
    resume.add_argument("--code", action="store_true", help=CODE)
    shown = [f"run.{name}" for name in ("epochs", "patience", "keep", "keep_best", "loggers")]
    add_fields(resume, shown=(*shown, "data.root", "cluster"))
    submit = commands.add_parser(
        "submit",
        help="train as a job of a Ray that is running",
        description="Submit `spartan train` with the same flags as a job. The package goes along; every node needs "
        "what it depends on. --run.out and --data.root are absolute paths there, or URLs.",
    )
    submit.add_argument(
        "--address", metavar="URL", help="of Ray's dashboard (default: RAY_API_SERVER_ADDRESS, or port 8265 here)"
    )
    submit.add_argument(
        "--code", type=_path("--code"), metavar="DIR", help="a folder with modules of your own, sent along"
    )
    submit.add_argument("--follow", action="store_true", help="show what the job prints, and end as it does")
    add_config(submit)
    doctor = commands.add_parser(
        "doctor",
        help="see whether a run would start: nodes, devices, versions, noise, paths",
        description="See whether `spartan train` with the same flags would start, and what it would run on.",
    )
    add_config(doctor)
    report = commands.add_parser("report", help="tables and pictures of one run, or of several compared")
    report.add_argument("runs", nargs="+", type=place_of, metavar="RUN", help=RUN)
    report.add_argument(
        "-o",
        dest="folder",
        type=_path("-o"),
        metavar="DIR",
        help="where to write (default: RUN/report; for several runs, and for a URL, ./report)",
    )
    study = commands.add_parser(
        "study",
        help="run every cell of a grid with several seeds, and compare them",
        description="Run what is missing of a study, several runs at a time, and write rows.csv, README.md and "
        "pictures. Interrupted, the same command goes on. Flags of `spartan train` override what the cells say.",
        usage="spartan study FILE [-o DIR] [--tables] [--SECTION.FIELD VALUE ...]",
    )
    study.add_argument("file", type=_path("FILE"), metavar="FILE", help="a YAML file: base, grid, seeds, baselines")
    study.add_argument(
        "-o", dest="folder", type=_path("-o"), metavar="DIR", help="where to write (default: FILE without .yaml)"
    )
    study.add_argument("--tables", action="store_true", help="write tables and pictures of the rows that are there")
    add_fields(study, shown=("data.root", "cluster"))
    scale = commands.add_parser(
        "scale",
        help="see what larger populations make of saved parents",
        description="Score descendants of the last network of each run once, and make the update of every population "
        "that is a part of them: changes of accuracy and loss, tables and a picture. Interrupted, it goes on.",
    )
    scale.add_argument("runs", nargs="*", type=_path("RUN"), metavar="RUN", help="a run folder with a parent")
    scale.add_argument(
        "--populations",
        nargs="+",
        type=int,
        metavar="K",
        default=[50, 200, 1000, 5000, 20000],
        help="their sizes",
    )
    scale.add_argument("--draws", type=int, metavar="N", default=3, help="disjoint draws of each, where they fit")
    ways = "all-common-1024, all-own-128, batchnorm-common-1024, batchnorm-own-128, trajectory-common-1024"
    scale.add_argument(
        "--ways",
        nargs="+",
        metavar="WAY",
        help=f"what is mutated, and on how many images a member or a pair of its own is scored: {ways}, "
        "average-own-128 (default: all)",
    )
    scale.add_argument("--workers", type=_workers, metavar="N", default="auto", help="Ray workers (default: auto)")
    scale.add_argument("--threads", type=int, metavar="N", default=1, help="CPU threads of this process (default: 1)")
    scale.add_argument("--address", metavar="ADDRESS", help="of the Ray to join (default: a new one)")
    scale.add_argument("--tables", action="store_true", help="write tables and pictures of the rows that are there")
    scale.add_argument(
        "-o", dest="folder", type=_path("-o"), metavar="DIR", default=Path("scale"), help="where to write (scale)"
    )
    replay = commands.add_parser(
        "replay", help="rebuild any descendant that a run scored, or verify the run's updates from its journal"
    )
    replay.add_argument("run", type=place_of, metavar="RUN", help=RUN)
    replay.add_argument(
        "--verify", action="store_true", help="make every next parent again and compare it with its digest on record"
    )
    replay.add_argument("--code", action="store_true", help=CODE)
    replay.add_argument("--generation", type=int, metavar="G", help="the epoch of the evolve phase")
    replay.add_argument("--member", type=int, metavar="K", help="the member, counted from 0")
    replay.add_argument(
        "-o",
        dest="file",
        type=_path("-o"),
        metavar="FILE",
        help="the descendant's weights (default: descendant-G-K.safetensors)",
    )
    parsed, unknown = parser.parse_known_args([_with_hyphens(argument) for argument in arguments])
    refuse_unknown(commands.choices[parsed.command], unknown)
    if parsed.command == "replay" and parsed.verify == (parsed.generation is not None):
        raise InputError("either --verify, or --generation G and --member K")
    if parsed.command == "replay" and (parsed.generation is None) != (parsed.member is None):
        raise InputError("--generation and --member go together")
    return parsed


def _command() -> int:
    """Run the command that the command line names; the exit code."""
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
        case "report":
            return write_report(arguments.runs, arguments.folder)
        case _:
            from spartan_ray.run.place import reading

            with reading(arguments.run, lambda name: not name.startswith("tensorboard/")) as folder:
                return replay_run(arguments, folder)


def _path(name: str) -> Callable[[str], Path]:
    """What makes a path of an argument."""
    return lambda text: Path(no_url(name, text))


def _with_hyphens(argument: str) -> str:
    """A flag by the name of its field in a file, cluster.gpus_per_worker, as the flag that it is."""
    name, equals, value = argument.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}" if re.fullmatch(r"--[a-z]+\.[a-z_-]+", name) else argument


def _workers(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _is_unread() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    output = select.poll()
    output.register(STDOUT, 0)  # an error is told unasked
    return any(event & select.POLLERR for _, event in output.poll(0))


def write_report(places: list[str], out: Path | None) -> int:
    """`spartan report`: tables and pictures."""
    from spartan_ray.report import page
    from spartan_ray.report.reading import read_run, unique_frames
    from spartan_ray.report.tables import SHORT, final_table, markdown
    from spartan_ray.run.place import in_report, reading

    runs = []
    for place in places:
        with reading(place, in_report) as folder:
            runs.append(read_run(folder))
    inside = len(places) == 1 and not is_url(places[0])
    out = out or (Path(places[0]) / "report" if inside else Path("report"))
    paths = page.write_report(runs, out)
    print(markdown(final_table(unique_frames(runs))[SHORT]))
    for path in paths:
        print(path)
    return 0


def replay_run(arguments: argparse.Namespace, folder: Path) -> int:
    """`spartan replay`: a descendant again, or all updates of the run in a folder."""
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
    print(f"{file}: member {member} of generation {generation}; fitness {recorded!r} on record, {scored!r} here")
    same = recorded == scored or math.isnan(recorded)
    reason = "on record it was not finite, or no worker could score it" if math.isnan(recorded) else "equal to the bit"
    print(reason if same else "they differ: other versions or another device than the run's?")
    return 0 if same else 1
