"""Signals: one begins the shutdown, a second one cuts it short; SIGUSR1 logs the status."""

import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager

import trio

from trio_server.account import Account
from trio_server.command.activation import notify
from trio_server.shutdown import Shutdown

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ONE_STOP = 0.5  # seconds; two signals in this time count as one: `uv run` delivers Ctrl-C twice
SHUTTING_DOWN = (
    "%s: shutting down within %g s, requests in flight: %d; "
    "another Ctrl-C or SIGTERM, at least half a second later, stops immediately"
)

logger: logging.Logger = logging.getLogger("trio_server")


def exit_on_stop_signals() -> list[signal.Signals]:
    """Let the stop signals that are not ignored (`nohup`) end the process. Return them.

    Process 1 of a container needs the handlers: without them, the kernel ignores the signals.
    """
    stop_signals = [one for one in STOP_SIGNALS if signal.getsignal(one) != signal.SIG_IGN]
    for one in stop_signals:
        signal.signal(one, lambda number, _: os._exit(128 + number))  # as a shell reports it
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    return stop_signals


def receive(stop_signals: list[signal.Signals]) -> AbstractContextManager[AsyncIterator[int]]:
    """Receive these signals and SIGUSR1 in a block, and ignore them after it."""
    for one in stop_signals:
        signal.signal(one, signal.SIG_IGN)  # This is what Trio restores after the block.
    return trio.open_signal_receiver(*stop_signals, signal.SIGUSR1)


async def handle(
    received: AsyncIterator[int],
    shutdown: Shutdown,
    account: Account,
    limiter: trio.CapacityLimiter,
    grace_period: float,
) -> None:
    """Begin the shutdown on the first stop signal, and cut it short on the second."""
    begun_at: float | None = None
    async for number in received:
        name = signal.Signals(number).name
        if number == signal.SIGUSR1:
            text = status(account, limiter)
            logger.info("%s", text)
            notify(f"STATUS={text}")
        elif begun_at is None:
            begun_at = trio.current_time()
            notify("STOPPING=1")
            shutdown.begin(grace_period)
            logger.info(SHUTTING_DOWN, name, grace_period, account.in_flight)
        elif trio.current_time() >= begun_at + ONE_STOP:
            shutdown.begin(0)
            logger.info("%s: stopping immediately", name)


def status(account: Account, limiter: trio.CapacityLimiter) -> str:
    """Return the current state, and how connections have ended so far, as text."""
    return (
        f"{len(account.open)} open, {account.in_flight} in flight, "
        f"{limiter.statistics().tasks_waiting} waiting for --max-concurrent; {account.totals()}"
    )
