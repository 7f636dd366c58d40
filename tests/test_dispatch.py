"""Tests of dispatch on scripted workers. Each member counts once, even if workers die, hang, fail, join and leave."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import CHUNK, FINGERPRINT, Answer, Process, Scripted, Team, scores, weighted_sum, without

from spartan_ray.distributed.dispatch import FAILURES_PER_WORKER, TRIES, PoolError, backoff
from spartan_ray.distributed.joining import versions
from spartan_ray.distributed.pool import Kind, _either
from spartan_ray.distributed.protocol import Failed, Lost
from spartan_ray.distributed.slots import Slot, may_do
from spartan_ray.distributed.spans import Span
from spartan_ray.engine.strategies.requests import WHOLE, Members, Scores, noisy
from spartan_ray.errors import RunError

MEMBERS = Members(
    np.arange(40, dtype=np.uint64) // 3,
    np.zeros(40, np.float32),
    np.tile(np.array([0.05, -0.05, 0, 0.05], np.float32), 10),
)
SEEDS, WEIGHTS, SIZE = np.array([3, 9], np.uint64), np.array([0.5, -2], np.float32), 101


def same(found: Scores, expected: Scores) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(vars(found).values(), vars(expected).values(), strict=True))


def ends_well(team: Team) -> bool:
    """Return whether each member of an evaluation and each element of an update counts once."""
    team.done = 0
    right = same(team.pool.evaluate(MEMBERS), scores(MEMBERS)) and team.done == len(MEMBERS)
    sum_D = team.pool.weighted_sum(SEEDS, WEIGHTS, 0, SIZE)
    return right and sum_D.tobytes() == weighted_sum(SEEDS, WEIGHTS, SIZE).tobytes()


@pytest.mark.parametrize("room", [1, 2, 5])
@pytest.mark.parametrize("chunk", [1, 7, 1000, "auto"])
def test_chunks_of_any_size_on_any_number_of_workers_give_the_same_answer(room: int, chunk: Any) -> None:
    team = Team(Scripted(room), chunk=chunk)
    assert ends_well(team)
    assert team.pool.counts["broadcast_seconds"] == 0.25  # of the worker that loads slowest
    assert not team.notes


def test_automatic_chunks_fill_whole_passes() -> None:
    """Only one chunk of each evaluation has members that do not fill a pass."""
    team = Team(Scripted(2))
    team.pool.batch_members = 8
    for _ in range(2):
        team.pool.evaluate(MEMBERS[:37])
    sizes = [size for method, size in team.transport.sent if method == "evaluate"]
    assert [size for size in sizes if size % 8] == [5, 5]


def test_a_killed_worker_s_chunks_are_done_again_and_it_is_replaced() -> None:
    team = Team(Scripted(2), chunk=4)
    team.pool.wait_until_joined()
    before = {info.pid for info in team.pool.infos}

    def kill() -> None:
        if team.done >= 8:
            team.transport.die(team.transport.processes[0])

    team.disturb = kill
    assert ends_well(team)
    assert team.pool.counts["retries"] == 2  # its running task and its queued task
    assert team.notes == ["worker 1 on host (cpu) was lost and is replaced: a signal"]
    team.pool.wait_until_joined()
    assert len({info.pid for info in team.pool.infos} & before) == 1
    assert len(team.pool.infos) == 2


def test_what_a_stopped_worker_had_is_done_by_the_other_and_its_late_answer_dropped() -> None:
    """The worker answers again while the range is still being covered. Its members count once."""
    team = Team(Scripted(2), chunk=1)
    assert ends_well(team)  # otherwise no task would be known to be late
    slot = team.pool.dispatcher.slots[0]
    stopped: list[Any] = []

    def disturb() -> None:
        if team.done == 8 and len(slot.tasks) == 2 and not stopped:
            stopped.append(team.transport.freeze(slot.worker))
        elif len(stopped) == 1 and any(task.span.done for task in slot.tasks):
            stopped.append(stopped[0]())

    team.disturb = disturb
    assert ends_well(team)
    assert len(stopped) == 2
    assert team.pool.counts["late_results"] >= 1
    assert team.pool.counts["retries"] == 0
    assert slot in team.pool.dispatcher.slots


def test_a_worker_that_is_stuck_in_an_update_does_not_hold_up_what_follows() -> None:
    """The worker is also not replaced as hanging if it answered while the pool did not look."""
    team = Team(Scripted(2), task_timeout=60.0)
    assert ends_well(team)
    go_on = team.transport.freeze(team.transport.processes[0])
    for _ in range(2):
        assert ends_well(team)
    go_on()
    team.transport.clock += 3600
    assert ends_well(team)
    assert team.pool.counts["late_results"] >= 1
    assert not team.notes


def test_an_answer_that_is_brought_late_is_no_hang_of_its_worker() -> None:
    """A relay sends its answers only after it is asked, so only the second look finds the answer."""
    team = Team(Scripted(2), task_timeout=60.0)
    assert ends_well(team)
    go_on = team.transport.freeze(team.transport.processes[0])
    assert ends_well(team)
    go_on()
    team.transport.clock += 3600
    wait = team.transport.wait
    team.transport.wait = lambda references, seconds: wait(references, seconds) if seconds else []  # type: ignore[method-assign]
    assert ends_well(team)
    assert team.pool.counts["late_results"] >= 1
    assert not team.notes


def test_a_worker_that_hangs_is_replaced() -> None:
    team = Team(Scripted(2), chunk=5, task_timeout=4.0)
    team.pool.wait_until_joined()
    team.transport.freeze(team.transport.processes[1])
    assert ends_well(team)
    while not team.notes:
        assert ends_well(team)
    assert team.notes == [
        "worker 2 on host (cpu) was lost and is replaced: no answer for 4 s or more (cluster.task_timeout)"
    ]


@pytest.mark.parametrize("where", ["join", "evaluate"])
def test_a_doubted_worker_that_hangs_is_replaced_too(where: str) -> None:
    def broken(process: Process, method: str, arguments: tuple[Any, ...]) -> Any:
        if process.pid == 1 and method == where and (method != "join" or team.notes):
            process.factor = math.inf if where == "join" else 1.0
        if process.pid == 1 and method == "evaluate":
            return lambda answer: (without(answer[0], np.ones(len(answer[0]), bool)), *answer[1:])
        return None

    team = Team(Scripted(2, broken), chunk=5, task_timeout=4.0)
    assert ends_well(team)
    while where == "join" and len(team.transport.processes) < 3:
        assert ends_well(team)
    assert (len(team.transport.processes) == 3) == (where == "join")


@pytest.mark.parametrize("broken_pid", [1, 2])
def test_of_two_that_answer_nan_each_member_counts_that_is_finite_in_one(broken_pid: int) -> None:
    """If both answers contain NaN, each member gets the score of the answer in which it is finite."""

    def broken(process: Process, method: str, arguments: tuple[Any, ...]) -> Any:
        if method != "evaluate":
            return None
        nowhere_K = (arguments[CHUNK].seed_K == 7) | (process.pid == broken_pid)
        return lambda answer: (without(answer[0], nowhere_K), *answer[1:])

    team = Team(Scripted(2, broken), chunk=5)
    team.pool.wait_until_joined()
    assert same(team.pool.evaluate(MEMBERS), without(scores(MEMBERS), MEMBERS.seed_K == 7))


@pytest.mark.parametrize("right", [True, False])
def test_a_worker_that_alone_answers_nan_joins_again_and_what_two_answer_counts(right: bool) -> None:
    """The worker is replaced if its noise has changed. Otherwise, a message says that the fitness differs."""

    def broken(process: Process, method: str, arguments: tuple[Any, ...]) -> Any:
        if method == "join" and not right and process.pid == 1 and team.notes:
            return lambda info: replace(info, fingerprint=info.fingerprint + 1)
        if method != "evaluate":
            return None
        nowhere_K = (arguments[CHUNK].seed_K == 7) | (process.pid == 1)
        return lambda answer: (without(answer[0], nowhere_K), *answer[1:])

    team = Team(Scripted(2, broken), chunk=5)
    team.pool.wait_until_joined()
    found, expected = team.pool.evaluate(MEMBERS), without(scores(MEMBERS), MEMBERS.seed_K == 7)
    assert same(found, expected)
    team.pool.wait_until_joined()
    assert team.notes == [
        "worker 1 on host (cpu) returned NaN where worker 2 on host (cpu) does not: its noise is checked again",
        "worker 1 on host (cpu) computes the right noise: the fitness differs between workers"
        if right
        else "worker 1 on host (cpu) was lost and is replaced: its noise fingerprint differs",
    ]
    for process in team.transport.alive()[1:]:
        team.transport.die(process)  # a NaN of the first worker alone does not count
    assert same(team.pool.evaluate(MEMBERS[:1]), expected[:1])


def test_one_who_was_wrong_before_and_is_left_alone_makes_room_for_another() -> None:
    def broken(process: Process, method: str, arguments: tuple[Any, ...]) -> Any:
        nan = method == "evaluate" and process.pid == 1
        return (lambda answer: (without(answer[0], np.ones(len(answer[0]), bool)), *answer[1:])) if nan else None

    team = Team(Scripted(2, broken), chunk=5, worker_timeout=600.0)
    assert ends_well(team)
    team.pool.wait_until_joined()
    dispatcher, transport = team.pool.dispatcher, team.transport
    dispatcher.cluster = dispatcher.cluster.model_copy(update={"workers": "auto"})
    transport.workers = 1
    (other,) = (slot for slot in dispatcher.slots if not slot.doubted)
    dispatcher._remove(other)  # as if its node had left, with room for one worker
    assert ends_well(team)
    assert [process.pid for process in transport.alive()] == [3]


def test_a_doubted_worker_of_wrong_noise_takes_no_span_with_it() -> None:
    """The worker's answers are ready but not collected when it joins again."""

    def broken(process: Process, method: str, arguments: tuple[Any, ...]) -> Any:
        if method == "join" and process.pid == 1 and team.notes:
            return lambda info: replace(info, fingerprint=info.fingerprint + 1)
        nan = method == "evaluate" and process.pid == 1
        process.factor = 4.0 if process.pid == 1 else 1.0
        return (lambda answer: (without(answer[0], np.ones(len(answer[0]), bool)), *answer[1:])) if nan else None

    team = Team(Scripted(2, broken), chunk=2)
    team.pool.wait_until_joined()
    wait = team.transport.wait

    def late(references: list[Answer], seconds: float) -> list[Answer]:
        """Once the worker is doubted, skip 20 seconds and return all answers that are ready, newest first."""
        if not team.notes:
            return wait(references, seconds)
        team.transport.clock += 20.0 if seconds else 0.0
        ready = [answer for answer in references if answer.ready <= team.transport.clock]
        return ready[::-1] or wait(references, seconds)

    team.transport.wait = late  # type: ignore[method-assign]
    assert ends_well(team)
    team.pool.wait_until_joined()
    assert any("noise fingerprint differs" in note for note in team.notes)


@pytest.mark.parametrize("room", [1, 3])
def test_a_member_for_which_the_fitness_raises_is_tried_elsewhere_and_costs_no_worker(room: int) -> None:
    """Member 5 raises on every worker. Member 9 raises on one of several workers."""
    asked: list[tuple[int, int]] = []

    def raising(process: Process, method: str, arguments: tuple[Any, ...]) -> Any:
        if method != "evaluate":
            return None
        seed_K = arguments[CHUNK].seed_K
        asked.extend((process.pid, seed) for seed in seed_K.tolist() if seed in (5, 9))
        bad_K = (seed_K == 5) | ((seed_K == 9) & (process.pid == 1) & (room > 1))
        failed = {int(k): f"ValueError: seed {seed_K[k]}" for k in np.flatnonzero(bad_K)}
        return lambda answer: (without(answer[0], bad_K), failed, *answer[2:])

    team, members = Team(Scripted(room, raising), chunk=4), noisy(np.arange(40, dtype=np.uint64), 0.0, 0.05)
    assert same(team.pool.evaluate(members), without(scores(members), members.seed_K == 5))
    said = "the member of seed 5 failed on 3 workers and is scored worst: ValueError: seed 5"
    assert team.notes == [said]
    assert team.pool.counts["members_failed"] == 1
    assert len({pid for pid, seed in asked if seed == 5}) == room
    assert sum(seed == 5 for _, seed in asked) == TRIES
    with pytest.raises(RunError, match="the member of seed 5 failed on 3 workers: ValueError: seed 5"):
        Team(Scripted(room, raising), on_member_error="stop").pool.evaluate(members)


def test_workers_that_died_while_nobody_looked_are_no_failures() -> None:
    """So many failures would end a run. The parent, as the only member, is sent to one dead worker after another."""
    team = Team(Scripted(8))
    for _ in range(4):
        assert ends_well(team)
        for process in team.transport.alive():
            team.transport.die(process)
        parent = noisy(np.array([5], np.uint64), 0.0, 0.0)
        assert same(team.pool.evaluate(parent), scores(parent))
    assert ends_well(team)
    assert team.pool.counts["members_failed"] == 0


@given(st.integers(0, 2**32), st.integers(1, 6), st.sampled_from([1, 3, "auto"]), st.floats(0.2, 5))
def test_a_storm_of_kills_costs_time_alone(seed: int, room: int, chunk: Any, seconds: float) -> None:
    """For a minute, a worker is killed at fixed intervals: as it starts, works or waits. A start takes 3 seconds."""
    chance, team = random.Random(seed), Team(Scripted(room), chunk=chunk)

    def kill() -> None:
        if alive := team.transport.alive():
            team.transport.die(chance.choice(alive))

    team.transport.events += [(number * seconds, kill) for number in range(int(60 / seconds))]
    while team.transport.events:
        assert ends_well(team)
        team.transport.wait([], chance.uniform(0, 5))  # time for SGD
    assert ends_well(team)
    assert team.pool.counts["members_failed"] == 0


@pytest.mark.parametrize("gain", [0.05, 0.0])
def test_all_workers_die_at_once_as_a_node_takes_them_along(gain: float) -> None:
    """The last member runs on one of the workers. It is then sent to the others, which are already dead."""

    def slow(process: Process, method: str, arguments: tuple[Any, ...]) -> None:
        if method == "evaluate" and 39 in arguments[CHUNK].seed_K:
            process.free = max(process.free, team.transport.clock) + 5

    def end() -> None:
        if team.done == 39 and not team.pool.counts["retries"]:
            for process in team.transport.alive():
                team.transport.die(process)

    team, members = Team(Scripted(4, slow), chunk=1), noisy(np.arange(40, dtype=np.uint64), 0.0, gain)
    team.disturb = end
    assert same(team.pool.evaluate(members), scores(members))
    assert team.pool.counts["retries"] >= 3


@given(st.integers(0, 2**32), st.integers(1, 4))
def test_a_member_that_is_nan_and_workers_that_say_so_now_and_then_while_some_are_killed(seed: int, room: int) -> None:
    """A member that is NaN on every worker stays NaN, no member is given up, and the evaluation ends."""
    chance = random.Random(seed)

    def sometimes(process: Process, method: str, arguments: tuple[Any, ...]) -> Any:
        if method != "evaluate":
            return None
        nowhere_K = (arguments[CHUNK].seed_K == 7) | (chance.random() < 0.3 and room > 1)
        return lambda answer: (without(answer[0], nowhere_K), *answer[1:])

    team = Team(Scripted(room, sometimes), chunk=chance.choice([1, 4]))
    team.transport.events += [
        (chance.uniform(0, 20), lambda: team.transport.die(chance.choice(team.transport.alive() or [Process(0)])))
        for _ in range(3)
    ]
    found = team.pool.evaluate(MEMBERS)
    assert np.isnan(found.fitness_K[MEMBERS.seed_K == 7]).all()
    assert team.pool.counts["members_failed"] == 0


def killer(*seeds: int) -> Any:
    """Return a script in which the members with these seeds kill the worker that scores them."""

    def script(process: Process, method: str, arguments: tuple[Any, ...]) -> Any:
        deadly = method == "evaluate" and set(arguments[CHUNK].seed_K.tolist()) & set(seeds)
        return Lost("out of memory") if deadly else None

    return script


@pytest.mark.parametrize("room", [1, 2, 5])
@pytest.mark.parametrize("seeds", [(5,), (5, 6), (0, 20, 39), tuple(range(3, 40, 3))])
@pytest.mark.parametrize("chunk", [1, "auto"])
def test_a_member_that_kills_again_and_again_is_named_and_scored_worst(room: int, seeds: Any, chunk: Any) -> None:
    team, members = Team(Scripted(room, killer(*seeds)), chunk=chunk), noisy(np.arange(40, dtype=np.uint64), 0.0, 0.05)
    found = team.pool.evaluate(members)
    assert np.flatnonzero(np.isnan(found.fitness_K)).tolist() == list(seeds)
    assert team.pool.counts["members_failed"] == len(seeds)
    said = [note for note in team.notes if "scored worst" in note]
    assert sorted(said) == sorted(
        f"the member of seed {seed} failed on 3 workers and is scored worst: out of memory" for seed in seeds
    )
    with pytest.raises(RunError, match="the parent, or its update, failed on 3 workers: out of memory"):
        # A member without noise is the parent or its update. The phase needs its score.
        Team(Scripted(room, killer(5))).pool.evaluate(noisy(np.array([5], np.uint64), 0.0, 0.0))


def test_a_member_whose_work_raises_is_named_and_scored_worst_or_ends_the_run() -> None:
    def poison(process: Process, method: str, arguments: tuple[Any, ...]) -> Any:
        return Failed("FloatingPointError: broken") if method == "evaluate" and 5 in arguments[CHUNK].seed_K else None

    team, members = Team(Scripted(2, poison)), noisy(np.array([4, 5, 6, 7], np.uint64), 0.0, 0.05)
    assert np.isnan(team.pool.evaluate(members).fitness_K).tolist() == [False, True, False, False]
    assert team.pool.counts["members_failed"] == 1
    said = "the member of seed 5 failed on 3 workers and is scored worst: FloatingPointError: broken"
    assert [note for note in team.notes if "scored worst" in note] == [said]
    assert sum("is replaced" in note for note in team.notes) >= TRIES
    stopping = Team(Scripted(2, poison), on_member_error="stop")
    with pytest.raises(RunError, match="the member of seed 5 failed on 3 workers: FloatingPointError"):
        stopping.pool.evaluate(members)


@pytest.mark.parametrize("chunk", [1, "auto"])
@pytest.mark.parametrize("room", [1, 2])
def test_many_members_whose_work_raises_are_all_scored_worst(room: int, chunk: Any) -> None:
    bad = set(range(20, 600, 25))

    def poison(process: Process, method: str, arguments: tuple[Any, ...]) -> Any:
        raises = method == "evaluate" and bad & set(arguments[CHUNK].seed_K.tolist())
        return Failed("FloatingPointError: broken") if raises else None

    team, members = Team(Scripted(room, poison), chunk=chunk), noisy(np.arange(600, dtype=np.uint64), 0.0, 0.05)
    assert set(np.flatnonzero(np.isnan(team.pool.evaluate(members).fitness_K))) == bad


def test_workers_that_cannot_start_end_the_run_with_the_reason() -> None:
    def broken(process: Process, method: str, arguments: tuple[Any, ...]) -> Any:
        return Failed("RuntimeError: negative dimension")

    team = Team(Scripted(3, broken))
    with pytest.raises(PoolError, match="the workers fail one after another; the last one: RuntimeError: negative"):
        team.pool.wait_until_joined()
    assert len(team.transport.processes) <= FAILURES_PER_WORKER * 3 + 2


@pytest.mark.parametrize("at_start", [True, False])
def test_kills_without_end_end_the_run_when_nothing_was_done_for_too_long(at_start: bool) -> None:
    """Either no worker joins, or every other worker joins and is killed before it completes anything."""
    team = Team(Scripted(1), worker_timeout=90.0)
    assert ends_well(team)
    began = team.transport.clock

    def kill() -> None:
        for slot in team.pool.dispatcher.slots:
            if at_start or slot.worker.pid % 2 or (slot.tasks and slot.info):
                team.transport.die(slot.worker)

    team.disturb = kill
    said = "no worker for 90 s" if at_start else "no worker got anything done for 90 s"
    with pytest.raises(PoolError, match=rf"^{said} \(cluster\.worker_timeout\); the last one: a signal$"):
        team.pool.weighted_sum(SEEDS, WEIGHTS, 0, 5000)
    assert 90 < team.transport.clock - began < 100
    assert any(note.endswith("each, for 90 s at most (cluster.worker_timeout)") for note in team.notes)


def test_long_work_is_waited_for() -> None:
    team = Team(Scripted(2), worker_timeout=10.0, task_timeout=2000.0)
    team.pool.wait_until_joined()
    for process in team.transport.alive():
        process.factor = 1000.0
    assert ends_well(team)
    assert not team.notes


def test_a_worker_that_is_killed_after_long_work_was_not_waited_for() -> None:
    team = Team(Scripted(1), worker_timeout=60.0)
    team.pool.wait_until_joined()
    (process,) = team.transport.alive()
    process.factor = 1000.0
    team.transport.events.append((team.transport.clock + 90, lambda: team.transport.die(process)))
    assert ends_well(team)
    assert team.notes == ["worker 1 on host (cpu) was lost and is replaced: a signal"]


def test_a_worker_that_has_joined_is_not_blamed_while_there_is_nothing_to_do() -> None:
    """The other worker never starts."""
    team = Team(Scripted(2, lambda process, method, _: None), worker_timeout=10.0)
    team.pool.dispatcher._tend()
    team.transport.freeze(team.transport.processes[1])
    team.pool.wait_until_joined()
    assert team.notes == ["1 of 2 workers have started; the others join when they can"]
    assert ends_well(team)


def test_a_place_where_workers_go_again_and_again_is_filled_after_longer_and_longer_pauses() -> None:
    assert [backoff(failures) for failures in (0, 1, 2, 3, 6, 7, 99)] == [0, 1, 2, 4, 30, 30, 30]
    team = Team(Scripted(2))
    team.pool.wait_until_joined()
    dispatcher = team.pool.dispatcher
    for failures in (1, 2):
        dispatcher._fail(dispatcher.slots[-1 if failures == 2 else 0], Lost("it broke"))
        ((when, place, count),) = dispatcher.starts
        assert (when - team.transport.clock, place, count) == (failures - 1, 0, failures)
        if failures == 1:
            team.pool.wait_until_joined()
    assert team.notes[-1].endswith("was lost and is replaced in 1 s: it broke")
    # The worker in the other place succeeds. This does not shorten the pause in place 0.
    three = MEMBERS[0:3]
    assert same(team.pool.evaluate(three), scores(three))
    assert [start[1:] for start in dispatcher.starts] == [(0, 2)]
    team.pool.wait_until_joined()
    assert ends_well(team)
    assert [slot.failures for slot in dispatcher.slots] == [0, 0]  # reset by a success


def test_what_failed_in_one_place_is_done_in_another() -> None:
    first, second = Slot(None, 0), Slot(None, 1)
    span = Span(0, 4, failed_on=[first.place])
    assert not may_do(span, first, [second])
    assert may_do(span, second, [first])
    assert may_do(span, first, [])
    span.failed_on.append(second.place)
    assert may_do(span, first, [second])
    unconfirmed = Span(0, 4, unconfirmed=second)
    assert not may_do(unconfirmed, second, [first])
    assert may_do(unconfirmed, second, [])


@pytest.mark.parametrize(("differs", "said"), [
    ({"fingerprint": np.zeros_like(FINGERPRINT)}, "its noise fingerprint differs"),
    ({"versions": versions() | {"torch": "1.0"}}, f"torch 1.0, here {versions()['torch']}"),
])  # fmt: skip
def test_a_worker_that_computes_otherwise_is_refused_by_name(differs: dict[str, Any], said: str) -> None:
    def other(process: Process, method: str, arguments: tuple[Any, ...]) -> Any:
        return (lambda info: replace(info, **differs)) if method == "join" and process.pid in others else None

    others = {2}
    team = Team(Scripted(2, other))
    assert ends_well(team)
    assert team.notes == [f"refused worker 2 on host (cpu): {said}"]
    others = {1, 2}
    with pytest.raises(PoolError, match="no workers are left: refused worker"):
        Team(Scripted(2, other)).pool.evaluate(MEMBERS)


def test_workers_follow_the_nodes_and_a_refused_one_is_not_missed_while_its_node_is_there() -> None:
    def other(process: Process, method: str, arguments: tuple[Any, ...]) -> Any:
        if method != "join":
            return None
        return {
            1: lambda info: replace(info, device="H100"),
            2: lambda info: replace(info, versions=versions() | {"torch": "1.0"}, node="odd"),
        }.get(process.pid)

    team = Team(Scripted(2, other))
    transport, dispatcher = team.transport, team.pool.dispatcher
    transport.up = {"node", "odd"}
    dispatcher.cluster = dispatcher.cluster.model_copy(update={"workers": "auto"})

    def workers() -> list[int]:
        transport.clock += 10
        assert ends_well(team)
        team.pool.wait_until_joined()
        return [info.pid for info in team.pool.infos]

    assert workers() == [1]
    transport.up = {"node"}
    assert workers() == [1, 3]
    assert team.notes[-1] == "worker 3 on host (cpu) is unlike the others (H100): bits of scores depend on the worker"
    transport.workers = 4
    assert workers() == [1, 3, 4, 5]
    transport.workers = 2  # workers stay until their node leaves
    assert workers() == [1, 3, 4, 5]


def test_a_worker_whose_node_is_about_to_go_gets_no_more_work_unless_nobody_else_is_there() -> None:
    def move(process: Process, method: str, arguments: tuple[Any, ...]) -> Any:
        return (lambda info: replace(info, node="spot")) if method == "join" and process.pid == 2 else None

    team = Team(Scripted(2, move), chunk=4)
    transport = team.transport
    team.pool.wait_until_joined()

    def at_work() -> set[int]:
        """Check the nodes, and return the workers that then take part in an evaluation and an update."""
        transport.clock += 10
        team.pool.dispatcher._tend()
        asked = set()
        transport.script = lambda process, method, _: asked.add(process.pid)
        assert ends_well(team)
        return asked

    assert at_work() == {1, 2}
    transport.leaving, transport.workers = {"spot"}, 1
    assert at_work() == {1}
    assert team.notes == ["workers on draining nodes, which get no more work: 1"]
    transport.workers = 2  # there is room for another worker on another node
    assert at_work() == {1, 3}
    transport.leaving = {"spot", "node"}
    assert at_work() >= {1, 2, 3}
    transport.leaving = set()
    assert at_work() >= {1, 2, 3}


def test_workers_that_start_where_a_node_stays_are_not_given_up_for_those_of_one_that_goes() -> None:
    def move(process: Process, method: str, arguments: tuple[Any, ...]) -> Any:
        if method != "join" or process.pid > 2:
            return None
        return lambda info: replace(info, node="spot")

    team = Team(Scripted(2, move), chunk=4)
    transport, dispatcher = team.transport, team.pool.dispatcher
    transport.up = {"node", "spot"}
    dispatcher.cluster = dispatcher.cluster.model_copy(update={"workers": "auto"})
    team.pool.wait_until_joined()
    transport.workers = 4
    transport.clock += 10
    dispatcher._tend()  # two more workers are due
    transport.clock += 10
    dispatcher._tend()
    assert [slot.info is None for slot in dispatcher.slots].count(True) == 2
    transport.workers, transport.leaving = 2, {"spot"}
    transport.clock += 10
    dispatcher._tend()
    team.pool.wait_until_joined()
    assert [(info.pid, info.node) for info in team.pool.infos] == [(3, "node"), (4, "node"), (1, "spot"), (2, "spot")]


def test_the_first_worker_is_waited_for_without_end_and_a_line_a_minute_says_so() -> None:
    team = Team(Scripted(2, lambda process, method, _: None), worker_timeout=10.0)
    team.pool.dispatcher._tend()
    go_on = [team.transport.freeze(process) for process in team.transport.processes]
    team.transport.events.append((1000.0, lambda: [come() for come in go_on]))  # type: ignore[arg-type]
    team.pool.wait_until_joined()
    assert team.transport.clock >= 1000
    waiting = [note for note in team.notes if note.startswith("no workers: ")]
    assert set(waiting) == {"no workers: waiting for room for 2 workers with 1 CPUs and 0 GPUs each"}
    assert 15 <= len(waiting) <= 17
    assert ends_well(team)


def test_a_request_that_no_node_can_meet_ends_the_run_within_a_minute() -> None:
    team = Team(Scripted(1, lambda process, method, _: None))
    team.pool.dispatcher._tend()
    team.transport.freeze(team.transport.processes[0])
    team.transport.never = "no node of this Ray has 1 CPUs and 9 GPUs"
    with pytest.raises(PoolError, match=r"^no node of this Ray has 1 CPUs and 9 GPUs$"):
        team.pool.wait_until_joined()
    assert team.transport.clock < 60


def test_so_many_workers_as_a_range_begins_with_are_waited_for() -> None:
    team = Team(Scripted(3))
    dispatcher, transport = team.pool.dispatcher, team.transport
    dispatcher.cluster = dispatcher.cluster.model_copy(update={"workers": "2..3"})
    dispatcher._tend()
    transport.freeze(transport.processes[0])
    go_on = transport.freeze(transport.processes[1])
    transport.events.append((100.0, go_on))
    team.pool.wait_until_joined()
    assert transport.clock >= 100
    assert {info.pid for info in team.pool.infos} == {2, 3}
    assert team.notes == ["2 of 3 workers have started; the others join when they can"]


def test_a_slow_worker_has_smaller_chunks_and_a_small_update_fewer_slices() -> None:
    team = Team(Scripted(2))
    pool = team.pool
    pool.wait_until_joined()
    slots = pool.dispatcher.slots
    kind: Kind = "fitness", WHOLE, None, False
    slots[0].paces[kind], slots[1].paces[kind] = 0.5, 0.1
    pace = pool._pace(kind)
    assert pace == pytest.approx(1 / 6)
    assert [pool._chunk_size(1000, kind, pace, slot, 1000) for slot in slots] == [4, 20]
    assert [pool._chunk_size(1000, ("search", *kind[1:]), None, slot, 1000) for slot in slots] == [1, 1]
    assert same(pool.evaluate(MEMBERS), scores(MEMBERS))
    assert [slot.paces for slot in slots] == [{kind: 0.125}, {kind: 0.125}]
    team.transport.sent.clear()
    for seconds_per_noise in (0.0, 1.0, 1e-12):
        pool.seconds_per_noise = seconds_per_noise
        assert pool.weighted_sum(SEEDS, WEIGHTS, 0, SIZE).tobytes() == weighted_sum(SEEDS, WEIGHTS, SIZE).tobytes()
    assert team.transport.sent == [("accumulate", size) for size in (51, 50, 51, 50, 101)]


ITEMS = [float(number) for number in range(9)]
TWICE = [2 * item for item in ITEMS]


@pytest.mark.parametrize("chunk", [4, "auto"])
def test_each_of_some_items_is_answered_once_and_in_order(chunk: Any) -> None:
    team = Team(Scripted(2), chunk=chunk)
    for at_once in (None, 1):
        team.transport.sent.clear()
        team.done = 0
        assert team.pool.each("0.5", ITEMS, cases=3, at_once=at_once) == TWICE
        sizes = [size for _, size in team.transport.sent]
        assert sizes == ([4, 4, 1] if chunk == 4 and not at_once else [1] * 9)
        assert team.done == 9
    assert team.pool.each("0", ITEMS) == TWICE
    assert team.done == 9  # items without cases do not count as progress


def test_work_of_which_nothing_is_known_may_take_long_and_what_is_known_may_not() -> None:
    """An epoch of 40,000 images takes longer than the task timeout. Then a worker hangs."""
    team = Team(Scripted(2), task_timeout=600)
    assert team.pool.each("2000", ITEMS, cases=40_000, at_once=1) == TWICE
    assert not team.notes
    team.transport.freeze(team.transport.alive()[0])
    assert team.pool.each("2000", ITEMS + ITEMS, cases=40_000, at_once=1) == TWICE + TWICE
    assert any("no answer for 600 s or more" in note for note in team.notes)


def test_an_answer_that_is_not_finite_counts_when_a_second_worker_gives_it() -> None:
    def script(process: Process, method: str, arguments: tuple[Any, ...]) -> Any:
        if method == "ask" and (process.pid == 1 or 5.0 in arguments[1]):
            return lambda answer: [float("nan")] * len(answer)
        return None

    team = Team(Scripted(2, script))
    found = team.pool.each("1", ITEMS, at_once=1, is_finite=np.isfinite)
    assert np.array_equal(found, [*TWICE[:5], float("nan"), *TWICE[6:]], equal_nan=True)
    assert any("returned NaN where" in note for note in team.notes)


def test_what_fails_on_three_workers_has_the_answer_that_is_made_of_the_reason_or_ends_the_run() -> None:
    def script(process: Process, method: str, arguments: tuple[Any, ...]) -> Any:
        return Failed("ValueError: too large") if method == "ask" and 5.0 in arguments[1] else None

    team = Team(Scripted(3, script))
    found = team.pool.each("1", ITEMS, give_up=lambda reason: reason)
    assert found == [*TWICE[:5], "ValueError: too large", *TWICE[6:]]
    with pytest.raises(PoolError, match="1 failed on 3 workers: ValueError: too large"):
        Team(Scripted(3, script)).pool.each("1", ITEMS)


def test_an_offspring_that_cannot_be_scored_is_the_worst_or_ends_the_run() -> None:
    one = noisy(np.array([7], np.uint64), 0.0, 0.1)
    team = Team(Scripted(1))
    team.pool.could_not_score(one, "no memory")
    assert team.notes == ["the member of seed 7 failed and is scored worst: no memory"]
    assert team.pool.counts["members_failed"] == 1
    with pytest.raises(RunError, match="the member of seed 7 failed: no memory"):
        Team(Scripted(1), on_member_error="stop").pool.could_not_score(one, "no memory")


def test_chunks_are_for_the_workers_that_are_there() -> None:
    """A refused worker has no share of the members, which the others would have to score at the end."""

    def other_noise(process: Process, method: str, arguments: tuple[Any, ...]) -> Any:
        if method == "join" and process.pid == 3:
            return lambda info: replace(info, fingerprint=info.fingerprint + 1)
        return None

    transport = Scripted(3, other_noise)
    team = Team(transport)
    team.pool.wait_until_joined()
    assert (team.pool.dispatcher.size, team.pool.workers) == (3, 2)
    assert same(team.pool.evaluate(MEMBERS), scores(MEMBERS))
    assert team.pool.dispatcher.able == 2


def test_of_two_answers_a_member_that_was_finite_in_one_has_not_failed() -> None:
    nan_K = np.isin(MEMBERS.seed_K, [3, 7])
    first, second = without(scores(MEMBERS), MEMBERS.seed_K == 7), without(scores(MEMBERS), nan_K)
    raised = {int(k): "it broke" for k in np.flatnonzero(nan_K)}
    found, failed, *_ = _either((first, {}, 0.0, 1.0), (second, raised, 0.0, 1.0))
    assert same(found, first)
    assert set(failed) == set(np.flatnonzero(MEMBERS.seed_K == 7))
