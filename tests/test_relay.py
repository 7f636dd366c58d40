"""Relays: the tasks that go through them, and the recovery when a relay is lost or hangs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import ray

from spartan_ray.distributed import relayed
from spartan_ray.distributed.config import Cluster
from spartan_ray.distributed.placement import resolve_cluster
from spartan_ray.distributed.protocol import Failed, Lost
from spartan_ray.distributed.relay import Relay
from spartan_ray.distributed.relayed import RelayTransport, Ticket


class Stub:
    """A worker that returns twice a number after some seconds, and raises for 0."""

    def __init__(self, spec: object) -> None:
        pass

    def join(self) -> int:
        return os.getpid()

    def evaluate(self, number: int, seconds: float = 0.0) -> int:
        time.sleep(seconds)
        if not number:
            raise ValueError("nothing to double")
        return 2 * number


class Named(Stub):
    """A worker that returns Ray's name of the task."""

    def evaluate(self, number: int, seconds: float = 0.0) -> Any:
        return ray.get_runtime_context().get_task_name()


class Pair:
    """Two workers on one node with a running relay."""

    def __init__(self, kind: type[Stub] = Stub) -> None:
        resolved = resolve_cluster(Cluster(workers=2), [{"CPU": 2}])
        self.transport = RelayTransport(None, resolved, kind, least_nodes=1, workers_per_node=1, name="mine")
        node = ray.get_runtime_context().get_node_id()
        started = [self.transport.start() for _ in range(2)]
        self.workers = [worker for worker, _ in started]
        self.pids = [self.transport.result(reference) for _, reference in started]
        for worker in self.workers:
            self.transport.joined(worker, node)
        (self.node,) = self.transport.nodes.values()
        self.wait_for_relay()

    def wait_for_relay(self) -> None:
        for _ in range(20):
            if self.node.up:
                return
            self.transport.wait([], 30)
        raise AssertionError("no relay")

    def relay(self) -> int:
        pid: int = ray.get(self.node.relay.__ray_call__.remote(lambda relay: os.getpid()))
        return pid

    def ask(self, *arguments: Any, worker: int = 0) -> Any:
        return self.transport.submit(self.workers[worker], "evaluate", *arguments)

    def answers(self, references: list[Any], seconds: float = 30) -> list[Any]:
        """Return the answers in the order of the references, with errors as values. Each reference is ready once.

        One wait takes at most `seconds`."""
        waiting, found = set(references), dict[Any, Any]()
        for _ in range(100):
            if not waiting:
                return [found[reference] for reference in references]
            for reference in self.transport.wait(list(waiting), seconds):
                waiting.remove(reference)
                try:
                    found[reference] = self.transport.result(reference)
                except (Lost, Failed) as error:
                    found[reference] = error
        raise AssertionError("no answers")


@pytest.fixture
def pair(local_ray: None) -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.transport.end(pair.workers)


def test_what_goes_through_a_relay_is_answered_and_what_fails_says_so(pair: Pair) -> None:
    references = [pair.ask(number, worker=number % 2) for number in (1, 2, 0, 3, 4)]
    assert all(isinstance(reference, Ticket) for reference in references)
    one, two, failed, *rest = pair.answers(references)
    assert (one, two, rest) == (2, 4, [6, 8])
    assert isinstance(failed, Failed)
    assert str(failed) == "ValueError: nothing to double"
    assert not pair.node.unanswered
    os.kill(pair.pids[0], signal.SIGKILL)
    (lost, alive) = pair.answers([pair.ask(5), pair.ask(6, worker=1)])
    assert isinstance(lost, Lost)
    assert "The actor died" in str(lost)
    assert alive == 12


def test_what_a_lost_relay_had_is_asked_directly_and_another_one_starts(pair: Pair) -> None:
    lost = pair.relay()
    references = [pair.ask(number, 0.1, worker=number % 2) for number in range(1, 9)]
    pair.transport.wait([], 0)  # sends them
    os.kill(lost, signal.SIGKILL)
    assert pair.answers(references) == [2, 4, 6, 8, 10, 12, 14, 16]
    assert any(reference.direct for reference in references)
    pair.wait_for_relay()
    assert pair.relay() != lost
    assert all(psutil.pid_exists(pid) for pid in pair.pids)
    (reference,) = [pair.ask(7)]
    assert isinstance(reference, Ticket)
    assert pair.answers([reference]) == [14]


def test_of_a_relay_that_says_nothing_the_workers_are_asked_directly(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relayed, "SILENT_SECONDS", 2.0)
    hung = psutil.Process(pair.relay())
    hung.suspend()
    references = [pair.ask(number, worker=number % 2) for number in range(4)]
    assert all(isinstance(reference, Ticket) for reference in references)
    failed, *rest = pair.answers(references, seconds=0.5)
    assert isinstance(failed, Failed)
    assert rest == [2, 4, 6]
    assert all(psutil.pid_exists(pid) for pid in pair.pids)
    assert not psutil.wait_procs([hung], timeout=60)[1]
    pair.wait_for_relay()  # the new relay


def test_time_in_which_nobody_listens_does_not_count_as_silence(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = pair.ask(1, 3.0)  # not answered yet at the next wait
    pair.transport.wait([], 0)
    now = pair.transport.now
    monkeypatch.setattr(pair.transport, "now", lambda: now() + 10_000)
    relay = pair.relay()
    assert pair.answers([reference], seconds=0.1) == [2]
    assert pair.relay() == relay
    assert not reference.direct


def test_a_relay_without_answers_says_that_it_is_there(local_ray: None) -> None:
    worker: Any = ray.remote(Stub).options(num_cpus=0).remote(None)
    relay: Any = ray.remote(Relay).options(num_cpus=0).remote("mine")
    assert ray.get(relay.exchange.remote({9: worker}, [(5, 9, (21, 1e6))]), timeout=60) == []
    ray.kill(worker)
    ((number, lost),) = ray.get(relay.exchange.remote({}, []), timeout=60)
    assert number == 5
    assert isinstance(lost, Lost)


def test_a_call_that_overtakes_the_one_with_its_worker_waits_for_it(local_ray: None) -> None:
    worker: Any = ray.remote(Stub).options(num_cpus=0).remote(None)
    relay: Any = ray.remote(Relay).options(num_cpus=0).remote("mine")
    ray.get(relay.answer.remote(), timeout=60)  # it runs, so calls arrive in the order in which they are sent
    early = relay.exchange.remote({}, [(5, 9, (21,))])
    assert not ray.wait([early], timeout=0.5)[0]
    late = relay.exchange.remote({9: worker}, [])
    first, second = ray.get([early, late], timeout=60)
    assert first + second == [(5, 42)]


def test_actors_and_tasks_have_names_that_say_whose_they_are(local_ray: None) -> None:
    pair = Pair(Named)
    try:
        relayed = pair.ask(1)
        pair.node.up = False
        direct = pair.ask(1)
        assert isinstance(relayed, Ticket)
        assert not isinstance(direct, Ticket)
        assert pair.answers([relayed, direct]) == ["spartan:mine:evaluate"] * 2
        mine = [name.split(":")[2] for name in ray.util.list_named_actors() if name.startswith("spartan:mine:")]
        assert sorted(mine) == ["relay", "worker", "worker"]
    finally:
        pair.transport.end(pair.workers)


def test_relays_are_for_many_workers_on_many_nodes(local_ray: None) -> None:
    resolved = resolve_cluster(Cluster(workers=2), [{"CPU": 2}])
    transport = RelayTransport(None, resolved, Stub, least_nodes=2, workers_per_node=2)
    transport._start_relay = lambda node: setattr(node, "relay", "started")  # type: ignore[method-assign]
    direct = transport.answers_per_second("evaluate")
    for number, (node, pays) in enumerate([("a", False), ("a", False), ("b", False), ("b", True), ("c", False)]):
        transport.joined(f"worker {number}", node)  # type: ignore[arg-type]
        assert (transport.answers_per_second("evaluate") > direct) == pays
        assert transport.answers_per_second("accumulate") == direct
    assert [node.relay for node in transport.nodes.values()] == ["started", "started", None]


def test_the_relays_end_with_the_workers(pair: Pair) -> None:
    processes = [psutil.Process(pid) for pid in (pair.relay(), *pair.pids)]
    pair.transport.end(pair.workers)
    assert not psutil.wait_procs(processes, timeout=60)[1]
