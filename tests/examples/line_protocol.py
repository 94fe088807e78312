"""A line protocol: a client sends lines, and receives each of them in capitals a second later.

Once a shutdown begins, the server answers the lines that it has read, then disconnects the client.
A line that arrives during this work is lost. A client that has sent no line has one more second to
send one.
"""

import signal
from functools import partial

import trio

from trio_server import Shutdown, serve_gracefully

stop = Shutdown()


async def serve_lines(stream: trio.SocketStream) -> None:
    received = b""
    while True:
        with stop.move_on_after(30):  # The client has 30 seconds to send a whole line.
            while b"\n" not in received and len(received) < 1000:  # Longer lines are refused.
                data = await stream.receive_some()
                if not data:
                    return
                received += data
        line, newline, received = received.partition(b"\n")
        if not newline:
            return
        await trio.sleep(1)  # The work is outside the block, so a shutdown lets it finish.
        with trio.fail_after(30):  # It is an error if the client does not read its replies.
            await stream.send_all(line.upper() + b"\n")
        if stop.begun and not received:  # Otherwise a busy client would delay the exit.
            return


async def stop_on_signals() -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            stop.begin(5 if stop.begun else 30)


async def main() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_on_signals)
        await serve_gracefully(partial(trio.serve_tcp, serve_lines, 1729), stop)
        nursery.cancel_scope.cancel()  # This ends `stop_on_signals`.


trio.run(main)
