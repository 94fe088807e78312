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


async def stop_on_signals() -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            stop.begin(0 if stop.begun else 30)


async def main() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_on_signals)
        await serve_gracefully(partial(trio.serve_tcp, echo, 1729), stop)
        nursery.cancel_scope.cancel()  # This ends `stop_on_signals`, which would wait for ever.


trio.run(main)
