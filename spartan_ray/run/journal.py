"""The journal: one record of (member, seed, offset, gain, fitness, images, weight) per phase, enough to replay it."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spartan_ray.engine.strategies.requests import Outcome
from spartan_ray.errors import InputError
from spartan_ray.run.files import write_whole

# Columns with one row per member, and values of the whole phase, each with the kind of its NumPy dtype.
COLUMNS = {"member": "i", "seed": "u", "offset": "f", "gain": "f", "fitness": "f", "images": "i", "weight": "f"}
COLUMNS |= {"estimate": "f"}
VALUES = {"before": "f", "after": "f", "parent": "U", "next_parent": "U"}
# Values with one entry per generation of the phase. Each generation has the same number of rows.
UPDATES = {"rate": "f", "factor": "f", "length": "f"}

Journal = dict[str, NDArray[Any]]


def write_journal(
    folder: Path, generation: int, outcome: Outcome, parent: str, next_parent: str, more: Journal | None = None
) -> None:
    """Write `folder`/000005.npz for the evolve phase in epoch 5. `parent` and `next_parent` are the digests of the
    network before and after it. Raises RunError if it cannot be written.

    For es, the estimated gradient is the sum of weight * gain * noise(seed). The optimizer makes the update of it at
    learning rate `rate` (for plain sgd the update is rate * estimate), and the parent moves by factor * length *
    update. With momentum, adam or weight decay the update also depends on earlier generations and on the parent.
    `estimate` holds the weights even if the update was not taken, because the optimizer's moments include it. A phase
    of several generations has their rows one after another, and one rate, factor and length for each.

    For random-gradients, an accepted member has weight 1. For esgd, the members are the offspring, and a selected one
    has weight 1. `more` then holds the parents whose mean each offspring is, the fitness of the parents, and the
    candidates selected as the next parents; candidates are numbered with the parents first, then the offspring."""
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
    """Return the columns and values of a journal. Never unpickles. Raises InputError if the file is not a journal."""
    try:
        content = io.BytesIO(path.read_bytes())
        with zipfile.ZipFile(content) as archive:
            # A journal is written uncompressed; a compressed one may be a zip bomb.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise InputError(f"{path}: not a journal: it is compressed")
        with np.load(content, allow_pickle=False) as stored:
            journal: Journal = {name: stored[name] for name in stored.files}
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: not readable as a journal: {error.strerror or error}") from None
    except Exception as error:  # NumPy and zipfile raise many kinds for a torn or hostile file
        # Shorten the message: NumPy quotes the content that it cannot read.
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
