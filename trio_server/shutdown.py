"""Graceful shutdown: idle clients get one more second, requests in flight get the grace period."""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

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
        self._scopes: dict[trio.CancelScope, float] = {}  # the seconds each has after `begin`

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
            scope.deadline = min(scope.deadline, now + seconds_left, self._grace_ends)

    def move_on_after(self, seconds: float) -> AbstractContextManager[trio.CancelScope, bool]:
        """Limit a wait for a client to ``seconds``, as `trio.move_on_after` does.

        A shutdown shortens it to the idle time. If the time ran out, ``cancelled_caught`` of the
        scope is true. At the end of the grace period, the whole handler is cancelled.
        """
        check_seconds("seconds", seconds)
        return _Scope(self, seconds, self._idle_time)

    def grace_scope(self) -> AbstractContextManager[trio.CancelScope, bool]:
        """Cancel the block at the end of the grace period, as `serve_gracefully` does."""
        return _Scope(self, math.inf, math.inf)


@dataclass
class _Scope(AbstractContextManager[trio.CancelScope, bool]):
    """A cancel scope that a shutdown shortens.

    `contextlib.contextmanager` would be shorter. But on Python 3.12 and 3.13 it would keep the
    variables of a handler in memory after a wait that was cancelled, in a reference cycle.
    """

    shutdown: Shutdown
    seconds: float  # counted from entering the block
    seconds_left: float  # counted from the beginning of the shutdown
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    @trio.lowlevel.enable_ki_protection  # as Trio's own, so that Ctrl-C leaves no scope open
    def __enter__(self) -> trio.CancelScope:
        begun, grace_ends = self.shutdown.begun, self.shutdown.grace_ends
        limit = min(self.seconds, self.seconds_left) if begun else self.seconds
        self.scope.deadline = min(trio.current_time() + limit, grace_ends)
        self.scope.__enter__()
        self.shutdown._scopes[self.scope] = self.seconds_left  # noqa: SLF001 - for `begin`
        return self.scope

    @trio.lowlevel.enable_ki_protection
    def __exit__(self, *error: Any) -> bool:  # noqa: ANN401, PYI036 - they are passed on
        del self.shutdown._scopes[self.scope]  # noqa: SLF001
        return self.scope.__exit__(*error)


def check_seconds(name: str, value: float) -> None:
    """Raise a `ValueError` that names the argument, unless it is a length of time."""
    if not value >= 0:  # This also catches nan.
        raise ValueError(f"{name} is {value}: it must be a number of seconds, 0 or more")
