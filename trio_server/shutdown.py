"""Graceful shutdown: idle clients get one more second, requests in flight the grace period."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import trio

GRACE_PERIOD = 30.0  # seconds; process managers kill after a while: Docker 10, systemd 90
IDLE_TIME = 1.0  # seconds; enough for a request that is on its way, too short to delay the end


class Shutdown:
    """The graceful shutdown of one server, or of several that stop together.

    ``idle_time`` is the number of seconds that a wait in `move_on_after` may still take once the
    shutdown has begun. With 0, a request that has arrived may not be read. A negative number or
    nan raises `ValueError`, here and below.
    """

    def __init__(self, idle_time: float = IDLE_TIME) -> None:
        check_seconds("idle_time", idle_time)
        self._idle_time = idle_time
        self._begun = trio.Event()
        self._grace_ends = math.inf
        self._scopes: dict[trio.CancelScope, float] = {}  # the seconds that a shutdown leaves each

    @property
    def begun(self) -> bool:
        """Whether the shutdown has begun."""
        return self._begun.is_set()

    @property
    def grace_ends(self) -> float:
        """The end of the grace period on Trio's clock; `math.inf` before the shutdown."""
        return self._grace_ends

    async def wait(self) -> None:
        """Wait until the shutdown begins."""
        await self._begun.wait()

    def begin(self, grace_period: float = GRACE_PERIOD) -> None:
        """Begin the shutdown and return at once. Handlers may run for ``grace_period`` seconds.

        Then they are cancelled: at once after 0 seconds, never after `math.inf`. Calling this
        again can only shorten the time.

        Outside Trio's thread, this raises `RuntimeError`. In a thread that Trio has started, call
        ``trio.from_thread.run_sync(stop.begin)``. In any other thread, or in a handler of
        `signal.signal`, call ``token.run_sync_soon(stop.begin)``, where ``token`` is what
        `trio.lowlevel.current_trio_token` has returned.
        """
        check_seconds("grace_period", grace_period)
        try:
            now = trio.current_time()
        except RuntimeError:
            raise RuntimeError(
                "begin was called outside Trio's thread: use trio.from_thread.run_sync(begin), or "
                "token.run_sync_soon(begin) with a token of trio.lowlevel.current_trio_token()"
            ) from None
        self._begun.set()
        self._grace_ends = min(self._grace_ends, now + grace_period)
        for scope, seconds_left in self._scopes.items():
            scope.deadline = min(scope.deadline, now + seconds_left, self._grace_ends)

    def move_on_after(self, seconds: float) -> AbstractContextManager[trio.CancelScope]:
        """Limit a wait for a client to ``seconds``, as `trio.move_on_after` does.

        A shutdown shortens it to the idle time, and to the end of the grace period. If the time
        ran out, ``cancelled_caught`` of the scope is true.
        """
        check_seconds("seconds", seconds)
        return self._scope(seconds, self._idle_time)

    def grace_scope(self) -> AbstractContextManager[trio.CancelScope]:
        """Cancel the block at the end of the grace period."""
        return self._scope(math.inf, math.inf)

    @contextmanager
    def _scope(self, seconds: float, seconds_left: float) -> Iterator[trio.CancelScope]:
        limit = min(seconds, seconds_left) if self.begun else seconds
        deadline = min(trio.current_time() + limit, self._grace_ends)
        with trio.CancelScope(deadline=deadline) as scope:
            self._scopes[scope] = seconds_left
            try:
                yield scope
            finally:
                del self._scopes[scope]


def check_seconds(name: str, value: float) -> None:
    """Raise a `ValueError` that names the argument, unless it is a length of time."""
    if not value >= 0:  # nan is not, either
        raise ValueError(f"{name} is {value}: it must be a number of seconds, 0 or more")
