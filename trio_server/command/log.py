"""The log of the command, which never makes anybody wait.

A reader of stderr may stop reading: a pager, Ctrl-S, a log driver that is held up. A plain
handler then blocks at its next line, and with it the whole server. So here a line goes into a
buffer, a task empties that, and only one of Trio's worker threads ever waits for the reader.
"""

import logging
import os
import select
import sys
import termios
import time
from collections import deque
from contextlib import suppress
from typing import TextIO

import trio

BUFFER_SIZE = 10_000  # lines, about a megabyte; a few seconds of a server that is busy
HELD_SIZE = 100  # lines, while they cannot be written: what a person still reads afterwards
INTERVAL = 0.1  # seconds between two writes: too short to notice, enough to write lines together
LAST_SECOND = 1.0  # seconds that the last lines get, when the server has stopped

PRIORITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}  # syslog(3)


class Log(logging.Handler):
    """Writes the log to stderr, as long as somebody reads it.

    Lines that do not fit into the buffer are dropped and counted. The count is logged as soon as
    there is room.
    """

    def __init__(self) -> None:
        super().__init__()
        # While another task draws there, warnings wait, and the rest is dropped.
        self.held: bool = False
        self.warnings: deque[str] = deque(maxlen=3)  # the last ones
        self._lines: list[str] = []
        self._dropped = 0
        self._ended = trio.Event()
        self._scope = trio.CancelScope()

    def emit(self, record: logging.LogRecord) -> None:
        """Put a record into the buffer."""
        warns = record.levelno >= logging.WARNING
        if self.held and not warns:
            return
        is_full = len(self._lines) >= (HELD_SIZE if self.held else BUFFER_SIZE)
        self._dropped += is_full
        if is_full and not warns:
            return
        try:
            line = self.format(record)
            if not is_full:
                self._lines.append(line)
            if warns:
                self.warnings.append(line)
        except Exception:  # noqa: BLE001 - as each handler of the standard library does it
            self.handleError(record)

    def say(self, text: str, level: str = "INFO") -> None:
        """Log a line, whatever the log level is and however full the buffer."""
        self._lines.append(self.format(logging.makeLogRecord({"msg": text, "levelname": level})))

    def fail(self, sentence: str) -> None:
        """Write the sentence that says why the process ends: for a person, so without a time."""
        in_journal = isinstance(self.formatter, JournalFormatter)
        self._lines.append(f"<{PRIORITIES['ERROR']}>{sentence}" if in_journal else sentence)

    async def run(self) -> None:
        """Write what gathers in the buffer, until `end`."""
        with self._scope:
            while self._lines or not self._ended.is_set():
                with trio.move_on_after(INTERVAL):
                    await self._ended.wait()
                if self.held:
                    continue
                text = "".join(f"{line}\n" for line in self._lines)
                self._lines.clear()
                if self._dropped:
                    self.say(f"{self._dropped} lines of this log were dropped", "WARNING")
                    self._dropped = 0
                if text:
                    await write(sys.stderr, text)

    def end(self) -> None:
        """Write what is left within a second, then let `run` return."""
        self.held = False
        self._ended.set()
        self._scope.deadline = trio.current_time() + LAST_SECOND


async def write(
    file: TextIO | None, text: str, limiter: trio.CapacityLimiter | None = None
) -> None:
    """Write to stdout or stderr, in a thread that may be left behind if nobody reads.

    Nobody there, or a disk that is full, is no reason to stop serving.

    Args:
        file: `sys.stdout` or `sys.stderr`: None if it was closed from the start. Then its
            descriptor may be another file by now.
        text: What to write.
        limiter: With one of 1, what is written waits for what was abandoned before it.
    """
    if file is not None:
        data = text.encode(errors="backslashreplace")
        with suppress(RuntimeError):  # no thread can be started
            await trio.to_thread.run_sync(
                _write, file.fileno(), data, abandon_on_cancel=True, limiter=limiter
            )


def resume() -> None:
    """Undo a Ctrl-S in the terminal, so that what is written last arrives (tcflow(3))."""
    with suppress(termios.error, OSError):
        if os.tcgetpgrp(1) != os.getpgrp():
            return  # The terminal is the shell's.
        termios.tcflow(1, termios.TCOOFF)  # Without this, TCOON undoes no Ctrl-S.
        termios.tcflow(1, termios.TCOON)


def _write(descriptor: int, data: bytes) -> None:
    # Not through Python's file object, whose lock a thread that is stuck would keep at the exit.
    with suppress(OSError):
        while data:
            try:
                data = data[os.write(descriptor, data) :]
            except BlockingIOError:  # Somebody else has made it non-blocking.
                select.select((), (descriptor,), ())


class JournalFormatter(logging.Formatter):
    """Puts the priority before each line, as the journal wants it (sd-daemon(3))."""

    def format(self, record: logging.LogRecord) -> str:
        """Write a record, perhaps with a traceback, in lines."""
        prefix = f"<{PRIORITIES.get(record.levelname, 6)}>"
        return "\n".join(prefix + line for line in super().format(record).splitlines())


class OncePerSecond(logging.Filter):
    """Lets one record a second pass, without its traceback.

    At the limit of open files Trio logs every failed `accept`, ten times a second for each
    listener.
    """

    _next = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        """Decide on a record."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + 1
        record.exc_info = None
        return True


def set_up_logging(level: str) -> Log:
    """Log from a level on; return the handler, whose `run` has to be running."""
    log = Log()
    if _stderr_is_the_journal():
        log.setFormatter(JournalFormatter())  # The journal knows the time.
    else:
        text, times = "%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"
        log.setFormatter(logging.Formatter(text, times))
    logging.basicConfig(handlers=[log], level=level.upper())
    logging.getLogger("trio.serve_listeners").addFilter(OncePerSecond())
    return log


def _stderr_is_the_journal() -> bool:
    """Tell whether stderr is what systemd has connected to the journal (systemd.exec(5))."""
    try:
        stderr = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"
