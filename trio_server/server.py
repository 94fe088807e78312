"""`serve_gracefully`: one of Trio's servers, with a graceful shutdown around it."""

import inspect
import logging
import math
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeAlias

import trio

from trio_server.accept_queue import accept_waiting, any_waiting, ignore_new_connections
from trio_server.connection import peer_name
from trio_server.shutdown import Shutdown

BATCH = 64  # handlers that start in one scheduler pass; the server accepts again after 4 ms
MOST_WAITING = 10_000  # accepted connections that wait for their handler to start
HANDSHAKE_TIME = 0.5  # seconds; with a round trip of 400 ms, 0 of 1,556 requests were lost
EMPTYING_TIME = 1.0  # seconds at most, if the kernel cannot ignore new connections
POLL_INTERVAL = 0.01  # seconds; polling the queue costs microseconds

Handler: TypeAlias = Callable[[Any], Awaitable[object]]
Server: TypeAlias = Callable[..., Awaitable[object]]
logger: logging.Logger = logging.getLogger("trio_server")


async def serve_gracefully(
    server: Server,
    shutdown: Shutdown,
    *,
    shared: bool = False,
    task_status: trio.TaskStatus[list[Any]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run one of Trio's servers until ``shutdown`` begins, then let its handlers finish.

    Args:
        server: `trio.serve_tcp`, `trio.serve_ssl_over_tcp` or `trio.serve_listeners`, with all
            arguments but the nursery filled in: ``partial(trio.serve_tcp, handler, 1729)``. A
            handler is an async function of a stream, which is closed when the handler ends.
        shutdown: Ends the server: the connections in the accept queue are accepted, and the
            listeners are closed. The handlers may run until the grace period ends.
        shared: Whether other processes accept from the same listeners (systemd, fork). Those
            get their share of the connections, and all that this server leaves in the queue.
        task_status: `nursery.start` returns the listeners, or none if the shutdown came first.

    An `Exception` of a handler is logged to the logger ``trio_server``, and ends the connection,
    not the server. A handler that does not use `Shutdown.move_on_after` may keep its idle clients
    until the grace period ends. Tell it to finish about 2 s after the shutdown has begun: by
    then no new connections arrive. A handler that is shielded from cancellation is waited for.
    The path of a Unix socket is not removed.

    Raises:
        TypeError: ``server`` is not such a function.
        OSError: The server could not start: its port is taken, for example. Or accepting
            failed later: that begins the shutdown, and is raised when the handlers have ended.
    """
    try:
        inspect.signature(server).bind(handler_nursery=None, task_status=None)
    except (TypeError, ValueError) as error:
        expected = "server must be like partial(trio.serve_tcp, handler, 1729)"
        raise TypeError(f"{expected}: {error}") from None
    failure: Exception | None = None
    with shutdown.grace_scope() as grace:
        async with trio.open_nursery() as nursery:
            starter = _HandlerStarter(nursery, shared=shared)
            try:
                await _accept(server, shutdown, starter, task_status)
            except* Exception as group:  # noqa: BLE001 - it is raised below
                failure = _unwrapped(group)
                if starter.listeners:
                    logger.error("accepting failed, so the server shuts down: %r", failure)  # noqa: TRY400 - raised below
                    shutdown.begin()
    if failure is not None:
        raise failure
    if not starter.listeners:
        task_status.started([])
    if grace.cancelled_caught and starter.cut_off:
        logger.warning("handlers cancelled at the end of the grace period: %d", starter.cut_off)


async def _accept(
    server: Server,
    shutdown: Shutdown,
    starter: "_HandlerStarter",
    task_status: trio.TaskStatus[list[Any]],
) -> None:
    """Accept connections until the shutdown has begun, then close the listeners."""
    # The accept loops end before the handlers do, so they have a nursery of their own.
    async with trio.open_nursery() as accept_loops:
        with shutdown.move_on_after(math.inf):  # A slow name lookup does not delay a shutdown.
            starter.listeners = await accept_loops.start(partial(server, handler_nursery=starter))
            task_status.started(starter.listeners)
        await shutdown.wait()
        # With TLS, the transport has the socket. A listener in memory has no socket.
        transports = (getattr(one, "transport_listener", one) for one in starter.listeners)
        sockets = [one.socket for one in transports if isinstance(one, trio.SocketListener)]
        if not starter.shared:
            await _empty_queues(sockets, starter)
        # Close without an `await` after the last check, so that no connection can slip in. An
        # accept loop that was about to run meets a closed socket, a `ClosedResourceError`. That
        # does no harm: the loop then calls `SocketListener.aclose`, whose checkpoint raises
        # `Cancelled` in its place.
        accept_loops.cancel_scope.cancel()
        for one in sockets:
            one.close()


async def _empty_queues(sockets: list[trio.socket.SocketType], starter: "_HandlerStarter") -> None:
    """Keep new connections out, and wait until all others are accepted."""
    filtered = [ignore_new_connections(one) for one in sockets]
    recently = trio.current_time() < starter.accepted_at + 1
    if recently or any_waiting(sockets):  # Clients come: some may be in a handshake.
        await trio.sleep(HANDSHAKE_TIME)
    with trio.move_on_after(math.inf if all(filtered) else EMPTYING_TIME):
        while any_waiting(sockets):  # noqa: ASYNC110 - the kernel sets no `trio.Event`
            await trio.sleep(POLL_INTERVAL)


class _HandlerStarter:
    """What Trio's servers get as their nursery: "any object with a ``start_soon`` method"."""

    def __init__(self, nursery: trio.Nursery, *, shared: bool) -> None:
        self.shared = shared
        self.listeners: list[Any] = []  # once they are open
        self.accepted_at = -math.inf
        self.cut_off = 0  # handlers that were cancelled
        self._nursery = nursery
        self._waiting: deque[Any] = deque()  # streams or sockets without a handler yet

    def start_soon(self, _: object, stream: trio.abc.AsyncResource, handler: Handler) -> None:
        """Accept all that wait in the accept queue, then start the handlers in batches.

        While the queue is full, the kernel drops new connections, and their clients wait for a
        second. So accepting goes first: 10,000 clients at once do not fill the queue.

        `trio.serve_listeners` passes a function of its own, which calls the handler and closes
        the stream. It is not used, as closing a stream twice costs 30 microseconds.
        """
        self.accepted_at = trio.current_time()
        starting = bool(self._waiting)
        self._waiting.append(stream)
        for listener in () if self.shared else self.listeners:
            if type(listener) is trio.SocketListener:
                most = MOST_WAITING - len(self._waiting)
                self._waiting += accept_waiting(listener.socket, most)
        if not starting:
            self._start_batch(handler)

    def _start_batch(self, handler: Handler) -> None:
        for _ in range(min(BATCH, len(self._waiting))):
            stream = self._waiting.popleft()
            if isinstance(stream, socket.socket):
                stream = trio.SocketStream(trio.socket.from_stdlib_socket(stream))
            self._nursery.start_soon(self._run, handler, stream)
        if self._waiting:
            self._nursery.start_soon(self._start_next_batch, handler)

    async def _start_next_batch(self, handler: Handler) -> None:
        # A task begins in the next scheduler pass. It begins even in a server that is cancelled,
        # so each stream gets its handler, and is closed.
        self._start_batch(handler)

    async def _run(self, handler: Handler, stream: trio.abc.AsyncResource) -> None:
        """Run a handler, so that its failure ends its connection and not the server."""
        transport = getattr(stream, "transport_stream", stream)
        peer = peer_name(transport)  # After a reset, the kernel no longer knows it.
        try:
            await handler(stream)
        except* trio.BrokenResourceError as group:
            details = group if logger.isEnabledFor(logging.DEBUG) else None
            logger.info("%s reset the connection, so its handler ended", peer, exc_info=details)
        except* Exception as group:
            logger.error("%s: the handler failed", peer, exc_info=_unwrapped(group))  # noqa: TRY400
        except* trio.Cancelled:
            self.cut_off += 1
            raise
        finally:
            if not isinstance(transport, trio.SocketStream) or transport.socket.fileno() >= 0:
                await trio.aclose_forcefully(stream)


def _unwrapped(error: Exception) -> Exception:
    """Return the only exception in a group, or the group if it has several."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
