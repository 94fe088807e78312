"""An echo server. SIGTERM or Ctrl-C stops it gracefully, and a second one immediately."""

import signal
from functools import partial

import trio

from trio_server import Shutdown, serve_gracefully

stop = Shutdown()


async def echo(stream: trio.SocketStream) -> None:
    while True:
        with stop.move_on_after(30) as wait:  # Once the shutdown begins, 1 second is left.
            data = await stream.receive_some()
        if wait.cancelled_caught or not data:
            break
        await stream.send_all(data)
        if stop.begun:
            break


async def main() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_gracefully, partial(trio.serve_tcp, echo, 1729), stop)
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            await anext(signals)  # After this block, a signal ends the program at once.
        stop.begin()


trio.run(main)
