"""`serve_gracefully`: one of Trio's servers, with a graceful shutdown around it."""

import inspect
import logging
import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeAlias

import trio

from trio_server.accept_queue import any_waiting, ignore_new_connections
from trio_server.connection import unwrapped
from trio_server.handlers import HandlerStarter
from trio_server.shutdown import Shutdown

HANDSHAKE_TIME = 0.5  # seconds; a handshake takes one round trip, which may be long
EMPTYING_TIME = 1.0  # seconds at most, if the kernel cannot ignore new connections
POLL_INTERVAL = 0.01  # seconds; polling the queue costs microseconds

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
            arguments but ``handler_nursery`` filled in:
            ``partial(trio.serve_tcp, handler, 1729, host="127.0.0.1")``. A handler is an async
            function that takes a stream. The stream is closed when the handler ends.
        shutdown: Ends the server: the connections in the accept queue are accepted, and the
            listeners are closed. The handlers may run until the grace period ends.
        shared: Whether other processes accept from the same listeners (systemd, fork). If true,
            they get their share of the connections, and at a shutdown, all that are queued.
            If this is false by mistake, a shutdown makes the kernel drop their new clients, too.
        task_status: ``await nursery.start(serve_gracefully, …)`` returns the listeners, or ``[]``
            if a shutdown ended the start.

    An `Exception` that a handler raises is logged to the logger ``trio_server``. It ends the
    connection, not the server. A `trio.BrokenResourceError` gets one line at INFO, because clients
    may reset their connections. If a handler uses other streams, too, catch their errors there. A
    handler that is shielded from cancellation has no time limit.

    Two kinds of handlers may use up the whole grace period. The first kind waits for its client
    without `Shutdown.move_on_after`. If you cannot change it, start a task that awaits
    `Shutdown.wait`, sleeps for 2 s, and then tells it to finish. By then, the connections in the
    accept queue are accepted, and their requests have arrived. The second kind has a client that
    keeps sending. End its loop when `Shutdown.begun` is true.

    If this function is cancelled, the handlers are cancelled at once.

    A TLS connection ends without a TLS goodbye (close_notify), unless the handler calls ``aclose``
    on its stream. The path of a Unix socket is not removed.

    Raises:
        TypeError: ``server`` is not one of Trio's servers with these arguments filled in.
        OSError: The server could not start: its port is taken, for example. If accepting fails
            later, the shutdown begins, and this is raised when the handlers have ended.
    """
    try:  # For a clear message: are these its open arguments?
        inspect.signature(server).bind(handler_nursery=None, task_status=None)
    except (TypeError, ValueError) as error:
        example = "partial(trio.serve_tcp, handler, 1729)"
        raise TypeError(f"server must be like {example}: {error}") from None
    failure: Exception | None = None
    with shutdown.grace_scope():
        async with trio.open_nursery() as handlers:
            starter = HandlerStarter(handlers, shared)  # no listeners yet
            try:
                await _accept(server, shutdown, starter, task_status)
            except* Exception as group:  # noqa: BLE001 - it is raised below
                failure = unwrapped(group)
                if starter.listeners:
                    logger.error("accepting failed, shutting down: %r", failure)  # noqa: TRY400 - raised below
                    if not shutdown.begun:  # Another call could shorten the grace period.
                        shutdown.begin()
    if starter.cancelled:
        logger.warning("handlers cancelled by the shutdown: %d", starter.cancelled)
    if failure is not None:
        raise failure
    if not starter.listeners:  # A shutdown ended the start.
        task_status.started([])


async def _accept(
    server: Server,
    shutdown: Shutdown,
    starter: HandlerStarter,
    task_status: trio.TaskStatus[list[Any]],
) -> None:
    """Accept connections until the shutdown begins, then close the listeners."""
    # The accept loops end before the handlers do, so they have a nursery of their own.
    async with trio.open_nursery() as accept_loops:
        # Starting has no time limit. But once a shutdown begins, only the idle time is left.
        with shutdown.move_on_after(math.inf):
            starter.listeners = await accept_loops.start(partial(server, handler_nursery=starter))
            task_status.started(starter.listeners)
        await shutdown.wait()
        await _stop_accepting(starter, accept_loops.cancel_scope)


async def _stop_accepting(starter: HandlerStarter, accept_loops: trio.CancelScope) -> None:
    """Accept the connections in the accept queue, then close the listeners."""
    # With TLS, the transport has the socket. A listener in memory has no socket.
    transports = (getattr(one, "transport_listener", one) for one in starter.listeners)
    sockets = [one.socket for one in transports if isinstance(one, trio.SocketListener)]
    if not starter.shared:
        filtered = [ignore_new_connections(one) for one in sockets]
        # The filter lets handshakes in progress finish. If a client arrived within the last
        # second, others may be in one, so wait.
        if trio.current_time() < starter.last_accept + 1 or any_waiting(sockets):
            await trio.sleep(HANDSHAKE_TIME)
        # Where there is a filter, no new handshake begins, so the queue becomes empty.
        with trio.move_on_after(math.inf if all(filtered) else EMPTYING_TIME):
            while any_waiting(sockets):  # noqa: ASYNC110 - the kernel sets no `trio.Event`
                await trio.sleep(POLL_INTERVAL)
    # No `await` between the last check and the close, so no connection can slip in. An accept loop
    # that was about to run finds its listener closed: `ClosedResourceError`. But this error does
    # not get out: Trio then calls `SocketListener.aclose`, and its checkpoint raises `Cancelled`.
    accept_loops.cancel()
    for one in sockets:
        one.close()
