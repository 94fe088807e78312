"""Starts that fail, or are stopped, while a client is already there."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio
import trio.testing
from process import Start, receive_all

from trio_server import Shutdown, serve_tcp

Action = Callable[[str, int], None]


def test_a_start_that_fails_does_not_wait_for_a_client(start: Start) -> None:
    with socket.socket(socket.AF_INET6) as taken:
        try:
            taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            taken.bind(("::", 0))
        except OSError:
            pytest.skip("no IPv6 on this machine")
        taken.listen()
        port = taken.getsockname()[1]
        with silent_client(port):
            for _ in range(3):
                process = start("--host", "", "--port", str(port))
                assert process.wait() == 1  # in less than the client timeout
                assert process.stdout == ""
                assert process.stderr.endswith(
                    f"trio-server: port {port} is already in use: stop the program that listens "
                    "on it, or choose another port with --port\n"
                )


@contextmanager
def silent_client(port: int) -> Iterator[None]:
    """Connect in a loop to 127.0.0.1, and say nothing."""
    stop = threading.Event()

    def connect() -> None:
        while not stop.wait(0.001):
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=2) as client:
                    client.recv(1)
            except OSError:
                pass

    thread = threading.Thread(target=connect)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


async def echo(stream: trio.SocketStream) -> None:
    await stream.send_all(await stream.receive_some())


class TwoAddresses(trio.abc.HostnameResolver):
    """Resolves each name to two addresses of this machine."""

    async def getaddrinfo(self, *host_and_port: Any) -> Any:
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, host_and_port[1]))
            for address in ("127.0.0.1", "127.0.0.2")
        ]

    async def getnameinfo(self, *_: Any) -> tuple[str, str]:
        raise NotImplementedError


@pytest.fixture
async def after_the_first_listens(monkeypatch: pytest.MonkeyPatch) -> list[Action]:
    """Do something, and let time pass, once the server listens on one address of two."""
    actions: list[Action] = []
    open_tcp_listeners = trio.open_tcp_listeners

    async def open_and_act(port: int, **settings: Any) -> list[trio.SocketListener]:
        listeners = await open_tcp_listeners(port, **settings)
        while actions:
            actions.pop()(*listeners[0].socket.getsockname())
            await trio.testing.wait_all_tasks_blocked()
        return listeners

    monkeypatch.setattr(trio, "open_tcp_listeners", open_and_act)
    trio.socket.set_custom_hostname_resolver(TwoAddresses())
    return actions


async def test_a_start_that_fails_at_the_second_address_ends_at_once(
    after_the_first_listens: list[Action],
) -> None:
    with socket.create_server(("127.0.0.2", 0)) as taken, socket.socket() as client:
        after_the_first_listens.append(lambda host, port: client.connect((host, port)))
        with trio.fail_after(10), pytest.raises(OSError, match="in use"):
            await serve_tcp(echo, taken.getsockname()[1], host="two")
        assert not after_the_first_listens  # It was done.


async def test_a_shutdown_that_begins_during_the_start_resets_nobody(
    after_the_first_listens: list[Action],
) -> None:
    shutdown = Shutdown()
    with socket.socket() as client:

        def connect_and_begin(host: str, port: int) -> None:
            client.connect((host, port))
            client.sendall(b"hi\n")
            shutdown.begin()

        after_the_first_listens.append(connect_and_begin)
        with trio.fail_after(10):
            await serve_tcp(echo, 0, host="two", shutdown=shutdown)
        assert receive_all(client) == b"hi\n"
