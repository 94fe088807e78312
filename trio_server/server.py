"""`serve_gracefully`: one of Trio's servers, with a graceful shutdown around it."""

import inspect
import logging
import math
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import trio

from trio_server.accept_queue import accept_waiting, any_waiting, ignore_new_connections
from trio_server.connection import peer_name
from trio_server.shutdown import Shutdown

BATCH = 64  # handlers that start in one scheduler pass; then the server accepts again
MOST_ACCEPTED = 10_000  # connections that wait for their handler to start
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
            handler is an async function of a stream. The stream is closed when the handler ends.
        shutdown: Ends the server: the connections in the accept queue are accepted, and the
            listeners are closed. The handlers may run until the grace period ends.
        shared: Whether other processes accept from the same listeners (systemd, fork). They get
            their share of the connections, and all that this server leaves in the queue. If this
            is false by mistake, the others get no connections after the shutdown.
        task_status: Gives `nursery.start` the listeners, or ``[]`` if a shutdown ended the start.

    An `Exception` that a handler raises is logged to the logger ``trio_server``. It ends the
    connection, not the server. A `trio.BrokenResourceError` is one line at INFO, because clients
    may reset their connections. The server waits for a handler that is shielded from cancellation.

    Two kinds of handlers may use up the whole grace period. One waits for its client outside
    `Shutdown.move_on_after`: tell it to finish, 2 s after `Shutdown.wait` has returned. By then no
    new connections arrive. The other has a client that keeps sending: end its loop when
    `Shutdown.begun` is true.

    A TLS connection ends without a TLS goodbye (close_notify), unless the handler calls ``aclose``
    on its stream. The path of a Unix socket is not removed.

    Raises:
        TypeError: ``server`` is not one of Trio's servers with these arguments filled in.
        OSError: The server could not start: its port is taken, for example. Or accepting failed
            later: the shutdown begins, and this is raised when the handlers have ended.
    """
    try:
        inspect.signature(server).bind(handler_nursery=None, task_status=None)
    except (TypeError, ValueError) as error:
        example = "partial(trio.serve_tcp, handler, 1729)"
        raise TypeError(f"server must be like {example}: {error}") from None
    failure: Exception | None = None
    try:
        with shutdown.grace_scope():
            async with trio.open_nursery() as nursery:
                acceptor = _Acceptor(nursery, shared)
                try:
                    await acceptor.run(server, shutdown, task_status)
                except Exception as error:  # noqa: BLE001 - it is raised below
                    failure = _unwrapped(error)
                    if acceptor.listeners:
                        logger.error("accepting failed, so the server shuts down: %r", failure)  # noqa: TRY400 - raised below
                        if not shutdown.begun:
                            shutdown.begin()
    except Exception as error:  # noqa: BLE001 - accepting failed when the grace period ended
        failure = _unwrapped(error)
    if acceptor.cancelled:
        logger.warning("handlers cancelled by the shutdown: %d", acceptor.cancelled)
    if failure is not None:
        raise failure
    if not acceptor.listeners:
        task_status.started([])


@dataclass
class _Acceptor:
    """Accepts connections, and starts their handlers.

    It is what Trio's servers get as their nursery: "any object with a ``start_soon`` method".
    `run` has the steps of a shutdown. `start_soon` and the batches make accepting fast.
    """

    handlers: trio.Nursery
    shared: bool
    listeners: list[Any] = field(default_factory=list)  # once they are open
    last_accept: float = -math.inf
    accepted: deque[Any] = field(default_factory=deque)  # streams or sockets without a handler yet
    cancelled: int = 0  # handlers

    async def run(
        self, server: Server, shutdown: Shutdown, task_status: trio.TaskStatus[list[Any]]
    ) -> None:
        """Accept connections until the shutdown begins, then close the listeners."""
        # The accept loops end before the handlers do, so they have a nursery of their own.
        async with trio.open_nursery() as accept_loops:
            with shutdown.move_on_after(math.inf):  # A shutdown need not wait for a name lookup.
                self.listeners = await accept_loops.start(partial(server, handler_nursery=self))
                task_status.started(self.listeners)
            await shutdown.wait()
            # With TLS, the transport has the socket. A listener in memory has no socket.
            transports = (getattr(one, "transport_listener", one) for one in self.listeners)
            sockets = [one.socket for one in transports if isinstance(one, trio.SocketListener)]
            if not self.shared:
                await self._empty_queues(sockets)
            # No `await` between the last check and the close, so no connection can slip in. An
            # accept loop that was about to run finds its socket closed: a `ClosedResourceError`.
            # Then it calls `aclose`, whose checkpoint raises `Cancelled`. That replaces the error.
            accept_loops.cancel_scope.cancel()
            for one in sockets:
                one.close()

    async def _empty_queues(self, sockets: list[trio.socket.SocketType]) -> None:
        """Keep new connections out, and wait until all others are accepted."""
        filtered = [ignore_new_connections(one) for one in sockets]
        if trio.current_time() < self.last_accept + 1 or any_waiting(sockets):
            await trio.sleep(HANDSHAKE_TIME)  # Clients are arriving, perhaps in a handshake.
        with trio.move_on_after(math.inf if all(filtered) else EMPTYING_TIME):
            while any_waiting(sockets):  # noqa: ASYNC110 - the kernel sets no `trio.Event`
                await trio.sleep(POLL_INTERVAL)

    def start_soon(self, _: object, stream: trio.abc.AsyncResource, handler: Handler) -> None:
        """Accept all connections in the accept queue, then start the handlers in batches.

        While the queue is full, each new client waits for a second. So accepting comes first, and
        10,000 clients at once do not fill the queue. Trio passes a function that runs the handler
        and closes the stream. It is not used: closing twice costs 30 microseconds.
        """
        self.last_accept = trio.current_time()
        starting = bool(self.accepted)
        self.accepted.append(stream)
        for listener in () if self.shared else self.listeners:
            if type(listener) is trio.SocketListener:
                room = MOST_ACCEPTED - len(self.accepted)
                self.accepted += accept_waiting(listener.socket, room)
        if not starting:
            self._start_batch(handler)

    def _start_batch(self, handler: Handler) -> None:
        for _ in range(min(BATCH, len(self.accepted))):
            stream = self.accepted.popleft()
            if isinstance(stream, socket.socket):
                stream = trio.SocketStream(trio.socket.from_stdlib_socket(stream))
            self.handlers.start_soon(self._run_handler, handler, stream)
        if self.accepted:
            self.handlers.start_soon(self._start_next_batch, handler)

    async def _start_next_batch(self, handler: Handler) -> None:
        # In one pass, Trio runs all tasks that are ready; then it asks the kernel for events. This
        # task begins in the next pass, even if it is cancelled. So each stream is closed.
        self._start_batch(handler)

    async def _run_handler(self, handler: Handler, stream: trio.abc.AsyncResource) -> None:
        """Run a handler, so that its failure ends its connection and not the server."""
        transport = getattr(stream, "transport_stream", stream)
        peer = peer_name(transport)  # After a reset, the kernel no longer knows the address.
        try:
            await handler(stream)
        except* trio.BrokenResourceError as group:
            # Its traceback has this frame, so a variable with the error would make a cycle.
            debug = logger.isEnabledFor(logging.DEBUG)
            message = f"{peer}: the handler ended: {_unwrapped(group)!r}"
            logger.info("%s", message, exc_info=_unwrapped(group) if debug else None)
        except* Exception as group:
            logger.error("%s: the handler failed", peer, exc_info=_unwrapped(group))  # noqa: TRY400
        except* trio.Cancelled:
            self.cancelled += 1
            raise
        finally:
            if not isinstance(transport, trio.SocketStream) or transport.socket.fileno() >= 0:
                await trio.aclose_forcefully(stream)


def _unwrapped(error: Exception) -> Exception:
    """Return the only exception in a group, or the group if it has several."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
