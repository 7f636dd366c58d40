"""The per-generation record of (member, seed, offset, gain, fitness, images, weight), from which `replay`
rebuilds a generation."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spartan_ray.engine.strategies.requests import Outcome
from spartan_ray.errors import InputError
from spartan_ray.run.checkpoint import write_whole

# Columns with a row a member, and the values of the whole generation, by the kind of number that they are.
COLUMNS = {"member": "i", "seed": "u", "offset": "f", "gain": "f", "fitness": "f", "images": "i", "weight": "f"}
COLUMNS |= {"estimate": "f"}
VALUES = {"before": "f", "after": "f", "parent": "U", "next_parent": "U"}
# Those of each generation of the phase, which have equally many of the rows.
UPDATES = {"rate": "f", "factor": "f", "length": "f"}

Journal = dict[str, NDArray[Any]]


def write_journal(
    folder: Path, generation: int, outcome: Outcome, parent: str, next_parent: str, more: Journal | None = None
) -> None:
    """Write `folder`/000005.npz for generation 5. `parent` and `next_parent` are the digests of the network
    before and after it. Raises RunError when it cannot be written.

    `estimate` has the weights of an update also where it was not taken, since the optimizer's moments go on from it.
    A chosen member has the weight 1. Of an es update the estimated gradient is the sum of
    weight * gain * noise(seed); the optimizer makes the update of it at `rate`, which is rate times the
    estimate for plain sgd, and the parent moves by factor * length * update. With momentum, adam or weight
    decay the update depends on the generations before and on the parent too. A phase of several generations has their
    rows one after another, and a rate, factor and length of each. Of evolutionary SGD the members are the offspring;
    `more` says of which parents each is the mean, how fit the parents were, and which candidates, the parents before
    the offspring, are the next parents."""
    members, generations = outcome.members, outcome.generations or [outcome]
    content = io.BytesIO()
    np.savez(
        content,
        allow_pickle=False,
        member=np.arange(len(members)),
        seed=members.seed_K,
        offset=members.offset_K,
        gain=members.gain_K,
        fitness=outcome.fitness_K,
        images=outcome.cases_K,
        weight=outcome.weight_K,
        estimate=np.zeros(len(members)) if outcome.estimate_K is None else outcome.estimate_K,
        rate=np.array([one.rate for one in generations]),
        factor=np.array([one.factor for one in generations]),
        length=np.array([one.length for one in generations]),
        before=np.float64(outcome.before),
        after=np.float64(outcome.after),
        parent=np.array(parent),
        next_parent=np.array(next_parent),
        **(more or {}),
    )
    write_whole(folder / f"{generation:06d}.npz", content.getvalue())


def read_journal(path: Path) -> Journal:
    """The columns and values of one generation. Never unpickles. Raises InputError for anything but a journal."""
    try:
        content = io.BytesIO(path.read_bytes())
        with zipfile.ZipFile(content) as archive:
            # As it was written: a compressed one may be a bomb.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise InputError(f"{path}: not a journal: it is compressed")
        with np.load(content, allow_pickle=False) as stored:
            journal: Journal = {name: stored[name] for name in stored.files}
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: not readable as a journal: {error.strerror or error}") from None
    except Exception as error:  # NumPy and zipfile have no one error for a file that is torn or hostile
        # Shortened: NumPy quotes what it cannot read.
        raise InputError(f"{path}: not a journal: {str(error)[:200] or type(error).__name__}") from None
    rows = (journal["member"].size,) if "member" in journal else ()
    shapes = {name: (kind, rows) for name, kind in COLUMNS.items()}
    shapes |= {name: (kind, ()) for name, kind in VALUES.items()}
    updates = journal["rate"].shape if "rate" in journal else ()
    shapes |= {name: (kind, updates) for name, kind in UPDATES.items()}
    for name, (kind, shape) in shapes.items():
        if name not in journal or journal[name].dtype.kind != kind or journal[name].shape != shape:
            raise InputError(f"{path}: not a journal: {name} is missing or of another kind")
    if len(updates) != 1 or not updates[0] or journal["member"].size % updates[0]:
        raise InputError(f"{path}: not a journal: {updates} updates of {rows} members")
    return journal
