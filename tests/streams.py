"""What the tests do with Trio streams, and a server for them to connect to."""

import math
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio
from trio.testing import memory_stream_pair, open_stream_to_socket_listener

from trio_server import (
    Account,
    Responder,
    Shutdown,
    hello_world,
    serve_connection,
    serve_gracefully,
)

RESET_ON_CLOSE = b"\1\0\0\0\0\0\0\0"  # a linger time of 0 seconds (socket(7))
DELAY = 0.1  # seconds of work

fast: Responder = partial(hello_world, delay=DELAY)


async def never(_: bytes) -> bytes:
    await trio.sleep_forever()
    raise AssertionError


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    """Read to the end of file."""
    return b"".join([chunk async for chunk in stream])


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.005)


def tls_contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return what a TLS server and its client need."""
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(Path(__file__).with_name("localhost.pem"))
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    theirs.check_hostname, theirs.verify_mode = False, ssl.CERT_NONE
    return ours, theirs


class MemoryListener(trio.abc.Listener[trio.abc.HalfCloseableStream]):
    """A listener whose clients are in this process."""

    def __init__(self) -> None:
        self.closed = False
        self._connect, self._accept = trio.open_memory_channel[trio.abc.HalfCloseableStream](
            math.inf
        )

    def connect(self) -> trio.abc.HalfCloseableStream:
        client, server = memory_stream_pair()
        self._connect.send_nowait(server)
        return client

    async def accept(self) -> trio.abc.HalfCloseableStream:
        return await self._accept.receive()

    async def aclose(self) -> None:
        self.closed = True
        self._connect.close()
        self._accept.close()


@contextmanager
def queued(address: Any, number: int, request: bytes = b"") -> Iterator[list[socket.socket]]:
    """Put clients into an accept queue, in order and without a checkpoint."""
    with ExitStack() as stack:
        clients = []
        for _ in range(number):
            client = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
            clients.append(stack.enter_context(client))
            client.settimeout(10)
            client.connect(address)
            client.sendall(request)
        yield clients


async def replies_of(clients: list[socket.socket]) -> list[bytes]:
    """Read to the end of file from each client, and close it."""
    replies = []
    for client in clients:
        async with trio.SocketStream(trio.socket.from_stdlib_socket(client)) as stream:
            replies.append(await read_all(stream))
    return replies


class Server:
    """`serve_gracefully` on a free port of 127.0.0.1, by default with `serve_connection`."""

    def __init__(
        self,
        respond: Responder = fast,
        *,
        handler: Callable[[Any], Awaitable[object]] | None = None,
        shared: bool = False,
        **settings: Any,
    ) -> None:
        self.shutdown = Shutdown()
        self.account = Account()
        self.handler = handler or partial(
            serve_connection,
            respond=respond,
            shutdown=self.shutdown,
            account=self.account,
            **settings,
        )
        self.ended_at = math.nan
        self.listeners: list[Any] = []
        self._shared = shared

    async def start(self, nursery: trio.Nursery, *listeners: trio.abc.Listener[Any]) -> None:
        """Serve on these listeners, or on a port."""
        server: Callable[..., Awaitable[object]]
        if listeners:
            server = partial(trio.serve_listeners, self.handler, list(listeners))
        else:
            server = partial(trio.serve_tcp, self.handler, 0, host="127.0.0.1")
        self.listeners = await nursery.start(self._serve, server)

    async def _serve(
        self, server: Callable[..., Awaitable[object]], *, task_status: trio.TaskStatus[Any]
    ) -> None:
        await serve_gracefully(server, self.shutdown, shared=self._shared, task_status=task_status)
        self.ended_at = trio.current_time()

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._transport.socket.getsockname()
        return host, port

    @property
    def is_listening(self) -> bool:
        return self._transport.socket.fileno() >= 0

    @property
    def _transport(self) -> trio.SocketListener:
        listener: trio.SocketListener = getattr(
            self.listeners[0], "transport_listener", self.listeners[0]
        )
        return listener

    async def connect(self, request: bytes = b"") -> trio.SocketStream:
        client = await open_stream_to_socket_listener(self._transport)
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
        await until(lambda: self.account.in_flight == 1)
        return client
