"""Signals: the first that asks to stop is graceful, the second is not; SIGUSR1 asks for news."""

import logging
import math
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import trio

from trio_server.account import Connections
from trio_server.activation import notify
from trio_server.shutdown import Shutdown

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STATUS_SIGNAL = signal.SIGUSR1

ONE_STOP = 0.5  # seconds within which two signals are one stop: `uv run` delivers Ctrl-C twice

logger: logging.Logger = logging.getLogger("trio_server")


def default_until_ready() -> list[signal.Signals]:
    """Let a signal end the process without a traceback, as long as there is nothing to stop.

    Returns:
        The signals that ask to stop. A signal that is ignored already stays so, and is not among
        them: a script's job in the background, for example, or ``nohup``.
    """
    stop_signals = [one for one in STOP_SIGNALS if signal.getsignal(one) != signal.SIG_IGN]
    for one in stop_signals:
        signal.signal(one, signal.SIG_DFL)
    signal.signal(STATUS_SIGNAL, signal.SIG_IGN)
    return stop_signals


@contextmanager
def receive(stop_signals: list[signal.Signals]) -> Iterator[AsyncIterator[int]]:
    """Receive these signals and SIGUSR1 in Trio; ignore them afterwards.

    `trio.open_signal_receiver` would restore the default action, and a second signal that comes
    just then would end a process that has answered everybody with the wrong exit status.
    """
    token = trio.lowlevel.current_trio_token()
    send, received = trio.open_memory_channel[int](math.inf)
    numbers = (*stop_signals, STATUS_SIGNAL)
    try:
        for one in numbers:
            signal.signal(one, lambda number, _: token.run_sync_soon(send.send_nowait, number))
        yield received
    finally:
        for one in numbers:
            signal.signal(one, signal.SIG_IGN)


async def obey(
    received: AsyncIterator[int],
    shutdown: Shutdown,
    connections: Connections,
    say_status: Callable[[], None],
    grace_period: float,
) -> None:
    """Shut down gracefully on the first signal that asks to stop, at once on the second."""
    begun_at: float | None = None
    async for number in received:
        name = signal.Signals(number).name
        if number == STATUS_SIGNAL:
            say_status()
        elif begun_at is None:
            begun_at = trio.current_time()
            notify("STOPPING=1")
            shutdown.begin(grace_period)
            in_flight = connections.in_flight
            patience = (
                f", {in_flight} in flight may take up to {grace_period:g} s; "
                "a second signal stops now"
            )
            logger.info("%s: shutting down%s", name, patience if in_flight else "")
        elif trio.current_time() >= begun_at + ONE_STOP:
            shutdown.begin(0)
            logger.info("%s: stopping now", name)
