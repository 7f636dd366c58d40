"""What goes wrong, each in one line: of the user's input, or of a run."""

from __future__ import annotations


def one_line(text: str) -> str:
    """A text in one line that can be printed, whatever it quotes."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


class OneLineError(Exception):
    """A message of one line, whatever of the user's input it quotes."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class InputError(OneLineError):
    """What the user gave cannot be used. The message names the field or the path."""


class RunError(OneLineError):
    """A run cannot go on, and why. What it had is in its last checkpoint."""


class Diverged(RunError):
    """What a run computes is not finite any more; to go on would do the same again."""
