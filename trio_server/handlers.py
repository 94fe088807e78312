"""Start the handlers fast, and keep the server running if one fails."""

import logging
import math
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import trio

from trio_server.accept_queue import accept_waiting
from trio_server.connection import peer_name, unwrapped

BATCH = 64  # handlers that start at a time; between batches, the server accepts again
MOST_ACCEPTED = 10_000  # connections that wait for their handler to start

Handler: TypeAlias = Callable[[Any], Awaitable[object]]
logger: logging.Logger = logging.getLogger("trio_server")


@dataclass
class HandlerStarter:
    """What Trio's servers get as their nursery: "any object with a ``start_soon`` method"."""

    nursery: trio.Nursery  # of the handlers
    shared: bool  # whether other processes accept from the same listeners
    listeners: list[Any] = field(default_factory=list)  # once they are open
    last_accept: float = -math.inf  # on Trio's clock
    cancelled: int = 0  # handlers
    _accepted: deque[Any] = field(default_factory=deque)  # streams or sockets, without a handler

    def start_soon(self, run: Handler, stream: trio.abc.AsyncResource, *args: Handler) -> None:
        """Accept all connections in the accept queue, then start the handlers in batches.

        A client that finds the queue full tries again after a second. So accepting comes first,
        and 10,000 clients at once do not fill the queue.

        Trio's documentation promises ``start_soon(handler, stream)``. Today's Trio passes a
        wrapper of its own first, and the handler last. Both forms work here.
        """
        handler = args[0] if args else run
        self.last_accept = trio.current_time()
        batch_is_scheduled = bool(self._accepted)
        self._accepted.append(stream)
        for listener in self.listeners:
            # Other kinds of listeners may do more in `accept`.
            if type(listener) is trio.SocketListener and not self.shared:
                room = MOST_ACCEPTED - len(self._accepted)
                self._accepted += accept_waiting(listener.socket, room)
        if not batch_is_scheduled:
            self._start_batch(handler)

    def _start_batch(self, handler: Handler) -> None:
        for _ in range(min(BATCH, len(self._accepted))):
            stream = self._accepted.popleft()
            if isinstance(stream, socket.socket):
                stream = trio.SocketStream(trio.socket.from_stdlib_socket(stream))
            self.nursery.start_soon(self._run_handler, handler, stream)
        if self._accepted:
            self.nursery.start_soon(self._start_next_batch, handler)

    async def _start_next_batch(self, handler: Handler) -> None:
        # There is no checkpoint here. So even in a cancelled nursery, each connection gets its
        # `_run_handler`, and that closes it.
        self._start_batch(handler)

    async def _run_handler(self, handler: Handler, stream: trio.abc.AsyncResource) -> None:
        """Run a handler, so that its failure ends its connection and not the server."""
        transport = getattr(stream, "transport_stream", stream)
        peer = peer_name(transport)  # After a reset, the kernel no longer knows the address.
        try:
            await handler(stream)
        except* trio.BrokenResourceError as group:
            # As text: if the log keeps the record, the error would keep the handler's variables.
            logger.info("%s: the handler ended: %s", peer, repr(unwrapped(group)))
        except* Exception as group:
            logger.error("%s: the handler failed", peer, exc_info=unwrapped(group))  # noqa: TRY400
        except* trio.Cancelled:
            self.cancelled += 1
            raise
        finally:  # Close the stream, unless the handler has: closing it twice costs 30 µs.
            if not isinstance(transport, trio.SocketStream) or transport.socket.fileno() >= 0:
                await trio.aclose_forcefully(stream)
