"""An echo server. SIGTERM or Ctrl-C stops it gracefully."""

import signal
from functools import partial

import trio

from trio_server import Shutdown, serve_gracefully

stop = Shutdown()


async def receive(stream: trio.SocketStream) -> bytes:
    with stop.move_on_after(30):  # Seconds. In a shutdown, 1 at most.
        return await stream.receive_some()
    return b""  # The time is up.


async def echo(stream: trio.SocketStream) -> None:
    while data := await receive(stream):
        with trio.fail_after(30):  # It is an error if the client does not read.
            await stream.send_all(data)
        if stop.begun:  # Otherwise a client that keeps sending could delay the exit.
            break


async def stop_on_signals() -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            stop.begin(5 if stop.begun else 30)  # seconds for the handlers


async def main() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_on_signals)
        await serve_gracefully(partial(trio.serve_tcp, echo, 1729), stop)
        nursery.cancel_scope.cancel()  # This ends `stop_on_signals`.


trio.run(main)
