"""Listening and shutting down: a loop that accepts, a nursery of connections, a grace period."""

import errno
import logging
from collections import Counter
from functools import partial
from typing import Any

import trio

from trio_server.connection import CLIENT_TIMEOUT, Connection, Outcome, Responder

GRACE_PERIOD = 30.0
"""Seconds that requests in flight may take, once a shutdown has begun: what the common
process managers wait before they kill (Docker 10, Kubernetes 30, systemd 90)."""

UNAVAILABLE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""What binding says of an address that this machine does not have. A host name may stand
for one: in many containers `localhost` is also `::1` while IPv6 is switched off."""

logger = logging.getLogger("trio_server")


class Server:
    """Answers every connection with a responder, until it is shut down. It serves once.

    Cancelling `serve_tcp` stops it at once, `shut_down` stops it gracefully.

    Args:
        respond: Turns the request of a connection into its reply.
        client_timeout: Seconds to wait for a client, each time something depends on it.

    Attributes:
        outcomes: How many connections have ended, by what came of them.
    """

    def __init__(self, respond: Responder, *, client_timeout: float = CLIENT_TIMEOUT) -> None:
        self.outcomes: Counter[Outcome] = Counter()
        self._respond = respond
        self._client_timeout = client_timeout
        self._listeners: list[trio.SocketListener] = []
        self._connections: set[Connection] = set()
        self._shutdown = trio.Event()
        # Wraps the whole server. It has no deadline until the shutdown begins.
        self._grace = trio.CancelScope()

    @property
    def in_flight(self) -> int:
        """How many requests were received that still wait for their reply."""
        return sum(connection.in_flight for connection in self._connections)

    async def serve_tcp(
        self,
        port: int,
        host: str = "localhost",
        *,
        task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Listen on a port and serve until shut down or cancelled.

        Args:
            port: The port, 0 to 65535. With 0 the kernel picks one for each address.
            host: The interface to listen on, as a name or an address. A name that stands
                for several addresses gets a listener on each that this machine has. An
                empty string is all interfaces.
            task_status: `nursery.start` returns the listeners, once they accept
                connections: ``listeners[0].socket.getsockname()[1]`` is the port. The list
                is empty if the server was shut down before that.

        Raises:
            OSError: The server could not start: the port is taken (``EADDRINUSE``) or
                needs privileges (``EACCES``), this machine has none of the addresses
                (``EADDRNOTAVAIL``), or the name does not resolve (`socket.gaierror`).
        """
        failure: OSError | None = None
        with self._grace:
            # Two nurseries, because accepting ends before the connections do: leaving the
            # inner one stops the listeners, leaving the outer one waits for the last client.
            async with trio.open_nursery() as connections, trio.open_nursery() as acceptors:
                try:
                    self._listeners = await self._listen(port, host, acceptors, connections)
                except OSError as error:
                    # Kept until the nurseries are gone: they would wrap it in groups.
                    failure = error
                else:
                    task_status.started(self._listeners)
                    await self._shutdown.wait()
                acceptors.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if not self._listeners:
            task_status.started([])

    def shut_down(self, grace_period: float = GRACE_PERIOD) -> None:
        """Stop accepting, let the requests in flight finish, then stop. Returns at once.

        Connections with nothing in flight get one second (`CLOSING_TIME`). May be called
        again, to shorten the grace period. A server that does not accept yet stops at once.

        Args:
            grace_period: Seconds from now until whatever is left is cut off; 0 stops now.
        """
        if not self._listeners:
            self._grace.cancel()
        self._grace.deadline = min(self._grace.deadline, trio.current_time() + grace_period)
        self._shutdown.set()
        for connection in self._connections:
            connection.hurry()

    async def _listen(
        self, port: int, host: str, acceptors: trio.Nursery, connections: trio.Nursery
    ) -> list[trio.SocketListener]:
        """Start `trio.serve_tcp` on each address of the host, in the nursery ``acceptors``."""
        listeners: list[trio.SocketListener] = []
        unavailable = []
        for address in await _addresses(host, port):
            # One call for each address, as a single call for all gives up on the first one
            # that is unavailable.
            serve = partial(
                trio.serve_tcp, self._handle, port, host=address, handler_nursery=connections
            )
            try:
                listeners += await acceptors.start(serve)
            except OSError as error:
                if error.errno not in UNAVAILABLE:
                    raise
                unavailable.append((address, error.strerror))
        if not listeners:
            raise OSError(errno.EADDRNOTAVAIL, f"this machine has no address of {host!r}")
        for address, reason in unavailable:
            logger.warning("not listening on %s: %s", address, reason)
        return listeners

    async def _handle(self, stream: trio.SocketStream) -> None:
        """Serve one connection, in a task of its own."""
        connection = Connection(
            stream, self._respond, client_timeout=self._client_timeout, peer=_peer(stream)
        )
        if self._shutdown.is_set():
            connection.hurry()
        self._connections.add(connection)
        try:
            await connection.serve()
        finally:
            self._connections.discard(connection)
            self.outcomes[connection.outcome] += 1


async def _addresses(host: str, port: int) -> list[str]:
    """Resolve a host to the numeric addresses to listen on, each once."""
    try:
        found = await trio.socket.getaddrinfo(
            host or None, port, type=trio.socket.SOCK_STREAM, flags=trio.socket.AI_PASSIVE
        )
    except UnicodeError as error:  # Not a name at all: `a..b`, or a label of 64 letters.
        raise trio.socket.gaierror(trio.socket.EAI_NONAME, str(error)) from error
    # A hosts file may name an address twice, and the second listener would find it taken.
    return list(dict.fromkeys(_numeric(sockaddr) for *_, sockaddr in found))


def _numeric(sockaddr: tuple[Any, ...]) -> str:
    """Write the address alone, with the zone that `getaddrinfo` splits off: ``fe80::1%2``."""
    host, _port, *ipv6 = sockaddr
    return f"{host}%{ipv6[1]}" if ipv6 and ipv6[1] else str(host)


def format_address(sockaddr: tuple[str, int]) -> str:
    """Write a socket address as people do: ``127.0.0.1:1729``, ``[::1]:1729``."""
    host, port = sockaddr[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _peer(stream: trio.SocketStream) -> str:
    try:
        return format_address(stream.socket.getpeername())
    except OSError:  # It went away while it was in the queue.
        return "unknown client"
