"""Accepting goes first: connections start in batches, when no client waits to be accepted.

The kernel completes connections ahead of `accept`, and queues them (listen(2)). It drops what
comes to a full queue, and those clients try again a second later. So the queue is to be emptied
first. And the same work done for many connections in a row takes less time than accepting and
starting in turn, as code and data stay in the processor's caches.
"""

import select
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import trio

BATCH = 64
"""Connections that start together: enough to make use of the processor's caches, few enough that
all other tasks soon have their turn."""

MOST_WAITING = 10_000
"""Connections to accept before any of them starts. Beyond that they start all the same, so that
newcomers cannot keep them from their reply for ever."""


class AcceptFirst:
    """Starts handlers in a nursery; what `trio.serve_listeners` takes for its handler nursery.

    Those that have to wait start in the order of `start_soon`, a batch at a time; within a batch,
    Trio runs them in any order.

    Args:
        nursery: Where the handlers run.
        listeners: Those whose queues count; may be filled later.
    """

    def __init__(self, nursery: trio.Nursery, listeners: Iterable[trio.SocketListener]) -> None:
        self._nursery = nursery
        self._listeners = listeners
        self._waiting: deque[tuple[Any, ...]] = deque()

    def start_soon(self, handler: Callable[..., Awaitable[object]], *args: object) -> None:
        """Start a handler: at once if nobody waits to be accepted or to start, else after them."""
        if not self._waiting:
            if not clients_wait(self._listeners):
                self._nursery.start_soon(handler, *args)
                return
            self._nursery.start_soon(self._start_batches)
        self._waiting.append((handler, *args))

    async def _start_batches(self) -> None:
        """Start those that wait, a batch at a time, and let the listeners accept before each."""
        try:
            while self._waiting:
                await self._accept_more()
                for _ in range(min(BATCH, len(self._waiting))):
                    self._nursery.start_soon(*self._waiting.popleft())
        finally:
            # When cancelled, they have to start all the same, to close their streams: a task in
            # a cancelled nursery runs up to its first `await`, and cleans up from there.
            while self._waiting:
                self._nursery.start_soon(*self._waiting.popleft())

    async def _accept_more(self) -> None:
        """Let the listeners accept, until nobody comes any more or too many wait."""
        before = 0
        while before < len(self._waiting) < MOST_WAITING:
            before = len(self._waiting)
            # At a checkpoint all tasks that can run have a turn, in any order, so that an accept
            # loop may have none between two turns of this task; after two checkpoints it had one.
            await trio.lowlevel.checkpoint()
            await trio.lowlevel.checkpoint()


def clients_wait(listeners: Iterable[trio.SocketListener]) -> bool:
    """Tell whether there are clients in the listen queues, connected but not yet accepted."""
    queues = select.poll()
    for listener in listeners:
        if (descriptor := listener.socket.fileno()) >= 0:  # it is -1 when closed
            queues.register(descriptor, select.POLLIN)
    return bool(queues.poll(0))
