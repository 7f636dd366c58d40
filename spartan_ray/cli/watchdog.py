"""Ends a process that is stuck in a call that ignores signals."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator

import psutil

# Seconds that Python gets to react to a signal, and seconds until the user is told what takes long.
HEED_SECONDS, SLOW_SECONDS = 3.0, 20.0


@contextlib.contextmanager
def watchdog(what: str, seconds: float, where: str) -> Iterator[None]:
    """End this process and its children if the block takes longer than `seconds` or does not react to a signal.

    After a timeout the exit code is 1, and the message names `what` took long and `where` to look. After an ignored
    signal the exit code is 130. `ray.init` needs this: it waits in C, where Python's signal handlers do not run, and it
    waits indefinitely for a worker that died while starting. Use it in the main thread only."""
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

    # The interpreter's C code writes to this pipe when a signal arrives.
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
