"""Requests that a server loses when it is stopped under load."""

import time
from dataclasses import dataclass

import trio
from servers import HOST, Running, is_right

STOP_DELAY = 0.1  # seconds of work for each request
STOP_TIMEOUT = 20.0  # seconds from SIGTERM until the clients give up

REQUEST = b"GET / HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n\r\n" % HOST.encode()

CLIENT_HOST = "127.0.0.2"
"""The address of the clients. On the address of the server, a client could reach itself: the
kernel may choose the server's port for it, when the server has ended."""


@dataclass
class Stop:
    """What the clients of a server saw while it stopped.

    Attributes:
        answered: Requests whose reply arrived whole.
        lost: Requests whose connection was established, and whose reply did not arrive whole.
        seconds: Time from SIGTERM to the end of the process; None if it did not end.
    """

    answered: int = 0
    lost: int = 0
    seconds: float | None = None


def stop_under_load(server: Running, clients: int, load_time: float) -> Stop:
    """Send SIGTERM to a server whose clients send one request after the other.

    The clients continue until the port refuses connections.

    Args:
        server: A fresh server that works for `STOP_DELAY` seconds on each request.
        clients: How many clients.
        load_time: Seconds from the first request to SIGTERM.
    """
    return trio.run(_stop_under_load, server, clients, load_time)


async def _stop_under_load(server: Running, clients: int, load_time: float) -> Stop:
    stop = Stop()
    with trio.move_on_after(load_time + STOP_TIMEOUT):
        async with trio.open_nursery() as nursery:
            for number in range(clients):
                # Spread over the delay, so that replies are due at any moment.
                nursery.start_soon(_run_client, server.port, STOP_DELAY * number / clients, stop)
            await trio.sleep(load_time)
            server.process.terminate()
            signalled = time.monotonic()
            while server.process.poll() is None:
                await trio.sleep(0.01)
            stop.seconds = time.monotonic() - signalled
    return stop


async def _run_client(port: int, wait: float, stop: Stop) -> None:
    await trio.sleep(wait)
    while await _request(port, stop):
        pass


async def _request(port: int, stop: Stop) -> bool:
    """Send a request on a new connection; return False if the port refuses connections."""
    reply = b""
    with trio.socket.socket() as client:
        await client.bind((CLIENT_HOST, 0))
        try:
            await client.connect((HOST, port))
        except ConnectionRefusedError:
            return False
        except ConnectionResetError:  # It was established, and reset at once.
            stop.lost += 1
            return True
        try:
            await client.send(REQUEST)
            while data := await client.recv(1024):
                reply += data
        except OSError:
            pass  # A reset. The reply may have arrived whole before it.
        finally:
            if is_right(reply):
                stop.answered += 1
            else:
                stop.lost += 1
    return True
