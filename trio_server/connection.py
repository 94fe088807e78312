"""The life of one connection: receive a request, respond, send the reply, close in stages."""

import logging
import math
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import TypeAlias

import trio

Responder: TypeAlias = Callable[[bytes], Awaitable[bytes]]
"""The work of a server: an async function that takes the request bytes and returns the
reply bytes. It may raise: the exception is logged and ends that one connection."""

REQUEST_SIZE = 1024
"""Bytes of a request that are read, at most. Anything after them is discarded."""

CLIENT_TIMEOUT = 30.0
"""Seconds to wait for a client whenever something depends on it. Slow networks need a few
seconds; a client that is gone without a trace should not be remembered for minutes."""

CLOSING_TIME = 1.0
"""Seconds that a connection with nothing in flight gets once the server shuts down: time
for a request that is on its way, too short for an idle client to hold the server up."""

logger: logging.Logger = logging.getLogger("trio_server")


class Outcome(Enum):
    """What came of a connection."""

    ANSWERED = "answered"
    """The whole reply was handed to the network."""
    SENT_NOTHING = "sent nothing"
    """The client closed, or the server was stopped, before a first byte was read from it."""
    WENT_AWAY = "went away"
    """The client broke the connection off before it had its reply."""
    TIMED_OUT = "timed out"
    """The client kept the server waiting for too long."""
    CUT_OFF = "cut off"
    """The server was stopped before the request was answered."""
    FAILED = "failed"
    """The responder raised an exception, or returned something other than bytes."""


async def serve_connection(
    stream: trio.abc.HalfCloseableStream,
    respond: Responder,
    *,
    client_timeout: float = CLIENT_TIMEOUT,
) -> Outcome:
    """Serve one client on any Trio stream that can be closed in one direction.

    That is a TCP connection as well as one end of `trio.testing.memory_stream_pair`.

    Args:
        stream: The connection. It is closed in the end, whatever happens.
        respond: Turns the request into the reply.
        client_timeout: Seconds to wait for the client, each time something depends on it: its
            first bytes, taking the reply, closing. Responding has no time limit.

    Returns:
        What came of it. Nothing that the client does, and no `Exception` from the responder,
        leaves this function.

    Raises:
        trio.Cancelled: When cancelled from outside.
    """
    try:
        return await Connection(stream, respond, client_timeout=client_timeout).serve()
    finally:
        await trio.aclose_forcefully(stream)


class Connection:
    """One client: how far it has come, and the time it has left.

    Args:
        stream: The connection.
        respond: Turns the request into the reply.
        client_timeout: Seconds to wait for the client, each time something depends on it.
        turns: Limits how many connections are served at once, when they share it. The others
            wait, in order of arrival; their client's time starts when their turn comes.
        peer: Who the client is, for the log.

    Attributes:
        outcome: What came of the connection; until it has ended, what would come of it if
            it ended now.
        bytes_in: Bytes received, those discarded after the request included.
        bytes_out: Bytes of the reply, once all of it was sent; 0 until then.
    """

    def __init__(
        self,
        stream: trio.abc.HalfCloseableStream,
        respond: Responder,
        *,
        client_timeout: float = CLIENT_TIMEOUT,
        turns: trio.CapacityLimiter | None = None,
        peer: str = "client",
    ) -> None:
        self._stream = stream
        self._respond = respond
        self._client_timeout = client_timeout
        self._idle_timeout = client_timeout
        self._turns = turns
        self._has_turn = False
        self._request = b""
        # A cancel scope ends the code inside it when its deadline passes. One scope serves
        # all the time-outs of the connection: each stage moves the deadline.
        # The first starts now, or when the client's turn comes.
        now = trio.current_time()
        self._scope = trio.CancelScope(
            deadline=now + client_timeout if turns is None else math.inf
        )
        self.peer: str = peer
        self.outcome: Outcome = Outcome.SENT_NOTHING
        self.bytes_in: int = 0
        self.bytes_out: int = 0

    @property
    def in_flight(self) -> bool:
        """Whether a request was received that still waits for its reply."""
        return self.outcome is Outcome.CUT_OFF

    async def serve(
        self,
        *,
        lull: Callable[[], Awaitable[object]] = trio.lowlevel.checkpoint,
        ended: Callable[["Connection"], None] = lambda _: None,
    ) -> Outcome:
        """Serve the client until nothing is left to do but to close, and log one line at INFO.

        Closing is left to whoever opened the stream (`trio.serve_listeners` does it).

        Args:
            lull: Awaited when the client has its reply; by default, a turn of the other tasks.
            ended: Called with the connection when `outcome` is final, cancelled or not.

        Returns:
            What came of it.

        Raises:
            trio.Cancelled: When cancelled from outside. `outcome` then tells whether a
                request was cut off.
        """
        started = trio.current_time()
        replied = None
        try:
            # No helper function from the request to the reply, because that is where all the
            # connections wait: each of them would keep the helper's frame in memory.
            with self._scope:
                if self._turns is not None:
                    await self._take_turn(self._turns)
                if not self._request:
                    await self._receive()
                reply = None
                if self._request:
                    try:
                        # What is not bytes fails here, as the responder's failure.
                        reply = memoryview(await self._respond(self._request)).cast("B")
                    except* Exception:
                        # `except*`, because a responder with a nursery of its own can fail
                        # and be cancelled at the same time. Both come in one group then, of
                        # which the failure ends here, and the cancellation goes on.
                        self.outcome = Outcome.FAILED
                        logger.exception("%s: the responder failed", self.peer)
                if reply is not None:
                    await self._reply(reply)
                    replied = trio.current_time()
                    await self._read_to_the_end(lull)
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            # `except*`, because in the line a nursery wraps them.
            self._end_unanswered(Outcome.WENT_AWAY)
        finally:
            if self._has_turn and self._turns is not None:
                self._turns.release()
            if self._scope.cancelled_caught:
                self._end_unanswered(Outcome.TIMED_OUT)
            ended(self)
            logger.info(
                "%s %s: %d bytes in, %d bytes out, %.3f s",
                self.peer,
                self.outcome.value,
                self.bytes_in,
                self.bytes_out,
                (trio.current_time() if replied is None else replied) - started,
            )
        return self.outcome

    async def _take_turn(self, turns: trio.CapacityLimiter) -> None:
        """Wait in line, as long as the client does."""
        async with trio.open_nursery() as line:
            line.start_soon(self._watch_line, line.cancel_scope)
            await turns.acquire()
            self._has_turn = True  # no `await` in between, so no turn gets lost
            line.cancel_scope.cancel()
        if not self._request:
            self._scope.deadline = trio.current_time() + self._idle_timeout

    async def _watch_line(self, line: trio.CancelScope) -> None:
        """Read the request while waiting, for that is how one learns that a client has gone."""
        await self._receive()
        if not self._request:
            line.cancel()  # `serve` meets the same end of file
        else:
            # A reset is an error here, and ends the wait. An end of file is no reason to:
            # a client may close its half after the request, as `nc -N` does.
            self.bytes_in += len(await self._stream.receive_some())

    async def _receive(self) -> None:
        # In-memory streams deliver a bytearray.
        self._request = bytes(await self._stream.receive_some(REQUEST_SIZE))
        if self._request:
            self.bytes_in = len(self._request)
            self.outcome = Outcome.CUT_OFF
            logger.debug("%s sent %d bytes", self.peer, self.bytes_in)
            # From here to the reply it is the server's time that passes, not the client's.
            self._scope.deadline = math.inf

    async def _reply(self, reply: memoryview) -> None:
        self._scope.deadline = trio.current_time() + self._client_timeout
        await self._stream.send_all(reply)
        self.bytes_out = reply.nbytes
        self.outcome = Outcome.ANSWERED
        logger.debug("%s was sent %d bytes, closing", self.peer, self.bytes_out)

    async def _read_to_the_end(self, lull: Callable[[], Awaitable[object]]) -> None:
        """Close in stages (RFC 9112, section 9.6), but for the last one.

        A socket closed with unread input in it makes the kernel send a reset, and the reset can
        overtake the reply and destroy it. So: say that nothing more will come, read what the
        client still sends, then close.
        """
        self._scope.deadline = trio.current_time() + self._idle_timeout
        await self._stream.send_eof()
        # By the end of the lull most clients have closed, and one look is enough; now, the kernel
        # would have to watch the socket until then. What filled `REQUEST_SIZE` has probably more
        # behind it: read that now, or whatever cuts the lull short leaves it unread.
        if self.bytes_in < REQUEST_SIZE:
            await lull()
        while surplus := await self._stream.receive_some():
            self.bytes_in += len(surplus)

    def hurry(self) -> None:
        """Wait for the client no longer than `CLOSING_TIME`, as the server is shutting down.

        A request in flight keeps all its time, to be answered and to be taken by the client;
        only the wait for the client to close gets shorter then.
        """
        self._idle_timeout = min(self._idle_timeout, CLOSING_TIME)
        if not self.in_flight:
            deadline = trio.current_time() + self._idle_timeout
            self._scope.deadline = min(self._scope.deadline, deadline)

    def _end_unanswered(self, outcome: Outcome) -> None:
        """Settle the outcome, unless the reply or the failure has settled it already."""
        if self.outcome not in (Outcome.ANSWERED, Outcome.FAILED):
            self.outcome = outcome
