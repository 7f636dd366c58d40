"""Errors in the user's input and in runs, each with a message of one line."""

from __future__ import annotations


def one_line(text: str) -> str:
    """Return the text as one printable line, whatever it quotes."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


class OneLineError(Exception):
    """An error whose message is one line, whatever user input it quotes."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class InputError(OneLineError):
    """The user's input cannot be used. The message names the field or the path."""


class RunError(OneLineError):
    """A run cannot continue. The message says why; the last checkpoint holds the state of the run."""


class Diverged(RunError):
    """The numbers of a run are no longer finite. A restart would diverge again."""
