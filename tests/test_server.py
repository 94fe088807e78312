"""`serve_gracefully`: starting, accepting, stopping, and what happens to handlers that fail."""

import errno
import logging
import math
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from streams import (
    RESET_ON_CLOSE,
    MemoryListener,
    Server,
    fast,
    never,
    queued,
    read_all,
    replies_of,
    tls_contexts,
    until,
)
from trio.testing import (
    MockClock,
    memory_stream_pair,
    open_stream_to_socket_listener,
    wait_all_tasks_blocked,
)

from trio_server import Outcome, Shutdown, hello_world, serve_connection, serve_gracefully
from trio_server import handlers as handlers_module
from trio_server import server as server_module
from trio_server.accept_queue import accept_waiting, any_waiting
from trio_server.handlers import BATCH, HandlerStarter
from trio_server.responder import REPLY
from trio_server.server import EMPTYING_TIME, HANDSHAKE_TIME
from trio_server.shutdown import IDLE_TIME

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's socket filters")


@pytest.fixture
def jumping_clock() -> MockClock:
    """A clock that jumps when nothing happens for a moment, for tests that use sockets."""
    return MockClock(autojump_threshold=0.02)


async def nothing(_: trio.abc.AsyncResource) -> None:
    """Be a handler that ends at once."""


async def echo(stream: trio.abc.Stream) -> None:
    async for chunk in stream:
        await stream.send_all(chunk)


# Starting


async def test_the_listeners_are_returned_by_the_start(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    server, listener = Server(hello_world), MemoryListener()
    await server.start(nursery, listener)
    assert server.listeners == [listener]
    client = listener.connect()
    await client.send_all(b"hi")
    assert await read_all(client) == REPLY
    await client.aclose()
    server.shutdown.begin()
    await trio.sleep(1)
    assert listener.closed
    assert server.account.outcomes == {Outcome.ANSWERED: 1}


class Resolver(trio.abc.HostnameResolver):
    """Never resolves a name, or raises an error."""

    def __init__(self, error: OSError | None = None) -> None:
        self.error = error

    async def getaddrinfo(self, *_: Any) -> Any:
        if self.error is not None:
            raise self.error
        await trio.sleep_forever()

    async def getnameinfo(self, *_: Any) -> tuple[str, str]:
        raise NotImplementedError


@contextmanager
def start_that_fails(kind: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int, int]]:
    """Prepare a failure; yield a host, a port, and the error number."""

    async def open_tcp_listeners(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with socket.create_server(("127.0.0.1", 0)) as taken:
        match kind:
            case "taken port":
                yield "127.0.0.1", taken.getsockname()[1], errno.EADDRINUSE
            case "unknown host":
                error = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
                trio.socket.set_custom_hostname_resolver(Resolver(error))
                yield "name", 0, socket.EAI_NONAME
            case "missing privilege":
                monkeypatch.setattr(trio, "open_tcp_listeners", open_tcp_listeners)
                yield "127.0.0.1", 80, errno.EACCES


async def call(function: Callable[..., Awaitable[object]], *arguments: object) -> None:
    await function(*arguments)


@pytest.mark.parametrize("started_by", ["await", "nursery.start"])
@pytest.mark.parametrize("kind", ["taken port", "unknown host", "missing privilege"])
async def test_a_start_that_fails_raises_the_plain_error_of_trio(
    kind: str,
    started_by: str,
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shutdown = Shutdown()
    with start_that_fails(kind, monkeypatch) as (host, port, number):
        server = partial(trio.serve_tcp, nothing, port, host=host)
        start = nursery.start if started_by == "nursery.start" else call
        with pytest.raises(OSError) as info:  # noqa: PT011 - the number says which
            await start(serve_gracefully, server, shutdown)
    assert info.value.errno == number
    assert not shutdown.begun
    assert not caplog.records


@pytest.mark.parametrize(
    "server",
    [trio.serve_tcp, partial(trio.serve_tcp, nothing), nothing, lambda: None, 1729],
    ids=["no arguments", "no port", "a handler", "no nursery", "no function"],
)
async def test_what_is_not_a_server_of_trio_is_a_type_error_that_shows_one(server: Any) -> None:
    with pytest.raises(TypeError, match=r"partial\(trio\.serve_tcp, handler, 1729\)"):
        await serve_gracefully(server, Shutdown())


@pytest.mark.parametrize("grace_period", [0, math.inf])
async def test_a_shutdown_that_begins_while_a_name_is_resolved_ends_the_start(
    grace_period: float, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    trio.socket.set_custom_hostname_resolver(Resolver())
    shutdown = Shutdown()

    async def begin() -> None:
        await trio.sleep(10)
        shutdown.begin(grace_period)

    nursery.start_soon(begin)
    server = partial(trio.serve_tcp, nothing, 0, host="name")
    before = trio.current_time()
    assert await nursery.start(serve_gracefully, server, shutdown) == []
    assert trio.current_time() == before + 10 + min(grace_period, IDLE_TIME)


async def test_a_shutdown_that_begins_during_the_start_answers_a_client_that_is_connected(
    jumping_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server()
    open_tcp_listeners = trio.open_tcp_listeners
    with socket.socket() as client:

        async def open_and_begin(port: int, **settings: Any) -> list[trio.SocketListener]:
            listeners = await open_tcp_listeners(port, **settings)
            client.connect(listeners[0].socket.getsockname())
            client.sendall(b"hi\n")
            server.shutdown.begin()
            return listeners

        monkeypatch.setattr(trio, "open_tcp_listeners", open_and_begin)
        async with trio.open_nursery() as nursery:
            await server.start(nursery)
            assert await replies_of([client]) == [REPLY]
    assert server.account.outcomes == {Outcome.ANSWERED: 1}


# Accepting


async def test_trio_starts_a_handler_in_the_way_that_is_relied_on(nursery: trio.Nursery) -> None:
    """If this fails, Trio has changed: adapt `HandlerStarter.start_soon`."""
    calls: list[tuple[Any, ...]] = []

    class Recorder:
        def start_soon(self, *arguments: object) -> None:
            calls.append(arguments)

    listener = MemoryListener()
    serve = partial(trio.serve_listeners, nothing, [listener], handler_nursery=Recorder())  # type: ignore[arg-type]
    await nursery.start(serve)
    await listener.connect().aclose()
    await wait_all_tasks_blocked()
    [(run, stream, handler)] = calls
    assert callable(run)
    assert isinstance(stream, trio.StapledStream)
    assert handler is nothing
    await stream.aclose()
    nursery.cancel_scope.cancel()


async def test_a_handler_is_also_started_in_the_way_that_trio_documents(
    autojump_clock: MockClock,
) -> None:
    seen = []

    async def handler(stream: trio.abc.Stream) -> None:
        seen.append(stream)

    async def serve(
        *, handler_nursery: HandlerStarter, task_status: trio.TaskStatus[list[object]]
    ) -> None:
        task_status.started([])
        handler_nursery.start_soon(handler, stream)
        await trio.sleep_forever()

    shutdown, (_client, stream) = Shutdown(), memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_gracefully, serve, shutdown)
        await wait_all_tasks_blocked()
        shutdown.begin(5)
    assert seen == [stream]


async def serve_queued(nursery: trio.Nursery, number: int, *, shared: bool = False) -> list[bool]:
    """Serve clients from the queue; return for each handler whether others were left there."""
    left_waiting = []

    async def handler(_: trio.SocketStream) -> None:
        left_waiting.append(any_waiting([server.listeners[0].socket]))

    server = Server(handler=handler, shared=shared)
    await server.start(nursery)
    with queued(server.address, number):
        await until(lambda: len(left_waiting) == number)
    return left_waiting


async def test_all_in_the_accept_queue_are_accepted_before_the_first_handler_starts(
    nursery: trio.Nursery,
) -> None:
    assert not any(await serve_queued(nursery, 3 * BATCH))


async def test_with_too_many_waiting_for_a_handler_the_rest_stays_in_the_accept_queue(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    rooms: list[int] = []

    def accept(listener: trio.socket.SocketType, most: int) -> list[socket.socket]:
        rooms.append(most)
        return accept_waiting(listener, most)

    monkeypatch.setattr(handlers_module, "MOST_ACCEPTED", 10)
    monkeypatch.setattr(handlers_module, "accept_waiting", accept)
    assert (await serve_queued(nursery, 25))[:10] == [True] * 10
    assert rooms[0] == 9  # Trio has accepted one.


@pytest.mark.parametrize("shared", [False, True])
async def test_handlers_start_in_the_order_of_arrival(
    shared: bool,  # noqa: FBT001 - pytest passes it
    nursery: trio.Nursery,
) -> None:
    peers = []

    async def handler(stream: trio.SocketStream) -> None:
        peers.append(stream.socket.getpeername())

    # Of the tasks that start in one pass, Trio runs the last one first half of the time.
    server = Server(handler=handler, shared=shared)
    await server.start(nursery)
    with queued(server.address, 3 * BATCH) as clients:
        await until(lambda: len(peers) == len(clients))
        names = [client.getsockname() for client in clients]
    size = 1 if shared else BATCH
    for begin in range(0, 3 * BATCH, size):
        assert sorted(peers[begin : begin + size]) == sorted(names[begin : begin + size])


class Passes(trio.abc.Instrument):
    """Counts the passes of the scheduler."""

    number = 0

    def before_io_wait(self, timeout: float) -> None:  # noqa: ARG002 - Trio passes it
        self.number += 1


@pytest.mark.parametrize(
    ("accepted_at_once", "most"),
    [(10_000, BATCH), (4 * BATCH, 2 * BATCH)],  # One batch may end a pass that another one begins.
)
async def test_handlers_start_in_batches_with_a_scheduler_pass_between(
    accepted_at_once: int, most: int, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handlers_module, "MOST_ACCEPTED", accepted_at_once)
    passes, starts = Passes(), Counter[int]()
    trio.lowlevel.add_instrument(passes)

    async def handler(_: trio.SocketStream) -> None:
        starts[passes.number] += 1

    server = Server(handler=handler)
    await server.start(nursery)
    with queued(server.address, 8 * BATCH + 1):
        await until(lambda: starts.total() == 8 * BATCH + 1)
    assert max(starts.values()) <= most
    trio.lowlevel.remove_instrument(passes)


async def test_with_a_shared_listener_the_queue_is_left_to_the_other_processes(
    nursery: trio.Nursery,
) -> None:
    assert (await serve_queued(nursery, 10, shared=True))[:5] == [True] * 5


class WrappedListener(trio.abc.Listener[trio.SocketStream]):
    """A listener of an author's own. As Trio's for TLS, it shows what it wraps."""

    def __init__(self, listener: trio.SocketListener) -> None:
        self.transport_listener = listener
        self.accepted = 0

    async def accept(self) -> trio.SocketStream:
        stream = await self.transport_listener.accept()
        self.accepted += 1
        return stream

    async def aclose(self) -> None:
        await self.transport_listener.aclose()


async def plain_listener() -> trio.SocketListener:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    return listener


async def test_a_listener_that_is_not_plain_accepts_all_by_itself(nursery: trio.Nursery) -> None:
    server, listener = Server(), WrappedListener(await plain_listener())
    await server.start(nursery, listener)
    with queued(server.address, 20, b"hi") as clients:
        assert await replies_of(clients) == [REPLY] * 20
    assert listener.accepted == 20


async def test_a_unix_socket(nursery: trio.Nursery, tmp_path: Path) -> None:
    address = str(tmp_path / "socket")
    listener = trio.socket.socket(socket.AF_UNIX)
    await listener.bind(address)
    listener.listen()
    server = Server()
    await server.start(nursery, trio.SocketListener(listener))
    with queued(address, 5, b"hi") as clients:
        assert await replies_of(clients) == [REPLY] * 5
    with queued(address, 5, b"hi") as clients:
        server.shutdown.begin()
        assert await replies_of(clients) == [REPLY] * 5


@contextmanager
def files_left(number: int) -> Iterator[None]:
    """Let this process open this many more files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    probes = [os.dup(0) for _ in range(number)]
    limit = max(probes) + 1
    for probe in probes:
        os.close(probe)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_at_the_limit_of_open_files_clients_wait_and_trio_logs(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server()
    await server.start(nursery)
    with queued(server.address, 8, b"hi") as clients, files_left(3):
        before = trio.current_time()
        assert await replies_of(clients) == [REPLY] * 8
        seconds = trio.current_time() - before
    complaints = [message for message in caplog.messages if "accept returned EMFILE" in message]
    assert 1 <= len(complaints) <= seconds / 0.1 + 1  # Trio tries again after 0.1 s.
    assert caplog.messages == complaints


async def test_a_client_that_resets_before_it_is_accepted(nursery: trio.Nursery) -> None:
    server = Server()
    await server.start(nursery)
    with queued(server.address, 1) as [client]:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    await until(lambda: server.account.outcomes.total() == 1)
    assert server.account.outcomes == {Outcome.WENT_AWAY: 1}
    assert await server.ask() == REPLY


async def test_a_client_that_closes_during_the_work_went_away(nursery: trio.Nursery) -> None:
    """This is what `curl -m 1` does at a delay of 4 s."""
    server = Server()
    client = await server.with_one_in_flight(nursery)
    await client.aclose()
    await until(lambda: server.account.outcomes.total() == 1)
    assert server.account.outcomes == {Outcome.WENT_AWAY: 1}


@pytest.mark.parametrize("size", [1500, 3_000_000, 40_000_000])
async def test_more_than_a_kilobyte_does_not_cost_the_client_its_reply(
    size: int, nursery: trio.Nursery
) -> None:
    server = Server(partial(hello_world, delay=0))
    await server.start(nursery)
    assert await server.ask(bytes(size)) == REPLY


async def test_a_late_second_packet_does_not_cost_the_client_its_reply(
    nursery: trio.Nursery,
) -> None:
    server = Server(partial(hello_world, delay=0))
    await server.start(nursery)
    async with await server.connect(b"hi") as client:
        await until(lambda: [one for one in server.account.open if one.answered_at])
        await client.send_all(b"late")
        await trio.sleep(0.02)
        assert await read_all(client) == REPLY


class Program:
    """Serves on an inherited socket, and answers with its process id after 2 ms."""

    TEXT = """
import os, socket, sys, time, trio
from functools import partial
from trio_server import Shutdown, serve_gracefully

async def handler(stream):
    await stream.receive_some()
    time.sleep(0.002)  # This stops the whole process, as work for the processor does.
    await stream.send_all(str(os.getpid()).encode())

async def main():
    inherited = socket.socket(fileno=int(sys.argv[1]))
    listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(inherited))]
    async with trio.open_nursery() as nursery:
        server = partial(trio.serve_listeners, handler, listeners)
        await nursery.start(partial(serve_gracefully, server, Shutdown(), shared=True))
        print("ready", flush=True)

trio.run(main)
"""

    def __init__(self, listener: socket.socket) -> None:
        command = [sys.executable, "-c", self.TEXT, str(listener.fileno())]
        self.popen = subprocess.Popen(
            command, pass_fds=[listener.fileno()], stdout=subprocess.PIPE
        )

    def wait_until_ready(self) -> None:
        assert self.popen.stdout
        assert self.popen.stdout.readline() == b"ready\n"

    def suspend(self) -> None:
        self.popen.send_signal(signal.SIGSTOP)
        os.waitpid(self.popen.pid, os.WUNTRACED)

    def resume(self) -> None:
        self.popen.send_signal(signal.SIGCONT)

    def end(self) -> None:
        self.popen.kill()
        self.popen.communicate()


async def test_two_processes_on_one_socket_get_a_third_to_two_thirds_of_a_burst_each() -> None:
    smaller_shares = []
    with socket.create_server(("127.0.0.1", 0), backlog=200) as listener:
        programs = [Program(listener) for _ in range(2)]
        try:
            for program in programs:
                program.wait_until_ready()
            for _ in range(5):
                for program in programs:
                    program.suspend()
                with queued(listener.getsockname(), 100, b"hi") as clients:
                    for program in programs:
                        program.resume()
                    replies = await replies_of(clients)
                shares = [replies.count(str(program.popen.pid).encode()) for program in programs]
                assert sum(shares) == 100
                smaller_shares.append(min(shares))
        finally:
            for program in programs:
                program.end()
    assert statistics.median(smaller_shares) > 33


# Stopping


async def test_a_shutdown_answers_what_is_in_flight_and_refuses_new_connections(
    jumping_clock: MockClock,
) -> None:
    server = Server(partial(hello_world, delay=HANDSHAKE_TIME + 0.2))
    async with (
        trio.open_nursery() as nursery,
        await server.with_one_in_flight(nursery) as client,
    ):
        address = server.address
        server.shutdown.begin()
        await trio.sleep(HANDSHAKE_TIME + 0.1)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        assert await read_all(client) == REPLY
    assert server.account.outcomes == {Outcome.ANSWERED: 1}


@linux_only
async def test_new_connections_are_ignored_from_the_beginning_of_a_shutdown_on() -> None:
    server = Server()
    async with trio.open_nursery() as nursery:
        await server.start(nursery)
        assert await server.ask() == REPLY
        server.shutdown.begin()
        await trio.sleep(0.02)
        assert server.is_listening
        with socket.socket() as late:
            late.settimeout(0)
            late.connect_ex(server.address)
            await trio.sleep(0.1)
            with pytest.raises(OSError, match="not connected"):
                late.getpeername()
    assert server.account.outcomes == {Outcome.ANSWERED: 1}


@pytest.mark.parametrize(
    ("seconds_ago", "waits"), [(0.9, HANDSHAKE_TIME), (1.1, 0), (math.inf, 0)]
)
async def test_handshakes_are_waited_for_if_a_connection_was_accepted_within_the_last_second(
    seconds_ago: float, waits: float, nursery: trio.Nursery, jumping_clock: MockClock
) -> None:
    server = Server(handler=nothing)
    await server.start(nursery)
    if seconds_ago < math.inf:
        assert await server.ask(b"") == b""
        await trio.sleep(seconds_ago)
    before = trio.current_time()
    server.shutdown.begin()
    await wait_all_tasks_blocked()
    await trio.sleep(1)
    assert server.ended_at == before + waits


async def test_an_idle_server_stops_at_once_although_all_worker_threads_are_busy(
    nursery: trio.Nursery, jumping_clock: MockClock
) -> None:
    server = Server()
    await server.start(nursery)
    limiter = trio.to_thread.current_default_thread_limiter()
    for number in range(int(limiter.total_tokens)):
        limiter.acquire_on_behalf_of_nowait(number)
    before = trio.current_time()
    server.shutdown.begin()
    await trio.sleep(5)
    assert server.ended_at == before


@pytest.mark.parametrize("begun_by", ["a task", "the first handler"])
@pytest.mark.parametrize("wraps", [False, True])
async def test_all_clients_in_the_accept_queue_are_answered(
    wraps: bool,  # noqa: FBT001 - pytest passes it
    begun_by: str,
    jumping_clock: MockClock,
) -> None:
    async def respond(request: bytes) -> bytes:
        if begun_by != "a task":
            server.shutdown.begin()
        return await fast(request)

    server = Server(respond)
    async with trio.open_nursery() as nursery:
        listener = await plain_listener()
        await server.start(nursery, WrappedListener(listener) if wraps else listener)
        with queued(server.address, 2 * BATCH, b"hi") as clients:
            if begun_by == "a task":
                server.shutdown.begin()
            assert await replies_of(clients) == [REPLY] * len(clients)
    assert server.account.outcomes == {Outcome.ANSWERED: 2 * BATCH}


async def test_tls_clients_in_the_accept_queue_are_answered(jumping_clock: MockClock) -> None:
    ours, theirs = tls_contexts()
    shutdown = Shutdown()
    answered = []

    async def handler(stream: trio.SSLStream[trio.SocketStream]) -> None:
        await stream.send_all(await stream.receive_some())

    async def ask(client: socket.socket) -> None:
        transport = trio.SocketStream(trio.socket.from_stdlib_socket(client))
        stream = trio.SSLStream(transport, theirs)
        await stream.send_all(b"hi")
        answered.append(bytes(await stream.receive_some()))
        await trio.aclose_forcefully(stream)

    async with trio.open_nursery() as nursery:
        server = partial(trio.serve_ssl_over_tcp, handler, 0, ours, host="127.0.0.1")
        [listener] = await nursery.start(serve_gracefully, server, shutdown)
        address = listener.transport_listener.socket.getsockname()
        with queued(address, 20) as clients:
            shutdown.begin()
            async with trio.open_nursery() as tasks:
                for client in clients:
                    tasks.start_soon(ask, client)
    assert answered == [b"hi"] * 20


@linux_only
async def test_listeners_are_closed_in_the_step_in_which_their_queues_are_found_empty(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that connects at the next checkpoint is refused. It would be reset otherwise."""
    server = Server()
    await server.start(nursery)
    address = server.address
    refused = []

    class AfterThisStep(trio.abc.Instrument):
        def after_task_step(self, _: trio.lowlevel.Task) -> None:
            trio.lowlevel.remove_instrument(self)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(address, timeout=0.1)
            refused.append(True)

    def check(sockets: list[trio.socket.SocketType]) -> bool:
        waiting = any_waiting(sockets)
        if not waiting:
            trio.lowlevel.add_instrument(AfterThisStep())
        return waiting

    monkeypatch.setattr(server_module, "any_waiting", check)
    with queued(address, 1, b"hi") as clients:
        server.shutdown.begin()
        assert await replies_of(clients) == [REPLY]
    await until(lambda: refused)


async def test_closing_a_listener_whose_accept_loop_is_about_to_run_is_no_failure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It relies on a checkpoint in the `aclose` of Trio's listener."""
    met_a_closed_socket = []

    class Listener(WrappedListener):
        async def accept(self) -> trio.SocketStream:
            try:
                return await super().accept()
            except trio.ClosedResourceError:
                met_a_closed_socket.append(True)
                raise

    for _ in range(100):  # The connection and the shutdown wake two tasks in a random order.
        server = Server(shared=True)
        async with trio.open_nursery() as nursery:
            await server.start(nursery, Listener(await plain_listener()))
            await wait_all_tasks_blocked()
            with queued(server.address, 1):
                server.shutdown.begin()
        if met_a_closed_socket:
            break
    assert met_a_closed_socket
    assert not caplog.records


@pytest.mark.parametrize(
    ("filtered", "seconds"), [(False, HANDSHAKE_TIME + EMPTYING_TIME), (True, 5)]
)
async def test_without_a_filter_the_queue_is_emptied_for_a_limited_time(
    filtered: bool,  # noqa: FBT001 - pytest passes it
    seconds: float,
    nursery: trio.Nursery,
    jumping_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Clients that keep coming would delay the end for ever."""
    server = Server()
    await server.start(nursery)
    before = trio.current_time()
    # A task that is blocked keeps the clock from running: the queue has clients for 5 s.
    monkeypatch.setattr(server_module, "ignore_new_connections", lambda _: filtered)
    monkeypatch.setattr(server_module, "any_waiting", lambda _: trio.current_time() < before + 5)
    monkeypatch.setattr(server_module, "POLL_INTERVAL", 0.5)
    server.shutdown.begin()
    await trio.sleep(10)
    assert server.ended_at == before + seconds


async def test_a_shared_queue_and_its_options_are_left_to_the_next_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as shared:

        async def start(nursery: trio.Nursery) -> Server:
            server = Server(shared=True)
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(shared.dup()))
            await server.start(nursery, listener)
            return server

        async with trio.open_nursery() as nursery:
            server = await start(nursery)
            assert await server.ask() == REPLY
            address = server.address
            server.shutdown.begin()
        assert not server.is_listening
        # No process accepts now. The kernel still connects clients, for the next server.
        with queued(address, 20, b"hi") as clients:
            async with trio.open_nursery() as nursery:
                server = await start(nursery)
                assert await replies_of(clients) == [REPLY] * 20
                server.shutdown.begin()
        assert server.account.outcomes == {Outcome.ANSWERED: 20}


async def test_what_was_accepted_last_is_served_although_its_accept_loop_is_cancelled() -> None:
    class Listener(WrappedListener):
        async def accept(self) -> trio.SocketStream:
            stream = await super().accept()
            server.shutdown.begin()
            with trio.CancelScope(shield=True):
                await until(lambda: not server.is_listening)
            return stream

    server = Server(shared=True)
    async with trio.open_nursery() as nursery:
        await server.start(nursery, Listener(await plain_listener()))
        assert await server.ask() == REPLY
    assert server.account.outcomes == {Outcome.ANSWERED: 1}


async def test_a_late_request_of_a_connected_client_is_answered_within_the_idle_time(
    nursery: trio.Nursery, jumping_clock: MockClock
) -> None:
    server = Server()
    await server.start(nursery)
    async with await server.connect() as silent, await server.connect() as late:
        await until(lambda: len(server.account.open) == 2)
        server.shutdown.begin()
        await trio.sleep(IDLE_TIME - 0.1)
        await late.send_all(b"still in time")
        assert await read_all(late) == REPLY
        assert await read_all(silent) == b""
    await until(lambda: server.account.outcomes.total() == 2)
    assert server.account.outcomes == {Outcome.ANSWERED: 1, Outcome.SENT_NOTHING: 1}


async def test_cancelling_stops_at_once_and_closes_all() -> None:
    server = Server(never)
    async with trio.open_nursery() as nursery:
        client = await server.with_one_in_flight(nursery)
        nursery.cancel_scope.cancel()
    assert server.account.outcomes == {Outcome.CUT_OFF: 1}
    assert not server.is_listening
    assert await read_all(client) == b""
    await client.aclose()


async def test_cancelling_closes_the_connections_whose_handler_has_not_started() -> None:
    streams = []

    async def handler(stream: trio.SocketStream) -> None:
        streams.append(stream)
        nursery.cancel_scope.cancel()
        await trio.sleep_forever()

    server = Server(handler=handler)
    async with trio.open_nursery() as nursery:
        await server.start(nursery)
        with queued(server.address, 3 * BATCH):
            await trio.sleep_forever()
    assert len(streams) == 3 * BATCH
    assert all(stream.socket.fileno() == -1 for stream in streams)


async def test_a_forced_stop_counts_each_client_that_had_sent_its_request_as_cut_off(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = Server()
    async with trio.open_nursery() as nursery:
        await server.start(nursery)
        with queued(server.address, 100) as clients:
            await until(lambda: len(server.account.open) == 100)
            for client in clients:
                client.sendall(b"hi")
            server.shutdown.begin(0)
    assert server.account.outcomes == {Outcome.CUT_OFF: 100}
    assert caplog.messages == ["handlers cancelled by the shutdown: 100"]


def stopped_by_its_first_client() -> Server:
    """Return a server that is stopped at once when a handler starts."""

    async def handler(stream: trio.SocketStream) -> None:
        server.shutdown.begin(0)
        await serve_connection(stream, never, account=server.account)

    server = Server(handler=handler)
    return server


@pytest.mark.parametrize(
    ("request_", "outcome"), [(b"hi", Outcome.CUT_OFF), (b"", Outcome.SENT_NOTHING)]
)
async def test_a_client_whose_handler_starts_too_late_is_cut_off_if_it_has_sent_a_request(
    request_: bytes, outcome: Outcome
) -> None:
    server = stopped_by_its_first_client()
    async with trio.open_nursery() as nursery:
        await server.start(nursery)
        with queued(server.address, 2 * BATCH, request_):  # Half of them start after `begin`.
            await until(lambda: server.ended_at < math.inf)
    assert server.account.outcomes == {outcome: 2 * BATCH}


async def test_a_client_that_had_closed_in_the_accept_queue_is_not_cut_off() -> None:
    server = stopped_by_its_first_client()
    async with trio.open_nursery() as nursery:
        await server.start(nursery)
        socket.create_connection(server.address).close()
        await until(lambda: server.ended_at < math.inf)
    assert server.account.outcomes == {Outcome.SENT_NOTHING: 1}


async def test_a_stream_that_another_task_closes_raises_the_error_of_trio() -> None:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    client = await open_stream_to_socket_listener(listener)
    stream = await listener.accept()
    async with listener, client, trio.open_nursery() as nursery:
        nursery.start_soon(close_when_blocked, stream)
        with pytest.raises(trio.ClosedResourceError):
            await serve_connection(stream, never)


async def close_when_blocked(stream: trio.abc.AsyncResource) -> None:
    await wait_all_tasks_blocked()
    await stream.aclose()


async def test_the_number_of_handlers_that_the_grace_period_cuts_off_is_a_warning(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    seconds = iter((10, 20, 30, 40))

    async def handler(_: trio.abc.Stream) -> None:
        await trio.sleep(next(seconds))

    server, listener = Server(handler=handler), MemoryListener()
    async with trio.open_nursery() as nursery:
        await server.start(nursery, listener)
        clients = [listener.connect() for _ in range(4)]
        await wait_all_tasks_blocked()
        server.shutdown.begin(25)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == "handlers cancelled by the shutdown: 2"
    for client in clients:
        await client.aclose()


@pytest.mark.parametrize(
    "error", [OSError(errno.EPROTO, "broken"), trio.ClosedResourceError("broken")]
)
async def test_when_accepting_fails_what_is_in_flight_is_answered_before_the_error_is_raised(
    error: Exception, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(MemoryListener):
        accepted = False

        async def accept(self) -> trio.abc.HalfCloseableStream:
            if self.accepted:
                raise error
            self.accepted = True
            return await super().accept()

    server, broken, good = Server(hello_world), Broken(), MemoryListener()
    clients = [broken.connect(), good.connect()]
    server_of_trio = partial(trio.serve_listeners, server.handler, [broken, good])
    async with trio.open_nursery() as nursery:
        for client in clients:
            nursery.start_soon(client.send_all, b"hi")
        with pytest.raises(type(error), match="broken") as info:
            await serve_gracefully(server_of_trio, server.shutdown)
        assert info.value is error
    for client in clients:
        assert await client.receive_some() == REPLY
    assert server.account.outcomes == {Outcome.ANSWERED: 2}
    assert caplog.messages == [f"accepting failed, shutting down: {error!r}"]
    assert good.closed
    assert server.shutdown.begun


async def test_an_accept_that_fails_does_not_shorten_the_grace_period(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(MemoryListener):
        async def accept(self) -> trio.abc.HalfCloseableStream:
            stream = await super().accept()
            server.shutdown.begin(100)
            await self.aclose()
            return stream

    async def work(_: trio.abc.Stream) -> None:
        await trio.sleep(200)

    server, broken = Server(handler=work), Broken()
    client = broken.connect()
    with pytest.raises(trio.ClosedResourceError):
        await serve_gracefully(partial(trio.serve_listeners, work, [broken]), server.shutdown)
    assert trio.current_time() == 100
    assert caplog.messages[-1] == "handlers cancelled by the shutdown: 1"
    await client.aclose()


async def test_an_error_of_a_server_that_is_cancelled_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(MemoryListener):
        async def aclose(self) -> None:
            await super().aclose()
            raise ValueError("boom")

    server = Server(handler=nothing)
    async with trio.open_nursery() as nursery:
        await server.start(nursery, Broken())
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert caplog.messages == ["accepting failed, shutting down: ValueError('boom')"]


async def test_an_error_that_comes_with_the_end_of_the_grace_period_is_raised_plain(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(MemoryListener):
        async def aclose(self) -> None:
            await super().aclose()
            raise OSError("boom")

    async def work(_: trio.abc.Stream) -> None:
        await trio.sleep_forever()

    shutdown, broken = Shutdown(), Broken()
    client = broken.connect()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(begin_when_blocked, shutdown)
        with pytest.raises(OSError, match="boom"):
            await serve_gracefully(partial(trio.serve_listeners, work, [broken]), shutdown)
    assert caplog.messages == [
        "accepting failed, shutting down: OSError('boom')",
        "handlers cancelled by the shutdown: 1",
    ]
    await client.aclose()


async def begin_when_blocked(shutdown: Shutdown) -> None:
    await wait_all_tasks_blocked()
    shutdown.begin(0)


async def test_when_an_author_closes_a_listener_what_is_in_flight_is_answered() -> None:
    server = Server()
    with pytest.RaisesGroup(trio.ClosedResourceError):
        async with (
            trio.open_nursery() as nursery,
            await server.with_one_in_flight(nursery) as client,
        ):
            server.listeners[0].socket.close()
            assert await read_all(client) == REPLY
    assert server.account.outcomes == {Outcome.ANSWERED: 1}


# Handlers


class Trial:
    """A server in memory whose handler is tried on one client."""

    def __init__(self, handler: Callable[[Any], Awaitable[object]]) -> None:
        self.server = Server(handler=handler)
        self.listener = MemoryListener()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            await self.server.start(nursery, self.listener)
            client = self.listener.connect()
            assert await read_all(client) == b""  # The stream was closed, …
            assert not self.listener.closed  # … and the server goes on.
            self.server.shutdown.begin(5)
        await client.aclose()


async def fail(_: trio.abc.Stream) -> None:
    raise ValueError("boom")


async def fail_in_two_nurseries(stream: trio.abc.Stream) -> None:
    async with trio.open_nursery() as outer:

        async def fail_in_a_nursery() -> None:
            async with trio.open_nursery() as inner:
                inner.start_soon(fail, stream)

        outer.start_soon(fail_in_a_nursery)


async def fail_twice(stream: trio.abc.Stream) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail, stream)
        nursery.start_soon(fail, stream)


@pytest.mark.parametrize(
    ("handler", "expected"),
    [
        (fail, ValueError),
        (fail_in_two_nurseries, ValueError),
        (fail_twice, ExceptionGroup),
    ],
)
async def test_a_handler_that_fails_is_logged_once_and_ends_its_connection_only(
    handler: Callable[[trio.abc.Stream], Awaitable[None]],
    expected: type[Exception],
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await Trial(handler).run()
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage() == "client: the handler failed"
    assert record.exc_info
    assert record.exc_info[0] is expected
    assert 'raise ValueError("boom")' in caplog.text


async def test_a_handler_that_fails_as_it_is_cancelled_is_logged(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(stream: trio.abc.Stream) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await stream.receive_some()
            finally:
                raise ValueError("boom")

    server, listener = Server(handler=handler), MemoryListener()
    async with trio.open_nursery() as nursery:
        await server.start(nursery, listener)
        client = listener.connect()
        await wait_all_tasks_blocked()
        server.shutdown.begin(0)
    assert caplog.messages[0] == "client: the handler failed"
    assert "ValueError: boom" in caplog.text
    await client.aclose()


async def test_a_reset_that_leaves_a_handler_is_one_line_with_the_address_of_the_client(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="trio_server")
    server = Server(handler=echo)
    await server.start(nursery)
    async with await server.connect(b"hi") as client:
        assert await client.receive_some() == b"hi"
        host, port = client.socket.getsockname()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    await until(lambda: caplog.records)
    [record] = caplog.records
    assert record.levelno == logging.INFO
    start = f"{host}:{port}: the handler ended: BrokenResourceError('socket connection broken"
    assert record.getMessage().startswith(start)


async def test_a_handler_that_a_broken_connection_ended_keeps_nothing_in_memory(
    autojump_clock: MockClock, no_collector: None
) -> None:
    kept = []

    async def handler(_: trio.abc.Stream) -> None:
        local = trio.Event()
        kept.append(weakref.ref(local))
        raise trio.BrokenResourceError("broken")

    await Trial(handler).run()
    assert [one() for one in kept] == [None]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
async def test_what_is_not_an_exception_ends_the_server_as_in_trio(
    error: type[BaseException],
) -> None:
    async def handler(_: trio.abc.Stream) -> None:
        raise error

    server, listener = Server(handler=handler), MemoryListener()
    with pytest.RaisesGroup(error, flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            await server.start(nursery, listener)
            listener.connect()
    assert listener.closed


@pytest.mark.parametrize("kind", ["TCP", "memory", "TLS"])
@pytest.mark.parametrize("ends", [nothing, fail])
async def test_a_stream_that_its_handler_left_open_is_closed(
    ends: Callable[[Any], Awaitable[None]], kind: str, nursery: trio.Nursery
) -> None:
    server = Server(handler=ends)
    match kind:
        case "TCP":
            await server.start(nursery)
            client: Any = await server.connect()
        case "memory":
            listener: Any = MemoryListener()
            await server.start(nursery, listener)
            client = listener.connect()
        case "TLS":
            listener = await plain_listener()
            await server.start(nursery, trio.SSLListener(listener, tls_contexts()[0]))
            client = await trio.testing.open_stream_to_socket_listener(listener)
    with trio.fail_after(5):
        assert await read_all(client) == b""
    await client.aclose()


@pytest.mark.parametrize("closes", [True, False])
async def test_a_stream_that_its_handler_closed_is_not_closed_again(
    closes: bool,  # noqa: FBT001 - pytest passes it
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Trio's second close costs 30 microseconds a connection."""
    closed = []
    aclose_forcefully = trio.aclose_forcefully

    async def close(stream: trio.abc.AsyncResource) -> None:
        closed.append(stream)
        await aclose_forcefully(stream)

    async def handler(stream: trio.SocketStream) -> None:
        if closes:
            await stream.aclose()

    monkeypatch.setattr(trio, "aclose_forcefully", close)
    server = Server(handler=handler)
    await server.start(nursery)
    assert await server.ask(b"") == b""
    await wait_all_tasks_blocked()
    assert len(closed) == (0 if closes else 1)
    server.shutdown.begin()
