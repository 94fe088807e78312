"""An account of connections: which are open, how the others ended, and a line about each."""

import codecs
import logging
import re
import time
from collections import Counter
from enum import Enum
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from trio_server.connection import Connection

SHOWN = 60  # characters of a request that the log shows

codecs.lookup("unicode_escape")  # Later there may be no open file left to import it with.

logger: logging.Logger = logging.getLogger("trio_server")


class Outcome(Enum):
    """How a connection ended."""

    ANSWERED = "answered"  # the whole reply was handed to the network
    SENT_NOTHING = "sent nothing"  # the client closed, or a shutdown ended the wait for it
    WENT_AWAY = "went away"  # the client reset the connection, perhaps after its reply
    TIMED_OUT = "timed out"  # the client sent no request in its time, or did not take the reply
    CUT_OFF = "cut off"  # the server was stopped before the request was answered
    FAILED = "failed"  # the responder raised an exception, or returned no bytes


class Connections:
    """The connections of a server, or of several: pass it to `serve_connection`.

    Attributes:
        open: The open connections, oldest first. (A dictionary keeps its order; its values are
            of no use.)
        outcomes: How many have ended with each outcome.
        since: When the count began, in seconds since the epoch.
    """

    def __init__(self) -> None:
        self.open: dict[Connection, None] = {}
        self.outcomes: Counter[Outcome] = Counter()
        self.since: float = time.time()

    @property
    def in_flight(self) -> int:
        """How many requests were received whose reply has not been sent yet."""
        return sum(connection.in_flight for connection in self.open)

    def begin(self, connection: "Connection") -> None:
        """Add a connection."""
        self.open[connection] = None
        logger.debug("%s connected", connection.peer)

    def end(self, connection: "Connection") -> None:
        """Count a connection that has ended, and log a line about it."""
        del self.open[connection]
        self.outcomes[connection.outcome] += 1
        # Health checks, port scans and a browser's spare connections send nothing.
        level = logging.INFO if connection.bytes_in else logging.DEBUG
        if logger.isEnabledFor(level):
            logger.log(level, "%s", describe(connection))

    def totals(self) -> str:
        """Write how many have ended with each outcome."""
        return ", ".join(f"{self.outcomes[outcome]} {outcome.value}" for outcome in Outcome)

    def status(self) -> str:
        """Write what is going on now, and how connections have ended so far."""
        ages = [
            trio.current_time() - connection.received_at
            for connection in self.open
            if connection.in_flight and connection.received_at is not None
        ]
        waiting = sum(one.in_flight and one.started_at is None for one in self.open)
        oldest = (
            f" (the oldest for {max(ages):.1f} s, {waiting} wait for a permit)" if ages else ""
        )
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return (
            f"{len(self.open)} open, {len(ages)} in flight{oldest}; since {since}: {self.totals()}"
        )


def describe(connection: "Connection") -> str:
    """Write how a connection ended, in one line: a client cannot forge a second one."""
    took = ""
    if connection.received_at is not None:
        preposition = "in" if connection.outcome is Outcome.ANSWERED else "after"
        end = trio.current_time() if connection.replied_at is None else connection.replied_at
        took = f" {preposition} {end - connection.received_at:.3f} s"
    shown = first_line(connection.request)
    return (
        f"{connection.peer} {connection.outcome.value}{took}: {connection.bytes_in} bytes in, "
        f"{connection.bytes_out} out{shown and ', '}{shown}"
    )


def first_line(request: bytes) -> str:
    r"""Write the first line of a request, escaped so that it is harmless: ``\x1b``, ``\"``."""
    line = request.lstrip(b"\r\n").partition(b"\n")[0].rstrip(b"\r")[:SHOWN]
    escaped = line.decode("latin-1").encode("unicode_escape").decode()
    return re.sub(r"""["']""", r"\\\g<0>", escaped)[:SHOWN]
