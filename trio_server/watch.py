"""The live view (``--watch``): what goes on, drawn in the terminal ten times a second.

It is one more task beside those of the clients, and reads their state without a lock. No other
task runs before its next `await`, so all that it draws belongs to one moment.
"""

import locale
import logging
import math
import os
import re
import signal
import sys
from collections import deque
from contextlib import suppress
from itertools import islice
from logging.handlers import BufferingHandler

import trio

from trio_server.account import Connections, Outcome, first_line
from trio_server.connection import Connection
from trio_server.log import LAST_SECOND, write
from trio_server.shutdown import Shutdown

INTERVAL = 0.1  # seconds between two looks
PEER, REQUEST, BAR, SECONDS = 21, 16, 20, 10  # columns; a narrow terminal gets a shorter bar
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # the other screen, without a cursor
ASCII = str.maketrans("█▌░·─…", "#=.|-~")  # for a locale without these


class View(Connections):
    """Connections that show themselves: the open ones, and those that were answered last."""

    def __init__(self, shutdown: Shutdown, delay: float) -> None:
        super().__init__()
        self._shutdown, self._delay = shutdown, max(delay, 1e-9)  # It divides.
        self._answered: deque[Connection] = deque(maxlen=50)  # more than are shown
        self._warnings = BufferingHandler(100)

    def end(self, connection: Connection) -> None:
        """Count a connection that has ended; remember it if it was answered."""
        super().end(connection)
        if connection.outcome is Outcome.ANSWERED:
            self._answered.appendleft(connection)

    async def show(self, urls: list[str]) -> None:
        """Show the view until cancelled, then leave the terminal as it was."""
        self._warnings.setLevel(logging.WARNING)
        if os.isatty(2) and os.ttyname(2) == os.ttyname(1):
            for log in logging.root.handlers:
                log.setLevel(logging.CRITICAL + 1)  # It would be drawn over.
        logging.root.addHandler(self._warnings)
        while True:
            with trio.open_signal_receiver(signal.SIGTSTP) as suspensions:
                try:
                    await write(sys.stdout, ENTER)
                    size, suspended = os.terminal_size((80, 24)), False
                    while not suspended:
                        with suppress(OSError):  # The terminal is gone: SIGHUP ends it all soon.
                            size = os.get_terminal_size(1)
                        lines = self.draw(urls, size, trio.current_time())
                        await write(sys.stdout, frame(lines))
                        with trio.move_on_after(INTERVAL):
                            suspended = bool(await anext(suspensions))
                finally:  # A terminal that is held (Ctrl-S) does not hold the end up.
                    with trio.move_on_after(LAST_SECOND, shield=True):
                        await write(sys.stdout, LEAVE)
            signal.raise_signal(signal.SIGTSTP)  # Ctrl-Z: the process stops here, until `fg`.

    def draw(self, urls: list[str], size: tuple[int, int], now: float) -> list[str]:
        """Draw the lines for a terminal of so many columns and rows."""
        columns, rows = size[0] or 80, size[1] or 24  # Some terminals do not know theirs.
        facts = [f"trio_server on {', '.join(urls)}"]
        if self._shutdown.begun:
            left = self._shutdown.grace_ends - now
            facts.append("shutting down" + (f", {left:.0f} s left" if left < math.inf else ""))
        facts += [f"{self.in_flight:,} in flight", f"{len(self.open) - self.in_flight:,} idle"]
        facts += [f"{self.outcomes[one]:,} {one.value}" for one in Outcome if self.outcomes[one]]

        warnings = [record.getMessage() for record in self._warnings.buffer[-3:]]
        below = [f"! {text.encode('unicode_escape').decode()}" for text in warnings]
        answered = [*islice(self._answered, rows // 4)]
        below += ["── answered ──"] * bool(answered) + [
            self._row(o, columns, now) for o in answered
        ]
        room = max(rows - 1 - len(below), 0)
        fitting = len(self.open) if len(self.open) <= room else max(room - 1, 0)
        lines = [self._row(connection, columns, now) for connection in islice(self.open, fitting)]
        if hidden := len(self.open) - fitting:
            lines.append(f"… and {hidden:,} more")
        return [line[: columns - 1] for line in [" · ".join(facts), *lines, *below][:rows]]

    def _row(self, connection: Connection, columns: int, now: float) -> str:
        """Draw one connection: who it is, what it wants, how far it is."""
        request = first_line(connection.request)
        request = request if len(request) <= REQUEST else request[: REQUEST - 1] + "…"
        start = f"{connection.peer:{PEER}}  {request:{REQUEST}}  "
        if connection.received_at is None:
            return f"{start}connected, has sent nothing for {now - connection.accepted_at:.0f} s"
        if connection.replied_at is not None:
            took = f"{start}{connection.replied_at - connection.received_at:.3f} s"
            return took if connection.closed else f"{took}, has not closed yet"
        if connection.started_at is None:
            return f"{start}waits for a permit, {now - connection.received_at:.1f} s"
        worked = now - connection.started_at
        width = max(min(BAR, columns - len(start) - SECONDS), 0)
        full, half = divmod(int(2 * width * min(worked / self._delay, 1)), 2)
        return f"{start}{('█' * full + '▌' * half).ljust(width, '░')}  {worked:.1f} s"


def frame(lines: list[str]) -> str:
    """Turn lines into what the terminal gets. Each replaces the old one, so nothing flickers."""
    text = "\x1b[H" + "\x1b[K\r\n".join(lines) + "\x1b[J"
    if "NO_COLOR" not in os.environ:
        text = re.sub("[█▌]+", "\x1b[32m\\g<0>\x1b[m", text)
    return text if locale.getencoding() == "UTF-8" else text.translate(ASCII)
