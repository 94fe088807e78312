"""An account of connections: which are open, and what came of the others."""

import logging
from collections import Counter
from enum import Enum
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from trio_server.connection import Connection

logger: logging.Logger = logging.getLogger("trio_server")


class Outcome(Enum):
    """What came of a connection."""

    ANSWERED = "answered"  # the whole reply was handed to the network
    SENT_NOTHING = "sent nothing"  # the client closed, or a shutdown ended the wait for it
    WENT_AWAY = "went away"  # the client broke the connection off
    TIMED_OUT = "timed out"  # the client sent no request in its time, or did not take the reply
    CUT_OFF = "cut off"  # the server was stopped before the request was answered
    FAILED = "failed"  # the responder raised an exception, or returned no bytes


class Connections:
    """The connections of a server, or of several: pass it to `serve_connection`.

    Attributes:
        open: Those that are open.
        outcomes: How many have ended, by what came of them.
    """

    def __init__(self) -> None:
        self.open: set[Connection] = set()
        self.outcomes: Counter[Outcome] = Counter()

    @property
    def in_flight(self) -> int:
        """How many requests were received whose reply has not been sent yet."""
        return sum(connection.in_flight for connection in self.open)

    def end(self, connection: "Connection") -> None:
        """Count a connection that has ended, and log one line about it."""
        self.open.discard(connection)
        self.outcomes[connection.outcome] += 1
        now = trio.current_time()
        logger.info(
            "%s %s: %d bytes in, %d bytes out, %.3f s",
            connection.peer,
            connection.outcome.value,
            connection.bytes_in,
            connection.bytes_out,
            (connection.replied_at or now) - (connection.received_at or now),
        )
