"""Listening and shutting down: a loop that accepts, a nursery of connections, a grace period."""

import errno
import logging
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, cast

import trio

from trio_server.backlog import AcceptFirst, clients_wait
from trio_server.connection import (
    CLIENT_TIMEOUT,
    CLOSING_TIME,
    Connection,
    Outcome,
    Responder,
)
from trio_server.lull import Lull

GRACE_PERIOD = 30.0
"""Seconds that requests in flight may take, once a shutdown has begun. Process managers kill
what takes longer than they wait: Docker 10 seconds, Kubernetes 30, systemd 90."""

MINIMUM_HOPS = {
    trio.socket.AF_INET: (trio.socket.IPPROTO_IP, 21),
    trio.socket.AF_INET6: (trio.socket.IPPROTO_IPV6, 73),
}
"""Linux's options ``IP_MINTTL`` (``<linux/in.h>``) and ``IPV6_MINHOPCOUNT`` (``<linux/in6.h>``),
which Python does not name: a socket ignores packets whose time to live is below this number.
Nearly all systems send with 64 or 128, so 255 makes a listening socket deaf, without touching
what is in its queue."""

HANDSHAKE_TIME = 0.5
"""Seconds for which a shutdown waits for connections whose last packet is still on its way: the
client counts as connected, but the kernel has not queued it yet. Enough to send that again."""

LAST_LOOK_INTERVAL = 0.01
"""Seconds between two looks at the listen queues while a shutdown waits for them to empty."""

UNAVAILABLE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""What binding says of an address that this machine does not have. A host name may stand
for one: in many containers `localhost` is also `::1` while IPv6 is switched off."""

logger: logging.Logger = logging.getLogger("trio_server")


class Server:
    """Answers every connection with a responder, until it is shut down. It serves once.

    Cancelling `serve_tcp` stops it at once, `shut_down` stops it gracefully. Connections that have
    been answered are closed when the scheduler has little to do, or after about half a second;
    at once with ``max_connections``, with a client time-out below `CLOSING_TIME`, after a request
    that fills `REQUEST_SIZE`, or when half of the files that the process may open belong to them.

    Args:
        respond: Turns the request of a connection into its reply.
        client_timeout: Seconds to wait for a client, each time something depends on it.
        max_connections: How many connections are served at once. The others wait their turn,
            in order of arrival. None is no limit.

    Attributes:
        outcomes: How many connections have ended, by what came of them.
    """

    def __init__(
        self,
        respond: Responder,
        *,
        client_timeout: float = CLIENT_TIMEOUT,
        max_connections: int | None = None,
    ) -> None:
        self.outcomes: Counter[Outcome] = Counter()
        self._respond = respond
        self._client_timeout = client_timeout
        self._turns = None if max_connections is None else trio.CapacityLimiter(max_connections)
        self._started = False
        self._listeners: list[trio.SocketListener] = []
        # Whether others may accept from them as well: then their queues are not ours to empty.
        self._shares_queues = False
        self._connections: set[Connection] = set()
        self._lull: Callable[[], Awaitable[object]] = trio.lowlevel.checkpoint
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
        await self._serve(partial(self._listen, port, host), task_status)

    async def serve_listeners(
        self,
        listeners: Sequence[trio.abc.Listener[trio.abc.HalfCloseableStream]],
        *,
        task_status: trio.TaskStatus[
            Sequence[trio.abc.Listener[trio.abc.HalfCloseableStream]]
        ] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve on listeners that are already open, until shut down or cancelled.

        Args:
            listeners: Sockets that a process manager holds, for example, or in-memory ones.
                They are closed in the end. What waits in the queue of a socket is left there,
                for the next process that accepts from it.
            task_status: `nursery.start` returns the listeners.
        """
        await self._serve(partial(self._take_over, listeners), task_status)

    async def _serve(
        self,
        start_accepting: Callable[[trio.Nursery, trio.Nursery], Awaitable[Any]],
        task_status: trio.TaskStatus[Any],
    ) -> None:
        """Serve until shut down.

        Args:
            start_accepting: Starts the accept loops in its first argument, lets them start
                handlers in its second, and returns the listeners.
            task_status: Gets the listeners.
        """
        failure: OSError | None = None
        with self._grace:
            # Two nurseries, because accepting ends before the connections do: the inner one is
            # cancelled to end the accept loops, leaving the outer one waits for the last client.
            async with trio.open_nursery() as connections, trio.open_nursery() as acceptors:
                handlers = connections
                # Not with turns: tasks that start together would get theirs in any order, and
                # others wait in line for the end of each connection.
                if self._turns is None:
                    # "Any object with a `start_soon` method", says `trio.serve_listeners`.
                    handlers = cast("trio.Nursery", AcceptFirst(connections, self._listeners))
                    # With less time, a client could run out of it while it waits for a lull.
                    if self._client_timeout >= CLOSING_TIME:
                        self._lull = Lull(connections).wait
                try:
                    listeners = await start_accepting(acceptors, handlers)
                except OSError as error:
                    # Raised later, outside the nurseries, which would wrap it in groups.
                    failure = error
                else:
                    self._started = True
                    task_status.started(listeners)
                    await self._shutdown.wait()
                    await self._last_call()
                # No `await` between the last look at the queues and their end: cancelling takes
                # effect when the accept loops run again, closing takes effect now.
                acceptors.cancel_scope.cancel()
                for listener in self._listeners:
                    listener.socket.close()
        if failure is not None:
            raise failure
        if not self._started:
            task_status.started([])

    async def _listen(
        self, port: int, host: str, acceptors: trio.Nursery, handlers: trio.Nursery
    ) -> list[trio.SocketListener]:
        """Start `trio.serve_tcp` on each address of the host, in the nursery ``acceptors``."""
        unavailable = []
        for address in await _addresses(host, port):
            # One call for each address, as a single call for all gives up on the first one
            # that is unavailable.
            serve = partial(
                trio.serve_tcp, self._handle, port, host=address, handler_nursery=handlers
            )
            try:
                self._listeners += await acceptors.start(serve)
            except OSError as error:
                if error.errno not in UNAVAILABLE:
                    raise
                unavailable.append((address, error.strerror))
        if not self._listeners:
            raise OSError(errno.EADDRNOTAVAIL, f"this machine has no address of {host!r}")
        for address, reason in unavailable:
            logger.warning("not listening on %s: %s", address, reason)
        return list(self._listeners)

    async def _take_over(
        self,
        listeners: Sequence[trio.abc.Listener[trio.abc.HalfCloseableStream]],
        acceptors: trio.Nursery,
        handlers: trio.Nursery,
    ) -> Sequence[trio.abc.Listener[trio.abc.HalfCloseableStream]]:
        """Start `trio.serve_listeners`, in the nursery ``acceptors``."""
        self._listeners += [one for one in listeners if isinstance(one, trio.SocketListener)]
        self._shares_queues = True
        serve = partial(
            trio.serve_listeners, self._handle, list(listeners), handler_nursery=handlers
        )
        await acceptors.start(serve)
        return listeners

    def _handle(self, stream: trio.abc.HalfCloseableStream) -> Awaitable[Outcome]:
        """Set up a connection, and return the coroutine that serves it, for its task to await."""
        # Not `async`: an `await` in here would keep one more frame in memory for each connection.
        connection = Connection(
            stream,
            self._respond,
            client_timeout=self._client_timeout,
            turns=self._turns,
            peer=_peer(stream),
        )
        if self._shutdown.is_set():
            connection.hurry()
        if isinstance(stream, trio.SocketStream):
            _send_in_few_packets(stream.socket)
            if self._shutdown.is_set():
                # What is accepted during the last call is as deaf as the listener, and has to
                # hear its client.
                _set_minimum_hops(stream.socket, 0)
        self._connections.add(connection)
        return connection.serve(lull=self._lull, ended=self._count)

    def _count(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self.outcomes[connection.outcome] += 1

    def shut_down(self, grace_period: float = GRACE_PERIOD) -> None:
        """Stop accepting, let the requests in flight finish, then stop. Returns at once.

        Connections with nothing in flight get one second (`CLOSING_TIME`). May be called
        again, to shorten the grace period. A server that does not accept yet stops at once.

        Args:
            grace_period: Seconds from now until whatever is left is cut off; 0 stops now.
        """
        if not self._started:
            self._grace.cancel()
        self._grace.deadline = min(self._grace.deadline, trio.current_time() + grace_period)
        self._shutdown.set()
        for connection in self._connections:
            connection.hurry()

    async def _last_call(self) -> None:
        """Wait until the listen queues are empty, so that closing them resets nobody.

        The kernel completes connections ahead of `accept` and keeps them in a queue. Their
        clients may have sent their request already; they cannot know that nobody has seen it.
        """
        # After `shut_down(0)` this raises `trio.Cancelled`, and rightly so: the accept loops may
        # have closed the sockets by now.
        await trio.lowlevel.checkpoint()
        if self._shares_queues:
            return
        for listener in self._listeners:
            # Newcomers stay unanswered: their kernel tries again after a second, and meets the
            # next server or a closed port. Elsewhere than on Linux, the shortest queue there is
            # (listen(2)) lets in one at a time.
            if sys.platform == "linux":
                _set_minimum_hops(listener.socket, 255)
            else:
                listener.socket.listen(0)
        # The accept loops are at work meanwhile.
        handshakes_end = trio.current_time() + HANDSHAKE_TIME
        while clients_wait(self._listeners) or trio.current_time() < handshakes_end:  # noqa: ASYNC110 - no Event
            await trio.sleep(LAST_LOOK_INTERVAL)


def _set_minimum_hops(sock: trio.socket.SocketType, number: int) -> None:
    """Make a socket deaf (255) or let it hear again (0), on Linux."""
    if sys.platform == "linux" and sock.family in MINIMUM_HOPS:
        with suppress(OSError):  # gVisor, for one, stands in for Linux without this
            sock.setsockopt(*MINIMUM_HOPS[sock.family], number)


def _send_in_few_packets(sock: trio.socket.SocketType) -> None:
    """Let the kernel wait for full packets or the end (tcp(7), ``TCP_CORK``), on Linux.

    A short reply and its end then travel as one packet instead of two. The kernel waits for 0.2
    seconds at most.
    """
    if sys.platform == "linux":
        with suppress(OSError):  # not TCP
            sock.setsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_CORK, 1)


async def _addresses(host: str, port: int) -> list[str]:
    """Resolve a host to the numeric addresses to listen on, each once."""
    try:
        found = await trio.socket.getaddrinfo(
            host or None, port, type=trio.socket.SOCK_STREAM, flags=trio.socket.AI_PASSIVE
        )
    except UnicodeError as error:  # Not a name at all: `a..b`, or a label of 64 letters.
        raise trio.socket.gaierror(trio.socket.EAI_NONAME, "not a host name") from error
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


def _peer(stream: trio.abc.HalfCloseableStream) -> str:
    if not isinstance(stream, trio.SocketStream):
        return "client"
    try:
        sockaddr = stream.socket.getpeername()
    except OSError:  # It went away while it was in the queue.
        return "unknown client"
    return format_address(sockaddr) if isinstance(sockaddr, tuple) else "client"
