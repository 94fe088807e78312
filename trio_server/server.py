"""`serve_tcp` and `serve_listeners`: Trio's, with a graceful shutdown."""

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import trio

from trio_server import addresses
from trio_server.accept_queue import AcceptFirst, last_call
from trio_server.shutdown import Shutdown

HIGHEST_PORT = 65535  # 16 bits (RFC 9293, section 3.1)
StreamT = TypeVar("StreamT", bound=trio.abc.AsyncResource)
logger: logging.Logger = logging.getLogger("trio_server")


async def serve_tcp(  # noqa: PLR0913 - as many as Trio's
    handler: Callable[[trio.SocketStream], Awaitable[object]],
    port: int,
    *,
    host: str | None = "localhost",
    backlog: int | None = None,
    shutdown: Shutdown | None = None,
    task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Listen on a port, and run a handler for each connection, like `trio.serve_tcp`.

    Args:
        handler: Async function that takes a `trio.SocketStream`, which is closed when it ends. An
            `Exception` that it raises is logged, and ends its connection, not the server.
        port: 0 to 65535. With 0 the kernel picks one for each address.
        host: The name or address to listen on, or None for all interfaces. A name with several
            addresses gets a listener on each that this machine has.
        backlog: The length of the accept queue, or None for the longest that the kernel allows.
        shutdown: Ends it gracefully, once it begins. Cancelling ends it at once.
        task_status: `nursery.start` returns the listeners, none if the shutdown began before.
            The port is ``listeners[0].socket.getsockname()[1]``.

    Raises:
        ValueError: The port is out of range.
        OSError: It cannot listen, as the port is taken or the host does not resolve, for example.
            Or it could not accept any more: that begins the shutdown, and is raised in the end.
    """
    if not 0 <= port <= HIGHEST_PORT:
        raise ValueError(f"port is {port}: it has to be a number from 0 to {HIGHEST_PORT}")
    shutdown = shutdown or Shutdown()
    found: list[str] = []
    with shutdown.move_on_after(math.inf):  # A slow resolver does not hold the shutdown up.
        found = await addresses.resolve(host, port)
    if shutdown.begun:
        task_status.started([])
        return
    # Listen on all before accepting from any, so that a start that fails has accepted nobody.
    listeners = await addresses.listen(found, port, host=host, backlog=backlog)
    await _serve(handler, listeners, listeners, shutdown, task_status)


async def serve_listeners(
    handler: Callable[[StreamT], Awaitable[object]],
    listeners: Sequence[trio.abc.Listener[StreamT]],
    *,
    shutdown: Shutdown | None = None,
    task_status: trio.TaskStatus[Sequence[trio.abc.Listener[StreamT]]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run a handler for each connection of open listeners, like `trio.serve_listeners`.

    Args:
        handler: Async function that takes a stream, as with `serve_tcp`.
        listeners: Open ones: TCP, TLS or in memory. They are closed in the end. Connections that
            are in the accept queue of a socket then are left for others that hold the socket;
            without any, they are reset.
        shutdown: Ends it gracefully, once it begins. Cancelling ends it at once.
        task_status: `nursery.start` returns the listeners.

    Raises:
        ValueError: There are no listeners.
        OSError, trio.ClosedResourceError: It could not accept any more, likewise.
    """
    if not listeners:
        raise ValueError("listeners is empty: at least one is needed")
    await _serve(handler, listeners, [], shutdown or Shutdown(), task_status)


async def _serve(
    handler: Callable[[Any], Awaitable[object]],
    listeners: Sequence[trio.abc.Listener[Any]],
    ours: list[trio.SocketListener],  # those whose accept queue nobody else will empty
    shutdown: Shutdown,
    task_status: trio.TaskStatus[Any],
) -> None:
    """Accept and run handlers until the shutdown begins; then let them finish."""
    failures: list[Exception] = []
    with shutdown.grace_scope():
        # Accepting ends before the handlers do, so there are two nurseries: the inner one is
        # cancelled to end the accept loops; the outer block waits for the last handler.
        async with trio.open_nursery() as handlers, trio.open_nursery() as accept_loops:
            accept = partial(_accept, handler, handlers, shutdown, failures)
            for listener in listeners:
                accept_loops.start_soon(accept, listener)
            task_status.started(listeners)
            await shutdown.wait()
            await last_call(ours)
            # Close now, without a checkpoint: nobody can enter a queue after the last look at it.
            # An accept loop would close its listener only when it runs again.
            accept_loops.cancel_scope.cancel()
            for listener in listeners:
                if isinstance(listener, trio.SocketListener):
                    listener.socket.close()
    if failures:
        raise failures[0]


async def _accept(
    handler: Callable[[Any], Awaitable[object]],
    handlers: trio.Nursery,
    shutdown: Shutdown,
    failures: list[Exception],
    listener: trio.abc.Listener[Any],
) -> None:
    """Accept from one listener until cancelled. If that fails, begin the shutdown."""
    source = AcceptFirst(listener) if isinstance(listener, trio.SocketListener) else listener
    try:
        await trio.serve_listeners(partial(_handle, handler), [source], handler_nursery=handlers)
    except* (OSError, trio.ClosedResourceError) as group:
        logger.exception("accepting failed, so the server shuts down")
        [failure] = group.exceptions  # of the one accept loop in there
        failures.append(failure)
        shutdown.begin(math.inf)  # Whoever wants to set an end can still do so.


async def _handle(handler: Callable[[StreamT], Awaitable[object]], stream: StreamT) -> None:
    """Run a handler, so that its failure ends its connection and not the server."""
    try:
        await handler(stream)
    except* trio.BrokenResourceError:
        logger.info("a handler ended, as its client had gone away", exc_info=True)
    except* Exception:
        logger.exception("a handler failed")
    except* trio.Cancelled:
        if trio.current_effective_deadline() == -math.inf:
            raise
        # Nobody has cancelled this task: a cache raised the outcome that it kept, for example.
        logger.exception("a handler failed: it raised a trio.Cancelled that is not its own")
