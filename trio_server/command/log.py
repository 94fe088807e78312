"""The log on stderr, which never delays the server.

A reader of stderr may stop reading: a pager, Ctrl-S, a log driver that hangs. A plain handler
would block at its next line, and the server with it. Here only one thread waits for the reader.
"""

import logging
import os
import select
import sys
import threading
import time
from contextlib import suppress
from functools import lru_cache
from queue import SimpleQueue

BUFFER_SIZE = 10_000  # lines, about a megabyte; a few seconds of a busy server
GATHERING_TIME = 0.1  # seconds, too short to notice; lines that arrive meanwhile share a write
LAST_SECOND = 1.0  # seconds for the last lines, when the process ends
PRIORITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}  # syslog(3)


class Log(logging.Handler):
    """Writes lines to stderr in a thread of its own.

    Lines that do not fit into the buffer are dropped, and their number is logged once the reader
    reads again. If no thread can be started, a line is written at once, or dropped.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lines: SimpleQueue[str] = SimpleQueue()
        self._dropped = 0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        with suppress(RuntimeError):  # The limit on processes is reached.
            self._thread.start()
        stderr = os.fstat(2)  # If that is the journal, this variable says so: systemd.exec(5).
        self._journal = os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as text, with its time or, for the journal, its priority."""
        text = super().format(record)
        if self._journal:
            prefix = f"<{PRIORITIES.get(record.levelname, 6)}>"  # sd-daemon(3)
            return "".join(f"{prefix}{line}\n" for line in text.splitlines())
        return f"{format_time(int(record.created))} {record.levelname} {text}\n"

    def emit(self, record: logging.LogRecord) -> None:
        """Put a record into the buffer, or drop it."""
        if not self._thread.is_alive():
            write_all(2, self.format(record), patience=0)
        elif self._lines.qsize() < BUFFER_SIZE:
            self._lines.put(self.format(record))
        else:
            self._dropped += 1

    def close(self) -> None:
        """Write what is left, for a second at most. The process is about to end."""
        if self._thread.is_alive() and not self._ending.is_set():
            self._ending.set()
            self._lines.put("")  # The thread may be waiting for a line.
            self._thread.join(LAST_SECOND)

    def _run(self) -> None:
        counted = 0
        while not (self._ending.is_set() and self._lines.empty()):
            text = self._lines.get()
            self._ending.wait(GATHERING_TIME)
            write_all(2, text + "".join(self._lines.get() for _ in range(self._lines.qsize())))
            if number := self._dropped - counted:
                counted += number
                text = f"{number} lines of this log were dropped: nothing read them"
                record = logging.makeLogRecord({"msg": text, "levelname": "WARNING"})
                self._lines.put(self.format(record))  # at any level, even if the buffer is full


def write_all(descriptor: int, text: str, patience: float | None = None) -> None:
    """Write text; drop it if nothing reads for ``patience`` seconds, or the disk is full."""
    data = text.encode(errors="backslashreplace")
    # Python's file object is not used: its lock would block the exit if this thread is stuck.
    with suppress(OSError):
        while data and select.select((), (descriptor,), (), patience)[1]:
            with suppress(BlockingIOError):  # Another writer may fill a non-blocking pipe.
                data = data[os.write(descriptor, data) :]


@lru_cache(maxsize=1)
def format_time(second: int) -> str:
    """Return a time as the log shows it. All lines in a second share one call."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))


class OncePerSecond(logging.Filter):
    """Passes one record a second, without a traceback: at the file limit, Trio logs ten."""

    _next = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log this record."""
        record.exc_info = None
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + 1
        return True


def set_up_logging(level: str) -> logging.Handler:
    """Log to stderr from this level up. Return the handler, which must be closed at the end."""
    log = logging.NullHandler() if sys.stderr is None else Log()
    logging.basicConfig(handlers=[log], level=level.upper(), format="%(message)s")
    logging.getLogger("trio.serve_listeners").addFilter(OncePerSecond())
    return log
