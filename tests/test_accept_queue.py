"""What the kernel is asked about the accept queue, on real sockets."""

import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from streams import RESET_ON_CLOSE, queued

from trio_server.accept_queue import (
    INSTRUCTIONS,
    SO_ATTACH_FILTER,
    accept_waiting,
    any_waiting,
    ignore_new_connections,
)

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's socket filters")


@pytest.fixture
async def listener() -> AsyncIterator[trio.socket.SocketType]:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        yield listener.socket


def accept(listener: trio.socket.SocketType, most: int) -> list[object]:
    """Accept connections, and close them; return the addresses of the clients."""
    accepted = accept_waiting(listener, most)
    addresses = [one.getpeername() for one in accepted]
    for one in accepted:
        one.close()
    return addresses


async def test_all_that_wait_are_accepted_in_order_of_arrival(
    listener: trio.socket.SocketType,
) -> None:
    with queued(listener.getsockname(), 100) as clients:
        assert accept(listener, 1000) == [client.getsockname() for client in clients]
        assert not any_waiting([listener])


async def test_no_more_are_accepted_than_asked_for(listener: trio.socket.SocketType) -> None:
    with queued(listener.getsockname(), 5) as clients:
        assert accept(listener, 0) == []
        assert accept(listener, 3) == [client.getsockname() for client in clients[:3]]
        assert any_waiting([listener])
        assert accept(listener, 3) == [client.getsockname() for client in clients[3:]]


async def test_from_an_empty_queue_none_are_accepted_and_the_listener_stays_open(
    listener: trio.socket.SocketType,
) -> None:
    assert accept(listener, 10) == []
    with queued(listener.getsockname(), 1):
        assert len(accept(listener, 10)) == 1


async def test_a_default_timeout_of_sockets_does_not_block_the_program(
    listener: trio.socket.SocketType,
) -> None:
    before = trio.current_time()
    socket.setdefaulttimeout(30)
    try:
        with queued(listener.getsockname(), 1):
            assert len(accept(listener, 10)) == 1
    finally:
        socket.setdefaulttimeout(None)
    assert trio.current_time() - before < 20


async def test_a_connection_that_was_reset_in_the_queue_is_accepted(
    listener: trio.socket.SocketType,
) -> None:
    """The kernel leaves it there. Its handler meets the reset."""
    with queued(listener.getsockname(), 1) as [client]:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    accepted = accept_waiting(listener, 10)
    assert len(accepted) == 1
    with accepted[0], pytest.raises(ConnectionResetError):
        accepted[0].recv(1)


async def test_connections_wait_in_any_of_several_queues(tmp_path: Path) -> None:
    unix = trio.socket.socket(socket.AF_UNIX)
    await unix.bind(str(tmp_path / "socket"))
    unix.listen(10)
    [tcp] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with tcp:
        assert not any_waiting([tcp.socket, unix])
        with queued(unix.getsockname(), 2):
            assert any_waiting([tcp.socket, unix])
            assert len(accept(unix, 10)) == 2
        with queued(tcp.socket.getsockname(), 1):
            assert any_waiting([tcp.socket, unix])
        unix.close()
    assert not any_waiting([tcp.socket, unix])  # Both are closed.
    assert not any_waiting([])


@pytest.fixture(params=["127.0.0.1", "::1"])
async def filtered(request: pytest.FixtureRequest) -> AsyncIterator[trio.SocketListener]:
    """A listener that new connections do not reach."""
    try:
        [listener] = await trio.open_tcp_listeners(0, host=request.param)
    except OSError:
        pytest.skip(f"no {request.param} on this machine")
    async with listener:
        assert ignore_new_connections(listener.socket)
        yield listener


@linux_only
async def test_the_filter_is_attached(filtered: trio.SocketListener) -> None:
    # Linux reads the same option as SO_GET_FILTER: the length is a number of instructions.
    instructions = filtered.socket.getsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, 40)
    assert len(instructions) == len(INSTRUCTIONS) == 5


@linux_only
async def test_the_packet_that_opens_a_connection_is_dropped(
    filtered: trio.SocketListener,
) -> None:
    with socket.socket(filtered.socket.family) as client:
        client.settimeout(0)
        client.connect_ex(filtered.socket.getsockname())
        await trio.sleep(0.05)
        with pytest.raises(OSError, match="not connected"):
            client.getpeername()
    assert not any_waiting([filtered.socket])


@linux_only
async def test_a_connection_in_the_queue_still_receives(
    listener: trio.socket.SocketType,
) -> None:
    with queued(listener.getsockname(), 1) as [client]:
        assert ignore_new_connections(listener)
        client.sendall(b"hi")
        [accepted] = accept_waiting(listener, 10)
        with accepted:
            assert accepted.recv(10) == b"hi"


@linux_only
async def test_the_filter_passes_packets_with_an_acknowledgement(
    listener: trio.socket.SocketType,
) -> None:
    """A handshake that ends after the filter came makes a connection that inherits it."""
    with queued(listener.getsockname(), 1) as [client]:
        stream, _ = await listener.accept()
        with stream:
            assert ignore_new_connections(stream)
            client.sendall(b"hi")
            assert await stream.recv(10) == b"hi"
            await stream.send(b"ho")
            assert client.recv(10) == b"ho"
            client.shutdown(socket.SHUT_WR)
            assert await stream.recv(10) == b""


@linux_only
async def test_where_there_is_no_filter_the_caller_is_told(
    listener: trio.socket.SocketType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with trio.socket.socket(socket.AF_UNIX) as unix:
        assert not ignore_new_connections(unix)
    closed = trio.socket.socket()
    closed.close()
    assert not ignore_new_connections(closed)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not ignore_new_connections(listener)
