"""Graceful shutdown: idle clients get one more second, requests in flight get the grace period."""

import math
from weakref import WeakKeyDictionary

import trio

GRACE_PERIOD = 30.0  # seconds; process managers send SIGKILL: Docker after 10, systemd after 90
IDLE_TIME = 1.0  # seconds; enough for a request that is on its way, too short to delay the exit


class Shutdown:
    """The graceful shutdown of one server, or of several that stop together. It happens once.

    ``idle_time`` is the number of seconds that a wait in `move_on_after` may still take once the
    shutdown has begun. With 0, waits end at once, even if a request has just arrived. A negative
    number or nan raises `ValueError`, here and in the methods.
    """

    def __init__(self, idle_time: float = IDLE_TIME) -> None:
        check_seconds("idle_time", idle_time)
        self._idle_time = idle_time
        self._begun = trio.Event()
        self._grace_ends = math.inf
        # How many seconds each scope may last after `begin`. The references are weak, so a scope
        # that has ended drops out.
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

        Call this in Trio's thread while Trio runs. Elsewhere it raises `RuntimeError`. A thread
        that Trio has started can call ``trio.from_thread.run_sync(stop.begin)``. For any other
        thread, take a ``token`` from `trio.lowlevel.current_trio_token` in Trio's thread first.
        The other thread can then call ``token.run_sync_soon(stop.begin)``. A function given to
        `signal.signal` must do the same, because it may run at any time. For signals,
        `trio.open_signal_receiver` is simpler.
        """
        check_seconds("grace_period", grace_period)
        try:
            now = trio.current_time()
        except RuntimeError:
            raise RuntimeError(
                "begin works only in Trio's thread, while Trio runs. Elsewhere, use "
                "trio.from_thread.run_sync(begin), or token.run_sync_soon(begin) with a token "
                "from trio.lowlevel.current_trio_token()"
            ) from None
        self._grace_ends = min(self._grace_ends, now + grace_period)
        self._begun.set()
        for scope, after_begin in self._scopes.items():
            if getattr(scope, "is_relative", False):
                # Not entered yet. From Trio 0.27 on, its deadline is then a number of seconds.
                scope.relative_deadline = min(scope.relative_deadline, after_begin, grace_period)
            else:
                scope.deadline = min(scope.deadline, now + after_begin, self._grace_ends)

    def move_on_after(self, seconds: float) -> trio.CancelScope:
        """Limit a wait for a client to ``seconds``, as `trio.move_on_after` does.

        Once the shutdown has begun, the wait may last for the idle time at most. That time counts
        from the beginning of the shutdown, or of the wait if that is later. Enter the scope at
        once, and do not change its deadline. Its ``cancelled_caught`` is true if the time ran out.
        """
        check_seconds("seconds", seconds)
        return self._scope(seconds, self._idle_time)

    def grace_scope(self) -> trio.CancelScope:
        """Return a scope that is cancelled when the grace period ends."""
        return self._scope(math.inf, math.inf)

    def _scope(self, seconds: float, after_begin: float) -> trio.CancelScope:
        if self.begun:
            seconds = min(seconds, after_begin, max(self._grace_ends - trio.current_time(), 0))
        scope = trio.move_on_after(seconds)
        self._scopes[scope] = after_begin
        return scope


def check_seconds(name: str, value: float) -> None:
    """Raise a `ValueError` that names the argument, unless it is a length of time."""
    if not value >= 0:  # This also catches nan.
        raise ValueError(f"{name} is {value}: it must be a number of seconds, 0 or more")
