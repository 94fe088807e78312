"""Graceful shutdown: idle clients get a second, requests in flight the grace period."""

import math
import weakref

import trio

GRACE_PERIOD = 30.0  # seconds; process managers kill after a while: Docker 10, systemd 90
CLOSING_TIME = 1.0  # seconds; enough for a request on its way, too short to hold the server up


class Shutdown:
    """The graceful shutdown of a server, or of several that stop together.

    Pass it to `serve_tcp`, and call `begin` to stop: the server accepts nobody new, and returns
    when its last handler has ended, or after the grace period. It cannot be undone.

    A handler takes part so, with the wait for its client in the block, and never its work::

        while not shutdown.begun:
            with shutdown.move_on_after(30) as idle:  # a second, once the shutdown begins
                data = await stream.receive_some()
            if idle.cancelled_caught or not data:
                break
            with trio.fail_after(30):
                await stream.send_all(data)
    """

    def __init__(self) -> None:
        self._begun = trio.Event()
        self.grace_ends: float = math.inf  # on Trio's clock
        # Weak sets: a cancel scope leaves by itself once neither a task nor Trio uses it any more.
        self._waits: weakref.WeakSet[trio.CancelScope] = weakref.WeakSet()
        self._servers: weakref.WeakSet[trio.CancelScope] = weakref.WeakSet()

    @property
    def begun(self) -> bool:
        """Whether the shutdown has begun."""
        return self._begun.is_set()

    async def wait(self) -> None:
        """Wait until the shutdown begins."""
        await self._begun.wait()

    def begin(self, grace_period: float = GRACE_PERIOD) -> None:
        """Begin the shutdown, or shorten its grace period; return at once.

        Args:
            grace_period: Seconds from now until whatever still runs is cancelled: 0 for now,
                `math.inf` for never.

        Raises:
            ValueError: The grace period is negative or nan.
        """
        check_seconds("grace_period", grace_period)
        now = trio.current_time()
        self.grace_ends = min(self.grace_ends, now + grace_period)
        self._begun.set()
        for server in self._servers:
            server.deadline = self.grace_ends
        for wait in self._waits:
            wait.deadline = min(wait.deadline, now + CLOSING_TIME, self.grace_ends)

    def move_on_after(self, seconds: float) -> trio.CancelScope:
        """Limit a wait, like `trio.move_on_after`; once the shutdown has begun, to a second.

        Args:
            seconds: How long to wait, from now.

        Returns:
            A cancel scope for a ``with`` block: ``cancelled_caught`` if that was ended early.

        Raises:
            ValueError: The number of seconds is negative or nan.
        """
        check_seconds("seconds", seconds)
        if self.begun:
            seconds = min(seconds, CLOSING_TIME)
        wait = trio.CancelScope(deadline=trio.current_time() + seconds)
        self._waits.add(wait)
        return wait

    def grace_scope(self) -> trio.CancelScope:
        """Return the cancel scope for a whole server. It ends with the grace period."""
        server = trio.CancelScope(deadline=self.grace_ends)
        self._servers.add(server)
        return server


def check_seconds(name: str, value: float) -> None:
    """Raise a `ValueError` that names the argument, unless it is a length of time."""
    if not value >= 0:  # nan is not, either
        raise ValueError(f"{name} is {value}: it has to be a number of seconds, 0 or more")
