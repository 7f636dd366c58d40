"""The watchdog ends a process that is stuck where Python handles no signals."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import psutil
import pytest
from whole_runs import environment

# Taking a lock twice waits in C forever, as `ray.init` can. A signal does not end the wait.
STUCK = """
import ctypes, subprocess, sys
from spartan_ray.cli import watchdog
watchdog.SLOW_SECONDS = {slow}
child = subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL)
with watchdog.watchdog("the start", {seconds}, "look there"):
    lock, take = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
    take(lock)
    said = []
    while True:
        try:
            if not said:
                said.append(True)  # before it is printed: the signal comes from then on, and it is said once
                print(child.pid, flush=True)
            take(lock)
        except KeyboardInterrupt:  # it came just before
            pass
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_not_heeded_ends_the_process_and_its_children(number: signal.Signals) -> None:
    program = "import signal; signal.signal(signal.SIGTERM, signal.default_int_handler)"
    command = ["env", "--default-signal=INT", sys.executable, "-c", program + STUCK.format(slow=20, seconds=1000)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
        assert process.stdout
        child = psutil.Process(int(process.stdout.readline()))
        guard = threading.Timer(300, process.kill)
        guard.start()
        process.send_signal(number)
        assert process.stdout.read() == "stopped before the run began\n"
        guard.cancel()
    assert process.returncode == 130
    assert not psutil.wait_procs([child], timeout=60)[1]


def test_what_takes_too_long_is_said_and_then_ended() -> None:
    command = [sys.executable, "-c", STUCK.format(slow=0.1, seconds=0.2)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    pid, said = ended.stdout.split("\n", 1)
    assert (ended.returncode, said) == (1, "the start takes long: look there\n")
    assert ended.stderr == "spartan: the start took longer than 0.2 s: look there\n"
    assert not psutil.wait_procs([psutil.Process(int(pid))] if psutil.pid_exists(int(pid)) else [], timeout=60)[1]


def test_what_ends_in_time_is_left_alone() -> None:
    program = 'from spartan_ray.cli.watchdog import watchdog\nwith watchdog("it", 60, "there"):\n    pass\nprint("on")'
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment(), check=True
    )
    assert (ended.stdout, ended.stderr) == ("on\n", "")
