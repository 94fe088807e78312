"""Signals: the first stops the server gracefully, the second at once; SIGUSR1 logs the status."""

import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import trio

from trio_server.account import Account
from trio_server.command.activation import notify
from trio_server.shutdown import Shutdown

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ONE_STOP = 0.5  # seconds; two signals within them count as one: `uv run` delivers Ctrl-C twice

logger: logging.Logger = logging.getLogger("trio_server")


def exit_on_stop_signals() -> list[signal.Signals]:
    """Let a stop signal end the process while there is nothing to stop. Return these signals.

    The kernel ignores a signal that has its default action if this is process 1 of a container,
    so each signal gets a handler. One that was ignored from the start (`nohup`, a script's
    background job) stays ignored, and is not returned.
    """
    stop_signals = [one for one in STOP_SIGNALS if signal.getsignal(one) != signal.SIG_IGN]
    for one in stop_signals:
        signal.signal(one, lambda number, _: os._exit(128 + number))  # as a shell reports it
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    return stop_signals


@contextmanager
def receive(stop_signals: list[signal.Signals]) -> Iterator[AsyncIterator[int]]:
    """Receive these signals and SIGUSR1 in the block, and ignore them after it."""
    # Trio restores the handlers at the end. A signal that comes then must not end the process
    # with another exit status, so ignoring is what it restores.
    for one in stop_signals:
        signal.signal(one, signal.SIG_IGN)
    with trio.open_signal_receiver(*stop_signals, signal.SIGUSR1) as received:
        yield received


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
            logger.info(
                "%s: shutting down within %g s, requests in flight: %d; "
                "a second Ctrl-C or SIGTERM (after half a second) stops at once",
                name,
                grace_period,
                account.in_flight,
            )
        elif trio.current_time() >= begun_at + ONE_STOP:
            shutdown.begin(0)
            logger.info("%s: stopping at once", name)


def status(account: Account, limiter: trio.CapacityLimiter) -> str:
    """Return the present state, and how connections have ended so far, as text."""
    received = [exchange.received_at for exchange in account.open if exchange.in_flight]
    oldest = f" (the oldest for {trio.current_time() - min(received):.1f} s)" if received else ""
    waiting = limiter.statistics().tasks_waiting
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(account.since))
    return (
        f"{len(account.open)} open, {len(received)} in flight{oldest}, {waiting} waiting for "
        f"--max-concurrent; since {since}: {account.totals()}"
    )
