"""A relay on each node of a large Ray: the driver sends it the node's tasks together, and hears answers together.

A call of Ray costs its caller about a millisecond, whatever it carries. Everything else is as without relays: who does
what, and what follows when a worker is lost, is the dispatcher's. This one is told of a lost relay as of lost workers.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from spartan_ray.distributed.config import Cluster
from spartan_ray.distributed.protocol import Failed, Lost
from spartan_ray.distributed.transport import RayTransport, lost_or_failed
from spartan_ray.distributed.worker import Worker

# Below so many nodes the driver is fast enough.
RELAYED_NODES = 8
RELAYED_ANSWERS_PER_SECOND = 3000.0
# What goes through relays; other tasks are few, and what they bring may be large.
RELAYED_METHOD = "evaluate"

# A task: its number, that of its worker, and the arguments.
Sent = tuple[int, int, tuple[Any, ...]]


class Relay:
    """The actor of a node that hands tasks to its workers and collects what they answer."""

    def __init__(self) -> None:
        self.workers: dict[int, ActorHandle[Any]] = {}
        self.answers: list[tuple[int, Any]] = []
        self.following: set[asyncio.Task[None]] = set()
        self.news = asyncio.Event()
        self.calls = 0

    async def answer(self) -> None:
        """Show that this process is there."""

    async def exchange(self, workers: dict[int, ActorHandle[Any]], tasks: list[Sent]) -> list[tuple[int, Any]]:
        """Take tasks, and workers that are new; answers by the numbers of their tasks, as soon as there is one or the
        next call has come."""
        self.calls += 1
        call = self.calls
        self.news.set()
        self.workers |= workers
        for number, worker, arguments in tasks:
            reference = getattr(self.workers[worker], RELAYED_METHOD).remote(*arguments)
            following = asyncio.ensure_future(self._follow(number, reference))
            self.following.add(following)
            following.add_done_callback(self.following.discard)
        while not self.answers and call == self.calls:
            self.news.clear()
            await self.news.wait()
        answers, self.answers = self.answers, []
        return answers

    async def _follow(self, number: int, reference: Any) -> None:
        try:
            answer = await reference
        except RayError as error:
            answer = lost_or_failed(error)
        self.answers.append((number, answer))
        self.news.set()


@dataclass(eq=False)
class Ticket:
    """The reference of an answer that comes through a relay."""

    worker: Any
    answer: Any = None


@dataclass(eq=False)
class Node:
    """What the driver knows of a node."""

    workers: dict[Any, int] = field(default_factory=dict)  # and their numbers
    relay: Any = None
    up: bool = False  # it has answered since somebody last had doubts
    listening: int = 0  # calls of `exchange` in flight
    unknown: dict[int, Any] = field(default_factory=dict)  # workers that the relay has not heard of
    unsent: list[Sent] = field(default_factory=list)
    unanswered: dict[int, Ticket] = field(default_factory=dict)


class RelayTransport(RayTransport):
    """Workers as Ray actors, with a relay on each node where there are `least_nodes` nodes or more."""

    def __init__(
        self, spec: object, cluster: Cluster, worker: type[Any] = Worker, least_nodes: int = RELAYED_NODES
    ) -> None:
        super().__init__(spec, cluster, worker)
        self.least_nodes = least_nodes
        self.numbers = itertools.count()
        self.nodes: dict[str, Node] = {}
        self.node_of: dict[Any, Node] = {}  # by worker
        self.calls: dict[Any, Node] = {}  # of relays, in flight, by their references

    @property
    def relayed(self) -> bool:
        """Whether there are relays."""
        return len(self.nodes) >= self.least_nodes

    def answers_per_second(self, method: str) -> float:
        if self.relayed and method == RELAYED_METHOD:
            return RELAYED_ANSWERS_PER_SECOND
        return super().answers_per_second(method)

    def joined(self, worker: ActorHandle[Any], node: str) -> None:
        found = self.node_of[worker] = self.nodes.setdefault(node, Node())
        found.workers[worker] = number = next(self.numbers)
        found.unknown[number] = worker
        for name, other in self.nodes.items() if self.relayed else ():
            if not other.relay:
                there = NodeAffinitySchedulingStrategy(name, soft=False)
                other.relay = ray.remote(Relay).options(num_cpus=0, scheduling_strategy=there).remote()
                self._doubt(other)

    def _doubt(self, node: Node) -> None:
        """Use no relay before it has answered: its process may be starting, or hang."""
        node.up = False
        self.calls[node.relay.answer.remote()] = node

    def submit(self, worker: ActorHandle[Any], method: str, *arguments: Any) -> Any:
        node = self.node_of.get(worker)
        if method != RELAYED_METHOD or not node or not node.up:
            return super().submit(worker, method, *arguments)
        number, ticket = next(self.numbers), Ticket(worker)
        node.unanswered[number] = ticket
        node.unsent.append((number, node.workers[worker], arguments))
        if len(node.unsent) >= len(node.workers):
            self._exchange(node)
        return ticket

    def _exchange(self, node: Node) -> None:
        self.calls[node.relay.exchange.remote(node.unknown, node.unsent)] = node
        node.unknown, node.unsent = {}, []
        node.listening += 1

    def wait(self, references: list[Any], seconds: float) -> list[Any]:
        for node in self.nodes.values():
            if node.unsent or (node.unanswered and not node.listening):
                self._exchange(node)
        if not self.calls:
            return super().wait(references, seconds)
        calls = set(self.calls)
        asked = [*(reference for reference in references if not isinstance(reference, Ticket)), *calls]
        ready = super().wait(asked, seconds)
        if ready and seconds:  # what others have answered meanwhile costs no more
            ready = super().wait(asked, 0)
        done: list[Any] = []
        for reference in ready:
            done += self._hear(reference) if reference in calls else [reference]
        return done

    def _hear(self, call: Any) -> list[Ticket]:
        """The tasks that a call of a relay has answered."""
        node = self.calls.pop(call, None)
        if node is None:
            return []  # lost, a call ago
        try:
            answers = super().result(call)
        except (Lost, Failed) as error:
            return self._lost(node, error)
        if answers is None:
            node.up = True
            return []
        node.listening -= 1
        tickets = []
        for number, answer in answers:
            if ticket := node.unanswered.pop(number, None):  # else its worker was killed since
                ticket.answer = answer
                tickets.append(ticket)
        return tickets

    def _lost(self, node: Node, error: Exception) -> list[Ticket]:
        """A relay is gone, and with it what its workers have answered; the next worker of the node has a new one."""
        tickets = list(node.unanswered.values())
        for ticket in tickets:
            ticket.answer = Lost(f"the relay of its node was lost: {error}")
        self._forget(node)
        node.unknown = {number: worker for worker, number in node.workers.items()}
        return tickets

    def _forget(self, node: Node) -> None:
        if node.relay:
            ray.kill(node.relay)
        node.relay, node.up, node.listening, node.unsent, node.unanswered = None, False, 0, [], {}
        self.calls = {call: other for call, other in self.calls.items() if other is not node}

    def result(self, reference: Any) -> Any:
        if not isinstance(reference, Ticket):
            return super().result(reference)
        if isinstance(reference.answer, Lost | Failed):
            raise reference.answer
        return reference.answer

    def kill(self, worker: ActorHandle[Any]) -> None:
        if node := self.node_of.pop(worker, None):
            number = node.workers.pop(worker)
            node.unknown.pop(number, None)
            node.unsent = [sent for sent in node.unsent if sent[1] != number]
            waited_for = [task for task, ticket in node.unanswered.items() if ticket.worker == worker]
            for task in waited_for:
                del node.unanswered[task]
            if not node.workers:
                self._forget(node)
                self.nodes = {name: other for name, other in self.nodes.items() if other is not node}
            elif waited_for and node.up:
                self._doubt(node)
        super().kill(worker)

    def end(self, workers: list[ActorHandle[Any]]) -> None:
        super().end([*workers, *(node.relay for node in self.nodes.values() if node.relay)])
        self.nodes, self.node_of, self.calls = {}, {}, {}
