import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest
import trio

from trio_server import backlog
from trio_server.backlog import BATCH, AcceptFirst


@pytest.fixture
async def listener() -> AsyncIterator[trio.SocketListener]:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        yield listener


@pytest.fixture
def accept_first(nursery: trio.Nursery, listener: trio.SocketListener) -> AcceptFirst:
    return AcceptFirst(nursery, [listener])


@contextmanager
def queued(listener: trio.SocketListener) -> Iterator[None]:
    """Keep a client in the listen queue."""
    with socket.create_connection(listener.socket.getsockname()):
        yield


async def note(started: list[int], number: int) -> None:
    started.append(number)


async def accept(accept_first: AcceptFirst, number: int, started: list[int]) -> None:
    """Start handlers, one in each turn, as an accept loop does while its queue is not empty."""
    for one in range(number):
        accept_first.start_soon(note, started, one)
        await trio.lowlevel.checkpoint()


async def turns(number: int) -> None:
    for _ in range(number):
        await trio.lowlevel.checkpoint()


async def test_with_an_empty_queue_each_starts_at_once(accept_first: AcceptFirst) -> None:
    started: list[int] = []
    for number in range(10):
        accept_first.start_soon(note, started, number)
        await turns(2)
        assert started == list(range(number + 1))


async def test_while_more_are_accepted_none_starts_then_they_start_in_batches(
    nursery: trio.Nursery, listener: trio.SocketListener, accept_first: AcceptFirst
) -> None:
    started: list[int] = []
    with queued(listener):
        await accept(accept_first, 3 * BATCH, started)
        assert started == []
        while len(started) < 3 * BATCH:
            await turns(1)
            batches, rest = divmod(len(started), BATCH)
            assert rest == 0
            assert sorted(started) == list(range(batches * BATCH))
            assert len(nursery.child_tasks) <= 1 + BATCH  # one of them starts the others
    await turns(1)
    assert not nursery.child_tasks


async def test_who_is_accepted_between_two_batches_waits_behind_the_others(
    nursery: trio.Nursery, listener: trio.SocketListener, accept_first: AcceptFirst
) -> None:
    started: list[int] = []
    with queued(listener):
        await accept(accept_first, 2 * BATCH, started)
        while not started:
            await turns(1)
    accept_first.start_soon(note, started, 2 * BATCH)  # with the queue empty
    assert len(nursery.child_tasks) <= 1 + BATCH
    await turns(10)
    assert sorted(started) == list(range(2 * BATCH + 1))
    assert started.index(2 * BATCH) >= BATCH


async def test_with_too_many_waiting_they_start_all_the_same(
    listener: trio.SocketListener, accept_first: AcceptFirst, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog, "MOST_WAITING", 2 * BATCH)
    started: list[int] = []
    with queued(listener):
        await accept(accept_first, 2 * BATCH - 1, started)
        assert started == []
        await accept(accept_first, BATCH, started)
        assert len(started) >= BATCH


async def test_when_nobody_can_be_accepted_they_start(
    listener: trio.SocketListener, accept_first: AcceptFirst
) -> None:
    started: list[int] = []
    with queued(listener):  # as at the limit of open files
        for one in range(10):
            accept_first.start_soon(note, started, one)
        await turns(6)
    assert sorted(started) == list(range(10))


async def test_when_cancelled_all_that_wait_start_so_that_they_can_close(
    listener: trio.SocketListener,
) -> None:
    started: list[int] = []
    with queued(listener):
        async with trio.open_nursery() as nursery:
            await accept(AcceptFirst(nursery, [listener]), 3 * BATCH, started)
            assert started == []
            nursery.cancel_scope.cancel()
    assert sorted(started) == list(range(3 * BATCH))


async def test_a_listener_that_was_closed_counts_for_nothing(
    listener: trio.SocketListener, accept_first: AcceptFirst
) -> None:
    started: list[int] = []
    with queued(listener):
        await listener.aclose()
        accept_first.start_soon(note, started, 0)
        await turns(2)
    assert started == [0]
