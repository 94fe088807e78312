"""The live view (``--watch``): a task that draws the connections ten times a second."""

import locale
import logging
import os
import re
import shutil
from functools import partial
from logging.handlers import MemoryHandler

import trio

from trio_server.account import Account, Exchange, Outcome
from trio_server.command.log import BUFFER_SIZE, GATHERING_TIME, LAST_SECOND, write_all
from trio_server.shutdown import Shutdown

ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"  # alternate screen, without a cursor
ASCII = str.maketrans("█▌░·─…", "#=.|-~")  # for a locale without these


class View:
    """The view of a server in the terminal."""

    def __init__(self, account: Account, shutdown: Shutdown, delay: float, url: str) -> None:
        self.account = account
        self.shutdown = shutdown
        self.delay = delay
        self.url = url
        self.warnings: MemoryHandler = MemoryHandler(BUFFER_SIZE, logging.CRITICAL + 1)
        self.warnings.setLevel(logging.WARNING)

    async def show(self) -> None:
        """Draw until cancelled, then restore the terminal, and log the warnings again."""
        one = trio.CapacityLimiter(1)  # The writes keep their order, even if one is abandoned.
        in_thread = partial(trio.to_thread.run_sync, abandon_on_cancel=True, limiter=one)
        log, shared = logging.root.handlers, os.path.sameopenfile(1, 2)  # noqa: ASYNC240
        self.warnings.setTarget(log[0] if shared else logging.NullHandler())
        logging.root.handlers = [self.warnings, *([] if shared else log)]
        try:
            await trio.sleep(2 * GATHERING_TIME if shared else 0)  # until older lines are written
            try:
                await in_thread(write_all, 1, ENTER)
                while True:
                    text = frame(self.draw(*shutil.get_terminal_size(), trio.current_time()))
                    await in_thread(write_all, 1, text)  # No lock: drawing has no checkpoint.
                    await trio.sleep(0.1)
            finally:
                with trio.CancelScope(deadline=trio.current_time() + LAST_SECOND, shield=True):
                    await in_thread(write_all, 1, LEAVE)
        except Exception:
            logging.getLogger("trio_server").exception("the view failed; the server keeps running")
        finally:
            logging.root.handlers = log
            self.warnings.close()

    def draw(self, columns: int, rows: int, now: float) -> list[str]:
        """Return the lines for a terminal of this size."""
        exchanges, in_flight = list(self.account.open), self.account.in_flight
        facts = [f"{in_flight:,} in flight", f"{len(exchanges) - in_flight:,} idle"]
        facts += [f"{n:,} {one.value}" for one in Outcome if (n := self.account.outcomes[one])]
        if self.shutdown.begun:
            facts.insert(0, f"shutting down, {max(self.shutdown.grace_ends - now, 0):.0f} s left")
        title = " · ".join([f"trio_server on {self.url}", *facts])
        answered = [one for one in reversed(self.account.ended) if one.outcome is Outcome.ANSWERED]
        below = ["── answered ──"] if answered else []
        below += [self.row(one, columns, now) for one in answered[: rows // 4]]
        below += [f"! {ascii(one.getMessage())[1:-1]}" for one in self.warnings.buffer[-3:]]
        room = max(rows - 2 - len(below), 0)
        lines = [title if len(title) < columns else " · ".join(facts)]
        lines += [self.row(one, columns, now) for one in exchanges[:room]]
        if len(exchanges) > room:
            lines.append(f"… and {len(exchanges) - room:,} more")
        return [line[: columns - 1] for line in [*lines, *below][:rows]]

    def row(self, exchange: Exchange, columns: int, now: float) -> str:
        """Return the line for one exchange: its client, its request, how far it has got."""
        width = max(min(16, columns - 35), 1)  # In a narrow terminal, request and bar shrink.
        start = f"{exchange.peer:21}  {exchange.first_line:{width}.{width}}  "
        if not exchange.request:
            return f"{start}connected, has sent nothing for {now - exchange.accepted_at:.0f} s"
        if exchange.answered_at is not None:
            return f"{start}{exchange.answered_at - exchange.received_at:.3f} s"
        worked, length = now - exchange.received_at, max(min(20, columns - len(start) - 10), 0)
        full, half = divmod(int(2 * length * min(worked / max(self.delay, 0.001), 1)), 2)
        return f"{start}{('█' * full + '▌' * half).ljust(length, '░')}  {worked:.1f} s"


def frame(lines: list[str]) -> str:
    """Return what the terminal gets. Each line replaces the old one, so nothing flickers."""
    text = "\x1b[H" + "\x1b[K\r\n".join(lines) + "\x1b[J"
    text = text if os.environ.get("NO_COLOR") else re.sub("[█▌]+", "\x1b[32m\\g<0>\x1b[m", text)
    return text if locale.getencoding() == "UTF-8" else text.translate(ASCII)
