"""A record of each connection, and the number of connections that ended in each way."""

import logging
import math
from collections import Counter, deque
from dataclasses import dataclass, field
from enum import Enum

import trio

logger: logging.Logger = logging.getLogger("trio_server")


class Outcome(Enum):
    """How a connection ended."""

    ANSWERED = "answered"  # The kernel took the whole reply, and the client sent no reset.
    SENT_NOTHING = "sent nothing"  # The client closed, or a shutdown ended the wait.
    WENT_AWAY = "went away"  # The client reset the connection, perhaps after the reply.
    TIMED_OUT = "timed out"  # The client sent no request in time, or did not read the reply.
    CUT_OFF = "cut off"  # The server was stopped before it had answered.
    FAILED = "failed"  # The responder raised an exception, or did not return bytes.


@dataclass(eq=False, slots=True)
class Exchange:
    """What has happened on one connection so far, with times on Trio's clock in seconds."""

    peer: str  # the address of the client
    request: bytes = b""
    accepted_at: float = field(default_factory=trio.current_time)
    received_at: float = math.nan  # until a request arrives
    outcome: Outcome = Outcome.CUT_OFF  # unless it ends otherwise
    reply_size: int = 0  # bytes, once all of them are sent
    answered_at: float | None = None

    @property
    def in_flight(self) -> bool:
        """Whether there is a request that has not been answered or failed yet."""
        return bool(self.request) and self.outcome is Outcome.CUT_OFF

    @property
    def first_line(self) -> str:
        r"""The first 60 bytes of the first line. Unprintable ones are escaped, as in ``\x1b``."""
        line = self.request.lstrip(b"\r\n").partition(b"\n")[0]
        return ascii(line.rstrip(b"\r")[:60])[2:-1]

    def __str__(self) -> str:
        """Describe the exchange in one line, which the client cannot break into two."""
        took = ""
        if self.answered_at is not None:
            took = f" in {self.answered_at - self.received_at:.3f} s"
        elif self.request:
            took = f" after {trio.current_time() - self.received_at:.3f} s"
        sizes = f"{len(self.request)} bytes in, {self.reply_size} out"
        return f"{self.peer} {self.outcome.value}{took}: {sizes}, {self.first_line}"


class Account:
    """A record of the connections of one server or of several. Pass it to `serve_connection`."""

    def __init__(self) -> None:
        self.open: dict[Exchange, None] = {}  # an ordered set, oldest first
        self.ended: deque[Exchange] = deque(maxlen=50)  # the last 50, oldest first
        self.outcomes: Counter[Outcome] = Counter()  # how many exchanges ended in each way

    @property
    def in_flight(self) -> int:
        """How many requests have arrived, but have neither been answered nor failed."""
        return sum(exchange.in_flight for exchange in self.open)

    def begin(self, peer: str) -> Exchange:
        """Record a new connection."""
        exchange = Exchange(peer)
        self.open[exchange] = None
        return exchange

    def end(self, exchange: Exchange) -> None:
        """Count a connection that has ended, and log a line about it."""
        del self.open[exchange]
        self.ended.append(exchange)
        self.outcomes[exchange.outcome] += 1
        # Health checks, port scans and a browser's spare connections send nothing.
        level = logging.INFO if exchange.request else logging.DEBUG
        if logger.isEnabledFor(level):
            logger.log(level, "%s", str(exchange))  # `str` reads Trio's clock, so call it now.

    def totals(self) -> str:
        """Return the number of exchanges that have ended with each outcome, as text."""
        return ", ".join(f"{self.outcomes[outcome]} {outcome.value}" for outcome in Outcome)
