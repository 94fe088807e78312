import math
import resource

import pytest
import trio
from trio.testing import MockClock

from trio_server.lull import GROUP, INTERVAL, LONGEST, PUNCTUAL, TURNS, Lull


async def test_an_idle_scheduler_has_a_lull_at_the_first_look(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    lull = Lull(nursery)
    for number in range(1, 4):
        await lull.wait()
        assert trio.current_time() == number * INTERVAL


async def test_all_who_wait_go_on_together(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    lull = Lull(nursery)
    ends = []

    async def wait_from(start: float) -> None:
        await trio.sleep(start)
        await lull.wait()
        ends.append(trio.current_time())

    async with trio.open_nursery() as connections:
        for tenth in range(10):
            connections.start_soon(wait_from, INTERVAL * tenth / 10)
    assert ends == [INTERVAL] * 10
    for _ in range(TURNS):
        await trio.lowlevel.checkpoint()
    assert len(nursery.child_tasks) == 0
    with trio.fail_after(1):
        await lull.wait()


async def test_many_go_on_in_groups(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    lull = Lull(nursery)
    going_on = 0

    async def wait() -> None:
        nonlocal going_on
        await lull.wait()
        going_on += 1
        for _ in range(TURNS - 1):
            await trio.lowlevel.checkpoint()
            assert going_on <= GROUP
        going_on -= 1

    async with trio.open_nursery() as connections:
        for _ in range(5 * GROUP + 1):
            connections.start_soon(wait)
    assert trio.current_time() == INTERVAL


async def test_after_a_cancelled_wait_the_next_one_ends_as_well(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    lull = Lull(nursery)
    with trio.move_on_after(INTERVAL / 2) as first:
        await lull.wait()
    assert first.cancelled_caught
    assert trio.current_time() == INTERVAL / 2
    await lull.wait()
    assert trio.current_time() == INTERVAL


async def test_one_task_ends_all_waits(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    lull = Lull(nursery)
    async with trio.open_nursery() as connections:
        for _ in range(10):
            await lull.wait()
            for _ in range(TURNS - 1):  # the task that ended that wait has not ended yet
                connections.start_soon(lull.wait)
                await trio.lowlevel.checkpoint()
                assert len(nursery.child_tasks) == 1
        connections.cancel_scope.cancel()
    await lull.wait()  # after waits that were cancelled
    assert len(nursery.child_tasks) == 1


async def test_no_more_than_half_of_the_files_wait(
    nursery: trio.Nursery, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (9, 100))
    lull = Lull(nursery)
    ends = []

    async def wait() -> None:
        await lull.wait()
        ends.append(trio.current_time())

    async with trio.open_nursery() as connections:
        for _ in range(12):
            connections.start_soon(wait)
    assert ends == [0] * 7 + [INTERVAL] * 5


async def test_without_a_limit_of_files_all_wait(
    nursery: trio.Nursery, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    await Lull(nursery).wait()
    assert trio.current_time() == INTERVAL


async def busy(clock: MockClock, seconds: float, turns: float = math.inf) -> None:
    """Let every turn of the scheduler take that long."""
    while turns > 0:
        clock.jump(seconds)
        turns -= 1
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize(
    ("turn", "wait"),
    [(PUNCTUAL / 2, INTERVAL), (LONGEST / 4, LONGEST)],
)
async def test_the_wait_lasts_while_tasks_stand_in_line_but_not_for_ever(
    turn: float, wait: float, nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    lull = Lull(nursery)
    async with trio.open_nursery() as others:
        others.start_soon(busy, mock_clock, turn)
        before = trio.current_time()
        await lull.wait()
        others.cancel_scope.cancel()
    # Some turns more, until the tasks have started and ended.
    assert wait <= trio.current_time() - before <= wait + 5 * turn


async def test_the_wait_ends_with_the_line(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    lull = Lull(nursery)
    nursery.start_soon(busy, autojump_clock, 2 * INTERVAL, 2)
    await lull.wait()
    assert 4 * INTERVAL <= trio.current_time() < LONGEST
