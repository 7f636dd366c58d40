"""Ends a process that is stuck in a call that hears no signal."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator

import psutil

# Seconds that Python gets to act on a signal, and after which the user is told what is waited for.
HEED_SECONDS, SLOW_SECONDS = 3.0, 20.0


@contextlib.contextmanager
def watchdog(what: str, seconds: float, where: str) -> Iterator[None]:
    """End this process and its children if the block takes longer than so many seconds, with exit code 1 and a line
    that says where to look, or if it does not heed a signal, with 130.

    `ray.init` waits in C, where Python's handlers do not run, and without end for a worker that died as it started.
    For the main thread."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    ended = threading.Event()

    def watch() -> None:
        if not select.select([reading], [], [], SLOW_SECONDS)[0]:
            print(f"{what} takes long: {where}", flush=True)
        signalled = bool(select.select([reading], [], [], seconds - SLOW_SECONDS)[0])
        if ended.wait(HEED_SECONDS if signalled else 0):
            return
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
        if signalled:
            print("stopped before the run began", flush=True)
            os._exit(130)
        print(f"spartan: {what} took longer than {seconds:g} s: {where}", file=sys.stderr, flush=True)
        os._exit(1)

    # Written to when the signal arrives, by the interpreter's own C.
    before = signal.set_wakeup_fd(writing)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        os.write(writing, b"\0")
        watcher.join()
        os.close(reading)
        os.close(writing)
