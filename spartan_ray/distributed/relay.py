"""The actor that passes tasks to the workers of a node and collects their answers. Does not import torch."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from spartan_ray.distributed.protocol import Failed, Lost

# The method whose tasks go through relays. Other tasks are few, and their answers may be large.
RELAYED_METHOD = "evaluate"
# Seconds after which a relay that has received no answer returns an empty list.
SPEAK_SECONDS = 10.0
# A task: its number, the number of its worker, and the arguments.
Sent = tuple[int, int, tuple[Any, ...]]


class Relay:
    """Passes tasks to workers. The driver numbers both. Ray's dashboard shows the tasks under `name`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.workers: dict[int, ActorHandle[Any]] = {}
        self.answers: list[tuple[int, Any]] = []
        self.following: set[asyncio.Task[None]] = set()
        self.news = asyncio.Condition()
        self.calls = 0

    async def answer(self) -> None:
        """Return at once, which shows that this process runs."""

    async def exchange(self, workers: dict[int, ActorHandle[Any]], tasks: list[Sent]) -> list[tuple[int, Any]]:
        """Take tasks, and workers that are new. Return answers with the numbers of their tasks.

        Return as soon as there is an answer or the next call has come. After SPEAK_SECONDS return an empty list, which
        shows that this process runs."""
        async with self.news:
            self.calls += 1
            call = self.calls
            self.workers |= workers
            self.news.notify_all()
            # A call may overtake an earlier one, which brings the worker.
            await self.news.wait_for(lambda: all(worker in self.workers for _, worker, _ in tasks))
            for number, worker, arguments in tasks:
                reference = named_task(self.workers[worker], RELAYED_METHOD, self.name)(*arguments)
                following = asyncio.ensure_future(self._follow(number, reference))
                self.following.add(following)
                following.add_done_callback(self.following.discard)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SPEAK_SECONDS):
                    await self.news.wait_for(lambda: self.answers or call != self.calls)
            answers, self.answers = self.answers, []
            return answers

    async def _follow(self, number: int, reference: Any) -> None:
        try:
            answer = await reference
        except Exception as error:  # including those of answers that cannot be deserialized here
            answer = lost_or_failed(error)
        async with self.news:
            self.answers.append((number, answer))
            self.news.notify_all()


def named_task(worker: ActorHandle[Any], method: str, name: str) -> Callable[..., Any]:
    """Return the remote call of a worker's method, as a task that Ray's dashboard shows under `spartan:name:method`."""
    task: Callable[..., Any] = getattr(worker, method).options(name=f"spartan:{name}:{method}").remote
    return task


def lost_or_failed(error: Exception) -> Lost | Failed:
    """Convert the error of a task to Failed if the worker's code raised it, else to Lost. The message is the last line
    of the error for Failed, and its first line for Lost."""
    lines = [line.strip() for line in (str(error).strip() or type(error).__name__).splitlines()]
    in_work = isinstance(error, RayTaskError) or (isinstance(error, RayActorError) and error.actor_init_failed)
    return Failed(lines[-1]) if in_work else Lost(lines[0])
