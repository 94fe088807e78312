"""The accept queue, on real sockets."""

import errno
import socket
import struct
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from trio_server import accept_queue
from trio_server.accept_queue import BATCH, AcceptFirst, last_call

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's socket filters")


@pytest.fixture
async def listener() -> AsyncIterator[trio.SocketListener]:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        yield listener


@contextmanager
def queued(listener: trio.SocketListener, number: int) -> Iterator[list[socket.socket]]:
    """Put clients into the accept queue, in order."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(socket.create_connection(listener.socket.getsockname()))
            for _ in range(number)
        ]


async def peer_of(first: AcceptFirst) -> object:
    async with await first.accept() as stream:
        return stream.socket.getpeername()


class Passes(trio.abc.Instrument):
    """Counts the passes of the scheduler."""

    number = 0

    def before_io_wait(self, timeout: float) -> None:  # noqa: ARG002 - Trio passes it
        self.number += 1


class Accepting:
    """An accept loop, as in `trio.serve_listeners`, that notes in which pass each stream came."""

    def __init__(
        self, nursery: trio.Nursery, listener: trio.abc.Listener[trio.SocketStream]
    ) -> None:
        self.passes: list[int] = []
        self.streams: list[trio.SocketStream] = []
        nursery.start_soon(self._accept, listener)

    async def _accept(self, listener: trio.abc.Listener[trio.SocketStream]) -> None:
        passes = Passes()
        trio.lowlevel.add_instrument(passes)
        while True:
            self.streams.append(await listener.accept())
            self.passes.append(passes.number)

    def close(self) -> None:
        for stream in self.streams:
            stream.socket.close()


async def test_connections_are_handed_out_in_order_of_arrival(
    listener: trio.SocketListener,
) -> None:
    first = AcceptFirst(listener)
    with queued(listener, 3 * BATCH) as clients:
        peers = [await peer_of(first) for _ in clients]
        assert peers == [client.getsockname() for client in clients]


async def test_a_listener_whose_queue_is_empty_waits(listener: trio.SocketListener) -> None:
    first = AcceptFirst(listener)
    with trio.move_on_after(0.05) as scope:
        await first.accept()
    assert scope.cancelled_caught
    with queued(listener, 1) as [client]:
        assert await peer_of(first) == client.getsockname()


async def test_all_are_accepted_before_the_first_is_handed_out(
    listener: trio.SocketListener,
) -> None:
    first = AcceptFirst(listener)
    with queued(listener, 3 * BATCH):
        async with await first.accept():
            assert not accept_queue._clients_wait([listener])  # noqa: SLF001
        await first.aclose()


async def test_they_are_handed_out_in_batches_with_a_checkpoint_between(
    listener: trio.SocketListener, nursery: trio.Nursery
) -> None:
    with queued(listener, 2 * BATCH + 1):
        accepting = Accepting(nursery, AcceptFirst(listener))
        while len(accepting.streams) <= 2 * BATCH:
            await trio.lowlevel.checkpoint()
        first, second, third = sorted(set(accepting.passes))
        assert accepting.passes == [first] * BATCH + [second] * BATCH + [third]
        accepting.close()
    nursery.cancel_scope.cancel()


async def test_newcomers_are_accepted_before_the_next_batch_but_handed_out_last(
    listener: trio.SocketListener,
) -> None:
    first = AcceptFirst(listener)
    with queued(listener, 2 * BATCH) as early, queued(listener, 0):
        peers = [await peer_of(first) for _ in range(BATCH)]
        with queued(listener, BATCH) as late:
            peers.append(await peer_of(first))
            assert not accept_queue._clients_wait([listener])  # noqa: SLF001
            peers += [await peer_of(first) for _ in range(2 * BATCH - 1)]
            assert peers == [client.getsockname() for client in (*early, *late)]


async def test_with_too_many_waiting_the_rest_stays_in_the_queue(
    listener: trio.SocketListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accept_queue, "MOST_ACCEPTED", 10)
    first = AcceptFirst(listener)
    with queued(listener, 25) as clients:
        async with await first.accept():
            assert accept_queue._clients_wait([listener])  # noqa: SLF001
        peers = [await peer_of(first) for _ in clients[1:]]
        assert peers == [client.getsockname() for client in clients[1:]]


async def test_cancelling_loses_none_that_were_accepted(
    listener: trio.SocketListener, nursery: trio.Nursery
) -> None:
    with queued(listener, 3 * BATCH):
        accepting = Accepting(nursery, AcceptFirst(listener))
        while not accepting.streams:
            await trio.lowlevel.checkpoint()
        assert len(accepting.streams) < 3 * BATCH
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await wait_all_tasks_blocked()
        assert len(accepting.streams) == 3 * BATCH
        accepting.close()


async def test_closing_the_listener_loses_none_that_were_accepted(
    listener: trio.SocketListener,
) -> None:
    first = AcceptFirst(listener)
    with queued(listener, 2 * BATCH) as clients:
        peers = [await peer_of(first)]
        listener.socket.close()
        peers += [await peer_of(first) for _ in clients[1:]]
        assert peers == [client.getsockname() for client in clients]
        with pytest.raises(trio.ClosedResourceError):
            await first.accept()


async def test_closing_it_closes_those_that_were_not_handed_out(
    listener: trio.SocketListener,
) -> None:
    first = AcceptFirst(listener)
    with queued(listener, 3) as clients:
        stream = await first.accept()
        await first.aclose()
        assert listener.socket.fileno() == -1
        for client in clients[1:]:
            client.settimeout(5)
            assert client.recv(1) == b""
        await stream.aclose()


async def test_an_error_waits_until_those_that_were_accepted_are_handed_out(
    listener: trio.SocketListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the limit of open files, Trio has to see the error, but not before these."""

    async def fail() -> trio.SocketStream:
        raise OSError(errno.EMFILE, "too many open files")

    first = AcceptFirst(listener)
    with queued(listener, 5) as clients:
        peers = [await peer_of(first)]
        monkeypatch.setattr(type(listener), "accept", lambda _: fail())
        peers += [await peer_of(first) for _ in clients[1:]]
        assert peers == [client.getsockname() for client in clients]
        with pytest.raises(OSError, match="too many open files"):
            await first.accept()


async def test_a_unix_socket_is_accepted_from_as_well(tmp_path: Path) -> None:
    plain = trio.socket.socket(socket.AF_UNIX)
    await plain.bind(str(tmp_path / "socket"))
    plain.listen(10)
    first = AcceptFirst(trio.SocketListener(plain))
    with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as two:
        one.connect(str(tmp_path / "socket"))
        two.connect(str(tmp_path / "socket"))
        await (await first.accept()).aclose()
        await (await first.accept()).aclose()
    await first.aclose()


async def test_a_last_call_on_an_empty_queue_returns_at_once(
    listener: trio.SocketListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trio, "sleep", None)  # Nothing is waited for.
    await last_call([listener])


async def test_a_last_call_waits_until_the_queue_is_empty(
    listener: trio.SocketListener, nursery: trio.Nursery
) -> None:
    with queued(listener, 3):
        returned = trio.Event()

        async def call() -> None:
            await last_call([listener])
            returned.set()

        nursery.start_soon(call)
        for _ in range(3):
            await trio.sleep(0.05)
            assert not returned.is_set()
            await (await listener.accept()).aclose()
        with trio.fail_after(5):
            await returned.wait()


async def test_a_last_call_does_not_wait_for_a_listener_that_was_closed(
    listener: trio.SocketListener,
) -> None:
    with queued(listener, 1), trio.fail_after(5):
        listener.socket.close()
        await last_call([listener])


def connect(address: object, *, ttl: int = 64) -> socket.socket:
    """Begin to connect, without waiting for the end of it."""
    client = socket.socket(socket.AF_INET6 if ":" in str(address) else socket.AF_INET)
    client.settimeout(0)
    if client.family == socket.AF_INET:
        client.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
    client.connect_ex(address)  # type: ignore[arg-type]
    return client


def is_connected(client: socket.socket) -> bool:
    try:
        client.getpeername()
    except OSError:
        return False
    return True


@linux_only
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_newcomers_are_ignored_after_a_last_call(host: str) -> None:
    try:
        [listener] = await trio.open_tcp_listeners(0, host=host)
    except OSError:
        pytest.skip(f"no {host} on this machine")
    async with listener:
        address = listener.socket.getsockname()
        with connect(address) as before:
            assert is_connected(before)
            await (await listener.accept()).aclose()
        await last_call([listener])
        for ttl in (64, 255):
            with connect(address, ttl=ttl) as newcomer:
                await trio.sleep(0.05)
                assert not is_connected(newcomer)


@linux_only
async def test_a_connection_that_was_accepted_hears_its_client_after_a_last_call(
    listener: trio.SocketListener,
) -> None:
    with queued(listener, 1) as [client]:
        await trio.lowlevel.checkpoint()
        stream = await listener.accept()
        await last_call([listener])
        client.sendall(b"hi")
        assert await stream.receive_some() == b"hi"
        await stream.aclose()


@linux_only
def test_the_filter_drops_the_first_packet_of_a_handshake_and_nothing_else() -> None:
    """Run the program as the kernel would (bpf(4)), on the flags of a TCP header."""
    instructions = [
        struct.unpack("HBBI", one.to_bytes(8, sys.byteorder))
        for one in (accept_queue.NO_NEWCOMERS)
    ]

    def passes(flags: int) -> bool:
        accumulator = position = 0
        while True:
            code, if_true, if_false, number = instructions[position]
            position += 1
            match code:
                case 0x30:
                    accumulator = {13: flags}[number]
                case 0x54:
                    accumulator &= number
                case 0x15:
                    position += if_true if accumulator == number else if_false
                case 0x06:
                    return bool(number)

    syn, ack = 0x02, 0x10
    dropped = [flags for flags in range(256) if not passes(flags)]
    assert dropped == [flags for flags in range(256) if flags & syn and not flags & ack]


async def test_a_handshake_under_way_is_waited_for_but_not_for_ever(
    listener: trio.SocketListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accept_queue, "HANDSHAKE_TIME", 0.35)
    looks = []

    def under_way(ports: set[int]) -> bool:
        looks.append(ports)
        return True

    monkeypatch.setattr(accept_queue, "_handshakes_under_way", under_way)
    before = trio.current_time()
    await last_call([listener])
    assert trio.current_time() - before >= 0.35
    assert 1 <= len(looks) <= 4
    assert looks[0] == {listener.socket.getsockname()[1]}


async def test_a_look_at_the_handshakes_that_takes_long_holds_nobody_up(
    listener: trio.SocketListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accept_queue, "HANDSHAKE_TIME", 0.2)
    done = threading.Event()
    monkeypatch.setattr(accept_queue, "_handshakes_under_way", lambda _: done.wait(60))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(last_call, [listener])
        with trio.fail_after(30):
            await trio.sleep(0.1)
    done.set()


@linux_only
@pytest.mark.parametrize("table", ["tcp", "tcp6"])
def test_a_handshake_is_seen_in_the_kernels_table(
    table: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    port = 1729
    header = "  sl  local_address rem_address   st tx_queue rx_queue\n"
    rows = {
        "established": f"   0: 0100007F:{port:04X} 0100007F:D431 01 00000000:00000000\n",
        "another port": f"   0: 0100007F:{port ^ 1:04X} 0100007F:{port:04X} 03 00000000:0\n",
        "ours": f"   0: 0100007F:{port:04X} 0100007F:D431 03 00000000:00000000\n",
    }
    for name, row in rows.items():
        (tmp_path / table).write_text(header + row)
        monkeypatch.setattr(accept_queue, "Path", lambda _, name: tmp_path / name)
        assert accept_queue._handshakes_under_way({1, port}) == (name == "ours")  # noqa: SLF001


def test_when_all_files_are_in_use_a_handshake_may_be_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Unreadable:
        def __init__(self, *_: object) -> None: ...

        def read_bytes(self) -> bytes:
            raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(accept_queue, "Path", Unreadable)
    assert accept_queue._handshakes_under_way({1729})  # noqa: SLF001


async def test_without_a_thread_a_last_call_looks_at_the_queues_alone(
    listener: trio.SocketListener, no_threads: None
) -> None:
    await last_call([listener])
