"""A shutdown on real sockets: whom it answers, whom it ignores, and that it ends."""

import os
import select
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator
from functools import partial

import pytest
import trio
from process import Process, Start, activated, file_limit, receive_all
from streams import read_all

from trio_server import Shutdown, accept_queue, serve_listeners, serve_tcp
from trio_server.responder import REPLY

SO_GET_FILTER = 26  # <asm-generic/socket.h>

both_addresses = pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
own_and_inherited = pytest.mark.parametrize("own", [True, False], ids=["own", "inherited"])

# Runs the rest of the command line, and lets the signals come just when Trio closes what they
# write to.
STORM_AT_THE_END = """
import os, runpy, signal, sys
set_wakeup_fd = signal.set_wakeup_fd

def set_in_a_storm(descriptor, **settings):
    if descriptor == -1:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        print("storm")
    return set_wakeup_fd(descriptor, **settings)

signal.set_wakeup_fd = set_in_a_storm
del sys.argv[1:4]
runpy.run_module("trio_server", run_name="__main__", alter_sys=True)
"""


async def echo(stream: trio.SocketStream) -> None:
    await stream.send_all(await stream.receive_some())


class Server:
    """A server in this process, and its socket, which outlives it."""

    def __init__(self, host: str, *, own: bool) -> None:
        self.host = host
        self.own = own
        self.shutdown = Shutdown()
        self.handler: Callable[[trio.SocketStream], Awaitable[object]] = echo

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            if self.own:
                serve = partial(serve_tcp, self.handler, 0, host=self.host)
            else:
                listeners = await trio.open_tcp_listeners(0, host=self.host)
                serve = partial(serve_listeners, self.handler, listeners)
            [self.listener] = await nursery.start(partial(serve, shutdown=self.shutdown))
            self.socket = socket.socket(fileno=os.dup(self.listener.socket.fileno()))
            self.socket.settimeout(10)
            task_status.started()

    def connect(self, *, timeout: float = 10) -> socket.socket:
        return socket.create_connection(self.socket.getsockname()[:2], timeout)

    def filter_length(self) -> int:
        # The kernel takes the size as a number of instructions, and returns such a number.
        return len(self.socket.getsockopt(socket.SOL_SOCKET, SO_GET_FILTER, 64))


@pytest.fixture
def new_server() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def make(host: str = "127.0.0.1", *, own: bool = True) -> Server:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            socket.create_server((host, 0), family=family).close()
        except OSError:
            pytest.skip(f"no {host} on this machine")
        servers.append(Server(host, own=own))
        return servers[-1]

    yield make
    for server in servers:
        server.socket.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has such filters")
@both_addresses
async def test_newcomers_get_no_answer(new_server: Callable[..., Server], host: str) -> None:
    server = new_server(host)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve)
        assert server.filter_length() == 0
        server.connect().close()
        server.shutdown.begin()
    assert server.filter_length() == 5
    with pytest.raises(TimeoutError):
        server.connect(timeout=0.3)


@both_addresses
async def test_what_comes_to_an_inherited_socket_is_left_for_the_next_server(
    new_server: Callable[..., Server], host: str
) -> None:
    server = new_server(host, own=False)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve)
        server.shutdown.begin()
    with server.connect() as client, server.socket.accept()[0] as accepted:
        assert accepted.getpeername() == client.getsockname()
    if sys.platform == "linux":
        assert server.filter_length() == 0


class Instant(trio.abc.Instrument):
    """Sees what a task has done by the next time that others may run."""

    def __init__(self, look: Callable[[], bool]) -> None:
        self.look = look
        self.task: trio.lowlevel.Task | None = None
        self.seen: bool | None = None

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self.task:
            self.task = None
            self.seen = self.look()


@own_and_inherited
async def test_listeners_are_closed_in_the_instant_of_the_last_look_at_their_queue(
    new_server: Callable[..., Server], *, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = new_server(own=own)
    instant = Instant(lambda: server.listener.socket.fileno() == -1)
    clients_wait = accept_queue._clients_wait  # noqa: SLF001 - the last look

    def look(listeners: Collection[trio.SocketListener]) -> bool:
        instant.task = trio.lowlevel.current_task()
        return clients_wait(listeners)

    monkeypatch.setattr(accept_queue, "_clients_wait", look)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve)
        trio.lowlevel.add_instrument(instant)
        server.shutdown.begin()
    assert instant.seen is True


async def test_a_client_that_comes_just_before_the_last_look_is_answered(
    new_server: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = new_server()
    clients = []
    keep_newcomers_out = accept_queue._keep_newcomers_out  # noqa: SLF001 - what comes first

    def let_one_more_in(listener: trio.socket.SocketType) -> None:
        clients.append(server.connect())
        clients[0].sendall(b"hi\n")
        keep_newcomers_out(listener)

    monkeypatch.setattr(accept_queue, "_keep_newcomers_out", let_one_more_in)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve)
        server.shutdown.begin()
    with clients[0]:
        assert receive_all(clients[0]) == b"hi\n"


@own_and_inherited
async def test_all_that_wait_are_accepted_before_the_first_is_served(
    new_server: Callable[..., Server], *, own: bool
) -> None:
    server = new_server(own=own)
    queue_was_empty = []

    async def look_at_queue(stream: trio.SocketStream) -> None:
        queue_was_empty.append(not select.select([server.socket], [], [], 0)[0])

    server.handler = look_at_queue
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve)
        clients = [server.connect() for _ in range(20)]
        while len(queue_was_empty) < len(clients):
            await trio.sleep(0.01)
        server.shutdown.begin()
    assert all(queue_was_empty)
    for client in clients:
        client.close()


def test_silent_clients_in_the_accept_queue_do_not_hold_a_shutdown_up(serve: Start) -> None:
    process = serve("--client-timeout", "60", "--grace-period", "60")
    process.freeze()
    clients = [process.connect() for _ in range(50)]
    process.kill(signal.SIGTERM)
    process.thaw()
    assert process.wait() == 0
    assert "50 sent nothing" in process.stderr
    for client in clients:
        with client:
            assert receive_all(client) == b""


async def test_more_clients_in_the_accept_queue_than_files_are_all_answered(serve: Start) -> None:
    # Four times as many as there is room for: 2.5 s, so no wait for two seconds would do.
    process = serve("--delay", "0.5", prefix=file_limit(80))
    process.freeze()
    clients = [await trio.open_tcp_stream("127.0.0.1", process.port) for _ in range(300)]
    replies: Counter[bytes] = Counter()

    async def request(client: trio.SocketStream) -> None:
        async with client:
            await client.send_all(b"hi\n")
            replies[await read_all(client)] += 1

    process.kill(signal.SIGTERM)
    process.thaw()
    async with trio.open_nursery() as nursery:
        for client in clients:
            nursery.start_soon(request, client)
    assert replies == {REPLY: 300}
    assert process.wait() == 0
    assert "300 answered, 0 sent nothing, " in process.stderr


def test_a_stopping_process_takes_nobody_from_its_successor(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def start_on_socket() -> Process:
            process = activated(start, listener.fileno(), "--delay", "0.5", "--log-level", "debug")
            process.wait_for_banner()
            return process

        first = start_on_socket()
        with first.connect() as in_flight, socket.socket() as later:
            in_flight.sendall(b"hi\n")
            first.wait_for_log("sent 3 bytes")
            first.kill(signal.SIGTERM)
            first.wait_for_log("shutting down")
            later.settimeout(10)
            later.connect(listener.getsockname())
            later.sendall(b"hi\n")
            assert receive_all(in_flight) == REPLY
            in_flight.close()
            assert first.wait() == 0
            assert "1 answered, 0 sent nothing, " in first.stderr

            second = start_on_socket()
            assert receive_all(later) == REPLY
    assert second.stop() == 0
    assert "1 answered, 0 sent nothing, " in second.stderr


def test_signals_that_come_while_trio_closes_are_ignored(serve: Start) -> None:
    process = serve(prefix=(sys.executable, "-c", STORM_AT_THE_END))
    assert process.stop() == 0
    assert process.stdout.endswith("storm\n")
    assert "Exception ignored" not in process.stderr
    assert "Traceback" not in process.stderr


def test_signals_without_end_leave_exit_status_0_and_no_traceback(serve: Start) -> None:
    for _ in range(5):
        process = serve("--delay", "0")
        while process.popen.poll() is None:
            process.kill(signal.SIGTERM)
            process.kill(signal.SIGINT)
            time.sleep(0.0001)  # or it gets no further
        assert process.wait() == 0
        assert "Exception ignored" not in process.stderr
        assert "Traceback" not in process.stderr
