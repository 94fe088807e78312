"""While a listen queue fills up, accepting goes first, and connections start less often.

The kernel completes connections ahead of `accept`, and queues them (listen(2)). It drops what
comes to a full queue, and those clients try again a second later. Accepting alone is faster
than accepting and handling, so that a burst of clients finds room for longer.
"""

import struct
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio

QUEUE_LENGTH = struct.Struct("24xII")
"""In Linux's ``struct tcp_info`` of a listening socket: after 24 bytes, how many connections are
queued (``tcpi_unacked``) and how many may be (``tcpi_sacked``). It is what `ss -l` shows."""

TURNS = 16
"""Connections to accept for each one that starts, while a queue is more than half full."""

MOST_WAITING = 10_000
"""Connections that may wait to start. Beyond that one starts in each turn again, so that newcomers
without end cannot keep those before them from their reply."""


class AcceptFirst:
    """Starts handlers in a nursery; what `trio.serve_listeners` takes for its handler nursery.

    Those that have to wait start in the order of `start_soon`, each of them `TURNS` turns of the
    scheduler after the one before at most, however full the queues are.

    Args:
        nursery: Where the handlers run.
        listeners: Those whose queues count; may be filled later.
    """

    def __init__(self, nursery: trio.Nursery, listeners: Sequence[trio.SocketListener]) -> None:
        self._nursery = nursery
        self._listeners = listeners
        self._waiting: deque[tuple[Any, ...]] = deque()

    def start_soon(self, handler: Callable[..., Awaitable[object]], *args: object) -> None:
        """Start a handler: at once, unless others wait or a queue is more than half full."""
        if not self._waiting:
            if not self._queue_fills_up():
                self._nursery.start_soon(handler, *args)
                return
            self._nursery.start_soon(self._catch_up)
        self._waiting.append((handler, *args))

    async def _catch_up(self) -> None:
        try:
            while self._waiting:
                # A checkpoint is a turn for all other tasks: each accept loop accepts once.
                hold_back = len(self._waiting) < MOST_WAITING and self._queue_fills_up()
                for _ in range(TURNS if hold_back else 1):
                    await trio.lowlevel.checkpoint()
                self._nursery.start_soon(*self._waiting.popleft())
        finally:
            # When cancelled, they have to start all the same, to close their streams.
            while self._waiting:
                self._nursery.start_soon(*self._waiting.popleft())

    def _queue_fills_up(self) -> bool:
        return any(_is_half_full(listener.socket) for listener in self._listeners)


def _is_half_full(sock: trio.socket.SocketType) -> bool:
    """Look at a listen queue, on Linux; it is never half full elsewhere."""
    if sys.platform != "linux":
        return False
    try:
        info = sock.getsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_INFO, QUEUE_LENGTH.size)
    except OSError:  # closed in the meantime, or not TCP
        return False
    if len(info) < QUEUE_LENGTH.size:  # not quite Linux
        return False
    queued, longest = QUEUE_LENGTH.unpack(info)
    return bool(2 * queued > longest)
