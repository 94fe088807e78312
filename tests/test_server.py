import errno
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import trio
from streams import read_all
from trio.testing import MockClock, memory_stream_pair, open_stream_to_socket_listener

from trio_server import Outcome, Server, hello_world
from trio_server.connection import CLOSING_TIME
from trio_server.lull import INTERVAL
from trio_server.responder import REPLY

# These tests run on real sockets and in real time: what they wait for is short.
DELAY = 0.2
SLACK = 0.5  # seconds; a busy machine is late

fast = partial(hello_world, delay=DELAY)


async def never(_: bytes) -> bytes:
    await trio.sleep_forever()
    raise AssertionError


async def ask(listener: trio.SocketListener, request: bytes = b"hi\n") -> bytes:
    async with await open_stream_to_socket_listener(listener) as client:
        await client.send_all(request)
        return await read_all(client)


async def start(nursery: trio.Nursery, server: Server) -> trio.SocketListener:
    listeners: list[trio.SocketListener] = await nursery.start(server.serve_tcp, 0, "127.0.0.1")
    return listeners[0]


async def start_with_one_in_flight(
    nursery: trio.Nursery, server: Server
) -> tuple[trio.SocketListener, trio.SocketStream]:
    """Start the server, and send it a request; return when the server has received that."""
    listener = await start(nursery, server)
    client = await open_stream_to_socket_listener(listener)
    await client.send_all(b"hi")
    await until(lambda: server.in_flight == 1)
    return listener, client


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(5):
        while not condition():
            await trio.sleep(0.005)


async def test_ten_clients_at_once_take_one_delay(nursery: trio.Nursery) -> None:
    server = Server(fast)
    listener = await start(nursery, server)
    replies = []

    async def one_client() -> None:
        replies.append(await ask(listener))

    before = trio.current_time()
    async with trio.open_nursery() as clients:
        for _ in range(10):
            clients.start_soon(one_client)
    assert replies == [REPLY] * 10
    assert DELAY <= trio.current_time() - before < DELAY + SLACK
    server.shut_down()
    await until(lambda: server.outcomes[Outcome.ANSWERED] == 10)


async def test_shutdown_answers_what_is_in_flight_and_refuses_what_is_new() -> None:
    server = Server(fast)
    async with trio.open_nursery() as nursery:
        listener, client = await start_with_one_in_flight(nursery, server)
        address = listener.socket.getsockname()
        async with client:
            server.shut_down()
            await until(lambda: listener.socket.fileno() == -1)
            with pytest.raises(ConnectionRefusedError), trio.socket.socket() as newcomer:
                await newcomer.connect(address)
            assert await read_all(client) == REPLY
    assert server.outcomes == {Outcome.ANSWERED: 1}
    assert server.in_flight == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can make a socket deaf")
async def test_a_handshake_that_ends_during_the_shutdown_gets_its_reply() -> None:
    server = Server(fast)
    async with trio.open_nursery() as nursery:
        listener = await start(nursery, server)
        server.shut_down()
        await trio.sleep(0.05)
        with trio.socket.socket() as client:
            # What the listener hears still; the connection then hears no more than it.
            client.setsockopt(trio.socket.IPPROTO_IP, trio.socket.IP_TTL, 255)
            with trio.fail_after(5):
                await client.connect(listener.socket.getsockname())
                client.setsockopt(trio.socket.IPPROTO_IP, trio.socket.IP_TTL, 64)
                await client.send(b"hi")
                assert await client.recv(1024) == REPLY


async def test_the_end_of_the_grace_period_cuts_off_what_is_left() -> None:
    server = Server(never)
    async with trio.open_nursery() as nursery:
        _, client = await start_with_one_in_flight(nursery, server)
        async with client:
            before = trio.current_time()
            server.shut_down(0.3)
            assert await read_all(client) == b""
            assert 0.3 <= trio.current_time() - before < 0.3 + SLACK
    assert server.outcomes == {Outcome.CUT_OFF: 1}


async def test_a_second_shut_down_can_only_shorten_the_grace_period() -> None:
    server = Server(never)
    async with trio.open_nursery() as nursery:
        _, client = await start_with_one_in_flight(nursery, server)
        async with client:
            before = trio.current_time()
            server.shut_down(60)
            server.shut_down(0)
            server.shut_down(60)
    assert trio.current_time() - before < SLACK
    assert server.outcomes == {Outcome.CUT_OFF: 1}


async def test_an_idle_connection_holds_the_shutdown_up_for_one_second() -> None:
    server = Server(fast)
    async with trio.open_nursery() as nursery:
        listener = await start(nursery, server)
        async with (
            await open_stream_to_socket_listener(listener) as silent,
            await open_stream_to_socket_listener(listener) as late,
        ):
            assert await ask(listener) == REPLY  # so the two are accepted by now
            before = trio.current_time()
            server.shut_down()
            await trio.sleep(CLOSING_TIME / 2)
            await late.send_all(b"still in time")
            assert await read_all(late) == REPLY
            assert await read_all(silent) == b""
    assert CLOSING_TIME <= trio.current_time() - before < CLOSING_TIME + SLACK
    assert server.outcomes == {Outcome.ANSWERED: 2, Outcome.TIMED_OUT: 1}


async def test_cancelling_stops_at_once() -> None:
    server = Server(never)
    async with trio.open_nursery() as nursery:
        listener, client = await start_with_one_in_flight(nursery, server)
        async with client:
            before = trio.current_time()
            nursery.cancel_scope.cancel()
    assert trio.current_time() - before < SLACK
    assert server.outcomes == {Outcome.CUT_OFF: 1}
    assert listener.socket.fileno() == -1


async def test_one_bad_responder_among_good_ones(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    async def respond(request: bytes) -> bytes:
        if request == b"bad":
            raise ValueError("boom")
        return await fast(request)

    server = Server(respond)
    listener = await start(nursery, server)
    replies = {}

    async def one_client(number: int) -> None:
        replies[number] = await ask(listener, b"bad" if number == 5 else b"good")

    async with trio.open_nursery() as clients:
        for number in range(10):
            clients.start_soon(one_client, number)
    assert replies == {number: b"" if number == 5 else REPLY for number in range(10)}
    assert caplog.text.count("ValueError: boom") == 1
    server.shut_down()


async def test_a_client_that_resets_before_it_is_accepted(nursery: trio.Nursery) -> None:
    server = Server(fast)
    listener = await start(nursery, server)
    with socket.socket() as client:
        # No `await` until the socket is closed, so the server cannot accept before; and
        # closing with a linger time of 0 sends a reset.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.connect(listener.socket.getsockname())
    await until(lambda: server.outcomes.total() == 1)
    assert server.outcomes == {Outcome.WENT_AWAY: 1}
    assert await ask(listener) == REPLY
    server.shut_down()


async def test_more_than_a_kilobyte_does_not_cost_the_client_its_reply(
    nursery: trio.Nursery,
) -> None:
    server = Server(fast)
    listener = await start(nursery, server)
    for _ in range(8):
        assert await ask(listener, b"x" * 1500) == REPLY
    server.shut_down()


@pytest.mark.skipif(sys.platform != "linux", reason="needs TCP_CORK")
async def test_a_short_reply_and_its_end_are_one_packet(nursery: trio.Nursery) -> None:
    server = Server(fast)
    listener = await start(nursery, server)
    client = await open_stream_to_socket_listener(listener)

    def packets() -> int:
        # `tcpi_segs_in` of `struct tcp_info`, in Linux's <linux/tcp.h>.
        info = client.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 144)
        return int.from_bytes(info[140:], sys.byteorder)

    await client.send_all(b"hi\n")
    await trio.sleep(DELAY / 2)
    before = packets()
    assert await read_all(client) == REPLY
    assert packets() - before == 1
    await client.aclose()
    server.shut_down()


class Listener(trio.abc.Listener[trio.abc.HalfCloseableStream]):
    """Accepts one client in memory, then none."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self.streams = [stream]
        self.closed = False

    async def accept(self) -> trio.abc.HalfCloseableStream:
        if not self.streams:
            await trio.sleep_forever()
        return self.streams.pop()

    async def aclose(self) -> None:
        self.closed = True


async def test_in_memory_listeners(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    client, stream = memory_stream_pair()
    listener = Listener(stream)
    server = Server(hello_world)
    assert await nursery.start(server.serve_listeners, [listener]) == [listener]
    await client.send_all(b"hi")
    assert await read_all(client) == REPLY
    server.shut_down()
    await trio.sleep(CLOSING_TIME + 0.1)
    assert listener.closed
    assert server.outcomes == {Outcome.ANSWERED: 1}


@pytest.mark.parametrize(
    ("server", "wait"),
    [
        (Server(hello_world), INTERVAL),
        (Server(hello_world, max_connections=1), 0),
        (Server(hello_world, client_timeout=CLOSING_TIME / 2), 0),
    ],
    ids=["usually", "but not in a line", "and not with little time"],
)
async def test_answered_connections_wait_for_a_lull(
    server: Server, wait: float, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    client, stream = memory_stream_pair()
    await nursery.start(server.serve_listeners, [Listener(stream)])
    await client.send_all(b"hi")
    assert await read_all(client) == REPLY
    replied = trio.current_time()
    await client.aclose()
    while not server.outcomes:
        await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(INTERVAL / 10)
    ended = trio.current_time()
    assert replied + wait <= ended <= replied + wait + INTERVAL / 5
    server.shut_down()


async def test_the_queue_of_a_listener_from_elsewhere_is_left_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as shared:
        server = Server(fast)
        async with trio.open_nursery() as nursery:
            own = trio.socket.from_stdlib_socket(shared.dup())
            await nursery.start(server.serve_listeners, [trio.SocketListener(own)])
            server.shut_down()
        # Nobody serves now; the kernel goes on completing connections for the next server.
        clients = [socket.create_connection(shared.getsockname()) for _ in range(20)]
        for client in clients:
            client.sendall(b"hi")
        server = Server(fast)
        async with trio.open_nursery() as nursery:
            own = trio.socket.from_stdlib_socket(shared.dup())
            await nursery.start(server.serve_listeners, [trio.SocketListener(own)])
            for client in clients:
                with client:
                    stream = trio.SocketStream(trio.socket.from_stdlib_socket(client))
                    assert await read_all(stream) == REPLY
            server.shut_down()
        assert server.outcomes == {Outcome.ANSWERED: 20}


async def test_a_unix_socket(nursery: trio.Nursery, tmp_path: Path) -> None:
    address = str(tmp_path / "socket")
    listener = trio.socket.socket(socket.AF_UNIX)
    await listener.bind(address)
    listener.listen()
    server = Server(fast)
    await nursery.start(server.serve_listeners, [trio.SocketListener(listener)])
    async with await trio.open_unix_socket(address) as client:
        await client.send_all(b"hi")
        assert await read_all(client) == REPLY
    server.shut_down()


async def test_clients_get_their_turn_in_order_of_arrival(nursery: trio.Nursery) -> None:
    served = []

    async def respond(request: bytes) -> bytes:
        served.append(request)
        return request

    arrived = [bytes([number]) for number in range(100)]
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    with ExitStack() as clients:
        for request in arrived:  # into the listen queue: all are there when accepting begins
            client = socket.create_connection(listener.socket.getsockname())
            clients.enter_context(client).sendall(request)
            client.shutdown(socket.SHUT_WR)  # or it would keep its turn until it closes
        server = Server(respond, max_connections=1)
        await nursery.start(server.serve_listeners, [listener])
        await until(lambda: len(served) == len(arrived))
    assert served == arrived


async def test_no_more_than_max_connections_at_once(nursery: trio.Nursery) -> None:
    running = most = 0

    async def respond(_: bytes) -> bytes:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await trio.sleep(0.02)
        running -= 1
        return b"ok"

    server = Server(respond, max_connections=3)
    listener = await start(nursery, server)
    async with trio.open_nursery() as clients:
        for _ in range(12):
            clients.start_soon(ask, listener)
    assert most == 3
    await until(lambda: server.outcomes[Outcome.ANSWERED] == 12)
    server.shut_down()


class Resolver(trio.abc.HostnameResolver):
    """A machine whose hosts file says what the test wants."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses

    async def getaddrinfo(  # type: ignore[override]
        self, _: object, port: int, *__: int
    ) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        if not self.addresses:
            await trio.sleep_forever()
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, port))
            for address in self.addresses
        ]

    async def getnameinfo(self, *_: object) -> tuple[str, str]:
        raise NotImplementedError


# An address that is set aside for documentation (RFC 5737): no machine has it.
NOWHERE = "203.0.113.1"


async def test_an_unavailable_address_is_left_out_and_said(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    trio.socket.set_custom_hostname_resolver(Resolver(NOWHERE, "127.0.0.1"))
    server = Server(fast)
    listeners = await nursery.start(server.serve_tcp, 0, "name")
    assert [listener.socket.getsockname()[0] for listener in listeners] == ["127.0.0.1"]
    assert f"not listening on {NOWHERE}: " in caplog.text
    assert await ask(listeners[0]) == REPLY
    server.shut_down()


async def test_no_available_address_is_an_error() -> None:
    trio.socket.set_custom_hostname_resolver(Resolver(NOWHERE))
    with pytest.raises(OSError, match="this machine has no address of 'name'") as info:
        await Server(fast).serve_tcp(0, "name")
    assert info.value.errno == errno.EADDRNOTAVAIL


async def test_each_address_gets_a_listener_and_a_repeated_one_gets_one(
    nursery: trio.Nursery,
) -> None:
    trio.socket.set_custom_hostname_resolver(Resolver("127.0.0.1", "127.0.0.2", "127.0.0.1"))
    server = Server(fast)
    listeners = await nursery.start(server.serve_tcp, 0, "name")
    addresses = [listener.socket.getsockname()[0] for listener in listeners]
    assert addresses == ["127.0.0.1", "127.0.0.2"]
    for listener in listeners:
        assert await ask(listener) == REPLY
    server.shut_down()


@pytest.mark.parametrize("host", ["a..b", "a" * 64, "host.invalid"])
async def test_a_name_that_does_not_resolve(host: str) -> None:
    with pytest.raises(socket.gaierror):
        await Server(fast).serve_tcp(0, host)


async def test_a_taken_port_is_a_plain_error_and_leaves_no_listener(
    nursery: trio.Nursery,
) -> None:
    server = Server(fast)
    listener = await start(nursery, server)
    port = listener.socket.getsockname()[1]
    trio.socket.set_custom_hostname_resolver(Resolver("127.0.0.2", "127.0.0.1"))
    with pytest.raises(OSError, match="in use") as info:
        await Server(fast).serve_tcp(port, "name")
    assert info.value.errno == errno.EADDRINUSE
    with socket.socket() as client, pytest.raises(ConnectionRefusedError):
        client.connect(("127.0.0.2", port))
    server.shut_down()


async def test_shut_down_during_start_up_returns_at_once() -> None:
    trio.socket.set_custom_hostname_resolver(Resolver())  # never answers
    server = Server(fast)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:

            async def shut_down_soon() -> None:
                await trio.sleep(0.05)
                server.shut_down()

            nursery.start_soon(shut_down_soon)
            assert await nursery.start(server.serve_tcp, 0, "name") == []


async def test_shut_down_before_start_up_returns_at_once() -> None:
    server = Server(fast)
    server.shut_down()
    with trio.fail_after(5):
        await server.serve_tcp(0)
    assert server.outcomes.total() == 0
