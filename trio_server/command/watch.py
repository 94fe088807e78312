"""The live view (``--watch``): draw the connections in the terminal ten times a second.

It is one more task, and reads the records of the connections without a lock: no other task runs
before its next `await`, so all that it draws belongs to one moment.
"""

import itertools
import locale
import logging
import math
import os
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import trio

from trio_server.account import Account, Exchange, Outcome
from trio_server.command.log import LAST_SECOND, write_stdout
from trio_server.shutdown import Shutdown

INTERVAL = 0.1  # seconds between two frames
PEER, REQUEST, BAR, TIME = 21, 16, 20, 10  # columns; in a narrow terminal REQUEST and BAR shrink
ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # the other screen, without a cursor
ASCII = str.maketrans("█▌░·─…", "#=.|-~")  # for a locale without these


class View:
    """What the terminal shows of a server."""

    def __init__(self, account: Account, shutdown: Shutdown, delay: float) -> None:
        self.account: Account = account
        self.shutdown: Shutdown = shutdown
        self.delay: float = max(delay, 1e-9)  # A bar divides by it.
        self.warnings: deque[logging.LogRecord] = deque(maxlen=100)

    async def show(self, urls: list[str]) -> None:
        """Draw until cancelled, then leave the terminal as it was."""
        in_order = trio.CapacityLimiter(1)
        size = os.terminal_size((80, 24))
        with keeping_warnings(self.warnings):
            try:
                await write_stdout(ENTER, in_order)
                while True:
                    with suppress(OSError):  # The terminal is gone.
                        size = os.get_terminal_size(1)
                    lines = self.draw(urls, size, trio.current_time())
                    await write_stdout(frame(lines), in_order)
                    await trio.sleep(INTERVAL)
            except Exception:
                logging.getLogger("trio_server").exception("the view failed; the server goes on")
            finally:
                end = trio.current_time() + LAST_SECOND  # The terminal may be stuck.
                with trio.CancelScope(deadline=end, shield=True):
                    await write_stdout(LEAVE, in_order)

    def draw(self, urls: list[str], size: tuple[int, int], now: float) -> list[str]:
        """Return the lines for a terminal of this many columns and rows."""
        columns, rows = size[0] or 80, size[1] or 24  # Some terminals do not know their size.
        account, exchanges = self.account, list(self.account.open)
        in_flight = account.in_flight
        facts = [f"{in_flight:,} in flight", f"{len(exchanges) - in_flight:,} idle"]
        facts += [f"{n:,} {one.value}" for one in Outcome if (n := account.outcomes[one])]
        if self.shutdown.begun:
            left = max(self.shutdown.grace_ends - now, 0)
            facts.insert(0, "shutting down" + (f", {left:.0f} s left" if left < math.inf else ""))
        title = " · ".join([f"trio_server on {', '.join(urls)}", *facts])
        title = title if len(title) < columns else " · ".join(facts)
        below = [f"! {ascii(one.getMessage())[1:-1]}" for one in list(self.warnings)[-3:]]
        answered = [one for one in reversed(account.ended) if one.outcome is Outcome.ANSWERED]
        if answered:
            below.append("── answered ──")
            below += [self.row(one, columns, now) for one in answered[: rows // 4]]
        room = rows - 1 - len(below)
        shown = exchanges if len(exchanges) <= room else exchanges[: max(room - 1, 0)]
        lines = [self.row(one, columns, now) for one in shown]
        if hidden := len(exchanges) - len(shown):
            lines.append(f"… and {hidden:,} more")
        return [line[: columns - 1] for line in [title, *lines, *below][:rows]]

    def row(self, exchange: Exchange, columns: int, now: float) -> str:
        """Return the line of one exchange: its client, its request, how far it is."""
        wide = max(min(REQUEST, columns - PEER - 4 - TIME), 1)
        request = exchange.first_line
        request = request if len(request) <= wide else request[: wide - 1] + "…"
        start = f"{exchange.peer:{PEER}}  {request:{wide}}  "
        if not exchange.request:
            return f"{start}connected, has sent nothing for {now - exchange.accepted_at:.0f} s"
        if exchange.answered_at is not None:
            took = f"{start}{exchange.answered_at - exchange.received_at:.3f} s"
            return f"{took}, has not closed yet" if exchange in self.account.open else took
        worked = now - exchange.received_at
        width = max(min(BAR, columns - len(start) - TIME), 0)
        full, half = divmod(int(2 * width * min(worked / self.delay, 1)), 2)
        return f"{start}{('█' * full + '▌' * half).ljust(width, '░')}  {worked:.1f} s"


class Keeper(logging.Handler):
    """Appends each warning to a deque."""

    def __init__(self, warnings: deque[logging.LogRecord]) -> None:
        super().__init__(logging.WARNING)
        self.warnings: deque[logging.LogRecord] = warnings

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        self.warnings.append(record)


@contextmanager
def keeping_warnings(warnings: deque[logging.LogRecord]) -> Iterator[None]:
    """Keep the warnings of the log. If it shares the terminal, write it only after the block."""
    root = logging.getLogger()
    same_terminal = os.isatty(2) and os.path.sameopenfile(1, 2)
    silent = root.handlers[:] if same_terminal else []
    root.handlers = [*(one for one in root.handlers if one not in silent), Keeper(warnings)]
    try:
        yield
    finally:
        root.handlers = [*root.handlers[:-1], *silent]
        for handler, record in itertools.product(silent, warnings):
            handler.handle(record)


def frame(lines: list[str]) -> str:
    """Return what the terminal gets. Each line replaces the old one, so nothing flickers."""
    text = "\x1b[H" + "\x1b[K\r\n".join(lines) + "\x1b[J"
    if not os.environ.get("NO_COLOR"):
        text = re.sub("[█▌]+", "\x1b[32m\\g<0>\x1b[m", text)
    return text if locale.getencoding() == "UTF-8" else text.translate(ASCII)
