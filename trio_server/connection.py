"""The life of one connection: receive a request, respond, send the reply, drain."""

import logging
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeAlias

import trio

from trio_server.account import Connections, Outcome
from trio_server.addresses import peer_name
from trio_server.shutdown import Shutdown, check_seconds

Responder: TypeAlias = Callable[[bytes], Awaitable[bytes]]
REQUEST_SIZE = 1024  # bytes; most requests fit. The rest is read after the reply, and dropped
CLIENT_TIMEOUT = 30.0  # seconds; slow networks need a few, and nobody should be held for minutes
LAST_LOOK = 0.005  # seconds; with 0, Trio would cancel the look before it receives
DRAIN_SILENCE = 2.0  # seconds; Apache httpd waits as long for a silent client, nginx 5

logger: logging.Logger = logging.getLogger("trio_server")


async def serve_connection(  # noqa: PLR0913 - keyword-only, each with a default
    stream: trio.abc.Stream,
    respond: Responder,
    *,
    client_timeout: float = CLIENT_TIMEOUT,
    limiter: trio.CapacityLimiter | None = None,
    shutdown: Shutdown | None = None,
    connections: Connections | None = None,
) -> Outcome:
    """Serve one client: receive a request, respond, send the reply, drain, close.

    Args:
        stream: The client, over TCP, TLS or in memory. It is closed in the end.
        respond: Async function that turns the request into the reply, both bytes. The request is
            what one receive returned: 1 to 1,024 bytes, perhaps not all that the client sends.
            It has no time limit. An exception is logged, and ends the connection.
        client_timeout: Seconds to wait for the client to send, to take the reply, to stop sending.
        limiter: Limits how many responders run at once; the next requests wait in order.
        shutdown: Once it begins, it shortens the waits for a client that has nothing in flight.
        connections: Counts the connection.

    Returns:
        What came of it. No exception is raised for anything that the client does.

    Raises:
        ValueError: The client timeout is negative or nan. The stream is left alone then.
    """
    check_seconds("client_timeout", client_timeout)
    shutdown, connections = shutdown or Shutdown(), connections or Connections()
    connection = Connection(peer_name(stream), stream, client_timeout, shutdown, connections)
    async with connection:
        if request := await connection.receive():
            try:
                # A permit covers the work alone, so a silent client keeps none from the others.
                async with limiter or nullcontext():
                    connection.started_at = trio.current_time()
                    reply = memoryview(await respond(request)).cast("B")  # or it is a TypeError
            # A failure and a cancellation may come in one group. The cancellation goes on.
            except* Exception:
                connection.in_flight, connection.outcome = False, Outcome.FAILED
                logger.exception("%s: the responder failed", connection.peer)
            else:
                if await connection.send(reply):
                    await connection.drain()
    return connection.outcome


@dataclass(eq=False, slots=True)
class Connection:
    """One client: what has happened so far, and the stages in which it is waited for."""

    peer: str  # for the log
    stream: trio.abc.Stream
    client_timeout: float
    shutdown: Shutdown
    connections: Connections
    request: bytes = b""
    in_flight: bool = False  # A request was received, and its reply is not sent yet.
    closed: bool = False
    outcome: Outcome = Outcome.SENT_NOTHING  # so far
    bytes_in: int = 0  # with those that were discarded after the request
    bytes_out: int = 0  # of the reply, once all of it was sent
    accepted_at: float = field(default_factory=trio.current_time)
    received_at: float | None = None  # the request
    started_at: float | None = None  # the responder, once there is a permit
    replied_at: float | None = None

    async def __aenter__(self) -> None:
        self.connections.begin(self)

    async def receive(self) -> bytes:
        """Receive a request; return nothing if there is none."""
        request = await self._receive_within(self.client_timeout, REQUEST_SIZE)
        # A shutdown may have ended the wait: then the client has not used up its own time.
        if request is None and trio.current_time() >= self.accepted_at + self.client_timeout:
            self.outcome = Outcome.TIMED_OUT
        if request:
            self.in_flight, self.request = True, request
            self.received_at = trio.current_time()
            self.bytes_in = len(request)
            logger.debug("%s sent %d bytes", self.peer, self.bytes_in)
        return request or b""

    async def _receive_within(self, seconds: float, size: int | None = None) -> bytes | None:
        """Receive once; return None if nothing comes in time."""
        with self.shutdown.move_on_after(seconds):
            return bytes(await self.stream.receive_some(size))  # in memory it is a bytearray
        # If this process was held up (SIGSTOP, a paused machine), it may have come in time without
        # being reported: epoll_wait(2) is interrupted. So look once more, in a scope of its own.
        with trio.move_on_after(LAST_LOOK):
            return bytes(await self.stream.receive_some(size))
        return None

    async def send(self, reply: memoryview) -> bool:
        """Send the reply and half-close; return whether the network took all of it in time.

        A half-close says that nothing more will come, and still lets the client send.
        """
        with trio.move_on_after(self.client_timeout):
            await self.stream.send_all(reply)
            self.in_flight, self.outcome = False, Outcome.ANSWERED
            self.bytes_out, self.replied_at = reply.nbytes, trio.current_time()
            if isinstance(self.stream, trio.abc.HalfCloseableStream):
                await self.stream.send_eof()
        if self.in_flight:  # The time was over before all of it was taken.
            self.in_flight, self.outcome = False, Outcome.TIMED_OUT
        return self.outcome is Outcome.ANSWERED

    async def drain(self) -> None:
        """Read what the client still sends, then close (RFC 9112, section 9.6).

        When a socket is closed with unread input in it, the kernel sends a reset, which can
        overtake the reply and destroy it. `trio.SSLStream` cannot half-close, so it is closed at
        once: a TLS client that still sends may lose its reply.
        """
        in_all = self.shutdown.move_on_after(self.client_timeout)
        if isinstance(self.stream, trio.abc.HalfCloseableStream):
            # A checkpoint lets the other tasks run. Meanwhile most clients close, and need not be
            # watched: with 10,000 clients at once the p99 is 20 % lower.
            await trio.lowlevel.checkpoint()
            while (left := in_all.deadline - trio.current_time()) > 0:  # A shutdown moves it.
                surplus = await self._receive_within(min(DRAIN_SILENCE, left))
                if not surplus:
                    break
                self.bytes_in += len(surplus)
            await self.stream.aclose()  # With nothing left to send, it does not wait.
        else:
            with in_all:
                await self.stream.aclose()
        self.closed = True

    async def __aexit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> bool:
        """Settle the outcome, log it, and close the stream. A client that went away ends here."""
        went_away = isinstance(error, trio.BrokenResourceError | trio.ClosedResourceError)
        if went_away:
            self.outcome = Outcome.WENT_AWAY
            if error and error.__cause__:
                # The traceback of the `OSError` behind it leads to a frame in contextlib that
                # refers to it, on Python 3.12 and 3.13. Such a cycle keeps the request and the
                # reply in memory until the garbage collector comes.
                error.__cause__.__traceback__ = None
        elif self.in_flight:  # It was cancelled, or an exception ends the whole server.
            self.outcome = Outcome.CUT_OFF
        self.connections.end(self)
        if not self.closed:
            self.closed = True
            await trio.aclose_forcefully(self.stream)
        return went_away
