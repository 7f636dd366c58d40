"""Workers with a relay on each node of a large Ray: the driver sends and receives the tasks of a node together.

A call of Ray costs its caller about a millisecond, whatever it carries. Everything else works as without relays: the
dispatcher assigns the tasks and handles lost workers. If a relay is lost, its unanswered tasks are sent to the workers
again, directly.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from spartan_ray.distributed.config import Cluster
from spartan_ray.distributed.protocol import Failed, Lost
from spartan_ray.distributed.relay import RELAYED_METHOD, SPEAK_SECONDS, Relay, Sent
from spartan_ray.distributed.transport import ANSWERS_PER_SECOND, RayTransport, actor_name
from spartan_ray.distributed.worker import Worker

# Minimum number of nodes, and of workers per node. With fewer nodes the driver is fast enough; with fewer workers per
# node there is little to send together.
RELAYED_NODES, WORKERS_PER_NODE = 8, 4
# Seconds of waiting after which a relay that has returned nothing, not even an empty list, is taken to hang.
SILENT_SECONDS = 3 * SPEAK_SECONDS
# Answers per second that the driver can receive through relays.
RELAYED_ANSWERS_PER_SECOND = 3000.0


@dataclass(eq=False)
class Ticket:
    """The reference of an answer that comes through a relay, or directly if the relay is lost."""

    worker: Any
    arguments: tuple[Any, ...]
    answered: bool = False
    answer: Any = None
    direct: Any = None


@dataclass(eq=False)
class Node:
    """The driver's record of a node."""

    name: str
    workers: dict[Any, int] = field(default_factory=dict)  # their numbers
    relay: Any = None
    up: bool = False  # the relay has answered
    listening: int = 0  # calls of `exchange` in flight
    heard: float = 0.0  # when the first of them was sent, or the relay last answered
    unknown: dict[int, Any] = field(default_factory=dict)  # workers that the relay does not know yet
    unsent: list[Sent] = field(default_factory=list)
    unanswered: dict[int, Ticket] = field(default_factory=dict)


class RelayTransport(RayTransport):
    """Workers as Ray actors, with a relay on each node if there are at least `least_nodes` nodes, with at least
    `workers_per_node` workers each on average."""

    def __init__(
        self,
        spec: object,
        cluster: Cluster,
        worker: type[Any] = Worker,
        least_nodes: int = RELAYED_NODES,
        workers_per_node: int = WORKERS_PER_NODE,
        name: str = "population",
    ) -> None:
        super().__init__(spec, cluster, worker, name)
        self.least_nodes, self.workers_per_node = least_nodes, workers_per_node
        self.numbers = itertools.count()
        self.nodes: dict[str, Node] = {}
        self.node_of: dict[Any, Node] = {}  # by worker
        self.calls: dict[Any, Node] = {}  # to relays, in flight, by reference
        self.looked = self.now()  # when `wait` last ended

    @property
    def relayed(self) -> bool:
        """Whether there are enough nodes and workers for relays."""
        return self.least_nodes <= len(self.nodes) <= len(self.node_of) / self.workers_per_node

    def answers_per_second(self, method: str) -> float:
        if method == RELAYED_METHOD and self.relayed:
            return RELAYED_ANSWERS_PER_SECOND
        return ANSWERS_PER_SECOND

    def joined(self, worker: ActorHandle[Any], node: str) -> None:
        if worker in self.node_of:
            return
        found = self.node_of[worker] = self.nodes.setdefault(node, Node(node))
        found.workers[worker] = number = next(self.numbers)
        found.unknown[number] = worker
        for other in self.nodes.values() if self.relayed else ():
            if not other.relay:
                self._start_relay(other)

    def _start_relay(self, node: Node) -> None:
        there = NodeAffinitySchedulingStrategy(node.name, soft=False)
        relay: Any = ray.remote(Relay).options(
            name=actor_name(self.name, "relay"), num_cpus=0, scheduling_strategy=there, enable_task_events=False
        )
        node.relay = relay.remote(self.name)
        # The relay is used once it has answered, because its process takes time to start.
        self.calls[node.relay.answer.remote()] = node

    def submit(self, worker: ActorHandle[Any], method: str, *arguments: Any) -> Any:
        node = self.node_of.get(worker)
        if method != RELAYED_METHOD or not node or not node.up:
            return super().submit(worker, method, *arguments)
        number, ticket = next(self.numbers), Ticket(worker, arguments)
        node.unanswered[number] = ticket
        node.unsent.append((number, node.workers[worker], arguments))
        if len(node.unsent) >= len(node.workers):
            self._exchange(node)
        return ticket

    def _exchange(self, node: Node) -> None:
        self.calls[node.relay.exchange.remote(node.unknown, node.unsent)] = node
        node.unknown, node.unsent = {}, []
        node.heard = node.heard if node.listening else self.now()
        node.listening += 1

    def wait(self, references: list[Any], seconds: float) -> list[Any]:
        now = self.now()
        for node in self.nodes.values():
            node.heard += max(0.0, now - max(self.looked, node.heard))  # leave out the time in which nobody listened
            if node.unsent or (node.unanswered and not node.listening):
                self._exchange(node)
        tickets = [reference for reference in references if isinstance(reference, Ticket)]
        if any(ticket.answered for ticket in tickets):
            seconds = 0.0
        # Tickets by the Ray reference that answers them.
        ticket_of = {ticket.direct: ticket for ticket in tickets if ticket.direct}
        calls = set(self.calls)
        asked = [*(reference for reference in references if not isinstance(reference, Ticket)), *ticket_of, *calls]
        ready = super().wait(asked, seconds)
        if ready and calls and seconds:  # take all that is ready; it costs no more
            ready = super().wait(asked, 0)
        for reference in ready:
            if reference in calls:
                self._hear(reference)
        self.looked = self.now()
        for node in self.nodes.values():
            if node.listening and self.looked - node.heard > SILENT_SECONDS:
                self._go_without(node)
        direct = [ticket_of.get(reference, reference) for reference in ready if reference not in calls]
        return direct + [ticket for ticket in tickets if ticket.answered]

    def _hear(self, call: Any) -> None:
        """Take the answer of a call to a relay."""
        node = self.calls.pop(call, None)
        if node is None:
            return  # its relay was dropped at an earlier call
        try:
            answers = super().result(call)
        except (Lost, Failed):
            self._go_without(node)
            return
        if answers is None:
            node.up = True
            return
        node.listening, node.heard = node.listening - 1, self.now()
        for number, answer in answers:
            if ticket := node.unanswered.pop(number, None):  # else its worker was killed meanwhile
                ticket.answered, ticket.answer = True, answer

    def _go_without(self, node: Node) -> None:
        """Drop a relay that is lost or hangs, and repeat its unanswered tasks on the workers directly."""
        tickets, worked = list(node.unanswered.values()), node.up
        self._forget_relay(node)
        node.unknown = {number: worker for worker, number in node.workers.items()}
        for ticket in tickets:
            ticket.direct = super().submit(ticket.worker, RELAYED_METHOD, *ticket.arguments)
        if worked:  # else its node may be gone or full: try again when another worker joins
            self._start_relay(node)

    def _forget_relay(self, node: Node) -> None:
        if node.relay:
            ray.kill(node.relay)
        node.relay, node.up, node.listening, node.unsent, node.unanswered = None, False, 0, [], {}
        self.calls = {call: other for call, other in self.calls.items() if other is not node}

    def result(self, reference: Any) -> Any:
        if not isinstance(reference, Ticket):
            return super().result(reference)
        if reference.direct:
            return super().result(reference.direct)
        if isinstance(reference.answer, Lost | Failed):
            raise reference.answer
        return reference.answer

    def kill(self, worker: ActorHandle[Any]) -> None:
        if node := self.node_of.pop(worker, None):
            number = node.workers.pop(worker)
            node.unknown.pop(number, None)
            node.unsent = [sent for sent in node.unsent if sent[1] != number]
            node.unanswered = {task: one for task, one in node.unanswered.items() if one.worker != worker}
            if not node.workers:
                self._forget_relay(node)
                del self.nodes[node.name]
        super().kill(worker)

    def end(self, workers: list[ActorHandle[Any]]) -> None:
        super().end([*workers, *(node.relay for node in self.nodes.values() if node.relay)])
        self.nodes, self.node_of, self.calls = {}, {}, {}
