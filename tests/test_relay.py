"""Relays: what goes through them, and what follows when one is lost or hangs."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from test_pool import MEMBERS, Running, same

from spartan_ray.distributed.relay import Ticket


class Relayed(Running):
    """`disturb` is called once, when the first members of a generation are there."""

    disturb: Callable[[], None] | None = None
    sent: list[Any]

    def __init__(self, **cluster: Any) -> None:
        super().__init__(relayed=True, chunk=2, **cluster)
        submit = self.transport.submit

        def note(*arguments: Any) -> Any:
            self.sent.append(submit(*arguments))
            return self.sent[-1]

        self.sent, self.transport.submit = [], note  # type: ignore[method-assign, assignment]

    def advance(self, members: int, images: int) -> None:
        super().advance(members, images)
        if members and self.disturb:
            disturb, self.disturb = self.disturb, None
            disturb()


@pytest.fixture
def running(local_ray: None) -> Iterator[Relayed]:
    running = Relayed(workers=2, task_timeout=3.0)
    yield running
    running.pool.close()


def test_tasks_go_through_the_relay_and_a_lost_one_is_replaced(running: Relayed) -> None:
    assert same(running.pool.evaluate(MEMBERS), running.expected)
    assert running.sent
    assert all(isinstance(sent, Ticket) for sent in running.sent)
    assert not running.notes
    lost = running.relay()
    running.disturb = lambda: os.kill(lost, signal.SIGKILL)
    assert same(running.pool.evaluate(MEMBERS), running.expected)
    assert any("was lost and is replaced: the relay of its node was lost" in note for note in running.notes)
    running.pool.wait_until_joined()
    running.wait_for_relays(True)
    assert running.relay() != lost
    running.sent.clear()
    assert same(running.pool.evaluate(MEMBERS), running.expected)
    assert all(isinstance(sent, Ticket) for sent in running.sent)


def test_a_relay_that_hangs_is_gone_round(running: Relayed) -> None:
    hung = psutil.Process(running.relay())
    running.disturb = hung.suspend
    assert same(running.pool.evaluate(MEMBERS), running.expected)
    assert any("no answer for 3 s" in note for note in running.notes)
    running.sent.clear()
    assert same(running.pool.evaluate(MEMBERS), running.expected)
    assert hung.pid not in psutil.pids() or not any(isinstance(sent, Ticket) for sent in running.sent)
    with contextlib.suppress(psutil.NoSuchProcess):  # with both workers of its node
        hung.resume()
    running.pool.wait_until_joined()
    running.wait_for_relays(True)
    running.sent.clear()
    assert same(running.pool.evaluate(MEMBERS), running.expected)
    assert all(isinstance(sent, Ticket) for sent in running.sent)


def test_the_relays_end_with_the_workers(running: Relayed) -> None:
    pids = [running.relay(), *(info.pid for info in running.pool.infos)]
    running.pool.close()
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).wait(60)
