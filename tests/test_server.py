"""Serving and shutting down, on real sockets in this process and in real time."""

import errno
import math
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from streams import RESET_ON_CLOSE, MemoryListener, read_all
from trio.testing import MockClock, open_stream_to_socket_listener, wait_all_tasks_blocked

from trio_server import (
    Connections,
    Outcome,
    Responder,
    Shutdown,
    hello_world,
    serve_connection,
    serve_listeners,
    serve_tcp,
)
from trio_server.accept_queue import BATCH
from trio_server.responder import REPLY
from trio_server.shutdown import CLOSING_TIME

DELAY = 0.2  # seconds
SLACK = 0.9  # seconds; a busy machine is late

fast = partial(hello_world, delay=DELAY)


async def never(_: bytes) -> bytes:
    await trio.sleep_forever()
    raise AssertionError


async def echo(stream: trio.abc.Stream) -> None:
    async for chunk in stream:
        await stream.send_all(chunk)


class Server:
    """`serve_tcp` on a free port of 127.0.0.1 with `serve_connection` for its handler."""

    def __init__(self, respond: Responder = fast, **settings: Any) -> None:
        self.shutdown = Shutdown()
        self.connections = Connections()
        self.handler: Callable[[trio.abc.Stream], Awaitable[object]] = partial(
            serve_connection,
            respond=respond,
            shutdown=self.shutdown,
            connections=self.connections,
            **settings,
        )
        self.listener: trio.SocketListener

    async def start(self, nursery: trio.Nursery) -> None:
        serve = partial(serve_tcp, self.handler, 0, host="127.0.0.1", shutdown=self.shutdown)
        [self.listener] = await nursery.start(serve)

    async def serve(self, *listeners: trio.abc.Listener[Any]) -> None:
        await serve_listeners(self.handler, listeners, shutdown=self.shutdown)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.listener.socket.getsockname()
        return host, port

    async def connect(self, request: bytes = b"") -> trio.SocketStream:
        client = await open_stream_to_socket_listener(self.listener)
        assert isinstance(client, trio.SocketStream)
        if request:
            await client.send_all(request)
        return client

    async def ask(self, request: bytes = b"hi\n") -> bytes:
        async with await self.connect(request) as client:
            return await read_all(client)

    async def with_one_in_flight(self, nursery: trio.Nursery) -> trio.SocketStream:
        """Start, and send a request; return when the server has received that."""
        await self.start(nursery)
        client = await self.connect(b"hi")
        await until(lambda: self.connections.in_flight == 1)
        return client


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(5):
        while not condition():
            await trio.sleep(0.005)


async def test_ten_clients_at_once_take_one_delay(nursery: trio.Nursery) -> None:
    server = Server()
    await server.start(nursery)
    replies = []

    async def one_client() -> None:
        replies.append(await server.ask())

    before = trio.current_time()
    async with trio.open_nursery() as clients:
        for _ in range(10):
            clients.start_soon(one_client)
    assert replies == [REPLY] * 10
    assert DELAY <= trio.current_time() - before < DELAY + SLACK
    server.shutdown.begin()
    await until(lambda: server.connections.outcomes == {Outcome.ANSWERED: 10})


async def test_a_handler_is_what_trio_takes_and_a_shutdown_is_not_needed(
    nursery: trio.Nursery,
) -> None:
    listeners = await nursery.start(partial(serve_tcp, echo, 0, host="127.0.0.1", backlog=5))
    async with await open_stream_to_socket_listener(listeners[0]) as client:
        await client.send_all(b"hi")
        assert await client.receive_some() == b"hi"
    nursery.cancel_scope.cancel()


async def test_connections_that_have_ended_are_forgotten(nursery: trio.Nursery) -> None:
    server = Server()
    await server.start(nursery)
    async with await server.connect():
        assert await server.ask() == REPLY
        await until(lambda: len(server.connections.open) == 1)
        assert server.connections.in_flight == 0
    await until(lambda: not server.connections.open)
    server.shutdown.begin()


async def test_shutdown_answers_what_is_in_flight_and_refuses_what_is_new() -> None:
    server = Server()
    async with (
        trio.open_nursery() as nursery,
        await server.with_one_in_flight(nursery) as client,
    ):
        address = server.address
        server.shutdown.begin()
        await until(lambda: server.listener.socket.fileno() == -1)
        with pytest.raises(ConnectionRefusedError), trio.socket.socket() as newcomer:
            await newcomer.connect(address)
        assert await read_all(client) == REPLY
    assert server.connections.outcomes == {Outcome.ANSWERED: 1}


async def test_an_idle_server_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    async with trio.open_nursery() as nursery:
        await server.start(nursery)
        await wait_all_tasks_blocked()
        monkeypatch.setattr(trio, "sleep", None)  # Nothing is waited for.
        server.shutdown.begin()


async def test_the_end_of_the_grace_period_cuts_off_what_is_left() -> None:
    server = Server(never)
    async with (
        trio.open_nursery() as nursery,
        await server.with_one_in_flight(nursery) as client,
    ):
        before = trio.current_time()
        server.shutdown.begin(0.3)
        assert await read_all(client) == b""
        assert 0.3 <= trio.current_time() - before < 0.3 + SLACK
    assert server.connections.outcomes == {Outcome.CUT_OFF: 1}


async def test_an_idle_connection_holds_the_shutdown_up_for_one_second() -> None:
    server = Server()
    async with trio.open_nursery() as nursery:
        await server.start(nursery)
        async with await server.connect() as silent, await server.connect() as late:
            assert await server.ask() == REPLY  # so the two are accepted by now
            before = trio.current_time()
            server.shutdown.begin()
            await trio.sleep(CLOSING_TIME / 2)
            await late.send_all(b"still in time")
            assert await read_all(late) == REPLY
            assert await read_all(silent) == b""
    assert CLOSING_TIME <= trio.current_time() - before < CLOSING_TIME + SLACK
    assert server.connections.outcomes == {Outcome.ANSWERED: 2, Outcome.SENT_NOTHING: 1}


async def test_cancelling_stops_at_once() -> None:
    server = Server(never)
    async with trio.open_nursery() as nursery, await server.with_one_in_flight(nursery):
        before = trio.current_time()
        nursery.cancel_scope.cancel()
    assert trio.current_time() - before < SLACK
    assert server.connections.outcomes == {Outcome.CUT_OFF: 1}
    assert server.listener.socket.fileno() == -1


def queued(address: tuple[str, int], number: int, stack: ExitStack) -> list[socket.socket]:
    """Put clients with a request into the accept queue."""
    clients = [stack.enter_context(socket.create_connection(address)) for _ in range(number)]
    for client in clients:
        client.sendall(b"hi")
    return clients


async def replies_of(clients: list[socket.socket]) -> list[bytes]:
    replies = []
    for client in clients:
        async with trio.SocketStream(trio.socket.from_stdlib_socket(client)) as stream:
            replies.append(await read_all(stream))
    return replies


@pytest.mark.parametrize("begun_by", ["a task", "the first handler"])
async def test_clients_in_the_accept_queue_are_answered_to_the_last(begun_by: str) -> None:
    async def respond(request: bytes) -> bytes:
        if begun_by != "a task":
            server.shutdown.begin()
        return await fast(request)

    server = Server(respond)
    with ExitStack() as stack:
        async with trio.open_nursery() as nursery:
            await server.start(nursery)
            clients = queued(server.address, 3 * BATCH, stack)
            if begun_by == "a task":
                server.shutdown.begin()
            assert await replies_of(clients) == [REPLY] * len(clients)
            for client in clients:
                client.close()
    assert server.connections.outcomes == {Outcome.ANSWERED: 3 * BATCH}


async def test_listeners_are_closed_in_the_same_instant_in_which_the_queues_are_found_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A client that connects at the next checkpoint is refused rather than reset."""
    server = Server()
    looked: list[object] = []

    async def last_call(listeners: list[trio.SocketListener]) -> None:
        [address] = [listener.socket.getsockname() for listener in listeners]
        looked.append(address)

        class Next(trio.abc.Instrument):
            def after_task_step(self, _: trio.lowlevel.Task) -> None:
                trio.lowlevel.remove_instrument(self)
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection(address)
                looked.append("refused")

        trio.lowlevel.add_instrument(Next())

    monkeypatch.setattr("trio_server.server.last_call", last_call)
    async with trio.open_nursery() as nursery:
        await server.start(nursery)
        address = server.address
        server.shutdown.begin()
    assert looked == [address, "refused"]


async def test_what_was_accepted_last_is_served_although_its_loop_is_cancelled() -> None:
    """The accept loop gets the connection in one pass, and hands it out in the next."""
    server = Server()
    with ExitStack() as stack:
        async with trio.open_nursery() as nursery:
            await server.start(nursery)
            for passes in range(6):
                clients = queued(server.address, 1, stack)
                for _ in range(passes):
                    await trio.lowlevel.checkpoint()
                if passes == 5:
                    server.shutdown.begin()
                assert await replies_of(clients) == [REPLY]


async def test_a_request_that_came_while_the_process_was_held_up_is_answered(
    nursery: trio.Nursery,
) -> None:
    server = Server(client_timeout=0.2)
    await server.start(nursery)
    with ExitStack() as stack:
        client = stack.enter_context(socket.create_connection(server.address))
        await until(lambda: server.connections.open)
        client.sendall(b"hi")
        time.sleep(0.5)  # noqa: ASYNC251 - a responder that blocks holds everybody up like this
        assert await replies_of([client]) == [REPLY]
    server.shutdown.begin()


async def test_a_shutdown_while_the_process_is_held_up_answers_what_has_arrived() -> None:
    server = Server()
    async with trio.open_nursery() as nursery:
        await server.start(nursery)
        with ExitStack() as stack:
            client = stack.enter_context(socket.create_connection(server.address))
            await until(lambda: server.connections.open)
            server.shutdown.begin()
            await trio.sleep(0.05)
            client.sendall(b"hi")
            time.sleep(CLOSING_TIME + 0.2)  # noqa: ASYNC251 - likewise
            assert await replies_of([client]) == [REPLY]


async def test_one_bad_responder_among_good_ones(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    async def respond(request: bytes) -> bytes:
        if request == b"bad":
            raise ValueError("boom")
        return await fast(request)

    server = Server(respond)
    await server.start(nursery)
    replies = {}

    async def one_client(number: int) -> None:
        replies[number] = await server.ask(b"bad" if number == 5 else b"good")

    async with trio.open_nursery() as clients:
        for number in range(10):
            clients.start_soon(one_client, number)
    assert replies == {number: b"" if number == 5 else REPLY for number in range(10)}
    assert caplog.text.count("ValueError: boom") == 1
    server.shutdown.begin()


async def fails(_: trio.abc.Stream) -> None:
    raise ValueError("boom")


async def fails_as_it_is_cancelled(stream: trio.abc.Stream) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever)
        try:
            await stream.receive_some()
        finally:
            raise ValueError("boom")


@pytest.mark.parametrize("handler", [fails, fails_as_it_is_cancelled])
async def test_a_handler_that_fails_ends_its_connection_and_not_the_server(
    handler: Callable[[trio.abc.Stream], Awaitable[None]], caplog: pytest.LogCaptureFixture
) -> None:
    shutdown = Shutdown()
    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(
            partial(serve_tcp, handler, 0, host="127.0.0.1", shutdown=shutdown)
        )
        async with await open_stream_to_socket_listener(listener) as client:
            await trio.sleep(0.05)
            assert listener.socket.fileno() >= 0
            shutdown.begin(0)
            with suppress(trio.BrokenResourceError):
                assert await read_all(client) == b""
    assert "a handler failed" in caplog.text
    assert "ValueError: boom" in caplog.text


async def test_a_client_that_resets_is_no_failure_of_a_handler(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="trio_server")
    shutdown = Shutdown()
    [listener] = await nursery.start(
        partial(serve_tcp, echo, 0, host="127.0.0.1", shutdown=shutdown)
    )
    async with await open_stream_to_socket_listener(listener) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    await until(lambda: "a handler ended, as its client had gone away" in caplog.text)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    shutdown.begin()


async def test_what_is_no_exception_ends_the_server_as_in_trio() -> None:
    async def handler(_: trio.abc.Stream) -> None:
        raise KeyboardInterrupt

    with pytest.RaisesGroup(KeyboardInterrupt, flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            [listener] = await nursery.start(partial(serve_tcp, handler, 0, host="127.0.0.1"))
            async with await open_stream_to_socket_listener(listener) as client:
                await read_all(client)


async def kept_cancelled() -> trio.Cancelled:
    """Keep the exception of a cancel scope that was left."""
    with trio.CancelScope() as scope:
        scope.cancel()
        try:
            await trio.sleep_forever()
        except trio.Cancelled as cancelled:
            kept = cancelled
            raise
    return kept


async def test_a_cancelled_that_was_kept_from_elsewhere_is_an_error_and_ends_nobody_else(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    kept = await kept_cancelled()

    async def respond(request: bytes) -> bytes:
        if request == b"bad":
            raise kept
        return await fast(request)

    server = Server(respond)
    await server.start(nursery)
    async with await server.connect(b"good") as client:
        assert await server.ask(b"bad") == b""
        assert await read_all(client) == REPLY
    assert "it raised a trio.Cancelled that is not its own" in caplog.text
    assert not server.shutdown.begun
    server.shutdown.begin()


async def test_a_client_that_resets_before_it_is_accepted(nursery: trio.Nursery) -> None:
    server = Server()
    await server.start(nursery)
    with socket.socket() as client:
        # No `await` until the socket is closed, so the server cannot accept before; and
        # closing with a linger time of 0 sends a reset.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        client.connect(server.address)
    await until(lambda: server.connections.outcomes.total() == 1)
    assert server.connections.outcomes == {Outcome.WENT_AWAY: 1}
    assert await server.ask() == REPLY
    server.shutdown.begin()


async def test_more_than_a_kilobyte_does_not_cost_the_client_its_reply(
    nursery: trio.Nursery,
) -> None:
    server = Server()
    await server.start(nursery)
    for _ in range(4):
        assert await server.ask(b"x" * 1500) == REPLY
    server.shutdown.begin()


async def test_in_memory_listeners(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    server = Server(hello_world)
    listener = MemoryListener()
    serve = partial(serve_listeners, server.handler, [listener], shutdown=server.shutdown)
    assert await nursery.start(serve) == [listener]
    client = listener.connect()
    await client.send_all(b"hi")
    assert await read_all(client) == REPLY
    server.shutdown.begin()
    await trio.sleep(CLOSING_TIME + 0.1)
    assert listener.closed
    assert server.connections.outcomes == {Outcome.ANSWERED: 1}


async def test_tls(nursery: trio.Nursery) -> None:
    ours, theirs = (
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
    )
    ours.load_cert_chain(Path(__file__).with_name("localhost.pem"))
    theirs.check_hostname, theirs.verify_mode = False, ssl.CERT_NONE
    server = Server()
    [transport] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    listener = trio.SSLListener(transport, ours)
    nursery.start_soon(server.serve, listener)
    port = transport.socket.getsockname()[1]
    for _ in range(2):  # The first must not end the server.
        async with await trio.open_ssl_over_tcp_stream(
            "127.0.0.1", port, ssl_context=theirs
        ) as client:
            await client.send_all(b"hi")
            assert await read_all(client) == REPLY
    async with await trio.open_tcp_stream("127.0.0.1", port) as plain:
        await plain.send_all(b"GET / HTTP/1.1\r\n\r\n")
        with suppress(trio.BrokenResourceError):
            await read_all(plain)
    await until(lambda: server.connections.outcomes.total() == 3)
    assert server.connections.outcomes == {Outcome.ANSWERED: 2, Outcome.WENT_AWAY: 1}
    server.shutdown.begin()


async def test_the_queue_of_a_listener_from_elsewhere_is_left_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as shared, ExitStack() as stack:

        def own() -> trio.SocketListener:
            return trio.SocketListener(trio.socket.from_stdlib_socket(shared.dup()))

        server, listener = Server(), own()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve, listener)
            server.shutdown.begin()
        assert listener.socket.fileno() == -1
        # Nobody serves now; the kernel goes on completing connections for the next server.
        clients = queued(shared.getsockname(), 20, stack)
        server = Server()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve, own())
            assert await replies_of(clients) == [REPLY] * 20
            server.shutdown.begin()
        assert server.connections.outcomes == {Outcome.ANSWERED: 20}


async def test_what_was_accepted_from_a_shared_queue_is_served_although_the_shutdown_begins() -> (
    None
):
    with socket.create_server(("127.0.0.1", 0)) as shared, ExitStack() as stack:
        clients = queued(shared.getsockname(), 2 * BATCH, stack)
        server = Server(partial(hello_world, delay=0))
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(shared.dup()))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve, listener)
            await until(lambda: server.connections.open)
            server.shutdown.begin()
            assert await replies_of(clients) == [REPLY] * len(clients)


@pytest.mark.parametrize("own", [True, False], ids=["serve_tcp", "serve_listeners"])
async def test_a_queue_is_emptied_before_the_first_handler_starts(
    own: bool,  # noqa: FBT001 - pytest passes it
    nursery: trio.Nursery,
) -> None:
    open_at_first_request: list[int] = []

    async def handler(stream: trio.abc.Stream) -> None:
        queue = socket.socket(fileno=listener.socket.fileno())
        try:
            with pytest.raises(BlockingIOError):
                queue.accept()
        finally:
            queue.detach()
        open_at_first_request.append(1)
        await echo(stream)

    shutdown = Shutdown()
    if own:
        [listener] = await nursery.start(
            partial(serve_tcp, handler, 0, host="127.0.0.1", shutdown=shutdown)
        )
    else:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(partial(serve_listeners, handler, [listener], shutdown=shutdown))
    with ExitStack() as stack:
        queued(listener.socket.getsockname(), 50, stack)
        await until(lambda: len(open_at_first_request) == 50)
    shutdown.begin()


async def test_a_unix_socket(nursery: trio.Nursery, tmp_path: Path) -> None:
    address = str(tmp_path / "socket")
    listener = trio.socket.socket(socket.AF_UNIX)
    await listener.bind(address)
    listener.listen()
    server = Server()
    nursery.start_soon(server.serve, trio.SocketListener(listener))
    async with await trio.open_unix_socket(address) as client:
        await client.send_all(b"hi")
        assert await read_all(client) == REPLY
    server.shutdown.begin()


async def test_no_more_responders_at_once_than_the_limiter_allows(nursery: trio.Nursery) -> None:
    running = most = 0

    async def respond(_: bytes) -> bytes:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await trio.sleep(0.02)
        running -= 1
        return b"ok"

    server = Server(respond, limiter=trio.CapacityLimiter(3))
    await server.start(nursery)
    async with trio.open_nursery() as clients:
        for _ in range(12):
            clients.start_soon(server.ask)
    assert most == 3
    await until(lambda: server.connections.outcomes[Outcome.ANSWERED] == 12)
    server.shutdown.begin()


class Broken(MemoryListener):
    """A listener that fails after its first client, with an error that Trio does not retry."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error
        self.accepted = 0

    async def accept(self) -> trio.abc.HalfCloseableStream:
        if self.accepted == 1:
            raise self.error
        self.accepted += 1
        return await super().accept()


@pytest.mark.parametrize(
    "error", [OSError(errno.EPROTO, "broken"), trio.ClosedResourceError("closed")]
)
async def test_when_accepting_fails_what_is_in_flight_is_answered_before_it_is_raised(
    error: Exception, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    server, broken, good = Server(hello_world), Broken(error), MemoryListener()
    one, two = broken.connect(), good.connect()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.send_all, b"hi")
        nursery.start_soon(two.send_all, b"hi")
        with pytest.raises(type(error), match=r"broken|closed") as info:
            await server.serve(broken, good)
        assert info.value is error
        assert await one.receive_some() == REPLY
        assert await two.receive_some() == REPLY
    assert server.connections.outcomes == {Outcome.ANSWERED: 2}
    assert "accepting failed" in caplog.text
    assert good.closed


async def test_when_a_listener_is_closed_by_its_owner_what_is_in_flight_is_answered() -> None:
    server = Server()
    with pytest.RaisesGroup(trio.ClosedResourceError):
        async with (
            trio.open_nursery() as nursery,
            await server.with_one_in_flight(nursery) as client,
        ):
            server.listener.socket.close()
            assert await read_all(client) == REPLY
    assert server.connections.outcomes == {Outcome.ANSWERED: 1}


async def test_when_accepting_fails_the_work_in_flight_may_still_be_given_an_end(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(partial(hello_world, delay=1000))
    broken = Broken(OSError(errno.EPROTO, "broken"))
    client = broken.connect()
    await client.send_all(b"hi")
    async with trio.open_nursery() as nursery:

        async def end() -> None:
            await trio.sleep(500)
            assert server.connections.in_flight == 1
            server.shutdown.begin(10)

        nursery.start_soon(end)
        with pytest.raises(OSError, match="broken"):
            await server.serve(broken)
        assert trio.current_time() == 510
    assert server.connections.outcomes == {Outcome.CUT_OFF: 1}


async def test_a_default_timeout_of_sockets_holds_nobody_up(nursery: trio.Nursery) -> None:
    socket.setdefaulttimeout(30)
    try:
        server = Server()
        await server.start(nursery)
        with trio.fail_after(20):
            assert await server.ask() == REPLY
    finally:
        socket.setdefaulttimeout(None)
    server.shutdown.begin()


async def test_ports_that_are_none(autojump_clock: MockClock) -> None:
    for port in (-1, 65_536, 70_000):
        with pytest.raises(ValueError, match=rf"^port is {port}: .* 0 to 65535"):
            await serve_tcp(echo, port)


async def test_no_listeners() -> None:
    with pytest.raises(ValueError, match=r"^listeners is empty"):
        await serve_listeners(echo, [])


async def test_a_handler_may_serve_twice(nursery: trio.Nursery) -> None:
    server = Server()
    for _ in range(2):
        server.shutdown = Shutdown()
        await server.start(nursery)
        assert await server.ask() == REPLY
        server.shutdown.begin()


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
    shutdown = Shutdown()
    listeners = await nursery.start(partial(serve_tcp, echo, 0, host="name", shutdown=shutdown))
    assert [listener.socket.getsockname()[0] for listener in listeners] == ["127.0.0.1"]
    assert f"not listening on {NOWHERE}: " in caplog.text
    await (await open_stream_to_socket_listener(listeners[0])).aclose()
    shutdown.begin()


async def test_no_available_address_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    trio.socket.set_custom_hostname_resolver(Resolver(NOWHERE))
    with pytest.raises(OSError, match="this machine has no address of 'name'") as info:
        await serve_tcp(echo, 0, host="name")
    assert info.value.errno == errno.EADDRNOTAVAIL
    assert not caplog.records


async def test_each_address_gets_a_listener_and_a_repeated_one_gets_one(
    nursery: trio.Nursery,
) -> None:
    trio.socket.set_custom_hostname_resolver(Resolver("127.0.0.1", "127.0.0.2", "127.0.0.1"))
    listeners = await nursery.start(partial(serve_tcp, echo, 0, host="name"))
    addresses = [listener.socket.getsockname()[0] for listener in listeners]
    assert addresses == ["127.0.0.1", "127.0.0.2"]
    for listener in listeners:
        await (await open_stream_to_socket_listener(listener)).aclose()
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("host", [None, ""])
async def test_no_host_is_all_interfaces(host: str | None, nursery: trio.Nursery) -> None:
    listeners = await nursery.start(partial(serve_tcp, echo, 0, host=host))
    found = {listener.socket.getsockname()[0] for listener in listeners}
    assert found <= {"0.0.0.0", "::"}  # noqa: S104
    assert "0.0.0.0" in found  # noqa: S104
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("host", ["a..b", "a" * 64, "host.invalid"])
async def test_a_name_that_does_not_resolve(host: str) -> None:
    with pytest.raises(socket.gaierror):
        await serve_tcp(echo, 0, host=host)


async def test_a_start_that_fails_is_a_plain_error_and_has_accepted_nobody() -> None:
    handled = []

    async def handler(stream: trio.abc.Stream) -> None:
        handled.append(stream)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with socket.socket() as first:
            trio.socket.set_custom_hostname_resolver(Resolver("127.0.0.2", "127.0.0.1"))
            first.settimeout(0)

            class Connect(trio.abc.Instrument):
                """Connects to the first address as soon as that listens."""

                def after_task_step(self, _: trio.lowlevel.Task) -> None:
                    with suppress(OSError):
                        first.connect_ex(("127.0.0.2", port))

            trio.lowlevel.add_instrument(instrument := Connect())
            try:
                with pytest.raises(OSError, match="in use") as info:
                    await serve_tcp(handler, port, host="name")
            finally:
                trio.lowlevel.remove_instrument(instrument)
            assert info.value.errno == errno.EADDRINUSE
        with socket.socket() as client, pytest.raises(ConnectionRefusedError):
            client.connect(("127.0.0.2", port))
    assert handled == []


async def test_a_shutdown_that_begins_before_returns_without_listening(
    nursery: trio.Nursery,
) -> None:
    shutdown = Shutdown()
    shutdown.begin()
    serve = partial(serve_tcp, echo, 0, host="127.0.0.1", shutdown=shutdown)
    with trio.fail_after(5):
        assert await nursery.start(serve) == []


@pytest.mark.parametrize("grace_period", [0, math.inf])
async def test_a_shutdown_that_begins_while_the_name_is_resolved_ends_that(
    grace_period: float, autojump_clock: MockClock
) -> None:
    trio.socket.set_custom_hostname_resolver(Resolver())  # never answers
    shutdown = Shutdown()
    async with trio.open_nursery() as nursery:

        async def begin() -> None:
            await trio.sleep(10)
            shutdown.begin(grace_period)

        nursery.start_soon(begin)
        serve = partial(serve_tcp, echo, 0, host="name", shutdown=shutdown)
        assert await nursery.start(serve) == []
    assert trio.current_time() == pytest.approx(10 + min(grace_period, CLOSING_TIME))


@pytest.mark.parametrize(
    ("respond", "reply"), [(fast, REPLY), (never, b"")], ids=["in time", "for longer than that"]
)
async def test_a_shutdown_that_begins_between_two_addresses_leaves_its_clients_the_grace_period(
    respond: Responder, reply: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(respond)
    opened: list[trio.SocketListener] = []
    with ExitStack() as stack:
        clients: list[socket.socket] = []
        open_listeners = trio.open_tcp_listeners

        async def open_and_begin(*args: Any, **kwargs: Any) -> list[trio.SocketListener]:
            listeners = await open_listeners(*args, **kwargs)
            if not opened:
                clients.extend(queued(listeners[0].socket.getsockname(), 3, stack))
                server.shutdown.begin(2)
            opened.extend(listeners)
            return listeners

        monkeypatch.setattr(trio, "open_tcp_listeners", open_and_begin)
        trio.socket.set_custom_hostname_resolver(Resolver("127.0.0.1", "127.0.0.2"))
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                serve = partial(
                    serve_tcp, server.handler, 0, host="name", shutdown=server.shutdown
                )
                assert len(await nursery.start(serve)) == 2
                assert await replies_of(clients) == [reply] * 3
