"""The life of one connection: receive a request, respond, send the reply, drain, close."""

import fcntl
import logging
import sys
import termios
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import trio

from trio_server.account import Account, Exchange, Outcome
from trio_server.shutdown import Shutdown, check_seconds

Responder: TypeAlias = Callable[[bytes], Awaitable[bytes]]
REQUEST_SIZE = 1024  # bytes; a limit, so that no client can make the server store more
CLIENT_TIMEOUT = 30.0  # seconds; slow networks need a few, and no client may stay for ever
DRAIN_SILENCE = 2.0  # seconds for a silent client, as in Apache httpd; nginx waits for 5

logger: logging.Logger = logging.getLogger("trio_server")


async def serve_connection(
    stream: trio.abc.Stream,
    respond: Responder,
    *,
    client_timeout: float = CLIENT_TIMEOUT,
    shutdown: Shutdown | None = None,
    account: Account | None = None,
) -> Outcome:
    """Serve one client: receive a request, respond, send the reply, drain, close.

    Args:
        stream: The client's stream: TCP, TLS, Unix socket or memory. It is closed before this
            returns. Over TLS, a client that is still sending may lose the reply.
        respond: Async function that turns a request into a reply, both `bytes`. It has no time
            limit. The request is what a single `receive_some` returned: 1 to 1,024 bytes, perhaps
            only the beginning of what the client sent. An exception in the responder is logged,
            and the client gets no reply.
        client_timeout: The client has this many seconds to send its request, and the same again
            to receive the reply and close. A negative number or nan raises `ValueError`.
        shutdown: Shortens the wait for the request. Pass it to `serve_gracefully`, too.
        account: Records the connection.

    Returns:
        How the connection ended. Nothing that the client does raises an exception.
    """
    check_seconds("client_timeout", client_timeout)
    shutdown, account = shutdown or Shutdown(), account or Account()
    # Over TLS, close only the TCP stream: that frees everything, without a TLS goodbye.
    transport: Any = getattr(stream, "transport_stream", stream)
    exchange = account.begin(peer_name(transport))
    async with transport:
        try:
            with shutdown.move_on_after(client_timeout) as wait:
                exchange.request = bytes(await stream.receive_some(REQUEST_SIZE))
            if exchange.request:
                exchange.received_at = trio.current_time()
                await _answer(exchange, stream, respond, client_timeout)
            else:
                # If a shutdown ended the wait, the client was not slow.
                timed_out = wait.cancelled_caught and not shutdown.begun
                exchange.outcome = Outcome.TIMED_OUT if timed_out else Outcome.SENT_NOTHING
        except trio.BrokenResourceError as error:
            exchange.outcome = Outcome.WENT_AWAY
            # On Python 3.12 and 3.13, the traceback of the cause would form a reference cycle, and
            # keep the request in memory.
            if error.__cause__:
                error.__cause__.__traceback__ = None
        finally:
            # Cancelled before it read a request. If none has arrived, none was cut off.
            if exchange.outcome is Outcome.CUT_OFF and not exchange.request:
                is_socket = isinstance(transport, trio.SocketStream)
                if is_socket and not unread_bytes(transport.socket):
                    exchange.outcome = Outcome.SENT_NOTHING
            account.end(exchange)
    return exchange.outcome


async def _answer(
    exchange: Exchange, stream: trio.abc.Stream, respond: Responder, client_timeout: float
) -> None:
    """Make the reply, send it, half-close and drain."""
    try:
        # This accepts any bytes-like object. A `str` or `None` raises `TypeError`.
        reply = memoryview(await respond(exchange.request)).cast("B")
    except* Exception as group:  # It is a group if the responder has opened a nursery.
        exchange.outcome = Outcome.FAILED
        logger.error("%s: the responder failed", exchange.peer, exc_info=unwrapped(group))  # noqa: TRY400
    if exchange.outcome is Outcome.FAILED:  # Python allows no `return` in `except*`.
        return
    latest = trio.current_time() + client_timeout
    with trio.CancelScope(deadline=latest) as limit:
        await stream.send_all(reply)
        exchange.outcome, exchange.reply_size = Outcome.ANSWERED, reply.nbytes
        exchange.answered_at = trio.current_time()
        if isinstance(stream, trio.abc.HalfCloseableStream):
            # A half-close means: I will send nothing more, but you still may. If a socket that
            # holds unread data is closed, the kernel sends a reset. It can overtake the reply and
            # destroy it. So read until the client has closed, too (RFC 9112, section 9.6).
            await stream.send_eof()
            # Let other tasks run once. On a busy server, most clients have closed by then, so the
            # read below need not wait. With 10,000 clients, the slowest 1 % wait 25 % less.
            await trio.lowlevel.checkpoint()
            received: object = True
            while received:
                limit.deadline = min(trio.current_time() + DRAIN_SILENCE, latest)
                received = await stream.receive_some()
        else:  # TLS cannot half-close. So a client that is still sending may lose the reply.
            await stream.aclose()
    if exchange.outcome is not Outcome.ANSWERED:  # The client did not receive the reply in time.
        exchange.outcome = Outcome.TIMED_OUT


def unread_bytes(socket: trio.socket.SocketType) -> int:
    """Return how many bytes the kernel has received for a socket (tcp(7), ``FIONREAD``)."""
    if socket.fileno() < 0:  # closed
        return 0
    return int.from_bytes(fcntl.ioctl(socket, termios.FIONREAD, bytes(4)), sys.byteorder)


def unwrapped(error: Exception) -> Exception:
    """Return the only exception in a group, or the group if it has several."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def peer_name(transport: Any) -> str:  # noqa: ANN401 - any stream, even one without a socket
    """Return the address of the client, for the log."""
    try:
        address = transport.socket.getpeername()
    except AttributeError:
        return "client"  # in memory
    except OSError:
        return "unknown client"  # The client reset the connection before it was accepted.
    return format_address(address) if isinstance(address, tuple) else "client"  # a Unix socket


def format_address(address: tuple[Any, ...]) -> str:
    """Return an internet address in its usual form: ``127.0.0.1:1729``, ``[::1]:1729``."""
    host = str(address[0]).removeprefix("::ffff:")  # IPv4 on an IPv6 socket
    return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"
