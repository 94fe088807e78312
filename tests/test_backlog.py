import socket
import sys
from collections.abc import AsyncIterator

import pytest
import trio

from trio_server.backlog import TURNS, AcceptFirst

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")

LENGTH = 4  # connections that the queue may hold


@pytest.fixture
async def listener() -> AsyncIterator[trio.SocketListener]:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=LENGTH)
    async with listener:
        yield listener


def connect(listener: trio.SocketListener, number: int) -> list[socket.socket]:
    return [socket.create_connection(listener.socket.getsockname()) for _ in range(number)]


def close(clients: list[socket.socket]) -> None:
    for client in clients:
        client.close()


async def note(started: list[int], number: int) -> None:
    started.append(number)


async def turn() -> None:
    """Let every other task have a turn, and those that it starts one of their own."""
    await trio.lowlevel.checkpoint()
    await trio.lowlevel.checkpoint()


async def test_up_to_half_full_handlers_start_at_once(
    nursery: trio.Nursery, listener: trio.SocketListener
) -> None:
    clients = connect(listener, LENGTH // 2)
    started: list[int] = []
    first = AcceptFirst(nursery, [listener])
    for number in range(10):
        first.start_soon(note, started, number)
    await turn()
    assert sorted(started) == list(range(10))
    close(clients)


async def test_beyond_they_take_turns_in_their_order_and_are_never_forgotten(
    nursery: trio.Nursery, listener: trio.SocketListener
) -> None:
    clients = connect(listener, LENGTH)
    started: list[int] = []
    first = AcceptFirst(nursery, [listener])
    for number in range(10):
        first.start_soon(note, started, number)
    await turn()
    assert started == []
    for turns in range(10 * TURNS + 2):  # nobody accepts: the queue stays full
        await trio.lowlevel.checkpoint()
        assert len(started) <= 1 + turns // TURNS
    assert started == list(range(10))
    close(clients)


async def test_when_the_queue_is_empty_again_one_starts_in_each_turn(
    nursery: trio.Nursery, listener: trio.SocketListener
) -> None:
    clients = connect(listener, LENGTH)
    started: list[int] = []
    first = AcceptFirst(nursery, [listener])
    for number in range(10):
        first.start_soon(note, started, number)
    for _ in range(LENGTH):
        await (await listener.accept()).aclose()
    already = len(started)
    assert already < 5
    for _ in range(TURNS + 3):
        await trio.lowlevel.checkpoint()
    first.start_soon(note, started, 10)  # still behind the others
    for _ in range(10 - already + 2):
        await trio.lowlevel.checkpoint()
    assert started == list(range(11))
    close(clients)


async def test_when_cancelled_all_that_wait_start_so_that_they_can_close(
    listener: trio.SocketListener,
) -> None:
    clients = connect(listener, LENGTH)
    started: list[int] = []
    async with trio.open_nursery() as nursery:
        first = AcceptFirst(nursery, [listener])
        for number in range(10):
            first.start_soon(note, started, number)
        await turn()
        nursery.cancel_scope.cancel()
    assert sorted(started) == list(range(10))
    close(clients)


async def test_a_listener_that_was_closed_counts_for_nothing(
    nursery: trio.Nursery, listener: trio.SocketListener
) -> None:
    clients = connect(listener, LENGTH)
    await listener.aclose()
    started: list[int] = []
    AcceptFirst(nursery, [listener]).start_soon(note, started, 0)
    await turn()
    assert started == [0]
    close(clients)
