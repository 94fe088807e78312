"""The live view (``--watch``): what goes on, drawn in the terminal ten times a second.

It is one more task beside those of the clients, and reads their state without a lock. No other
task runs before its next `await`, so all that it draws belongs to one moment.
"""

import locale
import math
import os
import re
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from itertools import islice

import trio

from trio_server.account import Connections, Outcome, first_line
from trio_server.connection import Connection
from trio_server.log import LAST_SECOND, Log, resume, write
from trio_server.shutdown import Shutdown

INTERVAL = 0.1  # seconds between two looks
PEER, REQUEST, BAR, TIME = 21, 16, 20, 10  # columns; a narrow terminal gets less of the middle two
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # the other screen, without a cursor
ASCII = str.maketrans("█▌░·─…", "#=.|-~")  # for a locale without these
TTY = os.makedev(5, 0)  # the name of each process's own terminal (tty(4))


class View(Connections):
    """Connections that show themselves: the open ones, and those that were answered last."""

    def __init__(self, shutdown: Shutdown, delay: float, log: Log) -> None:
        super().__init__()
        self._shutdown, self._delay, self._log = shutdown, max(delay, 1e-9), log  # It divides.
        self._answered: deque[Connection] = deque(maxlen=50)  # more than are shown
        self._one = trio.CapacityLimiter(1)  # so that what is written comes in order

    def end(self, connection: Connection) -> None:
        """Count a connection that has ended; remember it if it was answered."""
        super().end(connection)
        if connection.outcome is Outcome.ANSWERED:
            self._answered.appendleft(connection)

    async def show(self, urls: list[str]) -> None:
        """Show the view until cancelled, then leave the terminal as it was."""
        self._here = os.isatty(2) and len({os.fstat(1).st_rdev, os.fstat(2).st_rdev} - {TTY}) <= 1
        while True:
            with trio.open_signal_receiver(signal.SIGTSTP, signal.SIGQUIT) as signals:
                number = await self._show_until(signals, urls)
            signal.raise_signal(number)  # Ctrl-Z: the whole process stops here, until `fg`.

    async def _show_until(self, signals: AsyncIterator[int], urls: list[str]) -> int:
        size, shown, ours = os.terminal_size((80, 24)), False, True
        try:
            while True:
                with suppress(OSError):  # No shell manages this terminal, or it is gone.
                    size = os.get_terminal_size(1)
                    ours = os.tcgetpgrp(1) == os.getpgrp()  # not after `bg`
                self._log.held = self._here and ours
                if ours:
                    text = frame(self.draw(urls, size, trio.current_time()))
                    text, shown = text if shown else ENTER + text, True
                    await write(sys.stdout, text, self._one)
                with trio.move_on_after(INTERVAL):
                    return await anext(signals)
        finally:
            with trio.move_on_after(LAST_SECOND, shield=True):  # Perhaps nobody reads.
                resume()
                await write(sys.stdout, LEAVE if shown else "", self._one)
            self._log.held = False

    def draw(self, urls: list[str], size: tuple[int, int], now: float) -> list[str]:
        """Draw the lines for a terminal of so many columns and rows."""
        columns, rows = size[0] or 80, size[1] or 24  # Some terminals do not know theirs.
        left, in_flight = max(self._shutdown.grace_ends - now, 0), self.in_flight
        facts = [f"{in_flight:,} in flight", f"{len(self.open) - in_flight:,} idle"]
        facts += [f"{self.outcomes[one]:,} {one.value}" for one in Outcome if self.outcomes[one]]
        if self._shutdown.begun:
            facts.insert(0, "shutting down" + (f", {left:.0f} s left" if left < math.inf else ""))
        title = " · ".join([f"trio_server on {', '.join(urls)}", *facts])
        title = title if len(title) < columns else " · ".join(facts)
        below = [f"! {ascii(text.partition(chr(10))[0])[1:-1]}" for text in self._log.warnings]
        answered = [self._row(one, columns, now) for one in islice(self._answered, rows // 4)]
        below += ["── answered ──", *answered] if answered else []
        room = rows - 1 - len(below)
        fitting = len(self.open) if len(self.open) <= room else max(room - 1, 0)
        lines = [self._row(connection, columns, now) for connection in islice(self.open, fitting)]
        if hidden := len(self.open) - fitting:
            lines.append(f"… and {hidden:,} more")
        return [line[: columns - 1] for line in [title, *lines, *below][:rows]]

    def _row(self, connection: Connection, columns: int, now: float) -> str:
        """Draw one connection: who it is, what it wants, how far it is."""
        wide = max(min(REQUEST, columns - PEER - 4 - TIME), 1)
        request = first_line(connection.request)
        request = request if len(request) <= wide else request[: wide - 1] + "…"
        start = f"{connection.peer:{PEER}}  {request:{wide}}  "
        if connection.received_at is None:
            return f"{start}connected, has sent nothing for {now - connection.accepted_at:.0f} s"
        if connection.replied_at is not None:
            took = f"{start}{connection.replied_at - connection.received_at:.3f} s"
            return took if connection.closed else f"{took}, has not closed yet"
        if connection.started_at is None:
            return f"{start}waits for a permit, {now - connection.received_at:.1f} s"
        worked = now - connection.started_at
        width = max(min(BAR, columns - len(start) - TIME), 0)
        full, half = divmod(int(2 * width * min(worked / self._delay, 1)), 2)
        return f"{start}{('█' * full + '▌' * half).ljust(width, '░')}  {worked:.1f} s"


def frame(lines: list[str]) -> str:
    """Turn lines into what the terminal gets. Each replaces the old one, so nothing flickers."""
    text = "\x1b[H" + "\x1b[K\r\n".join(lines) + "\x1b[J"
    if not os.environ.get("NO_COLOR"):
        text = re.sub("[█▌]+", "\x1b[32m\\g<0>\x1b[m", text)
    return text if locale.getencoding() == "UTF-8" else text.translate(ASCII)
