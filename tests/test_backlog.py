import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import trio

from trio_server.backlog import MOST_WAITING, TURNS, AcceptFirst

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")

LENGTH = 4  # connections that the queue may hold


@pytest.fixture
async def listener() -> AsyncIterator[trio.SocketListener]:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=LENGTH)
    async with listener:
        yield listener


@contextmanager
def queued(listener: trio.SocketListener, number: int) -> Iterator[None]:
    with ExitStack() as clients:
        for _ in range(number):
            clients.enter_context(socket.create_connection(listener.socket.getsockname()))
        yield


async def note(started: list[int], number: int) -> None:
    started.append(number)


def start_handlers(
    nursery: trio.Nursery, listener: trio.SocketListener, number: int = 10
) -> tuple[AcceptFirst, list[int]]:
    """Start handlers that note their number, in what lists those that have started."""
    accept_first = AcceptFirst(nursery, [listener])
    started: list[int] = []
    for one in range(number):
        accept_first.start_soon(note, started, one)
    return accept_first, started


async def turns(number: int) -> None:
    for _ in range(number):
        await trio.lowlevel.checkpoint()


async def test_up_to_half_full_handlers_start_at_once(
    nursery: trio.Nursery, listener: trio.SocketListener
) -> None:
    with queued(listener, LENGTH // 2):
        _, started = start_handlers(nursery, listener)
        await turns(2)
        assert sorted(started) == list(range(10))


async def test_beyond_they_take_turns_in_their_order_and_are_never_forgotten(
    nursery: trio.Nursery, listener: trio.SocketListener
) -> None:
    with queued(listener, LENGTH):
        _, started = start_handlers(nursery, listener)
        await turns(2)
        assert started == []
        for turn in range(10 * TURNS + 2):  # nobody accepts: the queue stays full
            await turns(1)
            assert len(started) <= 1 + turn // TURNS
        assert started == list(range(10))


async def test_when_the_queue_is_empty_again_one_starts_in_each_turn(
    nursery: trio.Nursery, listener: trio.SocketListener
) -> None:
    with queued(listener, LENGTH):
        accept_first, started = start_handlers(nursery, listener)
        for _ in range(LENGTH):
            await (await listener.accept()).aclose()
        already = len(started)
        assert already < 5
        await turns(TURNS + 3)
        accept_first.start_soon(note, started, 10)  # still behind the others
        await turns(10 - already + 2)
        assert started == list(range(11))


async def test_with_too_many_waiting_one_starts_in_each_turn_until_they_are_fewer(
    nursery: trio.Nursery, listener: trio.SocketListener
) -> None:
    with queued(listener, LENGTH):
        _, started = start_handlers(nursery, listener, MOST_WAITING + 10)
        await turns(TURNS + 13)
        assert 10 <= len(started) <= 12


async def test_when_cancelled_all_that_wait_start_so_that_they_can_close(
    listener: trio.SocketListener,
) -> None:
    with queued(listener, LENGTH):
        async with trio.open_nursery() as nursery:
            _, started = start_handlers(nursery, listener)
            await turns(2)
            nursery.cancel_scope.cancel()
        assert sorted(started) == list(range(10))


async def test_a_listener_that_was_closed_counts_for_nothing(
    nursery: trio.Nursery, listener: trio.SocketListener
) -> None:
    with queued(listener, LENGTH):
        await listener.aclose()
        _, started = start_handlers(nursery, listener, 1)
        await turns(2)
        assert started == [0]
