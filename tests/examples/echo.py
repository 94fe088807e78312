"""An echo server. SIGTERM or Ctrl-C stops it gracefully, and a second one immediately."""

import signal
from functools import partial

import trio

from trio_server import Shutdown, serve_gracefully

stop = Shutdown()


async def receive(stream: trio.SocketStream) -> bytes:
    with stop.move_on_after(30):  # A shutdown ends the wait within 1 second.
        return await stream.receive_some()
    return b""  # The time is up.


async def echo(stream: trio.SocketStream) -> None:
    while data := await receive(stream):
        await stream.send_all(data)
        if stop.begun:  # Otherwise a client that keeps sending could delay the exit.
            break


async def main() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_gracefully, partial(trio.serve_tcp, echo, 1729), stop)
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            await anext(signals)
        stop.begin()  # From here on, a second signal ends the program at once, as usual.


trio.run(main)
