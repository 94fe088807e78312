"""Graceful shutdown: idle clients get one more second, requests in flight get the grace period."""

import math
from weakref import WeakKeyDictionary

import trio

GRACE_PERIOD = 30.0  # seconds; process managers send SIGKILL: Docker after 10, systemd after 90
IDLE_TIME = 1.0  # seconds; enough for a request that is on its way, too short to delay the end


class Shutdown:
    """The graceful shutdown of one server, or of several that stop together.

    ``idle_time`` is the number of seconds that a wait in `move_on_after` may still take once the
    shutdown has begun. With 0, even a request that has arrived may stay unread. A negative number
    or nan raises `ValueError`, here and in the methods.
    """

    def __init__(self, idle_time: float = IDLE_TIME) -> None:
        check_seconds("idle_time", idle_time)
        self._idle_time = idle_time
        self._begun = trio.Event()
        self._grace_ends = math.inf
        # For each scope of `move_on_after`: the seconds that it may last after `begin`.
        self._scopes: WeakKeyDictionary[trio.CancelScope, float] = WeakKeyDictionary()

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

        Then they are cancelled: with 0 immediately, with `math.inf` never. Calling this again can
        only shorten the time.

        For a signal, use `trio.open_signal_receiver`: a handler of `signal.signal` must not call
        this. In another thread, this raises `RuntimeError`. Call it there with
        ``trio.from_thread.run_sync(stop.begin)`` if Trio has started the thread. Otherwise take a
        ``token`` from `trio.lowlevel.current_trio_token` in Trio's thread first, and call
        ``token.run_sync_soon(stop.begin)`` in yours.
        """
        check_seconds("grace_period", grace_period)
        try:
            now = trio.current_time()
        except RuntimeError:
            raise RuntimeError(
                "begin was called outside Trio's thread: use trio.from_thread.run_sync(begin), or "
                "token.run_sync_soon(begin) with a token from trio.lowlevel.current_trio_token()"
            ) from None
        self._grace_ends = min(self._grace_ends, now + grace_period)
        self._begun.set()
        for scope, seconds_left in self._scopes.items():
            if getattr(scope, "is_relative", False):  # made, but not entered yet
                scope.relative_deadline = min(scope.relative_deadline, seconds_left, grace_period)
            else:
                scope.deadline = min(scope.deadline, now + seconds_left, self._grace_ends)

    def move_on_after(self, seconds: float) -> trio.CancelScope:
        """Limit a wait for a client to ``seconds``, as `trio.move_on_after` does.

        A shutdown shortens it to the idle time. If the time ran out, ``cancelled_caught`` of the
        scope is true. At the end of the grace period, the whole handler is cancelled.
        """
        check_seconds("seconds", seconds)
        return self._scope(seconds, self._idle_time)

    def grace_scope(self) -> trio.CancelScope:
        """Return a scope that is cancelled at the end of the grace period."""
        return self._scope(math.inf, math.inf)

    def _scope(self, seconds: float, seconds_left: float) -> trio.CancelScope:
        if self.begun:
            seconds = min(seconds, seconds_left, max(self._grace_ends - trio.current_time(), 0))
        scope = trio.move_on_after(seconds)
        self._scopes[scope] = seconds_left
        return scope


def check_seconds(name: str, value: float) -> None:
    """Raise a `ValueError` that names the argument, unless it is a length of time."""
    if not value >= 0:  # This also catches nan.
        raise ValueError(f"{name} is {value}: it must be a number of seconds, 0 or more")
