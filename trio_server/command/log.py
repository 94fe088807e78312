"""The log on stderr, which never delays the server.

A reader of stderr may stop reading: a pager, Ctrl-S, a log driver that hangs. A plain handler
then blocks at its next line, and the whole server with it. Here a line goes into a buffer, and
only one thread waits for the reader.
"""

import logging
import os
import select
import sys
import threading
import time
from collections import deque
from contextlib import suppress

import trio

BUFFER_SIZE = 10_000  # lines, about a megabyte; a few seconds of a busy server
GATHERING_TIME = 0.1  # seconds, too short to notice; lines that come meanwhile share a write
LAST_SECOND = 1.0  # seconds for the last lines, when the process ends

PRIORITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}  # syslog(3)

logger: logging.Logger = logging.getLogger("trio_server")


class Log(logging.Handler):
    """Writes lines to stderr in a thread of its own.

    Lines that do not fit into the buffer are dropped, and their number is logged once the reader
    goes on. If no thread can be started, a line is written at once, or dropped.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[str] = deque()
        self._dropped = 0
        self._ready = threading.Event()  # There are lines to write.
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        with suppress(RuntimeError):  # The limit of processes is reached.
            self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Put a record into the buffer, or drop it."""
        line = self.format(record) + "\n"
        if not self._thread.is_alive():
            if select.select((), (2,), (), 0)[1]:  # The reader reads.
                write_all(2, line)
        elif len(self._lines) < BUFFER_SIZE:
            self._lines.append(line)
            if not self._ready.is_set():
                self._ready.set()
        else:
            self._dropped += 1

    def close(self) -> None:
        """Write what is left, for a second at most. The process is about to end."""
        if self._thread.is_alive() and not self._ending.is_set():
            self._ending.set()
            self._ready.set()
            self._thread.join(LAST_SECOND)
        super().close()

    def _run(self) -> None:
        while self._lines or not self._ending.is_set():
            self._ready.wait()
            self._ending.wait(GATHERING_TIME)
            self._ready.clear()
            write_all(2, "".join(self._lines.popleft() for _ in range(len(self._lines))))
            self.acquire()  # so that no line takes the place of the message
            if self._dropped and len(self._lines) < BUFFER_SIZE:
                number, self._dropped = self._dropped, 0
                logger.warning("%d lines of this log were dropped: nothing read them", number)
            self.release()


def write_all(descriptor: int, text: str) -> None:
    """Write text to a descriptor. A full disk, or a reader that has gone, is no error."""
    data = text.encode(errors="backslashreplace")
    # Not through Python's file object: its lock would block the exit if this thread is stuck.
    with suppress(OSError):
        while data:
            try:
                data = data[os.write(descriptor, data) :]
            except BlockingIOError:  # Another program has made the descriptor non-blocking.
                select.select((), (descriptor,), ())


async def write_stdout(text: str, limiter: trio.CapacityLimiter | None = None) -> None:
    """Write to stdout in a thread, which is abandoned if the reader has stopped reading.

    With a ``CapacityLimiter(1)`` the writes stay in order, even after one was abandoned.
    """
    if sys.stdout is None:  # It was closed from the start: descriptor 1 may be another file.
        return
    try:
        await trio.to_thread.run_sync(write_all, 1, text, abandon_on_cancel=True, limiter=limiter)
    except RuntimeError:  # No thread can be started.
        write_all(1, text)


class TimeFormatter(logging.Formatter):
    """Formats the time of a line once a second."""

    _second, _text = 0, ""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        """Return the time of a record."""
        if int(record.created) != self._second:
            self._second = int(record.created)
            self._text = super().formatTime(record, datefmt)
        return self._text


class JournalFormatter(logging.Formatter):
    """Starts each line with its priority, as the journal expects it (sd-daemon(3))."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record, perhaps with a traceback, as lines."""
        prefix = f"<{PRIORITIES.get(record.levelname, 6)}>"
        return "\n".join(prefix + line for line in super().format(record).splitlines())


class OncePerSecond(logging.Filter):
    """Passes one record a second, without its traceback.

    At the limit of open files Trio logs ten failed `accept`s a second for each listener.
    """

    _next = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log this record."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + 1
        record.exc_info = None
        return True


def set_up_logging(level: str) -> logging.Handler:
    """Log to stderr from a level on. Return the handler, which has to be closed at the end."""
    log = logging.NullHandler() if sys.stderr is None else Log()
    if _stderr_is_the_journal():
        log.setFormatter(JournalFormatter())  # The journal adds the time.
    else:
        text, times = "%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"
        log.setFormatter(TimeFormatter(text, times))
    logging.basicConfig(handlers=[log], level=level.upper())
    logging.getLogger("trio.serve_listeners").addFilter(OncePerSecond())
    return log


def _stderr_is_the_journal() -> bool:
    """Return whether systemd has connected stderr to the journal (systemd.exec(5))."""
    try:
        stderr = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"
