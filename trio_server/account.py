"""The books of a server: a record of each connection, and how many ended in which way."""

import logging
import math
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from enum import Enum

import trio

SHOWN = 60  # bytes of a request's first line that the log shows

logger: logging.Logger = logging.getLogger("trio_server")


class Outcome(Enum):
    """How a connection ended."""

    ANSWERED = "answered"  # The kernel accepted the whole reply, and the client did not reset.
    SENT_NOTHING = "sent nothing"  # The client closed, or a shutdown ended the wait for it.
    WENT_AWAY = "went away"  # The client reset the connection, perhaps after the reply.
    TIMED_OUT = "timed out"  # The client sent no request in time, or did not read the reply.
    CUT_OFF = "cut off"  # The server was stopped before it had answered.
    FAILED = "failed"  # The responder raised an exception, or did not return bytes.


@dataclass(eq=False, slots=True)
class Exchange:
    """What has happened on one connection so far, with times on Trio's clock in seconds."""

    peer: str  # the address of the client
    request: bytes = b""
    outcome: Outcome = Outcome.CUT_OFF  # until the exchange earns a better one
    reply_size: int = 0  # bytes, once all of them were sent
    accepted_at: float = field(default_factory=trio.current_time)
    received_at: float = math.nan  # until a request arrives
    answered_at: float | None = None
    ended_at: float = math.nan  # while the connection is open

    @property
    def in_flight(self) -> bool:
        """Whether there is a request that is neither answered nor failed yet."""
        return bool(self.request) and self.outcome is Outcome.CUT_OFF

    @property
    def first_line(self) -> str:
        r"""The start of the request. Unprintable bytes are escaped, as in ``\x1b``."""
        line = self.request.lstrip(b"\r\n").partition(b"\n")[0]
        return ascii(line.rstrip(b"\r")[:SHOWN])[2:-1]

    def received(self, request: bytes) -> None:
        """Note what was received: a request, or nothing if the client has closed."""
        self.request, self.received_at = request, trio.current_time()

    def answered(self, reply_size: int) -> None:
        """Note that the whole reply was sent."""
        self.outcome, self.reply_size = Outcome.ANSWERED, reply_size
        self.answered_at = trio.current_time()

    def __str__(self) -> str:
        """Describe the exchange in one line, which the client cannot break into two."""
        took = ""
        if self.answered_at is not None:
            took = f" in {self.answered_at - self.received_at:.3f} s"
        elif self.request:
            took = f" after {self.ended_at - self.received_at:.3f} s"
        return (
            f"{self.peer} {self.outcome.value}{took}: {len(self.request)} bytes in, "
            f"{self.reply_size} out, {self.first_line}"
        )


class Account:
    """The connections of one server, or of several. Pass it to `serve_connection`.

    Attributes:
        open: The exchanges that go on now, oldest first. (A dictionary keeps their order; its
            values mean nothing.)
        ended: The last 50 exchanges that have ended, oldest first.
        outcomes: How many exchanges have ended with each `Outcome`.
        since: When the count began, in seconds since the epoch.
    """

    def __init__(self) -> None:
        self.open: dict[Exchange, None] = {}
        self.ended: deque[Exchange] = deque(maxlen=50)
        self.outcomes: Counter[Outcome] = Counter()
        self.since: float = time.time()

    @property
    def in_flight(self) -> int:
        """How many requests were received and are not answered yet."""
        return sum(exchange.in_flight for exchange in self.open)

    def begin(self, peer: str) -> Exchange:
        """Record a new connection."""
        exchange = Exchange(peer)
        self.open[exchange] = None
        return exchange

    def end(self, exchange: Exchange) -> None:
        """Count a connection that has ended, and log a line about it."""
        exchange.ended_at = trio.current_time()
        del self.open[exchange]
        self.ended.append(exchange)
        self.outcomes[exchange.outcome] += 1
        # Health checks, port scans and a browser's spare connections send nothing.
        logger.log(logging.INFO if exchange.request else logging.DEBUG, "%s", exchange)

    def totals(self) -> str:
        """Return the number of exchanges that have ended with each outcome, as text."""
        return ", ".join(f"{self.outcomes[outcome]} {outcome.value}" for outcome in Outcome)
