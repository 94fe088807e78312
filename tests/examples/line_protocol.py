"""A line protocol: a client sends lines, and receives each of them in capitals a second later.

A shutdown answers each line that has arrived. It disconnects a client that is silent for a second.
"""

import signal
import sys
from functools import partial

import trio

from trio_server import Shutdown, serve_gracefully

PORT = int(sys.argv[1]) if sys.argv[1:] else 1729
MOST = 1000  # bytes in a line, so that no client can make the server store more
stop = Shutdown()


async def serve_lines(stream: trio.SocketStream) -> None:
    received = b""
    while True:
        with stop.move_on_after(30) as wait:  # The client has this time to send a whole line.
            while b"\n" not in received and len(received) <= MOST:
                data = await stream.receive_some(MOST)
                if not data:
                    return
                received += data
        line, newline, received = received.partition(b"\n")
        if wait.cancelled_caught or not newline:
            return
        await trio.sleep(1)  # The work. It is outside the block, so a shutdown lets it finish.
        with trio.move_on_after(30) as wait:
            await stream.send_all(line.upper() + b"\n")
        if wait.cancelled_caught:  # The client does not read its replies.
            return


async def stop_on_signals() -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            stop.begin(0 if stop.begun else 30)


async def main() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_on_signals)
        await serve_gracefully(partial(trio.serve_tcp, serve_lines, PORT), stop)
        nursery.cancel_scope.cancel()


trio.run(main)
